"""From ids, vectors and attributes to the parts of an index: kind chosen, graph built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from encoders.errors import ConfigError
from encoders.exact_search import exact_top_k
from index_builder.ann import AnnConfig, AnnIndex, build_index, choose_kind
from index_builder.ann.choice import KINDS, Choice
from index_builder.ann.graph_files import unreachable_nodes
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.ann.reuse import EarlierIndex, NotReusable, carried_over
from index_builder.errors import IndexFormatError
from index_builder.filters.attributes import AttributeTable
from index_builder.search.calibration import latency_at_recall
from index_builder.search.index_config import IndexConfig
from index_builder.search.index_files import IndexParts, IndexRecord
from index_builder.storage.corpus import Corpus, check_vectors
from index_builder.storage.engine_arrays import MAX_DIMENSION, EngineArrays
from index_builder.storage.id_table import IdTable

RACE_QUERIES = 500
"""Calibration queries that decide between two searches of one graph."""
_FEWEST_RACED = 20
INCREMENTAL = "incremental"
"""Name among the facts of an index: what was carried over from an earlier one."""


class CalibrationQueries(NamedTuple):
    """Queries that calibrate an index, and where they come from."""

    vectors: np.ndarray
    """float32 ``(Q, D)``, unit rows; at least 2,000 for a tight interval."""
    source: str = "real queries"
    """``real queries`` or ``perturbed entities``."""


class _BuiltAnn(NamedTuple):
    ann: AnnIndex
    why: str
    incremental: dict[str, Any] | None = None
    """What was carried over from an earlier index, or why nothing was; None: not wanted."""


def build_parts(
    ids: Sequence[str],
    vectors: np.ndarray,
    attributes: pl.DataFrame | None,
    config: IndexConfig,
    queries: np.ndarray | None,
) -> tuple[IndexParts, dict[str, Any]]:
    """Check, deduplicate and build; arguments as for ``EntityIndex.build``.

    Returns:
        The parts, and the facts about them for ``index.json`` and the manifest.
    """
    vectors = check_vectors(vectors, ids)
    id_table = IdTable.build(ids)
    attribute_table = _attribute_table(attributes, len(id_table))
    corpus = Corpus.build(vectors)
    built = _build_ann(corpus.vectors, config, queries)
    filtered = bool(attribute_table.schema)
    parts = IndexParts(
        ids=id_table,
        attributes=attribute_table,
        corpus=corpus,
        ann=built.ann,
        arrays=_engine_arrays(built.ann, corpus.vectors, filtered),
    )
    facts = _facts(parts, built.why)
    return parts, facts if built.incremental is None else facts | {INCREMENTAL: built.incremental}


def _attribute_table(attributes: pl.DataFrame | None, rows: int) -> AttributeTable:
    if attributes is None or not attributes.columns:
        return AttributeTable.empty(rows)
    table = AttributeTable(attributes)
    if table.count != rows:
        raise ConfigError(
            f"expected one row of attributes per id, but got {table.count} rows and {rows} ids."
        )
    return table


def _build_ann(vectors: np.ndarray, config: IndexConfig, queries: np.ndarray | None) -> _BuiltAnn:
    """Carry an earlier graph over where that is wanted and possible; else build one."""
    reproducible = config.ann.reproducible or config.deterministic
    parameters = replace(config.ann, reproducible=reproducible)
    if len(vectors) == 0:
        return _BuiltAnn(build_index("exact", vectors, parameters), "there are no vectors")
    choice = Choice(config.kind, "requested", sketched_links=parameters.sketched_links)
    if config.kind == "auto":
        choice = choose_kind(
            len(vectors),
            dimension=int(vectors.shape[1]),
            low_memory=config.low_memory,
            deterministic=reproducible,
        )
    parameters = replace(parameters, sketched_links=choice.sketched_links)
    if config.reuse is None or choice.kind == "exact":
        return _built_in_full(choice, vectors, config, parameters, queries)
    try:
        earlier = _earlier_index(config.reuse, choice)
        ann, reuse = carried_over(earlier, vectors, parameters)
        return _BuiltAnn(ann, str(reuse), {"used": True, **reuse.as_dict()})
    except NotReusable as reason:
        built = _built_in_full(choice, vectors, config, parameters, queries)
        return built._replace(incremental={"used": False, "why": str(reason)})


def _earlier_index(folder: Path, choice: Choice) -> EarlierIndex:
    """Return an earlier index whose graph may stand for the chosen kind's.

    Raises:
        NotReusable: It is of another kind, or cannot be read.
    """
    try:
        record = IndexRecord.read(folder)
        vectors = Corpus.load(folder).vectors
    except IndexFormatError as error:
        raise NotReusable(f"the earlier index cannot be read ({error})") from error
    if record.kind not in (choice.kind, choice.rival):
        raise NotReusable(f"the kind is {choice.kind} and was {record.kind}")
    if choice.kind != "int8-graph" and choice.rival != "int8-graph":
        raise NotReusable(f"a graph of kind {choice.kind} is always built in full")
    incremental = record.facts.get(INCREMENTAL, {})
    changed = float(incremental.get("changed_since_full", 0.0))
    return EarlierIndex(folder, record.kind, record.facts["parameters"], vectors, changed)


def _built_in_full(
    choice: Choice,
    vectors: np.ndarray,
    config: IndexConfig,
    parameters: AnnConfig,
    queries: np.ndarray | None,
) -> _BuiltAnn:
    """Build the chosen kind; where a rival may be faster, calibration queries decide."""
    built = _BuiltAnn(build_index(choice.kind, vectors, parameters), choice.why)
    if choice.rival is None or queries is None:
        return built
    racing = np.ascontiguousarray(queries[:RACE_QUERIES])
    racing = check_vectors(racing, None, int(vectors.shape[1]))
    return _faster_search(built.ann, vectors, racing, config.default_recall, parameters)


def _faster_search(
    ann: AnnIndex, vectors: np.ndarray, queries: np.ndarray, target: float, config: AnnConfig
) -> _BuiltAnn:
    """Time both searches of the graph of ``ann`` over calibration queries, one query a call.

    SymphonyQG's own search or the compiled walk over its links: which is faster depends on how far
    the queries are from the corpus.

    Args:
        ann: A built index over ``vectors`` float32 ``(N, D)``.
        vectors: What it was built on.
        queries: float32 ``(Q, D)``, real ones where there are any; never those reported on.
        target: ANN recall@10 at which times are compared.
        config: Parameters of the walk.

    Returns:
        The faster index and both times; ``ann`` where its graph cannot be read or neither reaches
        the target.
    """
    graph = ann.neighbours()
    if graph is None or len(queries) == 0 or len(vectors) < _FEWEST_RACED:
        missing = "the graph or the calibration queries are missing, so nothing else was tried"
        return _BuiltAnn(ann, f"{ann.kind}: {missing}")
    walk = Int8GraphIndex.over(vectors, graph, config)
    _, scores = exact_top_k(queries, vectors, 10)

    def time_at_target(index: AnnIndex) -> float | None:
        return latency_at_recall(
            lambda query, k, ef: index.search(query, k, ef)[0], vectors, queries, scores, target
        )

    ann_time = time_at_target(ann)
    walk_time = time_at_target(walk)
    why = (
        f"{len(vectors):,} distinct vectors: at recall@10 {target:.2f} on {len(queries):,}"
        f" calibration queries one search takes {_shown(ann, ann_time)} and"
        f" {_shown(walk, walk_time)}"
    )
    walk_wins = walk_time is not None and (ann_time is None or walk_time < ann_time)
    return _BuiltAnn(walk if walk_wins else ann, why)


def _shown(index: AnnIndex, time_us: float | None) -> str:
    return f"{index.kind} {'does not reach it' if time_us is None else f'{time_us:.0f} us'}"


def _engine_arrays(ann: AnnIndex, vectors: np.ndarray, filtered: bool) -> EngineArrays | None:
    """Return the arrays of the walk, with sketches where there are attributes to filter by."""
    arrays = ann.arrays if isinstance(ann, Int8GraphIndex) else None
    if not filtered or ann.exact or vectors.shape[1] > MAX_DIMENSION:
        return arrays
    if arrays is None:
        return EngineArrays.build(vectors, None, sketches=True)
    return arrays.with_sketches(vectors)


def _facts(parts: IndexParts, why: str) -> dict[str, Any]:
    ann, rows, nodes = parts.ann, len(parts.ids), len(parts.corpus.vectors)
    return {
        "kind": ann.kind,
        "parameters": ann.parameters(),
        "why": why,
        "cpu_features": list(KINDS[ann.kind].cpu_features),
        "rows": rows,
        "nodes": nodes,
        "duplicates": rows - nodes,
        "unreachable": _unreachable(ann),
        "dimension": int(parts.corpus.vectors.shape[1]),
        "attributes": dict(parts.attributes.schema),
        "codes": parts.arrays is not None,
    }


def _unreachable(ann: AnnIndex) -> int | None:
    """Count the nodes that no search can reach; None where the kind shows no graph."""
    if ann.exact:
        return 0
    links = ann.neighbours()
    return None if links is None else unreachable_nodes(links)
