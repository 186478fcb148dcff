"""Votes of known queries for the entities they were engaged with.

The nearest known queries of a query, found in the release's own ``query`` index, each vote for
their entities: ``exp((cosine - 1) / temperature) / sqrt(entities of the known query)``, summed and
divided by ``log(2 + known queries of the entity)``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from index_builder.errors import IndexFormatError
from index_builder.storage.id_table import IdTable
from index_builder.storage.raw_arrays import map_array

VOTES_FILE = "votes.json"
VOTES_FORMAT = 1
NEIGHBOURS = 100
"""Known queries that vote."""
TEMPERATURE = 0.07
MOST_ENTITIES = 1_000
"""Entities of one known query, those with the highest counts: it bounds the work of a vote."""


class VoteShares(NamedTuple):
    """Votes for entities, as shares of the weight of all voters."""

    rows: np.ndarray
    """uint32, ascending."""
    shares: np.ndarray
    """float32, above 0."""


class Votes:
    """Entities of one type by the row of a known query, in compressed sparse rows.

    Args:
        offsets: uint32 ``(Q + 1,)``: the entities of query ``q`` are ``offsets[q]`` to
            ``offsets[q + 1]``.
        rows: uint32 ``(E,)``, rows of entities.
        count: N, rows of the entity type.
    """

    def __init__(self, offsets: np.ndarray, rows: np.ndarray, count: int) -> None:
        self.offsets = offsets
        self.rows = rows
        self.count = count
        queries = np.bincount(rows, minlength=count)
        self._popularity = np.log(2 + queries).astype(np.float32)
        self.is_cold = queries == 0
        """bool ``(N,)``: no known query led to these rows."""

    @classmethod
    def build(cls, pairs: pl.DataFrame, queries: IdTable, entities: IdTable) -> Votes:
        """Make votes of engagements.

        Args:
            pairs: ``query, entity_id`` and, if there is, ``count``; those that are not in both
                tables of ids are left out.
            queries: Of the query index.
            entities: Of the entity type.
        """
        counted = pairs.with_columns(
            count=pl.col("count") if "count" in pairs.columns else pl.lit(1, pl.Int64)
        )
        distinct = counted.group_by("query", "entity_id").agg(pl.col("count").sum())
        query = queries.rows_of(distinct["query"].to_list())
        entity = entities.rows_of(distinct["entity_id"].to_list())
        counts = distinct["count"].to_numpy()
        known = (query >= 0) & (entity >= 0)
        query, entity, counts = query[known], entity[known], counts[known]
        order = np.lexsort((entity, -counts, query))
        query, entity = query[order], entity[order]
        places = np.arange(len(query)) - np.searchsorted(query, query)
        query, entity = query[places < MOST_ENTITIES], entity[places < MOST_ENTITIES]
        order = np.lexsort((entity, query))
        offsets = np.zeros(len(queries) + 1, np.uint32)
        offsets[1:] = np.cumsum(np.bincount(query, minlength=len(queries)))
        return cls(offsets, entity[order].astype(np.uint32), len(entities))

    def pairs(self, queries: IdTable, entities: IdTable) -> pl.DataFrame:
        """Return what ``build`` was given, as far as it was kept: ``query, entity_id``."""
        offsets = self.offsets.astype(np.int64)
        owners = np.repeat(np.arange(len(offsets) - 1), offsets[1:] - offsets[:-1])
        return pl.DataFrame(
            {
                "query": pl.Series(queries.take(owners), dtype=pl.String),
                "entity_id": pl.Series(entities.take(self.rows), dtype=pl.String),
            }
        )

    def cast(self, neighbours: np.ndarray, cosines: np.ndarray) -> VoteShares:
        """Count the votes of known queries.

        Args:
            neighbours: int64 ``(m,)``, rows of known queries.
            cosines: float32 ``(m,)`` of each with the query.
        """
        weights = np.exp((cosines - 1) / TEMPERATURE)
        starts = self.offsets[neighbours].astype(np.int64)
        sizes = self.offsets[neighbours + 1].astype(np.int64) - starts
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        entities = self.rows[np.repeat(starts, sizes) + within]
        each = np.repeat(weights / np.sqrt(np.maximum(sizes, 1)), sizes)
        rows, place = np.unique(entities, return_inverse=True)
        votes = np.bincount(place, each, len(rows)) / self._popularity[rows]
        total = float(weights.sum()) or 1.0
        return VoteShares(rows, (votes / total).astype(np.float32))

    def describe(self) -> dict[str, Any]:
        """Return the facts for the manifest."""
        return {
            "queries": len(self.offsets) - 1,
            "voting_queries": int(np.count_nonzero(np.diff(self.offsets.astype(np.int64)))),
            "pairs": len(self.rows),
            "rows": self.count,
        }

    def save(self, folder: Path, built_from: dict[str, str]) -> None:
        """Write ``votes.json``, ``votes.offsets`` and ``votes.rows``.

        Args:
            folder: Of the entity type.
            built_from: Fingerprints of the two indexes whose rows these are.
        """
        self.offsets.astype("<u4").tofile(folder / "votes.offsets")
        self.rows.astype("<u4").tofile(folder / "votes.rows")
        values = {"format": VOTES_FORMAT, "built_from": built_from, **self.describe()}
        text = json.dumps(values, indent=1, sort_keys=True) + "\n"
        (folder / VOTES_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, queries: int, entities: int) -> Votes:
        """Map what ``save`` wrote, checked so that no vote is for a row past the end.

        Args:
            folder: Of the entity type.
            queries: Rows of the query index.
            entities: Rows of the entity type.

        Raises:
            IndexFormatError: Files are missing, damaged, or of other indexes.
        """
        where = f"{folder.name}/{VOTES_FILE}"
        try:
            values = json.loads((folder / VOTES_FILE).read_text(encoding="utf-8"))
            counts = [int(values[name]) for name in ("format", "queries", "rows", "pairs")]
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise IndexFormatError(
                f"{where} cannot be read ({error!r}). Rebuild this release."
            ) from error
        if counts[:3] != [VOTES_FORMAT, queries, entities]:
            raise IndexFormatError(
                f"{where}: expected format {VOTES_FORMAT}, {queries} queries and {entities} rows,"
                f" but got {counts[:3]}. Rebuild this release."
            )
        offsets = map_array(folder / "votes.offsets", "<u4", queries + 1)
        rows = map_array(folder / "votes.rows", "<u4", counts[3])
        if (
            int(offsets[0]) != 0
            or int(offsets[-1]) != len(rows)
            or not bool((offsets[1:] >= offsets[:-1]).all())
            or (len(rows) and int(rows.max()) >= entities)
        ):
            raise IndexFormatError(f"{where}: its arrays do not fit each other. Rebuild.")
        return cls(offsets, rows, entities)
