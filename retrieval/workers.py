"""Several processes on one port: a supervisor loads each release's graphs once and forks generations of workers that share that memory.

The supervisor starts no threads and no gRPC, because neither survives a fork; each worker reads attributes (polars) and its encoder itself.
A new release means a new generation: its workers load, prove themselves, take over the frequent cached queries and listen; only then do the
workers before stop accepting and finish what they have. A release that any new worker refuses never gets a request.

All workers of all generations accept from one listening socket that the supervisor holds open, so that no connection is lost when a
generation ends (with the grpcio transport each worker has its own socket on the port, and what waits in a closed one is reset).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from encoders.errors import OmniError
from index_builder.ann import AnnIndex
from index_builder.entity_index import EntityIndex
from index_builder.errors import ReleaseNotFound
from index_builder.publishing import CURRENT_NAME, ReleaseStore
from retrieval.errors import AddressInUse, NothingToRollBack, ReleaseRefused, UnknownRelease
from retrieval.garbage import set_start_up_apart
from retrieval.http2.server import BACKLOG
from retrieval.query_encoding import choose_form
from retrieval.serve_config import ServeConfig
from retrieval.server import Server, address_is_free, create_server

log = logging.getLogger("omni.workers")

READY_SECONDS = 300.0
"""How long a worker may take from fork to listening."""
RESTART_PAUSE_SECONDS = 0.5
PR_SET_PDEATHSIG = 1

Graphs = dict[str, AnnIndex]


@dataclass(slots=True)
class Worker:
    """One child process."""

    pid: int
    number: int
    control: socket.socket
    release_id: str
    ready: bool = False
    error: str = ""
    dumped: bool = False
    buffer: bytearray = field(default_factory=bytearray)


class Supervisor:
    """Parent of all workers of one server; everything runs in its single thread.

    Args:
        config: ``port`` and ``metrics_port`` may be 0; they are fixed before the first fork.
        announce: Called once with where the server listens.
    """

    def __init__(self, config: ServeConfig, announce: Callable[[dict[str, Any]], None]) -> None:
        self.store = ReleaseStore(config.releases)
        self._announce = announce
        self._reserved: list[socket.socket] = []
        self._listener: socket.socket | None = None
        port = self._reserve(config.host, config.port, "--port")
        metrics_port = None if config.metrics_port is None else self._reserve(config.host, config.metrics_port, "--metrics-port")
        self.config = replace(config, port=port, metrics_port=metrics_port)
        if config.transport == "http2":
            self._listener = self._reserved[0]
        self.workers: dict[int, Worker] = {}
        self.release_id = ""
        self.reason = "no release is active in the store. Publish one with `omni rebuild`"
        self._graphs: OrderedDict[str, Graphs] = OrderedDict()
        self._folder = Path(tempfile.mkdtemp(prefix="omni-serve-"))
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._numbers = 0
        self._seen: tuple[int, int] | None = None
        self._draining: set[int] = set()

    def _reserve(self, host: str, port: int, flag: str) -> int:
        """Bind without listening, so that the port stays ours between two generations."""
        if port and not address_is_free(host, port):
            raise AddressInUse(f"{host}:{port}", flag)
        held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
        self._reserved.append(held)
        return int(held.getsockname()[1])

    # --- the loop ---

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        gc.freeze()  # a collection would write to every object, and take the workers' shared pages apart
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            if self._listener is not None:
                self._listener.listen(BACKLOG)
            self._follow_store()
            if not self.workers:
                self._fork_generation("", [])
                self._wait_ready(list(self.workers.values()))
            self._announce(
                {
                    "host": self.config.host,
                    "port": self.config.port,
                    "metrics_port": self.config.metrics_port,
                    "release_id": self.release_id or None,
                    "reason": None if self.release_id else self.reason,
                    "workers": self.config.workers,
                }
            )
            while not self._stopping:
                self._pump(self.config.poll_seconds)
                self._reap()
                if self._stamp() != self._seen:
                    self._follow_store()
        finally:
            self._shut_down()

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = os.stat(self.store.releases / CURRENT_NAME)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _follow_store(self) -> None:
        self._seen = self._stamp()
        try:
            release_id = self.store.current()
            if release_id is not None and release_id != self.release_id:
                self._change_generation(release_id)
        except OmniError as error:
            self.reason = str(error)
            log.error("still serving %s: %s", self.release_id or "nothing", error)

    def _pump(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            worker: Worker = key.data
            try:
                content = worker.control.recv(65536)
            except OSError:
                content = b""
            if not content:
                self._selector.unregister(worker.control)
                continue
            worker.buffer += content
            while (end := worker.buffer.find(b"\n")) >= 0:
                line, worker.buffer = bytes(worker.buffer[:end]), worker.buffer[end + 1 :]
                self._handle(worker, json.loads(line))

    def _handle(self, worker: Worker, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "ready":
            worker.ready, worker.error = True, message["error"]
        elif kind == "dumped":
            worker.dumped = True
        elif kind == "change":
            before = self.release_id
            try:
                now = self._activate(message["release_id"]) if message["release_id"] else self._rollback()
                reply = {"type": "changed", "now": now, "before": before, "error": "", "kind": ""}
            except OmniError as error:
                reply = {"type": "changed", "now": "", "before": before, "error": str(error), "kind": type(error).__name__}
            self._send(worker, reply)
            self._retire_all_but(self.release_id)

    @staticmethod
    def _send(worker: Worker, message: dict[str, Any]) -> None:
        try:
            worker.control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            log.warning("worker %d does not listen to its supervisor", worker.pid)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            worker = self.workers.pop(pid, None)
            self._draining.discard(pid)
            if worker is None:
                continue
            self._close_control(worker)
            if not self._stopping and worker.release_id == self.release_id and worker.ready and not worker.error:
                log.error("worker %d ended with status %d; starting another", pid, os.waitstatus_to_exitcode(status))
                time.sleep(RESTART_PAUSE_SECONDS)
                self._fork(self.release_id, [])

    def _close_control(self, worker: Worker) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.control)
        worker.control.close()

    # --- releases ---

    def _activate(self, release_id: str) -> str:
        if not self.store.path_of(release_id).is_dir():
            raise UnknownRelease(release_id)
        self._change_generation(release_id, retire=False)
        self.store.activate(release_id, verify=False)
        self._seen = self._stamp()
        return release_id

    def _rollback(self) -> str:
        record = self.store.current_record()
        target = next((old for old in record.history if self.store.path_of(old).is_dir()), None) if record else None
        if target is None:
            raise NothingToRollBack("there is no earlier release to roll back to: only one was ever active, or the others were collected.")
        self._change_generation(target, retire=False)
        try:
            self.store.rollback(verify=False)
        except ReleaseNotFound as error:
            raise NothingToRollBack(str(error)) from error
        self._seen = self._stamp()
        return target

    def _change_generation(self, release_id: str, retire: bool = True) -> None:
        """Load, fork, wait until every new worker listens; on any failure the old generation goes on alone."""
        if release_id == self.release_id:
            return
        started = time.perf_counter()
        if release_id not in self._graphs:
            manifest = self.store.verify(release_id)
            path = self.store.path_of(release_id)
            self._graphs[release_id] = {entity_type: EntityIndex.load_graph(path / entity_type) for entity_type in manifest.entities}
            if choose_form("cpu", self.config.encoder_form, path / "forms", has_gpu=False) == "torch-fp32":
                importlib.import_module("encoders.query_tower")  # once here instead of seconds in every worker; importing starts no threads
        self._graphs.move_to_end(release_id)
        fresh = self._fork_generation(release_id, self._dump_caches())
        self._wait_ready(fresh)
        failed = [worker for worker in fresh if not worker.ready or worker.error]
        if failed:
            for worker in fresh:
                self._kill(worker, signal.SIGKILL)
            self._graphs.pop(release_id, None)
            raise ReleaseRefused(failed[0].error or f"{release_id}: a worker did not get ready within {READY_SECONDS:.0f} s.")
        self.release_id = release_id
        log.info("%d workers serve release %s after %.1f s", len(fresh), release_id, time.perf_counter() - started)
        while len(self._graphs) > self.config.keep_releases:
            self._graphs.popitem(last=False)
        if retire:
            self._retire_all_but(release_id)

    def _retire_all_but(self, release_id: str) -> None:
        for worker in list(self.workers.values()):
            if worker.release_id != release_id and worker.pid not in self._draining:
                self._draining.add(worker.pid)
                self._kill(worker, signal.SIGTERM)

    def _dump_caches(self) -> list[Path]:
        """Ask the serving workers for their frequent queries; who does not answer within three seconds is left out."""
        asked = [worker for worker in self.workers.values() if worker.ready and worker.release_id == self.release_id and self.release_id]
        paths = {worker.pid: self._folder / f"cache-{worker.pid}-{time.monotonic_ns()}.npz" for worker in asked}
        for worker in asked:
            worker.dumped = False
            self._send(worker, {"type": "dump", "path": str(paths[worker.pid])})
        until = time.monotonic() + 3.0
        while time.monotonic() < until and not all(worker.dumped for worker in asked):
            self._pump(0.05)
        return [paths[worker.pid] for worker in asked if worker.dumped]

    # --- processes ---

    def _fork_generation(self, release_id: str, handed_over: list[Path]) -> list[Worker]:
        return [self._fork(release_id, handed_over) for _ in range(self.config.workers)]

    def _fork(self, release_id: str, handed_over: list[Path]) -> Worker:
        ours, theirs = socket.socketpair()
        self._numbers += 1
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _die_with_parent(parent)
                ours.close()
                for worker in self.workers.values():
                    worker.control.close()
                self._selector.close()
                code = _worker_main(
                    self.config, theirs, self._numbers, release_id, dict(self._graphs), handed_over, self._folder, self._listener
                )
            except BaseException:
                log.exception("a worker failed")
            finally:
                sys.stderr.flush()
                os._exit(code)
        theirs.close()
        worker = Worker(pid, self._numbers, ours, release_id)
        self.workers[pid] = worker
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _wait_ready(self, fresh: list[Worker]) -> None:
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until and not self._stopping:
            if all(worker.ready for worker in fresh) or any(worker.error for worker in fresh):
                return
            if any(not _alive(worker.pid) for worker in fresh):
                for worker in fresh:
                    if not worker.ready and not worker.error:
                        worker.error = f"{worker.release_id}: a worker died while it was loading the release."
                return
            self._pump(0.05)

    def _kill(self, worker: Worker, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, number)

    def _shut_down(self) -> None:
        self._stopping = True
        for held in self._reserved:
            held.close()
        for worker in self.workers.values():
            self._kill(worker, signal.SIGTERM)
        until = time.monotonic() + self.config.grace_seconds + 5.0
        while self.workers and time.monotonic() < until:
            self._reap()
            time.sleep(0.02)
        for worker in self.workers.values():
            self._kill(worker, signal.SIGKILL)
        for path in self._folder.glob("*"):
            path.unlink(missing_ok=True)
        self._folder.rmdir()


def _alive(pid: int) -> bool:
    """Whether a child is still running; does not collect it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the supervisor dies, even by kill -9."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        log.warning("workers will outlive a killed supervisor on this system")
    if os.getppid() != parent:
        os._exit(1)


def _worker_main(
    config: ServeConfig,
    control: socket.socket,
    number: int,
    release_id: str,
    graphs: dict[str, Graphs],
    handed_over: list[Path],
    folder: Path,
    listening: socket.socket | None,
) -> int:
    """The life of one worker, in the child; returns its exit code."""
    run: Callable[[Any], Any] = asyncio.run
    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        log.info("uvloop is not installed; using asyncio's own loop")
    code: int = run(_worker(config, control, number, release_id, graphs, handed_over, folder, listening))
    return code


async def _worker(
    config: ServeConfig,
    control: socket.socket,
    number: int,
    release_id: str,
    graphs: dict[str, Graphs],
    handed_over: list[Path],
    folder: Path,
    listening: socket.socket | None,
) -> int:
    reader, writer = await asyncio.open_connection(sock=control)
    changes: list[asyncio.Future[dict[str, Any]]] = []

    def send(message: dict[str, Any]) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    async def change_release(wanted: str) -> tuple[str, str]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        changes.append(future)
        send({"type": "change", "release_id": wanted})
        reply = await future
        if reply["error"]:
            kinds: dict[str, type[OmniError]] = {"UnknownRelease": UnknownRelease, "NothingToRollBack": NothingToRollBack}
            if reply["kind"] == "UnknownRelease":
                raise UnknownRelease(wanted)
            raise kinds.get(reply["kind"], ReleaseRefused)(reply["error"])
        return str(reply["now"]), str(reply["before"])

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server: Server = await create_server(
        config,
        graphs=graphs,
        watch=False,
        change_release=change_release,
        snapshots_folder=folder,
        worker=number,
        reuse_port=True,
        listener=listening,
    )

    set_start_up_apart(server.releases)

    async def listen_to_supervisor() -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if message["type"] == "changed" and changes:
                future = changes.pop(0)
                if not future.done():
                    future.set_result(message)
            elif message["type"] == "dump":
                server.releases.hand_over(Path(message["path"]))
                send({"type": "dumped"})
        stop.set()

    listener = asyncio.ensure_future(listen_to_supervisor())
    try:
        if release_id:
            loading = asyncio.ensure_future(server.releases.adopt(release_id, handed_over))
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():  # told to end while still loading: nobody depends on this worker yet
                return 0
            stopping.cancel()
            await loading
        await server.listen()
    except OmniError as error:
        send({"type": "ready", "error": str(error)})
        await writer.drain()
        return 1
    send({"type": "ready", "error": ""})
    await stop.wait()
    await server.stop()
    listener.cancel()
    return 0


def serve_with_workers(config: ServeConfig, announce: Callable[[dict[str, Any]], None]) -> None:
    """Run a supervisor until it is signalled. Raises ``AddressInUse``."""
    Supervisor(config, announce).run()
