"""A real server on a small real release, in a thread of the test process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.small_releases import small_release, write_small_bundle
from index_builder.releases.store import ReleaseStore
from retrieval.config import ServeConfig
from retrieval.server.server import Server, create_server

COUNTS = {"pin": 300, "product": 120, "query": 80, "ad": 60}


@dataclass
class Running:
    address: str
    http: str
    server: Server
    release_id: str
    space_id: str
    store: ReleaseStore
    encoder: Any
    loop: asyncio.AbstractEventLoop


@contextmanager
def serving(
    folder: Path, counts: dict[str, int] | None = None, **settings: Any
) -> Iterator[Running]:
    store = ReleaseStore(folder / "store")
    encoder = write_small_bundle(folder / "bundle", seed=3)
    release_id = small_release(store, folder / "bundle", encoder, counts=counts or COUNTS)
    started = threading.Event()
    stop: list[asyncio.Event] = []
    found: list[Server] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        config = ServeConfig(
            releases=store.root,
            host="127.0.0.1",
            port=0,
            metrics_port=0,
            encoder_form="torch",
            grace_seconds=1.0,
            **settings,
        )
        server = await create_server(config)
        stop.append(asyncio.Event())
        loops.append(asyncio.get_running_loop())
        found.append(server)
        await server.start()
        started.set()
        await stop[0].wait()
        await server.stop()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(60), "the server did not start"
    server = found[0]
    try:
        active = server.releases.active
        assert active is not None, server.releases.reason_not_ready
        yield Running(
            f"127.0.0.1:{server.port}",
            f"http://127.0.0.1:{server.metrics_port}",
            server,
            release_id,
            active.space_id,
            store,
            encoder,
            loops[0],
        )
    finally:
        loops[0].call_soon_threadsafe(stop[0].set)
        thread.join(20)
