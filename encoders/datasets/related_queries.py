"""Related-query pairs derived from entities that queries share."""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy.sparse import csr_matrix

from encoders.text.hashing import hash_texts, seeded_hash
from encoders.text.normal_forms import fold_query

RELATED_BLOCK = 4096
"""Queries whose partners are found at once; bounds the memory of the product."""


def query_entities(pairs: pl.DataFrame, split: str | None = None) -> pl.DataFrame:
    """The fourth entity type: distinct query strings as catalogue rows.

    Args:
        pairs: With ``query, language, split`` and ``count``.
        split: Keep only queries of this split.

    Returns:
        ``id`` (the string itself), ``entity_type`` = ``query``, ``title`` (the same string),
        ``language`` (the most frequent, ties alphabetical), ``count`` (sum over its pairs),
        ``split``; most frequent first, then alphabetical.
    """
    kept = pairs if split is None else pairs.filter(pl.col("split") == split)
    by_language = (
        kept.group_by("query", "language", "split")
        .agg(pl.col("count").sum())
        .sort(["count", "language"], descending=[True, False])
    )
    by_query = by_language.group_by("query", "split", maintain_order=True).agg(
        pl.col("language").first(), pl.col("count").sum()
    )
    return by_query.sort(["count", "query"], descending=[True, False]).select(
        pl.col("query").alias("id"),
        pl.lit("query").alias("entity_type"),
        pl.col("query").alias("title"),
        "language",
        "count",
        "split",
    )


def related_query_pairs(
    pairs: pl.DataFrame,
    *,
    per_query: int = 5,
    max_entities: int = 40,
    partners_per_entity: int = 200,
    seed: int = 0,
) -> pl.DataFrame:
    """Derive related-query pairs: names of one entity in two languages, and queries that share rare entities. Derived, not logged.

    The weight of two queries is the sum over the entities they share of ``1 / log2(1 + n)``, n
    being the entity's number of queries (an Adamic-Adar score), divided by ``sqrt(d1 * d2)``, d
    being a query's number of entities; translations of a name (``kind`` ``name`` or ``title`` on
    both sides) get 1 on top. The right-hand side is always a train-split query. A pair is ``train``
    when its left query is, else ``heldout``: no held-out string stands in a train pair on either
    side.

    Args:
        pairs: Query-entity pairs with ``query, language, entity_id, kind, split``.
        per_query: Keep this many of the best partners of each query.
        max_entities: Ignore queries with more entities than this: they are related to everything.
        partners_per_entity: An entity with more train queries than this lends only so many, drawn
            by ``seed``, as partners.
        seed: Chooses those, and the order of partners with equal weight.

    Returns:
        The pairs table with ``entity_type`` = ``query``, ``entity_id`` = the related query,
        ``kind`` ``derived_translation`` or ``derived_shared``, and ``weight`` (float32); queries
        alphabetical, best partner first.
    """
    edges = pairs.select("query", "language", "entity_id", "kind", "split").unique(
        ["query", "entity_id"], keep="first", maintain_order=True
    )
    edges = edges.with_columns(
        degree=pl.len().over("query"),
        queries=pl.len().over("entity_id"),
        name=pl.col("kind").is_in(["name", "title"]),
        luck=pl.Series(seeded_hash(hash_texts(edges["query"].to_list()), seed)),
    ).filter(pl.col("degree") <= max_entities)
    if edges.is_empty():
        return _related_table(
            pairs.head(0).select("query", "language", "split"),
            [],
            np.zeros(0, np.float32),
            np.zeros(0, bool),
        )
    nodes = (
        edges.group_by("query", maintain_order=True)
        .agg(pl.col("language").first(), pl.col("split").first())
        .sort("query")
    )
    nodes = nodes.with_columns(same=fold_query(pl.col("query")).rank("dense"))
    rows = edges["query"].cast(pl.Enum(nodes["query"])).to_physical().to_numpy().astype(np.int64)
    columns = edges["entity_id"].rank("dense").to_numpy().astype(np.int64) - 1
    lent = (pl.col("split") == "train") & (
        pl.col("luck").rank("ordinal").over("entity_id", "split") <= partners_per_entity
    )
    right = edges.select(lent.alias("lent"))["lent"].to_numpy()
    shape = (nodes.height, int(columns.max()) + 1)
    value = (1.0 / np.sqrt(edges["degree"].to_numpy())).astype(np.float32)
    rarity = (1.0 / np.log2(1.0 + edges["queries"].to_numpy())).astype(np.float32)
    named = edges["name"].to_numpy()
    left_side = csr_matrix((value * rarity, (rows, columns)), shape)
    right_side = csr_matrix((value[right], (columns[right], rows[right])), shape[::-1])
    left_names = csr_matrix(
        (np.ones(named.sum(), np.float32), (rows[named], columns[named])), shape
    )
    both = named & right
    right_names = csr_matrix(
        (np.ones(both.sum(), np.float32), (columns[both], rows[both])), shape[::-1]
    )
    same = nodes["same"].to_numpy()
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, nodes.height, RELATED_BLOCK):
        block = slice(start, start + RELATED_BLOCK)
        names = left_names[block] @ right_names
        names.data[:] = 1.0
        found.append(
            _best_partners(left_side[block] @ right_side, names, start, same, per_query, seed)
        )
    from_row, to_row, weight, translated = (
        np.concatenate(parts) for parts in zip(*found, strict=True)
    )
    queries = nodes["query"]
    return _related_table(
        nodes[from_row].select("query", "language", "split"),
        queries.gather(to_row).to_list(),
        weight,
        translated,
    )


def _best_partners(
    shared: csr_matrix, names: csr_matrix, start: int, same: np.ndarray, per_query: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The best partners of a block of queries: (query rows, partner rows, weights, whether a translation), best first per query."""
    total = (shared + names).tocoo()
    rows, columns, weights = (
        total.row.astype(np.int64) + start,
        total.col.astype(np.int64),
        total.data,
    )
    different = same[rows] != same[columns]
    rows, columns, weights = rows[different], columns[different], weights[different]
    luck = seeded_hash(
        rows.astype(np.uint64) * np.uint64(len(same)) + columns.astype(np.uint64), seed
    )
    order = np.lexsort((luck, -weights, rows))
    rows, columns, weights = rows[order], columns[order], weights[order]
    first = np.searchsorted(rows, rows, side="left")
    kept = np.arange(len(rows)) - first < per_query
    # A shared-entity weight never exceeds 1 (degrees and rarities are at most 1 each), so above 1
    # there is a translation in it.
    return rows[kept], columns[kept], weights[kept], weights[kept] > 1.0


def _related_table(
    left: pl.DataFrame, right: list[str], weight: np.ndarray, translated: np.ndarray
) -> pl.DataFrame:
    kind = pl.Series(
        "kind",
        np.where(translated, "derived_translation", "derived_shared").tolist(),
        dtype=pl.String,
    )
    return left.select(
        "query",
        "language",
        pl.lit("").alias("country"),
        pl.lit("query").alias("entity_type"),
        pl.Series("entity_id", right, dtype=pl.String),
        kind.alias("action"),
        kind,
        pl.lit(1, dtype=pl.Int64).alias("count"),
        pl.lit(None, dtype=pl.Datetime("us", "UTC")).alias("timestamp"),
        "split",
        pl.Series("weight", weight, dtype=pl.Float32),
    )
