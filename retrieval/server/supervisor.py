"""Several processes on one port: a supervisor, and the workers that it forks.

It starts no threads and no gRPC, because neither survives a fork; each worker reads attributes
(polars) and its encoder itself.

A process of its own checks every byte of a new release. If its graphs are small, the workers load
it beside the one that they serve, one after the other, and then all switch to it. Large graphs are
loaded once, here, and a new generation of workers shares their memory: it proves itself, takes over
the frequent cached queries and listens; only then do the former workers stop accepting and finish
what they have. When any of this fails, the former release is served on: no error of a change ends
the server. Changes are queued and carried out one at a time by the run loop. A worker that dies is
replaced.

All workers accept from one socket that the supervisor holds open, so that no connection is lost
when a generation ends; the first workers with a release begin to listen on it. With the grpcio
transport each worker has its own socket on the port, and what waits in a closed one is reset.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from encoders.errors import OmniError
from index_builder.errors import ReleaseNotFound
from index_builder.releases.store import ReleaseStore
from retrieval.addresses import bound_socket
from retrieval.config import ServeConfig
from retrieval.errors import (
    NothingToRollBack,
    NotReady,
    ReleaseRefused,
    UnknownRelease,
)
from retrieval.releases.current_file import CurrentFile
from retrieval.releases.manager import previous_release
from retrieval.releases.remote_status import nothing_active
from retrieval.server.backoff import Backoff
from retrieval.server.fleet import ChangeRequest, Fleet, Worker
from retrieval.server.grpc_server import require_free_ports
from retrieval.server.release_check import ReleaseCheck
from retrieval.server.release_graphs import ReleaseGraphs
from retrieval.server.worker import RELEASE_ORDERS, Assignment, error_message, run_worker

log = logging.getLogger(__name__)

READY_SECONDS = 300.0
"""How long a worker may take from fork to listening."""
CACHE_SECONDS = 3.0
"""How long a worker may take to write its cache for the next generation."""
RESTART_SECONDS = 1.0
"""Pause before a dead worker is replaced.

It doubles with every further death, up to ``MAX_RESTART_SECONDS``.
"""
MAX_RESTART_SECONDS = 30.0
SHUTTING_DOWN = "the server is shutting down."


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
        require_free_ports(config)
        port = self._reserve(config.host, config.port, "--port")
        metrics_port, probe_port = (
            None if wanted is None else self._reserve(config.host, wanted, flag)
            for wanted, flag in (
                (config.metrics_port, "--metrics-port"),
                (config.probe_port, "--probe-port"),
            )
        )
        self.config = replace(config, port=port, metrics_port=metrics_port, probe_port=probe_port)
        self._listener = self._reserved[0] if config.transport == "http2" else None
        self.fleet = Fleet(self._run_worker)
        self.graphs = ReleaseGraphs(self.store, config)
        self.release_id = ""
        self.reason_not_ready = nothing_active(config)
        self._current = CurrentFile(self.store)
        self._backoff = Backoff(RESTART_SECONDS, MAX_RESTART_SECONDS)
        self._folder = Path(tempfile.mkdtemp(prefix="omni-serve-"))
        self._stopping = False

    def _reserve(self, host: str, port: int, flag: str) -> int:
        """Bind without listening, so that the port stays ours between two generations."""
        held = bound_socket(host, port, flag=flag, reuse_port=True)
        self._reserved.append(held)
        return int(held.getsockname()[1])

    def _run_worker(
        self, control: socket.socket, number: int, release_id: str, handed_over: list[Path]
    ) -> int:
        assignment = Assignment(
            config=self.config,
            number=number,
            release_id=release_id,
            graphs=dict(self.graphs.by_release),
            handed_over=handed_over,
            folder=self._folder,
            listener=self._listener,
        )
        return run_worker(control, assignment)

    # ---- the run loop ----------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        # A collection would write to every object, and take the workers' shared pages apart
        gc.freeze()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, self._pass_on)
        try:
            self._follow_store()
            self._start_missing()  # without a release: workers that say so
            self._wait_until_ready(self.fleet.of(self.release_id))
            self._announce(self._description())
            while not self._stopping:
                self.fleet.listen(self.config.poll_seconds)
                self._reap()
                self._start_missing()
                while self.fleet.changes and not self._stopping:
                    self._carry_out(self.fleet.changes.popleft())
                if self._current.is_due():
                    self._follow_store()
        finally:
            self._shut_down()

    def _description(self) -> dict[str, Any]:
        return {
            "host": self.config.host,
            "port": self.config.port,
            "metrics_port": self.config.metrics_port,
            "probe_port": self.config.probe_port,
            "release_id": self.release_id or None,
            "reason": None if self.release_id else self.reason_not_ready,
            "workers": self.config.workers,
            "tls": self.config.tls_cert is not None,
        }

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True

    def _pass_on(self, number: int, frame: Any) -> None:
        """Have the workers read tokens and certificates again."""
        for worker in self.fleet.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, number)

    def _shut_down(self) -> None:
        self._stopping = True
        for held in self._reserved:
            held.close()
        self.fleet.end(self.config.grace_seconds + 5.0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _follow_store(self) -> None:
        """Take over what CURRENT names; a refused release is tried again later."""
        self._current.mark_read()
        try:
            release_id = self.store.current()
            if release_id is not None and release_id != self.release_id:
                self._change_release(release_id)
        except Exception as error:  # whatever a store can hold: healthy workers go on
            self._current.mark_refused()
            self.reason_not_ready = error_message(error)
            self._log_refusal(error)
        self._retire_former()

    def _carry_out(self, change: ChangeRequest) -> None:
        """Activate or roll back; each worker gets its replies in the order in which it asked."""
        worker, wanted = change
        if worker not in self.fleet:
            log.warning(
                "a change to %s is dropped: the worker that asked for it has died",
                repr(wanted) if wanted else "the previous release",
            )
            return
        before = self.release_id
        reply = {"type": "changed", "now": "", "before": before, "error": "", "kind": ""}
        try:
            reply["now"] = self._activate(wanted) if wanted else self._roll_back()
        except Exception as error:
            reply["error"] = error_message(error)
            reply["kind"] = type(error).__name__
            self._log_refusal(error)
        self.fleet.send(worker, reply)
        self._retire_former()

    def _log_refusal(self, error: Exception) -> None:
        log.error(
            "still serving %s: %s",
            self.release_id or "nothing",
            error_message(error),
            exc_info=not isinstance(error, OmniError),
        )

    # ---- workers ---------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Collect workers that have ended; one of the current release was not meant to."""
        for worker, code in self.fleet.collect():
            if self._stopping or worker.dismissed or worker.release_id != self.release_id:
                continue
            self._backoff.fail()
            log.error(
                "worker %d ended with status %d%s; another starts in %.1f s",
                worker.pid,
                code,
                f" ({worker.error})" if worker.error else "",
                self._backoff.remaining_seconds(),
            )

    def _start_missing(self) -> None:
        """Fork what the current generation lacks; in a crash loop ever more rarely."""
        missing = self.config.workers - len(self.fleet.of(self.release_id))
        if missing <= 0 or self._stopping or self._backoff.remaining_seconds() > 0:
            return
        try:
            for _ in range(missing):
                self.fleet.fork(self.release_id, [])
        except Exception as error:
            self._backoff.fail()
            log.error("a worker could not be started, trying again later: %s", error_message(error))

    def _look_after_workers(self) -> None:
        """Listen to, collect and replace workers while a change waits."""
        self.fleet.listen(0.0)
        if self.release_id:
            self._reap()
            self._start_missing()

    def _retire_former(self) -> None:
        """Dismiss the workers of all releases but the current one."""
        for worker in list(self.fleet.workers.values()):
            if worker.release_id != self.release_id and not worker.dismissed:
                self.fleet.dismiss(worker)

    def _wait_until_ready(self, workers: list[Worker]) -> None:
        """Return when all workers listen, one has failed, or their time is over."""
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until and not self._stopping:
            # Before listening: the last messages of a dead worker are then all here
            dead = [worker for worker in workers if not worker.is_running()]
            self.fleet.listen(0.05)
            if all(worker.ready for worker in workers) or any(worker.error for worker in workers):
                return
            for worker in dead:
                if not worker.ready:
                    worker.error = (
                        f"{worker.release_id}: a worker died while it was loading the release."
                    )
                    return
            self._look_after_workers()

    # ---- releases --------------------------------------------------------------------------------

    def _activate(self, release_id: str) -> str:
        if not self.store.path_of(release_id).is_dir():
            raise UnknownRelease(release_id)
        self._change_release(release_id, lambda: self.store.activate(release_id, verify=False))
        return release_id

    def _roll_back(self) -> str:
        target = previous_release(self.store)

        def commit() -> None:
            try:
                self.store.rollback(to=target, verify=False)
            except ReleaseNotFound as error:
                raise NothingToRollBack(str(error)) from error

        self._change_release(target, commit)
        return target

    def _change_release(self, release_id: str, commit: Callable[[], object] = lambda: None) -> None:
        """Have all workers serve a release; the caller retires those that do not.

        Args:
            release_id: What to serve.
            commit: Makes it the active release of the store, once every worker has it ready. The
                run loop sees the changed CURRENT, and finds it served already.

        Raises:
            Exception: Something of this failed, and the former release is served on.
        """
        if release_id == self.release_id:
            commit()
            return
        started = time.perf_counter()
        try:
            self.graphs.load(release_id, self._verify)
            if self._can_swap_in_place():
                self._swap_in_place(release_id, commit)
            else:
                self._replace_workers(release_id, commit)
        except BaseException:
            self.graphs.discard(release_id)
            raise
        self._backoff.reset()
        self.graphs.trim()
        seconds = time.perf_counter() - started
        count = len(self.fleet.of(release_id))
        log.info("%d workers serve release %s after %.1f s", count, release_id, seconds)

    def _can_swap_in_place(self) -> bool:
        """Ask whether workers run that serve, and neither release has graphs to share."""
        return not self.graphs.are_shared() and any(
            worker.ready for worker in self.fleet.of(self.release_id) if self.release_id
        )

    def _swap_in_place(self, release_id: str, commit: Callable[[], object]) -> None:
        """Have one worker after the other load a release, then all switch to it."""
        asked: list[Worker] = []
        try:
            for worker in self.fleet.of(self.release_id):
                if worker.ready and worker in self.fleet:  # others are replaced
                    asked.append(worker)
                    self._require_done(worker, "prepare", release_id)
            commit()
        except BaseException:
            for worker in asked:
                if worker in self.fleet:
                    self.fleet.send(worker, {"type": "forget"})
            raise
        self.release_id = release_id
        for worker in asked:  # before any waiting: those of the release are counted meanwhile
            worker.release_id = release_id
        for worker in asked:
            try:
                self._require_done(worker, "serve", release_id)
            except Exception as error:  # the others serve it, and it is replaced
                log.error("worker %d is replaced: %s", worker.pid, error_message(error))
                self.fleet.dismiss(worker)

    def _require_done(self, worker: Worker, order: str, release_id: str) -> None:
        """Give a worker an order of ``RELEASE_ORDERS``; raises if it cannot carry it out."""
        worker.answer = None
        self.fleet.send(worker, {"type": order, "release_id": release_id})
        expected = (RELEASE_ORDERS[order], release_id)
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until and not self._stopping:
            is_running = worker.is_running()  # before its last messages are read
            self.fleet.listen(0.05)
            if worker.answer is not None and worker.answer[:2] == expected:
                if worker.answer.error:
                    raise ReleaseRefused(worker.answer.error)
                return
            if not is_running:
                raise ReleaseRefused(f"{release_id}: a worker died while it was loading it.")
            self._look_after_workers()
        if self._stopping:
            raise NotReady(SHUTTING_DOWN)
        raise ReleaseRefused(
            f"{release_id}: a worker did not have it ready within {READY_SECONDS:.0f} s."
        )

    def _replace_workers(self, release_id: str, commit: Callable[[], object]) -> None:
        """Start workers of a release that share its graphs; the former ones serve until then."""
        workers: list[Worker] = []
        try:
            handed_over = self._collect_caches()
            for _ in range(self.config.workers):
                workers.append(self.fleet.fork(release_id, handed_over))
            self._wait_until_ready(workers)
            self._require_ready(workers)
            commit()
        except BaseException:
            self._abandon(workers)
            raise
        finally:
            for path in self._folder.glob("*.npz"):
                with contextlib.suppress(OSError):
                    path.unlink()
        self.release_id = release_id

    def _require_ready(self, workers: list[Worker]) -> None:
        failed = [worker for worker in workers if not worker.ready or worker.error]
        if failed and self._stopping:
            raise NotReady(SHUTTING_DOWN)
        if failed:
            first = failed[0]
            raise ReleaseRefused(
                first.error
                or f"{first.release_id}: a worker did not get ready within {READY_SECONDS:.0f} s."
            )

    def _abandon(self, workers: list[Worker]) -> None:
        """End new workers; one that listens has calls already, and finishes them."""
        for worker in workers:
            listens = worker.ready and not worker.error
            self.fleet.dismiss(worker, signal.SIGTERM if listens else signal.SIGKILL)

    def _verify(self, release_id: str) -> None:
        """Have another process check every byte of a release; look after the workers meanwhile."""
        check = ReleaseCheck(release_id, lambda: self.store.verify(release_id))
        try:
            while not check.is_done(0.02):
                if self._stopping:
                    raise NotReady(SHUTTING_DOWN)
                self._look_after_workers()
            check.result()
        finally:
            check.close()

    def _collect_caches(self) -> list[Path]:
        """Have the serving workers write their frequent queries; slow ones are left out."""
        asked = [
            worker for worker in self.fleet.of(self.release_id) if worker.ready and self.release_id
        ]
        paths = []
        for worker in asked:
            path = self._folder / f"cache-{worker.pid}-{time.monotonic_ns()}.npz"
            paths.append(path)
            worker.cache_written = False
            self.fleet.send(worker, {"type": "write_cache", "path": str(path)})
        until = time.monotonic() + CACHE_SECONDS
        while time.monotonic() < until and not all(worker.cache_written for worker in asked):
            self.fleet.listen(0.05)
        return [path for path in paths if path.exists()]


def serve_with_workers(config: ServeConfig, announce: Callable[[dict[str, Any]], None]) -> None:
    """Run a supervisor until it is signalled. Raises ``CannotListen``."""
    Supervisor(config, announce).run()
