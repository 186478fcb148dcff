"""The impression log: bounded in memory and on disk, and never in the way."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from retrieval.observability import impressions
from retrieval.observability.impressions import Impression, ImpressionLog, LogBounds
from tests.helpers.waiting import until


def impression(number: int, ids: int = 3) -> Impression:
    names = [f"pin-{i}" for i in range(ids)]
    return Impression(f"request-{number}", "r1", "", "de", "AT", "pin", names)


def rows(folder: Path) -> list[dict[str, Any]]:
    text = "".join(path.read_text() for path in sorted(folder.glob("*.jsonl")))
    return [json.loads(line) for line in text.splitlines()]


def test_impression_log_writes_a_line_per_id_and_all_before_it_closes(tmp_path: Path) -> None:
    log = ImpressionLog(tmp_path)
    for number in range(200):
        log.add(impression(number))
    log.close()
    found = rows(tmp_path)
    assert [(row["request_id"], row["position"]) for row in found] == [
        (f"request-{number}", position) for number in range(200) for position in (1, 2, 3)
    ]
    assert log.dropped == 0


def test_impression_log_begins_another_file_when_one_is_full(tmp_path: Path) -> None:
    for _ in range(2):  # a restarted process goes on where the last file has room
        log = ImpressionLog(tmp_path, 7, LogBounds(max_file_bytes=3000))
        for number in range(20):
            log.add(impression(number))
        log.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) > 4 and max(sizes) < 3000 + 1000
    assert all("-7" in path.name for path in tmp_path.iterdir())
    assert len(rows(tmp_path)) == 2 * 20 * 3


def test_impression_log_full_folder_drops_lines_and_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(impressions, "MEASURE_SECONDS", 0.05)
    (tmp_path / "impressions-2020-01-01-0.jsonl").write_text("{}\n" * 1000)
    log = ImpressionLog(tmp_path, 0, LogBounds(max_file_bytes=2000, max_folder_bytes=8000))
    for number in range(200):
        log.add(impression(number))
    until(lambda: log.dropped > 0)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 8000 - 1000 < total < 8000 + 1000
    assert (tmp_path / "impressions-2020-01-01-0.jsonl").stat().st_size == 3000
    for path in tmp_path.iterdir():  # what is taken away makes room
        path.unlink()

    def written_again() -> bool:
        log.add(impression(1000))
        return bool(rows(tmp_path))

    until(written_again)
    log.close()


def test_impression_log_bounds_what_waits_by_ids_and_closes_beside_a_stuck_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(impressions, "CLOSE_SECONDS", 0.2)
    stuck = threading.Event()
    monkeypatch.setattr(impressions._Files, "write", lambda *_: stuck.wait(60))
    log = ImpressionLog(tmp_path, 0, LogBounds(max_pending_ids=1000))
    for number in range(50):
        log.add(impression(number, ids=100))
    assert len(log._waiting) <= 9 and log.dropped >= 40
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 10
    stuck.set()


def test_impression_log_begins_a_line_of_its_own_behind_a_torn_one(tmp_path: Path) -> None:
    """As a full disk leaves it."""
    log = ImpressionLog(tmp_path)
    log.add(impression(1, ids=1))
    log.close()
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '{"torn": "li')
    for number in (2, 3):
        log = ImpressionLog(tmp_path)
        log.add(impression(number, ids=1))
        log.close()
    first, torn, *rest = path.read_text().splitlines()
    assert torn == '{"torn": "li' and json.loads(first)["request_id"] == "request-1"
    assert [json.loads(line)["request_id"] for line in rest] == ["request-2", "request-3"]
