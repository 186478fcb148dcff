"""The processes of a supervisor: forked, listened to, sent messages and collected.

What they serve, and when one is replaced, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1

Run = Callable[[socket.socket, int, str, list[Path]], int]
"""Runs a worker in the child and returns its exit code.

Arguments: control socket, number, release id, files that the former workers handed over.
"""


class Answer(NamedTuple):
    """What a worker says of a release that it was told to load or to serve.

    Attributes:
        kind: ``prepared`` or ``serving``.
        release_id: Which release.
        error: Why it could not; empty: done.
    """

    kind: str
    release_id: str
    error: str


@dataclass(slots=True)
class Worker:
    """One child process.

    Attributes:
        pid: Its process number.
        number: Counted over all generations.
        control: Our end of the socket between us.
        release_id: What it serves; empty: nothing yet.
        ready: It listens, or ``error`` says why not.
        error: Why it cannot serve.
        cache_written: It has answered the last request to write its cache.
        answer: Its last message about a release that it was told to load or to serve.
        dismissed: It was sent a signal to end; it is not replaced.
        buffer: Bytes of its messages that are not whole yet.
    """

    pid: int
    number: int
    control: socket.socket
    release_id: str
    ready: bool = False
    error: str = ""
    cache_written: bool = False
    answer: Answer | None = None
    dismissed: bool = False
    buffer: bytearray = field(default_factory=bytearray)

    def is_running(self) -> bool:
        """Ask whether the process has not ended, without collecting it."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False


class ChangeRequest(NamedTuple):
    """A change of the release that a worker asks for.

    Attributes:
        worker: Who waits for the reply.
        release_id: What to serve; empty: the previously active one.
    """

    worker: Worker
    release_id: str


class Fleet:
    """All children of one process, of every generation. Everything runs in the caller's thread.

    Attributes:
        workers: By process number, until they are collected.
        changes: Requests that are not carried out yet, in their order.
        forks: How many were ever started.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.workers: dict[int, Worker] = {}
        self.changes: deque[ChangeRequest] = deque()
        self.forks = 0
        self._selector = selectors.DefaultSelector()

    def __contains__(self, worker: Worker) -> bool:
        return self.workers.get(worker.pid) is worker

    def of(self, release_id: str) -> list[Worker]:
        """Return the workers of a release that are not dismissed, ready or not."""
        return [
            worker
            for worker in self.workers.values()
            if worker.release_id == release_id and not worker.dismissed
        ]

    def fork(self, release_id: str, handed_over: list[Path]) -> Worker:
        """Start one worker. Raises ``OSError`` when the system has no room for it."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.forks += 1
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        parent = os.getpid()
        try:
            pid = os.fork()
        except BaseException:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            self._run_child(parent, ours, theirs, release_id, handed_over)
        theirs.close()
        worker = Worker(pid, self.forks, ours, release_id)
        self.workers[pid] = worker
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _run_child(
        self,
        parent: int,
        ours: socket.socket,
        theirs: socket.socket,
        release_id: str,
        handed_over: list[Path],
    ) -> NoReturn:
        """Run a worker in the forked process, and end it."""
        code = 1
        try:
            die_with_parent(parent)
            ours.close()
            for worker in self.workers.values():
                worker.control.close()
            self._selector.close()
            code = self._run(theirs, self.forks, release_id, handed_over)
        except BaseException:
            log.exception("a worker failed")
        finally:
            sys.stderr.flush()
            os._exit(code)

    def listen(self, timeout: float) -> None:
        """Read messages of workers, waiting at most ``timeout`` seconds for the first.

        They are only noted: nothing is changed from in here.
        """
        for key, _ in self._selector.select(timeout):
            self._read(key.data)

    def send(self, worker: Worker, message: dict[str, Any]) -> None:
        """Send a worker a message; one that does not listen is logged."""
        try:
            worker.control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            log.warning("worker %d does not listen to its supervisor", worker.pid)

    def collect(self) -> list[tuple[Worker, int]]:
        """Return the workers that have ended since the last call, with their exit codes.

        Their messages are all read by then.
        """
        ended: list[tuple[Worker, int]] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return ended
            if pid == 0:
                return ended
            worker = self.workers.get(pid)
            if worker is None:
                continue
            while self._read(worker):  # its last message may say why
                pass
            del self.workers[pid]
            self._forget(worker)
            worker.control.close()
            ended.append((worker, os.waitstatus_to_exitcode(status)))

    def dismiss(self, worker: Worker, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a worker a signal to end; it is neither counted nor replaced from now on."""
        worker.dismissed = True
        if worker in self:  # once collected, its process number may belong to another process
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, number)

    def end(self, seconds: float) -> None:
        """Dismiss all workers, and kill those that are still there after ``seconds``."""
        for worker in self.workers.values():
            self.dismiss(worker)
        until = time.monotonic() + seconds
        while self.workers and time.monotonic() < until:
            self.collect()
            time.sleep(0.02)
        for worker in self.workers.values():
            self.dismiss(worker, signal.SIGKILL)

    def _read(self, worker: Worker) -> bool:
        """Handle what one worker has sent; False when there is no more for now."""
        try:
            content = worker.control.recv(65536)
        except BlockingIOError:
            return False
        except OSError:
            content = b""
        if not content:
            self._forget(worker)
            return False
        worker.buffer += content
        while (end := worker.buffer.find(b"\n")) >= 0:
            line = bytes(worker.buffer[:end])
            worker.buffer = worker.buffer[end + 1 :]
            try:
                self._note(worker, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                log.error("worker %d sent what is no message: %s", worker.pid, error)
        return True

    def _note(self, worker: Worker, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "ready":
            worker.error = message["error"]
            worker.ready = True
        elif kind == "cache_written":
            worker.cache_written = True
        elif kind in ("prepared", "serving"):
            worker.answer = Answer(kind, message["release_id"], message["error"])
        elif kind == "change":
            self.changes.append(ChangeRequest(worker, message["release_id"]))

    def _forget(self, worker: Worker) -> None:
        """Wait for no more messages of a worker."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.control)


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the supervisor dies, even by kill -9."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the worker listens to it itself
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        log.warning("workers will outlive a killed supervisor on this system")
    if os.getppid() != parent:
        os._exit(1)
