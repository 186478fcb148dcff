"""``omni bench recall`` and ``omni bench downstream`` on small data sets: they run, record, and
refuse what they cannot do.
"""

import gzip
import json

import polars as pl
import pytest
from click.testing import CliRunner

from benchmarks.commands import BENCHES, group
from encoders.tables.files import write_table


@pytest.fixture
def own_tables(tmp_path):
    words = ["apple", "banana", "cherry", "date"]
    write_table(
        pl.DataFrame({"id": words, "entity_type": ["pin"] * 4, "title": words}),
        tmp_path / "catalogue.csv",
    )
    pairs = pl.DataFrame(
        {
            "query": [f"{w} pie" for w in words] + [f"{w} tart" for w in words],
            "entity_id": words * 2,
        }
    )
    pairs = pairs.with_columns(
        split=pl.Series(["train"] * 4 + ["heldout"] * 4),
        entity_type=pl.lit("pin"),
        action=pl.lit("save"),
    )
    write_table(pairs, tmp_path / "pairs.parquet")
    return tmp_path


def test_recall_bench_record_names_data_and_protocol(own_tables, tmp_path):
    out = tmp_path / "results"
    result = CliRunner().invoke(
        group,
        ["recall", "--data", str(own_tables), "--baselines", "bm25,random", "--out", str(out)],
    )
    assert result.exit_code == 0, result.output
    record = json.loads(next(out.glob("*-recall.json")).read_text())
    assert record["metrics"]["tasks"]["pin"]["systems"]["bm25"]["all"]["recall@1"]["value"] == 1.0
    assert (
        record["dataset"]["pairs"] == {"heldout": 4, "train": 4}
        and len(record["dataset"]["sha256"]) == 64
    )
    assert next(out.glob("*.png")).read_bytes()[:4] == b"\x89PNG"
    assert "your data" in result.stdout and "bm25" in result.stdout


def test_recall_bench_release_reads_the_other_half_from_a_clean_tree(
    own_tables, tmp_path, monkeypatch
):
    out = tmp_path / "results"
    arguments = ["recall", "--data", str(own_tables), "--baselines", "random", "--out", str(out)]
    monkeypatch.setattr("benchmarks.record.is_dirty", lambda: True)
    refused = CliRunner().invoke(group, [*arguments, "--release"])
    assert refused.exit_code == 2 and "Commit" in refused.stderr
    monkeypatch.setattr("benchmarks.record.is_dirty", lambda: False)
    pairs = {}
    for split, flags in (("dev", []), ("test", ["--release"])):
        result = CliRunner().invoke(group, [*arguments, *flags, "--name", split])
        assert result.exit_code == 0, result.output
        assert f"held-out {split} pairs" in result.stdout
        metrics = json.loads(next(out.glob(f"*-{split}.json")).read_text())["metrics"]
        pairs[split] = metrics["tasks"]["pin"]["systems"]["random"]["all"]["pairs"]
    assert pairs["dev"] + pairs["test"] == 4


@pytest.mark.slow
def test_downstream_bench_compares_vectors_with_fasttext(tmp_path, monkeypatch):
    pytest.importorskip("fasttext")
    monkeypatch.setattr(
        "benchmarks.quality.downstream._encoders", lambda bundle, names: {"letters": letters}
    )
    folder = tmp_path / "large"
    folder.mkdir()
    classes = {"ic:25D3": "stone", "ic:11H1": "saint", "ic:46A": "law"}
    write_lines(
        folder / "entities.jsonl.gz",
        [
            {"id": c, "entity_type": "pin", "title": t, "source": "iconclass"}
            for c, t in classes.items()
        ],
    )
    rows = {"train": range(120), "dev": range(120, 160)}
    for part, numbers in rows.items():
        lines = [
            ["en", f"{t} number {i}", c, "keyword"] for i in numbers for c, t in classes.items()
        ]
        write_lines(folder / f"pairs_{part}.jsonl.gz", lines)
    out = tmp_path / "results"
    result = CliRunner().invoke(group, ["downstream", "--data", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    metrics = json.loads(next(out.glob("*.json")).read_text())["metrics"]
    assert set(metrics) == {"fastText words", "fastText subwords", "letters"}
    assert metrics["letters"]["all"]["hierarchical precision"]["value"] > 0.9
    assert metrics["fastText words"]["keywords in en"]["level 3"]["value"] > 0.9
    assert 30 < metrics["letters"]["all"]["queries"] < 90  # the dev half of 120


def letters(texts):
    import numpy as np

    rows = np.array(
        [[text.count(chr(97 + i)) for i in range(26)] for text in texts], dtype=np.float32
    )
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_lines(path, values):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def test_downstream_bench_without_taxonomy_is_refused(monkeypatch, own_tables):
    monkeypatch.delenv("OMNI_DATA", raising=False)
    result = CliRunner().invoke(group, ["downstream"])
    assert result.exit_code == 2 and "--data" in result.stderr
    result = CliRunner().invoke(group, ["downstream", "--data", str(own_tables)])
    assert result.exit_code == 2 and "entities.jsonl.gz" in result.stderr


def test_bench_help_lists_every_benchmark():
    listed = CliRunner().invoke(group, ["--help"])
    assert listed.exit_code == 0
    for name, (_, help_text) in BENCHES.items():
        assert name in listed.stdout and help_text.split()[0] in listed.stdout


@pytest.mark.parametrize("name", sorted(BENCHES))
def test_bench_help_of_each_has_an_example(name):
    shown = CliRunner().invoke(group, [name, "--help"])
    assert shown.exit_code == 0, shown.output
    assert "Example:" in shown.stdout
