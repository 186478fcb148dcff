"""Report a training run: its size, a line per logged step, validations, the batch that broke it."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from encoders.errors import ConfigError, MissingDependency, TrainingDiverged
from encoders.training.data.batches import BatchPlan, DatasetBatch
from encoders.training.data.prepare import PreparedData
from encoders.training.data.sampling import PairSet
from encoders.training.distributed import world_size
from encoders.training.inputs import Towers, TrainInputs
from encoders.training.step import StepReport

Int64 = npt.NDArray[np.int64]
log = logging.getLogger(__name__)


@dataclass
class Stopwatch:
    """Times a run since its start or resume: the loop by the clock, its steps by clock and CPU."""

    earlier: float = 0.0
    """Seconds that earlier calls spent in the loop."""
    begun: float = field(default_factory=time.perf_counter)
    steps: int = 0
    pairs: int = 0
    """Training pairs of the steps, over all processes."""
    step_seconds: float = 0.0
    """Wall-clock seconds in steps; validation and checkpoints are not counted."""
    cpu_seconds: float = 0.0
    """Processor seconds in steps, all threads."""
    last_step_seconds: float = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds in the loop since the start or resume."""
        return time.perf_counter() - self.begun

    @property
    def total(self) -> float:
        """Seconds in the loop, earlier calls included."""
        return self.earlier + self.elapsed

    @contextmanager
    def step(self, pairs: int) -> Iterator[None]:
        """Time the block as one step."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.last_step_seconds = time.perf_counter() - wall
        self.step_seconds += self.last_step_seconds
        self.cpu_seconds += time.process_time() - cpu
        self.pairs += pairs
        self.steps += 1


class Position(NamedTuple):
    """How far a run is."""

    step: int
    """Steps taken, those before a resume included."""
    steps: int
    """Steps of the whole run."""
    time_spent: float
    """Part of the time limit that is over; 0 without a limit."""

    @property
    def done(self) -> float:
        """Part of the run that is over, at most 1."""
        return min(max(self.step / self.steps, self.time_spent), 1.0)

    def shown(self) -> str:
        """Write the step among those expected: of about as many where the clock decides."""
        if self.time_spent <= self.step / self.steps:
            return f"step {self.step:,} of {self.steps:,} ({self.done:.0%})"
        expected = max(self.step, round(self.step / self.done))
        return f"step {self.step:,} of about {expected:,} ({self.done:.0%})"

    def seconds_left(self, watch: Stopwatch) -> float:
        """Estimate the time until the last step or the time limit."""
        left = watch.step_seconds / watch.steps * (self.steps - self.step)
        if self.time_spent:
            left = min(left, watch.total / self.time_spent * (1 - self.time_spent))
        return max(left, 0.0)


class RunLog:
    """Logs what a run does (INFO), writes TensorBoard scalars and remembers the figures.

    Args:
        quiet: Log no lines.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._tensorboard: Any = None
        self.history: list[dict[str, float]] = []
        """One entry per logged step or validation."""

    def say(self, message: str) -> None:
        """Log a line."""
        if not self._quiet:
            log.info(message)

    def open_tensorboard(self, output: Path | None) -> None:
        """Also write scalars to ``output/tensorboard``.

        Raises:
            ConfigError: There is no output folder.
            MissingDependency: tensorboard is not installed.
        """
        if output is None:
            raise ConfigError("tensorboard = true needs an output folder (--output).")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependency("tensorboard", "dev", "tensorboard = true") from error
        self._tensorboard = SummaryWriter(str(output / "tensorboard"))

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def announce(
        self, inputs: TrainInputs, plan: BatchPlan, towers: Towers, steps: int, seconds: float
    ) -> None:
        """Say the size of the run: data, batch, model; ``seconds`` is how long set-up took."""
        prepared = inputs.prepared
        for note in prepared.notes:
            self.say(note)
        self.say(
            f"{prepared.pairs_total:,} pairs, {len(prepared.texts):,} queries,"
            f" {len(prepared.catalogue):,} entities,"
            f" {len(inputs.featurizer.vocabulary):,} n-grams ({seconds:.1f}s)"
        )
        for i, pair_set in enumerate(prepared.pair_sets):
            self.say(
                _batch_line(pair_set, prepared.pairs_per_step[i], plan.negatives_per_step(i), steps)
            )
        count = sum(p.numel() for p in towers.parameters() if p.requires_grad)
        self.say(
            f"{steps:,} steps, {count / 1e6:.1f}M parameters in training, {inputs.device.type},"
            f" {world_size()} process(es)"
        )

    def step(self, report: StepReport, at: Position, watch: Stopwatch) -> None:
        """Say and record a step that was just taken."""
        loss, rate, elapsed = float(report.loss), watch.pairs / watch.step_seconds, watch.elapsed
        measured: dict[str, float] = {}
        # Empty on a last step that the clock chose: it was not measured.
        if report.batch_recall:
            recalls = report.batch_recall.values()
            measured["batch_recall@10"] = sum(recalls) / len(recalls)
        recall = "".join(f" | batch-recall@10 {value:.3f}" for value in measured.values())
        self.say(
            f"{at.shown()} | loss {loss:.4f}{recall} | {1000 * watch.last_step_seconds:.0f}ms"
            f" | {rate:,.0f} pairs/s | {elapsed / 60:.1f}m"
            f" | eta {at.seconds_left(watch) / 60:.1f}m"
        )
        losses = {f"loss/{name}": float(value) for name, value in report.task_losses.items()}
        self._write({"loss": loss, **measured, "pairs_per_second": rate, **losses}, at.step)
        self.history.append(
            {"step": at.step, "loss": loss, **measured, "seconds": elapsed, **losses}
        )

    def validation(self, recalls: dict[str, float], step: int) -> None:
        """Say and record a validation."""
        by_type = (
            f"{name.split('/', 2)[-1]} {value:.4f}"
            for name, value in recalls.items()
            if name.count("/") > 1
        )
        self.say(f"validation labelled Recall@10 at step {step}: {' | '.join(by_type)}")
        self._write(recalls, step)
        self.history.append({"step": step, **recalls})

    def _write(self, scalars: dict[str, float], step: int) -> None:
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)


def _batch_line(pair_set: PairSet, pairs: int, negatives: int, steps: int) -> str:
    """Describe one dataset's part of the batches."""
    size = len(pair_set.queries)
    all_of_them = " (all there are)" if negatives == len(pair_set.pool) else ""
    candidates = ", ".join(task.candidate for task in pair_set.tasks)
    return (
        f"  {pair_set.config.name}: {size:,} pairs, {pairs} a step, {negatives:,} random"
        f" negatives{all_of_them}, {steps * pairs / size:.1f} passes; candidates: {candidates}"
    )


class BrokenStep(NamedTuple):
    """A step whose loss or gradient is not finite."""

    step: int
    value: float
    """The loss, or the norm of the gradient."""
    task_losses: dict[str, float]
    batch: list[DatasetBatch]


def stop_diverged(broken: BrokenStep, prepared: PreparedData, output: Path | None) -> NoReturn:
    """Save the batch that broke the run as JSON, in ``output`` or a new folder, and stop.

    Raises:
        TrainingDiverged: Always.
    """
    folder = output or Path(tempfile.mkdtemp(prefix="omni-diverged-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"diverged-step-{broken.step:08d}.json"
    content = {
        "step": broken.step,
        "loss": str(broken.value),
        "task_losses": {name: str(loss) for name, loss in broken.task_losses.items()},
        "datasets": {
            pair_set.config.name: _readable(part, pair_set, prepared)
            for pair_set, part in zip(prepared.pair_sets, broken.batch, strict=True)
        },
    }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    raise TrainingDiverged(
        f"the loss of step {broken.step} is {broken.value}; training stopped and the batch was"
        f" saved to {path}. Earlier checkpoints are untouched. Lower optimiser.learning_rate or"
        " raise optimiser.warmup_steps, and look for broken vectors in the batch."
    )


def _readable(
    part: DatasetBatch, pair_set: PairSet, prepared: PreparedData
) -> dict[str, list[str]]:
    """Name a batch's queries by text and its candidates by id, related queries by text too."""
    texts, ids = prepared.texts, prepared.catalogue["id"]

    def names(candidates: Int64) -> list[str]:
        if pair_set.is_related_queries:
            return [texts[number] for number in candidates.tolist()]
        named: list[str] = ids.gather(candidates).to_list()
        return named

    return {
        "queries": [texts[number] for number in pair_set.queries[part.pairs].tolist()],
        "positives": names(pair_set.candidates[part.pairs]),
        "negatives": names(pair_set.pool[part.negatives]),
    }
