"""A pre-existing embedding for entities that have none: a frozen query tower's view of an entity's texts and engaged queries.

It stands where the paper has PinSage and ItemSage: a continuous feature made before training.
Unlike those it costs a transformer pass per distinct text; vectors are kept per process, so a text
that many entities share is embedded once.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.text.entity_texts import entity_texts
from encoders.text.normal_forms import normalize_query
from encoders.towers.query_tower import QueryEncoder, create_query_encoder
from encoders.towers.shipped_tower import SHIPPED_TOWERS

log = logging.getLogger(__name__)

TITLE_WEIGHT = 0.5
"""Weight of the title beside the mean of the engaged queries."""
TEXT_EMBEDDING_FIELDS = ("title", "engaged_queries")
"""Fields that are always read."""
FULL_TEXT_FIELDS = ("title", "description", "category", "board_titles")
"""Fields that are read together as one text, then the first engaged queries if some are asked for."""
KEPT_TEXTS = 1_000_000
"""Texts whose vectors are kept from call to call, about 0.7 GiB; beyond that only those of the call at hand stay."""
_ENGAGED = {"engaged_queries": pl.List(pl.String)}
_PART = 8192
"""Texts embedded between two looks at the clock."""
_PROGRESS_SECONDS = 10.0
"""Time between two progress lines of a long call."""


class TextEmbedding:
    """``unit(unit(mean of the engaged queries' vectors) + 0.5 * title + w * full text)`` under a frozen query tower.

    The full text is title, description, category, boards and the first engaged queries in one
    sentence-like string: read together they tell more than apart, most of all where an entity has
    few engaged queries.

    Args:
        tower: A shipped tower's name, a folder, or a Hugging Face name.
    """

    def __init__(self, tower: str) -> None:
        self.encoder: QueryEncoder = create_query_encoder(tower).eval()
        self._known: dict[str, npt.NDArray[np.float16]] = {}
        self._lock = threading.Lock()  # tokenizers are not safe under threads

    @property
    def dimension(self) -> int:
        """D."""
        return self.encoder.dimension

    def __call__(
        self, catalogue: pl.DataFrame, full_text_weight: float = 0.0, full_text_queries: int = 0
    ) -> npt.NDArray[np.float32]:
        """Embed rows by their texts (absent or empty: left out; all: zeros).

        Args:
            catalogue: N rows with ``title``, ``engaged_queries`` and, for the full text,
                ``FULL_TEXT_FIELDS``.
            full_text_weight: ``w``; 0 leaves the full text out.
            full_text_queries: Engaged queries that the full text holds, at most; the tower reads
                no more than 64 tokens of it.

        Returns:
            float32 (N, D), unit rows or zeros.
        """
        rows = catalogue.height
        titles = (
            catalogue["title"].cast(pl.String).fill_null("").to_list()
            if "title" in catalogue.columns
            else [""] * rows
        )
        queries = _lists(catalogue, "engaged_queries")
        owner = np.repeat(np.arange(rows), [len(texts) for texts in queries])
        flat = [text for texts in queries for text in texts]
        full: list[str] = []
        if full_text_weight:
            first = pl.DataFrame(
                {"engaged_queries": [texts[:full_text_queries] for texts in queries]},
                schema=_ENGAGED,
            )
            read = catalogue.select(name for name in FULL_TEXT_FIELDS if name in catalogue.columns)
            full = entity_texts(
                pl.concat([read, first], how="horizontal"), (*FULL_TEXT_FIELDS, "engaged_queries")
            )
        vectors = self._vectors([*titles, *flat, *full])
        engaged = np.zeros((rows, self.dimension), np.float32)
        np.add.at(engaged, owner, vectors[rows : rows + len(flat)])
        mixed = _unit(engaged) + TITLE_WEIGHT * vectors[:rows]
        if full:
            mixed += full_text_weight * vectors[rows + len(flat) :]
        return _unit(mixed)

    def _vectors(self, texts: list[str]) -> npt.NDArray[np.float32]:
        texts = [normalize_query(text) for text in texts]
        with self._lock:
            fresh = [text for text in dict.fromkeys(texts) if text and text not in self._known]
            if len(self._known) + len(fresh) > KEPT_TEXTS:
                self._known = {text: self._known[text] for text in set(texts) & self._known.keys()}
            reported = time.monotonic()
            for start in range(0, len(fresh), _PART):
                part = fresh[start : start + _PART]
                self._known.update(
                    zip(part, self.encoder.encode(part).astype(np.float16), strict=True)
                )
                if time.monotonic() - reported > _PROGRESS_SECONDS:
                    reported = time.monotonic()
                    done = start + len(part)
                    log.info(f"frozen tower: {done:,} of {len(fresh):,} texts embedded")
            self._known.setdefault("", np.zeros(self.dimension, np.float16))
            return np.stack([self._known[text] for text in texts]).astype(np.float32)


@lru_cache(maxsize=4)
def text_embedding(tower: str) -> TextEmbedding:
    """The one text embedding of this process for a tower."""
    return TextEmbedding(tower)


@lru_cache(maxsize=4)
def tower_fingerprint(tower: str) -> str:
    """SHA-256 (64 hex digits) over a tower's files; empty for one that is neither shipped nor a folder."""
    folder = SHIPPED_TOWERS.get(tower, Path(tower))
    digest = hashlib.sha256()
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest() if files else ""


def _lists(catalogue: pl.DataFrame, name: str) -> list[list[str]]:
    if name not in catalogue.columns or not isinstance(catalogue[name].dtype, pl.List):
        return [[] for _ in range(catalogue.height)]
    return [[text for text in texts or [] if text] for texts in catalogue[name].to_list()]


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows scaled to unit length; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = vectors / np.maximum(norms, 1e-6)
    return scaled
