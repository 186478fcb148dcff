"""Blocks of a file, cut where its content says so: equal content gives equal blocks anywhere.

A cut follows each window of 32 bytes whose hash meets a condition, so that rows put in, left out or
changed move the cuts beside them only. Windows begin at multiples of 4 bytes, as the rows of all
large files of a release do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MEAN_BYTES = 4096
"""Expected length of a block: a few rows, since one changed row changes its whole block."""
MIN_BYTES = MEAN_BYTES // 4
MAX_BYTES = MEAN_BYTES * 4
DIGEST_BYTES = 16
BLOCK = np.dtype([("digest", "S16"), ("pack", "<u4"), ("length", "<u4"), ("offset", "<u8")])
"""A block: its name, the number of its pack in a recipe, its bytes, and where they begin there."""
_WORD = 4
_WINDOW_WORDS = 8
_BASE = 0x9E3779B1
_MIX = np.uint32(0x85EBCA6B)
_STEP_WORDS = 1 << 18


def map_file(path: Path) -> np.ndarray:
    """Map a file as uint8; an empty one is an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def digest_of(block: bytes | memoryview) -> bytes:
    """Return the name of a block: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(block, digest_size=DIGEST_BYTES).digest()


def cut_blocks(content: np.ndarray) -> np.ndarray:
    """Cut a file; return its blocks in order, of type ``BLOCK``, the file itself as their pack."""
    borders = list(cut(content))
    blocks = np.zeros(len(borders), BLOCK)
    blocks["digest"] = [digest_of(content[start:end].data) for start, end in borders]
    blocks["length"] = [end - start for start, end in borders]
    blocks["offset"] = [start for start, _ in borders]
    return blocks


def by_digest(blocks: np.ndarray) -> np.ndarray:
    """Return one block of each digest, sorted for ``find_blocks``."""
    return blocks[np.unique(blocks["digest"], return_index=True)[1]]


def find_blocks(known: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Look digests up in what ``by_digest`` returned.

    Returns:
        found: bool, one a digest.
        places: Where in ``known`` those lie that were found.
    """
    places = np.searchsorted(known["digest"], digests)
    found = places < len(known)
    found[found] = known["digest"][places[found]] == digests[found]
    return found, places[found]


def cut(content: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield start and end of each block of ``content``, uint8 ``(bytes,)``, in order."""
    start = 0
    for end in _candidates(content):
        while end - start > MAX_BYTES:
            yield start, start + MAX_BYTES
            start += MAX_BYTES
        if end - start >= MIN_BYTES:
            yield start, end
            start = end
    for begin in range(start, len(content), MAX_BYTES):
        yield begin, min(begin + MAX_BYTES, len(content))


def _candidates(content: np.ndarray) -> Iterator[int]:
    """Yield the offsets behind windows whose hash meets the condition."""
    words = len(content) // _WORD
    limit = np.uint32((1 << 32) // (MEAN_BYTES // _WORD))
    for first in range(0, words, _STEP_WORDS):
        begin = max(0, first - _WINDOW_WORDS + 1)
        last = min(first + _STEP_WORDS, words)
        hashes = _window_hashes(content[begin * _WORD : last * _WORD].view("<u4"))
        ends = begin + np.flatnonzero(hashes * _MIX < limit) + _WINDOW_WORDS
        yield from (ends * _WORD).tolist()


def _window_hashes(words: np.ndarray) -> np.ndarray:
    """Return a polynomial hash, modulo 2**32, of each 8 consecutive words; uint32."""
    hashes: np.ndarray = (words ^ (words >> np.uint32(15))) * _MIX
    hashes ^= hashes >> np.uint32(13)
    span = 1
    while span < _WINDOW_WORDS and len(hashes) > span:
        factor = np.uint32(pow(_BASE, span, 1 << 32))
        hashes = hashes[span:] + hashes[:-span] * factor
        span *= 2
    if span < _WINDOW_WORDS:
        return np.empty(0, np.uint32)
    hashes ^= hashes >> np.uint32(16)
    return hashes
