"""Hold what training and serving must agree on about a query tower, without importing torch."""

from __future__ import annotations

MAX_TOKENS = 64
"""Longer queries are cut (paper: at most 64 tokens)."""

NGRAM_SETTINGS = "ngrams.json"
"""File in ``query_encoder/`` of a tower that also reads n-grams; ``buckets`` is their number."""

FORM_FILES = {"onnx-fp32": "query_encoder.onnx", "onnx-int8": "query_encoder.int8.onnx"}
"""Runtime form -> its file in the folder ``forms/`` of a bundle or release."""
