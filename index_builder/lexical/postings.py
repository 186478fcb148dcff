"""Posting lists in flat arrays: which rows hold a term, and how much each counts in one byte.

The same texts give the same bytes. Files are raw little-endian arrays beside a small JSON file that
gives their lengths; processes map them and share one copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoders.text.hashing import UInt64
from index_builder.errors import IndexBuildError, IndexFormatError
from index_builder.storage.raw_arrays import map_array

MAX_WEIGHT = 255
"""The weight that stands for ``k1 + 1``, which no term frequency exceeds."""
_ARRAYS = {"keys": "<u8", "offsets": "<u4", "rows": "<u4", "weights": "u1", "best": "u1"}
"""Name of a file behind ``lexical.`` -> dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bm25:
    """Parameters of BM25.

    Attributes:
        k1: How soon a repeated term stops to count more.
        b: How much long texts are discounted, 0 to 1.
    """

    k1: float = 0.8
    b: float = 0.75

    def weights(self, counts: np.ndarray, lengths: np.ndarray, average_length: float) -> np.ndarray:
        """Return what terms count in texts, uint8 in 1 to 255.

        Args:
            counts: float32 ``(P,)``, how often the term occurs in the text, by field weights.
            lengths: float32 ``(P,)``, terms of that text, by field weights.
            average_length: Mean of the lengths of all texts that have terms.
        """
        norm = self.k1 * (1 - self.b + self.b * lengths / np.float32(average_length))
        saturated = counts / (counts + norm.astype(np.float32))
        return np.asarray(np.clip(np.rint(saturated * MAX_WEIGHT), 1, MAX_WEIGHT), np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class TermCounts:
    """How often terms occur in rows, ordered by term and then by row.

    Attributes:
        keys: uint64 ``(P,)``.
        rows: uint32 ``(P,)``.
        counts: float32 ``(P,)``, occurrences by field weights.
        lengths: float32 ``(N,)``, sum of the counts of each row.
    """

    keys: UInt64
    rows: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray

    @property
    def average_length(self) -> float:
        """Mean length of the rows that have terms; 1.0 where none has."""
        some = self.lengths[self.lengths > 0]
        return float(some.mean(dtype=np.float64)) if len(some) else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Postings:
    """Rows and weights of each term.

    Attributes:
        keys: uint64 ``(T,)``, ascending.
        offsets: uint32 ``(T + 1,)``: the postings of term ``t`` are ``offsets[t]`` to
            ``offsets[t + 1]``.
        rows: uint32 ``(P,)``, ascending within a term.
        weights: uint8 ``(P,)``, 1 to 255.
        best: uint8 ``(T,)``, the largest weight of each term.
        count: N, rows with and without terms.
    """

    keys: UInt64
    offsets: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    best: np.ndarray
    count: int

    @classmethod
    def build(cls, found: TermCounts, bm25: Bm25, average_length: float) -> Postings:
        """Weigh counted terms. Raises as ``of_terms``."""
        weights = bm25.weights(found.counts, found.lengths[found.rows], average_length)
        return cls.of_terms(found.keys, found.rows, weights, len(found.lengths))

    @classmethod
    def of_terms(cls, keys: UInt64, rows: np.ndarray, weights: np.ndarray, count: int) -> Postings:
        """Group postings ``(P,)`` that are ordered by key and then by row.

        Raises:
            IndexBuildError: More postings than 32 bits can number.
        """
        if len(keys) >= 1 << 32:
            raise IndexBuildError(
                f"the texts have {len(keys):,} postings, but an index of words holds fewer than"
                " 2**32. Leave a long text field out, or cap its length."
            )
        starts = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
        offsets = np.append(starts, len(keys)).astype(np.uint32)
        best = np.maximum.reduceat(weights, starts) if len(starts) else np.zeros(0, np.uint8)
        return cls(
            keys=keys[starts], offsets=offsets, rows=rows, weights=weights, best=best, count=count
        )

    @classmethod
    def joined(cls, parts: Sequence[Postings], keep: Sequence[np.ndarray | None]) -> Postings:
        """Put the rows of several postings behind each other.

        Args:
            parts: At least one.
            keep: For each part bool ``(count,)``, which of its rows stay; None: all.
        """
        keys, rows, weights, count = [], [], [], 0
        for part, mask in zip(parts, keep, strict=True):
            sizes = part.frequencies(np.arange(len(part.keys)))
            key, row, weight = np.repeat(part.keys, sizes), part.rows, part.weights
            kept = part.count
            if mask is not None:
                stays = mask[row]
                numbers = np.cumsum(mask, dtype=np.uint32) - np.uint32(1)
                key, row, weight = key[stays], numbers[row[stays]], weight[stays]
                kept = int(np.count_nonzero(mask))
            keys.append(key)
            rows.append(row + np.uint32(count))
            weights.append(weight)
            count += kept
        key = np.concatenate(keys)
        # Stable: rows ascend from part to part, so they stay in order within a term
        order = np.argsort(key, kind="stable")
        return cls.of_terms(
            key[order], np.concatenate(rows)[order], np.concatenate(weights)[order], count
        )

    def frequencies(self, places: np.ndarray) -> np.ndarray:
        """Return in how many rows the terms at ``places`` occur, int64."""
        return np.asarray(self.offsets[places + 1].astype(np.int64) - self.offsets[places])

    def places(self, keys: UInt64) -> np.ndarray:
        """Return the place of each key, int64; -1 for a key without postings."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        places = np.minimum(self.keys.searchsorted(keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)

    def lengths(self) -> dict[str, int]:
        """Return the lengths of the arrays, which ``load`` wants back."""
        return {name: len(getattr(self, name)) for name in _ARRAYS}

    def save(self, folder: Path) -> None:
        """Write ``lexical.keys``, ``.offsets``, ``.rows``, ``.weights`` and ``.best``."""
        for name, dtype in _ARRAYS.items():
            getattr(self, name).astype(dtype, copy=False).tofile(folder / f"lexical.{name}")

    @classmethod
    def load(cls, folder: Path, lengths: Mapping[str, int], count: int) -> Postings:
        """Map what ``save`` wrote, and check what is cheap to check.

        ``posting_search`` checks the rows before they are used.

        Raises:
            IndexFormatError: A file is missing, has another length, or the arrays do not fit each
                other.
        """
        where = f"{folder.name}/lexical"
        arrays = {
            name: map_array(folder / f"lexical.{name}", dtype, int(lengths[name]))
            for name, dtype in _ARRAYS.items()
        }
        loaded = cls(**arrays, count=count)
        keys, offsets = loaded.keys, loaded.offsets
        fits = (
            0 <= count < 1 << 32
            and len(offsets) == len(keys) + 1
            and len(loaded.best) == len(keys)
            and len(loaded.rows) == len(loaded.weights)
        )
        if not (
            fits
            and int(offsets[0]) == 0
            and int(offsets[-1]) == len(loaded.rows)
            and bool((offsets[1:] > offsets[:-1]).all())
            and bool((keys[1:] > keys[:-1]).all())
        ):
            raise IndexFormatError(
                f"{where}: keys, offsets, rows and weights do not fit each other. Rebuild this"
                " release."
            )
        return loaded
