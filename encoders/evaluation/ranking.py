"""Rank every labelled pair exactly, against the whole catalogue or a random corpus, and sum the ranks up by slice.

The rank of a pair (query q, entity e) against a corpus C is 1 + the number of entities in C, other
than e and its near-duplicates, that score higher for q (or as high and stand earlier in the
catalogue). With C the whole catalogue that is e's place in the result list; with a random C it is
the protocol of the paper (5.1), where e itself need not be in C. Any near-duplicate of e counts as
e, at its best score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from encoders.datasets.dataset import Dataset
from encoders.datasets.related_queries import query_entities
from encoders.errors import ConfigError, InvalidVectors, SchemaError
from encoders.evaluation.metrics import (
    UNRANKED,
)
from encoders.exact_search import top_k_of_scores

SCORES_AT_ONCE = 1 << 25
"""Scores held at once (128 MiB of float32)."""


ScoreRows = Callable[[int, int], torch.Tensor]
"""``score(start, stop)``: fresh float32 scores ``(stop - start, N)`` of queries ``start..stop`` for all candidates; -inf: not returned."""


@dataclass(frozen=True)
class EvaluationTask:
    """One entity type's held-out pairs and the candidates they are ranked against."""

    entity_type: str
    candidates: pl.DataFrame
    """``(N,)`` catalogue rows that are scored: the corpus, and all positives."""
    queries: list[str]
    """``(Q,)`` distinct query strings."""
    pairs: pl.DataFrame
    """``(P,)`` rows ``query, language, country, kind, entity_id, ...`` plus ``query_index`` and ``target``."""
    targets: pl.DataFrame
    """``(T,)`` distinct (query_index, group): ``target, query_index, group, gain, positives``."""
    members: tuple[np.ndarray, np.ndarray]
    """(target, candidate row), sorted: the near-duplicates that answer each target."""
    in_corpus: np.ndarray
    """bool ``(N,)``: which candidates every pair is ranked against."""
    corpus_description: str
    own_row: np.ndarray | None = None
    """Int64 ``(Q,)``, for related queries: the candidate that is the query itself (-1: none); it is never an answer."""


def build_task(
    dataset: Dataset,
    entity_type: str,
    *,
    pairs: pl.DataFrame | None = None,
    split: str = "heldout",
    corpus_size: int | None = None,
    max_queries: int | None = None,
    seed: int = 0,
) -> EvaluationTask:
    """Gather what evaluating one entity type needs.

    Args:
        dataset: Catalogue, pairs and near-duplicate groups.
        entity_type: ``pin``, ``product``, ``ad``, or ``query`` (candidates are then the train-split
            query strings).
        pairs: Use these instead of the data set's (e.g. derived related-query pairs, judgements
            with a ``grade``, or new logs).
        split: Which split to evaluate.
        corpus_size: Rank against this many random candidates; None: against all.
        max_queries: Evaluate only this many random queries; None: all.
        seed: Chooses corpus and queries.

    Raises:
        ConfigError: No pair of this type and split, or a corpus size below 1.
        SchemaError: A pair names an entity that the catalogue does not hold.
    """
    if corpus_size is not None and corpus_size < 1:
        raise ConfigError(f"the corpus needs at least 1 entity, but corpus_size is {corpus_size}.")
    rng = np.random.default_rng(seed)
    source = dataset.pairs if pairs is None else pairs
    rows = source.filter((pl.col("entity_type") == entity_type) & (pl.col("split") == split))
    rows = rows.unique(
        [c for c in ("query", "language", "country", "entity_id", "kind") if c in rows.columns],
        keep="first",
        maintain_order=True,
    )
    if rows.is_empty():
        raise ConfigError(
            f"there are no {split!r} pairs of entity type {entity_type!r} to evaluate in data set"
            f" {dataset.name!r}."
        )
    if max_queries is not None:
        distinct = rows["query"].unique(maintain_order=True)
        if max_queries < len(distinct):
            rows = rows.filter(
                pl.col("query").is_in(
                    distinct.gather(np.sort(rng.permutation(len(distinct))[:max_queries])).implode()
                )
            )
    catalogue = (
        _query_candidates(dataset.pairs, rows)
        if entity_type == "query"
        else dataset.of_type(entity_type)
    )
    group_of = [dataset.groups.get(id, id) for id in catalogue["id"].to_list()]
    catalogue = catalogue.with_columns(pl.Series("__group", group_of, dtype=pl.String))
    unknown = set(rows["entity_id"].to_list()).difference(catalogue["id"].to_list())
    if unknown:
        raise SchemaError(
            f"{len(unknown):,} pairs' entities are not in the catalogue of type {entity_type!r},"
            f" e.g. {min(unknown)!r}. Evaluate with the catalogue that the pairs were made from."
        )
    return _assemble(entity_type, catalogue, rows, corpus_size, rng)


def _query_candidates(pairs: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Train-split query strings as candidates, and the answers that are not among them."""
    known = query_entities(pairs, "train")
    more = rows.select(pl.col("entity_id").unique(maintain_order=True).alias("id")).filter(
        ~pl.col("id").is_in(known["id"].implode())
    )
    return pl.concat(
        [known, more.with_columns(entity_type=pl.lit("query"), title=pl.col("id"))], how="diagonal"
    )


def _assemble(
    entity_type: str,
    catalogue: pl.DataFrame,
    rows: pl.DataFrame,
    corpus_size: int | None,
    rng: np.random.Generator,
) -> EvaluationTask:
    rows = rows.join(
        catalogue.select(pl.col("id").alias("entity_id"), pl.col("__group").alias("group")),
        on="entity_id",
        maintain_order="left",
    )
    queries = rows["query"].unique(maintain_order=True)
    rows = rows.with_columns(
        query_index=rows["query"].cast(pl.Enum(queries)).to_physical().cast(pl.Int64)
    )
    gain = pl.col("grade").cast(pl.Float64) if "grade" in rows.columns else pl.lit(1.0)
    targets = rows.group_by("query_index", "group", maintain_order=True).agg(
        gain.max().alias("gain")
    )
    targets = targets.with_row_index("target").with_columns(
        pl.col("target").cast(pl.Int64), positives=pl.len().over("query_index")
    )
    rows = rows.join(
        targets.select("query_index", "group", "target", "positives"),
        on=["query_index", "group"],
        maintain_order="left",
    )
    size = catalogue.height
    wanted = size if corpus_size is None else min(corpus_size, size)
    in_corpus = np.zeros(size, dtype=bool)
    in_corpus[rng.permutation(size)[:wanted]] = True
    answers = catalogue["__group"].is_in(targets["group"].unique().implode()).to_numpy()
    scored = in_corpus | answers
    candidates, in_corpus = catalogue.filter(pl.Series(scored)), in_corpus[scored]
    numbered = (
        candidates.select(pl.col("__group").alias("group"))
        .with_row_index("row")
        .with_columns(pl.col("row").cast(pl.Int64))
    )
    members = targets.select("target", "group").join(numbered, on="group").sort("target", "row")
    own = None
    if entity_type == "query":
        row_of = {id: row for row, id in enumerate(candidates["id"].to_list())}
        own = np.array([row_of.get(query, -1) for query in queries.to_list()], dtype=np.int64)
    return EvaluationTask(
        entity_type=entity_type,
        candidates=candidates.drop("__group"),
        queries=queries.to_list(),
        pairs=rows,
        targets=targets,
        members=(members["target"].to_numpy(), members["row"].to_numpy()),
        in_corpus=in_corpus,
        corpus_description=f"all {size:,}" if wanted == size else f"{wanted:,} random of {size:,}",
        own_row=own,
    )


def vector_scores(queries: np.ndarray, candidates: np.ndarray, device: str = "cpu") -> ScoreRows:
    """Inner products of two arrays as a scoring function.

    Args:
        queries: ``(Q, D)`` float32, unit rows.
        candidates: ``(N, D)`` float32, unit rows.
        device: Where to multiply, e.g. ``cuda``; in float32.

    Raises:
        InvalidVectors: Shapes do not fit, or a value is not finite.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise InvalidVectors(
            f"expected queries (Q, D) and candidates (N, D) with one D, but got {queries.shape} and"
            f" {candidates.shape}."
        )
    for name, vectors in (("query", queries), ("candidate", candidates)):
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise InvalidVectors(
                f"expected finite vectors, but {name} row {bad[0]} holds NaN or infinity"
                f" ({len(bad)} rows in all). Embed again."
            )
    left = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(device)
    right = torch.from_numpy(np.ascontiguousarray(candidates, dtype=np.float32)).to(device).T
    return lambda start, stop: left[start:stop] @ right


@dataclass(frozen=True)
class Ranking:
    """The ranks that one system gave to one task's pairs."""

    task: EvaluationTask
    system: str
    ranks: np.ndarray
    """int64 ``(P,)``: rank of each pair; ``UNRANKED`` if not returned."""
    list_ranks: np.ndarray
    """int64 ``(T,)``: place of each target in the list of corpus and targets, near-duplicates counted once."""
    run: tuple[np.ndarray, np.ndarray] | None = None
    """Top candidates of each query, rows and scores ``(Q, depth)``, when asked for."""


def rank_task(
    task: EvaluationTask, score: ScoreRows, system: str, *, run_depth: int = 0
) -> Ranking:
    """Rank all pairs of a task, exactly.

    Args:
        task: From ``build_task``.
        score: Scores of queries ``start..stop`` of ``task.queries`` for ``task.candidates``.
        system: Name of what is measured.
        run_depth: Also keep this many best corpus entities per query.
    """
    count, width = len(task.queries), len(task.in_corpus)
    owner = task.targets["query_index"].to_numpy()
    order = np.argsort(owner, kind="stable")
    member_target, member_row = task.members
    above = np.zeros(len(owner), dtype=np.int64)
    correction = np.zeros(len(owner), dtype=np.int64)
    missing = np.zeros(len(owner), dtype=bool)
    runs = []
    outside = torch.from_numpy(~task.in_corpus)
    chunk = max(1, SCORES_AT_ONCE // max(1, width))
    first_member = np.searchsorted(member_target, np.arange(len(owner)))
    for start in range(0, count, chunk):
        scores = score(start, min(start + chunk, count))
        if task.own_row is not None:
            selves = torch.from_numpy(task.own_row[start : start + chunk])
            found = torch.nonzero(selves >= 0).flatten()
            scores[found.to(scores.device), selves[found].to(scores.device)] = -torch.inf
        mine = order[
            np.searchsorted(owner[order], start) : np.searchsorted(owner[order], start + chunk)
        ]
        picked = np.concatenate(
            [
                np.arange(first, last)
                for first, last in _spans(first_member, len(member_target), mine)
            ]
        )
        local = owner[member_target[picked]] - start
        values = (
            scores[
                torch.from_numpy(local).to(scores.device),
                torch.from_numpy(member_row[picked]).to(scores.device),
            ]
            .cpu()
            .numpy()
        )
        if outside.any():
            scores[:, outside.to(scores.device)] = -torch.inf
        segments = np.flatnonzero(np.diff(member_target[picked], prepend=-1))
        best = np.maximum.reduceat(values, segments)
        # Members are sorted by row, so the first that reaches the maximum has the lowest row.
        winners = np.flatnonzero(values == np.repeat(best, np.diff(segments, append=len(values))))
        keep = np.diff(member_target[picked][winners], prepend=-1) != 0
        best_row = member_row[picked][winners[keep]]
        above[mine] = _count_above(scores, owner[mine] - start, best, best_row)
        missing[mine] = np.isneginf(best)
        correction[mine] = _list_correction(
            task, owner[mine], best, best_row, member_target[picked], member_row[picked], values
        )
        if run_depth:
            runs.append(top_k_of_scores(scores, run_depth))
    ranks = np.where(missing, UNRANKED, above + 1)
    list_ranks = np.where(missing, UNRANKED, above + 1 + correction)
    run = (
        None
        if not runs
        else (np.concatenate([r for r, _ in runs]), np.concatenate([s for _, s in runs]))
    )
    return Ranking(task, system, ranks[task.pairs["target"].to_numpy()], list_ranks, run)


def _spans(first_member: np.ndarray, total: int, targets: np.ndarray) -> Iterable[tuple[int, int]]:
    ends = np.append(first_member[1:], total)
    return zip(first_member[targets].tolist(), ends[targets].tolist(), strict=True)


def _count_above(
    scores: torch.Tensor, rows: np.ndarray, best: np.ndarray, best_row: np.ndarray
) -> np.ndarray:
    """How many columns of each target's score row beat it: a higher score, or the same score in an earlier column."""
    counts = np.empty(len(rows), dtype=np.int64)
    batch = max(1, SCORES_AT_ONCE // max(1, scores.shape[1]))
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        mine = scores[torch.from_numpy(rows[part]).to(scores.device)]
        limit = torch.from_numpy(best[part]).to(scores.device)[:, None]
        higher, at_least = (mine > limit).sum(dim=1), (mine >= limit).sum(dim=1)
        for i in torch.nonzero(at_least - higher > 0).flatten().tolist():
            before = int(best_row[start + i])
            higher[i] += (mine[i, :before] == limit[i]).sum()
        counts[part] = higher.cpu().numpy()
    return counts


def _list_correction(
    task: EvaluationTask,
    owners: np.ndarray,
    best: np.ndarray,
    best_row: np.ndarray,
    member_target: np.ndarray,
    member_row: np.ndarray,
    values: np.ndarray,
) -> np.ndarray:
    """Replace, in each target's count, the query's other answers that stand in the corpus by one entry per other target."""
    if len(member_row) == len(best) and bool(task.in_corpus[member_row].all()):
        return np.zeros(len(best), dtype=np.int64)
    correction = np.zeros(len(best), dtype=np.int64)
    owner_of_member = task.targets["query_index"].to_numpy()[member_target]
    bounds = np.flatnonzero(np.diff(owners, prepend=-1))
    for start, stop in zip(bounds, np.append(bounds[1:], len(owners)), strict=True):
        low, high = np.searchsorted(owner_of_member, [owners[start], owners[start] + 1])
        inside = np.flatnonzero(task.in_corpus[member_row[low:high]]) + low
        for i in range(start, stop):
            others = (best[start:stop] > best[i]) | (
                (best[start:stop] == best[i]) & (best_row[start:stop] < best_row[i])
            )
            counted = (values[inside] > best[i]) | (
                (values[inside] == best[i]) & (member_row[inside] < best_row[i])
            )
            correction[i] = int(others.sum()) - int(counted.sum())
    return correction
