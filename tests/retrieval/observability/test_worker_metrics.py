"""Metrics of several workers: counts outlive a worker, as Prometheus takes a drop for a restart."""

import fcntl
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from retrieval.observability.metrics import Metrics
from retrieval.observability.shared_metrics import SharedSnapshots

CALLS = "Retrieve\x1fOK"


def worker(folder: Path, calls: int, in_flight: float = 3.0) -> tuple[Metrics, SharedSnapshots]:
    """A worker of this process, or of one that took its number after it."""
    metrics = Metrics()
    metrics.count("omni_requests", ("Retrieve", "OK"), calls)
    for _ in range(calls):
        metrics.histogram("omni_request_seconds", ("Retrieve",)).observe(0.1)
    metrics.add_source(
        lambda: [
            ("omni_in_flight", (), in_flight),
            ("omni_live_sequence", ("pin",), float(calls)),
            ("omni_live_failing", (), 1.0),
        ]
    )
    return metrics, SharedSnapshots(folder, metrics)


@cache
def ended_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def killed(folder: Path, calls: int) -> None:
    """Leave the file of a worker that was killed."""
    path = folder / f"{ended_process()}-{time.time_ns()}.json"
    path.with_suffix(".part").write_text(json.dumps(worker(folder, calls)[0].snapshot()))
    path.with_suffix(".part").rename(path)


def counted(shared: SharedSnapshots) -> tuple[float, int]:
    merged = shared.merged()
    return merged["omni_requests"][CALLS], sum(merged["omni_request_seconds"]["Retrieve"][:-1])


def test_merged_killed_worker_keeps_counts_and_loses_gauges(tmp_path: Path) -> None:
    killed(tmp_path, 5)
    _, shared = worker(tmp_path, 2)
    for _ in range(3):
        assert counted(shared) == (7, 7)
    merged = shared.merged()
    assert merged["omni_in_flight"] == {"": 3.0}
    assert merged["omni_live_sequence"] == {"pin": 2.0}
    assert merged["omni_live_failing"] == {"": 1.0}
    killed(tmp_path, 10)
    assert counted(shared) == (17, 17)


def test_remove_ended_worker_hands_over_its_last_counts(tmp_path: Path) -> None:
    metrics, first = worker(tmp_path, 5)
    first.write()
    metrics.count("omni_requests", ("Retrieve", "OK"), 4)  # after its last file
    first.remove()
    assert list(tmp_path.glob(f"{os.getpid()}-*")) == []
    _, second = worker(tmp_path, 1)
    assert counted(second)[0] == 10
    second.remove()
    assert counted(worker(tmp_path, 0)[1])[0] == 10


def test_merged_scraped_counts_outlive_the_worker(tmp_path: Path) -> None:
    _, first = worker(tmp_path, 5)
    assert counted(first) == (5, 5)  # nobody called write
    assert counted(worker(tmp_path, 1)[1]) == (6, 6)


def test_merged_files_of_ended_workers_are_removed(tmp_path: Path) -> None:
    for _ in range(5):
        killed(tmp_path, 1)
    _, shared = worker(tmp_path, 0)
    assert counted(shared) == (5, 5)
    assert len(list(tmp_path.glob("[0-9]*.json"))) == 1


def test_merged_while_sum_is_locked_counts_ended_workers_from_their_files(tmp_path: Path) -> None:
    killed(tmp_path, 5)
    _, shared = worker(tmp_path, 2)
    with open(tmp_path / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert counted(shared) == (7, 7)
        assert shared.merged()["omni_in_flight"] == {"": 3.0}
        assert len(list(tmp_path.glob("[0-9]*.json"))) == 2
    assert counted(shared) == (7, 7)
    assert len(list(tmp_path.glob("[0-9]*.json"))) == 1


def test_merged_killed_between_sum_and_removal_counts_nobody_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path, 5)
    _, shared = worker(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        assert counted(shared) == (7, 7)
    for _ in range(3):
        assert counted(shared) == (7, 7)
    assert len(list(tmp_path.glob("[0-9]*.json"))) == 1


SCRAPER = """
import sys
from pathlib import Path
from retrieval.observability.metrics import Metrics
from retrieval.observability.shared_metrics import SharedSnapshots

metrics, said = Metrics(), []
shared = SharedSnapshots(Path(sys.argv[1]), metrics)
print("ready", flush=True)
while not said or said[-1] < 40:
    said.append(shared.merged().get("omni_requests", {}).get("Retrieve\\x1fOK", 0))
assert said == sorted(said) and said[-1] == 40, said
"""


@pytest.mark.slow
def test_merged_concurrent_scrapes_see_counts_only_grow(tmp_path: Path) -> None:
    scrapers = [
        subprocess.Popen(
            [sys.executable, "-c", SCRAPER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [scraper.stdout.readline() for scraper in scrapers if scraper.stdout] == ["ready\n"] * 3
    for _ in range(40):
        killed(tmp_path, 1)
        time.sleep(0.01)
    assert [scraper.wait(120) for scraper in scrapers] == [0, 0, 0]


def test_merged_missing_folder_or_damaged_files_do_not_fail(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "1-1.json").write_text("half a fi")
    (folder / "gone.json").write_text(json.dumps([]))
    _, shared = worker(folder, 2)
    assert counted(shared) == (2, 2)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert counted(shared) == (2, 2)
    shared.remove()
