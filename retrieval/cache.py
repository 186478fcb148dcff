"""Query vectors that were already paid for: an in-process cache, one encode per distinct miss, and an optional Redis tier behind it."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import logging
import sys
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from cachetools import TTLCache

from encoders.errors import ConfigError, MissingDependency

Float32 = npt.NDArray[np.float32]
log = logging.getLogger("omni.cache")

ENTRY_OVERHEAD_BYTES = 480
"""Python objects of one entry beside the vector and the text: links, array header (measured with tracemalloc, rounded up)."""


def namespace(space_id: str, form_id: str) -> str:
    """Prefix of every key of one encoder: 128 bits of the space id and the form id, so that two encoders never share a vector."""
    return f"{space_id[:32]}/{form_id}/"


class Entry:
    """A cached vector, how often it was asked for, and the bytes that it and its key take."""

    __slots__ = ("hits", "size", "vector")

    def __init__(self, vector: Float32, size: int) -> None:
        self.vector = vector
        self.hits = 1
        self.size = size


class QueryCache:
    """LRU with a time to live and a byte bound, for one process. Not thread-safe: it lives on the event loop.

    Args:
        max_bytes: Bound over vectors, texts and bookkeeping; 0 switches the cache off.
        ttl_seconds: Age at which an entry is dropped, whether or not it is used.
        clock: Seconds that never jump back (tests and the cache study pass their own).
    """

    def __init__(self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self.insertions = 0
        self._entries: TTLCache[str, Entry] = TTLCache(max(1, max_bytes), ttl_seconds, timer=clock, getsizeof=attrgetter("size"))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        """Estimated bytes held."""
        return int(self._entries.currsize)

    @property
    def evictions(self) -> int:
        """Entries that left, by age, by size or replaced."""
        return self.insertions - len(self._entries)

    def get(self, key: str) -> Float32 | None:
        """Return the vector, shape (D,) float32, read-only, or None. Counts a hit or a miss."""
        try:
            entry = self._entries[key]
        except KeyError:
            self.misses += 1
            return None
        entry.hits += 1
        self.hits += 1
        return entry.vector

    def find(self, key: str) -> Entry | None:
        """As ``get``, but nothing is counted: the caller may ask again, and says ``used`` if it need not."""
        try:
            entry: Entry = self._entries[key]
        except KeyError:
            return None
        return entry

    def used(self, entry: Entry) -> None:
        """Count what ``find`` found as a hit."""
        entry.hits += 1
        self.hits += 1

    def put(self, key: str, vector: Float32) -> None:
        """Keep a vector; an entry larger than the whole cache is not kept."""
        if self.max_bytes <= 0:
            return
        held = np.array(vector, dtype=np.float32)
        held.flags.writeable = False
        try:
            self._entries[key] = Entry(held, entry_bytes(key, held.nbytes))
        except ValueError:  # larger than the cache
            return
        self.insertions += 1

    def frequent(self, prefix: str, count: int) -> list[str]:
        """Texts under ``prefix``, most often asked for first, at most ``count``; then halves all counts, so that old fame fades."""
        return [text for text, _ in most_frequent(self.items(), prefix, count)]

    def items(self) -> list[tuple[str, Entry]]:
        """Keys and entries as they are now, for ``most_frequent``, which may run in another thread."""
        self._entries.expire()
        mapping: dict[str, Entry] = getattr(self._entries, "_Cache__data")  # noqa: B009 (items() would count as uses and reorder the LRU)
        return list(mapping.items())


def most_frequent(items: Sequence[tuple[str, Entry]], prefix: str, count: int) -> list[tuple[str, Entry]]:
    """Texts under ``prefix`` with their entries, most often asked for first, at most ``count``; then halves the counts of all.

    A full cache has 180,000 items, which takes some 0.2 s: not for the event loop. A use that is counted meanwhile may get lost.
    """
    best = heapq.nlargest(count, ((entry.hits, key, entry) for key, entry in items if key.startswith(prefix)), key=lambda item: item[:2])
    for _, entry in items:
        entry.hits = (entry.hits + 1) // 2
    return [(key[len(prefix) :], entry) for _, key, entry in best]


def entry_bytes(key: str, vector_bytes: int) -> int:
    """What an entry takes of the cache's bound."""
    return vector_bytes + sys.getsizeof(key) + ENTRY_OVERHEAD_BYTES


class Looked(NamedTuple):
    """A query vector and what it cost."""

    vector: Float32  # (D,)
    cached: bool
    queue_ns: int
    encode_ns: int


class Encoded(NamedTuple):
    """What a batcher returns for one text."""

    vector: Float32  # (D,)
    queue_ns: int
    encode_ns: int


class Encoder(Protocol):
    """The part of ``retrieval.batcher.Batcher`` that the cache calls."""

    async def submit(self, text: str) -> Encoded:
        """Encode one normalised text."""
        ...


class _Flight:
    """One encode that is under way and the number of callers who wait for it."""

    __slots__ = ("task", "waiters")

    def __init__(self, task: asyncio.Task[Looked]) -> None:
        self.task = task
        self.waiters = 0


class CachedEncoder:
    """Cache in front of one encoder's batcher. A text that many miss is encoded once; when all have gone the work is dropped.

    Args:
        cache: Shared by all encoders.
        encoder: Makes the vectors of one encoder.
        prefix: Of that encoder's keys in the cache.
        dimension: Length of the vectors.
        redis: Second tier.
        max_queue: Places in the encoder's queue: a long list of texts enters it in parts.
    """

    def __init__(
        self,
        cache: QueryCache,
        encoder: Encoder,
        prefix: str,
        dimension: int,
        redis: RedisTier | None = None,
        *,
        max_queue: int = 256,
    ) -> None:
        self.cache = cache
        self.encoder = encoder
        self.prefix = prefix
        self.dimension = dimension
        self.redis = redis
        self.max_queue = max_queue
        self.shared = 0
        self._in_parts = 0  # texts that lookup_many has started
        self._flights: dict[str, _Flight] = {}

    def peek(self, text: str) -> Float32 | None:
        """The vector if it is in this process, without waiting. ``text`` is normalised."""
        return self.cache.get(self.prefix + text)

    def find(self, text: str) -> Entry | None:
        """As ``peek``, but nothing is counted until ``cache.used`` is told."""
        return self.cache.find(self.prefix + text)

    def must_encode(self, text: str) -> bool:
        """Whether the vector of a missed text can only come from the encoder: nobody waits for it, no second tier may know it."""
        return self.redis is None and text not in self._flights

    def joins(self, text: str) -> bool:
        """Whether ``load`` would join an encode that is under way."""
        return text in self._flights

    async def load(self, text: str) -> Looked:
        """The vector after a miss of ``peek``: joins an encode under way, asks Redis, or encodes.

        Raises:
            Overloaded: The encoder's queue is full.
            EncoderFailed: The encoder raised or made a bad vector.
        """
        flight = self._flights.get(text)
        if flight is None:
            flight = _Flight(asyncio.ensure_future(self._fetch(text)))
            flight.task.add_done_callback(_retrieve_exception)
            self._flights[text] = flight
        else:
            self.shared += 1
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0:
                if self._flights.get(text) is flight:
                    del self._flights[text]
                flight.task.cancel()

    async def lookup(self, text: str) -> Looked:
        """``peek``, then ``load``."""
        vector = self.peek(text)
        return Looked(vector, True, 0, 0) if vector is not None else await self.load(text)

    async def lookup_many(self, texts: Sequence[str]) -> tuple[Float32, list[bool], int, int]:
        """Vectors of many texts: ``(B, D)`` float32, cached flags, longest queue and encode times in ns.

        Missed texts are started in parts that leave room in the encoder's queue. What a finished part has encoded stays cached, even if a
        later part fails.

        Raises:
            Overloaded: The encoder's queue is full of the work of others.
            EncoderFailed: The encoder raised or made a bad vector.
        """
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        cached = [True] * len(texts)
        rows: dict[str, list[int]] = {}  # of missed texts
        for row, text in enumerate(texts):
            vector = self.peek(text)
            if vector is None:
                rows.setdefault(text, []).append(row)
            else:
                out[row] = vector
        queue_ns = encode_ns = 0
        missing = list(rows)
        while missing:
            size = max(1, (self.max_queue - self._in_parts) // 2)
            part, missing = missing[:size], missing[size:]
            for text, looked in zip(part, await self._load_part(part), strict=True):
                for row in rows[text]:
                    out[row], cached[row] = looked.vector, looked.cached
                queue_ns, encode_ns = max(queue_ns, looked.queue_ns), max(encode_ns, looked.encode_ns)
        return out, cached, queue_ns, encode_ns

    async def _load_part(self, texts: Sequence[str]) -> list[Looked]:
        """Load these texts at the same time. If one fails or the caller leaves, nobody waits for the others any more."""
        tasks = [asyncio.ensure_future(self._load_anew(text)) for text in texts]
        self._in_parts += len(texts)
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            self._in_parts -= len(texts)

    async def _load_anew(self, text: str) -> Looked:
        """As ``load``, unless somebody else's encode has ended since the text was missed."""
        entry = self.find(text)
        return Looked(entry.vector, True, 0, 0) if entry is not None else await self.load(text)

    async def _fetch(self, text: str) -> Looked:
        key = self.prefix + text
        if self.redis is not None:
            shared = await self.redis.get(key)
            if shared is not None:
                self.cache.put(key, shared)
                return Looked(shared, True, 0, 0)
        encoded = await self.encoder.submit(text)
        self.cache.put(key, encoded.vector)
        if self.redis is not None:
            self.redis.put_soon(key, encoded.vector)
        return Looked(encoded.vector, False, encoded.queue_ns, encoded.encode_ns)


def _retrieve_exception(task: asyncio.Task[Looked]) -> None:
    if not task.cancelled():
        task.exception()


class RedisTier:
    """Second cache tier shared by replicas. Every failure is a miss: slow, dead, full of rubbish, or lying.

    A value is ``digest(16) + float16 vector``; the digest is BLAKE2b over key and vector, keyed with the replicas' secret. So a value
    under the wrong key, a changed one, or (with a secret) a planted one is refused and counted. After ``max_failures`` failures
    in a row the tier is left alone for ``rest_seconds``.

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
            pool = BlockingConnectionPool.from_url(  # a list of texts asks for more keys at once than there are connections
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
            raise ConfigError(f"--redis: expected an address like redis://host:6379/0, but got {shown!r}.") from error
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
        if not isinstance(value, bytes) or len(value) != 16 + 2 * self.dimension or self._digest(key, value[16:]) != value[:16]:
            return None
        vector = np.frombuffer(value, dtype="<f2", offset=16).astype(np.float32)
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm) or abs(norm - 1.0) > 0.01:
            return None
        return vector / np.float32(norm)

    def _digest(self, key: str, body: bytes) -> bytes:
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16, key=self._secret)
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
        except Exception as error:  # any client or network error is a miss: this tier may never fail a request
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
            await asyncio.wait_for(self._client.set(self._name(key), self.pack(key, vector), px=self.ttl_ms), 10 * self.timeout_seconds)
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
        return b"omni:" + hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).digest()

    async def close(self) -> None:
        """Drop pending writes and close the connections."""
        for task in list(self._pending):
            task.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)
        await self._client.aclose()
