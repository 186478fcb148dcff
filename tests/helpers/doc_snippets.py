"""The fenced blocks of the manual, and how they are run: a page at a time, in one shell."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`]*)$")
MARKER = re.compile(r"<!-- not run: (?P<reason>.+?) -->")
TITLE = re.compile(r'title="([^"]+)"')
RUN = {"bash", "python", "toml"}
SHOWN = {"text", "yaml"}
"""Languages of blocks that show something and are not run."""
DEFAULT_PORTS = ("50051", "9464")
"""Ports that the pages name; each run gets free ones in their place."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    not_run: str
    """Why the block is not run; empty: it is."""

    def __str__(self) -> str:
        return f"{os.path.relpath(self.page, REPOSITORY)}:{self.line}"


def pages() -> list[Path]:
    """Give README, CONTRIBUTING and every page of the manual that is written by hand."""
    manual = sorted((REPOSITORY / "docs").rglob("*.md"))
    manual.remove(REPOSITORY / "docs" / "reference" / "commands.md")
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *manual]


def blocks_of(page: Path) -> list[Block]:
    """Find the fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        first, indent = number, len(fence["indent"])
        number += 1
        body: list[str] = []
        while lines[number].strip() != "```":
            body.append(lines[number][indent:])
            number += 1
        marker = MARKER.search(lines[first - 1]) if first else None
        title = TITLE.search(fence["info"])
        found.append(
            Block(
                page=page,
                line=first + 1,
                language=fence["info"].split(" ")[0],
                title=title[1] if title else "",
                text="\n".join(body) + "\n",
                not_run=marker["reason"] if marker else "",
            )
        )
        number += 1
    return found


START_SERVER = """\
omni serve --store store &
curl --silent --retry 60 --retry-delay 1 --retry-connrefused localhost:9464/healthz >&2
"""
"""The server that some pages find running."""


def script_of(blocks: list[Block], folder: Path, served: bool) -> str:
    """Make one bash script of all blocks that are run; Python blocks become files beside it.

    A `toml` block with a title is written to the file of that name where the page comes to it.
    """
    parts = ["set -eEuo pipefail", "trap 'echo \"failed: $block\" >&2' ERR"]
    if served:
        parts += ["block='the server'", START_SERVER]
    for number, block in enumerate(blocks):
        if block.not_run or block.language not in RUN:
            continue
        parts.append(f"block='{block}'")
        if block.language == "bash":
            parts.append(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
            if block.title:
                parts.append(f"cat > '{block.title}' <<'END_OF_FILE'\n{block.text}END_OF_FILE")
        else:
            file = folder / f"block_{number}.py"
            file.write_text(block.text, encoding="utf-8")
            parts.append(f"python '{file}'")
    return "\n".join(parts) + "\n"


def run_page(page: Path, folder: Path, programs: Path, *, served: bool = False) -> str:
    """Run the blocks of a page in one shell in a folder; end what it left running.

    Args:
        page: The page.
        folder: Where its commands run.
        programs: What `preloaded_commands` gave.
        served: Start a server on the folder's store before.

    Returns:
        What the page wrote to standard output.

    Raises:
        AssertionError: A block failed; the message names it and holds the end of its output.
    """
    ports = {port: str(_free_port()) for port in DEFAULT_PORTS}
    scratch = folder.parent / f"{folder.name}-scripts"
    scratch.mkdir()
    environment = os.environ | {
        "PATH": os.pathsep.join((str(programs), os.environ["PATH"])),
        "PYTHONPATH": str(REPOSITORY),
        "OMNI_SERVER": f"localhost:{ports['50051']}",
        "OMNI_TEST_PORTS": " ".join(ports.values()),
        "COLUMNS": "100",
    }
    script = scratch / "page.sh"
    script.write_text(script_of(blocks_of(page), scratch, served), encoding="utf-8")
    for file in scratch.iterdir():
        text = file.read_text(encoding="utf-8")
        for port, free in ports.items():
            text = re.sub(rf"\b{port}\b", free, text)
        file.write_text(text, encoding="utf-8")
    output, errors = scratch / "stdout", scratch / "stderr"
    with output.open("w") as out, errors.open("w") as err:
        shell = subprocess.Popen(
            ["bash", str(script)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = shell.wait(240)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
            shell.wait()
    result = output.read_text(encoding="utf-8")
    messages = errors.read_text(encoding="utf-8")
    assert code == 0, f"exit code {code}\n{result[-1500:]}\n{messages[-3000:]}"
    return result


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
