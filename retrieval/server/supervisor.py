"""Several processes on one port: a supervisor loads each release's graphs once and forks generations of workers that share that memory.

The supervisor starts no threads and no gRPC, because neither survives a fork; each worker reads
attributes (polars) and its encoder itself. A new release means a new generation. A process of its
own checks every byte of the release; then the new workers load, prove themselves, take over the
frequent cached queries and listen; only then do the workers before stop accepting and finish what
they have. When any of this fails, the new workers go and the old ones serve on: no error of a
change ends the server. Changes are queued and carried out one at a time by the run loop. A worker
that dies is replaced.

All workers of all generations accept from one listening socket that the supervisor holds open, so
that no connection is lost when a generation ends (with the grpcio transport each worker has its own
socket on the port, and what waits in a closed one is reset).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from encoders.errors import OmniError
from index_builder.errors import ReleaseNotFound
from index_builder.releases.release import read_manifest
from index_builder.releases.store import CURRENT_NAME, ReleaseStore
from index_builder.search.entity_index import EntityIndex
from retrieval.config import ServeConfig
from retrieval.encoding.query_encoder import choose_form
from retrieval.errors import (
    AddressInUse,
    NothingToRollBack,
    NotReady,
    ReleaseRefused,
    UnknownRelease,
)
from retrieval.http2.server import BACKLOG
from retrieval.releases.manager import RETRY_REFUSED_SECONDS
from retrieval.server.fleet import Fleet, Worker
from retrieval.server.release_check import ReleaseCheck
from retrieval.server.server import address_is_free
from retrieval.server.worker import Assignment, Graphs, run_worker, told

log = logging.getLogger("omni.workers")

READY_SECONDS = 300.0
"""How long a worker may take from fork to listening."""
RESTART_SECONDS = 1.0
"""Pause before a dead worker is replaced; it doubles with every further death, up to ``MAX_RESTART_SECONDS``."""
MAX_RESTART_SECONDS = 30.0


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
        metrics_port = (
            None
            if config.metrics_port is None
            else self._reserve(config.host, config.metrics_port, "--metrics-port")
        )
        self.config = replace(config, port=port, metrics_port=metrics_port)
        if config.transport == "http2":
            self._listener = self._reserved[0]
        self.fleet = Fleet(self._run_worker)
        self.release_id = ""
        self.reason = "no release is active in the store. Publish one with `omni rebuild`"
        self._graphs: OrderedDict[str, Graphs] = OrderedDict()
        self._folder = Path(tempfile.mkdtemp(prefix="omni-serve-"))
        self._stopping = False
        self._seen: tuple[int, int] | None = None
        self._refused_at = 0.0
        self._restart_at = 0.0
        self._restart_pause = RESTART_SECONDS

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

    def _run_worker(
        self, control: socket.socket, number: int, release_id: str, handed_over: list[Path]
    ) -> int:
        given = Assignment(
            config=self.config,
            number=number,
            release_id=release_id,
            graphs=dict(self._graphs),
            handed_over=handed_over,
            folder=self._folder,
            listener=self._listener,
        )
        return run_worker(control, given)

    # --- the loop ---

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        # A collection would write to every object, and take the workers' shared pages apart
        gc.freeze()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            if self._listener is not None:
                self._listener.listen(BACKLOG)
            self._follow_store()
            self._keep_up()  # nothing to serve yet: workers that say so
            self._wait_ready(self.fleet.of(self.release_id))
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
                self.fleet.listen(self.config.poll_seconds)
                self._reap()
                self._keep_up()
                while self.fleet.changes and not self._stopping:
                    self._carry_out(*self.fleet.changes.popleft())
                if self._stamp() != self._seen or (
                    self._refused_at and time.monotonic() - self._refused_at > RETRY_REFUSED_SECONDS
                ):
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
        """Take over what CURRENT names; what is refused is tried again later, and at once when CURRENT changes."""
        self._seen = self._stamp()
        self._refused_at = 0.0
        try:
            release_id = self.store.current()
            if release_id is not None and release_id != self.release_id:
                self._change_generation(release_id)
        except Exception as error:  # whatever a store can hold: healthy workers go on
            self._refused_at = time.monotonic()
            self.reason = told(error)
            log.error(
                "still serving %s: %s",
                self.release_id or "nothing",
                self.reason,
                exc_info=not isinstance(error, OmniError),
            )
        self._retire_all_but(self.release_id)

    def _carry_out(self, worker: Worker, wanted: str) -> None:
        """One Activate, or Rollback if ``wanted`` is empty; the worker that asked gets exactly one reply, in the order it asked."""
        if worker not in self.fleet:
            log.warning(
                "a change to %s is dropped: the worker that asked for it has died",
                repr(wanted) if wanted else "the release before",
            )
            return
        before = self.release_id
        try:
            now = self._activate(wanted) if wanted else self._rollback()
            reply = {"type": "changed", "now": now, "before": before, "error": "", "kind": ""}
        except Exception as error:
            reply = {
                "type": "changed",
                "now": "",
                "before": before,
                "error": told(error),
                "kind": type(error).__name__,
            }
            log.error(
                "still serving %s: %s",
                before or "nothing",
                reply["error"],
                exc_info=not isinstance(error, OmniError),
            )
        self.fleet.send(worker, reply)
        self._retire_all_but(self.release_id)

    def _reap(self) -> None:
        """Collect who has ended; a worker of the current release was not meant to."""
        for worker, code in self.fleet.collect():
            if not self._stopping and not worker.leaving and worker.release_id == self.release_id:
                self._back_off()
                log.error(
                    "worker %d ended with status %d%s; another starts in %.1f s",
                    worker.pid,
                    code,
                    f" ({worker.error})" if worker.error else "",
                    max(0.0, self._restart_at - time.monotonic()),
                )

    def _keep_up(self) -> None:
        """Fork what the current generation lacks; in a crash loop ever more rarely."""
        missing = self.config.workers - len(self.fleet.of(self.release_id))
        if missing <= 0 or self._stopping or time.monotonic() < self._restart_at:
            return
        try:
            for _ in range(missing):
                self.fleet.fork(self.release_id, [])
        except Exception as error:
            self._back_off()
            log.error("a worker could not be started, trying again later: %s", told(error))

    def _back_off(self) -> None:
        """Decide when the next worker is forked."""
        now = time.monotonic()
        if now < self._restart_at:
            return  # deaths at the same time count once
        if now - self._restart_at > 2 * MAX_RESTART_SECONDS:  # all was well for a while
            self._restart_pause = RESTART_SECONDS
        self._restart_at = now + self._restart_pause
        self._restart_pause = min(2 * self._restart_pause, MAX_RESTART_SECONDS)

    # --- releases ---

    def _activate(self, release_id: str) -> str:
        if not self.store.path_of(release_id).is_dir():
            raise UnknownRelease(release_id)
        self._change_generation(release_id, lambda: self.store.activate(release_id, verify=False))
        return release_id

    def _rollback(self) -> str:
        record = self.store.current_record()
        target = (
            next((old for old in record.history if self.store.path_of(old).is_dir()), None)
            if record
            else None
        )
        if target is None:
            raise NothingToRollBack(
                "there is no earlier release to roll back to: only one was ever active, or the"
                " others were collected."
            )

        def commit() -> None:
            try:
                now = self.store.rollback(verify=False)
            except ReleaseNotFound as error:
                raise NothingToRollBack(str(error)) from error
            if now != target:
                raise ReleaseRefused(
                    f"another process changed CURRENT meanwhile: the rollback went to {now}, which"
                    " is loaded next."
                )

        self._change_generation(target, commit)
        return target

    def _change_generation(
        self, release_id: str, commit: Callable[[], object] = lambda: None
    ) -> None:
        """Load, fork, wait until every new worker listens, then write to the store; the caller retires the old generation.

        Args:
            release_id: What to serve.
            commit: Makes it the active release of the store. The run loop sees the changed CURRENT,
                and finds it served already.

        Raises:
            Exception: Something of this failed. The new workers are gone or going, and the old
                generation serves on alone.
        """
        if release_id == self.release_id:
            commit()
            return
        started = time.perf_counter()
        fresh: list[Worker] = []
        try:
            self._load_graphs(release_id)
            handed_over = self._dump_caches()
            for _ in range(self.config.workers):
                fresh.append(self.fleet.fork(release_id, handed_over))
            self._wait_ready(fresh)
            failed = [worker for worker in fresh if not worker.ready or worker.error]
            if failed and self._stopping:
                raise NotReady("the server is shutting down.")
            if failed:
                raise ReleaseRefused(
                    failed[0].error
                    or f"{release_id}: a worker did not get ready within {READY_SECONDS:.0f} s."
                )
            commit()
        except BaseException:
            for worker in fresh:  # who is ready has calls already, and finishes them
                self.fleet.dismiss(
                    worker, signal.SIGTERM if worker.ready and not worker.error else signal.SIGKILL
                )
            self._graphs.pop(release_id, None)
            raise
        finally:
            for path in self._folder.glob("*.npz"):
                with contextlib.suppress(OSError):
                    path.unlink()
        self.release_id = release_id
        self._restart_at, self._restart_pause = 0.0, RESTART_SECONDS
        log.info(
            "%d workers serve release %s after %.1f s",
            len(fresh),
            release_id,
            time.perf_counter() - started,
        )
        while len(self._graphs) > self.config.keep_releases:
            self._graphs.popitem(last=False)

    def _load_graphs(self, release_id: str) -> None:
        """Have the graphs of a release in memory; nothing is kept of one that cannot be served."""
        if release_id not in self._graphs:
            self._verify(release_id)
            path = self.store.path_of(release_id)
            graphs = {
                entity_type: EntityIndex.load_graph(path / entity_type)
                for entity_type in read_manifest(path).entities
            }
            if (
                choose_form("cpu", self.config.encoder_form, path / "forms", has_gpu=False)
                == "torch-fp32"
            ):
                importlib.import_module(
                    "encoders.towers.query_tower"
                )  # once here instead of seconds in every worker; importing starts no threads
            self._graphs[release_id] = graphs
        self._graphs.move_to_end(release_id)

    def _verify(self, release_id: str) -> None:
        """Have every byte of a release checked by another process, and look after the workers meanwhile."""
        check = ReleaseCheck(release_id, lambda: self.store.verify(release_id))
        try:
            while not check.is_done(0.02):
                if self._stopping:
                    raise NotReady("the server is shutting down.")
                self._look_after_workers()
            check.result()
        finally:
            check.close()

    def _look_after_workers(self) -> None:
        """What a change does while it waits: those who serve meanwhile may speak, or die."""
        self.fleet.listen(0.0)
        if self.release_id:
            self._reap()
            self._keep_up()

    def _retire_all_but(self, release_id: str) -> None:
        for worker in list(self.fleet.workers.values()):
            if worker.release_id != release_id and not worker.leaving:
                self.fleet.dismiss(worker)

    def _dump_caches(self) -> list[Path]:
        """Ask the serving workers for their frequent queries; who does not answer within three seconds is left out."""
        asked = [
            worker for worker in self.fleet.of(self.release_id) if worker.ready and self.release_id
        ]
        paths = {
            worker.pid: self._folder / f"cache-{worker.pid}-{time.monotonic_ns()}.npz"
            for worker in asked
        }
        for worker in asked:
            worker.dumped = False
            self.fleet.send(worker, {"type": "dump", "path": str(paths[worker.pid])})
        until = time.monotonic() + 3.0
        while time.monotonic() < until and not all(worker.dumped for worker in asked):
            self.fleet.listen(0.05)
        return [path for path in paths.values() if path.exists()]

    def _wait_ready(self, fresh: list[Worker]) -> None:
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until and not self._stopping:
            gone = [
                worker for worker in fresh if not worker.is_running()
            ]  # before reading: a dead worker's last words are then all here
            self.fleet.listen(0.05)
            if all(worker.ready for worker in fresh) or any(worker.error for worker in fresh):
                return
            for worker in gone:
                if not worker.ready:
                    worker.error = (
                        f"{worker.release_id}: a worker died while it was loading the release."
                    )
                    return
            self._look_after_workers()

    def _shut_down(self) -> None:
        self._stopping = True
        for held in self._reserved:
            held.close()
        self.fleet.end(self.config.grace_seconds + 5.0)
        shutil.rmtree(self._folder, ignore_errors=True)


def serve_with_workers(config: ServeConfig, announce: Callable[[dict[str, Any]], None]) -> None:
    """Run a supervisor until it is signalled. Raises ``AddressInUse``."""
    Supervisor(config, announce).run()
