"""Hash texts and keys to values that are the same on every machine and run."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import polars as pl
import xxhash

from encoders.text.normal_forms import folded_queries

UInt64 = npt.NDArray[np.uint64]

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""SplitMix64's increment: 2**64 divided by the golden ratio, made odd."""


def text_bucket(texts: pl.Series, seed: int, buckets: int) -> npt.NDArray[np.int64]:
    """Deal each text into one of ``buckets`` by its folded form, int64 ``(N,)``.

    Texts that ``fold_query`` makes equal share a bucket.
    """
    keys = hash_texts(folded_queries(texts.to_list()))
    return (seeded_hash(keys, seed) % np.uint64(buckets)).astype(np.int64)


def hash_texts(texts: Iterable[str]) -> UInt64:
    """Hash strings to 64-bit keys (xxh3), uint64 ``(N,)``."""
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts),
        dtype=np.uint64,
    )


def splitmix64_finalise(values: UInt64) -> UInt64:
    """Mix the bits of 64-bit integers with SplitMix64's finaliser.

    A bijection, in which every output bit depends on every input bit; 0 stays 0.

    Args:
        values: uint64, any shape.

    Returns:
        uint64, same shape.
    """
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def seeded_hash(keys: npt.NDArray[np.unsignedinteger], seed: int = 0) -> UInt64:
    """Hash 64-bit keys to values that look uniform and independent between seeds.

    Output ``seed`` (from 0) of a SplitMix64 generator whose state is the key.

    Args:
        keys: Any shape.
        seed: Any integer.

    Returns:
        uint64, same shape.
    """
    with np.errstate(over="ignore"):
        state = keys.astype(np.uint64) + np.uint64(_GOLDEN_GAMMA * (seed + 1) % 2**64)
    return splitmix64_finalise(state)


def combine_keys(first: UInt64, second: UInt64) -> UInt64:
    """Hash pairs of keys, such as (query, entity), to one key each; uint64 ``(N,)``."""
    with np.errstate(over="ignore"):
        return seeded_hash(seeded_hash(first, 17) + np.uint64(3) * second.astype(np.uint64), 23)
