"""Train the query and entity towers together: set up, steps, validation, checkpoints, end.

Each distinct query and entity of a batch is encoded once, for all tasks. The batch follows from
seed and step alone, so a resumed run equals an uninterrupted one to the bit (CPU). With torchrun
every process takes a slice of the same batch, and vectors are gathered with gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from encoders.config.train_config import TrainConfig, to_table
from encoders.errors import CheckpointError, ConfigError
from encoders.interruption import StopRequest
from encoders.towers.entity_features import EntityFeaturizer
from encoders.towers.entity_tower import EntityEncoder
from encoders.towers.pretrained_models import (
    create_query_encoder,
    fit_projection,
    unknown_share,
)
from encoders.towers.query_tower import QueryEncoder
from encoders.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from encoders.training.data.batches import BatchPlan, DatasetBatch
from encoders.training.data.prepare import PreparedData
from encoders.training.data.source_tables import TrainingData
from encoders.training.device import choose_device, computes_bf16
from encoders.training.distributed import (
    average_gradients,
    broadcast_parameters,
    process_rank,
    world_size,
)
from encoders.training.inputs import (
    Towers,
    build_inputs,
    build_towers,
    initial_towers_fingerprint,
    run_fingerprint,
)
from encoders.training.losses import limit_log_scales
from encoders.training.optimisers import (
    create_optimiser,
    parameter_groups,
    schedule,
    set_learning_rates,
)
from encoders.training.progress import BrokenStep, Position, RunLog, Stopwatch, stop_diverged
from encoders.training.query_ngrams import fit_query_ngrams
from encoders.training.step import StepReport, loss_and_gradients
from encoders.training.validation import validation_recall
from encoders.training.weight_interpolation import (
    choose_weights,
    learned_parameters,
    with_residual_weights,
)

MOST_UNKNOWN = 0.5
"""A tower whose tokenizer does not know more of the train queries' tokens is refused."""
MUCH_UNKNOWN = 0.1
"""Above this share a run says so."""


@dataclass(frozen=True)
class TrainStart:
    """Towers that a run goes on with."""

    query_encoder: QueryEncoder | None = None
    """Changed in place; None: a new one, from ``config.model.query_encoder``."""
    entity_encoders: Mapping[str, EntityEncoder] = field(default_factory=dict)
    """By entity type; types without one get a new tower."""
    featurizer: EntityFeaturizer | None = None
    """Made the features of ``entity_encoders``, and must fit the catalogue; None: a new one."""


@dataclass(frozen=True)
class TrainResult:
    """What a run made."""

    query_encoder: QueryEncoder
    entity_encoders: dict[str, EntityEncoder]
    """By entity type; with unified towers every type holds the same object."""
    featurizer: EntityFeaturizer
    metrics: dict[str, float]
    """Last loss, and validation labelled Recall@10 per entity type (``validation/recall@10/pin``)
    where there is validation. No ``loss`` where a finished run's checkpoint does not hold it.
    """
    pairs_per_second: float
    """Training pairs per second of step time since the start or the resume, validation and
    checkpoints not counted; 0: no step was left.
    """
    pairs_per_cpu_second: float
    """The same by processor time, all threads: what a busy machine does not distort."""
    steps: int
    """Optimiser steps taken in all, those before a resume included."""
    config: TrainConfig
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per log line or validation since the start or the resume."""

    @property
    def start(self) -> TrainStart:
        """What another run goes on with."""
        return TrainStart(self.query_encoder, self.entity_encoders, self.featurizer)


def train(
    config: TrainConfig,
    data: TrainingData,
    *,
    start: TrainStart | None = None,
    output: Path | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> TrainResult:
    """Train the towers on pairs.

    Args:
        config: The run.
        data: Catalogue and pairs.
        start: Towers to go on with; None: new ones, as the config says.
        output: Folder for checkpoints, TensorBoard events and a diverged batch; None: nothing is
            written.
        resume: Continue from the last checkpoint in ``output`` when there is one. False: an output
            folder with checkpoints is refused.
        quiet: Log nothing (otherwise INFO lines, one per logged step).

    Returns:
        The trained towers, in evaluation mode, on the CPU.

    Raises:
        SchemaError, DataError, ConfigError: The tables or the config cannot be trained on.
        CheckpointError: ``output`` holds a damaged checkpoint or another run's.
        TrainingDiverged: The loss became NaN or infinite; the batch was saved, and no checkpoint
            was touched.
    """
    return Trainer(config, data, start, output=output, quiet=quiet).run(resume=resume)


class Trainer:
    """One training run: made with its data and towers, then ``run`` once.

    Args are those of ``train``.

    Attributes:
        prepared: The data that will be trained on.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        start: TrainStart | None = None,
        *,
        output: Path | None = None,
        quiet: bool = False,
    ) -> None:
        begun = time.perf_counter()
        start = start or TrainStart()
        self._config = config
        self._output = output
        self._log = RunLog(quiet=quiet or process_rank() != 0)
        device = self._choose_device()
        torch.manual_seed(config.seed)
        model, query_encoder = config.model, start.query_encoder
        if query_encoder is None:
            query_encoder = create_query_encoder(
                model.query_encoder, model.dimension, dropout=model.query_dropout
            )
        query_encoder.ngrams = None  # fitted after training
        self._initial_towers = ""
        if output:
            self._initial_towers = initial_towers_fingerprint(query_encoder, start.entity_encoders)
        self._inputs = build_inputs(
            data, config, query_encoder, device, world_size(), start.featurizer
        )
        self.prepared = self._inputs.prepared
        if start.query_encoder is None:
            self._meet_queries(query_encoder)
        self._plan = BatchPlan(self.prepared, config, world_size())
        self._steps = config.steps or steps_of_epochs(config.epochs, self.prepared)
        self._towers = build_towers(query_encoder, self._inputs, start.entity_encoders)
        broadcast_parameters(self._towers)
        self._optimiser = self._create_optimiser()
        self._parameters = [p for p in self._towers.parameters() if p.requires_grad]
        self._initial_query_weights: dict[str, Tensor] = {}
        if config.validation.query_interpolation:
            self._initial_query_weights = learned_parameters(query_encoder)
        self._checkpoints = output / "checkpoints" if output else None
        self._fingerprint = run_fingerprint(self._inputs) if output else ""
        self._best = BestTowers(self._checkpoints)
        self._state = LoopState()
        self._watch = Stopwatch()
        self._setup_seconds = time.perf_counter() - begun

    def _meet_queries(self, tower: QueryEncoder) -> None:
        """Check that a tower knows the train queries' words, and fit a fresh linear layer to them.

        Raises:
            ConfigError: Its tokenizer does not know most of them.
        """
        texts = self.prepared.texts
        share = unknown_share(tower, tower.tokenize(texts[:: max(1, len(texts) // 5000)]))
        name = self._config.model.query_encoder
        if share > MOST_UNKNOWN:
            raise ConfigError(
                f"query tower {name!r}: its tokenizer does not know {share:.0%} of the tokens of"
                " the train queries. Choose a model for their languages (tiny-multilingual reads"
                " 17)."
            )
        if share > MUCH_UNKNOWN:
            self._log.say(
                f"note: the tokenizer of {name!r} does not know {share:.0%} of the tokens of the"
                " train queries"
            )
        if tower.has_fresh_projection:
            fit_projection(tower, texts)
            tower.has_fresh_projection = False

    def _choose_device(self) -> torch.device:
        config = self._config
        if world_size() > 1 and config.max_seconds:
            raise ConfigError(
                "max_seconds needs a single process: clocks of several would disagree about the"
                " schedule. Set steps instead."
            )
        device = choose_device(config.device)
        if config.precision == "bf16" and not computes_bf16(device.type):
            self._log.say("training in fp32: this processor has no instructions for bf16")
        return device

    def _create_optimiser(self) -> torch.optim.Optimizer:
        towers, config = self._towers, self._config.optimiser
        groups = parameter_groups(
            towers.query, towers.entities.values(), [towers.log_scales], config
        )
        return create_optimiser(groups, config)

    def run(self, *, resume: bool = True) -> TrainResult:
        """Train to the end, from the last checkpoint in the output folder when there is one.

        Raises:
            CheckpointError, TrainingDiverged: As ``train``.
        """
        self._log.announce(self._inputs, self._plan, self._towers, self._steps, self._setup_seconds)
        self._load_checkpoint(allowed=resume)
        if self._config.tensorboard and process_rank() == 0:
            self._log.open_tensorboard(self._output)
        self._towers.train()
        self._watch = Stopwatch(earlier=self._state.seconds)
        # Of several processes, one that stops alone would leave the others waiting for it.
        with StopRequest(active=world_size() == 1) as stop:
            while not self._is_over():
                is_logged = self._is_logged(self._state.step + 1)
                report = self._take_step(measure=is_logged)
                if is_logged or self._is_over():
                    self._log.step(report, self._position(), self._watch)
                if self._validation_is_due():
                    self._validate()
                if self._checkpoint_is_due():
                    self._save_checkpoint()
                if stop.came:
                    self._stop(stop.came)
        return self._finish()

    def _stop(self, kind: type[KeyboardInterrupt]) -> NoReturn:
        """Save a checkpoint and end the run before its end, as Ctrl-C or SIGTERM asked."""
        step = self._state.step
        if self._checkpoints is None:
            raise kind(f"stopped after step {step:,}; nothing was saved, for there is no folder")
        self._save_checkpoint()
        raise kind(
            f"stopped after step {step:,}, saved in {self._checkpoints}. The same command goes on"
            " from there."
        )

    # ------------------------------------------------------------------------------------- one step
    def _take_step(self, *, measure: bool) -> StepReport:
        """Move the towers by one batch."""
        config, state = self._config, self._state
        with self._watch.step(sum(self.prepared.pairs_per_step)):
            torch.manual_seed((config.seed * 1_000_003 + state.step) * 4099 + process_rank())
            time_spent = self._time_spent(self._watch.total) if config.max_seconds else None
            factor = schedule(state.step, self._steps, config.optimiser, time_spent)
            set_learning_rates(self._optimiser, factor)
            batch = self._plan.step(state.step)
            report = loss_and_gradients(self._towers, self._inputs, batch, measure=measure)
            average_gradients(self._parameters)
            state.loss = float(report.loss)
            self._require_finite(state.loss, batch, report)
            if config.optimiser.clip_norm:
                norm = clip_grad_norm_(self._parameters, config.optimiser.clip_norm)
                self._require_finite(float(norm), batch, report)
            self._optimiser.step()
            limit_log_scales(self._towers.log_scales)
            self._optimiser.zero_grad(set_to_none=True)
        state.step += 1
        state.seconds = self._watch.total
        return report

    def _require_finite(self, value: float, batch: list[DatasetBatch], report: StepReport) -> None:
        if math.isfinite(value):
            return
        losses = {name: float(loss) for name, loss in report.task_losses.items()}
        broken = BrokenStep(self._state.step, value, losses, batch)
        stop_diverged(broken, self.prepared, self._output)

    # --------------------------------------------------------------------------- what is due, when
    def _time_spent(self, seconds: float) -> float:
        """Return the part of the time limit that is over; 0 without a limit."""
        return seconds / self._config.max_seconds if self._config.max_seconds else 0.0

    def _position(self) -> Position:
        return Position(self._state.step, self._steps, self._time_spent(self._state.seconds))

    def _is_over(self) -> bool:
        state = self._state
        return (
            state.step >= self._steps
            or self._time_spent(state.seconds) >= 1.0
            or 0 < self._config.validation.patience <= state.without_gain
        )

    def _is_logged(self, step: int) -> bool:
        """Say whether the ``step``-th step, from 1, is measured and logged."""
        return step % self._config.log_every == 0 or step in (1, self._steps)

    def _validation_is_due(self) -> bool:
        if not self.prepared.validation:
            return False
        return self._is_over() or is_multiple(self._state.step, self._config.validation.every_steps)

    def _checkpoint_is_due(self) -> bool:
        if self._checkpoints is None or process_rank() != 0:
            return False
        return self._is_over() or is_multiple(self._state.step, self._config.checkpoint_every)

    # ------------------------------------------------------------------- validation and checkpoints
    def _validate(self) -> None:
        """Measure held-back pairs; with patience, keep the best towers."""
        state, patience = self._state, self._config.validation.patience
        recalls = validation_recall(self._towers, self._inputs)
        self._log.validation(recalls, state.step)
        if not patience:
            state.metrics = recalls
        elif state.record(recalls):
            self._best.keep(self._towers, state)
        elif state.without_gain >= patience:
            self._log.say(
                f"early stop: {patience} validations without a better mean Recall@10 than"
                f" {state.best:.4f} at step {state.best_step}"
            )

    def _load_checkpoint(self, *, allowed: bool) -> None:
        """Go on from the last checkpoint, if there is one."""
        found = list_checkpoints(self._checkpoints) if self._checkpoints else []
        if not found:
            return
        if not allowed:
            raise CheckpointError(
                f"{self._checkpoints} already holds a run (at {found[-1].name}). Resume it, or"
                " train into an empty output folder."
            )
        state, meta = load_checkpoint(found[-1], self._fingerprint)
        # Checkpoints of version 0.1 do not name the towers
        if meta.get("towers", self._initial_towers) != self._initial_towers:
            raise CheckpointError(
                f"{found[-1]}: the run began with another query tower: its weights or its tokenizer"
                f" changed ({self._config.model.query_encoder!r}). Restore the tower, or train into"
                " an empty output folder."
            )
        self._towers.load_state_dict(state["towers"])
        limit_log_scales(self._towers.log_scales)  # earlier versions saved them unclamped
        self._optimiser.load_state_dict(state["optimiser"])
        self._state = LoopState(**state["loop"])
        self._log.say(f"resumed from {found[-1].name}")

    def _save_checkpoint(self) -> None:
        assert self._checkpoints is not None, "a checkpoint is due only where there is a folder"
        state = {
            "towers": self._towers.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "loop": asdict(self._state),
        }
        meta = {
            "run": self._fingerprint,
            "towers": self._initial_towers,
            "config": to_table(self._config),
            "metrics": self._state.metrics,
        }
        save_checkpoint(self._checkpoints, self._state.step, state, meta)

    # ------------------------------------------------------------------------------------------ end
    def _finish(self) -> TrainResult:
        """Put the best towers back, interpolate weights as validation says, and hand them out."""
        state, watch, towers = self._state, self._watch, self._towers
        if state.best_step not in (0, state.step):
            self._best.restore(towers)
        chosen = choose_weights(towers, self._inputs, self._initial_query_weights, self._log.say)
        towers.eval()
        by_type = towers.by_type(self.prepared.catalogue["entity_type"].unique().to_list())
        entity_encoders = with_residual_weights(by_type, chosen.residual)
        fitted = fit_query_ngrams(towers.query, entity_encoders, self._inputs, self._log.say)
        self._log.close()
        for tower in (towers, *entity_encoders.values()):
            tower.cpu()
        loss = {} if state.loss is None else {"loss": state.loss}
        return TrainResult(
            query_encoder=towers.query,
            entity_encoders=entity_encoders,
            featurizer=self._inputs.featurizer,
            metrics=loss | state.metrics | chosen.metrics | fitted,
            pairs_per_second=watch.pairs / watch.step_seconds if watch.steps else 0.0,
            pairs_per_cpu_second=watch.pairs / watch.cpu_seconds if watch.cpu_seconds else 0.0,
            steps=state.step,
            config=self._config,
            history=self._log.history,
        )


@dataclass
class LoopState:
    """What the loop remembers between steps, beyond towers and optimiser.

    Field names are keys of checkpoints.
    """

    step: int = 0
    best: float = -1.0
    """The best mean validation recall; noted only with patience, like the next two."""
    best_step: int = 0
    without_gain: int = 0
    """Validations since the best."""
    seconds: float = 0.0
    """Spent in the loop, earlier calls included: what ``max_seconds`` bounds."""
    loss: float | None = None
    """Of the last step; None before the first."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last validation, with patience of the best one."""

    def record(self, recalls: dict[str, float]) -> bool:
        """Record a validation; True when its towers are the best so far."""
        score = recalls.get("validation/recall@10", 0.0)
        if score <= self.best:
            self.without_gain += 1
            return False
        self.best = score
        self.best_step = self.step
        self.without_gain = 0
        self.metrics = recalls
        return True


class BestTowers:
    """Keeps the towers of the best validation: in a checkpoint of process 0, otherwise in memory.

    Args:
        checkpoints: Where checkpoints live; None: nothing is written.
    """

    def __init__(self, checkpoints: Path | None) -> None:
        self._checkpoints = checkpoints
        self._weights: dict[str, Tensor] | None = None

    def keep(self, towers: Towers, state: LoopState) -> None:
        """Replace what is kept."""
        weights = {
            name: value.detach().cpu().clone() for name, value in towers.state_dict().items()
        }
        if self._checkpoints and process_rank() == 0:
            content, meta = {"towers": weights}, {"metrics": state.metrics}
            save_checkpoint(self._checkpoints, state.step, content, meta, name="best")
        else:
            self._weights = weights

    def restore(self, towers: Towers) -> None:
        """Put the best weights back; after a resume they are in the checkpoint."""
        if self._weights is not None:
            towers.load_state_dict(self._weights)
        elif self._checkpoints:
            towers.load_state_dict(load_checkpoint(self._checkpoints / "best")[0]["towers"])


def steps_of_epochs(epochs: float, prepared: PreparedData) -> int:
    """Return the steps that pass ``epochs`` times over all pairs, at least one."""
    return max(1, math.ceil(epochs * prepared.pairs_total / sum(prepared.pairs_per_step)))


def is_multiple(step: int, every: int) -> bool:
    """Say whether something that happens every so many steps, 0 for never, happens now."""
    return every > 0 and step % every == 0
