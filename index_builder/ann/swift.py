"""The swift index: our own walk over links that carry a one-bit sketch of where they lead, so that it reads few codes and fewer vectors."""

from __future__ import annotations

from index_builder.ann.lean import LeanIndex


class SwiftIndex(LeanIndex):
    """1.5 kB a vector in memory: one byte a dimension, 32 links and for each a factor and one sign bit a dimension.

    Built on the same graphs as ``lean`` and answering from the same codes; a deterministic build
    takes hnswlib's graph. Memory belongs to the process that loads it, in huge pages where there
    are any, and is shared by those it forks.
    """

    kind = "swift"
    sketched = True
