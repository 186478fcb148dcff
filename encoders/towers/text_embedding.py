"""Embed an entity's texts and engaged queries by a frozen query tower, as an input feature.

It stands where the paper has PinSage and ItemSage: a continuous feature made before training.
Unlike those it costs a transformer pass per distinct text; vectors are cached per process, and in
the folder that ``OMNI_TEXT_VECTORS`` names, so training, evaluation and rebuild embed a text once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.errors import BundleError
from encoders.progress import Progress
from encoders.text.entity_texts import entity_texts
from encoders.text.normal_forms import normalize_query
from encoders.towers.pretrained_models import create_query_encoder
from encoders.towers.query_tower import QueryEncoder
from encoders.towers.shipped_tower import SHIPPED_TOWERS, copy_packed, is_packed
from encoders.vector_cache import TEXT_VECTORS, VectorCache

log = logging.getLogger(__name__)

TITLE_WEIGHT = 0.5
"""Weight of the title beside the mean of the engaged queries."""
TEXT_EMBEDDING_FIELDS = ("title", "engaged_queries")
"""Fields that are always read."""
FULL_TEXT_FIELDS = ("title", "description", "category", "board_titles")
"""Fields of the full text, in this order; engaged queries may follow."""
CACHED_TEXTS = 1_000_000
"""Most texts whose vectors are cached from call to call, about 0.7 GiB.

Beyond that only the texts of the present call stay.
"""
_ENGAGED = {"engaged_queries": pl.List(pl.String)}
_PART = 1024
"""Texts embedded between two checks of the time; what an interrupted run loses at most."""


class TextEmbedding:
    """Mixes the vectors of title, engaged queries and full text under a frozen query tower.

    The formula is ``unit(unit(mean of engaged queries) + 0.5 * title + w * full text)``.

    The full text is title, description, category, boards and the first engaged queries in one
    sentence-like string: read together they tell more than apart, most of all where an entity has
    few engaged queries.

    Args:
        tower: A shipped tower's name, a folder, or a Hugging Face name.
    """

    def __init__(self, tower: str) -> None:
        self.encoder: QueryEncoder = create_query_encoder(tower, None).eval()
        self._cache: dict[str, npt.NDArray[np.float16]] = {}
        self._lock = threading.Lock()  # tokenizers are not safe under threads
        self._kept = self._open_kept(tower)

    @property
    def dimension(self) -> int:
        """Width of the vectors, D."""
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
        titles = [""] * rows
        if "title" in catalogue.columns:
            titles = catalogue["title"].cast(pl.String).fill_null("").to_list()
        queries = _lists(catalogue, "engaged_queries")
        owner = np.repeat(np.arange(rows), [len(texts) for texts in queries])
        flat = [text for texts in queries for text in texts]
        full: list[str] = []
        if full_text_weight:
            full = _full_texts(catalogue, [texts[:full_text_queries] for texts in queries])
        vectors = self._vectors([*titles, *flat, *full])
        engaged = np.zeros((rows, self.dimension), np.float32)
        np.add.at(engaged, owner, vectors[rows : rows + len(flat)])
        mixed = _unit(engaged) + TITLE_WEIGHT * vectors[:rows]
        if full:
            mixed += full_text_weight * vectors[rows + len(flat) :]
        return _unit(mixed)

    def _vectors(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Look the texts' vectors up, (N, D) float32; texts that are not cached are embedded."""
        texts = [normalize_query(text) for text in texts]
        with self._lock:
            fresh = [text for text in dict.fromkeys(texts) if text and text not in self._cache]
            if len(self._cache) + len(fresh) > CACHED_TEXTS:
                self._cache = {text: self._cache[text] for text in set(texts) & self._cache.keys()}
            if self._kept is not None:
                known = self._kept.find(fresh)
                self._cache.update(known)
                fresh = [text for text in fresh if text not in known]
            progress = Progress(log, "embed texts with the frozen tower", len(fresh), unit="texts")
            for start in range(0, len(fresh), _PART):
                part = fresh[start : start + _PART]
                vectors = self.encoder.encode(part).astype(np.float16)
                self._cache.update(zip(part, vectors, strict=True))
                if self._kept is not None:
                    self._kept.add(part, vectors)
                progress.add(len(part))
            self._cache.setdefault("", np.zeros(self.dimension, np.float16))
            return np.stack([self._cache[text] for text in texts]).astype(np.float32)

    def _open_kept(self, tower: str) -> VectorCache | None:
        """Open the folder that the environment names, for these very files of a tower."""
        folder, fingerprint = os.environ.get(TEXT_VECTORS, ""), tower_fingerprint(tower)
        if not folder or not fingerprint:
            return None
        return VectorCache(Path(folder) / fingerprint[:16], self.dimension, CACHED_TEXTS)


_EMBEDDINGS: dict[str, TextEmbedding] = {}
"""Fingerprint, or for a hub model name, of a tower -> its text embedding."""
_KEPT_EMBEDDINGS = 4


def text_embedding(tower: str, fingerprint: str = "") -> TextEmbedding:
    """Return this process's one text embedding for a tower, wherever its files lie.

    Args:
        tower: A shipped tower's name, a folder, or a Hugging Face name.
        fingerprint: What its files must hold; empty: anything.

    Raises:
        BundleError: The files are not those of the fingerprint, or are gone.
    """
    key = fingerprint or tower_fingerprint(tower) or tower
    if key not in _EMBEDDINGS:
        found = tower_fingerprint(tower)
        if fingerprint not in ("", found):
            raise BundleError(other_tower(tower, found, fingerprint))
        while len(_EMBEDDINGS) >= _KEPT_EMBEDDINGS:
            del _EMBEDDINGS[next(iter(_EMBEDDINGS))]
        _EMBEDDINGS[key] = TextEmbedding(tower)
    return _EMBEDDINGS[key]


def other_tower(tower: str, found: str, expected: str) -> str:
    """Word the error of a frozen tower that is not the one a feature was made with."""
    if not found:
        return (
            f"the text embedding {tower!r} (fingerprint {expected[:16]}) is not there. Bundles of"
            " version 0.1 read it from where they were trained: put it there, or train again"
        )
    return (
        f"the text embedding {tower!r} has fingerprint {found[:16]}, but these features were made"
        f" with {expected[:16]}: copy the whole bundle again, use the version of omnisearchsage"
        " that made it, or train again"
    )


def tower_fingerprint(tower: str) -> str:
    """Hash a tower's files (SHA-256, 64 hex digits).

    Empty for a tower that is neither shipped nor a folder.
    """
    folder = SHIPPED_TOWERS.get(tower, Path(tower))
    if not folder.is_dir():
        return ""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    states = tuple((file, (s := file.stat()).st_size, s.st_mtime_ns) for file in files)
    return _hash_files(folder, states)


@lru_cache(maxsize=16)
def _hash_files(folder: Path, states: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash names and contents; sizes and times tell whether files are still those hashed."""
    digest = hashlib.sha256()
    for file, _, _ in states:
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest() if states else ""


def save_tower(tower: str, fingerprint: str, folder: Path) -> None:
    """Write a frozen tower into ``folder``, in a form that ``create_query_encoder`` reads.

    Args:
        tower: A shipped tower's name, a folder, or a Hugging Face name.
        fingerprint: Of the tower that is meant; empty for a Hugging Face name.
        folder: To write to.

    Raises:
        BundleError: The tower's files changed, and this process has not read them before.
    """
    source = SHIPPED_TOWERS.get(tower, Path(tower))
    if is_packed(source) and tower_fingerprint(tower) == fingerprint:
        copy_packed(source, folder)
    else:
        text_embedding(tower, fingerprint).encoder.save(folder)


def _full_texts(catalogue: pl.DataFrame, queries: list[list[str]]) -> list[str]:
    """Join the fields of the full text and these queries to one text per row."""
    engaged = pl.DataFrame({"engaged_queries": queries}, schema=_ENGAGED)
    read = catalogue.select(name for name in FULL_TEXT_FIELDS if name in catalogue.columns)
    columns = (*FULL_TEXT_FIELDS, "engaged_queries")
    return entity_texts(pl.concat([read, engaged], how="horizontal"), columns)


def _lists(catalogue: pl.DataFrame, name: str) -> list[list[str]]:
    if name not in catalogue.columns or not isinstance(catalogue[name].dtype, pl.List):
        return [[] for _ in range(catalogue.height)]
    return [[text for text in texts or [] if text] for texts in catalogue[name].to_list()]


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale rows to unit length; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = vectors / np.maximum(norms, 1e-6)
    return scaled
