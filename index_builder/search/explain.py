"""Why an id was not returned, and where labelled recall is lost: every step against its exact oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from index_builder.filters.attributes import AttributeTable
from index_builder.filters.expression import parse_filter
from index_builder.filters.selection import BoundFilter
from index_builder.search.entity_index import EntityIndex
from index_builder.search.live_segments import LiveView

STEPS = ("labels", "encoder", "dimension cut", "staleness", "quantisation", "graph", "filter")
_WIDE_EF = 20_000


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


def explain_id(
    index: EntityIndex,
    live: LiveView | None,
    query: np.ndarray,
    identifier: str,
    k: int,
    expression: str | None = None,
) -> Verdict:
    """Follow one id through everything a search does.

    Args:
        index: With its live entries attached.
        live: The same live entries, or None.
        query: float32 ``(D,)``, unit norm.
        identifier: The id that was (not) returned.
        k: Answers asked for.
        expression: Filter of the search, or None.

    Raises:
        FilterError: The filter does not parse or does not fit.
    """
    row = index.row_of(identifier)
    place = live.find(identifier) if live is not None else None
    hidden = (
        live is not None
        and live.hidden_rows is not None
        and row is not None
        and bool(live.hidden_rows[row])
    )
    if place is None and row is None:
        return Verdict(
            identifier,
            "missing",
            "it is neither in the release nor in the live log: it was never indexed, or its id is"
            " spelled differently",
        )
    if place is None and hidden:
        return Verdict(
            identifier, "tombstoned", "it was deleted by a live write after the release was built"
        )
    vector = index.vector(identifier)
    assert vector is not None, "a visible id has a vector"
    score = float(vector @ query)
    scores, passing = _visible(index, live, query, expression)
    rank = 1 + int(np.count_nonzero(scores > score + 1e-6))
    answer = index.search(query, k, filter=expression)
    returned = answer.ids.index(identifier) + 1 if identifier in answer.ids else None
    state = "live" if place is not None else "base"
    passes, filtered_rank = True, None
    if expression is not None:
        assert passing is not None
        passes = _passes(index, live, identifier, expression)
        filtered_rank = (
            1 + int(np.count_nonzero(scores[passing] > score + 1e-6)) if passes else None
        )
    effective = filtered_rank if expression is not None else rank
    if returned is not None:
        reason = f"it is answer {returned} of {len(answer.ids)}"
    elif not passes:
        values = index.attributes([identifier], list(index.attribute_table.schema))[0]
        named = {
            name: values.get(name)
            for name in index.attribute_table.schema
            if name in (expression or "")
        }
        reason = (
            f"the filter excludes it: {named or 'it has none of the attributes'} does not satisfy"
            f" {expression!r}"
        )
    elif effective is not None and effective > k:
        last = f"{float(answer.scores[-1]):.4f}" if len(answer.scores) else "none"
        reason = (
            f"exact search ranks it {effective}, below the top {k}: its score is {score:.4f}, the"
            f" last answer's {last}"
        )
    else:
        reason = (
            f"the graph missed it: exact search ranks it {effective}; ask for a higher min_recall"
            f" (plan {answer.plan}, ef {answer.ef})"
        )
    return Verdict(identifier, state, reason, score, rank, filtered_rank, returned)


def _visible(
    index: EntityIndex, live: LiveView | None, query: np.ndarray, expression: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores of all visible entities, and which of them pass the filter."""
    base = index.base_vectors() @ query
    keep = (
        np.ones(len(base), bool) if live is None or live.hidden_rows is None else ~live.hidden_rows
    )
    scores = [base[keep]]
    masks = (
        [BoundFilter(parse_filter(expression), index.attribute_table).select().as_mask()[keep]]
        if expression is not None
        else []
    )
    for segment in live.segments if live is not None else ():
        scores.append(segment.vectors[segment.alive] @ query)
        if expression is not None:
            table = AttributeTable.aligned(segment.attributes, index.attribute_table, len(segment))
            masks.append(
                BoundFilter(parse_filter(expression), table).select().as_mask()[segment.alive]
            )
    return np.concatenate(scores), np.concatenate(masks) if masks else None


def _passes(index: EntityIndex, live: LiveView | None, identifier: str, expression: str) -> bool:
    place = live.find(identifier) if live is not None else None
    if place is not None:
        segment, row = place
        table = AttributeTable.aligned(segment.attributes, index.attribute_table, len(segment))
        return bool(BoundFilter(parse_filter(expression), table).select().as_mask()[row])
    row_in_base = index.row_of(identifier)
    return row_in_base is not None and bool(
        BoundFilter(parse_filter(expression), index.attribute_table).select().as_mask()[row_in_base]
    )


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


def recall_waterfall(
    index: EntityIndex,
    queries: np.ndarray,
    targets: Sequence[str],
    *,
    k: int = 10,
    fresh: tuple[Sequence[str], np.ndarray] | None = None,
    full_queries: np.ndarray | None = None,
    expressions: Sequence[str | None] | None = None,
    positives: Sequence[int] | None = None,
) -> Waterfall:
    """Labelled Recall@k after every step, and to which step each lost pair was lost.

    The chain of oracles: exact search over fresh vectors at full dimension (what the encoder can
    do), the same at the served dimension, exact search over what is served, live entries included
    (staleness), the served index walked as wide as it goes (quantisation: what a wide walk cannot
    find), the index as it is served (graph), and with the filter. A pair that is not found in the
    end counts for the step behind the last one that still found it.

    Args:
        index: As it is served, live entries attached.
        queries: float32 ``(P, D)``, one row per pair, in the served dimension.
        targets: The labelled entity of each pair.
        k: Depth.
        fresh: Ids and vectors ``(N, F)``, F >= D, as the encoder would embed the catalogue today;
            None: what is served stands in, and the first three steps are one.
        full_queries: ``(P, F)`` for ``fresh``; None: ``queries``.
        expressions: Filter of each pair's query, or None.
        positives: How many entities are labelled for each pair's query, at least 1; None: one each,
            so that the ceiling is 1.
    """
    dimension = queries.shape[1]
    stages: list[tuple[str, list[bool], bool]] = []
    served = [
        _found(index, query, target, k, exact=True) for query, target in zip(queries, targets)
    ]
    if fresh is None:
        stages += [
            ("encoder", served, True),
            ("dimension cut", served, False),
            ("staleness", served, False),
        ]
    else:
        ids, vectors = fresh
        full = queries if full_queries is None else full_queries
        encoder = _exact_found(ids, vectors, full, targets, k)
        cut = (
            encoder
            if vectors.shape[1] == dimension
            else _exact_found(ids, _cut(vectors, dimension), _cut(full, dimension), targets, k)
        )
        stages += [
            ("encoder", encoder, True),
            ("dimension cut", cut, vectors.shape[1] > dimension),
            ("staleness", served, True),
        ]
    wide = (
        served
        if index.ann.exact
        else [
            _found(index, query, target, k, ef=min(_WIDE_EF, max(k, len(index.ids))))
            for query, target in zip(queries, targets)
        ]
    )
    plain = [_found(index, query, target, k) for query, target in zip(queries, targets)]
    stages += [("quantisation", wide, not index.ann.exact), ("graph", plain, not index.ann.exact)]
    if expressions is not None and any(expressions):
        filtered = [
            _found(index, query, target, k, filter=e)
            for query, target, e in zip(queries, targets, expressions)
        ]
        stages.append(("filter", filtered, True))
    else:
        stages.append(("filter", plain, False))
    possible = (
        np.minimum(1.0, k / np.maximum(1, np.asarray(positives)))
        if positives is not None
        else np.ones(len(targets))
    )
    ceiling = float(possible.mean()) if len(possible) else 1.0
    recall = {"labelled": 1.0, "labels": ceiling} | {
        name: float(np.mean(found)) if found else 0.0 for name, found, _ in stages
    }
    lost = dict.fromkeys(STEPS, 0)
    for i in range(len(targets)):
        if stages[-1][1][i]:
            continue
        last = max((s for s in range(len(stages)) if stages[s][1][i]), default=-1)
        lost[stages[last + 1][0]] += 1
    lost["labels"] = min(
        round(float((1 - possible).sum())), lost["encoder"]
    )  # no ranking finds these, so they are not the encoder's
    lost["encoder"] -= lost["labels"]
    measured = {"labels": positives is not None} | {name: known for name, _, known in stages}
    return Waterfall(index.entity_type, len(targets), k, recall, lost, measured)


def _found(index: EntityIndex, query: np.ndarray, target: str, k: int, **options: Any) -> bool:
    return target in index.search(query, k, **options).ids


def _exact_found(
    ids: Sequence[str], vectors: np.ndarray, queries: np.ndarray, targets: Sequence[str], k: int
) -> list[bool]:
    from encoders.exact_search import exact_top_k

    if not len(ids):
        return [False] * len(targets)
    rows, _ = exact_top_k(np.ascontiguousarray(queries, np.float32), vectors, min(k, len(ids)))
    return [
        any(ids[int(r)] == target for r in found if r >= 0) for found, target in zip(rows, targets)
    ]


def _cut(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """The leading ``dimension`` values of each row, re-normalised (Matryoshka prefix)."""
    head = np.array(vectors[:, :dimension], np.float32)
    return np.ascontiguousarray(
        head / np.maximum(np.linalg.norm(head, axis=1, keepdims=True), 1e-12)
    )


def dimension_curve(
    index: EntityIndex,
    queries: np.ndarray,
    targets: Sequence[str],
    k: int,
    dimensions: Sequence[int],
) -> Mapping[int, float]:
    """Labelled Recall@k of exact search over prefixes of the served vectors: what serving fewer dimensions would cost.

    Args:
        index: Whose base is searched.
        queries: float32 ``(P, D)``.
        targets: Labelled entity of each.
        k: Depth.
        dimensions: Prefix lengths; those above D are left out.
    """
    ids = index.ids.take(np.arange(len(index.ids)))
    vectors = index.base_vectors()
    return {
        d: float(np.mean(_exact_found(ids, _cut(vectors, d), _cut(queries, d), targets, k)))
        for d in dimensions
        if d <= queries.shape[1]
    }
