"""One worker, in its own process: loads its release over inherited graphs, serves, reports."""

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
from index_builder.errors import DiskFull, PublisherBusy, ReleaseNotFound
from retrieval.config import ServeConfig
from retrieval.errors import NothingToRollBack, NotReady, ReleaseRefused, UnknownRelease
from retrieval.process_tuning import freeze_start_up_objects
from retrieval.releases.manager import ReleaseChange
from retrieval.server.release_graphs import Graphs
from retrieval.server.server import Server, WorkerContext, create_server

log = logging.getLogger(__name__)

ERRORS_BY_NAME: dict[str, type[OmniError]] = {
    kind.__name__: kind
    for kind in (NothingToRollBack, NotReady, PublisherBusy, DiskFull, ReleaseNotFound)
}
"""Errors of a change that reach the caller as what they were; others are ``ReleaseRefused``."""
RELEASE_ORDERS = {"prepare": "prepared", "serve": "serving", "forget": ""}
"""What a worker is told to do with a release in place, and the message that says it is done."""


def error_message(error: Exception) -> str:
    """Return what callers and the log read of an error."""
    if isinstance(error, OmniError):
        return str(error)
    return f"the release could not be taken into service: {type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a supervisor gives a new worker.

    Attributes:
        config: The server's, with its ports fixed.
        number: Of this worker, counted over all generations.
        release_id: What to serve; empty: nothing yet.
        graphs: By release id, what the supervisor has loaded for all its workers.
        handed_over: Files with the frequent queries of the former generation.
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


def run_worker(control: socket.socket, assignment: Assignment) -> int:
    """Run one worker, in the child, until its supervisor ends it; returns its exit code."""
    run: Callable[[Any], Any] = asyncio.run
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        log.info("uvloop is not installed; using asyncio's own loop")
    code: int = run(_serve(control, assignment))
    return code


class SupervisorLink:
    """A worker's side of the socket between it and its supervisor: one JSON object a line.

    Args:
        reader: Of that socket.
        writer: Of that socket.

    Attributes:
        ended: Set when the worker has to end: by a signal, or because the supervisor is gone.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ended = asyncio.Event()
        self._reader = reader
        self._writer = writer
        # In the order in which the supervisor answers them
        self._changes: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._orders: set[asyncio.Task[None]] = set()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def report_ready(self, error: str = "") -> None:
        """Tell that this worker listens, or why it never will."""
        self.send({"type": "ready", "error": error})
        await self._writer.drain()

    async def change_release(self, release_id: str) -> ReleaseChange:
        """Have the supervisor activate a release, or roll back for an empty id.

        Raises:
            OmniError: It was not done.
        """
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._changes.append(future)
        self.send({"type": "change", "release_id": release_id})
        reply = await future
        if reply["kind"] == "UnknownRelease":
            raise UnknownRelease(release_id)
        if reply["error"]:
            raise ERRORS_BY_NAME.get(reply["kind"], ReleaseRefused)(reply["error"])
        return ReleaseChange(str(reply["now"]), str(reply["before"]))

    async def listen(self, server: Server) -> None:
        """Handle the supervisor's messages until there are no more."""
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if message["type"] == "changed" and self._changes:
                    future = self._changes.popleft()
                    if not future.done():
                        future.set_result(message)
                elif message["type"] == "write_cache":
                    await write_cache(server, Path(message["path"]))
                    self.send({"type": "cache_written"})
                elif message["type"] in RELEASE_ORDERS:
                    self._begin(server, message["type"], message.get("release_id", ""))
        finally:  # no reply can come any more
            self.ended.set()
            for order in self._orders:
                order.cancel()
            for future in self._changes:
                if not future.done():
                    future.set_exception(
                        NotReady("the server is shutting down; ask again what it serves.")
                    )

    def _begin(self, server: Server, kind: str, release_id: str) -> None:
        """Carry out an order of ``RELEASE_ORDERS``; they wait for each other in their order."""
        order = asyncio.ensure_future(self._carry_out(server, kind, release_id))
        self._orders.add(order)
        order.add_done_callback(self._orders.discard)

    async def _carry_out(self, server: Server, kind: str, release_id: str) -> None:
        error = ""
        try:
            if kind == "prepare":
                await server.releases.prepare(release_id)
            elif kind == "serve":
                await server.releases.adopt(release_id)
            else:
                await server.releases.forget_prepared()
        except Exception as raised:
            error = error_message(raised)
            if not isinstance(raised, OmniError):
                log.exception("release %r: %s failed", release_id, kind)
        if answer := RELEASE_ORDERS[kind]:
            self.send({"type": answer, "release_id": release_id, "error": error})


async def _serve(control: socket.socket, assignment: Assignment) -> int:
    link = SupervisorLink(*await asyncio.open_connection(sock=control))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, link.ended.set)
    server = await create_server(
        assignment.config,
        worker=WorkerContext(
            number=assignment.number,
            graphs=assignment.graphs,
            change_release=link.change_release,
            snapshots_folder=assignment.folder,
            listener=assignment.listener,
        ),
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.reloader.reload_all)
    freeze_start_up_objects(server.releases.on_change)
    listening = asyncio.ensure_future(link.listen(server))
    try:
        if assignment.release_id and not await _load(server, assignment, link.ended):
            return 0
        await server.listen()
    except Exception as error:
        if not isinstance(error, OmniError):
            log.exception("release %r refused", assignment.release_id)
        await link.report_ready(error_message(error))
        return 1
    await link.report_ready()
    await link.ended.wait()
    await server.stop()
    listening.cancel()
    return 0


async def _load(server: Server, assignment: Assignment, ended: asyncio.Event) -> bool:
    """Load the release; False if the worker has to end first, while no caller depends on it."""
    loading = asyncio.ensure_future(
        server.releases.adopt(assignment.release_id, assignment.handed_over)
    )
    ending = asyncio.ensure_future(ended.wait())
    await asyncio.wait((loading, ending), return_when=asyncio.FIRST_COMPLETED)
    if ended.is_set():
        return False
    ending.cancel()
    await loading
    return True


async def write_cache(server: Server, path: Path) -> None:
    """Write the frequent queries for the next generation, as a whole or not at all.

    On a full disk, say, the next generation starts without.
    """
    part = path.with_name(f"part-{path.name}")
    try:
        await server.releases.hand_over(part)
        part.replace(path)
    except Exception as error:
        log.warning("the cache is not handed over: %s: %s", type(error).__name__, error)
        with contextlib.suppress(OSError):
            part.unlink()
