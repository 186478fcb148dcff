"""The in-process cache of query vectors."""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Callable, Sequence
from operator import attrgetter

import numpy as np
import numpy.typing as npt
from cachetools import TTLCache

Float32 = npt.NDArray[np.float32]

ENTRY_OVERHEAD_BYTES = 480
"""Python objects of one entry beside vector and text, as tracemalloc measures them, rounded up."""


def namespace(space_id: str, form_id: str) -> str:
    """Return the prefix of every key of one encoder, so that two encoders never share a vector.

    It holds 128 bits of the space id, and the form id.
    """
    return f"{space_id[:32]}/{form_id}/"


class Entry:
    """A cached vector, its number of uses, and the bytes that it and its key take."""

    __slots__ = ("hits", "size", "vector")

    def __init__(self, vector: Float32, size: int) -> None:
        self.vector = vector
        self.hits = 1
        self.size = size


class QueryCache:
    """LRU with a time to live and a byte bound, for one process.

    Not thread-safe: it lives on the event loop.

    Args:
        max_bytes: Bound over vectors, texts and bookkeeping; 0 switches the cache off.
        ttl_seconds: Age at which an entry is dropped, whether or not it is used.
        clock: Seconds that never jump back (tests and the cache study pass their own).
    """

    def __init__(
        self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self.insertions = 0
        self._entries: TTLCache[str, Entry] = TTLCache(
            max(1, max_bytes), ttl_seconds, timer=clock, getsizeof=attrgetter("size")
        )

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        """Estimated bytes held."""
        return int(self._entries.currsize)

    @property
    def evictions(self) -> int:
        """Entries that left, by age, by size or replaced."""
        return self.insertions - len(self._entries)

    def get(self, key: str) -> Float32 | None:
        """Return the vector, ``(D,)`` float32, read-only, or None; counts a hit or a miss."""
        try:
            entry = self._entries[key]
        except KeyError:
            self.misses += 1
            return None
        entry.hits += 1
        self.hits += 1
        return entry.vector

    def find(self, key: str) -> Entry | None:
        """Return the entry, or None, and count nothing; a caller that uses it calls ``used``."""
        try:
            entry: Entry = self._entries[key]
        except KeyError:
            return None
        return entry

    def used(self, entry: Entry) -> None:
        """Count what ``find`` returned as a hit."""
        entry.hits += 1
        self.hits += 1

    def put(self, key: str, vector: Float32) -> None:
        """Store a vector, unless its entry is larger than the whole cache."""
        if self.max_bytes <= 0:
            return
        held = np.array(vector, dtype=np.float32)
        held.flags.writeable = False
        try:
            self._entries[key] = Entry(held, entry_bytes(key, held.nbytes))
        except ValueError:  # larger than the cache
            return
        self.insertions += 1

    def frequent(self, prefix: str, count: int) -> list[str]:
        """Return at most ``count`` texts under ``prefix``, most used first; halve all counts."""
        return [text for text, _ in most_frequent(self.items(), prefix, count)]

    def items(self) -> list[tuple[str, Entry]]:
        """Copy keys and entries for ``most_frequent``, which may run in another thread."""
        self._entries.expire()
        # The class's own items() would count as uses and reorder the LRU
        mapping: dict[str, Entry] = getattr(self._entries, "_Cache__data")  # noqa: B009
        return list(mapping.items())


def most_frequent(
    items: Sequence[tuple[str, Entry]], prefix: str, count: int
) -> list[tuple[str, Entry]]:
    """Return at most ``count`` texts under ``prefix`` with their entries, most used first.

    The counts of all are then halved, so that old use counts for less. A full cache has 180,000
    items, which takes some 0.2 s: not for the event loop. A use that is counted meanwhile may get
    lost.
    """
    best = heapq.nlargest(
        count,
        ((entry.hits, key, entry) for key, entry in items if key.startswith(prefix)),
        key=lambda item: item[:2],
    )
    for _, entry in items:
        entry.hits = (entry.hits + 1) // 2
    return [(key[len(prefix) :], entry) for _, key, entry in best]


def entry_bytes(key: str, vector_bytes: int) -> int:
    """Return what an entry takes of the cache's bound."""
    return vector_bytes + sys.getsizeof(key) + ENTRY_OVERHEAD_BYTES
