"""Weigh pairs so that rare values are drawn more often: ``balance_by`` of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.config.train_config import DatasetConfig
from encoders.errors import SchemaError


def balance_column(name: str) -> str:
    """Name the copy of a pairs column to balance by.

    The copy is not rewritten while pairs are prepared, as ``query`` and ``entity_id`` are.
    """
    return f"balance:{name}"


def require_plain(frame: pl.DataFrame, columns: Sequence[str], table: str) -> None:
    """Refuse columns to balance by that do not hold one value a row.

    Raises:
        SchemaError: A column is nested.
    """
    nested = [name for name in columns if frame.schema[name].is_nested()]
    if nested:
        raise SchemaError(
            f"balance_by names {nested[0]!r}, but that column of the {table} holds"
            f" {frame.schema[nested[0]]}: one value a row is needed."
        )


def balance_values(
    dataset: DatasetConfig, rows: pl.DataFrame, catalogue: pl.DataFrame
) -> pl.Series:
    """Read the value each pair of a dataset is balanced by: of the pair, else of its entity.

    Raises:
        SchemaError: The column is in neither table, or nested.
    """
    name = dataset.balance_by
    if balance_column(name) in rows.columns:
        return rows[balance_column(name)]
    if name in catalogue.columns and dataset.entity_type != "query":
        require_plain(catalogue, (name,), "catalogue")
        return catalogue[name].gather(rows["candidate"])
    where = (
        "the pairs"
        if dataset.entity_type == "query"
        else f"the pairs or the catalogue (it has {', '.join(catalogue.columns)})"
    )
    raise SchemaError(
        f"dataset {dataset.name!r}: balance_by names {name!r}, which is no column of {where}. Name"
        " one of them, or leave it out."
    )


def balance_weights(
    values: pl.Series, weights: npt.NDArray[np.float64], exponent: float
) -> npt.NDArray[np.float64]:
    """Weigh rows so that value v is drawn in proportion to ``n(v) ** exponent``: float64 ``(N,)``.

    ``n(v)`` is what the rows of v weigh together; the mean of the new weights is 1. This is the
    sampling of languages in multilingual pretraining (Conneau and Lample, 2019, section 3.1), for
    any column; null is a value too.
    """
    totals = (
        pl.DataFrame({"value": values, "weight": weights})
        .select(pl.col("weight").sum().over("value"))["weight"]
        .to_numpy()
    )
    drawn = totals > 0
    balanced = np.zeros(len(weights))
    balanced[drawn] = weights[drawn] * totals[drawn] ** (exponent - 1.0)
    scaled: npt.NDArray[np.float64] = balanced / balanced.mean()
    return scaled
