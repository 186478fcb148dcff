"""The synchronous client."""

from __future__ import annotations

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


class RetrievalClient(ClientBase):
    """Synchronous client; one instance may be shared by many threads.

    Args:
        target: ``host:port`` (or any gRPC address, e.g. ``dns:///search.internal:50051``).
        config: Deadlines, retries, TLS, token.

    Raises:
        ConfigError: Impossible configuration, unreadable TLS files, or a token over an unencrypted
            network.

    Examples:
        >>> with RetrievalClient("localhost:50051") as client:
        ...     for hit in client.retrieve("blue whale", "pin", 3, attributes=["title"]).hits:
        ...         print(hit.id, hit.score, hit.attributes)
    """

    def __init__(self, target: str = "localhost:50051", config: ClientConfig | None = None) -> None:
        super().__init__(target, config)
        options = self.config.channel_options(target)
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

    def _send(self, call: requests.Call[R]) -> R:
        """Send a call, repeat it where that may help, and unpack its answer."""
        stub = self._stubs[call.method]
        seconds = self._deadline(call)
        end = time.monotonic() + seconds
        attempt = 1
        while True:
            try:
                response = stub(call.message, timeout=seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                time.sleep(self._wait_after(error, call, attempt, end - time.monotonic()))
            else:
                self._budget.success()
                return call.unpack(response)
            attempt += 1
            seconds = end - time.monotonic()

    def retrieve(
        self,
        query: str = "",
        entity_type: str = "pin",
        k: int = 10,
        **options: Unpack[RetrieveOptions],
    ) -> results.RetrieveResult:
        """Find the ``k`` entities nearest to a query.

        Args:
            query: Text; or leave it empty and give ``embedding``.
            entity_type: ``pin``, ``product``, ``query`` or ``ad``.
            k: Results wanted.
            **options: Any of ``filter``, ``exclude_ids``, ``min_score``, ``min_recall``,
                ``diversity``, ``collapse_above``, ``exact``, ``attributes``, ``fusion``,
                ``min_probability``, ``gate`` (see ``SearchOptions``); ``embedding`` with
                ``space_id`` instead of ``query``; ``release_id``, ``language``, ``country``,
                ``request_id``, ``deadline_seconds``.

        Returns:
            The hits, best first, and how they were found.

        Raises:
            CallError: The call failed; see ``retrieval/client/errors.py`` for its kinds.
            InvalidVectors: ``embedding`` is not a one-dimensional array of numbers.
        """
        return self._send(requests.retrieve(query, entity_type, k, options))

    def retrieve_multi(
        self,
        query: str = "",
        targets: Sequence[Target] = (),
        **options: Unpack[MultiOptions],
    ) -> results.Answers:
        """Answer one query over several entity types with one encode and one release.

        Args:
            query: Text; or leave it empty and give ``embedding``.
            targets: The searches; answers come in their order.
            **options: ``embedding`` with ``space_id``; ``release_id``, ``language``, ``country``,
                ``request_id``, ``deadline_seconds``.
        """
        return self._send(requests.retrieve_multi(query, targets, options))

    def retrieve_batch(
        self,
        queries: Sequence[str] = (),
        target: Target | None = None,
        **options: Unpack[BatchOptions],
    ) -> results.Answers:
        """Answer many queries with the same search, in their order.

        Args:
            queries: Texts; or leave them out and give ``embeddings``, ``(B, D)``.
            target: The search; None: the ten nearest pins.
            **options: ``embeddings`` with ``space_id``; ``release_id``, ``language``, ``country``,
                ``request_id``, ``deadline_seconds``.
        """
        return self._send(requests.retrieve_batch(queries, target, options))

    def embed(
        self, queries: Sequence[str], *, release_id: str = "", deadline_seconds: float | None = None
    ) -> results.Embeddings:
        """Turn query texts into unit vectors ``(B, D)`` with the served query tower."""
        return self._send(requests.embed(queries, release_id, deadline_seconds))

    def score(
        self,
        query: str = "",
        ids: Sequence[str] = (),
        entity_type: str = "pin",
        **options: Unpack[ScoreOptions],
    ) -> results.Scores:
        """Compute the cosine of a query with given ids, in their order; NaN where one is unknown.

        Args:
            query: Text; or leave it empty and give ``embedding``.
            ids: Entities to score.
            entity_type: Of these entities.
            **options: ``embedding`` with ``space_id``; ``release_id``, ``deadline_seconds``.
        """
        return self._send(requests.score(query, ids, entity_type, options))

    def describe_release(
        self, release_id: str = "", *, deadline_seconds: float | None = None
    ) -> results.ReleaseDescription:
        """Describe what is served: release, space, indexes with their measured recall, limits."""
        return self._send(requests.describe_release(release_id, deadline_seconds))

    def activate(
        self, release_id: str, *, deadline_seconds: float = ADMIN_DEADLINE_SECONDS
    ) -> results.Activation:
        """Load, verify, prove and serve a published release (admin)."""
        return self._send(requests.activate(release_id, deadline_seconds))

    def rollback(self, *, deadline_seconds: float = ADMIN_DEADLINE_SECONDS) -> results.Activation:
        """Serve the previous release again (admin).

        Never repeated by itself: a second rollback would undo the first.
        """
        return self._send(requests.rollback(deadline_seconds))

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
        return self._send(requests.upsert(entity_type, entities, space_id, deadline_seconds))

    def delete(
        self, entity_type: str, ids: Sequence[str], *, deadline_seconds: float | None = None
    ) -> results.Written:
        """Remove entities (admin); returns when that is durable. Unknown ids are no error."""
        return self._send(requests.delete(entity_type, ids, deadline_seconds))

    def is_ready(self, service: str = "", *, deadline_seconds: float = 1.0) -> bool:
        """Return whether the health service says SERVING.

        Args:
            service: "" is the server; an entity type names its index.
            deadline_seconds: No answer within this is a no.
        """
        try:
            return self._send(requests.health_check(service, deadline_seconds))
        except CallError as error:
            if means_not_ready(error):
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
