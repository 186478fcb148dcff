"""Data sets with stand-ins for PinSage, ItemSage and visual vectors.

Multilingual USE of an entity's text stands in for PinSage and ItemSage, a thumbnail of its picture
for the visual vector.

Both are made once per work folder. USE gives 512 numbers and the towers 256, and a compatibility
task compares them directly, so USE vectors are projected to their 256 strongest directions (no
centring: inner products stay).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.commands.console import stage
from encoders.datasets.dataset import Dataset, load_dataset, load_sample
from encoders.datasets.related_queries import related_query_pairs
from encoders.enrichment.captions import decode_image
from encoders.evaluation.baselines import unit_rows, use_encoder
from encoders.text.entity_texts import entity_texts

Float32 = npt.NDArray[np.float32]

FROZEN, VISUAL = "frozen", "visual"
FROZEN_WIDTH = 256
FROZEN_FIELDS = ("title", "category", "board_titles")
"""What USE reads: text about the entity, never its queries."""
THUMBNAIL = 8
VISUAL_WIDTH = 3 * THUMBNAIL**2


@dataclass(frozen=True)
class TableData:
    """What every training and evaluation of the tables reads."""

    dataset: Dataset
    """Its catalogue has the columns ``frozen`` (256) and, where there are pictures, ``visual``
    (192). Its pairs hold the derived related queries, too."""
    projection: Float32
    """``(512, 256)``: USE to the frozen space."""

    @property
    def continuous(self) -> Mapping[str, int]:
        """Vector columns that the entity tower reads, with their widths."""
        widths = {FROZEN: FROZEN_WIDTH, VISUAL: VISUAL_WIDTH}
        return {
            name: width for name, width in widths.items() if name in self.dataset.catalogue.columns
        }


def load_table_data(work: Path, data_dir: Path | None = None) -> TableData:
    """Load the sample or the larger data below ``data_dir``, with vectors cached in ``work``.

    The larger data has no pictures; the vectors are made once and stored in ``work/vectors.npz``.
    """
    source = load_sample() if data_dir is None else load_dataset(data_dir)
    path = work / "vectors.npz"
    if not path.is_file():
        _make_vectors(source, path)
    with np.load(path) as arrays:
        vectors = {name: arrays[name] for name in (FROZEN, VISUAL) if name in arrays}
        projection = arrays["projection"]
    pairs = pl.concat((source.pairs, related_query_pairs(source.pairs)), how="diagonal_relaxed")
    catalogue = source.catalogue.with_columns(
        vector_column(name, column) for name, column in vectors.items()
    )
    return TableData(Dataset(catalogue, pairs, {}, source.groups, source.name), projection)


def vector_column(name: str, vectors: Float32) -> pl.Series:
    """``(N, D)`` as a list column."""
    return pl.Series(
        name, vectors.astype(np.float32), dtype=pl.Array(pl.Float32, vectors.shape[1])
    ).cast(pl.List(pl.Float32))


def _make_vectors(source: Dataset, path: Path) -> None:
    with stage("multilingual USE of titles, categories and boards; thumbnails of pictures"):
        vectors = unit_rows(
            use_encoder()(entity_texts(source.catalogue, FROZEN_FIELDS))
        )  # (N, 512)
        projection = np.linalg.svd(vectors, full_matrices=False)[2][:FROZEN_WIDTH].T.astype(
            np.float32
        )  # (512, 256)
        # Numbers of about 1, like those of the n-gram part of the tower; a compatibility task
        # normalises them.
        frozen = unit_rows(vectors @ projection) * np.float32(FROZEN_WIDTH**0.5)
        arrays = {FROZEN: frozen, "projection": projection}
        if source.images:
            blank = np.zeros(VISUAL_WIDTH, np.float32)
            ids = source.catalogue["id"].to_list()
            arrays[VISUAL] = np.stack(
                [_thumbnail(source.images[i]) if i in source.images else blank for i in ids]
            )
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.replace(path)


def _thumbnail(svg: str) -> Float32:
    image = decode_image(svg.encode(), 4 * THUMBNAIL).resize((THUMBNAIL, THUMBNAIL))
    thumbnail: Float32 = np.asarray(image, dtype=np.float32).ravel() / np.float32(127.5) - 1
    return thumbnail


def use_queries(texts: list[str], projection: Float32) -> Float32:
    """Queries under USE in the frozen space, unit rows ``(Q, 256)``: the zero-shot reference."""
    vectors: Float32 = unit_rows(unit_rows(use_encoder()(texts)) @ projection).astype(np.float32)
    return vectors
