"""`omni train` under torchrun: two gloo processes make one bundle and resume from a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from encoders.towers.bundle import load_bundle
from encoders.training.checkpoints import list_checkpoints
from tests.helpers.training_examples import DIMENSION, write_run

FIRST = """
steps = 6
log_every = 2
checkpoint_every = 3
"""
LAST = """
[[datasets]]
name = "pin"

[[datasets]]
name = "query"

[validation]
fraction = 0.0
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_run(tmp_path, FIRST, LAST)


def torchrun(config: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "encoders.commands.train",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    return subprocess.run(
        [*launch, str(config), "--out", str(out), *more],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_train_two_processes_make_one_bundle_and_resume(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = torchrun(config, out, "--steps", "6", "--json")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)  # one process prints
    assert result["steps"] == 6
    assert first.stderr.count("step 6 of 6") == 1
    bundle = load_bundle(out / "model")
    assert bundle.space_id == result["space_id"]
    assert bundle.embed_queries(["red chair"]).shape == (1, DIMENSION)
    assert len(list_checkpoints(out / "checkpoints")) == 2
    again = torchrun(config, out, "--steps", "6")
    assert again.returncode == 0, again.stderr
    assert "Next: omni evaluate" in again.stderr
    assert load_bundle(out / "model").space_id == result["space_id"], "nothing is trained twice"


@pytest.mark.slow
def test_train_max_seconds_on_two_processes_is_refused(config: Path, tmp_path: Path) -> None:
    config.write_text("max_seconds = 5\n" + config.read_text())
    result = torchrun(config, tmp_path / "run")
    assert result.returncode != 0
    assert "max_seconds needs a single process" in " ".join((result.stdout + result.stderr).split())
    assert not (tmp_path / "run" / "model").exists()
