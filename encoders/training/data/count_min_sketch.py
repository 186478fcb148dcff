"""Count items in fixed memory, for the logQ correction of the loss (paper section 4.3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from encoders.config.train_config import DEFAULT_DEPTH, DEFAULT_WIDTH
from encoders.errors import CheckpointError, ConfigError
from encoders.text.hashing import seeded_hash


class CountMinSketch:
    """Counts of 64-bit keys in ``depth x width`` counters; a count is never below the truth.

    With width ``w`` and depth ``d`` a count exceeds the truth by more than ``e / w`` of the total
    with probability below ``exp(-d)`` (Cormode and Muthukrishnan, 2005).

    Args:
        width: Counters per row, a power of two.
        depth: Rows, each with its own hash.
        seed: Chooses the hashes; two sketches can be merged when width, depth and seed agree.

    Raises:
        ConfigError: ``width`` is not a power of two or ``depth`` is below one.
    """

    def __init__(
        self, width: int = DEFAULT_WIDTH, depth: int = DEFAULT_DEPTH, seed: int = 0
    ) -> None:
        if width < 1 or width & (width - 1):
            raise ConfigError(
                f"CountMinSketch.width must be a power of two, but got {width}. Try"
                f" {1 << max(width - 1, 1).bit_length()}."
            )
        if depth < 1:
            raise ConfigError(f"CountMinSketch.depth must be at least 1, but got {depth}.")
        self.width, self.depth, self.seed = width, depth, seed
        self.table = np.zeros((depth, width), dtype=np.int64)
        self.total = 0
        """Sum of all counts added: N in the paper's C(e)/N."""

    def _columns(self, keys: np.ndarray, row: int) -> np.ndarray:
        return (seeded_hash(keys, self.seed * 1009 + row) & np.uint64(self.width - 1)).astype(
            np.int64
        )

    def add(self, keys: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Count each key once, or ``counts`` times.

        Args:
            keys: uint64 ``(N,)``, e.g. from ``hash_texts``; repeats allowed.
            counts: Non-negative integers ``(N,)``.
        """
        if counts is None:
            counts = np.ones(len(keys), dtype=np.int64)
        weights = np.asarray(counts, dtype=np.int64)
        if weights.shape != keys.shape:
            raise ConfigError(
                f"CountMinSketch.add: expected as many counts as keys, but got {weights.shape} for"
                f" {keys.shape}."
            )
        if weights.size and weights.min() < 0:
            raise ConfigError(
                "CountMinSketch.add: counts must not be negative, but the smallest is"
                f" {weights.min()}."
            )
        for row in range(self.depth):
            np.add.at(self.table[row], self._columns(keys, row), weights)
        self.total += int(weights.sum())

    def count(self, keys: np.ndarray) -> np.ndarray:
        """Estimate counts, int64 ``(N,)``: never below the true count, which may be 0."""
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
            raise ConfigError(
                f"Sketches merge only with equal (width, depth, seed), but got {mine} and {theirs}."
            )
        self.table += other.table
        self.total += other.total

    def save(self, path: Path) -> None:
        """Write the sketch as ``.npz``."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file, table=self.table, total=np.int64(self.total), seed=np.int64(self.seed)
            )

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
            raise CheckpointError(
                f"{path}: expected a saved count-min sketch, but could not read it ({error}). Count"
                " again."
            ) from error
        sketch = cls(width=table.shape[1], depth=table.shape[0], seed=seed)
        sketch.table, sketch.total = table, total
        return sketch
