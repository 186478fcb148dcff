"""Releases in service: watch CURRENT, load beside the old one, prove, swap atomically, go back at once, refuse what is broken."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from encoders.errors import OmniError, SpaceMismatch
from index_builder.ann import AnnIndex
from index_builder.errors import ReleaseError, ReleaseNotFound
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.store import CURRENT_NAME, ReleaseStore
from retrieval.config import ServeConfig
from retrieval.encoding.query_cache import Entry, QueryCache, most_frequent
from retrieval.encoding.query_encoder import open_query_encoding
from retrieval.encoding.redis_tier import RedisTier
from retrieval.errors import (
    InvalidRequest,
    NothingToRollBack,
    NotReady,
    ReleaseNotLoaded,
    ReleaseRefused,
    UnknownRelease,
)
from retrieval.observability.metrics import Metrics
from retrieval.process_tuning import lower_thread_priority
from retrieval.releases.serving_release import ServingRelease, prove

log = logging.getLogger("omni.releases")

RETRY_REFUSED_SECONDS = 30.0
"""A refused release is tried again after this (its files may have been restored); at once when CURRENT changes."""
PREWARM_CHUNK = 8
"""Texts encoded at a time: a live text of a pinned release waits behind one such part at most."""


class ReleaseChange(NamedTuple):
    """What an activation or a rollback has changed, by release id; the former one may be empty."""

    release_id: str
    previous_release_id: str


class LiveReleases:
    """Which release answers. Lives on the event loop; loading happens in one low-priority thread.

    Args:
        config: The server's.
        cache: Shared by all releases; keys hold the space and form.
        metrics: Where swaps and refusals are counted.
        redis: Second cache tier, by dimension.
        graphs: By release id, graphs that the parent process verified and loaded (workers share
            their memory).
        watch: Follow ``releases/CURRENT``; workers leave that to their supervisor.
    """

    def __init__(
        self,
        config: ServeConfig,
        cache: QueryCache,
        metrics: Metrics,
        *,
        redis: Callable[[int], RedisTier | None] = lambda dimension: None,
        graphs: Mapping[str, Mapping[str, AnnIndex]] | None = None,
        watch: bool = True,
    ) -> None:
        self.config = config
        self.store = ReleaseStore(config.releases)
        self.cache = cache
        self.metrics = metrics
        self.active: ServingRelease | None = None
        self.loaded: OrderedDict[str, ServingRelease] = OrderedDict()
        self.reason_not_ready = "no release has been loaded yet"
        self.on_change: list[Callable[[ServingRelease], Awaitable[None]]] = []
        self.load_seconds = 0.0
        self._redis = redis
        self._graphs = graphs or {}
        self._watch = watch
        self._lock = asyncio.Lock()
        self._loader = ThreadPoolExecutor(
            1, thread_name_prefix="load", initializer=lower_thread_priority
        )
        self._watcher: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._seen: tuple[int, int, int] | None = None
        self._refused_at = 0.0
        self._retired = [
            0.0,
            0.0,
            0.0,
            0.0,
        ]  # batches, texts, dropped, shared of releases that have left: counters never go down
        metrics.add_source(self._measurements)

    # --- asking ---

    def resolve(self, release_id: str) -> ServingRelease:
        """The active release, or the loaded one that a request pinned.

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
        """Refuse an id that a caller got wrong, before anybody tries to load it: no release is at fault then.

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

    # --- changing ---

    async def start(self) -> None:
        """Load the active release if there is one, then watch for changes.

        Never raises for a bad release: the server stays not ready.
        """
        await self._look()
        if self._watch:
            self._watcher = asyncio.ensure_future(self._watch_forever())

    async def adopt(self, release_id: str, handed_over: Sequence[Path] = ()) -> None:
        """Load, prove and serve a release without touching the store: what a worker does that its supervisor has started for it.

        Args:
            release_id: A published release.
            handed_over: Files that workers of the generation before wrote with ``hand_over``.

        Raises:
            OmniError: The release was refused.
        """
        async with self._lock, self._ready(release_id) as serving:
            await self._take_over(serving, handed_over)
            await self._swap(serving)

    async def hand_over(self, path: Path) -> None:
        """Write the most frequent cached queries with their vectors for the workers that will follow; the event loop goes on meanwhile."""
        prefix = self.active.prefix if self.active is not None else ""
        items = self.cache.items() if prefix else []
        await asyncio.to_thread(_write_frequent, path, prefix, items, self.config.prewarm_queries)

    async def _take_over(self, serving: ServingRelease, paths: Sequence[Path]) -> None:
        wanted: dict[str, None] = {}
        for path in paths:
            try:
                with np.load(path, allow_pickle=False) as content:
                    prefix, texts, vectors = (
                        str(content["prefix"]),
                        content["texts"].tolist(),
                        content["vectors"],
                    )
            except (OSError, ValueError, KeyError) as error:
                log.warning("the cache of the workers before could not be taken over: %s", error)
                continue
            if prefix == serving.prefix and vectors.shape[1:] == (serving.dimension,):
                for text, vector in zip(texts, vectors, strict=True):
                    self.cache.put(prefix + text, vector)
            else:
                wanted.update(dict.fromkeys(texts))
        await self._encode_into_cache(serving, list(wanted)[: self.config.prewarm_queries])

    async def stop(self) -> None:
        """Stop watching and close every release."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        for task in list(self._retiring):
            task.cancel()
        for serving in self.loaded.values():
            serving.close()
        self.loaded.clear()
        self.active = None
        self._loader.shutdown(wait=False, cancel_futures=True)

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
            async with self._ready(release_id) as serving:
                await self._in_loader(lambda: self.store.activate(release_id, verify=False))
                await self._swap(serving)
            return ReleaseChange(release_id, before)

    async def rollback(self) -> ReleaseChange:
        """Serve the previously active release again; at once if it is still in memory.

        Raises:
            NothingToRollBack: There is no earlier release.
        """
        async with self._lock:
            before = self.active.release_id if self.active else ""
            record = self.store.current_record()
            target = (
                next((old for old in record.history if self.store.path_of(old).is_dir()), None)
                if record
                else None
            )
            if target is None:
                raise NothingToRollBack(
                    "there is no earlier release to roll back to: only one was ever active, or the"
                    " earlier ones were collected."
                )
            async with self._ready(target) as serving:
                try:
                    await self._in_loader(lambda: self.store.rollback(verify=False))
                except ReleaseNotFound as error:
                    raise NothingToRollBack(str(error)) from error
                await self._swap(serving)
            return ReleaseChange(target, before)

    async def _in_loader(self, work: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._loader, work)

    @asynccontextmanager
    async def _ready(self, release_id: str) -> AsyncIterator[ServingRelease]:
        """A release in memory, loaded if need be.

        If the block fails before that release is among the loaded, it is closed again.
        """
        serving = self.loaded.get(release_id) or await self._load_or_count(release_id)
        try:
            yield serving
        except BaseException:
            if self.loaded.get(release_id) is not serving:
                await asyncio.to_thread(serving.close)
            raise

    async def _load_or_count(self, release_id: str) -> ServingRelease:
        started = time.perf_counter()
        try:
            if not self.store.path_of(release_id).is_dir():
                raise UnknownRelease(release_id)
            loading = self._loader.submit(self._load, release_id)
            try:
                serving = await asyncio.wrap_future(loading)
            except asyncio.CancelledError:  # the thread goes on: nobody will take what it makes
                loading.add_done_callback(_close_loaded)
                raise
            finally:
                del (
                    loading
                )  # it holds a failure, whose frames would hold it: a ring, and the release in it
        except OmniError as error:
            self.metrics.count("omni_releases_refused", (type(error).__name__,))
            log.error("release %r refused: %s", release_id, error)
            raise
        except Exception as error:  # a library tripped over a file in a way nobody foresaw: the old release must go on serving all the same
            self.metrics.count("omni_releases_refused", (type(error).__name__,))
            log.exception("release %r refused", release_id)
            raise ReleaseRefused(
                f"{release_id}: could not be loaded: {type(error).__name__}: {error}"
            ) from error
        self.load_seconds = time.perf_counter() - started
        return serving

    def _load(self, release_id: str) -> ServingRelease:
        """Runs in the loader thread: open, verify, encode, prove, replay the live log."""
        graphs = self._graphs.get(release_id)
        release = self.store.open(release_id, verify=graphs is None, graphs=graphs)
        with ExitStack() as undo:
            undo.callback(release.close)
            active = self.active
            if (
                active is not None
                and active.space_id == release.space_id
                and active.dimension != release.dimension
            ):
                raise SpaceMismatch(
                    active.space_id,
                    release.space_id,
                    f"{release_id}: same space id, but {release.dimension} dimensions",
                )
            encoding = open_query_encoding(
                release.query_encoder_path,
                release.forms_path,
                device=self.config.device,
                form=self.config.encoder_form,
                threads=self.config.encoder_threads,
            )
            parity = prove(release, encoding, self.config.golden_min_recall)
            redis = self._redis(release.dimension)
            follower = LiveFollower(self.store, release, poll_seconds=self.config.live_poll_seconds)
            undo.callback(follower.stop)
            serving = ServingRelease(
                release, encoding, follower.start(), self.cache, self.config, redis
            )
            undo.pop_all()
        agreement = (
            ", ".join(f"{name} {value:.4f}" for name, value in parity.items()) or "no golden texts"
        )
        log.info(
            "release %s proved itself: form %s, golden parity %s",
            release_id,
            encoding.form_id,
            agreement,
        )
        return serving

    async def _swap(self, serving: ServingRelease) -> None:
        """Make a loaded release the one that answers: one assignment, after its cache is warm."""
        old = self.active
        if old is serving:
            return
        if old is not None and old.prefix != serving.prefix:
            await self._prewarm(old, serving)
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
            self._retired = [
                total + count for total, count in zip(self._retired, _work_of(oldest), strict=True)
            ]
            task = asyncio.ensure_future(self._retire(oldest))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retire(self, serving: ServingRelease) -> None:
        """Close a release once the last request on it has finished.

        The last reference dies in the closing thread: giving back the mapped pages of a large
        release takes a tenth of a second.
        """
        await asyncio.sleep(0.05)
        while serving.in_flight > 0:
            await asyncio.sleep(0.05)
        last = [serving]
        del serving
        await asyncio.to_thread(_close_last, last)

    async def _prewarm(self, old: ServingRelease, new: ServingRelease) -> None:
        """Encode the most frequent cached queries with the new encoder, so that the hit rate does not collapse at the swap."""
        loop, count = asyncio.get_running_loop(), self.config.prewarm_queries
        best = await loop.run_in_executor(
            self._loader, most_frequent, self.cache.items(), old.prefix, count
        )
        await self._encode_into_cache(new, [text for text, _ in best])

    async def _encode_into_cache(self, new: ServingRelease, texts: Sequence[str]) -> None:
        """Encode those texts that are not cached yet.

        An encoder is used by one thread at a time: a release that may be asked already encodes in
        its own thread. Nobody else can use one that was just loaded, so that the loader's thread,
        with its low priority, may.
        """
        loop = asyncio.get_running_loop()
        executor = new.executor if self.loaded.get(new.release_id) is new else self._loader
        texts = [text for text in texts if self.cache.find(new.prefix + text) is None]
        done = 0
        for start in range(0, len(texts), PREWARM_CHUNK):
            chunk = texts[start : start + PREWARM_CHUNK]
            try:
                vectors = await loop.run_in_executor(executor, new.encoding.encode, chunk)
            except Exception as error:  # warming is a favour: it must never stop a swap
                log.warning("prewarming stopped after %d queries: %s", done, error)
                break
            for text, vector in zip(reversed(chunk), vectors[::-1], strict=True):
                self.cache.put(new.prefix + text, vector)
            done += len(chunk)
        self.metrics.count("omni_prewarmed_queries", (), done)
        if done:
            log.info("prewarmed %d queries for space %s", done, new.space_id[:16])

    # --- watching ---

    def _current_stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(Path(self.store.releases) / CURRENT_NAME)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    async def _watch_forever(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_seconds)
            try:
                stamp = self._current_stamp()
                if stamp != self._seen or (
                    self._refused_at and time.monotonic() - self._refused_at > RETRY_REFUSED_SECONDS
                ):
                    await self._look()
            except asyncio.CancelledError:
                raise
            except Exception:  # the watcher must outlive anything that a store can hold
                log.exception("looking at %s failed", CURRENT_NAME)

    async def _look(self) -> None:
        """Take over what CURRENT names, if it can be served."""
        async with self._lock:
            self._seen = self._current_stamp()
            self._refused_at = 0.0
            try:
                release_id = self.store.current()
                if release_id is None:
                    self.reason_not_ready = (
                        "no release is active in the store. Publish one with `omni rebuild`, or"
                        " `omni release activate RELEASE_ID`"
                    )
                    if self.active is None:
                        log.warning("not ready: %s", self.reason_not_ready)
                    return
                if self.active is not None and self.active.release_id == release_id:
                    return
                async with self._ready(release_id) as serving:
                    await self._swap(serving)
            except OmniError as error:
                self._refused_at = time.monotonic()
                self.reason_not_ready = str(error)
                log.error(
                    "still serving %s: %s",
                    self.active.release_id if self.active else "nothing",
                    error,
                )
            except (
                BaseException
            ):  # not looked at after all, e.g. no file descriptors: the next poll tries again
                self._seen = None
                raise

    def _measurements(self) -> list[tuple[str, tuple[str, ...], float]]:
        active = self.active
        rows: list[tuple[str, tuple[str, ...], float]] = [
            ("omni_ready", (), float(active is not None)),
            ("omni_release_load_seconds", (), self.load_seconds),
        ]
        if active is not None:
            rows.append(
                ("omni_release_info", (active.release_id, active.space_id, active.form_id), 1.0)
            )
            work = [
                sum(column)
                for column in zip(self._retired, *map(_work_of, self.loaded.values()), strict=True)
            ]
            names = (
                "omni_encode_batches",
                "omni_encode_texts",
                "omni_encode_dropped",
                "omni_cache_shared",
            )
            rows += [(name, (), float(value)) for name, value in zip(names, work, strict=True)]
            rows.append(("omni_encode_waiting", (), float(active.batcher.waiting)))
            rows += [
                ("omni_live_sequence", (name,), float(active.follower.view(name).sequence))
                for name in active.entities
            ]
            rows.append(("omni_live_failing", (), float(active.follower.error is not None)))
        return rows


def _write_frequent(
    path: Path, prefix: str, items: Sequence[tuple[str, Entry]], count: int
) -> None:
    held = most_frequent(items, prefix, count)
    vectors = (
        np.stack([entry.vector for _, entry in held])
        if held
        else np.zeros((0, 1), dtype=np.float32)
    )
    np.savez(
        path,
        prefix=prefix,
        texts=np.array([text for text, _ in held], dtype=np.str_),
        vectors=vectors,
    )


def _work_of(serving: ServingRelease) -> tuple[int, int, int, int]:
    """Batches, texts, dropped texts and shared misses of one release so far."""
    return (
        serving.batcher.batches,
        serving.batcher.texts,
        serving.batcher.dropped,
        serving.encoder.shared,
    )


def _close_last(last: list[ServingRelease]) -> None:
    """Close a release whose only reference is in this list, and drop it in this thread."""
    last.pop().close()


def _close_loaded(loading: Future[ServingRelease]) -> None:
    """Close what was loaded for a caller who has gone."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()
