"""One worker, in its own process: loads its release over the graphs it inherited, serves, and talks with its supervisor over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.errors import OmniError
from index_builder.ann import AnnIndex
from index_builder.errors import DiskFull, PublisherBusy, ReleaseNotFound
from retrieval.config import ServeConfig
from retrieval.errors import NothingToRollBack, NotReady, ReleaseRefused, UnknownRelease
from retrieval.process_tuning import freeze_start_up_objects
from retrieval.releases.manager import ReleaseChange
from retrieval.server.server import Server, WorkerContext, create_server

log = logging.getLogger("omni.workers")

Graphs = dict[str, AnnIndex]
"""Per entity type, what a supervisor loads once for all its workers."""


def told(error: Exception) -> str:
    """What a caller and the log read of an error."""
    return (
        str(error)
        if isinstance(error, OmniError)
        else f"the release could not be taken into service: {type(error).__name__}: {error}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a supervisor gives a new worker.

    Attributes:
        config: The server's, with its ports fixed.
        number: Of this worker, counted over all generations.
        release_id: What to serve; empty: nothing yet.
        graphs: By release id, what the supervisor has verified and loaded for all its workers.
        handed_over: Files with the frequent queries of the generation before.
        folder: Where the workers exchange their metrics.
        listener: The socket from which all workers accept; None: each has its own on the port
            (grpcio).
    """

    config: ServeConfig
    number: int
    release_id: str
    graphs: dict[str, Graphs]
    handed_over: list[Path]
    folder: Path
    listener: socket.socket | None


def run_worker(control: socket.socket, given: Assignment) -> int:
    """The life of one worker, in the child, which talks with its supervisor over ``control``; returns its exit code."""
    run: Callable[[Any], Any] = asyncio.run
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        log.info("uvloop is not installed; using asyncio's own loop")
    code: int = run(_serve(control, given))
    return code


async def _serve(control: socket.socket, given: Assignment) -> int:
    reader, writer = await asyncio.open_connection(sock=control)
    changes: deque[asyncio.Future[dict[str, Any]]] = deque()
    """Waiting for their reply, in the order in which the supervisor answers them."""

    def send(message: dict[str, Any]) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    async def change_release(wanted: str) -> ReleaseChange:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        changes.append(future)
        send({"type": "change", "release_id": wanted})
        reply = await future
        if reply["error"]:
            if reply["kind"] == "UnknownRelease":
                raise UnknownRelease(wanted)
            kinds: tuple[type[OmniError], ...] = (
                NothingToRollBack,
                NotReady,
                PublisherBusy,
                DiskFull,
                ReleaseNotFound,
            )
            raise next((kind for kind in kinds if kind.__name__ == reply["kind"]), ReleaseRefused)(
                reply["error"]
            )
        return ReleaseChange(str(reply["now"]), str(reply["before"]))

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server: Server = await create_server(
        given.config,
        worker=WorkerContext(
            number=given.number,
            graphs=given.graphs,
            change_release=change_release,
            snapshots_folder=given.folder,
            listener=given.listener,
        ),
    )

    freeze_start_up_objects(server.releases.on_change)

    async def listen_to_supervisor() -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if message["type"] == "changed" and changes:
                    future = changes.popleft()
                    if not future.done():
                        future.set_result(message)
                elif message["type"] == "dump":
                    await write_cache(server, Path(message["path"]))
                    send({"type": "dumped"})
        finally:  # no reply can come any more
            stop.set()
            for future in changes:
                if not future.done():
                    future.set_exception(
                        NotReady("the server is shutting down; ask again what it serves.")
                    )

    listener = asyncio.ensure_future(listen_to_supervisor())
    try:
        if given.release_id:
            loading = asyncio.ensure_future(
                server.releases.adopt(given.release_id, given.handed_over)
            )
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():  # told to end while still loading: nobody depends on this worker yet
                return 0
            stopping.cancel()
            await loading
        await server.listen()
    except Exception as error:
        if not isinstance(error, OmniError):
            log.exception("release %r refused", given.release_id)
        send({"type": "ready", "error": told(error)})
        await writer.drain()
        return 1
    send({"type": "ready", "error": ""})
    await stop.wait()
    await server.stop()
    listener.cancel()
    return 0


async def write_cache(server: Server, path: Path) -> None:
    """Hand the frequent queries over: the whole file appears, or (a full disk, say) none, and the next generation starts without."""
    part = path.with_name(f"part-{path.name}")
    try:
        await server.releases.hand_over(part)
        part.replace(path)
    except Exception as error:
        log.warning("the cache is not handed over: %s: %s", type(error).__name__, error)
        with contextlib.suppress(OSError):
            part.unlink()
