"""How an index is proven: which queries calibrate it, which become golden, what it answers them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from index_builder.building.inputs import EntityInput, QuerySet
from index_builder.building.plan import RebuildConfig
from index_builder.releases.golden import (
    GOLDEN_K,
    GoldenQueries,
    perturbed_entities,
    replayed_recall,
)
from index_builder.search.entity_index import EntityIndex

REAL = "real queries"
STAND_INS = "perturbed entities"


class ProofQueries(NamedTuple):
    """Queries in two disjoint parts: golden ones, and those that calibrate."""

    golden_texts: list[str]
    golden_vectors: np.ndarray
    """float32 ``(G, D)``, unit rows."""
    calibration: np.ndarray
    """float32 ``(Q, D)``, unit rows."""
    source: str
    """``real queries`` or ``perturbed entities``."""


def split_queries(queries: QuerySet, config: RebuildConfig) -> ProofQueries:
    """Draw golden and calibration queries from real ones."""
    order = np.random.default_rng(config.seed).permutation(len(queries.texts))
    count = min(config.golden_queries, max(1, len(order) // 4))
    golden = order[:count]
    rest = order[count : count + config.calibration_queries]
    if len(rest) == 0:
        rest = golden
    vectors = np.ascontiguousarray(queries.vectors, np.float32)
    return ProofQueries([queries.texts[i] for i in golden], vectors[golden], vectors[rest], REAL)


def stand_in_queries(entities: EntityInput, config: RebuildConfig) -> ProofQueries:
    """Make queries from the entities themselves, where there are no real ones."""
    vectors, seed = entities.vectors, config.seed
    if len(entities.ids) == 0:
        empty = np.zeros((0, vectors.shape[1]), np.float32)
        return ProofQueries([], empty, empty, STAND_INS)
    golden = perturbed_entities(vectors, config.golden_queries, seed)
    calibration = perturbed_entities(vectors, config.calibration_queries, seed + 1)
    return ProofQueries([""] * len(golden), golden, calibration, STAND_INS)


def replay(index: EntityIndex, golden: GoldenQueries) -> float:
    """Return the mean recall of golden queries through an index; 1.0 where there are none."""
    if not index.count:
        return 1.0
    return replayed_recall(golden, [index.search(query, GOLDEN_K) for query in golden.vectors])


def golden_record(golden: GoldenQueries, recall: float) -> dict[str, Any]:
    """Return what the manifest says about golden queries and their replay."""
    return {
        "queries": len(golden),
        "k": GOLDEN_K,
        "kind": golden.kind,
        "recall": round(recall, 6),
    }
