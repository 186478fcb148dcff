"""Run many short trainings, one small result file per (setting, seed); resume a stopped study."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoders.commands.console import stage

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Student's t for a 95% interval of the mean, by number of seeds."""


@dataclass(frozen=True, slots=True)
class Job:
    """One training of a study."""

    path: Path
    """Where its result goes; see ``result_path``."""
    name: str
    """What the progress line says."""
    run: Callable[[], dict[str, Any]]
    """Trains and evaluates; returns what JSON can hold."""


def result_path(work: Path, key: str, sizes: Mapping[str, int], seed: int) -> Path:
    """The result file of a training: its key, every size it depends on, and the seed."""
    return work / f"{key}-{'-'.join(str(value) for value in sizes.values())}-seed{seed}.json"


def run_missing(jobs: Iterable[Job], max_minutes: float = 0.0) -> None:
    """Run the jobs whose file is not there; each file appears whole or not at all.

    After ``max_minutes`` (0: no limit) none starts.
    """
    started = time.monotonic()
    for job in jobs:
        if job.path.is_file() or (max_minutes and time.monotonic() - started > 60 * max_minutes):
            continue
        with stage(job.name):
            result = job.run()
        partial = job.path.with_suffix(".partial")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(job.path)


def read_results(
    work: Path, key: str, sizes: Mapping[str, int], seeds: int
) -> dict[int, dict[str, Any]]:
    """The results of a key that are there, by seed."""
    paths = {seed: result_path(work, key, sizes, seed) for seed in range(seeds)}
    return {
        seed: json.loads(path.read_text(encoding="utf-8"))
        for seed, path in paths.items()
        if path.is_file()
    }


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95% interval of the mean, or None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    return float(T_95.get(n, 2.0) * np.std(values, ddof=1) / np.sqrt(n))
