"""Two gloo processes must give the loss and the gradient of one process with the union batch: real
processes, the real training step.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.encoders.training import gathering_worker
from tests.encoders.training.gathering_worker import step_results

ROOT = Path(__file__).parents[3]


def run_two(folder: Path) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, gathering_worker.__file__, str(rank), "2", str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in started:
        _, stderr = process.communicate(timeout=280)
        assert process.returncode == 0, stderr.decode()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_step_two_processes_equal_one_with_union_batch(
    tmp_path: Path,
) -> None:
    two = run_two(tmp_path)
    for mode in ("plain", "cached"):
        one = step_results(0, mode == "cached")
        assert one["loss"].min() > 0
        for result in two:
            torch.testing.assert_close(result[mode]["loss"], one["loss"], rtol=1e-5, atol=1e-6)
            for name, expected in one["gradients"].items():
                got = result[mode]["gradients"][name]
                torch.testing.assert_close(
                    got,
                    torch.zeros_like(got) if expected is None else expected,
                    rtol=1e-3,
                    atol=1e-5,
                    msg=lambda m, n=name: f"{n}: {m}",
                )
        moved = [
            name for name, g in one["gradients"].items() if g is not None and g.abs().max() > 1e-3
        ]
        assert {"log_scales", "query.projection.weight", "entities.unified.table"} <= set(moved)
    # Gathering alone: rank order, and each row's gradient is the sum over processes of what
    # multiplied it.
    assert two[0]["gathered"][:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert two[0]["simple"][:, 0].tolist() == [0.0, 1.0 * (1 + 2)]
    assert two[1]["simple"][:, 0].tolist() == [2.0 * (1 + 2), 3.0 * (1 + 2)]
    assert two[0]["agreed"] == two[1]["agreed"] == [True, False, False]
