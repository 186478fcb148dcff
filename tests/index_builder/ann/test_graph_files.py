"""Graphs read from the files of other libraries."""

from __future__ import annotations

import numpy as np

from index_builder.ann.graph_files import unreachable_nodes


def test_unreachable_nodes_counts_what_the_largest_component_does_not_reach() -> None:
    # Nodes 0 to 2 are a ring; 3 leads to it but nothing leads to 3; 4 is alone.
    ring = np.array([[1, 1], [2, 2], [0, 0], [0, 1], [4, 4]], dtype=np.uint32)
    assert unreachable_nodes(ring) == 2
    # Node 3 is reached from the ring.
    chain = np.array([[1, 1], [2, 2], [0, 3], [3, 3]], dtype=np.uint32)
    assert unreachable_nodes(chain) == 0
