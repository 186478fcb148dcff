"""Encode query texts through the caches: concurrent misses of one text are encoded once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np

from retrieval.encoding.query_cache import Entry, Float32, QueryCache
from retrieval.encoding.redis_tier import RedisTier


class Lookup(NamedTuple):
    """A query vector and what it cost."""

    vector: Float32  # (D,)
    cached: bool
    queue_ns: int
    encode_ns: int


class Lookups(NamedTuple):
    """Vectors of many texts and what they cost."""

    vectors: Float32  # (B, D)
    cached: list[bool]
    queue_ns: int  # the longest
    encode_ns: int  # the longest


class Encoded(NamedTuple):
    """Result of a batcher for one text."""

    vector: Float32  # (D,)
    queue_ns: int
    encode_ns: int


class Priority(Enum):
    """Which texts an encoder takes first."""

    INTERACTIVE = "interactive"
    """Of calls with one query: somebody waits at a page."""
    BULK = "bulk"
    """Of calls with many."""


class Encoder(Protocol):
    """The side of ``retrieval.encoding.batcher.Batcher`` that the cache calls."""

    async def submit(self, text: str, priority: Priority) -> Encoded:
        """Encode one normalised text."""
        ...

    def promote(self, text: str) -> None:
        """Let a bulk text that waits go with the interactive ones."""
        ...


class _Flight:
    """One encode under way and the number of callers who wait for it."""

    __slots__ = ("priority", "task", "waiters")

    task: asyncio.Task[Lookup]

    def __init__(self, priority: Priority) -> None:
        self.priority = priority
        self.waiters = 0


class CachedEncoder:
    """Cache in front of one encoder's batcher.

    A text that many miss is encoded once; when all have gone the work is dropped.

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
        """Return the vector of a normalised text if it is in this process, or None."""
        return self.cache.get(self.prefix + text)

    def find(self, text: str) -> Entry | None:
        """Return the entry of a normalised text, or None; ``cache.used`` counts its use."""
        return self.cache.find(self.prefix + text)

    def must_encode(self, text: str) -> bool:
        """Return whether the vector of a missed text can only come from the encoder.

        That is so when no encode of it is under way and there is no second tier.
        """
        return self.redis is None and text not in self._flights

    def joins(self, text: str) -> bool:
        """Return whether ``load`` would join an encode under way."""
        return text in self._flights

    async def load(self, text: str, priority: Priority = Priority.INTERACTIVE) -> Lookup:
        """Get the vector after a miss of ``peek``: join an encode, ask Redis, or encode.

        An interactive caller who joins the encode of a bulk text makes it an interactive one.

        Raises:
            Overloaded: The encoder's queue is full.
            EncoderFailed: The encoder raised or made a bad vector.
        """
        flight = self._flights.get(text)
        if flight is None:
            flight = _Flight(priority)
            flight.task = asyncio.ensure_future(self._fetch(text, flight))
            flight.task.add_done_callback(_retrieve_exception)
            self._flights[text] = flight
        else:
            self.shared += 1
            if priority is Priority.INTERACTIVE and flight.priority is Priority.BULK:
                flight.priority = priority
                self.encoder.promote(text)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0:
                if self._flights.get(text) is flight:
                    del self._flights[text]
                flight.task.cancel()

    async def lookup(self, text: str) -> Lookup:
        """Get the vector from the cache, else ``load`` it."""
        vector = self.peek(text)
        return Lookup(vector, True, 0, 0) if vector is not None else await self.load(text)

    async def lookup_many(self, texts: Sequence[str]) -> Lookups:
        """Get the vectors of many texts, in their order; interactive ones are encoded first.

        Missed texts are started in parts that leave room in the encoder's queue. What a finished
        part has encoded stays cached, even if a later part fails.

        Raises:
            Overloaded: The encoder's queue is full of other callers' texts.
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
            part = missing[:size]
            missing = missing[size:]
            for text, looked in zip(part, await self._load_part(part), strict=True):
                for row in rows[text]:
                    out[row] = looked.vector
                    cached[row] = looked.cached
                queue_ns = max(queue_ns, looked.queue_ns)
                encode_ns = max(encode_ns, looked.encode_ns)
        return Lookups(out, cached, queue_ns, encode_ns)

    async def _load_part(self, texts: Sequence[str]) -> list[Lookup]:
        """Load these texts at the same time.

        If one fails or the call is cancelled, nobody waits for the others any more.
        """
        tasks = [asyncio.ensure_future(self._load_again(text)) for text in texts]
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

    async def _load_again(self, text: str) -> Lookup:
        """Load a text, unless another caller's encode has ended since it was missed."""
        entry = self.find(text)
        if entry is not None:
            return Lookup(entry.vector, True, 0, 0)
        return await self.load(text, Priority.BULK)

    async def _fetch(self, text: str, flight: _Flight) -> Lookup:
        key = self.prefix + text
        if self.redis is not None:
            shared = await self.redis.get(key)
            if shared is not None:
                self.cache.put(key, shared)
                return Lookup(shared, True, 0, 0)
        encoded = await self.encoder.submit(text, flight.priority)
        self.cache.put(key, encoded.vector)
        if self.redis is not None:
            self.redis.put_soon(key, encoded.vector)
        return Lookup(encoded.vector, False, encoded.queue_ns, encoded.encode_ns)


def _retrieve_exception(task: asyncio.Task[Lookup]) -> None:
    if not task.cancelled():
        task.exception()
