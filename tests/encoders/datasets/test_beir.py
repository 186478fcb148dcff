"""Folders in the form of BEIR are evaluated as other tools do: nDCG@10 of a known ranking."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from encoders.commands.evaluate import command
from encoders.datasets.beir import read_beir
from encoders.datasets.dataset import load_dataset
from encoders.errors import DataError, SchemaError
from tests.helpers.run_command import run

DOCUMENTS = ["red shoe shoe", "blue shoe", "blue hat", "tall hat of wool"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "tiny"
    (root / "qrels").mkdir(parents=True)
    rows = [{"_id": str(i), "title": "", "text": text} for i, text in enumerate(DOCUMENTS)]
    write(root / "corpus.jsonl", rows)
    queries = {"a": "shoe", "b": "wool", "c": "cap"}
    write(root / "queries.jsonl", [{"_id": id_, "text": text} for id_, text in queries.items()])
    header = "query-id\tcorpus-id\tscore\n"
    (root / "qrels" / "test.tsv").write_text(header + "a\t0\t1\na\t1\t3\na\t2\t0\nb\t3\t1\n")
    (root / "qrels" / "train.tsv").write_text(header + "c\t2\t1\nc\tgone\t1\nunknown\t2\t1\n")
    return root


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def test_load_dataset_knows_a_beir_folder(folder: Path) -> None:
    dataset = load_dataset(folder)
    assert dataset.catalogue["description"].to_list() == DOCUMENTS
    assert dataset.split("public-test").select("query", "entity_id", "grade").rows() == [
        ("shoe", "0", 1),
        ("shoe", "1", 3),
        ("wool", "3", 1),
    ]
    assert dataset.split("train").select("query", "entity_id").rows() == [("cap", "2")]
    assert dataset.split("test").is_empty()
    assert dataset.catalogue["engaged_queries"].to_list() == [[], [], ["cap"], []]


def test_evaluate_gives_the_graded_ndcg(folder: Path) -> None:
    found = run(
        command,
        *("--data", folder, "--split", "public-test", "--baselines", "bm25", "--json"),
    )
    assert found.exit_code == 0, found.output
    # bm25 puts "red shoe shoe" (grade 1) above "blue shoe" (grade 3); wool is found first
    shoe = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    figures = json.loads(found.stdout)["tasks"]["pin"]["systems"]["bm25"]["all"]
    assert figures["ndcg@10"] == pytest.approx((shoe + 1) / 2)


def test_evaluate_without_dev_qrels_names_the_splits(folder: Path) -> None:
    found = run(command, "--data", folder, "--baselines", "bm25")
    assert found.exit_code == 2 and "public-test" in found.output


def test_corpus_without_titles_is_read(folder: Path) -> None:
    write(folder / "corpus.jsonl", [{"_id": "0", "text": "red shoe"}])
    assert read_beir(folder)["catalogue"].rows() == [("0", "pin", "", "red shoe")]


def test_broken_files_are_named(folder: Path) -> None:
    qrels = folder / "qrels" / "test.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\na\t0\tgood\n")
    with pytest.raises(DataError, match=r"test\.tsv: score 'good'"):
        read_beir(folder)
    qrels.write_text("a\t0\t1\n")
    with pytest.raises(SchemaError, match="query-id"):
        read_beir(folder)
    (folder / "corpus.jsonl").write_text("{}\n{")
    with pytest.raises(DataError, match=r"corpus\.jsonl"):
        read_beir(folder)
