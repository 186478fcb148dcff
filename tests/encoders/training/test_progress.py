"""What a run says about itself."""

import logging

import pytest
import torch

from encoders.training.progress import Position, RunLog, Stopwatch
from encoders.training.step import StepReport


def watch_of(steps: int, seconds: float, earlier: float = 0.0) -> Stopwatch:
    watch = Stopwatch(earlier=earlier)
    watch.steps = steps
    watch.step_seconds = seconds
    watch.pairs = 10 * steps
    return watch


def test_seconds_left_after_resume_counts_only_own_steps() -> None:
    """Two steps of 3 s were taken since the resume at step 100."""
    at = Position(step=102, steps=112, time_spent=0.0)
    assert at.seconds_left(watch_of(2, 6.0)) == pytest.approx(30.0)
    assert at.done == pytest.approx(102 / 112)


def test_seconds_left_with_time_limit_is_what_ends_first() -> None:
    watch = watch_of(2, 6.0, earlier=30.0)  # the loop has taken 30 s in all
    soon = Position(step=2, steps=1000, time_spent=0.5)
    assert soon.seconds_left(watch) == pytest.approx(30.0, abs=0.5)
    assert Position(step=2, steps=4, time_spent=0.5).seconds_left(watch) == pytest.approx(6.0)
    assert Position(step=2, steps=1000, time_spent=1.2).seconds_left(watch) == 0.0
    assert Position(step=2, steps=1000, time_spent=1.2).done == 1.0


@pytest.mark.parametrize("quiet", [False, True])
def test_run_log_step_line_and_history(caplog: pytest.LogCaptureFixture, quiet: bool) -> None:
    caplog.set_level(logging.INFO, "encoders")
    run_log = RunLog(quiet=quiet)
    report = StepReport(torch.tensor(1.5), 3, 4, {"pin/entity": torch.tensor(1.5)})
    report.batch_recall.update({"pin/entity": 0.2, "product/entity": 0.4})
    run_log.step(report, Position(7, 1000, 0.0), watch_of(7, 0.7))
    expected = "step 7 of 1,000 (1%) | loss 1.5000 | batch-recall@10 0.300 | 0ms | 100 pairs/s"
    assert [line.startswith(expected) for line in caplog.messages] == ([] if quiet else [True])
    (entry,) = run_log.history
    assert entry["loss"] == entry["loss/pin/entity"] == 1.5
    assert (entry["step"], entry["batch_recall@10"]) == (7, pytest.approx(0.3))
