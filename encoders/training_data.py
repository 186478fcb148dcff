"""The tables of a training run, and where they come from: the files a config names, the larger data set, or the sample in the package."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from encoders.console import say
from encoders.errors import ConfigError
from encoders.sample import load_dataset, related_query_pairs
from encoders.tables import read_table
from encoders.train_config import DataConfig, TrainConfig


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from.

    Attributes:
        catalogue: Entities of all types (DESIGN section 4, table catalogue).
        pairs: ``query``, ``entity_type``, ``entity_id``; optional ``count`` (1), ``action``, ``language``, ``split`` (``train``).
            Rows whose split is neither ``train`` nor the validation split are not looked at. Related-query pairs have entity type
            ``query``, and ``entity_id`` is the text of the candidate query (no catalogue row needed).
    """

    catalogue: pl.DataFrame
    pairs: pl.DataFrame


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


def evaluate_command_for(bundle: Path, config: TrainConfig, data_dir: Path | None) -> str:
    """The `omni evaluate` that measures a bundle on the data of its own run."""
    evaluate = f"omni evaluate {shlex.quote(str(bundle))}"
    if not config.data.catalogue:
        return evaluate if data_dir is None else f"{evaluate} --data {shlex.quote(str(data_dir))}"
    folder = _folder_of(config.data)
    if folder is None:
        return f"{evaluate} --data FOLDER, a folder that holds your tables as catalogue.* and pairs.*"
    return f"{evaluate} --data {shlex.quote(str(folder))}"


def _folder_of(files: DataConfig) -> Path | None:
    """The folder whose ``catalogue.*`` and ``pairs.*`` (or folders of part files) are all that a run read; None: there is none."""
    if len(files.catalogue) != 1 or len(files.pairs) != 1:
        return None
    catalogue, pairs = files.catalogue[0], files.pairs[0]
    folder = catalogue.parent
    found = tuple(_table_in(folder, name) for name in ("catalogue", "pairs"))
    return folder if found == (catalogue, pairs) else None


def _table_in(folder: Path, table: str) -> Path | None:
    """The file or folder that ``encoders.sample.load_tables`` reads as a table."""
    named = (path for path in folder.glob(f"{table}*") if path.is_dir() or path.name.split(".")[0] == table)
    return min(named, default=None)


def trained_tables(bundle: Path) -> list[str]:
    """The tables that a bundle's training config names; empty: the sample or the larger data, or nothing is recorded."""
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    data = config.get("training", {}).get("data", {})
    return [*data.get("catalogue", []), *data.get("pairs", [])]
