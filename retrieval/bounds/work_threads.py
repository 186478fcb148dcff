"""Threads for work that would hold up the event loop; the process may exit without them."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from retrieval.process_tuning import lower_thread_priority

T = TypeVar("T")

CLOSE_SECONDS = 2.0
"""How long ``close`` waits for work that has begun."""


class WorkThreads:
    """A few daemon threads and one queue.

    Unlike those of ``concurrent.futures`` they do not hold up the end of the process, and a caller
    who is cancelled comes back when its work has ended, not before: what it holds meanwhile (its
    places) is held as long as the work runs. So a piece of work should be short.

    Args:
        threads: How many.
        name: Of the threads.
        low_priority: Whether threads of normal priority go first where cores are short.
    """

    def __init__(self, threads: int, name: str, *, low_priority: bool = False) -> None:
        self._low_priority = low_priority
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread; a cancelled caller waits for the end of work that has begun."""
        job: Future[T] = Future()
        self._jobs.put((job, work))
        ended = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            if not job.cancel():
                await asyncio.wait((ended,))
                if not ended.cancelled():
                    ended.exception()  # looked at, as nobody else will
            raise
        finally:
            # Both hold an error, whose traceback holds this frame: a cycle with all that it read
            del job, ended

    def close(self) -> None:
        """End the threads; work that has not begun is cancelled."""
        while True:
            try:
                waiting = self._jobs.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        if self._low_priority:
            lower_thread_priority()
        while (taken := self._jobs.get()) is not None:
            job, work = taken
            if job.set_running_or_notify_cancel():
                try:
                    job.set_result(work())
                except BaseException as error:
                    job.set_exception(error)
            del taken, job, work  # an idle thread keeps nothing alive
