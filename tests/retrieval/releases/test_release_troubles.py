"""A release that cannot be swapped in leaves nothing behind, and what passes is tried again:
without a server, with a stand-in tower.
"""

import asyncio
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from index_builder.errors import PublisherBusy
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.release import Release
from index_builder.releases.store import ReleaseStore
from retrieval.config import ServeConfig
from retrieval.encoding.query_cache import QueryCache
from retrieval.encoding.redis_tier import RedisSettings, RedisTier
from retrieval.observability.metrics import Metrics
from retrieval.releases import loader
from retrieval.releases.manager import LiveReleases
from tests.helpers.waiting import until_async

DIMENSION = 32
VECTOR = np.eye(1, DIMENSION, dtype=np.float32)[0]


class Tower:
    """Counts texts, and threads that were inside at the same time."""

    form_id = "stand-in"
    dimension = DIMENSION

    def __init__(self) -> None:
        self.seconds = 0.0
        self.inside = self.overlaps = 0
        self.threads: set[str] = set()
        self.encoded: list[str] = []

    def unknown_share(self, text: str) -> float:
        return 0.0

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.inside += 1
        self.overlaps += self.inside > 1
        self.threads.add(threading.current_thread().name.rpartition("_")[0])
        time.sleep(self.seconds * len(texts))
        self.encoded += texts
        self.inside -= 1
        return np.tile(VECTOR, (len(texts), 1))


class Opened:
    """Every release that was opened, and the followers at work."""

    def __init__(self) -> None:
        self.releases: list[Release] = []
        self.following: set[LiveFollower] = set()

    @property
    def leases(self) -> list[str]:
        """Releases that ``gc`` may not collect."""
        return [release.release_id for release in self.releases if release._lease is not None]

    @property
    def followed(self) -> list[str]:
        """Releases with a follower's thread."""
        return [follower.release.release_id for follower in self.following]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    made = Opened()
    open_release, start, stop = ReleaseStore.open, LiveFollower.start, LiveFollower.stop

    def opening(*args, **kwargs) -> Release:
        made.releases.append(open_release(*args, **kwargs))
        return made.releases[-1]

    def starting(follower: LiveFollower) -> LiveFollower:
        made.following.add(follower)
        return start(follower)

    def stopping(follower: LiveFollower) -> None:
        made.following.discard(follower)
        stop(follower)

    monkeypatch.setattr(ReleaseStore, "open", opening)
    monkeypatch.setattr(LiveFollower, "start", starting)
    monkeypatch.setattr(LiveFollower, "stop", stopping)
    monkeypatch.setattr(loader, "open_query_encoding", lambda *args, **kwargs: Tower())
    monkeypatch.setattr(loader, "prove", lambda *args: {})
    return made


def releases_of(
    store: ReleaseStore, *, redis=lambda dimension: None, watch: bool = True, **settings
) -> LiveReleases:
    config = ServeConfig(releases=store.root, poll_seconds=0.02, metrics_port=None, **settings)
    return LiveReleases(
        config,
        QueryCache(config.cache_bytes, config.cache_ttl_seconds),
        Metrics(),
        redis=redis,
        watch=watch,
    )


@pytest.mark.parametrize(
    "error",
    [PublisherBusy("process 1 is publishing"), OSError(28, "No space left on device")],
    ids=repr,
)
async def test_activate_store_failure_closes_the_loaded_release(
    store: ReleaseStore, opened: Opened, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store.activate("b1")
    releases = releases_of(store)
    await releases.start()

    def fail(*args, **kwargs) -> None:
        raise error

    for method, call in (
        ("activate", lambda: releases.activate("a2")),
        ("rollback", releases.rollback),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(releases.store, method, fail)
            for _ in range(2):
                with pytest.raises(type(error)):
                    await call()
                assert opened.leases == opened.followed == list(releases.loaded) == ["b1"]
    assert await releases.rollback() == ("a1", "b1")
    assert await releases.activate("b1") == (
        "b1",
        "a1",
    ), "what is in memory is not closed by a failure"
    assert sorted(opened.leases) == sorted(opened.followed) == ["a1", "b1"]
    await releases.stop()
    assert not opened.leases and not opened.followed


async def test_activate_cancelled_call_closes_the_loaded_release(
    store: ReleaseStore, opened: Opened, monkeypatch
) -> None:
    gate, inside = threading.Event(), threading.Event()
    releases = releases_of(store)
    await releases.start()
    monkeypatch.setattr(loader, "prove", lambda *args: inside.set() or (gate.wait(60) and {}))
    call = asyncio.ensure_future(releases.activate("a2"))
    await until_async(inside.is_set)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.set()
    assert (await releases.activate("a2"))[0] == "a2", (
        "after the first has left the loader's thread"
    )
    assert len(opened.releases) == 3 and sorted(opened.leases) == sorted(opened.followed) == [
        "a1",
        "a2",
    ]
    await releases.stop()


async def test_start_invalid_redis_address_is_named_and_leaves_nothing_open(
    store: ReleaseStore, opened: Opened
) -> None:
    releases = releases_of(
        store,
        redis=lambda dimension: RedisTier(
            RedisSettings(url="user:secret@cache:6379", ttl_seconds=60.0), dimension
        ),
        watch=False,
    )
    for _ in range(2):
        await releases.start()
    assert "--redis" in releases.reason_not_ready and "'cache:6379'" in releases.reason_not_ready
    assert (
        "secret" not in releases.reason_not_ready
        and releases.metrics.value("omni_releases_refused", ("ConfigError",)) == 2
    )
    assert len(opened.releases) == 2 and not opened.leases and not opened.followed
    await releases.stop()


async def test_start_follower_that_cannot_start_is_stopped(
    store: ReleaseStore, opened: Opened, monkeypatch
) -> None:
    def fail(follower: LiveFollower) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(LiveFollower, "catch_up", fail)
    releases = releases_of(store, watch=False)
    await releases.start()
    assert "Too many open files" in releases.reason_not_ready
    assert not opened.leases and not opened.followed
    await releases.stop()


async def test_watch_unreadable_current_is_read_again(store: ReleaseStore, opened: Opened) -> None:
    releases = releases_of(store)
    await releases.start()
    current, failures = releases.store.current, [OSError(24, "Too many open files")] * 2

    def flaky() -> str | None:
        if failures:
            raise failures.pop()
        return current()

    releases.store.current = flaky
    store.activate("a2")
    await until_async(lambda: releases.active.release_id == "a2")
    await releases.stop()


async def test_watch_rollback_elsewhere_during_prewarming_is_followed(
    store: ReleaseStore, opened: Opened
) -> None:
    releases = releases_of(store)
    await releases.start()
    for i in range(20):
        releases.cache.put(f"{releases.active.prefix}text {i}", VECTOR)
    tower = Tower()
    tower.seconds = 0.02
    loader.open_query_encoding = lambda *args, **kwargs: tower  # undone by the fixture
    call = asyncio.ensure_future(releases.activate("b1"))
    await until_async(lambda: tower.inside)
    assert store.current() == "b1"
    store.rollback()
    await call
    await until_async(lambda: releases.active.release_id == "a1")
    await releases.stop()


async def test_prewarming_shares_no_encoder_and_encodes_nothing_twice(
    store: ReleaseStore, opened: Opened
) -> None:
    releases = releases_of(store)
    await releases.start()
    first = releases.active
    texts = [f"text {i}" for i in range(60)]
    for text in texts:
        releases.cache.put(first.prefix + text, VECTOR)
    await releases.activate("b1")
    assert sorted(releases.active.encoding.encoded) == sorted(texts)
    assert releases.active.encoding.threads == {"load"}, (
        "nobody else can use it yet: at low priority"
    )
    for text in ["only b", *(f"new {i}" for i in range(40))]:
        releases.cache.put(releases.active.prefix + text, VECTOR)
    first.encoding.seconds = 0.002

    async def pinned() -> None:
        for i in range(30):
            await first.encoder.lookup(f"pinned {i}")

    await asyncio.gather(releases.rollback(), pinned())
    assert first.encoding.overlaps == 0 and first.encoding.threads == {"encode"}
    encoded = first.encoding.encoded
    assert len(encoded) == len(set(encoded)) == 71 and not set(encoded) & set(texts)
    await releases.stop()


async def test_retired_release_is_freed_in_the_closing_thread(
    store: ReleaseStore, opened: Opened
) -> None:
    """Giving back the pages of a large release takes a tenth of a second: not on the event loop."""
    died: list[str] = []

    class Pages:
        def __del__(self) -> None:
            died.append(threading.current_thread().name)

    releases = releases_of(store, keep_releases=1, watch=False)
    await releases.start()
    for number, release_id in enumerate(("a2", "a1", "a2", "a1", "a2")):
        releases.active.release.entities["pin"].pages = Pages()
        opened.releases.clear()
        opened.following.clear()
        await releases.activate(release_id)
        await until_async(lambda wanted=number + 1: len(died) == wanted)
    assert threading.main_thread().name not in died
    await releases.stop()


async def test_retire_drops_the_last_reference_before_close_returns(
    store: ReleaseStore, opened: Opened
) -> None:
    """As above, whichever thread is quicker: the last reference is dropped before ``close`` reports
    back.
    """
    died: list[str] = []

    class Retired:
        in_flight = 0

        def close(self) -> None:
            pass

        def __del__(self) -> None:
            died.append(threading.current_thread().name)

    releases = releases_of(store, watch=False)
    await asyncio.gather(*(releases._retire(Retired()) for _ in range(50)))
    assert len(died) == 50 and threading.main_thread().name not in died
    await releases.stop()
