"""Where a training run's tables come from: the files a config names, the larger data set, or the sample in the package."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from encoders.batches import TrainingData
from encoders.console import say
from encoders.errors import ConfigError
from encoders.sample import load_dataset, related_query_pairs
from encoders.tables import read_table
from encoders.train_config import TrainConfig


def load_training_data(config: TrainConfig, data_dir: Path | None = None) -> TrainingData:
    """Read catalogue and pairs, and derive related-query pairs where a dataset wants them and the tables hold none.

    Args:
        config: ``config.data`` names the files; both lists empty: the data set below ``data_dir``, or the sample.
        data_dir: Folder of the larger data set.

    Raises:
        ConfigError: Only one of catalogue and pairs is named.
        DataError: A table cannot be read or breaks its schema.
    """
    files = config.data
    if bool(files.catalogue) != bool(files.pairs):
        raise ConfigError("data.catalogue and data.pairs belong together: name both, or neither for the sample data.")
    if files.catalogue:
        catalogue = pl.concat([read_table(path, "catalogue") for path in files.catalogue], how="diagonal_relaxed")
        pairs = pl.concat([read_table(path, "pairs") for path in files.pairs], how="diagonal_relaxed")
    else:
        dataset = load_dataset(data_dir)
        catalogue, pairs = dataset.catalogue, dataset.pairs
    wants_queries = any(d.entity_type == "query" for d in config.datasets) or (not config.datasets and not files.catalogue)
    if files.related_queries and wants_queries and not (pairs["entity_type"] == "query").any():
        for name, default in (("kind", pl.col("action") if "action" in pairs.columns else pl.lit("")), ("language", pl.lit(""))):
            pairs = pairs if name in pairs.columns else pairs.with_columns(default.alias(name))
        related = related_query_pairs(pairs)
        say(f"derived {related.height:,} related-query pairs from queries that share entities")
        pairs = pl.concat((pairs, related), how="diagonal_relaxed")
    return TrainingData(catalogue, pairs)
