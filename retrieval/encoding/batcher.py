"""Dynamic batching: texts that arrive together are encoded together, within length buckets.

Interactive texts go first; bulk texts take what they leave.
"""

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
from retrieval.encoding.cached_encoder import Encoded, Priority
from retrieval.errors import EncoderFailed, Overloaded

Float32 = npt.NDArray[np.float32]

LENGTH_BUCKETS = (8, 16, 32, 64)
"""Padded lengths in tokens; a batch holds texts of one bucket."""
BULK_SECONDS = 0.002
"""A batch takes bulk texts as long as it is expected to end within this, or one text alone.

So long an interactive text waits for bulk at most, as a forward pass cannot be interrupted.
"""
QUIET_BULK_SECONDS = 0.02
"""The same while no interactive text has come for ``QUIET_SECONDS``: larger batches cost less."""
QUIET_SECONDS = 1.0
BULK_TURN_SECONDS = 0.1
"""Bulk texts that wait have a batch at least so often, whatever else waits."""


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
    """One text in a queue."""

    __slots__ = ("arrived_ns", "bucket", "future", "text")

    def __init__(self, text: str, bucket: int, future: asyncio.Future[Encoded]) -> None:
        self.text = text
        self.bucket = bucket
        self.future = future
        self.arrived_ns = time.perf_counter_ns()


class _BulkRoom:
    """How many padded tokens a batch with bulk texts may have: learned from what they took."""

    def __init__(self) -> None:
        self._tokens_per_second = LENGTH_BUCKETS[-1] / BULK_SECONDS

    def tokens(self, seconds: float) -> int:
        """Estimate how many end within this time."""
        return int(self._tokens_per_second * seconds)

    def learn(self, tokens: int, seconds: float) -> None:
        """Take in what a batch took; a small fast one says nothing about larger ones."""
        if seconds > BULK_SECONDS or 2 * tokens >= self.tokens(BULK_SECONDS):
            self._tokens_per_second = tokens / max(seconds, 1e-6)


class Batcher:
    """Feeds one encoder from one event loop.

    A batch is closed when its padded tokens reach ``max_tokens``, or when the encoder is free and
    the oldest text has waited ``max_delay_seconds``. With a delay of 0 an idle encoder starts at
    once and batches form while it is busy: no latency is lost when traffic is low.

    Interactive and bulk texts have queues of their own. The oldest interactive text decides which
    length bucket goes next; bulk texts of that bucket fill a batch up to ``BULK_SECONDS``. The
    oldest bulk text decides when no interactive one waits, and once in ``BULK_TURN_SECONDS``: so
    nothing starves.

    Args:
        encode: ``list of B texts -> (B, D)`` float32 unit rows; runs in ``executor``.
        executor: One thread per encoder; not shut down here.
        dimension: Length of the vectors.
        max_tokens: Token budget of a batch.
        max_delay_seconds: Longest wait of an idle encoder for more texts.
        max_queue: Texts that may wait in each queue; one more raises ``Overloaded``.
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
        self._queues: dict[Priority, deque[_Waiting]] = {kind: deque() for kind in Priority}
        self._bulk_room = _BulkRoom()
        self._bulk_turn = 0.0  # when the oldest bulk text went last
        self._asked = 0.0  # when the last interactive text came
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
        """Texts in the queues."""
        return sum(map(len, self._queues.values()))

    def expected_wait_seconds(self, priority: Priority = Priority.INTERACTIVE) -> float:
        """Estimate how long a text that arrives now takes, behind those that go before it."""
        left = self._text_seconds * self._running
        if left:
            left = max(0.0, left - (time.perf_counter() - self._running_since))
        return left + self._text_seconds * (len(self._queues[priority]) + 1)

    def full(self, priority: Priority = Priority.INTERACTIVE) -> Overloaded | None:
        """Return the error for one more text, or None when its queue has a place."""
        if len(self._queues[priority]) < self._max_queue:
            return None
        if self._abandoned:
            self._drop_abandoned()
            if len(self._queues[priority]) < self._max_queue:
                return None
        retry_after_ms = max(5, int(self.expected_wait_seconds(priority) * 500))
        return Overloaded("query encoder", self._max_queue, retry_after_ms)

    def late(self, remaining_seconds: float | None) -> Overloaded | None:
        """Return the error for an interactive text that would probably not be encoded in this time.

        An idle encoder refuses nothing.
        """
        waiting = len(self._queues[Priority.INTERACTIVE])
        if remaining_seconds is None or not (waiting or self._running):
            return None
        wait = self.expected_wait_seconds()
        if wait <= remaining_seconds:
            return None
        places = waiting + self._running
        retry_after_ms = max(5, int(wait * 1e3))
        return Overloaded("query encoder (within your deadline)", places, retry_after_ms)

    async def submit(self, text: str, priority: Priority = Priority.INTERACTIVE) -> Encoded:
        """Encode one normalised text; cancelling the call takes it out of its queue.

        Raises:
            Overloaded: Its queue is full.
            EncoderFailed: The encoder raised, or made a vector with NaN, a wrong size or a wrong
                norm.
        """
        full = self.full(priority)
        if full is not None:
            raise full
        future: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
        if priority is Priority.INTERACTIVE:
            self._asked = time.perf_counter()
        self._queues[priority].append(_Waiting(text, bucket_of(estimated_tokens(text)), future))
        if self._runner is None:
            self._runner = asyncio.ensure_future(self._run())
        try:
            return await future
        except asyncio.CancelledError:
            self._abandoned = True
            raise

    def promote(self, text: str) -> None:
        """Let a bulk text go with the interactive ones, as an interactive caller waits for it."""
        bulk = self._queues[Priority.BULK]
        for item in bulk:
            if item.text == text and not item.future.done():
                bulk.remove(item)
                self._queues[Priority.INTERACTIVE].append(item)
                return

    def _drop_abandoned(self) -> None:
        self._abandoned = False
        for priority, queue in self._queues.items():
            alive = deque(item for item in queue if not item.future.done())
            self.dropped += len(queue) - len(alive)
            self._queues[priority] = alive

    def _close_batch(self) -> list[_Waiting]:
        """Take the texts that go next, all of one bucket; those whose caller has gone are dropped.

        At most the token budget, with bulk texts at most what ends soon.
        """
        self._drop_abandoned()
        leading = self._leading()
        if leading is None:
            return []
        bucket = self._queues[leading][0].bucket
        room = max(1, self._max_tokens // bucket)
        quiet = time.perf_counter() - self._asked > QUIET_SECONDS
        bulk_seconds = QUIET_BULK_SECONDS if quiet else BULK_SECONDS
        bulk_room = max(1, self._bulk_room.tokens(bulk_seconds) // bucket)
        if leading is Priority.BULK:
            self._bulk_turn = time.perf_counter()
            return self._take(Priority.BULK, bucket, min(room, bulk_room))
        batch = self._take(Priority.INTERACTIVE, bucket, room)
        return batch + self._take(Priority.BULK, bucket, min(room, bulk_room) - len(batch))

    def _leading(self) -> Priority | None:
        """Return whose oldest text goes next; None: no text waits."""
        bulk = self._queues[Priority.BULK]
        if not self._queues[Priority.INTERACTIVE]:
            return Priority.BULK if bulk else None
        since = time.perf_counter() - BULK_TURN_SECONDS
        if bulk and self._bulk_turn < since and bulk[0].arrived_ns / 1e9 < since:
            return Priority.BULK
        return Priority.INTERACTIVE

    def _take(self, priority: Priority, bucket: int, room: int) -> list[_Waiting]:
        """Take the oldest texts of a bucket out of a queue."""
        taken: list[_Waiting] = []
        rest: deque[_Waiting] = deque()
        for item in self._queues[priority]:
            (taken if item.bucket == bucket and len(taken) < room else rest).append(item)
        self._queues[priority] = rest
        return taken

    async def _run(self) -> None:
        try:
            while self.waiting:
                if self._max_delay_seconds > 0:
                    await self._wait_for_more()
                batch = self._close_batch()
                if batch:
                    await self._encode_batch(batch)
                    self._running = 0
        finally:
            self._runner = None
            self._running = 0
            if self.waiting and not asyncio.get_running_loop().is_closed():
                self._runner = asyncio.ensure_future(self._run())

    async def _wait_for_more(self) -> None:
        waiting = [item for queue in self._queues.values() for item in queue]
        waited = (time.perf_counter_ns() - min(item.arrived_ns for item in waiting)) / 1e9
        tokens = sum(item.bucket for item in waiting)
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
        self._bulk_room.learn(batch[0].bucket * len(batch), encode_ns / 1e9)
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
