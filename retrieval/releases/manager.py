"""Which release answers: follow CURRENT, swap atomically, go back at once, retire what is idle."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from encoders.errors import OmniError
from index_builder.errors import ReleaseError, ReleaseNotFound
from index_builder.releases.store import CURRENT_NAME, ReleaseStore
from retrieval.config import ServeConfig
from retrieval.encoding.query_cache import QueryCache
from retrieval.errors import (
    InvalidRequest,
    NothingToRollBack,
    NotReady,
    ReleaseNotLoaded,
    UnknownRelease,
)
from retrieval.observability.metric_catalogue import Labels
from retrieval.observability.metrics import Metrics
from retrieval.releases.cache_warming import CacheWarmer
from retrieval.releases.current_file import CurrentFile
from retrieval.releases.loader import Graphs, RedisOfDimension, ReleaseLoader
from retrieval.releases.remote_status import nothing_active, remote_measurements
from retrieval.releases.serving_release import EncoderWork, ServingRelease

log = logging.getLogger(__name__)

IDLE_POLL_SECONDS = 0.05
"""How often a release that left is asked whether its last call has ended."""


class ReleaseChange(NamedTuple):
    """What an activation or a rollback has changed, by release id; the former one may be empty."""

    release_id: str
    previous_release_id: str


class LiveReleases:
    """The releases in memory, one of them active. Lives on the event loop.

    Args:
        config: The server's.
        cache: Of query vectors, shared by all releases; keys hold the space and form.
        metrics: Where swaps and refusals are counted.
        redis: Second cache tier.
        graphs: As in ``ReleaseLoader``.
        watch: Follow ``releases/CURRENT``; workers leave that to their supervisor.
    """

    def __init__(
        self,
        config: ServeConfig,
        cache: QueryCache,
        metrics: Metrics,
        *,
        redis: RedisOfDimension = lambda dimension: None,
        graphs: Graphs | None = None,
        watch: bool = True,
    ) -> None:
        self.config = config
        self.store = ReleaseStore(config.releases)
        self.cache = cache
        self.metrics = metrics
        self.active: ServingRelease | None = None
        self._prepared: ServingRelease | None = None
        self.loaded: OrderedDict[str, ServingRelease] = OrderedDict()
        self._refusal = "" if config.remote_store else "no release has been loaded yet"
        self.on_change: list[Callable[[ServingRelease], Awaitable[None]]] = []
        self.loader = ReleaseLoader(config, self.store, cache, metrics, redis, graphs)
        self._warmer = CacheWarmer(cache, metrics, config.prewarm_queries, self.loader.executor)
        self._current = CurrentFile(self.store)
        self._watch = watch
        self._lock = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._work_of_retired = EncoderWork()  # counters never go down
        metrics.add_source(self._measurements)

    @property
    def reason_not_ready(self) -> str:
        """Why there is no active release, as of now."""
        return self._refusal or nothing_active(self.config)

    # ---- asking ----------------------------------------------------------------------------------

    def resolve(self, release_id: str) -> ServingRelease:
        """Return the active release, or the loaded one that a request pinned.

        Raises:
            NotReady: Nothing is loaded.
            ReleaseNotLoaded: The pinned release is not in memory.
        """
        active = self.active
        if active is None:
            raise NotReady(f"no release is served yet: {self.reason_not_ready}")
        if not release_id or release_id == active.release_id:
            return active
        pinned = self.loaded.get(release_id)
        if pinned is None:
            raise ReleaseNotLoaded(release_id, self.loaded)
        return pinned

    def check_published(self, release_id: str) -> None:
        """Refuse an id that a caller got wrong, before anything is loaded: no release is at fault.

        Raises:
            InvalidRequest: No release can have this id.
            UnknownRelease: The store has no such release.
        """
        try:
            path = self.store.path_of(release_id)
        except ReleaseError as error:
            raise InvalidRequest(f"release_id: {error}") from error
        if not path.is_dir():
            raise UnknownRelease(release_id)

    # ---- changing --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the active release if there is one, then watch for changes.

        Never raises for a bad release: the server stays not ready.
        """
        await self._follow()
        if self._watch:
            self._watcher = asyncio.ensure_future(self._watch_forever())

    async def stop(self) -> None:
        """Stop watching and close every release."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        for task in list(self._retiring):
            task.cancel()
        await self._drop_prepared()
        for serving in self.loaded.values():
            serving.close()
        self.loaded.clear()
        self.active = None
        self.loader.close()

    async def adopt(self, release_id: str, handed_over: Sequence[Path] = ()) -> None:
        """Load, prove and serve a release without touching the store: a worker's start.

        Args:
            release_id: A published release.
            handed_over: Files that workers of the former generation wrote with ``hand_over``.

        Raises:
            OmniError: The release was refused.
        """
        async with self._lock, self._in_memory(release_id) as serving:
            await self._warmer.read(handed_over, serving, self._encoder_thread(serving))
            await self._swap(serving)

    async def prepare(self, release_id: str) -> None:
        """Load and prove a verified release, and warm the cache for it; ``adopt`` then swaps.

        Raises:
            OmniError: The release was refused; nothing of it is left.
        """
        async with self._lock:
            await self._drop_prepared()
            async with self._in_memory(release_id) as serving:
                if self.active is not None and self.active.prefix != serving.prefix:
                    executor = self._encoder_thread(serving)
                    await self._warmer.carry_over(self.active, serving, executor)
                self._prepared = serving

    async def forget_prepared(self) -> None:
        """Close what ``prepare`` has loaded, unless it is served."""
        async with self._lock:
            await self._drop_prepared()

    async def _drop_prepared(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and self.loaded.get(prepared.release_id) is not prepared:
            await asyncio.to_thread(_close_last, [prepared])

    async def hand_over(self, path: Path) -> None:
        """Write the most frequent cached queries with their vectors for the next workers."""
        await self._warmer.write(path, self.active)

    async def activate(self, release_id: str) -> ReleaseChange:
        """Load, prove, make active in the store, swap.

        Raises:
            InvalidRequest: No release can have this id.
            UnknownRelease: The store has no such release.
            OmniError: It was refused; the old one keeps serving and CURRENT stays as it was.
        """
        self.check_published(release_id)
        async with self._lock:
            before = self.active.release_id if self.active else ""
            async with self._in_memory(release_id) as serving:
                await self.loader.run(lambda: self.store.activate(release_id, verify=False))
                await self._swap(serving)
            return ReleaseChange(release_id, before)

    async def rollback(self) -> ReleaseChange:
        """Serve the previously active release again; at once if it is still in memory.

        Raises:
            NothingToRollBack: There is no earlier release.
        """
        async with self._lock:
            before = self.active.release_id if self.active else ""
            target = previous_release(self.store)
            async with self._in_memory(target) as serving:
                try:
                    await self.loader.run(lambda: self.store.rollback(to=target, verify=False))
                except ReleaseNotFound as error:
                    raise NothingToRollBack(str(error)) from error
                await self._swap(serving)
            return ReleaseChange(target, before)

    @asynccontextmanager
    async def _in_memory(self, release_id: str) -> AsyncIterator[ServingRelease]:
        """Load a release if need be; close it again if the block fails before it is ``loaded``."""
        prepared = self._prepared
        if prepared is not None and prepared.release_id == release_id:
            self._prepared, serving = None, prepared
        else:
            serving = self.loaded.get(release_id) or await self.loader.load(release_id, self.active)
        try:
            yield serving
        except BaseException:
            if self.loaded.get(release_id) is not serving:
                await asyncio.to_thread(serving.close)
            raise

    def _encoder_thread(self, serving: ServingRelease) -> Executor:
        """Return the one thread that may use a release's encoder now.

        Requests use that of a loaded release in its own thread. Nobody asks one that is not loaded
        yet: the loader's thread, with its low priority, may use it.
        """
        is_loaded = self.loaded.get(serving.release_id) is serving
        return serving.executor if is_loaded else self.loader.executor

    async def _swap(self, serving: ServingRelease) -> None:
        """Make a release in memory the active one, by one assignment after its cache is warm."""
        old = self.active
        if old is serving:
            return
        if old is not None and old.prefix != serving.prefix:
            await self._warmer.carry_over(old, serving, self._encoder_thread(serving))
        self.loaded[serving.release_id] = serving
        self.loaded.move_to_end(serving.release_id)
        self.active = serving
        self.metrics.count("omni_release_swaps")
        log.info(
            "serving release %s (space %s, form %s)",
            serving.release_id,
            serving.space_id[:16],
            serving.form_id,
        )
        for callback in self.on_change:
            await callback(serving)
        while len(self.loaded) > self.config.keep_releases:
            _, oldest = self.loaded.popitem(last=False)
            self._work_of_retired = self._work_of_retired.plus(oldest.work())
            task = asyncio.ensure_future(self._retire(oldest))
            self._retiring.add(task)
            task.add_done_callback(self._retired)

    def _retired(self, task: asyncio.Future[None]) -> None:
        """Forget a task, and say what went wrong in it: nobody else would."""
        self._retiring.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("closing a release failed: %s: %s", type(error).__name__, error)

    async def _retire(self, serving: ServingRelease) -> None:
        """Close a release once the last request on it has finished.

        The last reference dies in the closing thread: giving back the mapped pages of a large
        release takes a tenth of a second.
        """
        await asyncio.sleep(IDLE_POLL_SECONDS)
        while serving.in_flight > 0:
            await asyncio.sleep(IDLE_POLL_SECONDS)
        last = [serving]
        del serving
        await asyncio.to_thread(_close_last, last)

    # ---- following the store ---------------------------------------------------------------------

    async def _watch_forever(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_seconds)
            try:
                if self._current.is_due():
                    await self._follow()
            except asyncio.CancelledError:
                raise
            except Exception:  # the watcher must outlive anything that a store can hold
                log.exception("looking at %s failed", CURRENT_NAME)

    async def _follow(self) -> None:
        """Take over what CURRENT names, if it can be served."""
        async with self._lock:
            self._current.mark_read()
            try:
                release_id = self.store.current()
                if release_id is None:
                    self._refusal = ""
                    if self.active is None:
                        log.warning("not ready: %s", self.reason_not_ready)
                elif self.active is None or self.active.release_id != release_id:
                    async with self._in_memory(release_id) as serving:
                        await self._swap(serving)
            except OmniError as error:
                self._current.mark_refused()
                self._refusal = str(error)
                served = self.active.release_id if self.active else "nothing"
                log.error("still serving %s: %s", served, error)
            except BaseException:  # no file descriptors, say: the next poll tries again
                self._current.mark_unread()
                raise

    def _measurements(self) -> list[tuple[str, Labels, float]]:
        active = self.active
        rows: list[tuple[str, Labels, float]] = [
            ("omni_ready", (), float(active is not None)),
            ("omni_release_load_seconds", (), self.loader.seconds),
            *remote_measurements(self.config),
        ]
        if active is None:
            return rows
        work = self._work_of_retired
        for serving in self.loaded.values():
            work = work.plus(serving.work())
        live_sequences = {name: active.follower.view(name).sequence for name in active.entities}
        return [
            *rows,
            ("omni_release_info", (active.release_id, active.space_id, active.form_id), 1.0),
            ("omni_encode_batches", (), float(work.batches)),
            ("omni_encode_texts", (), float(work.texts)),
            ("omni_encode_dropped", (), float(work.dropped)),
            ("omni_cache_shared", (), float(work.shared)),
            ("omni_encode_waiting", (), float(active.batcher.waiting)),
            *(
                ("omni_live_sequence", (name,), float(sequence))
                for name, sequence in live_sequences.items()
            ),
            ("omni_live_failing", (), float(active.follower.error is not None)),
        ]


def previous_release(store: ReleaseStore) -> str:
    """Return the release that a rollback makes active, as the store says.

    Raises:
        NothingToRollBack: There is none.
    """
    try:
        return store.rollback_target()
    except ReleaseNotFound as error:
        raise NothingToRollBack(str(error)) from error


def _close_last(last: list[ServingRelease]) -> None:
    """Close a release whose only reference is in this list, and drop it in this thread."""
    last.pop().close()
