"""Graph health: nodes that no search can reach."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from index_builder.ann.interface import AnnIndex


def unreachable_nodes(ann: AnnIndex) -> int | None:
    """Nodes outside the largest strongly connected part of the base layer that no edge from it reaches; None where the graph is not visible."""
    links = ann.neighbours()
    if links is None:
        return 0 if ann.exact else None
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
