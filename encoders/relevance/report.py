"""Say what grades mean: relevance of each system, lift with intervals, agreement of judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from encoders.agreement import Level, coincidence_matrix, identical_share, krippendorff_alpha
from encoders.errors import DataError
from encoders.evaluation.metrics import (
    UNRANKED,
    Interval,
    PairedDifference,
    QuerySums,
    bootstrap_interval,
    minimum_detectable_effect,
    ndcg_at_k,
    paired_difference,
    relative_difference,
)
from encoders.relevance.sample import MAX_GRADE, POPULARITIES, Sample

Measure = Literal["relevant", "ndcg"]
MEASURES: tuple[Measure, ...] = ("relevant", "ndcg")
LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval")


@dataclass(frozen=True)
class Lift:
    """How much better the first of two systems is, by one measure."""

    difference: PairedDifference
    relative: Interval
    """Difference as a share of the second system's figure."""
    minimum_detectable: float
    """Smallest difference that as many queries would show in 80 of 100 samples (two-sided 5%)."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        difference = self.difference.difference
        return {
            "difference": difference._asdict(),
            "relative": self.relative._asdict(),
            "p": self.difference.p_value,
            "wins": self.difference.wins,
            "losses": self.difference.losses,
            "minimum_detectable_effect": self.minimum_detectable,
        }


@dataclass(frozen=True)
class RelevanceReport:
    """What a graded sample says."""

    about: Mapping[str, Any]
    judges: list[dict[str, Any]]
    """``judge``, ``kind``, ``grades`` and the share of each grade."""
    agreement: dict[str, float | int | None]
    queries: pl.DataFrame
    """The complete queries: ``query, language, popularity, weight``, and one column
    ``MEASURE SYSTEM`` per measure and system.
    """
    incomplete: int
    """Drawn queries of which a result is not graded; they are left out."""

    def sums(self, measure: Measure, system: str, keep: pl.Expr | None = None) -> QuerySums:
        """Return a system's figures by query, weighted by what each query stands for."""
        rows = self.queries if keep is None else self.queries.filter(keep)
        weight = rows["weight"].to_numpy()
        return QuerySums(rows[f"{measure} {system}"].to_numpy() * weight, weight)

    def value(self, measure: Measure, system: str, keep: pl.Expr | None = None) -> Interval:
        """Return a system's mean with its interval."""
        return bootstrap_interval(self.sums(measure, system, keep))

    def lift(self, measure: Measure, first: str, second: str, keep: pl.Expr | None = None) -> Lift:
        """Compare two systems on the same queries."""
        one, other = self.sums(measure, first, keep), self.sums(measure, second, keep)
        return Lift(
            paired_difference(one, other),
            relative_difference(one, other),
            minimum_detectable_effect(one, other),
        )

    @property
    def systems(self) -> list[str]:
        """Return the names of the systems, in the order in which they were given."""
        return list(self.about["systems"])

    def strata(self) -> dict[str, pl.Expr]:
        """Return a condition for each popularity and language that has complete queries."""
        languages = self.queries.group_by("language").len().sort("len", "language", descending=True)
        kept = {
            f"{column}: {value or 'unknown'}": pl.col(column) == value
            for column, values in (
                ("popularity", POPULARITIES),
                ("language", languages["language"].to_list()),
            )
            for value in values
        }
        return {name: is_in for name, is_in in kept.items() if self.queries.filter(is_in).height}

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        first, *others = self.systems
        return {
            **self.about,
            "judges": self.judges,
            "agreement": self.agreement,
            "queries": self.queries.height,
            "incomplete_queries": self.incomplete,
            "measures": {
                measure: {
                    "systems": {s: self.value(measure, s)._asdict() for s in self.systems},
                    "lifts": {
                        f"{first} - {s}": self.lift(measure, first, s).as_dict() for s in others
                    },
                    "strata": {
                        name: {s: self.value(measure, s, keep)._asdict() for s in self.systems}
                        for name, keep in self.strata().items()
                    },
                }
                for measure in MEASURES
            },
        }


def relevance_report(
    sample: Sample, grades: pl.DataFrame, *, relevant_from: int = 2
) -> RelevanceReport:
    """Join grades with the systems that returned the items.

    ``relevant`` is the share of a query's first k places with a result that judges call relevant
    (of several judges: the share of them); a place without a result is not relevant. ``ndcg`` is
    nDCG@k of the mean grades, over all results of the query.

    Args:
        sample: With the systems' names.
        grades: From ``read_all_grades``.
        relevant_from: Lowest grade that counts as relevant.

    Raises:
        DataError: No query has all its results graded.
    """
    merged = merge_judges(grades, relevant_from)
    items = sample.items.select("item", "query", "entity_id").join(merged, on="item", how="left")
    graded = items.group_by("query").agg(complete=pl.col("gain").is_not_null().all())
    queries = sample.queries.join(graded, on="query", how="left", maintain_order="left")
    # A drawn query for which no system returned anything has nothing to grade: it is complete
    queries = queries.with_columns(pl.col("complete").fill_null(True))
    complete = queries.filter("complete").drop("complete").with_row_index("number")
    if not items.join(complete, on="query").height:
        raise DataError(
            f"no query of {sample.path} has all its results graded yet. Go on grading; whole"
            " queries come one after another."
        )
    for system in sample.about["systems"]:
        figures = _figures(sample, complete, items, system)
        complete = complete.with_columns(
            pl.Series(f"{name} {system}", values) for name, values in figures.items()
        )
    return RelevanceReport(
        about=sample.about | {"relevant_from": relevant_from},
        judges=_judges(grades),
        agreement=_agreement(grades),
        queries=complete.drop("number"),
        incomplete=queries.height - complete.height,
    )


def merge_judges(grades: pl.DataFrame, relevant_from: int) -> pl.DataFrame:
    """Average judges; ``item, gain`` (mean grade), ``relevant`` (share who say so)."""
    return grades.group_by("item").agg(
        gain=pl.col("grade").mean(), relevant=(pl.col("grade") >= relevant_from).mean()
    )


def _figures(
    sample: Sample, complete: pl.DataFrame, items: pl.DataFrame, system: str
) -> dict[Measure, np.ndarray]:
    """Compute one system's measures by complete query, float64 ``(Q,)`` each."""
    k, count = int(sample.about["k"]), complete.height
    own = sample.results.filter(system=system).select("query", "entity_id", "rank")
    rows = (
        items.join(complete.select("query", "number"), on="query")
        .join(own, on=["query", "entity_id"], how="left")
        .with_columns(pl.col("rank").fill_null(UNRANKED))
    )
    number = rows["number"].to_numpy()
    ranks = rows["rank"].to_numpy()
    relevant = np.where(ranks <= k, rows["relevant"].to_numpy(), 0.0)
    ndcg = ndcg_at_k(number, ranks, rows["gain"].to_numpy(), k, count)
    return {
        "relevant": np.bincount(number, weights=relevant, minlength=count) / k,
        "ndcg": np.nan_to_num(ndcg),  # without any relevant result there is nothing to order
    }


def _judges(grades: pl.DataFrame) -> list[dict[str, Any]]:
    """Sum up what each judge gave."""
    found = []
    for (judge, kind), rows in grades.group_by("judge", "kind", maintain_order=True):
        counts = np.bincount(rows["grade"].to_numpy(), minlength=MAX_GRADE + 1)
        shares = {str(grade): n / rows.height for grade, n in enumerate(counts.tolist())}
        found.append({"judge": judge, "kind": kind, "grades": rows.height, "shares": shares})
    return found


def _agreement(grades: pl.DataFrame) -> dict[str, float | int | None]:
    """Compute Krippendorff's alpha of people and models; an oracle is no judge among them."""
    judged = grades.filter(pl.col("kind") != "oracle")
    wide = judged.pivot("item", index="judge", values="grade").drop("judge").fill_null(-1)
    table = wide.to_numpy().astype(np.int64)
    several = int(((table >= 0).sum(axis=0) >= 2).sum()) if table.size else 0
    if not several:
        return {"items": 0, "identical": None, **{f"alpha_{level}": None for level in LEVELS}}
    pairs = coincidence_matrix(table, MAX_GRADE + 1)
    alphas = {f"alpha_{level}": krippendorff_alpha(pairs, level) for level in LEVELS}
    return {"items": several, "identical": identical_share(pairs), **alphas}


def grades_to_report(grades: pl.DataFrame, judges: Sequence[str]) -> pl.DataFrame:
    """Choose judges: those named, else all; an oracle only where nobody else has graded.

    Raises:
        DataError: A named judge has graded nothing.
    """
    unknown = set(judges) - set(grades["judge"].to_list())
    if unknown:
        known = ", ".join(sorted(grades["judge"].unique().to_list()))
        raise DataError(f"--judge {min(unknown)!r} has graded nothing here. Judges are: {known}.")
    if judges:
        return grades.filter(pl.col("judge").is_in(list(judges)))
    judged = grades.filter(pl.col("kind") != "oracle")
    return judged if judged.height else grades


def merged_judgements(sample: Sample, grades: pl.DataFrame) -> pl.DataFrame:
    """Make a table ``judgements`` of one row per item: the mean grade, rounded."""
    merged = merge_judges(grades, 1).sort("item")
    rows = merged.join(sample.items, on="item", maintain_order="left")
    grade = (pl.col("gain") + 0.5).floor().cast(pl.Int64)
    return rows.select("query", "entity_id", grade=grade, judge=pl.lit("mean of judges"))
