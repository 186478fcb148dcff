"""Graph health: nodes that no search can reach."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components


def unreachable_nodes(links: np.ndarray) -> int:
    """Nodes outside the largest strongly connected part of the base layer that no path from it reaches.

    Args:
        links: uint32 ``(N, degree)`` out-links.
    """
    count, degree = links.shape
    graph = csr_matrix(
        (np.ones(links.size, dtype=np.bool_), links.ravel().astype(np.int64), np.arange(0, links.size + 1, degree)), shape=(count, count)
    )
    parts, labels = connected_components(graph, directed=True, connection="strong")
    if parts == 1:
        return 0
    reached = labels == np.argmax(np.bincount(labels))
    frontier = np.flatnonzero(reached)
    while len(frontier):
        targets = np.unique(links[frontier])
        frontier = targets[~reached[targets]]
        reached[frontier] = True
    return int(count - np.count_nonzero(reached))
