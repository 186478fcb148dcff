"""Run the ordinary commands of ``omni start``: each is printed, timed, and heard out."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoders.commands.console import fail, progress_is_shown, say
from encoders.interruption import Terminated
from encoders.progress import duration
from encoders.vector_cache import TEXT_VECTORS
from retrieval.start.recognition import as_shell

STEPS = ("convert", "pair", "train", "evaluate", "build", "ask")


@dataclass
class Steps:
    """The commands of one run, in order."""

    to_stderr: bool
    """What the commands print goes to stderr: stdout is for the summary alone."""
    text_vectors: Path
    """Folder in which the commands keep vectors of texts, so that each text is embedded once."""
    commands: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """By step."""
    _begun: float = 0.0
    _step: str = ""

    def as_job(self) -> list[str]:
        """Return lines of a shell script that does the same again."""
        kept = shlex.quote(str(self.text_vectors))
        return [f"export {TEXT_VECTORS}={kept}", *self.commands]

    def begin(self, step: str, what: str) -> None:
        """Say which step begins, and which comes next."""
        self.end()
        self._step, self._begun = step, time.monotonic()
        number = STEPS.index(step) + 1
        after = f"; next: {STEPS[number]}" if number < len(STEPS) else ""
        say(f"\n[{number} of {len(STEPS)}] {what}{after}")

    def end(self) -> None:
        """Note how long the step took."""
        if self._step:
            self.seconds[self._step] = round(time.monotonic() - self._begun, 1)
            say(f"{self._step}: {duration(self.seconds[self._step])}")
        self._step = ""

    def run(self, *arguments: object) -> None:
        """Run a command; what it prints is seen."""
        self._run([str(argument) for argument in arguments], captured=False)

    def ask(self, *arguments: object) -> dict[str, Any]:
        """Run a command for its JSON."""
        output = self._run([*map(str, arguments), "--json"], captured=True)
        answer: dict[str, Any] = json.loads(output)
        return answer

    def _run(self, words: list[str], *, captured: bool) -> bytes:
        self.commands.append(as_shell(words))
        say(f"$ {self.commands[-1]}")
        quiet = [] if progress_is_shown() else ["--quiet"]
        stdout = subprocess.PIPE if captured else sys.stderr.fileno() if self.to_stderr else None
        process = subprocess.Popen(
            [sys.executable, "-m", "retrieval", *words, *quiet],
            stdout=stdout,
            env={**os.environ, TEXT_VECTORS: str(self.text_vectors)},
        )
        output = _heard_out(process)
        if process.returncode:
            fail(
                f"this step failed: {self.commands[-1]}. Mend what it says, then give the same"
                " omni start again.",
                process.returncode if process.returncode > 0 else 128 - process.returncode,
            )
        return output


def _heard_out(process: subprocess.Popen[bytes]) -> bytes:
    """Wait for a command; when this one is stopped, stop it and let it save what it has."""
    try:
        return process.communicate()[0] or b""
    except KeyboardInterrupt as error:
        if isinstance(error, Terminated) or not sys.stdin.isatty():  # a terminal tells both
            process.send_signal(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
        try:
            process.communicate()
        except KeyboardInterrupt:
            process.kill()
        raise
