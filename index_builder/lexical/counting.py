"""Count the terms of catalogue rows, field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from index_builder.lexical.postings import TermCounts
from index_builder.lexical.terms import text_terms

TEXT_FIELDS = (
    "title",
    "description",
    "caption",
    "brand",
    "category",
    "color",
    "material",
    "pattern",
    "size",
    "sku",
    "board_titles",
    "engaged_queries",
)
"""Catalogue columns whose words are indexed."""
_BATCH_ROWS = 4_096


def text_fields(frame: pl.DataFrame | None) -> dict[str, list[str]]:
    """Return the text columns of catalogue rows by name, one text a row.

    Items of lists are joined by line breaks; nulls are empty. Columns without any text are left
    out.

    Args:
        frame: Catalogue rows; None: no columns.
    """
    fields: dict[str, list[str]] = {}
    for name in TEXT_FIELDS if frame is not None else ():
        assert frame is not None
        if name not in frame.columns:
            continue
        column = frame[name]
        if column.dtype == pl.List(pl.String):
            column = column.list.join("\n", ignore_nulls=True)
        if column.dtype == pl.String and column.null_count() < len(column):
            fields[name] = column.fill_null("").to_list()
    return fields


def attribute_texts(values: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the texts among attribute values, as ``text_fields`` does of a table.

    Args:
        values: Attributes of live entries, one dictionary a row.
    """
    fields: dict[str, list[str]] = {}
    for name in TEXT_FIELDS:
        texts = [_text_of(row.get(name)) for row in values]
        if any(texts):
            fields[name] = texts
    return fields


def _text_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(item for item in value if isinstance(item, str))
    return ""


def count_terms(
    fields: Mapping[str, Sequence[str]], weights: Mapping[str, float], rows: int
) -> TermCounts:
    """Count the terms of texts.

    Args:
        fields: Field -> one text a row.
        weights: Field -> how often an occurrence in it counts; 1 where there is none.
        rows: N.
    """
    parts = []
    lengths = np.zeros(rows, np.float32)
    for start in range(0, rows, _BATCH_ROWS):
        stop = min(start + _BATCH_ROWS, rows)
        part = _count_batch(fields, weights, start, stop)
        parts.append(part)
        lengths[start:stop] = np.bincount(
            part[1] - np.uint32(start), weights=part[2], minlength=stop - start
        )
    if not parts:
        none = np.zeros(0, np.uint32)
        return TermCounts(
            keys=np.zeros(0, np.uint64), rows=none, counts=none.astype(np.float32), lengths=lengths
        )
    keys, numbers, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    # Stable: rows ascend from batch to batch, so they stay in order within a term
    order = np.argsort(keys, kind="stable")
    return TermCounts(keys=keys[order], rows=numbers[order], counts=counts[order], lengths=lengths)


def _count_batch(
    fields: Mapping[str, Sequence[str]], weights: Mapping[str, float], start: int, stop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return keys, rows and counts of some rows, ordered by key and then by row."""
    keys, rows, counts = [], [], []
    for name, texts in fields.items():
        found, sizes = text_terms(texts[start:stop])
        keys.append(found)
        rows.append(np.repeat(np.arange(start, stop, dtype=np.uint32), sizes))
        counts.append(np.full(len(found), weights.get(name, 1.0), np.float32))
    if not keys:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint32), np.zeros(0, np.float32)
    key, row, count = np.concatenate(keys), np.concatenate(rows), np.concatenate(counts)
    order = np.lexsort((row, key))
    key, row, count = key[order], row[order], count[order]
    is_first = np.ones(len(key), np.bool_)
    is_first[1:] = (key[1:] != key[:-1]) | (row[1:] != row[:-1])
    starts = np.flatnonzero(is_first)
    summed = np.add.reduceat(count, starts) if len(starts) else count
    return key[starts], row[starts], summed.astype(np.float32)
