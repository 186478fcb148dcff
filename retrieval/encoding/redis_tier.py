"""The optional Redis tier of the query cache."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from encoders.errors import ConfigError, MissingDependency
from retrieval.encoding.query_cache import Float32

log = logging.getLogger(__name__)

DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisSettings:
    """How the tier is reached and trusted."""

    url: str
    """``redis://host:port/db``."""
    ttl_seconds: float
    """Time to live that is given to Redis."""
    timeout_seconds: float = 0.015
    """Longest wait for one answer; a slower one is a miss."""
    secret: str = field(default="", repr=False)
    """Key of the digest, shared by the replicas."""
    max_failures: int = 5
    """After so many failures in a row the tier is suspended."""
    suspend_seconds: float = 5.0
    """How long it is not asked then."""


class RedisTier:
    """Second cache tier shared by replicas.

    Every failure is a miss: an answer that is late, malformed or forged, or none at all.

    A value is ``digest(16) + float16 vector``; the digest is BLAKE2b over key and vector, keyed
    with the replicas' secret. So a value under the wrong key, a changed one, or (with a secret) a
    planted one is refused and counted.

    Args:
        settings: How it is reached.
        dimension: Length of the vectors.
        clock: Seconds that never jump back.

    Raises:
        ConfigError: The address is not one of a Redis server.
        MissingDependency: The redis package is not installed.
    """

    MAX_PENDING = 1000

    def __init__(
        self,
        settings: RedisSettings,
        dimension: int,
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
                settings.url,
                max_connections=64,
                timeout=settings.timeout_seconds,
                socket_timeout=max(0.5, settings.timeout_seconds),
                socket_connect_timeout=max(0.5, settings.timeout_seconds),
                retry=Retry(NoBackoff(), 0),
            )
            self._client: Any = Redis.from_pool(pool)
        except ValueError as error:
            shown = settings.url.rpartition("@")[2]  # without the password
            raise ConfigError(
                f"--redis: expected an address like redis://host:6379/0, but got {shown!r}."
            ) from error
        self.dimension = dimension
        self.settings = settings
        self._ttl_ms = int(settings.ttl_seconds * 1e3)
        self._secret = hashlib.blake2b(settings.secret.encode(), digest_size=32).digest()
        self._clock = clock
        self._failures_in_a_row = 0
        self._suspended_until = -float("inf")
        self._pending: set[asyncio.Task[None]] = set()
        self.hits = 0
        self.misses = 0
        self.failures = 0
        self.refused = 0

    @property
    def suspended(self) -> bool:
        """Whether the tier is not asked for a while, after repeated failures."""
        return self._clock() < self._suspended_until

    def pack(self, key: str, vector: Float32) -> bytes:
        """Serialise one value."""
        body = vector.astype("<f2").tobytes()
        return self._digest(key, body) + body

    def unpack(self, key: str, value: bytes) -> Float32 | None:
        """Check and read one value; None if it is no unit vector stored under exactly this key."""
        if (
            not isinstance(value, bytes)
            or len(value) != DIGEST_BYTES + 2 * self.dimension
            or self._digest(key, value[DIGEST_BYTES:]) != value[:DIGEST_BYTES]
        ):
            return None
        vector = np.frombuffer(value, dtype="<f2", offset=DIGEST_BYTES).astype(np.float32)
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm) or abs(norm - 1.0) > 0.01:
            return None
        return vector / np.float32(norm)

    def _digest(self, key: str, body: bytes) -> bytes:
        digest = hashlib.blake2b(
            key.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, key=self._secret
        )
        digest.update(b"\0")
        digest.update(body)
        return digest.digest()

    async def get(self, key: str) -> Float32 | None:
        """Look one key up; never raises, and never waits longer than the timeout."""
        if self.suspended:
            return None
        try:
            value = await asyncio.wait_for(
                self._client.get(self._name(key)), self.settings.timeout_seconds
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:  # of client or network: a miss, as no request may fail here
            self._failed(error)
            return None
        self._failures_in_a_row = 0
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
        if self.suspended or len(self._pending) >= self.MAX_PENDING:
            return
        task = asyncio.ensure_future(self._put(key, vector))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _put(self, key: str, vector: Float32) -> None:
        try:
            await asyncio.wait_for(
                self._client.set(self._name(key), self.pack(key, vector), px=self._ttl_ms),
                10 * self.settings.timeout_seconds,
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:  # as above
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.settings.max_failures:
            self._failures_in_a_row = 0
            self._suspended_until = self._clock() + self.settings.suspend_seconds
            log.warning(
                "redis is not asked for %.0f s after %d failures in a row; last: %s",
                self.settings.suspend_seconds,
                self.settings.max_failures,
                type(error).__name__,
            )

    @staticmethod
    def _name(key: str) -> bytes:
        name = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20)
        return b"omni:" + name.digest()

    async def close(self) -> None:
        """Drop pending writes and close the connections."""
        for task in list(self._pending):
            task.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)
        await self._client.aclose()
