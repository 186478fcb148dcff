"""`omni judge`, from the drawing of a sample to its report."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from encoders.commands.evaluate import command as evaluate
from encoders.commands.judge import group
from encoders.tables.files import write_table
from tests.helpers.judged_systems import small_dataset, stored
from tests.helpers.run_command import run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    dataset = small_dataset()
    write_table(dataset.catalogue, tmp_path / "data" / "catalogue.parquet")
    write_table(dataset.pairs, tmp_path / "data" / "pairs.parquet")
    return tmp_path / "data"


def test_judge_from_sample_to_report(data: Path, tmp_path: Path) -> None:
    folder, results = tmp_path / "judged", tmp_path / "late.csv"
    write_table(stored(2), results)
    systems = ("bm25", "random", f"late={results}")
    drawn = run(group, "sample", *systems, "--data", data, "--k", 2, "--count", 12, "--out", folder)
    assert drawn.exit_code == 0, drawn.output
    assert run(group, "oracle", folder, "--data", data).exit_code == 0
    assert "oracle, not judgements" in run(group, "report", folder).stdout
    found = run(group, "report", folder, "--json", "--out", tmp_path / "j.jsonl")
    report = json.loads(found.stdout)
    figures = report["measures"]["relevant"]["systems"]
    assert figures["bm25"]["value"] == 0.5 and figures["late"]["value"] == 0.0
    lift = report["measures"]["relevant"]["lifts"]["bm25 - late"]
    assert lift["difference"]["value"] == 0.5 and lift["wins"] == 12
    assert report["judges"][0]["kind"] == "oracle"
    again = run(group, "sample", *systems, "--data", data, "--out", folder)
    assert again.exit_code == 2 and "new folder" in again.output
    judged = run(
        evaluate, "--data", data, "--baselines", "bm25", "--judgements", tmp_path / "j.jsonl"
    )
    assert judged.exit_code == 0, judged.output


def test_judge_sheets_of_two_people_give_an_agreement(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "judged"
    queries = tmp_path / "queries.csv"
    pl.DataFrame({"query": ["a chair", "a lamp"], "count": [5, 1]}).write_csv(queries)
    drawn = run(
        group, "sample", "bm25", "popular", "--data", data, "--queries", queries, "--out", folder
    )
    assert drawn.exit_code == 0, drawn.output
    sheet = tmp_path / "sheet.csv"
    assert run(group, "sheet", folder, "--out", sheet).exit_code == 0
    for judge, grade in (("ann", "3"), ("bo", "2")):
        pl.read_csv(sheet).with_columns(grade=pl.lit(grade)).write_csv(sheet)
        added = run(group, "add", folder, sheet, "--judge", judge)
        assert added.exit_code == 0, added.output
    report = json.loads(run(group, "report", folder, "--json").stdout)
    assert report["agreement"]["identical"] == 0.0
    assert len(report["judges"]) == 2
    text = run(group, "report", folder).stdout
    assert "alpha_ordinal" in text and "popularity: head" in text


def test_judge_sample_of_the_test_half_is_refused(data: Path, tmp_path: Path) -> None:
    found = run(
        group,
        "sample",
        "bm25",
        "random",
        "--data",
        data,
        "--split",
        "test",
        "--out",
        tmp_path / "x",
    )
    assert found.exit_code == 2 and "release" in found.output


def test_judge_sample_same_name_twice_is_refused(data: Path, tmp_path: Path) -> None:
    found = run(group, "sample", "bm25", "bm25", "--data", data, "--out", tmp_path / "x")
    assert found.exit_code == 2 and "'bm25'" in found.output
