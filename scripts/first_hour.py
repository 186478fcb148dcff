"""Try the wheel as a new user would, on Debian's package descriptions, and write what was seen.

    python scripts/first_hour.py --page docs/howto/first_hour.md
    python scripts/first_hour.py --most 2000 --minutes 0.2 --borrow     # what CI does

An empty folder and an empty environment: install the wheel, fetch descriptions and their
translated titles with apt, `omni start`, then ask a server in several languages. Fails where a
command fails, an answer is empty, or the output holds what a newcomer should not meet.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUESTIONS = {
    "de": "Schach gegen den Computer spielen",
    "fr": "lecteur de musique léger",
    "ja": "日本語入力",
    "ru": "редактор векторной графики",
    "it": "scaricare la posta elettronica",
    "ko": "터미널 에뮬레이터",
    "en": "recover deleted files",
    "name": "libncurses-dev",
}
"""Not titles of the lists: what somebody might ask."""
DEBIAN = (
    "--catalogue packages/packages.jsonl --pairs packages/translations.jsonl --entity-type package"
)
SAMPLE = "--catalogue {0}/catalogue.csv --pairs {0}/pairs.csv".format(ROOT / "examples" / "emoji")
NOISE = {
    "a traceback": r"Traceback \(most recent call last\)",
    "a log line of debugging": r"\bDEBUG\b",
    "a warning of Python": r"\b\w*Warning:",
    "a float of many digits": r"\d\.\d{7,}",
    "a table of more than 100 columns": r"─{101,}",
}
"""What no command should print."""
START, END = "<!-- transcript: scripts/first_hour.py writes it -->", "<!-- end of transcript -->"
READY_SECONDS = 120


@dataclass
class Terminal:
    """Runs commands in an empty folder and keeps what was seen."""

    folder: Path
    environment: dict[str, str]
    seen: list[str] = field(default_factory=list)

    def run(self, command: str, shown: str = "") -> str:
        """Run a command, print and keep its output, and note wall and CPU time.

        Raises:
            SystemExit: It failed.
        """
        self._keep(f"$ {shown or command}")
        before, begun = _cpu_seconds(), time.perf_counter()
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        output = "".join(self._keep(line.rstrip("\n")) for line in process.stdout)
        code = process.wait()
        wall, cpu = time.perf_counter() - begun, _cpu_seconds() - before
        if wall > 5:
            self._keep(f"# {wall:,.0f} s, {cpu:,.0f} s of them on processors\n")
        if code:
            sys.exit(f"{command} ended with {code}")
        return output

    def _keep(self, line: str) -> str:
        print(line, flush=True)
        self.seen.append(line)
        return line + "\n"


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(terminal: Terminal, wheel: Path, *, borrow: bool) -> None:
    """Install the wheel into an empty environment.

    Args:
        terminal: Where to.
        wheel: The wheel.
        borrow: Lend it the packages of this environment rather than installing them all.
    """
    terminal.run(f"{sys.executable} -m venv venv", "python3 -m venv venv && . venv/bin/activate")
    pip = "python -m pip install --quiet --disable-pip-version-check"
    if borrow:
        (site,) = (terminal.folder / "venv").glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip += " --no-deps --no-index"
    wanted = f"-c {ROOT / 'constraints.txt'} '{wheel}[train]'"
    shown = "pip install --quiet 'omnisearchsage[train]'"
    if borrow:
        shown = "pip install --no-deps omnisearchsage-*.whl  # its packages are lent"
    terminal.run(f"{pip} {wanted} 2> pip.log", shown)
    check = "import retrieval; print(retrieval.__file__)"
    python = terminal.folder / "venv" / "bin" / "python"
    where = subprocess.run(
        [python, "-c", check],
        cwd=terminal.folder,
        env=terminal.environment,
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    if not where.startswith(str(terminal.folder)):
        sys.exit(f"the wheel is not what runs, but {where}")


def fetch(terminal: Terminal, most: int, packages: Path | None) -> bool:
    """Fetch the descriptions, or take those of an earlier run; False: apt gives none here."""
    if packages is not None:
        shutil.copytree(packages, terminal.folder / "packages", ignore=_apt_lists)
        return True
    command = f"{sys.executable} {ROOT / 'scripts' / 'debian_packages.py'} --out packages"
    shown = "python debian_packages.py --out packages"
    limited = f" --most {most}" if most else ""
    try:
        terminal.run(command + limited, shown + limited)
    except SystemExit as failure:
        print(f"NOT TRIED: Debian's packages, as apt gives no translated descriptions ({failure})")
        return False
    return True


def _apt_lists(folder: str, names: list[str]) -> list[str]:
    return ["apt"] if "apt" in names else []


def ask(terminal: Terminal) -> None:
    """Serve the release and ask it in several languages.

    Raises:
        SystemExit: An answer is empty.
    """
    terminal.seen.append("$ omni serve --store search/store > serve.log 2>&1 &")
    with (terminal.folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            ["omni", "serve", "--store", "search/store"],
            cwd=terminal.folder,
            env=terminal.environment,
            stdout=log,
            stderr=log,
        )
    try:
        begun = time.monotonic()
        port = int(terminal.environment["OMNI_SERVE_PORT"])
        while time.monotonic() - begun < READY_SECONDS and server.poll() is None:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.2)
        for text in QUESTIONS.values():
            answer = terminal.run(f"omni query -k 5 '{text}'")
            if not re.search(r"^\s*1 ", answer, re.MULTILINE):
                sys.exit(f"no answer to {text!r}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def refuse_noise(seen: str) -> None:
    """Fail where the output holds what a newcomer should not meet.

    Raises:
        SystemExit: The first such line.
    """
    for what, pattern in NOISE.items():
        found = re.search(f".*{pattern}.*", seen)
        if found:
            sys.exit(f"the output holds {what}: {found[0]}")


def write_page(page: Path, seen: str) -> None:
    """Replace the transcript of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    block = f"{START}\n```text\n{seen.strip()}\n```\n{END}"
    page.write_text(before + block + after, encoding="utf-8")


def main() -> None:
    """Install, fetch, start, ask; write the page if one is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, help="page whose transcript is replaced")
    parser.add_argument("--most", type=int, default=0, help="packages at most; 0: all")
    parser.add_argument("--minutes", type=float, help="of training; default: omni start's")
    parser.add_argument("--wheel", type=Path, help="a wheel that is built already")
    parser.add_argument("--packages", type=Path, help="folder that debian_packages.py wrote")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    parser.add_argument(
        "--borrow", action="store_true", help="take dependencies from this environment"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-hour-") as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        folder.mkdir(exist_ok=True)
        port, page_port = _free_port(), _free_port()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "OMNI_SERVER": f"localhost:{port}",
            "OMNI_SERVE_PORT": str(port),
            "OMNI_SERVE_METRICS_PORT": str(page_port),
            "COLUMNS": "100",
        }
        terminal = Terminal(folder, environment)
        wheel = given.wheel.resolve() if given.wheel else build_wheel(folder / "dist")
        make_environment(terminal, wheel, borrow=given.borrow)
        files = DEBIAN
        if not fetch(terminal, given.most, given.packages):
            if given.page:
                sys.exit("the page shows Debian's packages; it is left as it is")
            print("the sample examples/emoji is taken instead")
            files = SAMPLE
        minutes = f" --minutes {given.minutes:g}" if given.minutes else ""
        terminal.run(f"omni start {files} --out search{minutes} --no-serve")
        ask(terminal)
        served = (folder / "serve.log").read_text(encoding="utf-8")
    seen = "\n".join(line.rstrip() for line in terminal.seen)
    refuse_noise(seen + served)
    if given.page:
        write_page(given.page, seen)


if __name__ == "__main__":
    main()
