"""Evaluate several systems on the same tasks; results as plain values and as TREC files."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch

from encoders.datasets.dataset import DEFAULT_ENGAGED_QUERIES, Dataset
from encoders.datasets.halves import HELDOUT, describe_split, rows_of_split
from encoders.datasets.related_queries import related_query_pairs
from encoders.errors import ConfigError
from encoders.evaluation.baselines import Baseline, unit_rows
from encoders.evaluation.metrics import PairedDifference
from encoders.evaluation.ranking import (
    EvaluationTask,
    Ranking,
    ScoreRows,
    TaskSettings,
    build_task,
    rank_task,
    vector_scores,
)
from encoders.evaluation.slices import (
    SliceMetrics,
    compare,
    metrics_by_slice,
    pair_slices,
    slice_metrics,
)
from encoders.towers.bundle import ModelBundle
from encoders.towers.entity_features import vector_column_of

log = logging.getLogger(__name__)

RUN_DEPTH = 100
"""Entities of a ranked list in ``save_runs``."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(TaskSettings):
    """What ``evaluate_systems`` measures; ``seed`` also chooses the resamples."""

    entity_types: Sequence[str] | None = None
    """Types to evaluate, each of which must have pairs and towers.

    None: those of the catalogue that have, and a line about the others. ``query`` evaluates derived
    related-query pairs, or the data's own.
    """
    slices: Sequence[str] | None = None
    """Slices to report; None: all that ``pair_slices`` makes; empty: none."""
    runs: bool = False
    """Keep ranked lists, for ``save_runs``."""
    resamples: int = 1000
    """Bootstrap resamples of the overall figures; slices take a third."""


class Embeds(Protocol):
    """The part of a model bundle that evaluation needs."""

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts; float32 ``(B, D)``, unit rows."""
        ...

    def embed_entities(self, catalogue: pl.DataFrame) -> np.ndarray:
        """Embed catalogue rows; float32 ``(N, D)``, unit rows."""
        ...


def bundle_system(bundle: Embeds, device: str = "cpu") -> Baseline:
    """Make a system of a trained bundle: exact float32 inner products on ``device``."""

    def score(task: EvaluationTask, dataset: Dataset) -> ScoreRows:
        return vector_scores(
            bundle.embed_queries(task.queries), bundle.embed_entities(task.candidates), device
        )

    return score


def frozen_vectors_system(bundle: Embeds, column: str, device: str = "cpu") -> Baseline:
    """Make a system of a query tower and a vector column of the catalogue (a compatibility task).

    Queries are compared on their first numbers where the vectors are narrower. Entities without a
    vector are not returned.

    Args:
        bundle: With the query tower.
        column: Of the catalogue.
        device: Where to multiply.
    """

    def score(task: EvaluationTask, dataset: Dataset) -> ScoreRows:
        vectors = unit_rows(vector_column_of(task.candidates, column))
        queries = bundle.embed_queries(task.queries)
        width = vectors.shape[1]
        if not width:
            raise ConfigError(
                f"no {task.entity_type} has a vector in the column {column!r}. Choose other types"
                " with --entity-type."
            )
        if width > queries.shape[1]:
            raise ConfigError(
                f"column {column!r} holds vectors of {width} numbers, but the query tower gives"
                f" {queries.shape[1]}: they cannot be compared."
            )
        scores = vector_scores(unit_rows(queries[:, :width]), vectors, device)
        absent = torch.from_numpy(~vectors.any(axis=1)).to(device)
        return lambda start, stop: scores(start, stop).masked_fill(absent, -torch.inf)

    return score


def engaged_depth(bundles: Iterable[ModelBundle], wanted: int | None = None) -> int:
    """Return how many engaged queries an entity needs in a data set that bundles are measured on.

    As many as the deepest of them reads; each reads no more than it was trained with. ``wanted``
    is the caller's own number instead.
    """
    if wanted is not None:
        return wanted
    return max((b.engaged_queries for b in bundles), default=0) or DEFAULT_ENGAGED_QUERIES


def types_without_tower(
    bundles: Iterable[ModelBundle], entity_types: Sequence[str]
) -> dict[str, str]:
    """List the entity types that one of the bundles cannot embed, and why."""
    found: dict[str, str] = {}
    for bundle in bundles:
        found |= {
            name: f"no tower in {bundle.path}" for name in entity_types if not bundle.embeds(name)
        }
    return found


@dataclass(frozen=True)
class TaskReport:
    """One entity type: every system's ranking and figures."""

    task: EvaluationTask
    rankings: dict[str, Ranking]
    overall: dict[str, SliceMetrics]
    slices: dict[str, dict[str, dict[str, SliceMetrics]]]
    """System -> slice -> label -> figures."""
    labels: dict[str, pl.Series]
    """Slice -> label of each pair."""

    def compare(self, first: str, second: str, keep: np.ndarray | None = None) -> PairedDifference:
        """Compare the labelled Recall@10 of two systems, paired."""
        return compare(self.rankings[first], self.rankings[second], keep)


@dataclass(frozen=True)
class EvaluationReport:
    """All tasks of one evaluation."""

    dataset: str
    label: str
    split: str
    tasks: dict[str, TaskReport]
    left_out: dict[str, str] = field(default_factory=dict)
    """Entity type of the catalogue -> why it was not evaluated."""

    def as_dict(self, pairs_of_systems: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
        """Return plain values for JSON; ``pairs_of_systems``: comparisons to include."""
        wanted = list(pairs_of_systems)
        tasks = {}
        for name, report in self.tasks.items():
            tasks[name] = {
                "corpus": report.task.corpus_description,
                "candidates": report.task.candidates.height,
                "systems": {
                    system: {
                        "all": metrics.as_dict(),
                        "slices": {
                            s: {label: m.as_dict() for label, m in labels.items()}
                            for s, labels in report.slices[system].items()
                        },
                    }
                    for system, metrics in report.overall.items()
                },
                "comparisons": {
                    f"{a} - {b}": comparison_dict(report.compare(a, b)) for a, b in wanted
                },
            }
        result: dict[str, Any] = _finite(
            {
                "dataset": self.dataset,
                "label": self.label,
                "split": self.split,
                "metric": METRIC,
                "tasks": tasks,
                "not_evaluated": self.left_out,
            }
        )
        return result


METRIC = (
    "labelled recall: share of pairs (query, annotated entity) whose entity ranks in the top k;"
    " exact search; 95% bootstrap over queries"
)


def comparison_dict(result: PairedDifference) -> dict[str, Any]:
    """Return a paired comparison as plain values."""
    value, low, high = result.difference
    return {
        "recall@10 difference": value,
        "low": low,
        "high": high,
        "p": result.p_value,
        "wins": result.wins,
        "losses": result.losses,
    }


def _finite(value: Any) -> Any:
    """Replace NaN by None, for strict JSON."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate_systems(
    dataset: Dataset,
    systems: Mapping[str, Baseline],
    settings: EvaluationSettings | None = None,
    *,
    without_tower: Mapping[str, str] | None = None,
    judgements: pl.DataFrame | None = None,
) -> EvaluationReport:
    """Rank every held-out pair under every system and sum up; logs one line per system and type.

    Args:
        dataset: Catalogue and pairs.
        systems: Name -> system (``bundle_system``, ``make_baseline``, or any function of the same
            form).
        settings: What to measure; None: all held-out pairs of all types.
        without_tower: From ``types_without_tower``: what a system cannot embed.
        judgements: Evaluate these graded judgements (``query, entity_id, grade``) instead of pairs.

    Raises:
        ConfigError: No system, no pairs, no tower for a requested type, or an impossible setting.
    """
    if not systems:
        raise ConfigError(
            "there is no system to evaluate. Give a model bundle, or baselines such as --baselines"
            " bm25,random."
        )
    settings = settings or EvaluationSettings()
    without_tower = without_tower or {}
    judged = None
    if judgements is not None:
        settings = replace(settings, split=HELDOUT)  # judgements are not halved
        judged = pairs_of_judgements(dataset, judgements, settings.split)
    left_out: dict[str, str] = {}
    wanted = settings.entity_types
    if wanted is None:
        left_out = _types_left_out(dataset, judged, settings.split, without_tower)
        wanted = [name for name in dataset.entity_types if name not in left_out]
    for name, why in left_out.items():
        log.info("%s: %s; not evaluated", name, why)
    missing = [f"{name}: {without_tower[name]}" for name in wanted if name in without_tower]
    if missing:
        raise ConfigError(
            f"{'; '.join(missing)}. Choose other types with --entity-type, or train with pairs of"
            " these."
        )
    tasks = {}
    for entity_type in wanted:
        pairs = judged if judged is not None else _own_pairs(dataset, entity_type)
        task = build_task(dataset, entity_type, settings, pairs=pairs)
        tasks[entity_type] = _evaluate_task(task, dataset, systems, settings)
    return EvaluationReport(dataset.name, dataset.label, settings.split, tasks, left_out)


def _own_pairs(dataset: Dataset, entity_type: str) -> pl.DataFrame:
    """Return the data's pairs, or derived related-query pairs for ``query`` without any."""
    has_related = (dataset.pairs["entity_type"] == "query").any()
    if entity_type == "query" and not has_related:
        return related_query_pairs(dataset.pairs)
    return dataset.pairs


def _evaluate_task(
    task: EvaluationTask,
    dataset: Dataset,
    systems: Mapping[str, Baseline],
    settings: EvaluationSettings,
) -> TaskReport:
    """Rank one task's pairs under every system, and sum up by slice."""
    labels = pair_slices(task, dataset.split("train"))
    if settings.slices is not None:
        labels = {name: labels[name] for name in settings.slices if name in labels}
    report = TaskReport(task, {}, {}, {}, labels)
    depth = RUN_DEPTH if settings.runs else 0
    for name, system in systems.items():
        ranking = rank_task(task, system(task, dataset), name, run_depth=depth)
        overall = slice_metrics(ranking, resamples=settings.resamples, seed=settings.seed)
        report.rankings[name] = ranking
        report.overall[name] = overall
        report.slices[name] = metrics_by_slice(
            ranking, labels, resamples=max(100, settings.resamples // 3)
        )
        value, low, high = overall.recall[10]
        interval = f"{value:.3f} [{low:.3f}, {high:.3f}]"
        log.info(f"{task.entity_type:8} {name:20} Recall@10 {interval}")
    return report


def _types_left_out(
    dataset: Dataset, judged: pl.DataFrame | None, split: str, without_tower: Mapping[str, str]
) -> dict[str, str]:
    """List the catalogue's types that cannot be evaluated, and why; an error if all are."""
    pairs = dataset.pairs if judged is None else judged
    what = "judgements with a grade above 0"
    if judged is None:
        what = f"{describe_split(split)!r} pairs"
        pairs = rows_of_split(pairs, split)
    present = set(pairs["entity_type"].to_list())
    if not present.intersection(dataset.entity_types):
        splits = ", ".join(sorted(dataset.pairs["split"].drop_nulls().unique().to_list())) or "none"
        raise ConfigError(
            f"there are no {what} to evaluate in data set {dataset.name!r}; it has {splits}. Choose"
            " with --split."
        )
    left_out = {name: f"no {what}" for name in dataset.entity_types if name not in present}
    left_out |= {name: why for name, why in without_tower.items() if name in present}
    if set(dataset.entity_types) <= left_out.keys():
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ConfigError(
            f"there is nothing to evaluate in data set {dataset.name!r} ({reasons}). Train with"
            " pairs of these types."
        )
    return left_out


def pairs_of_judgements(dataset: Dataset, judgements: pl.DataFrame, split: str) -> pl.DataFrame:
    """Bring graded judgements into the form of the pairs table; rows of grade 0 are left out.

    Raises:
        ConfigError: No judged entity is in the catalogue.
    """
    types = dataset.catalogue.select(pl.col("id").alias("entity_id"), "entity_type")
    rows = judgements.filter(pl.col("grade") > 0).join(
        types, on="entity_id", how="inner", maintain_order="left"
    )
    if rows.is_empty():
        raise ConfigError(
            "no judged entity with a grade above 0 is in the catalogue. Do the ids of the"
            " judgements match the catalogue's?"
        )
    absent = [name for name in ("language", "country") if name not in rows.columns]
    filled = rows.with_columns(
        **{name: pl.lit("") for name in absent}, split=pl.lit(split), count=pl.lit(1)
    )
    return filled.with_columns(
        kind=pl.format("grade {}", "grade"), action=pl.format("grade {}", "grade")
    )


def save_runs(report: EvaluationReport, folder: Path) -> list[Path]:
    """Write TREC files for ``ir_measures`` and the like.

    Each entity type gets ``queries.tsv``, ``qrels.txt`` and one ``run-SYSTEM.txt`` per system.
    TREC files are split at white space, so query ids are row numbers (``queries.tsv`` names them)
    and white space and ``%`` in entity ids are percent-encoded. Near-duplicates are one document,
    named by their group, at its best place.

    Raises:
        ConfigError: The report was made without ranked lists, or against a random corpus (each pair
            then has a list of its own).
    """
    written = []
    for entity_type, report_of_type in report.tasks.items():
        task = report_of_type.task
        if not task.in_corpus.all():
            raise ConfigError(
                "runs are ranked lists over the whole catalogue, but a random corpus was requested."
                " Leave --corpus-size out."
            )
        root = folder / entity_type
        root.mkdir(parents=True, exist_ok=True)
        lines = (f"q{i}\t{' '.join(query.split())}\n" for i, query in enumerate(task.queries))
        (root / "queries.tsv").write_text("".join(lines), encoding="utf-8")
        group_of_row = task.candidates["id"].to_list()
        groups = task.targets["group"].to_list()
        target, row = task.members
        for t, r in zip(target.tolist(), row.tolist(), strict=True):
            group_of_row[r] = groups[t]
        names = [_trec_name(name) for name in group_of_row]
        rows = task.targets.select("query_index", "group", "gain").iter_rows()
        (root / "qrels.txt").write_text(
            "".join(f"q{q} 0 {_trec_name(g)} {int(gain)}\n" for q, g, gain in rows),
            encoding="utf-8",
        )
        written += [root / "queries.tsv", root / "qrels.txt"]
        for system, ranking in report_of_type.rankings.items():
            if ranking.run is None:
                raise ConfigError("the evaluation holds no ranked lists. Evaluate with runs=True.")
            path = root / f"run-{re.sub(r'[^A-Za-z0-9_.-]+', '_', system)}.txt"
            with path.open("w", encoding="utf-8") as file:
                for i, (rows_found, scores) in enumerate(zip(*ranking.run, strict=True)):
                    seen: dict[str, float] = {}
                    for r, score in zip(rows_found.tolist(), scores.tolist(), strict=True):
                        if r >= 0:
                            seen.setdefault(names[r], score)
                    file.writelines(
                        f"q{i} Q0 {name} {place} {score:.8g} {_trec_name(system)}\n"
                        for place, (name, score) in enumerate(seen.items(), 1)
                    )
            written.append(path)
    return written


def _trec_name(text: str) -> str:
    return re.sub(
        r"[\s%]",
        lambda match: "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8")),
        text,
    )
