"""Texts dealt into buckets that stay the same on every machine and run: for holding queries back and for cross-fitting."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.count_min_sketch import hash_texts, mix64
from encoders.text import fold, normalize_query


def text_bucket(texts: pl.Series, seed: int, buckets: int) -> npt.NDArray[np.int64]:
    """A stable bucket of each text's folded form, int64 ``(N,)`` in ``[0, buckets)``: texts that fold alike share one."""
    return (mix64(hash_texts(fold(normalize_query(text)) for text in texts.to_list()), seed) % np.uint64(buckets)).astype(np.int64)
