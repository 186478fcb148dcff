"""Reports: the command as it is run, files that other tools read, related queries, judgements,
your own tables.
"""

import json
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from encoders.commands.evaluate import command
from encoders.commands.report_output import plot_report
from encoders.datasets.dataset import Dataset, load_sample
from encoders.errors import ConfigError
from encoders.evaluation.metrics import UNRANKED
from encoders.evaluation.report import (
    EvaluationSettings,
    bundle_system,
    evaluate_systems,
    frozen_vectors_system,
    save_runs,
)
from encoders.tables.files import write_table


class SpellingModel:
    """A bundle stand-in: vectors of letter counts."""

    def embed_queries(self, texts):
        counts = np.array(
            [
                [text.lower().count(chr(97 + i)) + 0.01 * (i + 1) for i in range(26)]
                for text in texts
            ],
            dtype=np.float32,
        )
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def embed_entities(self, catalogue):
        return self.embed_queries(
            [f"{title} {id}" for title, id in catalogue.select("title", "id").iter_rows()]
        )


def test_frozen_vectors_system_compares_prefixes_and_leaves_out_what_has_none():
    """A slow loop over the first numbers of each query; entities without a vector are not found."""
    data = dataset()
    wide = SpellingModel().embed_entities(data.catalogue)[:, :10]
    vectors = [None if i == 2 else row.tolist() for i, row in enumerate(wide)]
    catalogue = data.catalogue.with_columns(frozen=pl.Series(vectors, dtype=pl.List(pl.Float32)))
    data = replace(data, catalogue=catalogue)
    systems = {"frozen": frozen_vectors_system(SpellingModel(), "frozen")}
    report = evaluate_systems(data, systems, EvaluationSettings(split="dev")).tasks["pin"]
    queries = SpellingModel().embed_queries(report.task.queries)[:, :10]
    found = report.rankings["frozen"].ranks
    for rank, index, entity in zip(
        found, report.task.pairs["query_index"], report.task.pairs["entity_id"], strict=True
    ):
        own = catalogue["id"].to_list().index(entity)
        if own == 2:
            assert rank == UNRANKED
            continue
        query = queries[index] / np.linalg.norm(queries[index])
        cosines = [
            -2.0 if v is None else float(query @ (np.array(v) / np.linalg.norm(v))) for v in vectors
        ]
        assert rank == 1 + sum(c > cosines[own] for c in cosines)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [([[1.0] * 30] * 8, "30 numbers"), ([None] * 8, "no pin has a vector")],
)
def test_frozen_vectors_system_without_comparable_vectors_is_refused(vectors, message):
    data = dataset()
    column = pl.Series(vectors, dtype=pl.List(pl.Float32))
    data = replace(data, catalogue=data.catalogue.with_columns(frozen=column))
    systems = {"frozen": frozen_vectors_system(SpellingModel(), "frozen")}
    with pytest.raises(ConfigError, match=message):
        evaluate_systems(data, systems, EvaluationSettings(split="dev"))


def dataset(groups=None):
    words = [
        "apple",
        "banana split",
        "cherry pie",
        "date",
        "elder 100%",
        "fig",
        "grape",
        "honey melon",
    ]
    catalogue = pl.DataFrame(
        {"id": [f"id {w}" for w in words], "entity_type": "pin", "title": words}
    )
    rows = [(w[:4] + str(i), f"id {w}", 1 + i % 3) for i, w in enumerate(words)] + [
        ("banana0", "id banana split", 1),
        ("banana0", "id fig", 3),
    ]
    pairs = pl.DataFrame(rows, schema=["query", "entity_id", "grade"], orient="row").with_columns(
        language=pl.lit("en"),
        country=pl.lit("US"),
        entity_type=pl.lit("pin"),
        kind=pl.lit("tag"),
        count=pl.lit(1),
        split=pl.lit("dev"),
    )
    return Dataset(catalogue, pairs, groups=groups or {})


def test_save_runs_files_give_same_figures_in_ir_measures(tmp_path):
    ir_measures = pytest.importorskip("ir_measures")
    report = evaluate_systems(
        dataset(), {"my model": bundle_system(SpellingModel())}, EvaluationSettings(runs=True)
    )
    save_runs(report, tmp_path)
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "pin" / "qrels.txt")))
    run = list(ir_measures.read_trec_run(str(tmp_path / "pin" / "run-my_model.txt")))
    got = ir_measures.calc_aggregate(
        [ir_measures.R @ 10, ir_measures.nDCG @ 10, ir_measures.R @ 1], qrels, run
    )
    metrics = report.tasks["pin"].overall["my model"]
    assert got[ir_measures.R @ 10] == pytest.approx(metrics.query_recall.value)
    assert got[ir_measures.nDCG @ 10] == pytest.approx(metrics.ndcg)
    assert 0.3 < metrics.ndcg < 1.0
    assert (tmp_path / "pin" / "queries.tsv").read_text().splitlines()[0] == "q0\tappl0"
    assert "id%20elder%20100%25" in (tmp_path / "pin" / "qrels.txt").read_text()


def test_save_runs_near_duplicates_are_one_document(tmp_path):
    groups = {"id fig": "fruit", "id date": "fruit"}
    save_runs(
        evaluate_systems(
            dataset(groups), {"m": bundle_system(SpellingModel())}, EvaluationSettings(runs=True)
        ),
        tmp_path,
    )
    lines = [line.split() for line in (tmp_path / "pin" / "run-m.txt").read_text().splitlines()]
    documents = [line[2] for line in lines if line[0] == "q0"]
    assert len(documents) == 7 and documents.count("fruit") == 1
    assert [int(line[3]) for line in lines if line[0] == "q0"] == list(range(1, 8))


def test_save_runs_part_of_catalogue_is_refused(tmp_path):
    report = evaluate_systems(
        dataset(),
        {"m": bundle_system(SpellingModel())},
        EvaluationSettings(corpus_size=3, runs=True),
    )
    with pytest.raises(ConfigError, match="corpus-size"):
        save_runs(report, tmp_path)
    with pytest.raises(ConfigError, match="runs=True"):
        save_runs(
            evaluate_systems(dataset(), {"m": bundle_system(SpellingModel())}),
            tmp_path,
        )


def test_evaluate_graded_judgements_become_gains():
    data = dataset()
    judgements = data.pairs.select("query", "country", "entity_id", "grade").with_columns(
        grade=pl.when(pl.col("query") == "fig5").then(0).otherwise("grade")
    )
    report = evaluate_systems(data, {"m": bundle_system(SpellingModel())}, judgements=judgements)
    task = report.tasks["pin"].task
    assert "fig5" not in task.queries
    assert sorted(task.targets["gain"].to_list()) == sorted(
        g for g in judgements["grade"].to_list() if g
    )
    assert set(report.tasks["pin"].slices["m"]["action"]) == {"grade 1", "grade 2", "grade 3"}
    assert "country" in report.tasks["pin"].labels
    with pytest.raises(ConfigError, match="ids"):
        evaluate_systems(
            data,
            {"m": bundle_system(SpellingModel())},
            judgements=judgements.with_columns(entity_id=pl.lit("?")),
        )


def test_report_as_dict_is_strict_json_and_plots_as_png(tmp_path):
    report = evaluate_systems(
        dataset(), {"a": bundle_system(SpellingModel()), "b": bundle_system(SpellingModel())}
    )
    plot_report(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    value = json.loads(json.dumps(report.as_dict([("a", "b")]), allow_nan=False))
    assert value["tasks"]["pin"]["comparisons"]["a - b"]["recall@10 difference"] == 0
    assert not any(
        isinstance(x, float) and math.isnan(x)
        for x in value["tasks"]["pin"]["systems"]["a"]["all"]["recall@10"].values()
    )


@pytest.mark.slow
def test_evaluate_related_queries_never_find_themselves():
    whole = load_sample(images=False)
    pins = whole.of_type("pin").head(60)
    sample = Dataset(pins, whole.pairs.filter(pl.col("entity_id").is_in(pins["id"].implode())))
    report = evaluate_systems(
        sample,
        {"spelling": bundle_system(SpellingModel())},
        EvaluationSettings(entity_types=["query"], max_queries=200, slices=["action"]),
    )
    task = report.tasks["query"]
    assert set(task.slices["spelling"]["action"]) <= {"derived_translation", "derived_shared"}
    assert not set(task.task.queries) & set(task.task.candidates["id"])
    # With train queries as queries the query itself is a candidate, and must not be returned.
    train = evaluate_systems(
        sample,
        {"spelling": bundle_system(SpellingModel())},
        EvaluationSettings(
            entity_types=["query"], split="train", max_queries=50, slices=[], runs=True
        ),
    ).tasks["query"]
    rows = train.rankings["spelling"].run[0]
    ids = train.task.candidates["id"].to_list()
    assert all(
        query not in {ids[r] for r in row}
        for query, row in zip(train.task.queries, rows, strict=True)
    )


def test_evaluate_command_own_tables_prints_json(tmp_path):
    data = dataset()
    data = replace(data, pairs=data.pairs.with_columns(split=pl.lit("heldout")))
    write_table(data.catalogue, tmp_path / "catalogue.parquet")
    write_table(
        data.pairs.drop("kind", "grade").with_columns(action=pl.lit("save")), tmp_path / "pairs.csv"
    )
    result = CliRunner().invoke(
        command, ["--data", str(tmp_path), "--baselines", "bm25-trigrams,random", "--json"]
    )
    assert result.exit_code == 0, result.stderr
    systems = json.loads(result.stdout)["tasks"]["pin"]["systems"]
    assert systems["bm25-trigrams"]["all"]["recall@1"]["value"] > 0.5
    assert set(systems) == {"bm25-trigrams", "random"}
    shown = CliRunner().invoke(
        command,
        [
            "--data",
            str(tmp_path),
            "--baselines",
            "random",
            "--slice",
            "country",
            "--save-run",
            str(tmp_path / "runs"),
        ],
    )
    assert shown.exit_code == 0 and "your data" in shown.stdout and "US" in shown.stdout
    assert (tmp_path / "runs" / "pin" / "run-random.txt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no system to evaluate"),
        (["--baselines", "bm26"], 2, "unknown baseline 'bm26'"),
        (["--against", "x"], 2, "--against"),
        (["--baselines", "random", "--save-run", "runs", "--corpus-size", "5"], 2, "--corpus-size"),
        (["no-such-bundle"], 1, "no-such-bundle"),
        (["--baselines", "random", "--split", "nothing"], 2, "'nothing'"),
        (["--baselines", "st:./no-such-folder"], 2, "no-such-folder"),
    ],
)
def test_evaluate_command_bad_usage_is_one_line(arguments, code, message, monkeypatch):
    monkeypatch.delenv("OMNI_DATA", raising=False)
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def with_products_of(split):
    """The pins of ``dataset``, and two products whose only pairs are of ``split``."""
    data = dataset()
    products = pl.DataFrame(
        {"id": ["p 1", "p 2"], "entity_type": "product", "title": ["lamp", "chair"]}
    )
    pairs = data.pairs.head(1).with_columns(
        entity_type=pl.lit("product"), entity_id=pl.lit("p 1"), split=pl.lit(split)
    )
    return Dataset(pl.concat((data.catalogue, products)), pl.concat((data.pairs, pairs)))


def test_evaluate_type_without_pairs_is_logged_and_left_out(caplog):
    caplog.set_level("INFO", "encoders")
    report = evaluate_systems(with_products_of("train"), {"m": bundle_system(SpellingModel())})
    assert list(report.tasks) == ["pin"]
    assert any("product" in line and "no 'held-out dev' pairs" in line for line in caplog.messages)
    with pytest.raises(ConfigError, match="no 'held-out dev' pairs of entity type 'product'"):
        evaluate_systems(
            with_products_of("train"),
            {"m": bundle_system(SpellingModel())},
            EvaluationSettings(entity_types=["pin", "product"]),
        )
    with pytest.raises(ConfigError, match=r"no 'held-out test' pairs.*has dev, train"):
        evaluate_systems(
            with_products_of("train"),
            {"m": bundle_system(SpellingModel())},
            EvaluationSettings(split="test"),
        )


def test_evaluate_judgements_of_one_type_leave_out_others(caplog):
    caplog.set_level("INFO", "encoders")
    data = with_products_of("dev")
    judgements = dataset().pairs.select("query", "country", "entity_id", "grade")
    report = evaluate_systems(data, {"m": bundle_system(SpellingModel())}, judgements=judgements)
    assert list(report.tasks) == ["pin"]
    assert any("product" in line and "judgements" in line for line in caplog.messages)


@pytest.mark.slow
def test_evaluate_command_title_names_the_data(tmp_path, monkeypatch):
    monkeypatch.delenv("OMNI_DATA", raising=False)
    data = dataset()
    data = replace(data, pairs=data.pairs.with_columns(split=pl.lit("heldout")))
    write_table(data.catalogue, tmp_path / "catalogue.parquet")
    write_table(
        data.pairs.drop("kind", "grade").with_columns(action=pl.lit("save")), tmp_path / "pairs.csv"
    )
    judged = data.pairs.select("query", "country", "entity_id", "grade")
    write_table(judged, tmp_path / "judged.csv")
    own = CliRunner().invoke(command, ["--data", str(tmp_path), "--baselines", "random"])
    assert f"pin: held-out dev pairs of {tmp_path} (your data)" in own.stdout
    graded = CliRunner().invoke(
        command,
        [
            "--data",
            str(tmp_path),
            "--baselines",
            "random",
            "--judgements",
            str(tmp_path / "judged.csv"),
        ],
    )
    assert (
        f"pin: judgements of {tmp_path / 'judged.csv'}, entities of {tmp_path} (your data)"
        in graded.stdout
    )
    sample = CliRunner().invoke(
        command, ["--baselines", "random", "--entity-type", "ad", "--resamples", "100"]
    )
    assert "ad: held-out dev pairs of the sample data in the package (" in sample.stdout
