"""Turn texts into terms: folded words and the character n-grams of each run, as 64-bit keys.

A text is split by ``encoders.text.words``, so that BM25 here, the baselines and board titles agree
on what a word is. A run is padded with a space on both sides before it is cut into n-grams, so that
a gram at the border of a word is another term than the same letters inside one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import xxhash

from encoders.text.hashing import UInt64
from encoders.text.words import runs_of, words_of

TOKENISER = "words and 3-4-grams, 1"
"""Name of these rules; raise the number when a text would get other terms."""
GRAM_SIZES = (3, 4)
MAX_QUERY_CHARACTERS = 1_000
"""A longer query is cut: its terms bound the work of a search."""
MAX_QUERY_TERMS = 256
"""At most this many distinct terms of a query count, the rarest of those that are known."""
_GRAM_BIT = 1
"""The lowest bit of a key tells n-grams (1) from words (0)."""
_CACHED_RUN = 64
"""Runs up to this length are remembered; longer ones are rare and large."""


def text_terms(texts: Sequence[str]) -> tuple[UInt64, np.ndarray]:
    """Return the terms of texts, with repeats.

    Args:
        texts: Any strings.

    Returns:
        Keys uint64 ``(M,)``, those of the first text first, and int64 ``(texts,)`` how many each
        text has.
    """
    encoded = [b"".join([_run_keys(run) for run in runs_of(text)]) for text in texts]
    counts = np.fromiter((len(keys) // 8 for keys in encoded), np.int64, len(encoded))
    return np.frombuffer(b"".join(encoded), dtype="<u8"), counts


def query_terms(text: str) -> UInt64:
    """Return the distinct terms of a query, ascending keys uint64 ``(T,)``."""
    keys, _ = text_terms([text[:MAX_QUERY_CHARACTERS]])
    return np.unique(keys)


def are_grams(keys: UInt64) -> np.ndarray:
    """Return which terms are character n-grams, bool ``(T,)``; the others are words."""
    return (keys & np.uint64(_GRAM_BIT)).astype(np.bool_)


def _run_keys(run: str) -> bytes:
    return _cached_run_keys(run) if len(run) <= _CACHED_RUN else _make_run_keys(run)


def _make_run_keys(run: str) -> bytes:
    """Return the keys of a run's words and n-grams as little-endian bytes."""
    padded = f" {run} "
    grams = [
        padded[start : start + size]
        for size in GRAM_SIZES
        for start in range(len(padded) - size + 1)
    ]
    keys = [_digest(word) & ~_GRAM_BIT for word in words_of(run)]
    keys += [_digest(gram) | _GRAM_BIT for gram in grams]
    return np.array(keys, dtype="<u8").tobytes()


_cached_run_keys = functools.lru_cache(maxsize=1 << 15)(_make_run_keys)


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
