"""Which search of one graph is faster for the queries at hand: SymphonyQG's own, or our walk over its links with sketches."""

from __future__ import annotations

import numpy as np

from encoders.exact_search import exact_top_k
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.ann.interface import AnnConfig, AnnIndex
from index_builder.search.calibration import EF_GRID, latency_at_recall

RACE_QUERIES = 500
"""Calibration queries that decide."""


def faster_of_graph(
    ann: AnnIndex, vectors: np.ndarray, queries: np.ndarray, target: float, config: AnnConfig
) -> tuple[AnnIndex, str]:
    """Time both searches of the graph of ``ann`` over the calibration queries, one query a call.

    Args:
        ann: A built index.
        vectors: float32 ``(N, D)`` it was built on.
        queries: float32 ``(Q, D)``, real ones where there are any; never those reported on.
        target: ANN recall@10 at which times are compared.
        config: Parameters of the walk.

    Returns:
        The faster index, and why for people, with both times; ``ann`` where its graph cannot be
        read or neither reaches the target.
    """
    graph = ann.neighbours()
    if graph is None or len(queries) == 0 or len(vectors) < 20:
        return (
            ann,
            (
                f"{ann.kind}: the graph or the calibration queries are missing, so nothing else was"
                " tried"
            ),
        )
    walk = Int8GraphIndex.over(vectors, graph, config)
    _, scores = exact_top_k(queries, vectors, 10)
    times = {
        index.kind: latency_at_recall(
            lambda q, k, ef, i=index: i.search(q, k, ef)[0],  # type: ignore[misc]
            vectors,
            queries,
            scores,
            target,
            EF_GRID,
        )
        for index in (ann, walk)
    }
    mine, theirs = times[walk.kind], times[ann.kind]
    shown = " and ".join(
        f"{kind} {'does not reach it' if time is None else f'{time:.0f} us'}"
        for kind, time in times.items()
    )
    why = (
        f"{len(vectors):,} vectors: at recall@10 {target:.2f} on {len(queries):,} calibration"
        f" queries one search takes {shown}"
    )
    return (walk, why) if mine is not None and (theirs is None or mine < theirs) else (ann, why)
