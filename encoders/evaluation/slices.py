"""Metrics by slice (language, popularity, few positives) with intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from encoders.errors import ConfigError
from encoders.evaluation.metrics import (
    Interval,
    PairedDifference,
    QuerySums,
    bootstrap_interval,
    ndcg_at_k,
    paired_difference,
    recall_ceiling,
    reciprocal_ranks,
    sums_by_query,
)
from encoders.evaluation.ranking import EvaluationTask, Ranking

POPULARITY = pl.Enum(["head", "torso", "tail"])
POPULARITY_SHARES = (0.1, 0.5)
"""Head: the top tenth of entities by train pairs; torso: the next four tenths; tail: the rest."""
FEW_POSITIVES = 10
"""Most answers to a query with ``few`` positives."""


@dataclass(frozen=True)
class SliceMetrics:
    """The figures of one system on some of a task's pairs."""

    pairs: int
    queries: int
    recall: dict[int, Interval]
    """Labelled Recall@k over pairs, by k."""
    ceiling: dict[int, float]
    """The highest Recall@k that any ranking could reach on these pairs."""
    query_recall: Interval
    """Labelled Recall@10 averaged over queries instead of pairs: each query counts once."""
    distinct_pairs: int
    """Pairs that differ in query or answer: the same pair in another language counts once."""
    distinct_recall: float
    """Labelled Recall@10 over the distinct pairs."""
    mrr: Interval
    ndcg: float
    """Mean nDCG@10 over queries (of all their targets)."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        recalls = {
            f"recall@{k}": {
                "value": r.value,
                "low": r.low,
                "high": r.high,
                "ceiling": self.ceiling[k],
            }
            for k, r in self.recall.items()
        }
        mrr = {"value": self.mrr.value, "low": self.mrr.low, "high": self.mrr.high}
        return {
            "pairs": self.pairs,
            "queries": self.queries,
            **recalls,
            "recall@10_by_query": self.query_recall.value,
            "recall@10_by_query_low": self.query_recall.low,
            "recall@10_by_query_high": self.query_recall.high,
            "distinct_pairs": self.distinct_pairs,
            "recall@10_of_distinct_pairs": self.distinct_recall,
            "mrr": mrr,
            "ndcg@10": self.ndcg,
        }


def slice_metrics(
    ranking: Ranking,
    keep: np.ndarray | None = None,
    *,
    ks: Sequence[int] = (1, 10, 100),
    resamples: int = 1000,
    seed: int = 0,
) -> SliceMetrics:
    """Sum the ranks of a task up, over all pairs or those with ``keep`` True.

    Args:
        ranking: From ``rank_task``.
        keep: bool ``(P,)``.
        ks: Depths.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
    """
    task = ranking.task
    keep = np.ones(task.pairs.height, dtype=bool) if keep is None else keep
    query_index = task.pairs["query_index"].to_numpy()[keep]
    target = task.pairs["target"].to_numpy()[keep]
    ranks = ranking.ranks[keep]
    count = len(task.queries)
    places = target_takes_place(task)[target]
    recall = {
        k: bootstrap_interval(
            sums_by_query(query_index, ranks <= k, count), resamples=resamples, seed=seed
        )
        for k in ks
    }
    ceiling = {k: recall_ceiling(query_index, target, places, k, count).value for k in ks}
    ten = sums_by_query(query_index, ranks <= 10, count)
    seen = ten.counts > 0
    by_query = QuerySums(
        np.divide(ten.hits, ten.counts, out=np.zeros(count), where=seen), seen.astype(np.float64)
    )
    _, first = np.unique(target, return_index=True)
    ndcg = ndcg_at_k(
        task.targets["query_index"].to_numpy(),
        ranking.list_ranks,
        task.targets["gain"].to_numpy(),
        10,
        count,
    )[seen]
    return SliceMetrics(
        pairs=int(keep.sum()),
        queries=int(seen.sum()),
        recall=recall,
        ceiling=ceiling,
        query_recall=bootstrap_interval(by_query, resamples=resamples, seed=seed),
        distinct_pairs=len(first),
        distinct_recall=float((ranks[first] <= 10).mean()) if len(first) else float("nan"),
        mrr=bootstrap_interval(
            sums_by_query(query_index, reciprocal_ranks(ranks), count),
            resamples=resamples,
            seed=seed,
        ),
        ndcg=float(np.nanmean(ndcg)) if np.isfinite(ndcg).any() else float("nan"),
    )


def target_takes_place(task: EvaluationTask) -> np.ndarray:
    """Tell which targets have all their answers in the corpus; bool ``(T,)``.

    Such a target takes a place in the lists of its query's other targets.
    """
    member_target, member_row = task.members
    free = np.zeros(task.targets.height, dtype=bool)
    free[member_target[~task.in_corpus[member_row]]] = True
    return ~free


def pair_slices(task: EvaluationTask, train_pairs: pl.DataFrame) -> dict[str, pl.Series]:
    """Label each pair in every slice.

    Args:
        task: From ``build_task``.
        train_pairs: Train-split pairs: their number per entity makes head, torso and tail.

    Returns:
        Slice name -> label of each pair ``(P,)``, an ``Enum`` where labels have an order:
        ``language``, ``english``, ``country`` (if any is known), ``action``, ``popularity``
        (head/torso/tail), ``text`` (whether title, description or caption is there), ``engaged``
        (whether it has engaged queries), ``positives`` (few: 10 or fewer answers to the query),
        ``source`` (of the entity, if known).
    """
    pairs = task.pairs
    language = pl.col("language").str.split("-").list.first()
    few = pl.col("positives") <= FEW_POSITIVES
    entities = _popularity(task, train_pairs).join(
        _about_entities(task.candidates), on="entity_id", how="left"
    )
    joined = pairs.select("entity_id").join(
        entities, on="entity_id", how="left", maintain_order="left"
    )
    labels = {
        "language": pairs["language"],
        "english": pairs.select(_label(language == "en", "en", "not en")).to_series(),
        "action": pairs["kind" if "kind" in pairs.columns else "action"],
        "positives": pairs.select(_label(few, "few", "many")).to_series(),
        **{name: joined[name] for name in joined.columns if name != "entity_id"},
    }
    if "country" in pairs.columns and (pairs["country"] != "").any():
        labels["country"] = pairs["country"]
    labels["action, few positives"] = pl.Series(
        [f"{a}, {p}" for a, p in zip(labels["action"], labels["positives"], strict=True)]
    )
    return labels


def _label(condition: pl.Expr, yes: str, no: str) -> pl.Expr:
    return pl.when(condition).then(pl.lit(yes)).otherwise(pl.lit(no))


def _popularity(task: EvaluationTask, train_pairs: pl.DataFrame) -> pl.DataFrame:
    """Sort the candidates into head, torso and tail by train pairs; ``entity_id, popularity``."""
    counts = (
        train_pairs.filter(pl.col("entity_type") == task.entity_type)
        .group_by("entity_id")
        .agg(pl.len().alias("train"))
    )
    ranked = (
        task.candidates.select(entity_id="id")
        .join(counts, on="entity_id", how="left")
        .with_columns(pl.col("train").fill_null(0))
        .sort(["train", "entity_id"], descending=[True, False])
        .with_row_index("place")
    )
    share = pl.col("place") / max(1, ranked.height)
    head, torso = POPULARITY_SHARES
    tail_or_torso = _label(share < torso, "torso", "tail")
    popularity = pl.when(share < head).then(pl.lit("head")).otherwise(tail_or_torso)
    return ranked.select("entity_id", popularity=popularity.cast(POPULARITY))


def _about_entities(candidates: pl.DataFrame) -> pl.DataFrame:
    """Label what is known of each candidate: ``entity_id, text, engaged`` and ``source`` if any."""
    texts = [
        pl.col(name).fill_null("").str.strip_chars() != ""
        for name in ("title", "description", "caption")
        if name in candidates.columns
    ]
    has_text = pl.any_horizontal(texts) if texts else pl.lit(False)
    has_queries = pl.lit(False)
    if "engaged_queries" in candidates.columns:
        has_queries = pl.col("engaged_queries").list.len() > 0
    source = [pl.col("source").cast(pl.String)] if "source" in candidates.columns else []
    return candidates.select(
        _label(has_text, "present", "absent").alias("text"),
        _label(has_queries, "yes", "no").alias("engaged"),
        *source,
        entity_id="id",
    )


def metrics_by_slice(
    ranking: Ranking,
    slices: dict[str, pl.Series],
    *,
    ks: Sequence[int] = (10,),
    resamples: int = 300,
) -> dict[str, dict[str, SliceMetrics]]:
    """Sum the ranks of a task up by slice and label.

    Returns:
        ``{slice: {label: metrics}}``; labels stand in the order of their ``Enum``, else most pairs
        first. Pairs without a label are ``unknown``.
    """
    result: dict[str, dict[str, SliceMetrics]] = {}
    for name, given in slices.items():
        labels = given.cast(pl.String).fill_null("unknown")
        listed = (
            labels.value_counts()
            .sort(["count", labels.name], descending=[True, False])[labels.name]
            .to_list()
        )
        if isinstance(given.dtype, pl.Enum):
            order = given.dtype.categories.to_list()
            listed.sort(key=lambda label: order.index(label) if label in order else len(order))
        result[name] = {
            label: slice_metrics(ranking, (labels == label).to_numpy(), ks=ks, resamples=resamples)
            for label in listed
        }
    return result


def compare(
    first: Ranking,
    second: Ranking,
    keep: np.ndarray | None = None,
    *,
    k: int = 10,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Compare the labelled Recall@k of two systems, paired, with a bootstrap over queries.

    Raises:
        ConfigError: The two rank different tasks.
    """
    if first.task.entity_type != second.task.entity_type or not first.task.pairs.select(
        "query", "entity_id"
    ).equals(second.task.pairs.select("query", "entity_id")):
        raise ConfigError(
            "a comparison needs two systems on the same task, but their pairs differ. Rank both"
            " with one EvaluationTask."
        )
    index = first.task.pairs["query_index"].to_numpy()
    keep = np.ones(len(index), dtype=bool) if keep is None else keep

    def sums(ranking: Ranking) -> QuerySums:
        return sums_by_query(index[keep], ranking.ranks[keep] <= k, len(first.task.queries))

    return paired_difference(sums(first), sums(second), resamples=resamples, seed=seed)
