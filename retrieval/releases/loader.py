"""Releases loaded and proven, in a thread that leaves the core to requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from encoders.errors import OmniError, SpaceMismatch
from index_builder.ann import AnnIndex
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.release import Release
from index_builder.releases.store import ReleaseStore
from retrieval.config import ServeConfig
from retrieval.encoding.query_cache import QueryCache
from retrieval.encoding.query_encoder import open_query_encoding
from retrieval.encoding.redis_tier import RedisTier
from retrieval.errors import ReleaseRefused, UnknownRelease
from retrieval.observability.metrics import Metrics
from retrieval.process_tuning import lower_thread_priority
from retrieval.releases.serving_release import ServingRelease, prove

log = logging.getLogger(__name__)

RedisOfDimension = Callable[[int], RedisTier | None]
"""Opens the second cache tier for vectors of a length, where there is one."""
Graphs = Mapping[str, Mapping[str, AnnIndex]]
"""By release id and entity type, graphs in memory."""


class ReleaseLoader:
    """Loads releases one at a time.

    Args:
        config: The server's.
        store: Where they are.
        cache: Of query vectors; shared by all releases.
        metrics: Where refusals are counted.
        redis: Second cache tier.
        graphs: That the parent process loaded (workers share their memory), of releases that it
            verified, as it has every one that a worker is told to load; None: there is no parent.
    """

    def __init__(
        self,
        config: ServeConfig,
        store: ReleaseStore,
        cache: QueryCache,
        metrics: Metrics,
        redis: RedisOfDimension,
        graphs: Graphs | None,
    ) -> None:
        self.executor = ThreadPoolExecutor(
            1, thread_name_prefix="load", initializer=lower_thread_priority
        )
        self.seconds = 0.0
        """That the last load took."""
        self._config = config
        self._store = store
        self._cache = cache
        self._metrics = metrics
        self._redis = redis
        self._graphs = graphs

    async def load(self, release_id: str, active: ServingRelease | None) -> ServingRelease:
        """Open, verify and prove a release, and replay the live log over it.

        Args:
            release_id: Which.
            active: What is served now; None: nothing.

        Raises:
            OmniError: The release was refused; logged and counted.
        """
        started = time.perf_counter()
        try:
            serving = await self._load_in_thread(release_id, active)
        except OmniError as error:
            self._metrics.count("omni_releases_refused", (type(error).__name__,))
            log.error("release %r refused: %s", release_id, error)
            raise
        except Exception as error:  # of a library; the old release must go on serving all the same
            self._metrics.count("omni_releases_refused", (type(error).__name__,))
            log.exception("release %r refused", release_id)
            raise ReleaseRefused(
                f"{release_id}: could not be loaded: {type(error).__name__}: {error}"
            ) from error
        self.seconds = time.perf_counter() - started
        return serving

    async def run(self, work: Callable[[], object]) -> None:
        """Run other slow work in the loader's thread."""
        await asyncio.get_running_loop().run_in_executor(self.executor, work)

    def close(self) -> None:
        """Stop the thread."""
        self.executor.shutdown(wait=False, cancel_futures=True)

    async def _load_in_thread(
        self, release_id: str, active: ServingRelease | None
    ) -> ServingRelease:
        if not self._store.path_of(release_id).is_dir():
            raise UnknownRelease(release_id)
        loading = self.executor.submit(self._load, release_id, active)
        try:
            return await asyncio.wrap_future(loading)
        except asyncio.CancelledError:  # the thread goes on: nobody will take what it makes
            loading.add_done_callback(_close_loaded)
            raise
        finally:
            # A failed future holds its error, whose frames hold the future and what was loaded
            del loading

    def _load(self, release_id: str, active: ServingRelease | None) -> ServingRelease:
        graphs = None if self._graphs is None else self._graphs.get(release_id)
        release = self._store.open(release_id, verify=self._graphs is None, graphs=graphs)
        with ExitStack() as undo:
            undo.callback(release.close)
            _require_same_dimension(release, active)
            encoding = open_query_encoding(
                release.query_encoder_path,
                release.forms_path,
                device=self._config.device,
                form=self._config.encoder_form,
                threads=self._config.encoder_threads,
            )
            parity = prove(release, encoding, self._config.golden_min_recall)
            redis = self._redis(release.dimension)
            follower = LiveFollower(
                self._store, release, poll_seconds=self._config.live_poll_seconds
            )
            undo.callback(follower.stop)
            serving = ServingRelease(
                release, encoding, follower.start(), self._cache, self._config, redis
            )
            undo.pop_all()
        cosines = ", ".join(f"{name} {value:.4f}" for name, value in parity.items())
        log.info(
            "release %s proved itself: form %s, golden parity %s",
            release_id,
            encoding.form_id,
            cosines or "no golden texts",
        )
        return serving


def _require_same_dimension(release: Release, active: ServingRelease | None) -> None:
    """Raise ``SpaceMismatch`` for vectors of another length under the same space id."""
    if (
        active is not None
        and active.space_id == release.space_id
        and active.dimension != release.dimension
    ):
        raise SpaceMismatch(
            active.space_id,
            release.space_id,
            f"{release.release_id}: same space id, but {release.dimension} dimensions",
        )


def _close_loaded(loading: Future[ServingRelease]) -> None:
    """Close what was loaded for a caller who has gone."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()
