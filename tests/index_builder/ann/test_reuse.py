"""An earlier graph carried over to a changed corpus: what it finds, keeps and refuses."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.exact_search import exact_top_k
from index_builder.ann import AnnConfig
from index_builder.ann.graph_files import unreachable_nodes
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.ann.interface import AnnIndex
from index_builder.ann.reuse import EarlierIndex, NotReusable, Reuse, carried_over
from index_builder.native import Engine
from index_builder.storage.corpus import GONE, node_now
from index_builder.storage.engine_arrays import EngineArrays
from tests.helpers.real_vectors import text_vectors

pytestmark = pytest.mark.skipif(Engine is None, reason="the extension was not compiled")

CONFIG = AnnConfig(m=16, ef_construction=100, reproducible=True)
N = 1_500
D = 64


def earlier_index(
    folder: Path, vectors: np.ndarray, config: AnnConfig = CONFIG, changed: float = 0.0
) -> EarlierIndex:
    """Build, save and describe an index."""
    index = Int8GraphIndex.build(vectors, config)
    index.save(folder / "index")
    return EarlierIndex(folder, index.kind, index.parameters(), vectors, changed)


def changed_vectors(vectors: np.ndarray, count: int) -> np.ndarray:
    """Replace ``count`` vectors of the first ``N``, spread over all, by others, and move them."""
    changed = vectors[:N].copy()
    changed[:: N // count][:count] = vectors[N : N + count]
    return np.ascontiguousarray(changed[::-1])


def recall(index: AnnIndex, vectors: np.ndarray, queries: np.ndarray, ef: int) -> float:
    """Return mean recall@10 against an exact scan."""
    _, exact = exact_top_k(queries, vectors, 10)
    found = [vectors[index.search(query[None], 10, ef)[0]] @ query for query in queries]
    return float(np.mean([scores >= kth - 1e-6 for scores, kth in zip(found, exact[:, -1:])]))


@pytest.mark.slow
@pytest.mark.parametrize("sketched", [True, False])
def test_carried_over_finds_what_a_full_build_finds(tmp_path: Path, sketched: bool) -> None:
    vectors = text_vectors(2_000)
    config = replace(CONFIG, sketched_links=sketched)
    after = changed_vectors(vectors, 150)
    index, reuse = carried_over(earlier_index(tmp_path, vectors[:N], config), after, config)
    assert (reuse.kept, reuse.inserted, reuse.removed) == (N - 150, 150, 150)
    full = Int8GraphIndex.build(after, config)
    queries = vectors[1_800:]
    assert recall(index, after, queries, 40) >= recall(full, after, queries, 40) - 0.01
    # New vectors are found by themselves
    own = [int(index.search(after[row][None], 1, 40)[0][0]) == row for row in range(0, N, 10)]
    assert np.mean(own) > 0.99
    links = index.neighbours()
    assert links is not None and unreachable_nodes(links) == 0


@pytest.mark.slow
def test_carried_over_unchanged_corpus_gives_the_same_arrays(tmp_path: Path) -> None:
    vectors = text_vectors(N)
    earlier = earlier_index(tmp_path, vectors)
    index, reuse = carried_over(earlier, vectors, CONFIG)
    assert reuse == Reuse(kept=N, inserted=0, removed=0, reinserted=0, changed_since_full=0.0)
    before = EngineArrays.load(tmp_path, vectors)
    for name in ("codes", "links", "quantiser"):
        np.testing.assert_array_equal(getattr(index.arrays, name), getattr(before, name))


@pytest.mark.parametrize("sketched", [True, False])
def test_carried_over_twice_gives_the_same_bytes(tmp_path: Path, sketched: bool) -> None:
    vectors = text_vectors(2_000)
    config = replace(CONFIG, sketched_links=sketched)
    earlier = earlier_index(tmp_path, vectors[:N], config)
    after = changed_vectors(vectors, 100)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        index, _ = carried_over(earlier, after, config)
        index.save(tmp_path / name / "index")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files and all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )


def test_carried_over_copies_records_as_a_build_writes_them(tmp_path: Path) -> None:
    """Records of kept links are copied: they are what a build over the same links writes."""
    vectors = text_vectors(2_000)
    after = changed_vectors(vectors, 100)
    index, _ = carried_over(earlier_index(tmp_path, vectors[:N]), after, CONFIG)
    links, quantiser = index.neighbours(), index.arrays.quantiser
    assert links is not None and quantiser is not None
    built = EngineArrays.build(after, links, sketched_links=True)
    degree = links.shape[1]
    one, other = index.arrays.links, built.links
    assert one is not None and other is not None
    np.testing.assert_array_equal(one[:, 8 * degree :], other[:, 8 * degree :])
    factors = [
        np.ascontiguousarray(a[:, 4 * degree : 8 * degree]).view(np.float32) for a in (one, other)
    ]
    assert built.quantiser is not None
    steps = [q[D : 2 * D].mean() for q in (quantiser, built.quantiser)]
    np.testing.assert_allclose(factors[0] * steps[0], factors[1] * steps[1], rtol=1e-4, atol=1e-7)


def farthest_from_codes(vectors: np.ndarray, arrays: EngineArrays) -> float:
    """Return how far a vector is at most from what its codes stand for."""
    assert arrays.quantiser is not None
    centre, step = arrays.quantiser[:D], arrays.quantiser[D : 2 * D]
    levels = arrays.codes[:, :D].astype(np.float64) - 128
    return float(np.linalg.norm(vectors - (centre + levels * step), axis=1).max())


@pytest.mark.parametrize("sketched", [True, False])
def test_carried_over_keeps_the_bytes_of_rows_that_stay(tmp_path: Path, sketched: bool) -> None:
    vectors = text_vectors(2_000)
    config = replace(CONFIG, sketched_links=sketched)
    # Inside the range of those that stay, but for one a little outside
    kept = vectors[30:N]
    inside = (vectors[N:] >= kept.min(axis=0)) & (vectors[N:] <= kept.max(axis=0))
    new = vectors[N:][inside.all(axis=1)][:30].copy()
    new[0] = 1.01 * kept[np.argmax(kept.max(axis=1))]
    after = vectors[:N].copy()
    after[:30] = new
    earlier = earlier_index(tmp_path, vectors[:N], config)
    before = EngineArrays.load(tmp_path, earlier.vectors)
    index, _ = carried_over(earlier, after, config)
    arrays = index.arrays
    assert arrays.quantiser is not None and before.quantiser is not None
    np.testing.assert_array_equal(arrays.quantiser[:-2], before.quantiser[:-2])
    np.testing.assert_array_equal(arrays.codes[30:], before.codes[30:])
    assert farthest_from_codes(after, arrays) <= arrays.quantiser[-2]
    links, then = index.neighbours(), before.neighbours()
    assert links is not None and then is not None
    same = np.flatnonzero((links == then).all(axis=1) & (np.arange(N) >= 30))
    assert len(same) > N / 4
    if sketched:
        assert arrays.links is not None and before.links is not None
        # A link to a row that was replaced in place is another link, though its number is the same
        same = same[(links[same] >= 30).all(axis=1)]
        np.testing.assert_array_equal(arrays.links[same], before.links[same])


def test_carried_over_vectors_far_outside_are_quantised_anew_with_room(tmp_path: Path) -> None:
    vectors = text_vectors(2_000)
    after = vectors[:N].copy()
    after[:3] = np.eye(D, dtype=np.float32)[:3]
    index, _ = carried_over(earlier_index(tmp_path, vectors[:N]), after, CONFIG)
    quantiser = index.arrays.quantiser
    assert quantiser is not None
    assert farthest_from_codes(after, index.arrays) <= quantiser[-2]
    assert quantiser[-2] < np.linalg.norm(quantiser[D : 2 * D]) / 2
    index.save(tmp_path / "index")
    earlier = EarlierIndex(tmp_path, index.kind, index.parameters(), after, 0.01)
    again, _ = carried_over(earlier, changed_vectors(vectors, 10)[::-1].copy(), CONFIG)
    assert again.arrays.quantiser is not None
    np.testing.assert_array_equal(again.arrays.quantiser[:-2], quantiser[:-2])


@pytest.mark.parametrize(
    ("changes", "count", "reason"),
    [
        ({}, 400, "26.7% of the vectors changed"),
        ({"changed_since_full": 0.19}, 100, "25.7% of the vectors changed"),
        ({"kind": "hnsw"}, 10, "links of kind hnsw"),
        ({"folder": Path("nowhere")}, 10, "cannot be read"),
        ({"vectors": np.zeros((3, 8), np.float32)}, 10, "another width"),
        ({"parameters": {**asdict(CONFIG), "m": 8}}, 10, "m is 16 and was 8"),
        ({"parameters": {**asdict(CONFIG), "sketched_links": False}}, 10, "sketched_links is"),
    ],
)
def test_carried_over_refuses_what_does_not_fit(
    tmp_path: Path, changes: dict[str, Any], count: int, reason: str
) -> None:
    vectors = text_vectors(2_000)
    earlier = earlier_index(tmp_path, vectors[:N])._replace(**changes)
    with pytest.raises(NotReusable, match=reason):
        carried_over(earlier, changed_vectors(vectors, count), CONFIG)


def test_carried_over_damaged_links_are_refused(tmp_path: Path) -> None:
    vectors = text_vectors(N)
    config = replace(CONFIG, sketched_links=False)
    earlier = earlier_index(tmp_path, vectors, config)
    graph = np.load(tmp_path / "index.graph.npy")
    graph[7, 3] = N
    np.save(tmp_path / "index.graph.npy", graph)
    with pytest.raises(NotReusable, match="past the nodes"):
        carried_over(earlier, vectors, config)


@pytest.mark.slow
def test_node_now_finds_equal_vectors_only() -> None:
    vectors = text_vectors(200)
    order = np.random.default_rng(0).permutation(200)
    now = node_now(vectors, vectors[order][:150])
    for old, node in enumerate(now):
        assert (order[node] == old) if node != GONE else (old in order[150:])
    assert (node_now(vectors, vectors[:0]) == GONE).all()
    assert len(node_now(vectors[:0], vectors)) == 0
