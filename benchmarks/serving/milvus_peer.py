"""Milvus as a peer: the same vectors in HNSW, its cheapest setting that reaches the recall."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from encoders.commands.console import say, track
from encoders.errors import MissingDependency, OmniError

COLLECTION = "bench"
INDEX = {"M": 16, "efConstruction": 200}
EF_GRID = (10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)
SEARCH_METHOD = "/milvus.proto.milvus.MilvusService/Search"


class RecallNotReached(OmniError):
    """No setting of the grid reaches the wanted recall."""


def _client(address: str) -> Any:
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise MissingDependency("pymilvus", "milvus", "The Milvus peer") from error
    return MilvusClient(f"http://{address}", timeout=600)


def _search_params(ef: int) -> dict[str, Any]:
    return {"metric_type": "IP", "params": {"ef": ef}}


def fill(address: str, vectors: np.ndarray, *, batch: int = 10_000) -> None:
    """Insert ``vectors`` ``(N, D)`` under ids "0".."N-1", build the graph, load and await it."""
    from pymilvus import DataType

    client = _client(address)
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
    client.create_collection(COLLECTION, schema=schema, consistency_level="Eventually")
    for start in track(range(0, len(vectors), batch), "insert into Milvus"):
        rows = [
            {"id": str(row), "embedding": vectors[row]}
            for row in range(start, min(start + batch, len(vectors)))
        ]
        client.insert(COLLECTION, rows)
    client.flush(COLLECTION)
    params = client.prepare_index_params()
    params.add_index("embedding", index_type="HNSW", metric_type="IP", params=INDEX)
    client.create_index(COLLECTION, params)
    client.load_collection(COLLECTION)
    client.close()


def ids_of(address: str, queries: np.ndarray, k: int, ef: int) -> list[list[str]]:
    """Answers through the client, in batches of 100."""
    client = _client(address)
    found: list[list[str]] = []
    for start in range(0, len(queries), 100):
        hits = client.search(
            COLLECTION,
            list(queries[start : start + 100]),
            limit=k,
            search_params=_search_params(ef),
        )
        found += [[hit["id"] for hit in row] for row in hits]
    client.close()
    return found


def cheapest_ef(
    address: str, queries: np.ndarray, truth: np.ndarray, min_recall: float
) -> tuple[int, float]:
    """The smallest ef of ``EF_GRID`` whose ANN recall is at least ``min_recall``.

    Args:
        address: The server.
        queries: ``(Q, D)``.
        truth: int64 ``(Q, k)``, exact rows.
        min_recall: Wanted share of the exact top k.

    Raises:
        RecallNotReached: Not even the largest one does.
    """
    k = truth.shape[1]
    recall = 0.0
    for ef in EF_GRID:
        recall = mean_recall(ids_of(address, queries, k, max(ef, k)), truth)
        say(f"Milvus HNSW ef={ef}: ANN recall@{k} {recall:.4f}")
        if recall >= min_recall:
            return ef, recall
    raise RecallNotReached(
        f"Milvus reaches ANN recall@{k} {recall:.3f} at ef={EF_GRID[-1]}, but {min_recall} was"
        " asked for."
    )


def mean_recall(found: list[list[str]], truth: np.ndarray) -> float:
    """Mean share of the exact rows (as ids) that were found."""
    return float(
        np.mean(
            [
                len(set(ids) & set(map(str, rows))) / len(rows)
                for ids, rows in zip(found, truth.tolist(), strict=True)
            ]
        )
    )


def raw_requests(address: str, queries: np.ndarray, k: int, ef: int) -> list[bytes]:
    """The bytes that pymilvus itself sends for each query, caught at its gRPC stub."""
    client = _client(address)
    client.search(COLLECTION, [queries[0]], limit=k, search_params=_search_params(ef))
    handler = client._get_connection()
    real = handler._stub.Search
    caught: list[bytes] = []

    class Catcher:
        def __call__(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            caught.append(request.SerializeToString())
            return real(request, *args, **kwargs)

        def future(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            caught.append(request.SerializeToString())
            return real.future(request, *args, **kwargs)

    handler._stub.Search = Catcher()
    for query in queries:
        client.search(COLLECTION, [query], limit=k, search_params=_search_params(ef))
    client.close()
    assert len(caught) == len(queries), "one request per search"
    return caught


def start_client(
    address: str, queries_path: Path, k: int, ef: int
) -> tuple[Callable[[int], Any], Callable[[], None]]:
    """Inside a load process: pymilvus's own client, one search per call."""
    client = _client(address)
    queries = np.load(queries_path)
    rows = [queries[i] for i in range(len(queries))]
    params = _search_params(ef)
    client.search(COLLECTION, [rows[0]], limit=k, search_params=params)

    def ask(i: int) -> Any:
        return client.search(COLLECTION, [rows[i % len(rows)]], limit=k, search_params=params)

    return ask, client.close
