"""``omni bench train``: training speed and quality beside Sentence-Transformers, in one run.

Both have the same backbone, pairs, batch, precision and machine.

Both train with in-batch negatives for the speed figures that are compared (ours also with the
paper's random negatives, correction and Matryoshka prefixes, as ours always does by default).
Sentence-Transformers embeds an entity's text with the query tower's backbone, since that is what
MultipleNegativesRankingLoss trains; ours has the entity tower for it. Query-query pairs go through
the transformer on both sides in both systems. Repetitions alternate, so that a busy machine slows
both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import polars as pl
import torch

from benchmarks.record import Measurement, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.config.train_config import train_config
from encoders.datasets.dataset import Dataset, load_dataset
from encoders.datasets.related_queries import related_query_pairs
from encoders.errors import ConfigError, MissingDependency
from encoders.evaluation.ranking import Ranking, build_task, rank_task, vector_scores
from encoders.evaluation.report import comparison_dict
from encoders.evaluation.slices import compare
from encoders.towers.pretrained_models import create_query_encoder
from encoders.towers.query_tower import QueryEncoder
from encoders.training.data.source_tables import TrainingData
from encoders.training.loop import TrainResult, TrainStart, train

SPEED_PAIRS = 20_000
"""Pairs the speed figures draw their batches from; set-up (tokenising, vocabulary) is outside the
timing of both systems."""
_ENTITY_TEXT = ("title", "category", "board_titles", "engaged_queries")
_QUALITY_SHARES = {"pin": 8, "product": 6, "ad": 1}
_OURS_FULL = {"random_negatives": 1.0, "random_query_negatives": 1.0}
_OURS_PLAIN = {
    "random_negatives": 0.0,
    "random_query_negatives": 0.0,
    "log_q": False,
    "matryoshka": {},
}


@dataclass(frozen=True)
class OurRun:
    """One training of ours beside the peer's."""

    kind: str
    """``query-entity`` or ``query-query`` pairs."""
    variant: str
    """``plain``: in-batch negatives; ``full``: the paper's loss; ``recipe``: as the recipes."""
    batch: int
    steps: int
    precision: str
    seconds: float = 0.0
    """Stop after so long; 0: after ``steps``."""


def _config(run: OurRun) -> Any:
    datasets: list[dict[str, Any]] = (
        [{"name": "query"}] if run.kind == "query-query" else [{"name": n} for n in _QUALITY_SHARES]
    )
    features: dict[str, Any] = {}
    validation: dict[str, Any] = {"fraction": 0.0}
    # As in the shipped recipes: a frozen vector of an entity's texts beside its n-grams.
    if run.variant == "recipe":
        datasets = [{"name": name, "share": share} for name, share in _QUALITY_SHARES.items()]
        features = {"text_embedding": "tiny-multilingual"}
        validation = {
            "fraction": 0.03,
            "pairs": 4000,
            "query_interpolation": [0.5, 0.75, 1],
            "residual_weights": [0, 0.25, 0.5, 0.75, 1],
        }
    return train_config(
        {
            "steps": run.steps,
            "max_seconds": run.seconds,
            "precision": run.precision,
            "log_every": 1_000_000,
            "checkpoint_every": 0,
            "datasets": datasets,
            "features": features,
            "entity_tower": {"table_rows": 30_000, "hidden": [512]},
            "batch": {"pairs": run.batch, "cross_fit": 4 if run.variant == "recipe" else 0},
            "loss": _OURS_PLAIN if run.variant == "plain" else _OURS_FULL,
            "optimiser": {
                "query_learning_rate": 5e-4,
                "token_embedding_learning_rate": 5e-4,
                "warmup_steps": 20,
            },
            "validation": validation,
        }
    )


def entity_texts(catalogue: pl.DataFrame) -> dict[str, str]:
    """Return the text that a model reads of each entity: title, category, boards, queries."""
    names = [name for name in _ENTITY_TEXT if name in catalogue.columns]
    joined = [
        (
            pl.col(n).list.join(", ", ignore_nulls=True)
            if isinstance(catalogue[n].dtype, pl.List)
            else pl.col(n).cast(pl.String)
        )
        for n in names
    ]
    frame = catalogue.select(
        "id", pl.concat_str([e.fill_null("") for e in joined], separator=". ").alias("text")
    )
    return dict(zip(frame["id"].to_list(), frame["text"].to_list(), strict=True))


class Speed(NamedTuple):
    """Training pairs per second of wall-clock and of processor time (all threads)."""

    wall: float
    cpu: float


class SentenceTransformersRun:
    """Train with the library's trainer and MultipleNegativesRankingLoss, from the same weights."""

    def __init__(
        self, start: Path, pairs: pl.DataFrame, texts: dict[str, str], batch: int, precision: str
    ) -> None:
        try:
            from datasets import Dataset as HubDataset
        except ImportError as error:
            raise MissingDependency(
                "datasets", "baselines", "Training with Sentence-Transformers"
            ) from error
        from sentence_transformers import SentenceTransformer

        self._batch, self._bf16 = batch, precision == "bf16"
        self.model = SentenceTransformer(
            str(start), device="cuda" if torch.cuda.is_available() else "cpu"
        )
        answers = [texts.get(id, id) for id in pairs["entity_id"].to_list()]
        self._data = HubDataset.from_dict({"anchor": pairs["query"].to_list(), "positive": answers})

    def train(
        self, steps: int, *, max_seconds: float = 0.0, learning_rate: float = 5e-4, seed: int = 0
    ) -> Speed:
        """Train and return its speed, from the start of the first step to the end of the last."""
        from sentence_transformers import (
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from sentence_transformers.losses import MultipleNegativesRankingLoss
        from transformers import TrainerCallback

        class Clock(TrainerCallback):  # type: ignore[misc]
            started, ended, cpu_started, cpu_ended = 0.0, 0.0, 0.0, 0.0

            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                Clock.started, Clock.cpu_started = time.perf_counter(), time.process_time()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                Clock.ended, Clock.cpu_ended = time.perf_counter(), time.process_time()
                if max_seconds and Clock.ended - Clock.started > max_seconds:
                    control.should_training_stop = True
                return control

        with tempfile.TemporaryDirectory() as folder:
            arguments = SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=self._batch,
                learning_rate=learning_rate,
                warmup_steps=min(20, steps // 2),
                lr_scheduler_type="cosine",
                bf16=self._bf16,
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=seed,
                optim="adamw_torch_fused",
            )
            loss = MultipleNegativesRankingLoss(self.model)
            clock = Clock()
            trainer = SentenceTransformerTrainer(
                model=self.model,
                args=arguments,
                train_dataset=self._data,
                loss=loss,
                callbacks=[clock],
            )
            trainer.train()
            done = int(trainer.state.global_step)
        pairs = done * self._batch
        return Speed(
            pairs / (Clock.ended - Clock.started), pairs / (Clock.cpu_ended - Clock.cpu_started)
        )


def rankings(
    dataset: Dataset,
    system: str,
    embed_queries: Callable[[list[str]], np.ndarray],
    embed_entities: Callable[[pl.DataFrame], np.ndarray],
) -> dict[str, Ranking]:
    """Rank the held-out pairs of each entity type, exactly, among all entities of the type."""
    ranked = {}
    for entity_type in dataset.entity_types:
        task = build_task(dataset, entity_type)
        ranked[entity_type] = rank_task(
            task,
            vector_scores(embed_queries(task.queries), embed_entities(task.candidates)),
            system,
        )
    return ranked


@click.command(name="train")
@click.option("--batch", default=256, show_default=True, help="Pairs per step, in both systems.")
@click.option(
    "--steps",
    default=20,
    show_default=True,
    help="Steps per repetition (the first repetition warms up and is not counted).",
)
@click.option(
    "--repetitions",
    default=3,
    show_default=True,
    help="Counted repetitions of each system, alternating.",
)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--threads", default=0, show_default=True, help="CPU threads; 0: torch's default.")
@click.option(
    "--quality-seconds",
    default=0.0,
    show_default=True,
    help="Also train both this long and compare labelled Recall@10; 0: no.",
)
@click.option(
    "--record/--no-record", default=True, show_default=True, help="Write the JSON record."
)
@data_option
@json_option
@handle_errors
def command(
    batch: int,
    steps: int,
    repetitions: int,
    precision: str,
    threads: int,
    quality_seconds: float,
    record: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure pairs per second beside Sentence-Transformers; also Recall@10 at equal wall time.

    The peer's loss is MultipleNegativesRankingLoss.

    Real annotation pairs (not clicks). Targets: 1.5 times its speed for query-entity and 1.2 times
    for query-query training.

    Example: omni bench train --quality-seconds 120
    """
    if threads:
        torch.set_num_threads(threads)
    dataset = load_dataset(data_dir)
    entity_pairs = dataset.split("train")
    related = related_query_pairs(dataset.pairs).filter(pl.col("split") == "train")
    texts = entity_texts(dataset.catalogue)
    rows: list[tuple[object, ...]] = []
    metrics: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        create_query_encoder().save(start)
        for kind, everything, target in (
            ("query-entity", entity_pairs, 1.5),
            ("query-query", related, 1.2),
        ):
            pairs = everything.sample(min(SPEED_PAIRS, everything.height), seed=0)
            data = TrainingData(dataset.catalogue, pairs)
            peer = SentenceTransformersRun(start, pairs, texts, batch, precision)
            systems: dict[str, Callable[[], Speed]] = {
                "sentence-transformers": lambda peer=peer: peer.train(steps),  # type: ignore[misc]
                "ours, in-batch negatives": lambda d=data, k=kind: _speed(
                    d, OurRun(k, "plain", batch, steps, precision), start
                ),  # type: ignore[misc]
                "ours, the paper's loss": lambda d=data, k=kind: _speed(
                    d, OurRun(k, "full", batch, steps, precision), start
                ),  # type: ignore[misc]
            }
            rates: dict[str, list[Speed]] = {name: [] for name in systems}
            for repetition in range(repetitions + 1):
                for name, run in systems.items():
                    rate = run()
                    if repetition:
                        rates[name].append(rate)
                    say(
                        f"{kind} | {name} | {rate.wall:,.0f}"
                        f" pairs/s{'' if repetition else ' (warm-up)'}"
                    )
            base = _median(rates["sentence-transformers"])
            for name, speeds in rates.items():
                middle = _median(speeds)
                ratio = Speed(middle.wall / base.wall, middle.cpu / base.cpu)
                rows.append(
                    (
                        kind,
                        name,
                        round(middle.wall),
                        ratio.wall,
                        round(middle.cpu),
                        ratio.cpu,
                        target,
                    )
                )
                metrics[f"{kind} | {name}"] = {
                    "pairs_per_second": [speed.wall for speed in speeds],
                    "pairs_per_cpu_second": [speed.cpu for speed in speeds],
                    "ratio_of_medians": ratio.wall,
                    "ratio_of_medians_cpu": ratio.cpu,
                    "target": target,
                }
        quality = (
            _quality(dataset, start, batch, precision, quality_seconds) if quality_seconds else {}
        )
    metrics["recall_at_10_at_equal_wall_time"] = quality
    settings = {
        "batch": batch,
        "steps": steps,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "quality_seconds": quality_seconds,
    }
    path = None
    if record:
        path = write_record(
            f"train-{precision}-{batch}",
            Measurement(
                dataset={
                    "name": dataset.name,
                    "pairs": entity_pairs.height,
                    "related_pairs": related.height,
                    "real": True,
                    "note": "annotations, not clicks",
                },
                config=settings,
                protocol={
                    "warmup_repetitions": 1,
                    "repetitions": repetitions,
                    "order": "alternating",
                    "clock": "perf_counter; process_time for CPU seconds",
                    "statistic": "median",
                },
                metrics=metrics,
                libraries=("torch", "transformers", "sentence-transformers"),
            ),
        )
    if as_json:
        print_json({"record": str(path) if path else None, **metrics})
        return
    print_table(
        "Training speed, real annotation pairs",
        ["pairs", "system", "pairs/s", "ratio", "pairs/CPU s", "ratio (CPU)", "target"],
        rows,
    )
    if quality:
        types = dataset.entity_types
        table = [(name, *(_cell(found[t]) for t in types)) for name, found in quality.items()]
        print_table(
            f"Labelled Recall@10 on held-out pairs after {quality_seconds:.0f}s of training each",
            ["system", *types],
            table,
        )
    if path:
        say(f"wrote {path}")


def _cell(found: float | dict[str, Any]) -> str:
    if isinstance(found, float):
        return f"{found:.3f}"
    return f"{found['recall@10 difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _median(speeds: list[Speed]) -> Speed:
    return Speed(
        statistics.median(s.wall for s in speeds), statistics.median(s.cpu for s in speeds)
    )


def _speed(data: TrainingData, run: OurRun, start: Path) -> Speed:
    result = _ours(data, run, start)
    return Speed(result.pairs_per_second, result.pairs_per_cpu_second)


def _ours(data: TrainingData, run: OurRun, start: Path) -> TrainResult:
    return train(_config(run), data, start=TrainStart(QueryEncoder.load(start)), quiet=True)


def _quality(
    dataset: Dataset, start: Path, batch: int, precision: str, seconds: float
) -> dict[str, dict[str, Any]]:
    """Train both from the same weights for the same time, with a cosine schedule over what fits.

    Ours pays for its set-up out of that time (counting n-grams, tokenising, embedding the entities'
    texts with the frozen tower) and for what follows the last step (choosing residual weights on
    held-back train queries), measured on a run of one step. The other system tokenises while it
    trains.
    """
    pairs, texts = dataset.split("train"), entity_texts(dataset.catalogue)
    peer = SentenceTransformersRun(start, pairs, texts, batch, precision)
    with stage("Sentence-Transformers: measure its speed"):
        rate = peer.train(8).wall
    peer = SentenceTransformersRun(start, pairs, texts, batch, precision)
    with stage("Sentence-Transformers: train"):
        peer.train(max(int(rate * seconds / batch), 1), max_seconds=seconds * 1.1)
    data = TrainingData(dataset.catalogue, pairs)
    began = time.perf_counter()
    _ours(data, OurRun("query-entity", "recipe", batch, 1, precision), start)
    set_up = time.perf_counter() - began
    if set_up > seconds / 2:
        raise ConfigError(
            f"setting up took {set_up:.0f} of {seconds:.0f} seconds: nothing is left to train in."
            " Raise --quality-seconds."
        )
    with stage(f"ours: train for {seconds - set_up:.0f}s after {set_up:.0f}s of set-up"):
        run = OurRun("query-entity", "recipe", batch, 1_000_000, precision, seconds - set_up)
        result = _ours(data, run, start)

    def encode(values: list[str]) -> np.ndarray:
        return np.asarray(
            peer.model.encode(
                values, batch_size=128, show_progress_bar=False, normalize_embeddings=True
            ),
            dtype=np.float32,
        )

    def ours_entities(catalogue: pl.DataFrame) -> np.ndarray:
        return result.entity_encoders[catalogue["entity_type"][0]].encode(catalogue)

    theirs, ours = "sentence-transformers", "ours, the recipe"
    ranked = {
        theirs: rankings(
            dataset,
            theirs,
            encode,
            lambda catalogue: encode([texts[id] for id in catalogue["id"].to_list()]),
        ),
        ours: rankings(dataset, ours, result.query_encoder.encode, ours_entities),
    }
    recalls: dict[str, dict[str, Any]] = {
        name: {
            entity_type: float((ranking.ranks <= 10).mean())
            for entity_type, ranking in by_type.items()
        }
        for name, by_type in ranked.items()
    }
    differences = {
        t: comparison_dict(compare(ranked[ours][t], ranked[theirs][t]))
        for t in dataset.entity_types
    }
    return recalls | {"ours - theirs, paired by query": differences}
