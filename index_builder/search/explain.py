"""Why an id was not returned, and at which step labelled recall is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Unpack

import numpy as np

from encoders.exact_search import exact_top_k
from index_builder.filters.expression import parse_filter
from index_builder.filters.selection import BoundFilter
from index_builder.search.entity_index import EntityIndex, SearchOptions
from index_builder.search.request import SearchResult

STEPS = ("labels", "encoder", "dimension cut", "staleness", "quantisation", "graph", "filter")
_WIDE_EF = 20_000
_SAME_SCORE = 1e-6


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why an id is or is not among the answers of one query.

    Attributes:
        id: The id asked about.
        state: ``live``, ``base``, ``tombstoned`` or ``missing``.
        reason: One sentence.
        score: Inner product with the query, None where there is no vector.
        exact_rank: Rank from 1 among all visible entities, None where there is no vector.
        rank_after_filter: Rank among those that pass the filter; None without a filter or where the
            id does not pass.
        returned_at: Rank in the served answer, None if it is not in it.
    """

    id: str
    state: str
    reason: str
    score: float | None = None
    exact_rank: int | None = None
    rank_after_filter: int | None = None
    returned_at: int | None = None


class _Visible(NamedTuple):
    """All entities that a search could return, base rows first."""

    scores: np.ndarray
    """float32 ``(V,)``, inner products with the query."""
    passing: np.ndarray | None
    """bool ``(V,)``, which pass the filter; None without one."""

    def rank(self, score: float, filtered: bool = False) -> int:
        """Return the rank from 1 of a score among all, or among those that pass the filter."""
        scores = self.scores[self.passing] if filtered else self.scores
        return 1 + int(np.count_nonzero(scores > score + _SAME_SCORE))


def explain_id(
    index: EntityIndex, query: np.ndarray, identifier: str, k: int, expression: str | None = None
) -> Verdict:
    """Follow one id through everything a search does.

    Args:
        index: With its live entries attached.
        query: float32 ``(D,)``, unit norm.
        identifier: The id that was (not) returned.
        k: Answers wanted.
        expression: Filter of the search, or None.

    Raises:
        FilterError: The filter does not parse or does not fit.
    """
    live = index.live
    row = index.row_of(identifier)
    place = live.find(identifier) if live is not None else None
    if place is None and row is None:
        reason = (
            "it is neither in the release nor in the live log: it was never indexed, or its id is"
            " spelled differently"
        )
        return Verdict(identifier, "missing", reason)
    vector = index.vector(identifier)
    if vector is None:
        reason = "it was deleted by a live write after the release was built"
        return Verdict(identifier, "tombstoned", reason)
    score = float(vector @ query)
    visible = _visible(index, query, expression)
    answer = index.search(query, k, filter=expression)
    passes = expression is None or _passes(index, identifier, expression)
    filtered_rank = None
    if expression is not None and passes:
        filtered_rank = visible.rank(score, filtered=True)
    verdict = Verdict(
        identifier,
        "live" if place is not None else "base",
        "",
        score,
        visible.rank(score),
        filtered_rank,
        answer.ids.index(identifier) + 1 if identifier in answer.ids else None,
    )
    if not passes and verdict.returned_at is None:
        reason = _why_excluded(index, identifier, str(expression))
    else:
        reason = _why(verdict, answer, k)
    return replace(verdict, reason=reason)


def _why(verdict: Verdict, answer: SearchResult, k: int) -> str:
    """Say where an id that passes the filter was lost, or at which place it was returned."""
    if verdict.returned_at is not None:
        return f"it is answer {verdict.returned_at} of {len(answer.ids)}"
    rank = verdict.exact_rank if verdict.rank_after_filter is None else verdict.rank_after_filter
    if rank is not None and rank > k:
        last = f"{float(answer.scores[-1]):.4f}" if len(answer.scores) else "none"
        return (
            f"exact search ranks it {rank}, below the top {k}: its score is {verdict.score:.4f},"
            f" the last answer's {last}"
        )
    return (
        f"the {answer.plan} plan missed it: exact search ranks it {rank}; ask for a higher"
        f" min_recall (ef {answer.ef}, estimated recall {answer.estimated_recall})"
    )


def _why_excluded(index: EntityIndex, identifier: str, expression: str) -> str:
    names = [name for name in index.attribute_table.schema if name in expression]
    values = index.attributes([identifier], list(index.attribute_table.schema))[0]
    named = {name: values.get(name) for name in names}
    shown = named or "it has none of the attributes"
    return f"the filter excludes it: {shown} does not satisfy {expression!r}"


def _visible(index: EntityIndex, query: np.ndarray, expression: str | None) -> _Visible:
    """Score all visible entities, and filter them."""
    live = index.live
    base = index.base_vectors() @ query
    keep = np.ones(len(base), bool)
    if live is not None and live.hidden_rows is not None:
        keep = ~live.hidden_rows
    scores = [base[keep]]
    masks = [] if expression is None else [_base_mask(index, expression)[keep]]
    for segment in live.segments if live is not None else ():
        scores.append(segment.vectors[segment.alive] @ query)
        if expression is not None:
            mask = segment.mask(expression, index.attribute_table)
            masks.append(mask[segment.alive])
    return _Visible(np.concatenate(scores), np.concatenate(masks) if masks else None)


def _base_mask(index: EntityIndex, expression: str) -> np.ndarray:
    bound = BoundFilter(parse_filter(expression), index.attribute_table)
    return bound.select().as_mask()


def _passes(index: EntityIndex, identifier: str, expression: str) -> bool:
    place = index.live.find(identifier) if index.live is not None else None
    if place is not None:
        segment, live_row = place
        return bool(segment.mask(expression, index.attribute_table)[live_row])
    row = index.row_of(identifier)
    return row is not None and bool(_base_mask(index, expression)[row])


@dataclass(frozen=True, slots=True)
class Waterfall:
    """Where labelled pairs of one entity type are lost.

    Attributes:
        entity_type: Which.
        pairs: Labelled pairs looked at.
        k: Depth.
        recall: Step name -> labelled Recall@k after it, in order, starting at 1.0 (``labelled``).
            After ``labels`` it is the ceiling: a query with more than k labelled entities cannot
            have all of them among k answers, whatever the encoder does.
        lost_to: Step name -> pairs not found in the end that were last found before this step.
        measured: Step name -> False where the step could not be measured with the data given (it
            then loses nothing).
    """

    entity_type: str
    pairs: int
    k: int
    recall: dict[str, float]
    lost_to: dict[str, int]
    measured: dict[str, bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledPairs:
    """Labelled pairs of one entity type.

    Attributes:
        queries: float32 ``(P, D)``, one row per pair, in the served dimension.
        targets: The labelled entity of each pair.
        filters: Filter of each pair's query; None: no filters.
        positives: How many entities are labelled for each pair's query, at least 1; None: one each,
            so that the ceiling is 1.
    """

    queries: np.ndarray
    targets: Sequence[str]
    filters: Sequence[str | None] | None = None
    positives: Sequence[int] | None = None


class FreshVectors(NamedTuple):
    """The catalogue as the encoder would embed it today."""

    ids: Sequence[str]
    vectors: np.ndarray
    """float32 ``(N, F)``, F >= D."""
    queries: np.ndarray | None = None
    """float32 ``(P, F)``, those of the pairs; None where F is the served dimension."""


class _Step(NamedTuple):
    name: str
    found: list[bool]
    """Per pair: whether it is found after this step."""
    measured: bool


def recall_waterfall(
    index: EntityIndex, pairs: LabelledPairs, *, k: int = 10, fresh: FreshVectors | None = None
) -> Waterfall:
    """Measure labelled Recall@k after every step, and at which step each pair was lost.

    The chain of oracles: exact search over fresh vectors at full dimension (what the encoder can
    do), the same at the served dimension, exact search over what is served, live entries included
    (staleness), the served index walked as wide as it goes (quantisation: what a wide walk cannot
    find), the index as it is served (graph), and with the filter. A pair that is not found in the
    end counts for the step behind the last one that still found it.

    Args:
        index: As it is served, live entries attached.
        pairs: Labelled pairs.
        k: Depth.
        fresh: None: what is served stands in, and the first three steps are one.
    """
    served = _found(index, pairs, k, exact=True)
    steps = [*_encoder_steps(pairs, fresh, served, k), *_index_steps(index, pairs, served, k)]
    possible = np.ones(len(pairs.targets))
    if pairs.positives is not None:
        possible = np.minimum(1.0, k / np.maximum(1, np.asarray(pairs.positives)))
    ceiling = float(possible.mean()) if len(possible) else 1.0
    recall = {step.name: float(np.mean(step.found)) if step.found else 0.0 for step in steps}
    lost = _lost(steps)
    # No ranking finds these, so they are not the encoder's
    lost["labels"] = min(round(float((1 - possible).sum())), lost["encoder"])
    lost["encoder"] -= lost["labels"]
    measured = {step.name: step.measured for step in steps}
    return Waterfall(
        entity_type=index.entity_type,
        pairs=len(pairs.targets),
        k=k,
        recall={"labelled": 1.0, "labels": ceiling, **recall},
        lost_to=lost,
        measured={"labels": pairs.positives is not None, **measured},
    )


def _encoder_steps(
    pairs: LabelledPairs, fresh: FreshVectors | None, served: list[bool], k: int
) -> list[_Step]:
    """Measure the steps before the index, by exact search."""
    if fresh is None:
        return [
            _Step("encoder", served, True),
            _Step("dimension cut", served, False),
            _Step("staleness", served, False),
        ]
    dimension = pairs.queries.shape[1]
    queries = pairs.queries if fresh.queries is None else fresh.queries
    encoder = _exact_found(fresh.ids, fresh.vectors, queries, pairs.targets, k)
    is_cut = fresh.vectors.shape[1] > dimension
    cut = encoder
    if is_cut:
        vectors, queries = _cut(fresh.vectors, dimension), _cut(queries, dimension)
        cut = _exact_found(fresh.ids, vectors, queries, pairs.targets, k)
    return [
        _Step("encoder", encoder, True),
        _Step("dimension cut", cut, is_cut),
        _Step("staleness", served, True),
    ]


def _index_steps(
    index: EntityIndex, pairs: LabelledPairs, served: list[bool], k: int
) -> list[_Step]:
    """Measure the steps inside the index."""
    approximate = not index.ann.exact
    wide = served
    if approximate:
        wide = _found(index, pairs, k, ef=min(_WIDE_EF, max(k, len(index.ids))))
    plain = _found(index, pairs, k)
    filtered = plain
    has_filters = pairs.filters is not None and any(pairs.filters)
    if has_filters:
        filtered = _found_filtered(index, pairs, k)
    return [
        _Step("quantisation", wide, approximate),
        _Step("graph", plain, approximate),
        _Step("filter", filtered, has_filters),
    ]


def _lost(steps: Sequence[_Step]) -> dict[str, int]:
    """Count the pairs not found in the end, by the step behind the last one that found them."""
    lost = dict.fromkeys(STEPS, 0)
    for pair, found in enumerate(steps[-1].found):
        if not found:
            last = max((s for s, step in enumerate(steps) if step.found[pair]), default=-1)
            lost[steps[last + 1].name] += 1
    return lost


def _found(
    index: EntityIndex, pairs: LabelledPairs, k: int, **options: Unpack[SearchOptions]
) -> list[bool]:
    return [
        target in index.search(query, k, **options).ids
        for query, target in zip(pairs.queries, pairs.targets)
    ]


def _found_filtered(index: EntityIndex, pairs: LabelledPairs, k: int) -> list[bool]:
    assert pairs.filters is not None
    return [
        target in index.search(query, k, filter=expression).ids
        for query, target, expression in zip(pairs.queries, pairs.targets, pairs.filters)
    ]


def _exact_found(
    ids: Sequence[str], vectors: np.ndarray, queries: np.ndarray, targets: Sequence[str], k: int
) -> list[bool]:
    if not len(ids):
        return [False] * len(targets)
    rows, _ = exact_top_k(np.ascontiguousarray(queries, np.float32), vectors, min(k, len(ids)))
    return [
        any(ids[int(r)] == target for r in found if r >= 0) for found, target in zip(rows, targets)
    ]


def _cut(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Return the leading values of each row, normalised again (Matryoshka prefix)."""
    head = np.array(vectors[:, :dimension], np.float32)
    norms = np.maximum(np.linalg.norm(head, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(head / norms)


def dimension_curve(
    index: EntityIndex, pairs: LabelledPairs, k: int, dimensions: Sequence[int]
) -> Mapping[int, float]:
    """Measure labelled Recall@k of exact search over prefixes of the served vectors.

    Args:
        index: Whose base is searched.
        pairs: Labelled pairs.
        k: Depth.
        dimensions: Prefix lengths; those above D are left out.
    """
    ids = index.ids.take(np.arange(len(index.ids)))
    vectors = index.base_vectors()
    curve = {}
    for dimension in dimensions:
        if dimension <= pairs.queries.shape[1]:
            queries = _cut(pairs.queries, dimension)
            found = _exact_found(ids, _cut(vectors, dimension), queries, pairs.targets, k)
            curve[dimension] = float(np.mean(found))
    return curve
