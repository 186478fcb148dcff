"""Hash the words and character n-grams of queries into buckets, for the query tower.

Needs numpy alone, so that serving, which imports no torch, reads queries as training does. What is
a word, and what is visible, are the rules of ``encoders.text.ngrams`` (``TEXT_RULES``); a character
n-gram runs over the visible characters of one run, with a space on both sides, so those of scripts
without spaces run over words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from encoders.text.hashing import UInt64, splitmix64_finalise
from encoders.text.ngrams import SEPARATOR, find_words, visible_codes
from encoders.text.normal_forms import normalize_query

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

ORDERS = (2, 3, 4)
"""Lengths of the character n-grams."""
MAX_CHARACTERS = 128
"""Characters of a query that are read; a tower reads at most 64 tokens."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_SALTS = {n: np.uint64(0xD1B54A32D192ED03 * n % 2**64) for n in ORDERS}


def ngram_buckets(texts: Sequence[str], buckets: int) -> tuple[Int32, Int64]:
    """Find the distinct buckets of each text's words and character n-grams.

    Args:
        texts: Any strings; they are brought to the normal form of queries.
        buckets: Number of buckets, a power of two.

    Returns:
        ``ids`` int32 ``(T,)`` in ``[0, buckets)`` and ``offsets`` int64 ``(len(texts) + 1,)``: text
        i owns ``ids[offsets[i]:offsets[i + 1]]``, ascending.
    """
    offsets = np.zeros(len(texts) + 1, np.int64)
    if not len(texts):
        return np.empty(0, np.int32), offsets
    codes, classes = visible_codes([normalize_query(text)[:MAX_CHARACTERS] for text in texts])
    # A separator before the first text, as there is one behind each.
    codes, classes = np.append(np.uint32(0), codes), np.append(np.uint8(SEPARATOR), classes)
    ends = np.flatnonzero(codes == 0)[1:]
    words = find_words(codes, classes)
    keys, places = [words.keys], [words.starts]
    visible = classes != SEPARATOR
    spaced = np.where(visible, codes, np.uint32(32)).astype(np.uint64)
    for n in ORDERS:
        found, starts = _windows(spaced, visible, n)
        keys.append(found)
        places.append(starts + 1)  # the second character is in the text, or the end of it
    owner = np.searchsorted(ends, np.concatenate(places))
    bucket = np.concatenate(keys) & np.uint64(buckets - 1)
    pairs = np.unique(owner.astype(np.int64) * buckets + bucket.astype(np.int64))
    np.cumsum(np.bincount(pairs // buckets, minlength=len(texts)), out=offsets[1:])
    return (pairs % buckets).astype(np.int32), offsets


def _windows(spaced: UInt64, visible: npt.NDArray[np.bool_], n: int) -> tuple[UInt64, Int64]:
    """Hash every run of ``n`` characters that is visible but for its ends, with its start."""
    count = max(len(spaced) - n + 1, 0)
    is_ngram = np.ones(count, bool) if n > 2 else visible[:count] | visible[1 : 1 + count]
    for j in range(1, n - 1):
        is_ngram &= visible[j : j + count]
    starts = np.flatnonzero(is_ngram)
    with np.errstate(over="ignore"):
        key = np.full(len(starts), _SALTS[n])
        for j in range(n):
            key = key * _BASE + spaced[starts + j]
    return splitmix64_finalise(key), starts


def padded(ids: Int32, offsets: Int64, rows: Int64 | Sequence[int], buckets: int) -> Int64:
    """Put the buckets of some texts into one rectangle, int64 ``(len(rows), most)``.

    ``most`` is at least 1; ``buckets``, one past the last, fills the ends.
    """
    first = offsets[rows]
    lengths = offsets[np.asarray(rows) + 1] - first
    columns = np.arange(max(1, int(lengths.max(initial=1))))
    inside = columns < lengths[:, None]
    places = np.where(inside, first[:, None] + columns, 0)
    return np.where(inside, ids[places] if len(ids) else buckets, buckets).astype(np.int64)
