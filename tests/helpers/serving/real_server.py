"""Small real releases, and a real server on one in a thread of the test process."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.small_releases import small_release, write_small_bundle
from encoders.towers.bundle import read_space_id
from encoders.towers.query_tower import QueryEncoder
from index_builder.releases.store import ReleaseStore
from retrieval.config import ServeConfig
from retrieval.server.server import Server, create_server

COUNTS = {"pin": 300, "product": 120, "query": 80, "ad": 60}
START_SECONDS = 120


@dataclass(frozen=True)
class SmallBundle:
    """A bundle with a tiny query tower, and that tower."""

    folder: Path
    encoder: QueryEncoder

    @property
    def space_id(self) -> str:
        return read_space_id(self.folder)


@dataclass(frozen=True)
class SmallStore:
    """A store with one active release, and the bundle that it was made from."""

    store: ReleaseStore
    bundle: SmallBundle
    release_id: str

    def copy(self, folder: Path) -> "SmallStore":
        """Copy the store, for a test that writes to it."""
        shutil.copytree(self.store.root, folder)
        return replace(self, store=ReleaseStore(folder))


def make_small_bundle(folder: Path) -> SmallBundle:
    return SmallBundle(folder, write_small_bundle(folder, seed=3))


def make_small_store(
    folder: Path, bundle: SmallBundle, counts: dict[str, int] | None = None
) -> SmallStore:
    store = ReleaseStore(folder)
    release_id = small_release(store, bundle.folder, bundle.encoder, counts=counts or COUNTS)
    return SmallStore(store, bundle, release_id)


@dataclass
class Running:
    """A server, and what it serves."""

    address: str
    http: str
    server: Server
    space_id: str
    made: SmallStore
    loop: asyncio.AbstractEventLoop

    @property
    def release_id(self) -> str:
        return self.made.release_id

    @property
    def store(self) -> ReleaseStore:
        return self.made.store

    @property
    def encoder(self) -> QueryEncoder:
        return self.made.bundle.encoder


async def start_server(store: ReleaseStore, **settings: Any) -> Server:
    """Start a server on free ports; ``settings`` are those of ``ServeConfig``."""
    usual = {"host": "127.0.0.1", "port": 0, "metrics_port": 0, "encoder_form": "torch"}
    server = await create_server(ServeConfig(releases=store.root, **{**usual, **settings}))
    await server.start()
    return server


@contextmanager
def serving(made: SmallStore, **settings: Any) -> Iterator[Running]:
    """Serve a store until the block ends; ``settings`` are those of ``ServeConfig``.

    What is written through the server goes to the store: give it a copy then.
    """
    started: futures.Future[tuple[Server, asyncio.AbstractEventLoop]] = futures.Future()
    stop = asyncio.Event()

    async def main() -> None:
        server = await start_server(made.store, **{"grace_seconds": 1.0, **settings})
        started.set_result((server, asyncio.get_running_loop()))
        await stop.wait()
        await server.stop()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    server, loop = started.result(START_SECONDS)
    try:
        active = server.releases.active
        assert active is not None, server.releases.reason_not_ready
        yield Running(
            address=f"127.0.0.1:{server.port}",
            http=f"http://127.0.0.1:{server.metrics_port}",
            server=server,
            space_id=active.space_id,
            made=made,
            loop=loop,
        )
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(START_SECONDS)
