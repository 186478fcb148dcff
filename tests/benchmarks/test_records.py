"""Records of measurements: each is whole, and cited by a table of benchmarks/README.md."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from benchmarks.record import RESULTS, Measurement, write_record

README = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
CITED = set(re.findall(r"`([a-z0-9-]+)`", README))
RECORDS = sorted(RESULTS.glob("*.json"))
FIELDS = {"command", "commit", "config", "dataset", "date", "machine", "metrics", "name"}


def split_name(path: Path) -> tuple[str, str]:
    """Date and name of a record or plot."""
    match = re.fullmatch(r"(\d{4}-\d{2}-\d{2})-([a-z0-9-]+)", path.stem)
    assert match, f"{path.name}: expected <date>-<name>"
    return match[1], match[2]


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record_is_strict_json_with_all_fields_and_cited(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    date, name = split_name(path)
    assert set(record) >= FIELDS and record["metrics"]
    assert datetime.fromisoformat(record["date"]).date().isoformat() == date
    assert record["command"].startswith("omni ")
    assert name in CITED, f"{path.name}: no table of benchmarks/README.md cites `{name}`"


def test_plots_belong_to_a_record() -> None:
    names = tuple(path.stem for path in RECORDS)
    for plot in RESULTS.glob("*.png"):
        assert plot.stem.startswith(names), f"{plot.name} belongs to no record"


def test_readme_records_of_tables_exist() -> None:
    names = {split_name(path)[1] for path in RECORDS}
    rows = 0
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        header, _, *lines = [row.strip("|\n").split(" | ") for row in table.splitlines()]
        if "record" not in [cell.strip() for cell in header]:
            continue
        column = [cell.strip() for cell in header].index("record")
        for line in lines:
            for name in re.findall(r"`([a-z0-9-]+)`", line[column]):
                assert name in names, f"benchmarks/README.md cites `{name}`, which has no record"
                rows += 1
    assert rows > 30


def test_write_record_is_read_back_whole(tmp_path: Path) -> None:
    measurement = Measurement(
        dataset={"name": "none"}, config={"size": 1}, protocol={}, metrics={"seconds": 0.5}
    )
    path = write_record("test-record", measurement, folder=tmp_path)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert split_name(path) == (record["date"][:10], "test-record")
    assert set(record) >= FIELDS and record["metrics"] == {"seconds": 0.5}
