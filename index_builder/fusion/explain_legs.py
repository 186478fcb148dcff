"""Why a fused answer holds what it holds: each leg's rank and share, and what each leg finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from index_builder.fusion.fused_search import DEPTH, Candidates, FusedIndex, FusedQuery
from index_builder.fusion.weights import LEGS
from index_builder.search.entity_index import SearchOptions
from index_builder.search.explain import LabelledPairs

Weights = tuple[float, float, float]
FOUND_BY = (*LEGS, "candidates", "fused")
"""Order of what ``leg_hits`` returns."""


class LegPart(NamedTuple):
    """What one leg says of an entity."""

    score: float
    """Cosine, lexical share or share of votes."""
    rank: int | None
    """From 1 among the candidates; None where the leg does not know the entity."""
    share: float
    """Part of the fused score that comes from this leg."""


class FusedPlace(NamedTuple):
    """Where one candidate stands in a fused answer."""

    id: str
    rank: int
    """From 1 among all candidates."""
    fused: float
    legs: dict[str, LegPart]


@dataclass(frozen=True, slots=True)
class LegRecall:
    """Which labelled pairs of one entity type each leg finds.

    Attributes:
        entity_type: Which.
        pairs: Labelled pairs looked at.
        k: Depth.
        recall: Labelled Recall@k of each leg alone and of ``fused``; ``candidates``: the share that
            is among the best 100 of some leg, which no weights can exceed.
        only: Leg -> pairs among its k best that no other leg has there.
        lost_to: ``no leg`` -> pairs that are no candidates; ``weights`` -> candidates behind the k
            best.
    """

    entity_type: str
    pairs: int
    k: int
    recall: dict[str, float]
    only: dict[str, int]
    lost_to: dict[str, int]


def fused_places(
    fused: FusedIndex, query: FusedQuery, weights: Weights, options: SearchOptions, k: int
) -> list[FusedPlace]:
    """Rank the candidates of a query, best first, with each leg's part.

    Args:
        fused: Legs of the entity type.
        query: From ``fused.query``.
        weights: Of the legs.
        options: Of the search.
        k: Answers wanted.
    """
    found = fused.candidates(query, max(DEPTH, k), options)
    total = found.scores @ np.array(weights, np.float32)
    order = np.lexsort((found.rows, found.places, -total))
    ranks = _leg_ranks(found)
    places = []
    for place, (candidate, id_) in enumerate(
        zip(order.tolist(), fused.ids_of(found, order), strict=True), 1
    ):
        value = float(total[candidate])
        parts = {
            leg: LegPart(
                float(found.scores[candidate, number]),
                int(ranks[candidate, number]) or None,
                weights[number] * float(found.scores[candidate, number]) / value if value else 0.0,
            )
            for number, leg in enumerate(LEGS)
        }
        places.append(FusedPlace(id_, place, value, parts))
    return places


def _leg_ranks(found: Candidates) -> np.ndarray:
    """Return ranks from 1, int64 ``(C, 3)``; 0 where words or votes know nothing of a candidate."""
    ranks = np.zeros(found.scores.shape, np.int64)
    for leg in range(len(LEGS)):
        scores = found.scores[:, leg]
        ascending = np.sort(scores)
        ranks[:, leg] = 1 + len(scores) - np.searchsorted(ascending, scores, side="right")
        if leg:
            ranks[scores <= 0, leg] = 0
    return ranks


def leg_hits(
    fused: FusedIndex, texts: Sequence[str], pairs: LabelledPairs, weights: Weights, k: int
) -> np.ndarray:
    """Return which pairs are found by each leg, among all candidates and fused, bool ``(P, 5)``.

    Args:
        fused: Legs of the entity type, live entries attached.
        texts: Query of each pair.
        pairs: Labelled pairs.
        weights: Of the legs.
        k: Depth.
    """
    found = np.zeros((len(texts), len(FOUND_BY)), np.bool_)
    for number, (text, vector, target) in enumerate(
        zip(texts, pairs.queries, pairs.targets, strict=True)
    ):
        expression = None if pairs.filters is None else pairs.filters[number]
        options: SearchOptions = {} if expression is None else {"filter": expression}
        places = fused_places(fused, fused.query(text, vector), weights, options, k)
        place = next((place for place in places if place.id == target), None)
        if place is not None:
            ranks = [place.legs[leg].rank for leg in LEGS]
            in_legs = [rank is not None and rank <= k for rank in ranks]
            found[number] = [*in_legs, True, place.rank <= k]
    return found


def leg_recall(
    fused: FusedIndex, texts: Sequence[str], pairs: LabelledPairs, weights: Weights, k: int
) -> LegRecall:
    """Measure labelled Recall@k of each leg, of all candidates and of the fused answer.

    Arguments as of ``leg_hits``.
    """
    found = leg_hits(fused, texts, pairs, weights, k)
    shares = found.mean(axis=0) if len(texts) else np.zeros(len(FOUND_BY))
    in_one = found[:, : len(LEGS)].sum(axis=1) == 1
    only = {leg: int((found[:, number] & in_one).sum()) for number, leg in enumerate(LEGS)}
    candidates, answered = found[:, -2], found[:, -1]
    return LegRecall(
        entity_type=fused.entities.entity_type,
        pairs=len(texts),
        k=k,
        recall={name: float(share) for name, share in zip(FOUND_BY, shares, strict=True)},
        only=only,
        lost_to={
            "no leg": int((~candidates).sum()),
            "weights": int((candidates & ~answered).sum()),
        },
    )
