"""What a run tells about itself: its size, a line per step, validation, TensorBoard, and the batch that broke it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from encoders.config.train_config import TrainConfig
from encoders.errors import ConfigError, MissingDependency, TrainingDiverged
from encoders.towers.entity_features import EntityFeaturizer
from encoders.training.data.batches import BatchPlan, DatasetBatch
from encoders.training.data.prepare import PreparedData
from encoders.training.distributed import world_size
from encoders.training.inputs import Towers
from encoders.training.step import StepReport

Talk = Callable[[str], None]


def silent(message: str) -> None:
    """Say nothing."""


def open_tensorboard(output: Path | None, config: TrainConfig) -> Any:
    """A TensorBoard writer in ``output/tensorboard`` when the config asks for one, else None.

    Raises:
        ConfigError: There is no output folder.
        MissingDependency: tensorboard is not installed.
    """
    if not config.tensorboard:
        return None
    if output is None:
        raise ConfigError("tensorboard = true needs an output folder (--output).")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependency("tensorboard", "dev", "tensorboard = true") from error
    return SummaryWriter(str(output / "tensorboard"))


def announce(
    talk: Talk,
    prepared: PreparedData,
    plan: BatchPlan,
    featurizer: EntityFeaturizer,
    towers: Towers,
    steps: int,
    device: torch.device,
    seconds: float,
) -> None:
    """The run in a few lines: data, batch, model."""
    sizes = (
        f"{prepared.pairs_total:,} pairs, {len(prepared.texts):,} queries,"
        f" {len(prepared.catalogue):,} entities"
    )
    talk(f"{sizes}, {len(featurizer.vocabulary):,} n-grams ({seconds:.1f}s)")
    for i, (pair_set, pairs) in enumerate(
        zip(prepared.pair_sets, prepared.pairs_per_step, strict=True)
    ):
        passes = steps * pairs / len(pair_set.queries)
        tasks = ", ".join(task.candidate for task in pair_set.tasks)
        negatives = plan.negatives_per_step(i)
        whole = " (all there are)" if negatives == len(pair_set.pool) else ""
        batch = (
            f"{len(pair_set.queries):,} pairs, {pairs} a step, {negatives:,} random"
            f" negatives{whole}"
        )
        talk(f"  {pair_set.config.name}: {batch}, {passes:.1f} passes; candidates: {tasks}")
    count = sum(p.numel() for p in towers.parameters() if p.requires_grad)
    talk(
        f"{steps:,} steps, {count / 1e6:.1f}M parameters in training, {device.type}, {world_size()}"
        " process(es)"
    )


def log_step(
    talk: Talk,
    writer: Any,
    report: StepReport,
    step: int,
    steps: int,
    seconds: float,
    pairs: int,
    busy: float,
    spent: float,
    begun: float,
) -> dict[str, float]:
    """Print and record one step; returns its figures.

    ``spent`` is the part of the time limit that is over, 0 without a limit.
    """
    recalls = list(
        report.batch_recall.values()
    )  # empty on a last step that the clock chose: it was not measured
    measured = {"batch_recall@10": sum(recalls) / len(recalls)} if recalls else {}
    rate = pairs / busy
    done = max(step / steps, spent)
    elapsed = time.perf_counter() - begun
    left = (
        elapsed / max(done, 1e-9) * (1 - min(done, 1.0))
        if spent
        else busy / max(pairs, 1) * (pairs / max(step, 1)) * (steps - step)
    )
    width = len(str(steps))
    talk(
        f"step {step:0{width}d}/{steps} ({100 * min(done, 1):.1f}%) | loss {float(report.loss):.4f}"
        f" | {''.join(f'batch-recall@10 {recall:.3f} | ' for recall in measured.values())}{1000 * seconds:.0f}ms"
        f" | {rate:,.0f} pairs/s | {elapsed / 60:.1f}m | eta {left / 60:.1f}m"
    )
    losses = {f"loss/{name}": float(value) for name, value in report.task_losses.items()}
    if writer is not None:
        scalars = {"loss": float(report.loss), **measured, "pairs_per_second": rate, **losses}
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
    return {"step": step, "loss": float(report.loss), **measured, "seconds": elapsed, **losses}


def show_recalls(talk: Talk, writer: Any, recalls: dict[str, float], step: int) -> None:
    """Print and record one validation."""
    parts = " | ".join(
        f"{name.rsplit('/', 1)[-1]} {value:.4f}"
        for name, value in recalls.items()
        if name.count("/") > 1
    )
    talk(f"validation labelled Recall@10 at step {step}: {parts}")
    if writer is not None:
        for name, value in recalls.items():
            writer.add_scalar(name, value, step)


def stop_diverged(
    output: Path | None,
    step: int,
    loss: float,
    batch: list[DatasetBatch],
    prepared: PreparedData,
    report: StepReport,
) -> NoReturn:
    """Save the batch that broke the run as JSON, then raise TrainingDiverged."""
    folder = output if output else Path(tempfile.mkdtemp(prefix="omni-diverged-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"diverged-step-{step:08d}.json"
    content: dict[str, Any] = {
        "step": step,
        "loss": str(loss),
        "task_losses": {name: str(float(v)) for name, v in report.task_losses.items()},
        "datasets": {},
    }
    ids = prepared.catalogue["id"]
    for pair_set, part in zip(prepared.pair_sets, batch, strict=True):
        related = pair_set.is_related_queries

        def name(rows: Any, related: bool = related) -> list[str]:
            return (
                [prepared.texts[row] for row in rows.tolist()]
                if related
                else ids.gather(rows).to_list()
            )

        content["datasets"][pair_set.config.name] = {
            "queries": [prepared.texts[row] for row in pair_set.queries[part.pairs].tolist()],
            "positives": name(pair_set.candidates[part.pairs]),
            "negatives": name(pair_set.pool[part.negatives]),
        }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    raise TrainingDiverged(
        f"the loss of step {step} is {loss}; training stopped and the batch was saved to {path}."
        " Earlier checkpoints are untouched. Lower optimiser.learning_rate or raise"
        " optimiser.warmup_steps, and look for broken vectors in the batch."
    )
