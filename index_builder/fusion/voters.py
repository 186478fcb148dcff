"""Name the known queries whose votes a hit has: why the votes leg found it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from index_builder.fusion.fused_search import FusedIndex, FusedQuery
from index_builder.fusion.votes import TEMPERATURE

MOST_VOTERS = 3
"""Known queries that are named for one hit, those with the largest share."""


class Voter(NamedTuple):
    """One known query that voted for a hit."""

    query: str
    cosine: float
    """With the query that was asked."""
    share: float
    """Of all votes for this hit, above 0 up to 1."""


def voters_of(
    index: FusedIndex, query: FusedQuery, ids: Sequence[str], most: int = MOST_VOTERS
) -> list[list[Voter]]:
    """Name the known queries that voted for each of some entities, the strongest first.

    Args:
        index: Of the entities' type.
        query: From ``index.query``.
        ids: Entities; those without votes, live ones among them, get an empty list.
        most: Queries named for one entity.
    """
    named: list[list[Voter]] = [[] for _ in ids]
    votes, queries = index.votes, index.queries
    if votes is None or queries is None or not len(query.neighbours):
        return named
    starts = votes.offsets[query.neighbours].astype(np.int64)
    ends = votes.offsets[query.neighbours + 1].astype(np.int64)
    weights = np.exp((query.cosines - 1) / TEMPERATURE) / np.sqrt(np.maximum(ends - starts, 1))
    voted = np.concatenate([votes.rows[a:b] for a, b in zip(starts, ends, strict=True)])
    voters = np.repeat(np.arange(len(starts)), ends - starts)
    live = index.entities.live
    rows = index.entities.ids.rows_of(list(ids))
    for place, (id_, row) in enumerate(zip(ids, rows.tolist(), strict=True)):
        if row < 0 or (live is not None and live.find(id_) is not None):
            continue  # votes are for rows of the release
        mine = voters[voted == row]
        total = float(weights[mine].sum())
        strongest = mine[np.argsort(-weights[mine], kind="stable")[:most]]
        texts = queries.ids.take(query.neighbours[strongest])
        named[place] = [
            Voter(text, float(query.cosines[voter]), float(weights[voter]) / total)
            for text, voter in zip(texts, strongest.tolist(), strict=True)
        ]
    return named
