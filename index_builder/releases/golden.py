"""Golden queries: real queries with their exact answers, replayed before a release may serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from encoders.exact_search import exact_top_k
from index_builder.errors import ReleaseCorrupt
from index_builder.search.request import SearchResult
from index_builder.storage.corpus import check_vectors

GOLDEN_NAME = "golden.parquet"
GOLDEN_K = 10
"""Answers kept a query."""
_NOISE = 0.3
_TIE = 1e-5


@dataclass(frozen=True, slots=True)
class GoldenQueries:
    """Queries with their exact top k over the base vectors of one entity type.

    Attributes:
        texts: The query strings; empty strings where only a vector is known (then no form's parity
            can be checked on them).
        vectors: float32 ``(G, D)``, unit rows.
        ids: Per query the exact top ids, best first.
        scores: Per query their inner products, float32.
        kind: ``real queries`` or ``perturbed entities``.
    """

    texts: list[str]
    vectors: np.ndarray
    ids: list[list[str]]
    scores: list[np.ndarray]
    kind: str

    def __len__(self) -> int:
        return len(self.texts)


def answer_exactly(
    texts: Sequence[str], queries: np.ndarray, ids: Sequence[str], vectors: np.ndarray, kind: str
) -> GoldenQueries:
    """Attach exact answers to golden queries.

    Args:
        texts: Query strings (may be empty strings), as many as ``queries`` has rows.
        queries: float32 ``(G, D)``, unit rows.
        ids: Ids of the base, in row order.
        vectors: float32 ``(N, D)``, the base.
        kind: Where the queries come from.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    if len(queries):
        queries = check_vectors(queries)
    if len(ids) == 0 or len(queries) == 0:
        no_scores = [np.zeros(0, np.float32) for _ in texts]
        return GoldenQueries(list(texts), queries, [[] for _ in texts], no_scores, kind)
    rows, scores = exact_top_k(queries, vectors, min(GOLDEN_K, len(ids)))
    answers = [[ids[int(r)] for r in row] for row in rows]
    return GoldenQueries(
        list(texts), queries, answers, [np.asarray(s, np.float32) for s in scores], kind
    )


def perturbed_entities(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Make stand-ins for queries: entities moved by noise of 0.3 of their norm, normalised again.

    Args:
        vectors: float32 ``(N, D)``.
        count: How many (fewer when N is smaller).
        seed: Of the choice and the noise.

    Returns:
        float32 ``(min(count, N), D)``, unit rows.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(vectors), size=min(count, len(vectors)), replace=False))
    noise = rng.standard_normal((len(rows), vectors.shape[1]), dtype=np.float32)
    noise *= _NOISE / np.linalg.norm(noise, axis=1, keepdims=True)
    moved = np.asarray(vectors[rows], np.float32) + noise
    return np.ascontiguousarray(moved / np.linalg.norm(moved, axis=1, keepdims=True), np.float32)


def write_golden(golden: GoldenQueries, path: Path) -> None:
    """Write ``golden.parquet``; the same queries give the same bytes."""
    dimension = golden.vectors.shape[1] if golden.vectors.ndim == 2 else 0
    embedding = pa.FixedSizeListArray.from_arrays(
        pa.array(golden.vectors.reshape(-1), pa.float32()), dimension
    )
    table = pa.table(
        {
            "query": pa.array(golden.texts, pa.string()),
            "embedding": embedding,
            "ids": pa.array(golden.ids, pa.list_(pa.string())),
            "scores": pa.array([s.tolist() for s in golden.scores], pa.list_(pa.float32())),
        }
    ).replace_schema_metadata({"kind": golden.kind})
    pq.write_table(table, path, compression="zstd")


def read_golden(path: Path) -> GoldenQueries:
    """Read what ``write_golden`` wrote.

    Raises:
        ReleaseCorrupt: The file is not such a table.
    """
    try:
        table = pq.read_table(path)
        column = table["embedding"].combine_chunks()
        flat = np.ascontiguousarray(column.flatten().to_numpy(zero_copy_only=False), np.float32)
        vectors = flat.reshape(-1, column.type.list_size)
        scores = [np.asarray(s, np.float32) for s in table["scores"].to_pylist()]
        kind = (table.schema.metadata or {}).get(b"kind", b"unknown").decode()
        return GoldenQueries(
            table["query"].to_pylist(), vectors, table["ids"].to_pylist(), scores, kind
        )
    except (pa.ArrowException, KeyError, AttributeError, ValueError) as error:
        raise ReleaseCorrupt(
            f"{path}: not a table of golden queries ({error}). Restore the release or roll back."
        ) from error


def replayed_recall(golden: GoldenQueries, answers: Sequence[SearchResult]) -> float:
    """Return the mean ANN recall@k of an index's answers to golden queries; 1.0 without answers.

    Args:
        golden: With exact answers.
        answers: One per golden query, or none at all.
    """
    if not answers:
        return 1.0
    shares = [
        _share_found(wanted, scores, answer)
        for wanted, scores, answer in zip(golden.ids, golden.scores, answers, strict=True)
    ]
    return float(np.mean(shares))


def _share_found(wanted: list[str], exact_scores: np.ndarray, answer: SearchResult) -> float:
    """Return the share of the exact top k that came back; a tie with the k-th score is a hit."""
    if not wanted:
        return 1.0
    threshold = float(exact_scores[-1]) - _TIE
    known = set(wanted)
    hits = sum(
        id_ in known or float(score) >= threshold
        for id_, score in zip(answer.ids[: len(wanted)], answer.scores)
    )
    return hits / len(wanted)
