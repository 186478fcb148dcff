"""Rank every labelled pair exactly, against the whole catalogue or a random corpus.

The rank of a pair (query q, entity e) against a corpus C is 1 + the number of entities in C, other
than e and its near-duplicates, that score higher for q (or as high and stand earlier in the
catalogue). With C the whole catalogue that is e's place in the result list; with a random C it is
the protocol of the paper (5.1), where e itself need not be in C. Any near-duplicate of e counts as
e, at its best score. Letters: Q queries, N candidates, P pairs, T targets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from encoders.datasets.dataset import Dataset
from encoders.datasets.halves import DEV, describe_split, rows_of_split
from encoders.datasets.related_queries import query_entities
from encoders.errors import ConfigError, InvalidVectors, SchemaError
from encoders.evaluation.metrics import UNRANKED
from encoders.exact_search import count_above, top_k_of_scores
from encoders.progress import Progress

log = logging.getLogger(__name__)

SCORES_AT_ONCE = 1 << 25
"""Scores held at once (128 MiB of float32)."""

PAIR_KEY = ("query", "language", "country", "entity_id", "kind")
"""Columns that tell pairs apart; of equal rows the first is evaluated."""

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

ScoreRows = Callable[[int, int], Tensor]
"""``score(start, stop)``: float32 scores ``(stop - start, N)`` of queries ``start..stop``.

The tensor is fresh on every call, for the caller overwrites it; -inf marks a candidate that the
system does not return.
"""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Which pairs are evaluated, and against how many candidates."""

    split: str = DEV
    """Split of the pairs."""
    corpus_size: int | None = None
    """Rank against this many random candidates; None: against all."""
    max_queries: int | None = None
    """Evaluate only this many random queries; None: all."""
    seed: int = 0
    """Chooses corpus and queries."""

    def __post_init__(self) -> None:
        if self.corpus_size is not None and self.corpus_size < 1:
            raise ConfigError(
                f"the corpus needs at least 1 entity, but corpus_size is {self.corpus_size}."
            )


@dataclass(frozen=True)
class EvaluationTask:
    """The pairs of one entity type and the candidates they are ranked against."""

    entity_type: str
    candidates: pl.DataFrame
    """``(N,)`` catalogue rows that are scored: the corpus, and all positives."""
    queries: list[str]
    """``(Q,)`` distinct query strings."""
    pairs: pl.DataFrame
    """``(P,)`` rows ``query, language, country, kind, entity_id, ...`` with ``query_index`` and
    ``target``.
    """
    targets: pl.DataFrame
    """``(T,)`` distinct (query_index, group), sorted by query.

    Columns: ``target, query_index, group, gain, positives``.
    """
    members: tuple[Int64, Int64]
    """(target, candidate row), sorted: the near-duplicates that answer each target."""
    in_corpus: Bool
    """bool ``(N,)``: which candidates every pair is ranked against."""
    corpus_description: str
    own_row: Int64 | None = None
    """int64 ``(Q,)``, for related queries: the candidate that is the query itself (-1: none).

    A query is never an answer to itself.
    """


def build_task(
    dataset: Dataset,
    entity_type: str,
    settings: TaskSettings | None = None,
    *,
    pairs: pl.DataFrame | None = None,
) -> EvaluationTask:
    """Gather what evaluating one entity type needs.

    Args:
        dataset: Catalogue, pairs and near-duplicate groups.
        entity_type: ``pin``, ``product``, ``ad``, or ``query`` (candidates are then the train-split
            query strings).
        settings: Which pairs and candidates; None: all held-out pairs against all candidates.
        pairs: Use these instead of the data set's (e.g. derived related-query pairs, judgements
            with a ``grade``, or new logs).

    Raises:
        ConfigError: No pair of this type and split.
        SchemaError: A pair names an entity that the catalogue does not hold.
    """
    settings = settings or TaskSettings()
    rng = np.random.default_rng(settings.seed)
    source = dataset.pairs if pairs is None else pairs
    rows = rows_of_split(source.filter(pl.col("entity_type") == entity_type), settings.split)
    key = [name for name in PAIR_KEY if name in rows.columns]
    rows = rows.unique(key, keep="first", maintain_order=True)
    if rows.is_empty():
        raise ConfigError(
            f"there are no {describe_split(settings.split)!r} pairs of entity type"
            f" {entity_type!r} to evaluate in data set {dataset.name!r}."
        )
    if settings.max_queries is not None:
        rows = _sample_queries(rows, settings.max_queries, rng)
    catalogue = (
        _query_candidates(dataset.pairs, rows)
        if entity_type == "query"
        else dataset.of_type(entity_type)
    )
    unknown = set(rows["entity_id"].to_list()).difference(catalogue["id"].to_list())
    if unknown:
        raise SchemaError(
            f"{len(unknown):,} pairs' entities are not in the catalogue of type {entity_type!r},"
            f" e.g. {min(unknown)!r}. Evaluate with the catalogue that the pairs were made from."
        )
    groups = [dataset.groups.get(id, id) for id in catalogue["id"].to_list()]
    catalogue = catalogue.with_columns(pl.Series("__group", groups, dtype=pl.String))
    in_corpus = _sample_corpus(catalogue.height, settings.corpus_size, rng)
    return _assemble(entity_type, catalogue, rows, in_corpus)


def _sample_queries(rows: pl.DataFrame, count: int, rng: np.random.Generator) -> pl.DataFrame:
    """Keep the pairs of ``count`` random queries; all pairs when there are no more queries."""
    queries = rows["query"].unique(maintain_order=True)
    if count >= len(queries):
        return rows
    chosen = queries.gather(np.sort(rng.permutation(len(queries))[:count]))
    return rows.filter(pl.col("query").is_in(chosen.implode()))


def _sample_corpus(size: int, corpus_size: int | None, rng: np.random.Generator) -> Bool:
    """Choose the candidates that every pair is ranked against; bool ``(size,)``."""
    in_corpus = np.zeros(size, dtype=bool)
    in_corpus[rng.permutation(size)[:corpus_size]] = True
    return in_corpus


def _query_candidates(pairs: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """List the train-split query strings as candidates, then the answers not among them."""
    known = query_entities(pairs, "train")
    answers = rows.select(pl.col("entity_id").unique(maintain_order=True).alias("id"))
    more = answers.filter(~pl.col("id").is_in(known["id"].implode()))
    more = more.with_columns(entity_type=pl.lit("query"), title=pl.col("id"))
    return pl.concat([known, more], how="diagonal")


def _assemble(
    entity_type: str, catalogue: pl.DataFrame, rows: pl.DataFrame, in_corpus: Bool
) -> EvaluationTask:
    """Number queries, targets and candidates; ``catalogue`` holds each row's ``__group``."""
    groups = catalogue.select(entity_id="id", group="__group")
    rows = rows.join(groups, on="entity_id", maintain_order="left")
    queries = rows["query"].unique(maintain_order=True)
    rows = rows.with_columns(
        query_index=rows["query"].cast(pl.Enum(queries)).to_physical().cast(pl.Int64)
    )
    targets = _number_targets(rows)
    key = ["query_index", "group"]
    rows = rows.join(targets.drop("gain"), on=key, maintain_order="left")
    answers = catalogue["__group"].is_in(targets["group"].unique().implode()).to_numpy()
    scored = in_corpus | answers
    candidates = catalogue.filter(pl.Series(scored))
    row = pl.int_range(pl.len(), dtype=pl.Int64)
    members = (
        targets.select("target", "group")
        .join(candidates.select(group="__group", row=row), on="group")
        .sort("target", "row")
    )
    own_row = None
    if entity_type == "query":
        row_of = {id: row for row, id in enumerate(candidates["id"].to_list())}
        own_row = np.array([row_of.get(query, -1) for query in queries.to_list()], dtype=np.int64)
    size = len(in_corpus)
    chosen = int(in_corpus.sum())
    description = f"all {size:,}" if chosen == size else f"{chosen:,} random of {size:,}"
    return EvaluationTask(
        entity_type=entity_type,
        candidates=candidates.drop("__group"),
        queries=queries.to_list(),
        pairs=rows,
        targets=targets,
        members=(members["target"].to_numpy(), members["row"].to_numpy()),
        in_corpus=in_corpus[scored],
        corpus_description=description,
        own_row=own_row,
    )


def _number_targets(rows: pl.DataFrame) -> pl.DataFrame:
    """Collect the distinct (query, near-duplicate group), with the best grade as gain."""
    gain = pl.col("grade").cast(pl.Float64) if "grade" in rows.columns else pl.lit(1.0)
    targets = (
        rows.group_by("query_index", "group", maintain_order=True)
        .agg(gain.max().alias("gain"))
        .sort("query_index", maintain_order=True)
    )
    number = pl.int_range(pl.len(), dtype=pl.Int64)
    return targets.with_columns(target=number, positives=pl.len().over("query_index"))


def vector_scores(queries: np.ndarray, candidates: np.ndarray, device: str = "cpu") -> ScoreRows:
    """Make a scoring function of the inner products of two arrays.

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
    ranks: Int64
    """int64 ``(P,)``: rank of each pair; ``UNRANKED`` if not returned."""
    list_ranks: Int64
    """int64 ``(T,)``: place of each target in the list of corpus and targets.

    Near-duplicates are counted once.
    """
    run: tuple[Int64, npt.NDArray[np.float32]] | None = None
    """Top candidates of each query, rows and scores ``(Q, depth)``, if requested."""


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
    outside = torch.from_numpy(np.flatnonzero(~task.in_corpus))
    ranks: list[Int64] = []
    list_ranks: list[Int64] = []
    runs: list[tuple[Int64, npt.NDArray[np.float32]]] = []
    block = max(1, SCORES_AT_ONCE // max(1, width))
    progress = Progress(log, f"rank by {system}", count, unit="queries")
    for start in range(0, count, block):
        stop = min(start + block, count)
        scores = score(start, stop)
        _exclude_own_rows(task, scores, start, stop)
        answers = _Answers.find(task, scores, start, stop)
        scores[:, outside.to(scores.device)] = -torch.inf
        rank = 1 + _count_above(scores, answers)
        missing = np.isneginf(answers.best_score)
        ranks.append(np.where(missing, UNRANKED, rank))
        list_ranks.append(np.where(missing, UNRANKED, rank + answers.list_correction(task)))
        if run_depth:
            runs.append(top_k_of_scores(scores, run_depth))
        progress.add(stop - start)
    of_pair = task.pairs["target"].to_numpy()
    run = None
    if runs:
        run = np.concatenate([rows for rows, _ in runs]), np.concatenate([s for _, s in runs])
    return Ranking(task, system, np.concatenate(ranks)[of_pair], np.concatenate(list_ranks), run)


def _exclude_own_rows(task: EvaluationTask, scores: Tensor, start: int, stop: int) -> None:
    """Set the score of each query of ``start..stop`` for itself to -inf."""
    if task.own_row is None:
        return
    own = torch.from_numpy(task.own_row[start:stop])
    rows = torch.nonzero(own >= 0).flatten()
    scores[rows.to(scores.device), own[rows].to(scores.device)] = -torch.inf


@dataclass(frozen=True)
class _Answers:
    """The targets of a block of queries with the scores of their near-duplicates.

    ``t`` targets sorted by query, ``m`` members (near-duplicates) sorted by target and row.
    """

    query: Int64
    """``(t,)``: row of the block's scores."""
    best_score: npt.NDArray[np.float32]
    """``(t,)``: the best member's score."""
    best_row: Int64
    """``(t,)``: candidate row of the best member, the first of equal ones."""
    member_query: Int64
    """``(m,)``."""
    member_row: Int64
    """``(m,)``: candidate rows."""
    member_score: npt.NDArray[np.float32]
    """``(m,)``."""

    @classmethod
    def find(cls, task: EvaluationTask, scores: Tensor, start: int, stop: int) -> _Answers:
        """Look the targets of queries ``start..stop`` up in their scores."""
        owner = task.targets["query_index"].to_numpy()
        first, last = np.searchsorted(owner, [start, stop])
        member_target, member_row = task.members
        low, high = np.searchsorted(member_target, [first, last])
        target = member_target[low:high] - first
        row = member_row[low:high]
        query = owner[first:last] - start
        queries = torch.from_numpy(query[target]).to(scores.device)
        columns = torch.tensor(row, device=scores.device)
        score = scores[queries, columns].cpu().numpy()
        starts = np.flatnonzero(np.diff(target, prepend=-1))
        best = np.maximum.reduceat(score, starts)
        # Members are sorted by row, so the first that reaches the maximum has the lowest row.
        reaching = np.flatnonzero(score == best[target])
        winner = reaching[np.diff(target[reaching], prepend=-1) != 0]
        return cls(query, best, row[winner], query[target], row, score)

    def list_correction(self, task: EvaluationTask) -> Int64:
        """Count each query's other answers once per target, instead of once per row of the corpus.

        Returns:
            int64 ``(t,)``: what to add to the number of corpus rows above each target.
        """
        correction = np.zeros(len(self.query), dtype=np.int64)
        if len(self.member_row) == len(self.query) and task.in_corpus[self.member_row].all():
            return correction
        inside = np.flatnonzero(task.in_corpus[self.member_row])
        query_inside = self.member_query[inside]
        starts = np.flatnonzero(np.diff(self.query, prepend=-1))
        for first, last in zip(starts, np.append(starts[1:], len(self.query)), strict=True):
            query = self.query[first]
            low, high = np.searchsorted(query_inside, [query, query + 1])
            scores = self.member_score[inside[low:high]]
            columns = self.member_row[inside[low:high]]
            best_scores = self.best_score[first:last]
            best_rows = self.best_row[first:last]
            for target in range(first, last):
                score, row = self.best_score[target], self.best_row[target]
                listed = (best_scores > score) | ((best_scores == score) & (best_rows < row))
                counted = (scores > score) | ((scores == score) & (columns < row))
                correction[target] = int(listed.sum()) - int(counted.sum())
        return correction


def _count_above(scores: Tensor, answers: _Answers) -> Int64:
    """Count the columns of its query's scores that rank before each target; int64 ``(t,)``."""
    counts = np.empty(len(answers.query), dtype=np.int64)
    batch = max(1, SCORES_AT_ONCE // max(1, scores.shape[1]))
    for start in range(0, len(counts), batch):
        part = slice(start, start + batch)
        query, limit, column = (
            torch.from_numpy(values[part]).to(scores.device)
            for values in (answers.query, answers.best_score, answers.best_row)
        )
        counts[part] = count_above(scores[query], limit, column).cpu().numpy()
    return counts
