"""Texts dealt into buckets that stay the same on every machine and run: for holding queries back and for cross-fitting."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import polars as pl
import xxhash

from encoders.text.normal_forms import fold, normalize_query


def text_bucket(texts: pl.Series, seed: int, buckets: int) -> npt.NDArray[np.int64]:
    """A stable bucket of each text's folded form, int64 ``(N,)`` in ``[0, buckets)``: texts that fold alike share one."""
    return (
        mix64(hash_texts(fold(normalize_query(text)) for text in texts.to_list()), seed)
        % np.uint64(buckets)
    ).astype(np.int64)


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """Stable 64-bit keys of strings (xxh3), uint64 ``(N,)``; the same on every machine and run."""
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts),
        dtype=np.uint64,
    )


def mix64(keys: np.ndarray, seed: int = 0) -> np.ndarray:
    """Scatter 64-bit keys over all 64-bit values (the splitmix64 finaliser), uint64 of the same shape."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(
            (0x9E3779B97F4A7C15 * (seed + 1)) & 0xFFFFFFFFFFFFFFFF
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def combine_keys(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One key per pair of keys, order mattering: the key of ``(query, entity)``. uint64 ``(N,)``."""
    with np.errstate(over="ignore"):
        return mix64(mix64(first, 17) + np.uint64(3) * second.astype(np.uint64), 23)
