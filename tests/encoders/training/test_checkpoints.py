"""Checkpoints come back whole or are refused, also after kill -9 in the middle of a save."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from encoders.errors import CheckpointError
from encoders.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint


def save(folder: Path, step: int, run: str = "r") -> Path:
    return save_checkpoint(
        folder,
        step,
        {"weights": torch.full((100,), float(step)), "step": step},
        {"run": run, "metrics": {"loss": 0.5}},
    )


def test_load_checkpoint_saved_state_and_meta_come_back(tmp_path: Path) -> None:
    place = save(tmp_path, 7)
    state, meta = load_checkpoint(place, "r")
    assert state["step"] == 7
    assert state["weights"].tolist() == [7.0] * 100
    assert (meta["step"], meta["metrics"]) == (7, {"loss": 0.5})


def test_save_checkpoint_keeps_last_two_and_replaces_named(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save(tmp_path, step)
        save_checkpoint(tmp_path, step, {"step": step}, {}, name="best")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000030"]
    assert load_checkpoint(tmp_path / "best")[0] == {"step": 30}


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "missing"])
def test_load_checkpoint_damaged_is_refused_before_parsing(tmp_path: Path, damage: str) -> None:
    place = save(tmp_path, 1)
    state = place / "state.pt"
    content = bytearray(state.read_bytes())
    if damage == "missing":
        state.unlink()
    else:
        content[len(content) // 2] ^= 1
        state.write_bytes(
            {"truncate": content[: len(content) // 2], "flip": content, "empty": b""}[damage]
        )
    with pytest.raises(
        CheckpointError,
        match=r"step-00000001.*(truncated or altered|is missing).*Remove this folder",
    ):
        load_checkpoint(place)


def test_load_checkpoint_other_run_version_or_no_meta_is_refused(tmp_path: Path) -> None:
    place = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another run"):
        load_checkpoint(place, "other")
    meta = json.loads((place / "meta.json").read_text())
    (place / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99, but this code reads 1"):
        load_checkpoint(place)
    (place / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        load_checkpoint(place)


WRITER = """
import sys, itertools, torch
from pathlib import Path
from encoders.training.checkpoints import save_checkpoint
print("ready", flush=True)
for step in itertools.count(1):
    state = {"weights": torch.full((200_000,), float(step))}
    save_checkpoint(Path(sys.argv[1]), step, state, {"run": "r"})
"""


@pytest.mark.slow
def test_save_checkpoint_kill_9_leaves_whole_checkpoint(tmp_path: Path) -> None:
    """A process that saves without pause is killed; the newest checkpoint is whole, and the next
    save clears what was left half-done.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    while len(list_checkpoints(tmp_path)) < 2:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = list_checkpoints(tmp_path)[-1]
    state, meta = load_checkpoint(newest, "r")
    assert (state["weights"] == meta["step"]).all()
    save(tmp_path, meta["step"] + 1)
    assert not list(tmp_path.glob("*.partial"))
