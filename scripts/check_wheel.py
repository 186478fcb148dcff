"""Build the distributions and try the wheel in empty environments, as its users meet it.

`python scripts/check_wheel.py [--store STORE] [--json FILE]`, in the environment of `make setup`.

1. Builds the sdist, and the wheel from it.
2. Installs the wheel alone: the client. Checks what it brings, its size, what importing it loads
   and how long that takes.
3. Installs it with `[serve]`: serves STORE (without it a small store made here) and asks with the
   client of the other environment; a command of training must name its extra.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLIENT_MIB = 60
IMPORT_SECONDS = 0.25
HELP_SECONDS = 0.1
SERVER_START_SECONDS = 60
REPEATS = 7
TRAINING = ("torch", "transformers", "pandas", "matplotlib", "scipy")
SERVING = ("polars", "pyarrow", "onnxruntime", "numpy", "click", "starlette")
SERVE_COMMANDS = ("serve", "query", "release", "update", "doctor", "data", "enrich", "pairs")
"""Commands that the role of a server brings."""
ASK = """
import json, sys
from retrieval import RetrievalClient
with RetrievalClient(sys.argv[1]) as client:
    client.wait_until_ready(30)
    for entity_type in client.describe_release().entities:
        answer = client.retrieve("red cat", entity_type, 3, deadline_seconds=10)
        assert answer.ids, entity_type
        print(entity_type, *answer.ids)
"""
SMALL_STORE = """
import sys
from pathlib import Path
from benchmarks.small_releases import entity_texts, small_release, write_small_bundle
from encoders.inference.onnx_forms import export_forms
from index_builder.releases.store import ReleaseStore
folder = Path(sys.argv[1])
tower = write_small_bundle(folder / "bundle", seed=3)
export_forms(tower, folder / "bundle" / "forms", entity_texts(120, 3), ["onnx-fp32"])
counts = {"pin": 300, "ad": 60}
store = ReleaseStore(folder / "store")
small_release(store, folder / "bundle", tower, counts=counts, kind="exact")
"""


class Environment:
    """An empty virtual environment with the wheel and some extras."""

    def __init__(self, folder: Path, wheel: Path, extras: str = "") -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "-c", str(ROOT / "constraints.txt"), f"{wheel}{extras}"])

    def packages(self) -> list[str]:
        """Names of what is installed, pip and setuptools left out."""
        listed = run([str(self.python), "-m", "pip", "list", "--format=json"])
        names = (entry["name"] for entry in json.loads(listed))
        return [name for name in names if name not in ("pip", "setuptools")]

    def size_mib(self) -> float:
        """Bytes of all files of ``packages()``, their bytecode included."""
        (site,) = self.folder.glob("lib/python*/site-packages")
        parts = [part for part in site.iterdir() if not part.name.startswith(("pip", "setuptools"))]
        files = [file for part in parts for file in (part, *part.rglob("*")) if file.is_file()]
        return sum(file.stat().st_size for file in files) / 2**20

    def seconds(self, *arguments: str) -> float:
        """Least time that a program of the environment takes, start of Python included."""
        taken = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            run([str(self.folder / "bin" / arguments[0]), *arguments[1:]])
            taken.append(time.perf_counter() - started)
        return min(taken)

    def import_seconds(self, statement: str) -> float:
        """Least time that an import takes in a new process."""
        script = (
            "import time; started = time.perf_counter();"
            f"{statement}; print(time.perf_counter() - started)"
        )
        return min(float(run([str(self.python), "-c", script])) for _ in range(REPEATS))


def run(command: list[str], expected: int = 0) -> str:
    """Run a program outside of the checkout, so that it meets the installed packages."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    if done.returncode != expected:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + (done.stderr if expected else "")


def loaded_modules(environment: Environment) -> set[str]:
    """Names at the top of what importing the client loads."""
    script = "import sys; from retrieval import RetrievalClient; print(*sys.modules)"
    printed = run([str(environment.python), "-c", script])
    return {name.partition(".")[0] for name in printed.split()}


def check_client(environment: Environment) -> dict[str, Any]:
    """Check size, contents and import of the client."""
    packages = environment.packages()
    heavy = set(packages) & {*TRAINING, *SERVING}
    assert not heavy, f"the client brings {heavy}"
    loaded = loaded_modules(environment) & {*TRAINING, *SERVING}
    assert not loaded, f"importing the client loads {loaded}"
    message = run([str(environment.folder / "bin" / "omni"), "--help"], expected=1)
    assert "omnisearchsage[serve]" in message and "Traceback" not in message, message
    imported = environment.import_seconds("from retrieval import RetrievalClient")
    bare = environment.import_seconds("import retrieval")
    return {
        "packages": packages,
        "mib": round(environment.size_mib(), 1),
        "import_retrieval_seconds": round(bare, 3),
        "import_client_seconds": round(imported, 3),
    }


def check_server(environment: Environment, client: Environment, store: Path) -> dict[str, Any]:
    """Serve a store and ask it; check what is installed, and what training would need."""
    packages = environment.packages()
    heavy = set(packages) & set(TRAINING)
    assert not heavy, f"[serve] brings {heavy}"
    omni = str(environment.folder / "bin" / "omni")
    message = run([omni, "train", "none.toml"], expected=1)
    assert "omnisearchsage[train]" in message and "Traceback" not in message, message
    for command in SERVE_COMMANDS:
        run([omni, command, "--help"])
    listen = ["--port=0", "--metrics-port=0", "--json"]
    started = time.perf_counter()
    server = subprocess.Popen(
        [omni, "serve", f"--store={store}", *listen],
        cwd=store.parent,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGALRM, lambda *_: server.kill())
    signal.alarm(SERVER_START_SECONDS)
    try:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline() or "{}")
        assert ready.get("release_id"), f"the server serves nothing: {ready}"
        signal.alarm(0)
        seconds = time.perf_counter() - started
        print(run([str(client.python), "-c", ASK, f"localhost:{ready['port']}"]), end="")
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0, "the server did not drain"
    finally:
        server.kill()
    return {
        "packages": packages,
        "mib": round(environment.size_mib(), 1),
        "ready_seconds": round(seconds, 2),
        "help_seconds": round(environment.seconds("omni", "--help"), 3),
    }


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it."""
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def main() -> None:
    """Build, try, print what was measured, and fail where a limit is passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", type=Path, help="store to serve; its release needs ONNX forms")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wheel-") as temporary:
        folder = Path(temporary)
        sdist, wheel = build(folder / "dist")
        client = Environment(folder / "client", wheel)
        serve = Environment(folder / "serve", wheel, "[serve]")
        store = folder / "store"
        if given.store is None:
            made = [sys.executable, "-c", SMALL_STORE, str(folder)]
            subprocess.run(made, cwd=ROOT, check=True)
        else:
            shutil.copytree(given.store, store)
        figures = {
            "sdist_mib": round(sdist.stat().st_size / 2**20, 1),
            "wheel_mib": round(wheel.stat().st_size / 2**20, 1),
            "client": check_client(client),
            "serve": check_server(serve, client, store),
        }
    print(json.dumps(figures, indent=2))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    limits = {
        "installed client, MiB": (figures["client"]["mib"], CLIENT_MIB),
        "import of the client, s": (figures["client"]["import_client_seconds"], IMPORT_SECONDS),
    }
    passed = {name: pair for name, pair in limits.items() if pair[0] > pair[1]}
    if passed:
        sys.exit(f"beyond the limit: {passed}")


if __name__ == "__main__":
    main()
