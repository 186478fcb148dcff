"""The compiled engine with sizes, arrays and moments that nobody should hand it: a Python error or
the right answer, never a crash.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from index_builder.ann import AnnConfig
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.filters.attributes import AttributeTable
from index_builder.native import Engine
from index_builder.search.entity_index import EntityIndex
from index_builder.search.index_files import IndexParts, IndexRecord
from index_builder.storage.corpus import Corpus
from index_builder.storage.engine_arrays import EngineArrays, make_engine
from index_builder.storage.id_table import IdTable
from tests.helpers.real_vectors import text_vectors

pytestmark = pytest.mark.skipif(Engine is None, reason="the extension was not compiled")

N, HUGE = 300, 2**62


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return text_vectors(N)


@pytest.fixture(scope="module")
def engine(vectors: np.ndarray) -> Any:
    graph = np.random.default_rng(0).integers(0, N, (N, 32)).astype(np.uint32)
    return make_engine(
        Corpus(vectors),
        IdTable.build([f"i{row}" for row in range(N)]),
        EngineArrays.build(vectors, graph),
    )


def test_walk_with_ef_beyond_the_corpus_uses_the_whole_corpus(
    engine: Any, vectors: np.ndarray
) -> None:
    few, many = np.empty(10, np.float32), np.empty(10, np.float32)
    assert engine.walk(vectors[:1], 10, 10**13, many, 26, None) == engine.walk(
        vectors[:1], 10, N, few, 26, None
    )
    np.testing.assert_array_equal(few, many)


def test_engine_with_sizes_that_overflow_raises_value_error(
    engine: Any, vectors: np.ndarray
) -> None:
    nodes, out = np.arange(100, dtype=np.uint32), np.zeros(1, np.float32)
    calls = {
        "finish": lambda: engine.finish(nodes, np.zeros(100, np.float32), HUGE, out, None, None),
        "walk": lambda: engine.walk(vectors[:1], HUGE, 10, out, 26, None),
        "walk_batch": lambda: engine.walk_batch(vectors[:4].copy(), 2**60, 10, out, 26, None),
        "nearest": lambda: engine.nearest(vectors[:1], HUGE, 10, nodes.copy(), out),
        "scan": lambda: engine.scan(vectors[:1], HUGE, nodes, out, None),
        "dimension": lambda: Engine(
            vectors, HUGE, np.zeros(1, np.uint8), np.zeros(N + 1, np.uint64)
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"size|room|dimension"):
            call()
        assert engine.walk(vectors[:1], 1, 10, out, 26, None) != [], name


@pytest.mark.parametrize("damage", ["starts only", "node", "row", "descending"])
def test_engine_with_row_maps_that_do_not_fit_raises_value_error(
    vectors: np.ndarray, damage: str
) -> None:
    store = EngineArrays.build(vectors, np.zeros((N, 32), np.uint32))
    nodes, starts, rows = (
        np.arange(N, dtype=np.uint32),
        np.arange(N + 1, dtype=np.uint32),
        np.arange(N, dtype=np.uint32),
    )
    if damage == "node":
        nodes[5] = N
    elif damage == "row":
        rows[5] = N
    elif damage == "descending":
        starts[5] = 0
    maps = (None, starts[:1], rows[:1]) if damage == "starts only" else (nodes, starts, rows)
    with pytest.raises(ValueError, match="do not fit each other"):
        Engine(
            vectors,
            vectors.shape[1],
            np.zeros(1, np.uint8),
            np.zeros(N + 1, np.uint64),
            store.codes,
            store.graph,
            0,
            *maps,
        )


def test_walk_with_a_searching_finaliser_keeps_its_answer(engine: Any, vectors: np.ndarray) -> None:
    class SearchesWhenCollected:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            engine.walk(vectors[:1], 150, 150, np.empty(150, np.float32), 300, None)

    wanted = engine.walk(vectors[5:6], 3, 150, np.empty(3, np.float32), 19, None)
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            SearchesWhenCollected()
            assert engine.walk(vectors[5:6], 3, 150, np.empty(3, np.float32), 19, None) == wanted
    finally:
        gc.set_threshold(*thresholds)


@pytest.mark.parametrize("dimension", [1024, 1536, 2048])
def test_sketch_sums_of_equal_components_stay_within_16_bits(
    dimension: int,
) -> None:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (1_000, dimension)).astype(np.float32)
    for row in range(1, 11):
        signs[row] = signs[0]
        signs[row, :row] *= -1
    vectors = signs / np.float32(dimension**0.5)
    engine = make_engine(
        Corpus(vectors),
        IdTable.build([str(row) for row in range(1_000)]),
        EngineArrays.build(vectors, None, sketches=True),
    )
    assert engine is not None
    assert engine.sketch(
        vectors[:1], 10, 64, np.empty(10, np.float32), np.ones(1_000, bool), None
    ) == [str(row) for row in range(10)]


def test_search_batch_on_a_graph_without_edges_answers_as_single_searches(
    vectors: np.ndarray,
) -> None:
    ann = Int8GraphIndex.over(
        vectors,
        np.repeat(np.arange(N, dtype=np.uint32)[:, None], 32, axis=1),
        AnnConfig(sketched_links=False),
    )
    ids = [str(row) for row in range(N)]
    parts = IndexParts(
        ids=IdTable.build(ids),
        attributes=AttributeTable.empty(N),
        corpus=Corpus(vectors),
        ann=ann,
        arrays=ann.arrays,
    )
    index = EntityIndex(parts, IndexRecord(entity_type="pin", default_recall=0.95, facts={}))
    batch = index.search_batch(np.asfortranarray(vectors[:3]), 10)
    for one, of_batch in zip(
        [index.search(query, 10) for query in vectors[:3]], batch, strict=True
    ):
        assert (one.ids, one.plan, one.estimated_recall) == (
            of_batch.ids,
            of_batch.plan,
            of_batch.estimated_recall,
        )
    assert batch[0].plan == "exact" and batch[0].estimated_recall == 1.0
