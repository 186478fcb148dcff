"""Entities with text embeddings and attributes, for tests of an index."""

import numpy as np
import polars as pl

from index_builder.ann import AnnConfig
from tests.helpers.real_vectors import text_vectors

N = 3_000
FRAME = pl.DataFrame(
    {
        "rank": np.random.default_rng(3).permutation(N),
        "country": [["us", "de", None][i % 3] for i in range(N)],
        "tags": [[["a"], ["a", "b"], []][i % 3] for i in range(N)],
    }
)
IDS = [f"pin:{i}" for i in range(N)]
CONFIG = AnnConfig(m=12, ef_construction=100)


def entity_vectors() -> tuple[np.ndarray, np.ndarray]:
    """Return the entities' vectors, ten of which are one, and 150 queries."""
    vectors = text_vectors(N + 150)
    entities = vectors[:N].copy()
    entities[100:110] = entities[100]
    return entities, vectors[N:]
