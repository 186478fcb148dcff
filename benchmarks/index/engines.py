"""Every engine of the index benchmarks behind one call: ours, the bare libraries, the peers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
from threadpoolctl import threadpool_limits

from index_builder.ann import AnnConfig, build_index, load_index
from index_builder.ann.faiss_index import faiss_library
from index_builder.search.entity_index import EntityIndex, IndexConfig

M, EF_CONSTRUCTION, DEGREE = 16, 200, 32
Searcher = Callable[[np.ndarray, int], Any]
"""``(query (1, D), ef) -> answer`` of ten neighbours; ``Engine.rows`` turns the answer into row
numbers outside the timed loop."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine.

    Attributes:
        search: The timed call.
        rows: Row numbers of one answer, not timed.
        grid: Values of ``ef`` worth trying.
    """

    search: Searcher
    rows: Callable[[Any], np.ndarray]
    grid: tuple[int, ...] = (
        10,
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        768,
        1024,
        1536,
        2048,
    )


def _row_of_id(result: Any) -> np.ndarray:
    return np.array([int(id_) for id_ in result.ids])


def ours(kind: str, *, sketched_links: bool = True) -> Callable[[np.ndarray, Path], Engine]:
    """Search through our own call on an index of ``kind``, saved and loaded as a release does.

    Ids are mapped, the query is checked, live entries are looked at.
    """

    def build(corpus: np.ndarray, folder: Path) -> Engine:
        if not (folder / "index.json").is_file():
            known = folder / "calibration.npy"
            queries = np.load(known) if kind == "auto" and known.is_file() else None
            ids = [str(i) for i in range(len(corpus))]
            config = IndexConfig(kind=kind, ann=AnnConfig(sketched_links=sketched_links))
            EntityIndex.build("pin", ids, corpus, None, config, calibration_queries=queries).save(
                folder
            )
        index = EntityIndex.load(folder)
        return Engine(lambda query, ef: index.search(query, 10, ef=ef), _row_of_id)

    return build


def bare(kind: str, *, sketched_links: bool = True) -> Callable[[np.ndarray, Path], Engine]:
    """The implementation under our call, called directly."""

    def build(corpus: np.ndarray, folder: Path) -> Engine:
        config = AnnConfig(
            m=M, ef_construction=EF_CONSTRUCTION, degree=DEGREE, sketched_links=sketched_links
        )
        if not (folder / "built").is_file():
            build_index(kind, corpus, config).save(folder / "index")
            (folder / "built").touch()
        index = load_index(kind, folder / "index", corpus, config)
        return Engine(lambda query, ef: index.search(query, 10, ef)[0], lambda rows: rows)

    return build


def bare_hnswlib(corpus: np.ndarray, folder: Path) -> Engine:
    """Hnswlib float32 with M=16 and ef_construction=200: the 1.0x of every table."""
    index, path = hnswlib.Index("ip", corpus.shape[1]), folder / "index.hnswlib"
    if not path.is_file():
        index.init_index(len(corpus), M=M, ef_construction=EF_CONSTRUCTION)
        index.add_items(corpus, num_threads=1)
        index.save_index(str(path))
        index = hnswlib.Index("ip", corpus.shape[1])
    index.load_index(str(path))
    index.set_num_threads(1)

    def search(query: np.ndarray, ef: int) -> np.ndarray:
        index.set_ef(ef)
        rows: np.ndarray = index.knn_query(query, 10, num_threads=1)[0][0]
        return rows

    return Engine(search, lambda rows: rows)


def bare_symqg(corpus: np.ndarray, folder: Path) -> Engine:
    """Rabitqlib's SymphonyQG, raw store, called directly."""
    import rabitqlib

    path = folder / "index.symqg"
    if not path.is_file():
        index = rabitqlib.SymqgIndex(corpus.shape[1], DEGREE, "l2", 0)
        index.build(corpus, EF_CONSTRUCTION, 1)
        index.save(str(path))
    index = rabitqlib.SymqgIndex.load(str(path))
    return Engine(lambda query, ef: index.search(query, 10, ef), lambda answer: answer[0][0])


def faiss_hnsw(corpus: np.ndarray, folder: Path) -> Engine:
    """Faiss HNSW over float16."""
    faiss = faiss_library()
    faiss.omp_set_num_threads(1)
    path = folder / "index.faiss"
    if not path.is_file():
        index = faiss.IndexHNSWSQ(
            corpus.shape[1], faiss.ScalarQuantizer.QT_fp16, M, faiss.METRIC_INNER_PRODUCT
        )
        index.hnsw.efConstruction = EF_CONSTRUCTION
        index.train(corpus)
        index.add(corpus)
        faiss.write_index(index, str(path))
    index = faiss.read_index(str(path))
    settings = {ef: faiss.SearchParametersHNSW(efSearch=ef) for ef in range(1, 2049)}
    return Engine(
        lambda query, ef: index.search(query, 10, params=settings[ef])[1][0], lambda rows: rows
    )


def usearch_f16(corpus: np.ndarray, folder: Path) -> Engine:
    """Usearch float16."""
    from usearch.index import Index

    index: Any = Index(
        ndim=corpus.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=M,
        expansion_add=EF_CONSTRUCTION,
    )
    path = folder / "index.usearch"
    if not path.is_file():
        index.add(np.arange(len(corpus)), corpus, threads=1)
        index.save(str(path))
    index.load(str(path))

    def search(query: np.ndarray, ef: int) -> Any:
        index.expansion_search = ef
        return index.search(query[0], 10, threads=1)

    return Engine(search, lambda matches: np.asarray(matches.keys, dtype=np.int64))


def svs_f16(corpus: np.ndarray, folder: Path) -> Engine:
    """Intel SVS Vamana over float16 (LVQ and LeanVec refuse other vendors' CPUs)."""
    import svs

    parts = [folder / part for part in ("config", "graph", "data")]
    if not (folder / "built").is_file():
        parameters = svs.VamanaBuildParameters(
            alpha=0.95, graph_max_degree=DEGREE, window_size=EF_CONSTRUCTION
        )
        svs.Vamana.build(
            parameters, corpus.astype(np.float16), svs.DistanceType.MIP, num_threads=1
        ).save(*map(str, parts))
        (folder / "built").touch()
    config, graph, data = map(str, parts)
    stored = svs.VectorDataLoader(data, svs.DataType.float16, dims=corpus.shape[1])
    index = svs.Vamana(config, svs.GraphLoader(graph), stored, svs.DistanceType.MIP, num_threads=1)

    def search(query: np.ndarray, ef: int) -> np.ndarray:
        index.search_window_size = ef
        rows: np.ndarray = index.search(query, 10)[0][0]
        return rows

    return Engine(search, lambda rows: rows.astype(np.int64))


def scann_tree(corpus: np.ndarray, folder: Path) -> Engine:
    """ScaNN: partitions, asymmetric hashing and exact re-ordering of ``ef`` candidates."""
    import scann

    path = folder / "scann"
    if not (folder / "built").is_file():
        leaves = max(10, int(3 * np.sqrt(len(corpus))))
        sample = min(len(corpus), 250_000)
        builder = scann.scann_ops_pybind.builder(corpus, 10, "dot_product").tree(
            leaves, leaves // 10, training_sample_size=sample
        )
        path.mkdir(parents=True, exist_ok=True)
        builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build().serialize(
            str(path)
        )
        (folder / "built").touch()
    index = scann.scann_ops_pybind.load_searcher(str(path))

    def search(query: np.ndarray, ef: int) -> np.ndarray:
        rows: np.ndarray = index.search(
            query[0],
            final_num_neighbors=10,
            pre_reorder_num_neighbors=ef,
            leaves_to_search=max(1, ef // 2),
        )[0]
        return rows

    return Engine(search, lambda rows: rows.astype(np.int64))


def zvec_collection(
    corpus: np.ndarray, folder: Path, values: dict[str, np.ndarray] | None = None
) -> Any:
    """A read-only zvec collection with int8 HNSW and an inverted index over each integer column."""
    import zvec

    path = str(folder / "zvec")
    if (folder / "zvec.built").is_file():
        return zvec.open(path, zvec.CollectionOption(read_only=True))
    int8, metric = zvec.QuantizeType.INT8, zvec.MetricType.IP
    hnsw = zvec.HnswIndexParam(
        metric_type=metric,
        m=M,
        ef_construction=EF_CONSTRUCTION,
        quantize_type=int8,
        use_contiguous_memory=True,
    )
    ranges = zvec.InvertIndexParam(enable_range_optimization=True)
    fields = [
        zvec.FieldSchema(name, zvec.DataType.INT64, index_param=ranges) for name in values or {}
    ]
    vector = zvec.VectorSchema("v", zvec.DataType.VECTOR_FP32, corpus.shape[1], index_param=hnsw)
    collection = zvec.create_and_open(
        path, zvec.CollectionSchema("bench", fields=fields or None, vectors=vector)
    )
    for start in range(0, len(corpus), 1_000):
        docs = [
            zvec.Doc(
                id=str(i),
                vectors={"v": corpus[i]},
                fields={name: int(column[i]) for name, column in (values or {}).items()},
            )
            for i in range(start, min(start + 1_000, len(corpus)))
        ]
        collection.insert(docs)
    collection.optimize(zvec.OptimizeOption(concurrency=1))
    collection.flush()
    collection.close()
    (folder / "zvec.built").touch()
    return zvec.open(path, zvec.CollectionOption(read_only=True))


def zvec_int8(corpus: np.ndarray, folder: Path) -> Engine:
    """Zvec HNSW int8 through its read-only ids call."""
    import zvec

    collection = zvec_collection(corpus, folder)

    def search(query: np.ndarray, ef: int) -> np.ndarray:
        rows: np.ndarray = collection.query_internal_ids(
            zvec.Query("v", vector=query[0], param=zvec.HnswQueryParam(ef=ef)), topk=10
        )
        return rows

    def rows(answer: np.ndarray) -> np.ndarray:
        return np.array([int(key) for key in collection.resolve_internal_ids(answer[answer >= 0])])

    return Engine(search, rows)


def qdrant_shard(
    corpus: np.ndarray, folder: Path, values: dict[str, np.ndarray] | None = None
) -> Any:
    """A qdrant-edge shard with int8 codes in memory, HNSW, and an integer index per column."""
    import qdrant_edge as qdrant

    path = folder / "qdrant"
    if (folder / "qdrant.built").is_file():
        return qdrant.EdgeShard.load(str(path))
    path.mkdir(parents=True)
    hnsw = qdrant.HnswIndexConfig(M, EF_CONSTRUCTION, 10_000, max_indexing_threads=1)
    int8 = qdrant.ScalarQuantizationConfig(qdrant.ScalarType.Int8, quantile=0.99, always_ram=True)
    vectors = qdrant.EdgeVectorParams(
        corpus.shape[1], qdrant.Distance.Dot, hnsw_config=hnsw, quantization_config=int8
    )
    optimizers = qdrant.EdgeOptimizersConfig(
        default_segment_number=1, indexing_threshold=1_000, max_segment_size=10_000_000
    )
    shard = qdrant.EdgeShard.create(
        str(path), qdrant.EdgeConfig(vectors=vectors, optimizers=optimizers, max_search_threads=1)
    )
    for name in values or {}:
        shard.update(
            qdrant.UpdateOperation.create_field_index(name, qdrant.PayloadSchemaType.Integer)
        )
    for start in range(0, len(corpus), 1_000):
        points = [
            qdrant.Point(
                i,
                corpus[i].tolist(),
                {name: int(column[i]) for name, column in (values or {}).items()} or None,
            )
            for i in range(start, min(start + 1_000, len(corpus)))
        ]
        shard.update(qdrant.UpdateOperation.upsert_points(points))
    shard.optimize()
    (folder / "qdrant.built").touch()
    return shard


def qdrant_int8(corpus: np.ndarray, folder: Path) -> Engine:
    """qdrant-edge HNSW over int8 codes, re-scored by the original vectors."""
    import qdrant_edge as qdrant

    shard = qdrant_shard(corpus, folder)
    rescore = qdrant.QuantizationSearchParams(rescore=True)

    def search(query: np.ndarray, ef: int) -> Any:
        request = qdrant.SearchRequest(
            qdrant.Query.Nearest(query[0].tolist()),
            10,
            params=qdrant.SearchParams(hnsw_ef=ef, quantization=rescore),
        )
        return shard.search(request)

    return Engine(search, lambda points: np.array([p.id for p in points]))


ENGINES: dict[str, tuple[Callable[[np.ndarray, Path], Engine], str | None]] = {
    "hnswlib f32": (bare_hnswlib, "hnswlib"),
    "ours auto": (ours("auto"), None),
    "ours int8-graph unsketched": (ours("int8-graph", sketched_links=False), None),
    "ours symqg": (ours("symqg"), None),
    "ours hnsw": (ours("hnsw"), None),
    "ours faiss": (ours("faiss"), "faiss-cpu"),
    "bare symqg": (bare_symqg, "rabitqlib"),
    "bare int8-graph": (bare("int8-graph"), None),
    "bare int8-graph unsketched": (bare("int8-graph", sketched_links=False), None),
    "zvec int8": (zvec_int8, "zvec"),
    "qdrant-edge int8": (qdrant_int8, "qdrant-edge-py"),
    "svs f16": (svs_f16, "scalable-vs"),
    "scann": (scann_tree, "scann"),
    "faiss hnsw f16": (faiss_hnsw, "faiss-cpu"),
    "usearch f16": (usearch_f16, "usearch"),
}
"""Name -> (builder, the distribution it needs besides ours)."""


def installed(name: str) -> bool:
    """Whether the engine's distribution is installed."""
    distribution = ENGINES[name][1]
    try:
        return distribution is None or bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def one_blas_thread() -> AbstractContextManager[object]:
    """Keep BLAS and OpenMP of this process to one thread inside a ``with`` block."""
    limits: AbstractContextManager[object] = threadpool_limits(limits=1)
    return limits
