"""The asyncio client: the methods of ``RetrievalClient`` as coroutines, with the same arguments, results and errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy.typing as npt
from grpc_health.v1 import health_pb2

from protos import retrieval_pb2 as pb
from retrieval.client import results as results
from retrieval.client.base import ClientBase, never_ready, packed, retrieve_request, serving
from retrieval.client.config import ClientConfig
from retrieval.client.errors import CallError, NotFound, Unavailable
from retrieval.client.results import EntityWrite, Target

R = TypeVar("R")


class AsyncRetrievalClient(ClientBase):
    """Asyncio client: the methods of ``RetrievalClient`` as coroutines.

    Create and use it inside one event loop.

    Args:
        target: ``host:port``.
        config: Deadlines, retries, TLS, token.

    Raises:
        ConfigError: Impossible configuration, unreadable TLS files, or a token over an unencrypted
            network.
    """

    def __init__(self, target: str = "localhost:50051", config: ClientConfig | None = None) -> None:
        super().__init__(target, config)
        options = self.config.channel_options()
        if self.config.tls:
            self._channel = grpc.aio.secure_channel(target, self.config.tls.credentials(), options)
        else:
            self._channel = grpc.aio.insecure_channel(target, options)
        self._bind(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight fail."""
        await self._channel.close()

    async def _call(
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
                response = await stub(request, timeout=seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(
                    self._failed(error, method, attempt, end - time.monotonic(), retry)
                )
            else:
                self._budget.success()
                return unpack(response)
            attempt += 1
            seconds = end - time.monotonic()

    async def retrieve(
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
        """Find the ``k`` entities nearest to a query; arguments, result and errors as in ``RetrievalClient.retrieve``."""
        request = retrieve_request(
            query, entity_type, k, filter, exclude_ids, min_score, min_recall, language, country, release_id, embedding, space_id,
            diversity, collapse_above, exact, attributes, request_id,
        )  # fmt: skip
        return await self._call(
            self._retrieve, request, results.retrieve_result, "Retrieve", deadline_seconds
        )

    async def retrieve_multi(
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
        return await self._call(
            self._multi, request, results.answers, "RetrieveMulti", deadline_seconds
        )

    async def retrieve_batch(
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
        return await self._call(
            self._batch, request, results.answers, "RetrieveBatch", deadline_seconds
        )

    async def embed(
        self, queries: Sequence[str], *, release_id: str = "", deadline_seconds: float | None = None
    ) -> results.Embeddings:
        """Turn query texts into unit vectors ``(B, D)`` with the served query tower."""
        request = pb.EmbedRequest(queries=queries, release_id=release_id)
        return await self._call(self._embed, request, results.embeddings, "Embed", deadline_seconds)

    async def score(
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
        return await self._call(self._score, request, results.scores, "Score", deadline_seconds)

    async def describe_release(
        self, release_id: str = "", *, deadline_seconds: float | None = None
    ) -> results.ReleaseDescription:
        """What is being served: release, space, indexes with their measured recall, limits."""
        request = pb.DescribeReleaseRequest(release_id=release_id)
        return await self._call(
            self._describe,
            request,
            results.release_description,
            "DescribeRelease",
            deadline_seconds,
        )

    async def activate(
        self, release_id: str, *, deadline_seconds: float = 300.0
    ) -> results.Activation:
        """Load, verify, prove and serve a published release (admin)."""
        return await self._call(
            self._activate,
            pb.ActivateRequest(release_id=release_id),
            results.activation,
            "Activate",
            deadline_seconds,
        )

    async def rollback(self, *, deadline_seconds: float = 300.0) -> results.Activation:
        """Serve the previous release again (admin).

        Never repeated by itself: a second rollback would undo the first.
        """
        return await self._call(
            self._rollback,
            pb.RollbackRequest(),
            results.activation,
            "Rollback",
            deadline_seconds,
            retry=False,
        )

    async def upsert(
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
        return await self._call(self._upsert, request, results.written, "Upsert", deadline_seconds)

    async def delete(
        self, entity_type: str, ids: Sequence[str], *, deadline_seconds: float | None = None
    ) -> results.Written:
        """Remove entities (admin); returns when that is durable. Unknown ids are no error."""
        return await self._call(
            self._delete,
            pb.DeleteRequest(entity_type=entity_type, ids=ids),
            results.written,
            "Delete",
            deadline_seconds,
        )

    async def is_ready(self, service: str = "", *, deadline_seconds: float = 1.0) -> bool:
        """True if the health service says SERVING for ``service`` ("" is the server; an entity type names its index)."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            return await self._call(
                self._health, request, serving, "Health.Check", deadline_seconds, retry=False
            )
        except (Unavailable, NotFound):
            return False
        except CallError as error:
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return False
            raise

    async def wait_until_ready(self, timeout_seconds: float = 60.0, service: str = "") -> None:
        """Poll the health service until it says SERVING.

        Raises:
            Unavailable: It did not within ``timeout_seconds``.
        """
        end = time.monotonic() + timeout_seconds
        while not await self.is_ready(service):
            if time.monotonic() >= end:
                raise never_ready(self.target, timeout_seconds)
            await asyncio.sleep(0.05)
