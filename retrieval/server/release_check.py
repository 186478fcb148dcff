"""Releases verified by a process of their own, so that a supervisor can go on.

Hashing takes seconds per gigabyte. A process and not a thread, because the supervisor forks
meanwhile, and only a process of one thread may.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
from collections.abc import Callable

from encoders.errors import OmniError
from index_builder.errors import ReleaseNotFound
from retrieval.errors import ReleaseRefused
from retrieval.server.fleet import die_with_parent

log = logging.getLogger(__name__)


class ReleaseCheck:
    """A child that verifies one release with low priority.

    Others who wait for any child of this process may collect it first.

    Args:
        release_id: For messages.
        verify: Raises if the release must not be served; runs in the child.

    Raises:
        OSError: The system has no room for a process.
    """

    def __init__(self, release_id: str, verify: Callable[[], object]) -> None:
        self._release_id = release_id
        self._verdict = bytearray()
        self._is_done = False
        parent = os.getpid()
        self._reading, writing = os.pipe()
        try:
            self._pid = os.fork()
        except BaseException:
            os.close(self._reading)
            os.close(writing)
            raise
        if self._pid == 0:
            try:
                die_with_parent(parent)
                os.close(self._reading)
                os.write(writing, json.dumps(_run_check(verify)).encode())
            finally:
                os._exit(0)
        os.close(writing)

    def is_done(self, timeout_seconds: float) -> bool:
        """Ask whether the child has sent its verdict, or died; waits for at most so long."""
        while not self._is_done and select.select([self._reading], [], [], timeout_seconds)[0]:
            content = os.read(self._reading, 65536)
            self._verdict += content
            self._is_done = not content
        return self._is_done

    def result(self) -> None:
        """Raise an error for what ``verify`` raised; the child must be done.

        Raises:
            ReleaseNotFound: There is no such release.
            ReleaseRefused: Anything else.
        """
        try:
            verdict = json.loads(self._verdict)
        except ValueError:
            verdict = {
                "kind": "",
                "error": f"{self._release_id}: the process that verified it has died.",
            }
        if verdict["kind"] == "ReleaseNotFound":
            raise ReleaseNotFound(verdict["error"])
        if verdict["error"]:
            raise ReleaseRefused(verdict["error"])

    def close(self) -> None:
        """Collect the child; one that is not done is killed."""
        os.close(self._reading)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if self._is_done:
                os.waitpid(self._pid, 0)
            else:
                os.kill(self._pid, signal.SIGKILL)


def _run_check(verify: Callable[[], object]) -> dict[str, str]:
    try:
        os.nice(10)  # the priority of loading in a server of one process
        verify()
    except OmniError as error:
        return {"kind": type(error).__name__, "error": str(error)}
    except Exception as error:
        log.exception("a release could not be verified")
        return {
            "kind": type(error).__name__,
            "error": f"the release could not be verified: {type(error).__name__}: {error}",
        }
    return {"kind": "", "error": ""}
