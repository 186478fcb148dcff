"""Dynamic batching: texts that arrive together are encoded together, within length buckets."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt

from encoders.errors import OmniError
from encoders.towers.forms import MAX_TOKENS
from retrieval.encoding.cached_encoder import Encoded
from retrieval.errors import EncoderFailed, Overloaded

Float32 = npt.NDArray[np.float32]

LENGTH_BUCKETS = (8, 16, 32, 64)
"""Padded lengths in tokens; a batch holds texts of one bucket."""


def estimated_tokens(text: str) -> int:
    """Estimate the token count, special tokens included: three UTF-8 bytes per token, 3 to 64."""
    return min(MAX_TOKENS, 3 + len(text.encode("utf-8", "surrogatepass")) // 3)


def bucket_of(tokens: int) -> int:
    """Return the smallest padded length that holds this many tokens."""
    for length in LENGTH_BUCKETS:
        if tokens <= length:
            return length
    return LENGTH_BUCKETS[-1]


class _Waiting:
    """One text in the queue."""

    __slots__ = ("arrived_ns", "bucket", "future", "text")

    def __init__(self, text: str, bucket: int, future: asyncio.Future[Encoded]) -> None:
        self.text = text
        self.bucket = bucket
        self.future = future
        self.arrived_ns = time.perf_counter_ns()


class Batcher:
    """Feeds one encoder from one event loop.

    A batch is closed when its padded tokens reach ``max_tokens``, or when the encoder is free and
    the oldest text has waited ``max_delay_seconds``. With a delay of 0 an idle encoder starts at
    once and batches form while it is busy: no latency is lost when traffic is low. The oldest
    waiting text decides which length bucket goes next, so nothing starves.

    Args:
        encode: ``list of B texts -> (B, D)`` float32 unit rows; runs in ``executor``.
        executor: One thread per encoder; not shut down here.
        dimension: Length of the vectors.
        max_tokens: Token budget of a batch.
        max_delay_seconds: Longest wait of an idle encoder for more texts.
        max_queue: Texts that may wait; one more raises ``Overloaded``.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Float32],
        executor: Executor,
        dimension: int,
        *,
        max_tokens: int = 2048,
        max_delay_seconds: float = 0.0,
        max_queue: int = 256,
    ) -> None:
        self._encode = encode
        self._executor = executor
        self._dimension = dimension
        self._max_tokens = max_tokens
        self._max_delay_seconds = max_delay_seconds
        self._max_queue = max_queue
        self._queue: deque[_Waiting] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._text_seconds = 0.005  # exponential average of encode time per text
        self._running = 0  # texts inside the encoder
        self._running_since = 0.0
        self._abandoned = False  # a caller of a waiting text has gone
        self.batches = 0
        self.texts = 0
        self.dropped = 0
        self.failed = 0

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._queue)

    def expected_wait_seconds(self) -> float:
        """Estimate how long a text that arrives now takes, behind those that are here."""
        left = self._text_seconds * self._running
        if left:
            left = max(0.0, left - (time.perf_counter() - self._running_since))
        return left + self._text_seconds * (len(self._queue) + 1)

    def full(self) -> Overloaded | None:
        """Return the error for one more text, or None when the queue has a place."""
        if len(self._queue) < self._max_queue:
            return None
        if self._abandoned:
            self._drop_abandoned()
            if len(self._queue) < self._max_queue:
                return None
        retry_after_ms = max(5, int(self.expected_wait_seconds() * 500))
        return Overloaded("query encoder", self._max_queue, retry_after_ms)

    def late(self, remaining_seconds: float | None) -> Overloaded | None:
        """Return the error for a text that would probably not be encoded in this time.

        An idle encoder refuses nothing.
        """
        if remaining_seconds is None or not (self._queue or self._running):
            return None
        wait = self.expected_wait_seconds()
        if wait <= remaining_seconds:
            return None
        places = len(self._queue) + self._running
        retry_after_ms = max(5, int(wait * 1e3))
        return Overloaded("query encoder (within your deadline)", places, retry_after_ms)

    async def submit(self, text: str) -> Encoded:
        """Encode one normalised text; cancelling the call takes it out of the queue.

        Raises:
            Overloaded: The queue is full.
            EncoderFailed: The encoder raised, or made a vector with NaN, a wrong size or a wrong
                norm.
        """
        full = self.full()
        if full is not None:
            raise full
        future: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(text, bucket_of(estimated_tokens(text)), future))
        if self._runner is None:
            self._runner = asyncio.ensure_future(self._run())
        try:
            return await future
        except asyncio.CancelledError:
            self._abandoned = True
            raise

    def _drop_abandoned(self) -> None:
        self._abandoned = False
        alive = [item for item in self._queue if not item.future.done()]
        self.dropped += len(self._queue) - len(alive)
        self._queue = deque(alive)

    def _close_batch(self) -> list[_Waiting]:
        """Take the oldest text and those of its bucket, up to the token budget.

        Texts whose caller has gone are dropped.
        """
        self._drop_abandoned()
        if not self._queue:
            return []
        bucket = self._queue[0].bucket
        room = max(1, self._max_tokens // bucket)
        batch: list[_Waiting] = []
        rest: deque[_Waiting] = deque()
        for item in self._queue:
            (batch if item.bucket == bucket and len(batch) < room else rest).append(item)
        self._queue = rest
        return batch

    async def _run(self) -> None:
        try:
            while self._queue:
                if self._max_delay_seconds > 0:
                    await self._wait_for_more()
                batch = self._close_batch()
                if batch:
                    await self._encode_batch(batch)
                    self._running = 0
        finally:
            self._runner = None
            self._running = 0
            if self._queue and not asyncio.get_running_loop().is_closed():
                self._runner = asyncio.ensure_future(self._run())

    async def _wait_for_more(self) -> None:
        waited = (time.perf_counter_ns() - self._queue[0].arrived_ns) / 1e9
        tokens = sum(item.bucket for item in self._queue)
        if tokens < self._max_tokens and waited < self._max_delay_seconds:
            await asyncio.sleep(self._max_delay_seconds - waited)

    async def _encode_batch(self, batch: list[_Waiting]) -> None:
        started = time.perf_counter_ns()
        self._running = len(batch)
        self._running_since = started / 1e9
        try:
            vectors = await self._run_encoder([item.text for item in batch])
        except Exception as error:  # of the encoder: it must reach the callers, not end the runner
            if len(batch) > 1:  # one bad text must not fail its neighbours
                for item in batch:
                    if not item.future.done():
                        await self._encode_batch([item])
                return
            self.failed += 1
            if not isinstance(error, OmniError):
                error = EncoderFailed(f"the query tower failed: {type(error).__name__}: {error}")
            if not batch[0].future.done():
                batch[0].future.set_exception(error)
            return
        encode_ns = time.perf_counter_ns() - started
        self.batches += 1
        self.texts += len(batch)
        self._text_seconds += 0.1 * (encode_ns / 1e9 / len(batch) - self._text_seconds)
        for item, vector in zip(batch, vectors, strict=True):
            if not item.future.done():
                item.future.set_result(Encoded(vector, started - item.arrived_ns, encode_ns))

    async def _run_encoder(self, texts: list[str]) -> Float32:
        vectors = await asyncio.get_running_loop().run_in_executor(
            self._executor, self._encode, texts
        )
        if vectors.shape != (len(texts), self._dimension):
            raise EncoderFailed(
                f"the query tower should make {(len(texts), self._dimension)} vectors, but made"
                f" {vectors.shape}"
            )
        norms = np.linalg.norm(vectors, axis=1)
        if not np.all(np.abs(norms - 1.0) < 1e-2):  # false for NaN, too
            raise EncoderFailed("the query tower made a vector that is not of unit length")
        return vectors
