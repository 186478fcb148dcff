"""Real vectors small enough for unit tests: hashed character n-grams of the sample's texts,
projected to D dimensions.
"""

from __future__ import annotations

import functools

import numpy as np

from encoders.datasets.dataset import load_sample


@functools.cache
def text_vectors(count: int, dimension: int = 64) -> np.ndarray:
    """Unit rows float32 ``(count, dimension)`` of distinct real query texts."""
    texts = load_sample().pairs["query"].unique(maintain_order=True).to_list()[: 2 * count]
    rng = np.random.default_rng(0)
    table = rng.standard_normal((4096, dimension)).astype(np.float32)
    rows = []
    for text in texts:
        padded = f" {text} "
        grams = [padded[i : i + 3] for i in range(len(padded) - 2)]
        rows.append(
            table[[sum(ord(c) * 131**j for j, c in enumerate(g)) % 4096 for g in grams]].sum(axis=0)
        )
    vectors = np.array(rows, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.unique(vectors, axis=0)[:count]
    assert len(vectors) == count
    return np.ascontiguousarray(vectors[np.random.default_rng(1).permutation(count)])


def islands(count: int = 1_600, dimension: int = 64) -> np.ndarray:
    """Unit vectors float32 ``(count, dimension)`` in 40 tight groups, which a poor graph does not
    connect.
    """
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, dimension))[
        np.arange(count) * 40 // count
    ] + 0.01 * rng.standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
