"""Train the query and entity towers together: flags, data, model, optimiser, loop, save, in the order they happen.

Notable: each distinct query and entity of a batch is encoded once, for all tasks; queries are
encoded in order of length, so little is padding; the batch follows from seed and step alone, so a
resumed run equals an uninterrupted one to the bit (CPU); with torchrun every process takes a slice
of the same batch, and vectors are gathered with gradients.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from encoders.config.train_config import TrainConfig, to_table
from encoders.errors import CheckpointError, ConfigError
from encoders.towers.entity_features import EntityFeaturizer
from encoders.towers.entity_tower import EntityEncoder
from encoders.towers.query_tower import QueryEncoder, create_query_encoder
from encoders.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from encoders.training.data.batches import BatchPlan
from encoders.training.data.prepare import require_entity_tower
from encoders.training.data.source_tables import TrainingData
from encoders.training.device import choose_device, computes_bf16
from encoders.training.distributed import (
    average_gradients,
    broadcast_parameters,
    process_rank,
    world_size,
)
from encoders.training.inputs import UNIFIED, Towers, build_inputs, build_towers, run_fingerprint
from encoders.training.optimisers import (
    create_optimiser,
    parameter_groups,
    schedule,
    set_learning_rates,
)
from encoders.training.progress import (
    Talk,
    announce,
    log_step,
    open_tensorboard,
    show_recalls,
    silent,
    stop_diverged,
)
from encoders.training.step import loss_and_gradients
from encoders.training.validation import validation_recall
from encoders.training.weight_interpolation import (
    choose_query_scale,
    choose_residual_scales,
    learned_parameters,
    scaled_towers,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run made."""

    query_encoder: QueryEncoder
    entity_encoders: dict[str, EntityEncoder]
    """By entity type; with unified towers every type holds the same object."""
    featurizer: EntityFeaturizer
    metrics: dict[str, float]
    """Last loss, and validation labelled Recall@10 per entity type (``validation/recall@10/pin``) where there is validation. A finished run
    whose checkpoint was written before losses were kept there has no ``loss``.
    """
    pairs_per_second: float
    """Training pairs per second of step time since the start or the resume, validation and checkpoints not counted; 0: no step was left."""
    pairs_per_cpu_second: float
    """The same by processor time, all threads: what a busy machine does not distort."""
    steps: int
    """Optimiser steps taken in all, those before a resume included."""
    config: TrainConfig
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per log line or validation since the start or the resume."""


def train(
    config: TrainConfig,
    data: TrainingData,
    *,
    output: Path | None = None,
    resume: bool = True,
    query_encoder: QueryEncoder | None = None,
    initial: TrainResult | None = None,
    quiet: bool = False,
    for_bundle: bool = False,
) -> TrainResult:
    """Train the towers on pairs.

    Args:
        config: The run.
        data: Catalogue and pairs.
        output: Folder for checkpoints, TensorBoard events and a diverged batch; None: nothing is
            written.
        resume: Continue from the last checkpoint in ``output`` when there is one. False: an output
            folder with checkpoints is refused.
        query_encoder: Start from this query tower (changed in place) instead of
            ``config.model.query_encoder``.
        initial: Start from the towers and featuriser of an earlier run; what the new catalogue adds
            must fit its features.
        quiet: Log nothing (otherwise INFO lines of this module, one per logged step).
        for_bundle: Refuse, before the first step, a run that would make no entity tower.

    Returns:
        The trained towers, in evaluation mode, on the CPU.

    Raises:
        SchemaError, DataError, ConfigError: The tables or the config cannot be trained on.
        CheckpointError: ``output`` holds a damaged checkpoint or another run's.
        TrainingDiverged: The loss became NaN or infinite; the batch was saved, and no checkpoint
            was touched.
    """
    # --------------------------------------------------------------------------------------- device
    processes, rank = world_size(), process_rank()
    if processes > 1 and config.max_seconds:
        raise ConfigError(
            "max_seconds needs a single process: clocks of several would disagree about the"
            " schedule. Set steps instead."
        )
    device = choose_device(config.device)
    talk: Talk = log.info if rank == 0 and not quiet else silent
    if config.precision == "bf16" and not computes_bf16(device.type):
        talk(
            "note: this processor has no instructions for bf16 and would imitate them, many times"
            " slower than fp32: training in fp32"
        )
    torch.manual_seed(config.seed)

    # ----------------------------------------------------------------------------------------- data
    started = time.perf_counter()
    if query_encoder is None:
        query_encoder = (
            initial.query_encoder
            if initial
            else create_query_encoder(config.model.query_encoder, config.model.dimension)
        )
    inputs, featurizer = build_inputs(
        data, config, query_encoder, device, processes, initial.featurizer if initial else None
    )
    prepared = inputs.prepared
    if for_bundle:
        require_entity_tower(prepared)
    for note in prepared.notes:
        talk(note)
    plan = BatchPlan(prepared, config, processes)
    steps = config.steps or max(
        1, math.ceil(config.epochs * prepared.pairs_total / sum(prepared.pairs_per_step))
    )

    # ---------------------------------------------------------------------------------------- model
    towers = build_towers(
        query_encoder, featurizer, inputs, initial.entity_encoders if initial else None
    )
    broadcast_parameters(towers)
    optimiser = create_optimiser(
        parameter_groups(
            towers.query, towers.entities.values(), [towers.log_scales], config.optimiser
        ),
        config.optimiser,
    )
    start = learned_parameters(towers.query) if config.validation.query_interpolation else {}
    announce(talk, prepared, plan, featurizer, towers, steps, device, time.perf_counter() - started)

    # --------------------------------------------------------------------------------------- resume
    run = run_fingerprint(inputs)
    checkpoints = output / "checkpoints" if output else None
    loop = _LoopState()
    if checkpoints and (found := list_checkpoints(checkpoints)):
        if not resume:
            raise CheckpointError(
                f"{checkpoints} already holds a run (at {found[-1].name}). Resume it, or train into"
                " an empty output folder."
            )
        state, _ = load_checkpoint(found[-1], run)
        towers.load_state_dict(state["towers"])
        optimiser.load_state_dict(state["optimiser"])
        loop = _LoopState(**state["loop"])
        talk(f"resumed from {found[-1].name}")
    writer = open_tensorboard(output, config) if rank == 0 else None

    # ----------------------------------------------------------------------------------------- loop
    towers.train()
    parameters = [p for p in towers.parameters() if p.requires_grad]
    history: list[dict[str, float]] = []
    step_seconds, cpu_seconds, pairs_seen, begun = 0.0, 0.0, 0, time.perf_counter()
    patience = config.validation.patience
    earlier = loop.seconds  # spent before this call
    stopped = (
        loop.step >= steps
        or bool(patience and loop.without_gain >= patience)
        or 0 < config.max_seconds <= loop.seconds
    )
    while not stopped:
        step = loop.step
        tick, cpu_tick = time.perf_counter(), time.process_time()
        torch.manual_seed((config.seed * 1_000_003 + step) * 4099 + rank)
        elapsed = (earlier + tick - begun) / config.max_seconds if config.max_seconds else None
        set_learning_rates(optimiser, schedule(step, steps, config.optimiser, elapsed))
        logs = (step + 1) % config.log_every == 0 or step in (0, steps - 1)
        batch = plan.step(step)
        report = loss_and_gradients(towers, inputs, batch, measure=logs)
        average_gradients(parameters)
        loss = loop.loss = float(report.loss)
        if not math.isfinite(loss):
            stop_diverged(output, step, loss, batch, prepared, report)
        if config.optimiser.clip_norm:
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimiser.clip_norm)
            if not bool(torch.isfinite(norm)):
                stop_diverged(output, step, float(norm), batch, prepared, report)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - tick
        cpu_seconds += time.process_time() - cpu_tick
        step_seconds, pairs_seen, loop.step = (
            step_seconds + seconds,
            pairs_seen + sum(prepared.pairs_per_step),
            step + 1,
        )
        loop.seconds = earlier + time.perf_counter() - begun
        spent = loop.seconds / config.max_seconds if config.max_seconds else 0.0
        stopped = loop.step >= steps or spent >= 1.0

        if logs or stopped:
            entry = log_step(
                talk,
                writer,
                report,
                loop.step,
                steps,
                seconds,
                pairs_seen,
                step_seconds,
                spent,
                begun,
            )
            history.append(entry)
        if prepared.validation and (
            stopped
            or (config.validation.every_steps and loop.step % config.validation.every_steps == 0)
        ):
            recalls = validation_recall(towers, inputs)
            history.append({"step": loop.step, **recalls})
            show_recalls(talk, writer, recalls, loop.step)
            stopped = (
                loop.keep_score(recalls, towers, checkpoints if rank == 0 else None, patience, talk)
                or stopped
            )
        due = config.checkpoint_every and loop.step % config.checkpoint_every == 0
        if checkpoints and rank == 0 and (due or stopped):
            state = {
                "towers": towers.state_dict(),
                "optimiser": optimiser.state_dict(),
                "loop": loop.plain(),
            }
            save_checkpoint(
                checkpoints,
                loop.step,
                state,
                {"run": run, "config": to_table(config), "metrics": loop.metrics},
            )
    # ----------------------------------------------------------------------------------------- save
    loop.restore_best(towers, checkpoints)
    scales: dict[str, float] = {}
    if config.validation.residual_weights and prepared.validation:
        scales, recalls = choose_residual_scales(towers, inputs, talk)
        loop.metrics = {
            **loop.metrics,
            **recalls,
            **{f"residual_scale/{name}": scale for name, scale in scales.items()},
        }
    if config.validation.query_interpolation and prepared.validation:
        kept, recalls = choose_query_scale(towers, inputs, start, scales, talk)
        loop.metrics = {**loop.metrics, **recalls, "query_scale": kept}
    if writer is not None:
        writer.close()
    towers.eval().cpu()
    last = {} if loop.loss is None else {"loss": loop.loss}
    return TrainResult(
        query_encoder=towers.query,
        entity_encoders=scaled_towers(_by_type(towers, data.catalogue), scales),
        featurizer=featurizer,
        metrics={**last, **loop.metrics},
        pairs_per_second=pairs_seen / step_seconds if step_seconds else 0.0,
        pairs_per_cpu_second=pairs_seen / cpu_seconds if cpu_seconds else 0.0,
        steps=loop.step,
        config=config,
        history=history,
    )


def _by_type(towers: Towers, catalogue: pl.DataFrame) -> dict[str, EntityEncoder]:
    if UNIFIED in towers.entities:
        return {
            str(name): towers.entities[UNIFIED]
            for name in sorted(catalogue["entity_type"].unique().to_list())
        }  # type: ignore[misc]
    return dict(towers.entities.items())  # type: ignore[arg-type]


@dataclass
class _LoopState:
    """What the loop remembers between steps, beyond towers and optimiser."""

    step: int = 0
    best: float = -1.0
    best_step: int = 0
    without_gain: int = 0
    seconds: float = 0.0
    """Spent in the loop, earlier calls included: what ``max_seconds`` bounds."""
    loss: float | None = None
    """Of the last step; None before the first."""
    metrics: dict[str, float] = field(default_factory=dict)
    _memory: dict[str, Tensor] | None = None

    def plain(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best": self.best,
            "best_step": self.best_step,
            "without_gain": self.without_gain,
            "seconds": self.seconds,
            "loss": self.loss,
            "metrics": self.metrics,
        }

    def keep_score(
        self,
        recalls: dict[str, float],
        towers: Towers,
        checkpoints: Path | None,
        patience: int,
        talk: Talk,
    ) -> bool:
        """Note a validation; True when patience has run out.

        With patience the best towers are kept.
        """
        score = recalls.get("validation/recall@10", 0.0)
        if not patience:
            self.metrics = recalls
            return False
        if score > self.best:
            self.best, self.best_step, self.without_gain, self.metrics = (
                score,
                self.step,
                0,
                recalls,
            )
            weights = {
                name: value.detach().cpu().clone() for name, value in towers.state_dict().items()
            }
            if checkpoints:
                save_checkpoint(
                    checkpoints, self.step, {"towers": weights}, {"metrics": recalls}, name="best"
                )
            else:
                self._memory = weights
            return False
        self.without_gain += 1
        if self.without_gain >= patience:
            talk(
                f"early stop: {patience} validations without a better mean Recall@10 than"
                f" {self.best:.4f} at step {self.best_step}"
            )
            return True
        return False

    def restore_best(self, towers: Towers, checkpoints: Path | None) -> None:
        """Put the best towers back when validation chose some."""
        if self.best_step in (0, self.step):
            return
        if self._memory is not None:
            towers.load_state_dict(self._memory)
        elif checkpoints:
            towers.load_state_dict(load_checkpoint(checkpoints / "best")[0]["towers"])
