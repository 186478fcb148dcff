"""A real ``omni serve`` process for the demo, with a clear message whenever it dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from retrieval.client import RetrievalClient
from retrieval.errors import ServerDied


class DemoServer:
    """``omni serve`` on a free port, as a context manager.

    Raises:
        ServerDied: The process ended before it was ready.
    """

    def __init__(self, store: Path, *, port: int = 0, metrics_port: int = 0) -> None:
        command = [sys.executable, "-m", "retrieval.cli", "serve", "--json"]
        command += ["--store", str(store), "--port", str(port)]
        command += ["--metrics-port", str(metrics_port), "--shadow-fraction", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._last_lines: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        if not first:
            raise ServerDied(self._death_message())
        self.info: dict[str, Any] = json.loads(first)

    @property
    def address(self) -> str:
        """Where clients connect."""
        return f"localhost:{self.info['port']}"

    @property
    def page(self) -> str:
        """The page to look at."""
        return f"http://localhost:{self.info['metrics_port']}/"

    def wait_until_ready(self, client: RetrievalClient, seconds: float = 120.0) -> None:
        """Return once the release has proved itself.

        Raises:
            ServerDied: The process ended.
            CallError: It did not get ready in time.
        """
        try:
            client.wait_until_ready(seconds)
        except Exception:
            self.check()
            raise

    def check(self) -> None:
        """Raise ``ServerDied`` if the process has ended."""
        if self.process.poll() is not None:
            raise ServerDied(self._death_message())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._last_lines = [*self._last_lines[-4:], line.rstrip()]

    def _death_message(self) -> str:
        code = self.process.wait(5)
        self._listener.join(2)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = "; its last lines: " + " | ".join(self._last_lines) if self._last_lines else ""
        return (
            f"the server process {how}{lines}. The release is untouched: start it again with `omni"
            " serve`."
        )
