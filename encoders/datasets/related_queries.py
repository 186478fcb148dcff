"""Derive queries as entities, and related-query pairs from the entities that queries share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.sparse import csr_matrix

from encoders.text.hashing import hash_texts, seeded_hash
from encoders.text.normal_forms import fold_query

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

RELATED_BLOCK = 4096
"""Queries whose partners are found at once; bounds the memory of the product."""


def query_entities(pairs: pl.DataFrame, split: str | None = None) -> pl.DataFrame:
    """Return distinct query strings as catalogue rows, the fourth entity type.

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
    """Derive related-query pairs from entities that queries share; nothing is logged.

    Two queries are related when they name one entity in two languages, or share rare entities. The
    weight of two queries is the sum over the entities they share of ``1 / log2(1 + n)``, n being
    the entity's number of queries (an Adamic-Adar score), divided by ``sqrt(d1 * d2)``, d being a
    query's number of entities; translations of a name (``kind`` ``name`` or ``title`` on both
    sides) get 1 on top. The right-hand side is always a train-split query. A pair is ``train`` when
    its left query is, else ``heldout``: no held-out string is in a train pair, on either side.

    Args:
        pairs: Query-entity pairs with ``query, language, entity_id, kind, split``.
        per_query: Keep this many of the best partners of each query.
        max_entities: Ignore queries with more entities than this: they are related to everything.
        partners_per_entity: Of an entity's train queries at most this many, drawn by ``seed``, are
            partners of its other queries.
        seed: Chooses those, and the order of partners with equal weight.

    Returns:
        The pairs table with ``entity_type`` = ``query``, ``entity_id`` = the related query,
        ``kind`` ``derived_translation`` or ``derived_shared``, and ``weight`` (float32); queries
        alphabetical, best partner first.
    """
    edges = pairs.select("query", "language", "entity_id", "kind", "split").unique(
        ["query", "entity_id"], keep="first", maintain_order=True
    )
    random_order = seeded_hash(hash_texts(edges["query"].to_list()), seed)
    edges = edges.with_columns(
        degree=pl.len().over("query"),
        queries=pl.len().over("entity_id"),
        name=pl.col("kind").is_in(["name", "title"]),
        random_order=pl.Series(random_order),
    ).filter(pl.col("degree") <= max_entities)
    nodes = (
        edges.group_by("query", maintain_order=True)
        .agg(pl.col("language").first(), pl.col("split").first())
        .sort("query")
    )
    if edges.is_empty():
        return _related_table(nodes, _no_partners())
    is_partner = (pl.col("split") == "train") & (
        pl.col("random_order").rank("ordinal").over("entity_id", "split") <= partners_per_entity
    )
    graph = _query_graph(edges.with_columns(is_partner=is_partner), nodes["query"])
    folded = nodes.select(fold_query(pl.col("query")).rank("dense")).to_series().to_numpy()
    found = []
    for start in range(0, nodes.height, RELATED_BLOCK):
        block = slice(start, start + RELATED_BLOCK)
        names = graph.names[block] @ graph.partner_names
        names.data[:] = 1.0
        weights = graph.shared[block] @ graph.partners + names
        found.append(_best_partners(_partners_of(weights, start), folded, per_query, seed))
    joined = _Partners(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
    return _related_table(nodes, joined)


class _QueryGraph(NamedTuple):
    """Sparse matrices between Q queries and E entities, whose products weigh pairs of queries."""

    shared: csr_matrix
    """(Q, E) ``1 / log2(1 + n) / sqrt(d)`` where the query has the entity."""
    partners: csr_matrix
    """(E, Q) ``1 / sqrt(d)`` where the query may be the entity's partner."""
    names: csr_matrix
    """(Q, E) 1 where the query names the entity."""
    partner_names: csr_matrix
    """(E, Q) 1 where the query names the entity and may be its partner."""


def _query_graph(edges: pl.DataFrame, queries: pl.Series) -> _QueryGraph:
    """Build the matrices from edges with ``degree, queries, name, is_partner``."""
    query = edges["query"].cast(pl.Enum(queries)).to_physical().to_numpy().astype(np.int64)
    entity = edges["entity_id"].rank("dense").to_numpy().astype(np.int64) - 1
    shape = (len(queries), int(entity.max()) + 1)
    per_query = (1.0 / np.sqrt(edges["degree"].to_numpy())).astype(np.float32)
    rarity = (1.0 / np.log2(1.0 + edges["queries"].to_numpy())).astype(np.float32)
    ones = np.ones(edges.height, np.float32)
    is_partner = edges["is_partner"].to_numpy()
    names = edges["name"].to_numpy()

    def matrix(values: Float32, kept: Bool) -> csr_matrix:
        return csr_matrix((values[kept], (query[kept], entity[kept])), shape)

    every = np.ones(edges.height, bool)
    return _QueryGraph(
        shared=matrix(per_query * rarity, every),
        partners=matrix(per_query, is_partner).T.tocsr(),
        names=matrix(ones, names),
        partner_names=matrix(ones, names & is_partner).T.tocsr(),
    )


class _Partners(NamedTuple):
    """Pairs of related queries, P of them."""

    query: Int64
    """(P,) row of the left query."""
    partner: Int64
    """(P,) row of the right query."""
    weight: Float32
    """(P,) above 1: the two are translations of a name."""

    def take(self, chosen: npt.NDArray[np.int64] | Bool) -> _Partners:
        """Return the chosen pairs."""
        return _Partners(self.query[chosen], self.partner[chosen], self.weight[chosen])


def _no_partners() -> _Partners:
    none = np.zeros(0, np.int64)
    return _Partners(none, none, np.zeros(0, np.float32))


def _partners_of(weights: csr_matrix, start: int) -> _Partners:
    """Read the pairs of a block of rows, the first of which is row ``start``."""
    entries = weights.tocoo()
    return _Partners(
        entries.row.astype(np.int64) + start, entries.col.astype(np.int64), entries.data
    )


def _best_partners(found: _Partners, folded: Int64, per_query: int, seed: int) -> _Partners:
    """Keep the best partners of each query, best first, ties in an order drawn by ``seed``.

    Args:
        found: Pairs of any two queries.
        folded: (Q,) queries with equal numbers are spellings of one query, and no pair.
        per_query: At most this many per query.
        seed: Orders partners of equal weight.
    """
    found = found.take(folded[found.query] != folded[found.partner])
    pair_keys = found.query.astype(np.uint64) * np.uint64(len(folded)) + found.partner.astype(
        np.uint64
    )
    found = found.take(np.lexsort((seeded_hash(pair_keys, seed), -found.weight, found.query)))
    first = np.searchsorted(found.query, found.query, side="left")
    return found.take(np.arange(len(found.query)) - first < per_query)


def _related_table(nodes: pl.DataFrame, found: _Partners) -> pl.DataFrame:
    """Return pairs of queries as rows of the pairs table."""
    # A shared-entity weight never exceeds 1 (degrees and rarities are at most 1 each), so above 1
    # there is a translation in it.
    kinds = np.where(found.weight > 1.0, "derived_translation", "derived_shared").tolist()
    kind = pl.Series("kind", kinds, dtype=pl.String)
    return nodes[found.query].select(
        "query",
        "language",
        pl.lit("").alias("country"),
        pl.lit("query").alias("entity_type"),
        nodes["query"].gather(found.partner).alias("entity_id"),
        kind.alias("action"),
        kind,
        pl.lit(1, dtype=pl.Int64).alias("count"),
        pl.lit(None, dtype=pl.Datetime("us", "UTC")).alias("timestamp"),
        "split",
        pl.Series("weight", found.weight, dtype=pl.Float32),
    )
