"""How often each item was seen, in fixed memory: the frequencies behind the logQ correction of the loss (paper section 4.3)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

from encoders.errors import CheckpointError, ConfigError

DEFAULT_DEPTH = 2
DEFAULT_WIDTH = 1 << 20
"""Counters per row. The released trainer uses 2 x 2^26; 2 x 2^20 (16 MiB) over-counts by less than 0.1% of a million items."""


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """Stable 64-bit keys of strings (xxh3), uint64 ``(N,)``; the same on every machine and run."""
    return np.fromiter((xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts), dtype=np.uint64)


def mix64(keys: np.ndarray, seed: int = 0) -> np.ndarray:
    """Scatter 64-bit keys over all 64-bit values (the splitmix64 finaliser), uint64 of the same shape."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) & 0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def combine_keys(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One key per pair of keys, order mattering: the key of ``(query, entity)``. uint64 ``(N,)``."""
    with np.errstate(over="ignore"):
        return mix64(mix64(first, 17) + np.uint64(3) * second.astype(np.uint64), 23)


class CountMinSketch:
    """Counts of 64-bit keys in ``depth x width`` counters; a count is never below the truth.

    With width ``w`` and depth ``d`` a count exceeds the truth by more than ``e / w`` of the total with probability below ``exp(-d)``
    (Cormode and Muthukrishnan, 2005).

    Args:
        width: Counters per row, a power of two.
        depth: Rows, each with its own hash.
        seed: Chooses the hashes; two sketches can be merged when width, depth and seed agree.

    Raises:
        ConfigError: ``width`` is not a power of two or ``depth`` is below one.
    """

    def __init__(self, width: int = DEFAULT_WIDTH, depth: int = DEFAULT_DEPTH, seed: int = 0) -> None:
        if width < 1 or width & (width - 1):
            raise ConfigError(f"CountMinSketch.width must be a power of two, but got {width}. Try {1 << max(width - 1, 1).bit_length()}.")
        if depth < 1:
            raise ConfigError(f"CountMinSketch.depth must be at least 1, but got {depth}.")
        self.width, self.depth, self.seed = width, depth, seed
        self.table = np.zeros((depth, width), dtype=np.int64)
        self.total = 0
        """Sum of all counts added: N in the paper's C(e)/N."""

    def _columns(self, keys: np.ndarray, row: int) -> np.ndarray:
        return (mix64(keys, self.seed * 1009 + row) & np.uint64(self.width - 1)).astype(np.int64)

    def add(self, keys: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Count each key once, or ``counts`` times.

        Args:
            keys: uint64 ``(N,)``, e.g. from ``hash_texts``; repeats allowed.
            counts: Non-negative integers ``(N,)``.
        """
        weights = np.ones(len(keys), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
        if weights.shape != keys.shape:
            raise ConfigError(f"CountMinSketch.add: expected as many counts as keys, but got {weights.shape} for {keys.shape}.")
        if weights.size and weights.min() < 0:
            raise ConfigError(f"CountMinSketch.add: counts must not be negative, but the smallest is {weights.min()}.")
        for row in range(self.depth):
            np.add.at(self.table[row], self._columns(keys, row), weights)
        self.total += int(weights.sum())

    def count(self, keys: np.ndarray) -> np.ndarray:
        """Estimated counts, int64 ``(N,)``: the true count or more, 0 or more for a key never added."""
        estimate: np.ndarray = self.table[0][self._columns(keys, 0)]
        for row in range(1, self.depth):
            estimate = np.minimum(estimate, self.table[row][self._columns(keys, row)])
        return estimate

    def merge(self, other: CountMinSketch) -> None:
        """Add another sketch's counts to this one, as if all its keys had been added here.

        Raises:
            ConfigError: The two differ in width, depth or seed.
        """
        mine, theirs = (self.width, self.depth, self.seed), (other.width, other.depth, other.seed)
        if mine != theirs:
            raise ConfigError(f"Sketches merge only with equal (width, depth, seed), but got {mine} and {theirs}.")
        self.table += other.table
        self.total += other.total

    def save(self, path: Path) -> None:
        """Write the sketch as ``.npz``."""
        with open(path, "wb") as file:
            np.savez_compressed(file, table=self.table, total=np.int64(self.total), seed=np.int64(self.seed))

    @classmethod
    def load(cls, path: Path) -> CountMinSketch:
        """Read a sketch back.

        Raises:
            CheckpointError: The file is missing, truncated or something else.
        """
        try:
            with np.load(path) as file:
                table, total, seed = file["table"], int(file["total"]), int(file["seed"])
        except Exception as error:
            raise CheckpointError(f"{path}: expected a saved count-min sketch, but could not read it ({error}). Count again.") from error
        sketch = cls(width=table.shape[1], depth=table.shape[0], seed=seed)
        sketch.table, sketch.total = table, total
        return sketch
