"""The optional Redis tier of the query cache."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from encoders.errors import ConfigError, MissingDependency
from retrieval.encoding.query_cache import Float32, log


class RedisTier:
    """Second cache tier shared by replicas.

    Every failure is a miss: slow, dead, full of rubbish, or lying.

    A value is ``digest(16) + float16 vector``; the digest is BLAKE2b over key and vector, keyed
    with the replicas' secret. So a value under the wrong key, a changed one, or (with a secret) a
    planted one is refused and counted. After ``max_failures`` failures in a row the tier is left
    alone for ``rest_seconds``.

    Args:
        url: ``redis://host:port/db``.
        dimension: Length of the vectors.
        ttl_seconds: Time to live that is given to Redis.
        timeout_seconds: Longest wait for one answer.
        secret: Key of the digest.

    Raises:
        ConfigError: The address is not one of a Redis server.
        MissingDependency: The redis package is not installed.
    """

    MAX_PENDING = 1000

    def __init__(
        self,
        url: str,
        dimension: int,
        ttl_seconds: float,
        timeout_seconds: float = 0.015,
        secret: str = "",
        max_failures: int = 5,
        rest_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError as error:
            raise MissingDependency("redis", "redis", "the shared cache tier (--redis)") from error
        try:
            # A list of texts asks for more keys at once than there are connections
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=64,
                timeout=timeout_seconds,
                socket_timeout=max(0.5, timeout_seconds),
                socket_connect_timeout=max(0.5, timeout_seconds),
                retry=Retry(NoBackoff(), 0),
            )
            self._client: Any = Redis.from_pool(pool)
        except ValueError as error:
            shown = url.rpartition("@")[2]  # without the password
            raise ConfigError(
                f"--redis: expected an address like redis://host:6379/0, but got {shown!r}."
            ) from error
        self.dimension = dimension
        self.ttl_ms = int(ttl_seconds * 1e3)
        self.timeout_seconds = timeout_seconds
        self._secret = hashlib.blake2b(secret.encode(), digest_size=32).digest()
        self._max_failures = max_failures
        self._rest_seconds = rest_seconds
        self._clock = clock
        self._failures = 0
        self._resting_until = -float("inf")
        self._pending: set[asyncio.Task[None]] = set()
        self.hits = 0
        self.misses = 0
        self.failures = 0
        self.refused = 0

    @property
    def resting(self) -> bool:
        """Whether the tier is being left alone after repeated failures."""
        return self._clock() < self._resting_until

    def pack(self, key: str, vector: Float32) -> bytes:
        """Serialise one value."""
        body = vector.astype("<f2").tobytes()
        return self._digest(key, body) + body

    def unpack(self, key: str, value: bytes) -> Float32 | None:
        """Check and read one value; None if it is not a unit vector stored under exactly this key."""
        if (
            not isinstance(value, bytes)
            or len(value) != 16 + 2 * self.dimension
            or self._digest(key, value[16:]) != value[:16]
        ):
            return None
        vector = np.frombuffer(value, dtype="<f2", offset=16).astype(np.float32)
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm) or abs(norm - 1.0) > 0.01:
            return None
        return vector / np.float32(norm)

    def _digest(self, key: str, body: bytes) -> bytes:
        digest = hashlib.blake2b(
            key.encode("utf-8", "surrogatepass"), digest_size=16, key=self._secret
        )
        digest.update(b"\0")
        digest.update(body)
        return digest.digest()

    async def get(self, key: str) -> Float32 | None:
        """Look one key up; never raises, never waits longer than the timeout."""
        if self.resting:
            return None
        try:
            value = await asyncio.wait_for(self._client.get(self._name(key)), self.timeout_seconds)
        except asyncio.CancelledError:
            raise
        except (
            Exception
        ) as error:  # any client or network error is a miss: this tier may never fail a request
            self._failed(error)
            return None
        self._failures = 0
        if value is None:
            self.misses += 1
            return None
        vector = self.unpack(key, value)
        if vector is None:
            self.refused += 1
            return None
        self.hits += 1
        return vector

    def put_soon(self, key: str, vector: Float32) -> None:
        """Store in the background; dropped when too many writes are pending."""
        if self.resting or len(self._pending) >= self.MAX_PENDING:
            return
        task = asyncio.ensure_future(self._put(key, vector))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _put(self, key: str, vector: Float32) -> None:
        try:
            await asyncio.wait_for(
                self._client.set(self._name(key), self.pack(key, vector), px=self.ttl_ms),
                10 * self.timeout_seconds,
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:  # as above
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._failures += 1
        if self._failures >= self._max_failures:
            self._failures = 0
            self._resting_until = self._clock() + self._rest_seconds
            log.warning(
                "redis left alone for %.0f s after %d failures in a row; last: %s",
                self._rest_seconds,
                self._max_failures,
                type(error).__name__,
            )

    @staticmethod
    def _name(key: str) -> bytes:
        return (
            b"omni:"
            + hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).digest()
        )

    async def close(self) -> None:
        """Drop pending writes and close the connections."""
        for task in list(self._pending):
            task.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)
        await self._client.aclose()
