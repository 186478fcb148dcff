"""One-bit sketches: a scan that looks at every sketch is exact, one that looks at few is nearly so,
whatever the shape of the corpus.
"""

from __future__ import annotations

import numpy as np
import pytest

from index_builder.errors import IndexFormatError
from index_builder.native import Engine
from index_builder.storage.corpus import Corpus
from index_builder.storage.engine_arrays import EngineArrays, make_engine
from index_builder.storage.id_table import IdTable
from tests.helpers.real_vectors import text_vectors

pytestmark = pytest.mark.skipif(Engine is None, reason="the extension was not compiled")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "dimension"), [(1, 64), (31, 64), (64, 64), (1_000, 64), (1_500, 100), (700, 7)]
)
@pytest.mark.parametrize("duplicates", [0, 40])
def test_sketch_scan_of_all_rows_finds_the_best_matching_rows(
    count: int, dimension: int, duplicates: int
) -> None:
    vectors = text_vectors(1_500, 128)[:count, :dimension].copy()
    vectors[count - min(duplicates, count - 1) :] = vectors[0] if duplicates else vectors[count:]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    corpus = Corpus.build(vectors)
    engine = make_engine(
        corpus,
        IdTable.build([str(i) for i in range(count)]),
        EngineArrays.build(corpus.vectors, None, sketches=True),
    )
    rng = np.random.default_rng(count)
    for share in (0.02, 0.3, 1.0):
        mask, hidden = rng.random(count) < share, rng.random(count) < 0.1
        query, out = vectors[count // 2 : count // 2 + 1], np.empty(10, dtype=np.float32)
        rows = np.flatnonzero(mask & ~hidden)
        best = np.sort(vectors[rows] @ query[0])[::-1][:10]
        for wanted in (count, 200):
            ids = engine.sketch(query, 10, wanted, out, mask, hidden)
            assert len(ids) == len(set(ids)) == len(best)
            assert {int(i) for i in ids} <= set(rows.tolist())
            np.testing.assert_allclose(
                out[: len(ids)], vectors[[int(i) for i in ids]] @ query[0], atol=1e-5
            )
            if wanted == count:
                np.testing.assert_allclose(out[: len(best)], best, atol=2e-3)


@pytest.mark.slow
def test_sketch_scan_of_few_candidates_finds_nearly_all() -> None:
    vectors = text_vectors(6_100)
    corpus, queries = vectors[:6_000].copy(), vectors[6_000:]
    engine = make_engine(
        Corpus.build(corpus),
        IdTable.build([str(i) for i in range(6_000)]),
        EngineArrays.build(corpus, None, sketches=True),
    )
    mask = np.arange(6_000) % 3 == 0
    found = 0
    for query in queries:
        out = np.empty(10, dtype=np.float32)
        engine.sketch(query[None], 10, 400, out, mask, None)
        found += np.count_nonzero(out >= np.sort((corpus @ query)[mask])[-10] - 1e-5)
    assert found / (10 * len(queries)) >= 0.95


@pytest.mark.slow
def test_engine_with_sketches_that_do_not_fit_raises_index_format_error() -> None:
    vectors = text_vectors(300)
    store = EngineArrays.build(vectors, None, sketches=True)
    assert store.sketch is not None
    short = EngineArrays(store.codes, None, store.entry, store.sketch[:-1], store.factors)
    with pytest.raises(IndexFormatError, match="sketches do not fit"):
        make_engine(Corpus(vectors), IdTable.build([str(i) for i in range(300)]), short)
