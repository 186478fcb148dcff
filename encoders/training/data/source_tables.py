"""The tables of a training run, and where they come from: the files a config names, the larger data set, or the sample in the package."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from encoders.config.train_config import TrainConfig
from encoders.datasets.dataset import load_dataset
from encoders.datasets.related_queries import related_query_pairs
from encoders.errors import ConfigError
from encoders.tables.files import read_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from.

    Attributes:
        catalogue: Entities of all types (DESIGN section 4, table catalogue).
        pairs: ``query``, ``entity_type``, ``entity_id``; optional ``count`` (1), ``action``,
            ``language``, ``split`` (``train``). Rows whose split is neither ``train`` nor the
            validation split are not looked at. Related-query pairs have entity type ``query``, and
            ``entity_id`` is the text of the candidate query (no catalogue row needed).
    """

    catalogue: pl.DataFrame
    pairs: pl.DataFrame


def load_training_data(config: TrainConfig, data_dir: Path | None = None) -> TrainingData:
    """Read catalogue and pairs, and derive related-query pairs where a dataset wants them and the tables hold none.

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
        catalogue = pl.concat(
            [read_table(path, "catalogue") for path in files.catalogue], how="diagonal_relaxed"
        )
        pairs = pl.concat(
            [read_table(path, "pairs") for path in files.pairs], how="diagonal_relaxed"
        )
    else:
        dataset = load_dataset(data_dir)
        catalogue, pairs = dataset.catalogue, dataset.pairs
    wants_queries = any(d.entity_type == "query" for d in config.datasets) or (
        not config.datasets and not files.catalogue
    )
    if files.related_queries and wants_queries and not (pairs["entity_type"] == "query").any():
        for name, default in (
            ("kind", pl.col("action") if "action" in pairs.columns else pl.lit("")),
            ("language", pl.lit("")),
        ):
            pairs = pairs if name in pairs.columns else pairs.with_columns(default.alias(name))
        related = related_query_pairs(pairs)
        log.info(f"derived {related.height:,} related-query pairs from queries that share entities")
        pairs = pl.concat((pairs, related), how="diagonal_relaxed")
    return TrainingData(catalogue, pairs)
