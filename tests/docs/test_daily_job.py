"""The example of a daily job gives each command what it needs, on the first day, on the next ones
and after a crash.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "daily_job.sh"
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
if [[ "$* " == *"--create "* ]]; then
    mkdir -p "$DATA/engaged_queries" && touch "$DATA/engaged_queries/state.db"
fi
[[ "$1 $2" != "${FAILING:-none}" ]]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "omni").write_text(FAKE)
    (tmp_path / "bin" / "omni").chmod(0o755)
    (tmp_path / "data").mkdir()
    return tmp_path


def run(folder: Path, code: int = 0, **variables: str) -> list[str]:
    """The omni calls of one run, with the data folder written as ``DATA``."""
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    environment = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "DATA": str(folder / "data"),
        "DAY": "2026-01-31",
    }
    environment |= {"STORE": "store", "BUNDLE": "bundle", "CALLS": str(calls)} | variables
    done = subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return calls.read_text().replace(str(folder / "data"), "DATA").splitlines()


def test_daily_job_without_boards_enriches_the_catalogue_itself(folder: Path) -> None:
    calls = run(folder)
    assert [call.split(" --")[0] for call in calls[1:]] == [
        "enrich queries",
        "enrich queries",
        "rebuild",
        "release gc",
    ]
    assert calls[2].endswith(
        "--log DATA/logs/2026-01-31.parquet --catalogue DATA/catalogue.parquet --out"
        " DATA/enriched.parquet"
    )
    assert "--catalogue DATA/enriched.parquet" in calls[3]


def test_daily_job_with_boards_enriches_them_first(folder: Path) -> None:
    (folder / "data" / "boards.parquet").touch()
    calls = run(folder)
    assert (
        calls[1]
        == "enrich boards --catalogue DATA/catalogue.parquet --boards DATA/boards.parquet --out"
        " DATA/with_boards.parquet"
    )
    assert "--catalogue DATA/with_boards.parquet" in calls[3]


def test_daily_job_first_run_repeats_history_until_it_is_read(folder: Path) -> None:
    fill = "enrich queries --state DATA/engaged_queries"
    assert run(folder, 1, FAILING="enrich queries")[1:] == [f"{fill} --create --log DATA/logs"]
    assert run(folder)[1] == f"{fill} --log DATA/logs"
    (one_day,) = [call for call in run(folder) if call.startswith("enrich queries")]
    assert "--log DATA/logs/2026-01-31.parquet" in one_day


def test_daily_job_history_elsewhere_is_read(folder: Path) -> None:
    calls = run(folder, HISTORY="/archive")
    assert calls[1].endswith("--create --log /archive")
    assert "--log DATA/logs/2026-01-31.parquet" in calls[2]
