"""Known queries that are named for a hit: those whose votes it has, and by their share."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from index_builder.fusion.fused_search import FusedIndex, FusedQuery
from index_builder.fusion.voters import voters_of
from index_builder.fusion.votes import Votes
from index_builder.live_log.records import LiveEntry
from index_builder.search.entity_index import EntityIndex
from index_builder.search.live_state import LiveBase, LiveState
from tests.helpers.release_makers import SPACE, D, unit_vectors

QUERIES = ["red shoe", "blue boot", "tall hat", "nothing"]
PAIRS = pl.DataFrame(
    {
        "query": ["red shoe", "red shoe", "blue boot", "tall hat", "blue boot"],
        "entity_id": ["a", "b", "b", "b", "c"],
    }
)


@pytest.fixture
def index() -> FusedIndex:
    entities = EntityIndex.build("pin", list("abcd"), unit_vectors(4, 5))
    queries = EntityIndex.build("query", QUERIES, unit_vectors(4, 9))
    return FusedIndex(entities, queries, Votes.build(PAIRS, queries.ids, entities.ids))


def query(neighbours: list[int], cosines: list[float]) -> FusedQuery:
    vector = unit_vectors(1, 2)[0]
    return FusedQuery("x", vector, np.array(neighbours), np.array(cosines, np.float32))


def test_voters_of_names_the_strongest_first(index: FusedIndex) -> None:
    asked = query([1, 2, 0], [0.95, 0.9, 0.7])
    a, b, c, d, unknown = voters_of(index, asked, ["a", "b", "c", "d", "z"], most=2)
    assert [voter.query for voter in a] == ["red shoe"] and a[0].share == 1.0
    assert [voter.query for voter in b] == ["blue boot", "tall hat"]
    assert b[0].cosine == pytest.approx(0.95) and b[0].share > b[1].share
    assert [voter.query for voter in c] == ["blue boot"]
    assert d == [] and unknown == []


def test_voters_of_shares_are_those_of_the_votes_that_are_cast(index: FusedIndex) -> None:
    assert index.votes is not None
    neighbours, cosines = [1, 2, 0], [0.95, 0.9, 0.7]
    named = voters_of(index, query(neighbours, cosines), ["b"], most=9)[0]
    assert sum(voter.share for voter in named) == pytest.approx(1.0)
    every = index.votes.cast(np.array(neighbours), np.array(cosines, np.float32))
    place = every.rows.tolist().index(1)
    total = float(np.exp((np.array(cosines) - 1) / 0.07).sum())
    for voter in named:
        row = QUERIES.index(voter.query)
        alone = index.votes.cast(np.array([row]), np.array([voter.cosine], np.float32))
        weight = float(np.exp((voter.cosine - 1) / 0.07))
        share = float(alone.shares[alone.rows.tolist().index(1)]) * weight / total
        assert voter.share == pytest.approx(share / float(every.shares[place]), rel=1e-4)


def test_voters_of_without_neighbours_or_votes_names_nobody(index: FusedIndex) -> None:
    assert voters_of(index, query([], []), ["a", "b"]) == [[], []]
    assert voters_of(FusedIndex(index.entities), query([0], [0.9]), ["a"]) == [[]]


def test_voters_of_replaced_entity_has_no_votes(index: FusedIndex) -> None:
    entities = index.entities
    base = LiveBase(D, SPACE, entities.row_of, rows=len(entities.ids), lexical=None)
    entry = LiveEntry(id="b", vector=unit_vectors(1, 3)[0], space_id=SPACE, sequence=1)
    entities.set_live(LiveState(base, background=False).apply([entry]))
    b, c = voters_of(index, query([1], [0.9]), ["b", "c"])
    assert b == [] and [voter.query for voter in c] == ["blue boot"]
