"""The asyncio client: the methods of ``RetrievalClient`` as coroutines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from retrieval.client import requests, results
from retrieval.client.base import ClientBase, means_not_ready, never_ready
from retrieval.client.config import ClientConfig
from retrieval.client.errors import CallError
from retrieval.client.requests import (
    ADMIN_DEADLINE_SECONDS,
    BatchOptions,
    EntityWrite,
    MultiOptions,
    RetrieveOptions,
    ScoreOptions,
    Target,
)

R = TypeVar("R")


class AsyncRetrievalClient(ClientBase):
    """Asyncio client: the methods of ``RetrievalClient`` as coroutines.

    Arguments, results and errors are the same. Create and use it inside one event loop.

    Args:
        target: ``host:port``.
        config: Deadlines, retries, TLS, token.

    Raises:
        ConfigError: Impossible configuration, unreadable TLS files, or a token over an unencrypted
            network.
    """

    def __init__(self, target: str = "localhost:50051", config: ClientConfig | None = None) -> None:
        super().__init__(target, config)
        options = self.config.channel_options(target)
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

    async def _send(self, call: requests.Call[R]) -> R:
        """Send a call, repeat it where that may help, and unpack its answer."""
        stub = self._stubs[call.method]
        seconds = self._deadline(call)
        end = time.monotonic() + seconds
        attempt = 1
        while True:
            try:
                response = await stub(call.message, timeout=seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(self._wait_after(error, call, attempt, end - time.monotonic()))
            else:
                self._budget.success()
                return call.unpack(response)
            attempt += 1
            seconds = end - time.monotonic()

    async def retrieve(
        self,
        query: str = "",
        entity_type: str = "pin",
        k: int = 10,
        **options: Unpack[RetrieveOptions],
    ) -> results.RetrieveResult:
        """Find the ``k`` entities nearest to a query; see ``RetrievalClient.retrieve``."""
        return await self._send(requests.retrieve(query, entity_type, k, options))

    async def retrieve_multi(
        self,
        query: str = "",
        targets: Sequence[Target] = (),
        **options: Unpack[MultiOptions],
    ) -> results.Answers:
        """Answer one query over several types; see ``RetrievalClient.retrieve_multi``."""
        return await self._send(requests.retrieve_multi(query, targets, options))

    async def retrieve_batch(
        self,
        queries: Sequence[str] = (),
        target: Target | None = None,
        **options: Unpack[BatchOptions],
    ) -> results.Answers:
        """Answer many queries with the same search; see ``RetrievalClient.retrieve_batch``."""
        return await self._send(requests.retrieve_batch(queries, target, options))

    async def embed(
        self, queries: Sequence[str], *, release_id: str = "", deadline_seconds: float | None = None
    ) -> results.Embeddings:
        """Turn query texts into unit vectors ``(B, D)`` with the served query tower."""
        return await self._send(requests.embed(queries, release_id, deadline_seconds))

    async def score(
        self,
        query: str = "",
        ids: Sequence[str] = (),
        entity_type: str = "pin",
        **options: Unpack[ScoreOptions],
    ) -> results.Scores:
        """Compute the cosine of a query with given ids; see ``RetrievalClient.score``."""
        return await self._send(requests.score(query, ids, entity_type, options))

    async def describe_release(
        self, release_id: str = "", *, deadline_seconds: float | None = None
    ) -> results.ReleaseDescription:
        """Describe what is served: release, space, indexes with their measured recall, limits."""
        return await self._send(requests.describe_release(release_id, deadline_seconds))

    async def activate(
        self, release_id: str, *, deadline_seconds: float = ADMIN_DEADLINE_SECONDS
    ) -> results.Activation:
        """Load, verify, prove and serve a published release (admin)."""
        return await self._send(requests.activate(release_id, deadline_seconds))

    async def rollback(
        self, *, deadline_seconds: float = ADMIN_DEADLINE_SECONDS
    ) -> results.Activation:
        """Serve the previous release again (admin).

        Never repeated by itself: a second rollback would undo the first.
        """
        return await self._send(requests.rollback(deadline_seconds))

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
        return await self._send(requests.upsert(entity_type, entities, space_id, deadline_seconds))

    async def delete(
        self, entity_type: str, ids: Sequence[str], *, deadline_seconds: float | None = None
    ) -> results.Written:
        """Remove entities (admin); returns when that is durable. Unknown ids are no error."""
        return await self._send(requests.delete(entity_type, ids, deadline_seconds))

    async def is_ready(self, service: str = "", *, deadline_seconds: float = 1.0) -> bool:
        """Return whether the health service says SERVING; see ``RetrievalClient.is_ready``."""
        try:
            return await self._send(requests.health_check(service, deadline_seconds))
        except CallError as error:
            if means_not_ready(error):
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
