"""Write benchmark records: machine, commit, command, protocol and metrics in one JSON file.

A stranger can reproduce the figure from its record.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import psutil

from encoders.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS,
    help="Folder of the record. [default: benchmarks/results]",
)


def machine() -> dict[str, Any]:
    """CPU model, cores, memory and GPU name of this machine, without host names or paths."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
    )
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        gpu = ""
    return {
        "cpu": model or platform.processor(),
        "cores": psutil.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu or None,
        "python": platform.python_version(),
    }


def _git(*args: str) -> str:
    result = subprocess.run(
        ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip()


def is_dirty() -> bool:
    """Tell whether the working tree differs from its commit, records apart."""
    lines = _git("status", "--porcelain", "--untracked-files=all").splitlines()
    return any("benchmarks/results/" not in line for line in lines)


def require_clean_tree(folder: Path = RESULTS) -> None:
    """Refuse to measure for the project's records what no commit holds.

    Raises:
        ConfigError: ``folder`` is that of the records, and the tree differs from its commit.
    """
    if folder.resolve() == RESULTS.resolve() and is_dirty():
        raise ConfigError(
            "a record names the commit that it measured, but the working tree has changes that are"
            " not committed. Commit them, or write elsewhere with --out."
        )


def _portable(argument: str) -> str:
    """Return an argument without folders of this machine: an absolute path keeps its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a benchmark writes down beside machine, commit and command."""

    dataset: dict[str, Any]
    """Name, sizes, fingerprint and whether it is real or simulated."""
    config: dict[str, Any]
    """Every parameter that was chosen."""
    protocol: dict[str, Any]
    """Warm-up, repetitions, clock, concurrency."""
    metrics: dict[str, Any]
    """The figures."""
    libraries: tuple[str, ...] = ()
    """Distributions whose versions matter; recorded."""


def write_record(name: str, measurement: Measurement, *, folder: Path = RESULTS) -> Path:
    """Write ``folder/<date>-<name>.json`` and return its path.

    Args:
        name: Short slug of the benchmark, e.g. ``ann-100k``; a record of uncommitted changes is
            named ``ann-100k-dirty`` among the project's.
        measurement: What was measured, on what and how.
        folder: Where results live.
    """
    now = datetime.now(UTC)
    dirty = is_dirty()
    if dirty and folder.resolve() == RESULTS.resolve():
        name += "-dirty"
    versions = {lib: metadata.version(lib) for lib in measurement.libraries}
    record = {
        "name": name,
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _git("rev-parse", "--short", "HEAD") or None,
        "dirty": dirty,
        "command": " ".join(["omni", *map(_portable, sys.argv[1:])]),
        "machine": machine(),
        "versions": versions,
        "dataset": measurement.dataset,
        "config": measurement.config,
        "protocol": measurement.protocol,
        "metrics": measurement.metrics,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now:%Y-%m-%d}-{name}.json"
    path.write_text(
        json.dumps(record, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8"
    )
    return path
