"""Load the tables of a training run: files that a config names, a data folder, or the sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from encoders.config.train_config import TrainConfig
from encoders.datasets.dataset import DEFAULT_ENGAGED_QUERIES, load_dataset
from encoders.datasets.related_queries import related_query_pairs
from encoders.errors import ConfigError
from encoders.tables.files import read_table
from encoders.tables.parts import check_shapes, join_frames

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """The tables that a run learns from.

    Attributes:
        catalogue: Entities of all types, as the table ``catalogue``.
        pairs: ``query``, ``entity_type``, ``entity_id``; optional ``count`` (1), ``action``,
            ``language``, ``split`` (``train``). Rows whose split is neither ``train`` nor the
            validation split are not looked at. Related-query pairs have entity type ``query``, and
            ``entity_id`` is the text of the candidate query (no catalogue row needed).
    """

    catalogue: pl.DataFrame
    pairs: pl.DataFrame


def load_training_data(config: TrainConfig, data_dir: Path | None = None) -> TrainingData:
    """Read catalogue and pairs; derive related-query pairs where they are wanted and missing.

    Args:
        config: ``config.data`` names the files; both lists empty: the data set below ``data_dir``,
            or the sample.
        data_dir: Folder of the larger data set.

    Raises:
        ConfigError: Only one of catalogue and pairs is named.
        DataError: A table cannot be read or breaks its schema.
    """
    files = config.data
    if bool(files.catalogue) != bool(files.pairs):
        raise ConfigError(
            "data.catalogue and data.pairs belong together: name both, or neither for the sample"
            " data."
        )
    if files.catalogue:
        catalogue, pairs = _read(files.catalogue, "catalogue"), _read(files.pairs, "pairs")
    else:
        depth = config.features.engaged_queries or DEFAULT_ENGAGED_QUERIES
        dataset = load_dataset(data_dir, engaged_queries=depth)
        catalogue, pairs = dataset.catalogue, dataset.pairs
    wants_queries = any(d.entity_type == "query" for d in config.datasets) or (
        not config.datasets and not files.catalogue
    )
    if files.related_queries and wants_queries and not (pairs["entity_type"] == "query").any():
        pairs = _with_related_queries(pairs)
    return TrainingData(catalogue, pairs)


def _read(paths: Sequence[Path], table: str) -> pl.DataFrame:
    frames = [read_table(path, table) for path in paths]
    shapes: dict[str, tuple[str, str]] = {}
    for path, frame in zip(paths, frames, strict=True):
        check_shapes(frame, path.name, shapes)
    return join_frames(frames)


def _with_related_queries(pairs: pl.DataFrame) -> pl.DataFrame:
    """Add pairs of queries that share entities."""
    defaults = {
        "kind": pl.col("action") if "action" in pairs.columns else pl.lit(""),
        "language": pl.lit(""),
    }
    missing = {name: expr for name, expr in defaults.items() if name not in pairs.columns}
    pairs = pairs.with_columns(**missing)
    related = related_query_pairs(pairs)
    log.info(f"derived {related.height:,} related-query pairs from queries that share entities")
    return pl.concat((pairs, related), how="diagonal_relaxed")
