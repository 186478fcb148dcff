"""The typed Python client, synchronous and asyncio: ``RetrievalClient("host:50051").retrieve("blue whale", "pin", k=10)``.

Both clients take the same arguments and return the same results. Every call has a deadline that
includes its retries; calls that the server refused because it is full or not ready are repeated
after a jittered wait that honours the server's hint; failures are the exceptions of
``retrieval/client/errors.py``. Importing this module loads no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy.typing as npt
from grpc_health.v1 import health_pb2

from protos import retrieval_pb2 as pb
from retrieval.client import results as results
from retrieval.client.async_client import AsyncRetrievalClient
from retrieval.client.base import ClientBase, never_ready, packed, retrieve_request, serving
from retrieval.client.config import ClientConfig, TlsConfig
from retrieval.client.errors import CallError, NotFound, Unavailable
from retrieval.client.results import EntityWrite, Hit, Target
from retrieval.client.retries import RetryPolicy

__all__ = [
    "AsyncRetrievalClient",
    "CallError",
    "ClientConfig",
    "EntityWrite",
    "Hit",
    "RetrievalClient",
    "RetryPolicy",
    "Target",
    "TlsConfig",
]

R = TypeVar("R")


class RetrievalClient(ClientBase):
    """Synchronous client; one instance may be shared by many threads.

    Args:
        target: ``host:port`` (or any gRPC address, e.g. ``dns:///search.internal:50051``).
        config: Deadlines, retries, TLS, token.

    Raises:
        ConfigError: Impossible configuration, unreadable TLS files, or a token over an unencrypted
            network.

    Example:
        >>> with RetrievalClient("localhost:50051") as client:
        ...     for hit in client.retrieve("blue whale", "pin", 3, attributes=["title"]).hits:
        ...         print(hit.id, hit.score, hit.attributes)
    """

    def __init__(self, target: str = "localhost:50051", config: ClientConfig | None = None) -> None:
        super().__init__(target, config)
        options = self.config.channel_options()
        if self.config.tls:
            self._channel = grpc.secure_channel(target, self.config.tls.credentials(), options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._bind(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight fail."""
        self._channel.close()

    def _call(
        self,
        stub: Any,
        request: Any,
        unpack: Callable[[Any], R],
        method: str,
        deadline_seconds: float | None,
        retry: bool = True,
    ) -> R:
        seconds = self.config.deadline_seconds if deadline_seconds is None else deadline_seconds
        end = time.monotonic() + seconds
        attempt = 1
        while True:
            try:
                response = stub(request, timeout=seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                time.sleep(self._failed(error, method, attempt, end - time.monotonic(), retry))
            else:
                self._budget.success()
                return unpack(response)
            attempt += 1
            seconds = end - time.monotonic()

    def retrieve(
        self,
        query: str = "",
        entity_type: str = "pin",
        k: int = 10,
        *,
        filter: str = "",
        exclude_ids: Sequence[str] = (),
        min_score: float | None = None,
        min_recall: float | None = None,
        language: str = "",
        country: str = "",
        release_id: str = "",
        embedding: npt.ArrayLike | None = None,
        space_id: str = "",
        diversity: float | None = None,
        collapse_above: float | None = None,
        exact: bool = False,
        attributes: Sequence[str] = (),
        request_id: str = "",
        deadline_seconds: float | None = None,
    ) -> results.RetrieveResult:
        """Find the ``k`` entities nearest to a query; the arguments are the fields of ``RetrieveRequest`` in the proto.

        Args:
            query: Text; or leave it empty and give ``embedding``.
            entity_type: ``pin``, ``product``, ``query`` or ``ad``.
            k: Results wanted.
            filter: Boolean expression over attributes, e.g. ``price < 20 and brand == "Acme"``.
            exclude_ids: Never return these.
            min_score: Drop results with a smaller cosine.
            min_recall: Wanted share of the exact top ``k``, above 0 up to 1.
            language: Of the user; a label for metrics.
            country: Of the user; a label for metrics.
            release_id: Answer from this release or fail.
            embedding: ``(D,)`` float32 unit vector instead of ``query``; needs ``space_id``.
            space_id: Which space ``embedding`` was made in.
            diversity: MMR lambda, 0 (variety) to 1 (relevance).
            collapse_above: Cosine above which a result counts as a duplicate of a better one.
            exact: Scan everything instead of using the graph.
            attributes: Names to return with each hit; ``["*"]`` for all.
            request_id: Echoed in the answer and the impression log.
            deadline_seconds: For this call with its retries; None: the client's.

        Returns:
            The hits, best first, and how they were found.

        Raises:
            CallError: The call failed; see ``retrieval/client/errors.py`` for its kinds.
            InvalidVectors: ``embedding`` is not a one-dimensional array of numbers.
        """
        request = retrieve_request(
            query, entity_type, k, filter, exclude_ids, min_score, min_recall, language, country, release_id, embedding, space_id,
            diversity, collapse_above, exact, attributes, request_id,
        )  # fmt: skip
        return self._call(
            self._retrieve, request, results.retrieve_result, "Retrieve", deadline_seconds
        )

    def retrieve_multi(
        self,
        query: str = "",
        targets: Sequence[Target] = (),
        *,
        embedding: npt.ArrayLike | None = None,
        space_id: str = "",
        release_id: str = "",
        language: str = "",
        country: str = "",
        request_id: str = "",
        deadline_seconds: float | None = None,
    ) -> results.Answers:
        """Answer one query over several entity types with one encode and one release; answers come in the order of ``targets``."""
        request = pb.RetrieveMultiRequest(
            query=query,
            embedding=packed(embedding, 1),
            space_id=space_id,
            targets=[results.target_to_proto(target) for target in targets],
            release_id=release_id,
            language=language,
            country=country,
            request_id=request_id,
        )
        return self._call(self._multi, request, results.answers, "RetrieveMulti", deadline_seconds)

    def retrieve_batch(
        self,
        queries: Sequence[str] = (),
        target: Target | None = None,
        *,
        embeddings: npt.ArrayLike | None = None,
        space_id: str = "",
        release_id: str = "",
        language: str = "",
        country: str = "",
        request_id: str = "",
        deadline_seconds: float | None = None,
    ) -> results.Answers:
        """Answer many queries (texts, or ``embeddings`` of shape ``(B, D)``) with the same search; answers in their order."""
        request = pb.RetrieveBatchRequest(
            queries=queries,
            embeddings=packed(embeddings, 2),
            space_id=space_id,
            target=results.target_to_proto(target or Target(entity_type="pin")),
            release_id=release_id,
            language=language,
            country=country,
            request_id=request_id,
        )
        return self._call(self._batch, request, results.answers, "RetrieveBatch", deadline_seconds)

    def embed(
        self, queries: Sequence[str], *, release_id: str = "", deadline_seconds: float | None = None
    ) -> results.Embeddings:
        """Turn query texts into unit vectors ``(B, D)`` with the served query tower."""
        request = pb.EmbedRequest(queries=queries, release_id=release_id)
        return self._call(self._embed, request, results.embeddings, "Embed", deadline_seconds)

    def score(
        self,
        query: str = "",
        ids: Sequence[str] = (),
        entity_type: str = "pin",
        *,
        embedding: npt.ArrayLike | None = None,
        space_id: str = "",
        release_id: str = "",
        deadline_seconds: float | None = None,
    ) -> results.Scores:
        """Cosine of a query with given ids, in their order; NaN where an id is unknown."""
        request = pb.ScoreRequest(
            query=query,
            embedding=packed(embedding, 1),
            space_id=space_id,
            entity_type=entity_type,
            ids=ids,
            release_id=release_id,
        )
        return self._call(self._score, request, results.scores, "Score", deadline_seconds)

    def describe_release(
        self, release_id: str = "", *, deadline_seconds: float | None = None
    ) -> results.ReleaseDescription:
        """What is being served: release, space, indexes with their measured recall, limits."""
        request = pb.DescribeReleaseRequest(release_id=release_id)
        return self._call(
            self._describe,
            request,
            results.release_description,
            "DescribeRelease",
            deadline_seconds,
        )

    def activate(self, release_id: str, *, deadline_seconds: float = 300.0) -> results.Activation:
        """Load, verify, prove and serve a published release (admin)."""
        return self._call(
            self._activate,
            pb.ActivateRequest(release_id=release_id),
            results.activation,
            "Activate",
            deadline_seconds,
        )

    def rollback(self, *, deadline_seconds: float = 300.0) -> results.Activation:
        """Serve the previous release again (admin).

        Never repeated by itself: a second rollback would undo the first.
        """
        return self._call(
            self._rollback,
            pb.RollbackRequest(),
            results.activation,
            "Rollback",
            deadline_seconds,
            retry=False,
        )

    def upsert(
        self,
        entity_type: str,
        entities: Sequence[EntityWrite],
        *,
        space_id: str,
        deadline_seconds: float | None = None,
    ) -> results.Written:
        """Insert or replace entities (admin); returns when they are durable.

        All are accepted or none.
        """
        packed = [results.entity_to_proto(entity) for entity in entities]
        request = pb.UpsertRequest(entity_type=entity_type, space_id=space_id, entities=packed)
        return self._call(self._upsert, request, results.written, "Upsert", deadline_seconds)

    def delete(
        self, entity_type: str, ids: Sequence[str], *, deadline_seconds: float | None = None
    ) -> results.Written:
        """Remove entities (admin); returns when that is durable. Unknown ids are no error."""
        return self._call(
            self._delete,
            pb.DeleteRequest(entity_type=entity_type, ids=ids),
            results.written,
            "Delete",
            deadline_seconds,
        )

    def is_ready(self, service: str = "", *, deadline_seconds: float = 1.0) -> bool:
        """True if the health service says SERVING for ``service`` ("" is the server; an entity type names its index)."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            return self._call(
                self._health, request, serving, "Health.Check", deadline_seconds, retry=False
            )
        except (Unavailable, NotFound):
            return False
        except CallError as error:
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return False
            raise

    def wait_until_ready(self, timeout_seconds: float = 60.0, service: str = "") -> None:
        """Poll the health service until it says SERVING.

        Raises:
            Unavailable: It did not within ``timeout_seconds``.
        """
        end = time.monotonic() + timeout_seconds
        while not self.is_ready(service):
            if time.monotonic() >= end:
                raise never_ready(self.target, timeout_seconds)
            time.sleep(0.05)
