"""The paper-table benchmark's own arithmetic: shares, what each line shows, differences seed by
seed, what is missing, a tiny whole run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from benchmarks.paper_tables.figures import draw
from benchmarks.paper_tables.seed_study import result_path
from benchmarks.paper_tables.settings import (
    LINES,
    MIX,
    NEW_TYPE,
    OMNI,
    SEPARATE,
    SINGLE,
    SINGLE_WHOLE,
    SMALL_PRODUCT_PAIRS,
    TABLES,
    VOLUME,
    Line,
    Training,
)
from benchmarks.paper_tables.tables import figure, jobs, summarise
from benchmarks.paper_tables.trainings import (
    Study,
    fixed,
    going_on,
    run,
    train_settings,
    training_data,
)
from encoders.datasets.dataset import Dataset, with_engaged_queries
from encoders.towers.pretrained_models import create_query_encoder
from encoders.training.data.prepare import split_by_share

SIZES = {"steps": 2, "batch_pairs": 32, "max_queries": 20}


def per_dataset(training: Training, whole: int = 320) -> dict[str, int]:
    """Pairs a step of each dataset."""
    configs = training.dataset_configs()
    pairs = split_by_share([config.share for config in configs], training.batch_pairs(whole))
    return dict(zip((config.name for config in configs), pairs, strict=True))


def test_training_single_task_has_pairs_of_the_mix() -> None:
    mix = per_dataset(MIX)
    assert mix == {"pin": 160, "product": 80, "query": 40, "ad": 40}
    for name, single in SINGLE.items():
        assert per_dataset(single) == {name: mix[name]}
    for name, single in SINGLE_WHOLE.items():
        assert per_dataset(single) == {name: sum(mix.values())}


def test_training_other_product_share_leaves_other_datasets() -> None:
    mix = per_dataset(MIX)
    for share, products in ((0.05, 1), (1.0, 20), (4.0, 80)):
        assert per_dataset(VOLUME[share]) == mix | {"product": products}


def test_lines_keys_name_one_training_and_every_table_has_lines() -> None:
    trainings = {line.training for line in LINES}
    assert len({training.key for training in trainings}) == len(trainings)
    assert len({(line.table, line.setting) for line in LINES}) == len(LINES)
    for line in LINES:
        assert not line.baseline or any(
            (other.table, other.setting) == (line.table, line.baseline) for other in LINES
        )
    assert set(TABLES) == {
        "2",
        "5",
        "6",
        "rows",
        "volume",
        "new-type",
        "versions",
        "prefixes",
        "logq",
    }


def result(pin: float) -> dict[str, Any]:
    """A result file of one training."""
    whole = {
        "recall": pin,
        "languages": {"en": pin, "de": pin / 2},
        "prefixes": {"64": pin / 4},
        "popularity": {"tail": pin / 8},
    }
    return {"": {"recall": {"pin/entity": whole}, "gradients": {"pin": {"query tower": 10 * pin}}}}


def test_figure_of_prefixes_and_parts_by_hand() -> None:
    assert [figure(result(0.8), "", f"pin/entity{part}") for part in ("", "/64", "/tail")] == [
        0.8,
        0.2,
        0.1,
    ]


def test_summarise_means_and_differences_over_present_seeds(tmp_path: Path) -> None:
    lines = (
        Line(table="5", setting="mix", training=MIX, metrics=("pin/entity",)),
        Line(
            table="5",
            setting="separate",
            training=SEPARATE,
            metrics=("pin/entity",),
            baseline="mix",
        ),
        Line(table="5", setting="absent", training=OMNI, metrics=("pin/entity",), baseline="mix"),
    )
    for training, values in ((MIX, {0: 0.4, 1: 0.5, 2: 0.6}), (SEPARATE, {0: 0.3, 2: 0.5})):
        for seed, value in values.items():
            result_path(tmp_path, training.key, SIZES, seed).write_text(json.dumps(result(value)))
    mix, separate, absent = summarise(lines, tmp_path, 3, SIZES)
    assert (mix["seeds"], mix["mean"], mix["languages"]) == (
        3,
        pytest.approx(0.5),
        {"en": pytest.approx(0.5), "de": pytest.approx(0.25)},
    )
    assert mix["gradients"] == {"pin": {"query tower": pytest.approx(5.0)}}
    assert (separate["seeds"], separate["difference"]) == (2, pytest.approx(-0.1))
    assert separate["difference_interval"] == pytest.approx(0.0, abs=1e-9)
    assert (absent["seeds"], absent["mean"], absent["difference"]) == (0, None, None)


def test_jobs_go_seed_by_seed_with_each_training_once(tmp_path: Path) -> None:
    names = [job.name for job in jobs(LINES, tmp_path, 2, SIZES)]
    assert names[0] == "use, seed 0"
    assert "use, seed 1" not in names
    assert len(set(names)) == len(names)
    seeds = [int(name[-1]) for name in names]
    assert seeds == sorted(seeds)


@pytest.mark.slow
def test_draw_one_plot_per_design_question(tmp_path: Path) -> None:
    rows = [
        {
            "table": table,
            "setting": "one",
            "metric": metric,
            "mean": 0.5,
            "interval": None,
            "seeds": 1,
        }
        for table, metric in (
            ("2", "pin/entity"),
            ("rows", "pin/entity"),
            ("prefixes", "pin/entity/64"),
            ("logq", "pin/entity/tail"),
        )
    ]
    rows.append(
        {
            "table": "versions",
            "setting": "none yet",
            "metric": "pin/version 1",
            "mean": None,
            "interval": None,
            "seeds": 0,
        }
    )
    paths = draw(rows, tmp_path, "x")
    assert [path.name for path in paths] == ["x-rows.png", "x-prefixes.png", "x-logq.png"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_training_data_small_volume_hides_queries_left_out(tables: Dataset) -> None:
    data = training_data(tables, Training(key="x", product_pairs=2))
    kept = data.pairs.filter(pl.col("entity_type") == "product")
    assert kept.height == 2
    assert data.catalogue["id"].equals(tables.catalogue["id"])
    products = data.catalogue.filter(pl.col("entity_type") == "product")
    assert set(products["engaged_queries"].explode().drop_nulls()) == set(kept["query"])
    pins = pl.col("entity_type") == "pin"
    assert data.catalogue.filter(pins)["engaged_queries"].equals(
        tables.catalogue.filter(pins)["engaged_queries"]
    )
    assert SMALL_PRODUCT_PAIRS == 195


def test_fixed_projection_encodes_alike_without_parameters() -> None:
    encoder = create_query_encoder()
    before = encoder.encode(["red shoes"])
    held = fixed(encoder)
    np.testing.assert_allclose(held.encode(["red shoes"]), before, atol=1e-6)
    assert not list(held.projection.parameters())


def test_going_on_has_fewer_steps_and_lower_rate(tables: Dataset, tmp_path: Path) -> None:
    config = train_settings(MIX, replace(study(tables, tmp_path), sizes=SIZES | {"steps": 90}), 0)
    later = going_on(config, frozen_queries=True)
    assert (
        later.steps,
        later.optimiser.query_learning_rate,
        later.optimiser.token_embedding_learning_rate,
    ) == (30, 0.0, 0.0)
    assert later.optimiser.learning_rate == config.optimiser.learning_rate / 4


def test_train_settings_without_image_vectors_read_one_less(
    tables: Dataset, tmp_path: Path
) -> None:
    blind = replace(tables, catalogue=tables.catalogue.drop("visual"))
    assert train_settings(MIX, study(tables, tmp_path), 0).features.continuous == {
        "frozen": 256,
        "visual": 192,
    }
    assert train_settings(MIX, study(blind, tmp_path), 0).features.continuous == {"frozen": 256}


@pytest.fixture(scope="module")
def tables() -> Dataset:
    """A catalogue of three types with vectors, and pairs of both splits."""
    rng = np.random.default_rng(0)
    words = [
        "red",
        "blue",
        "green",
        "cat",
        "dog",
        "shoe",
        "lamp",
        "tree",
        "car",
        "boat",
        "moon",
        "star",
    ]
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for kind in ("pin", "product", "ad"):
        for i, word in enumerate(words):
            rows.append(
                {
                    "id": f"{kind}-{i}",
                    "entity_type": kind,
                    "title": f"{word} {kind}",
                    "category": word,
                    "board_titles": [word],
                }
            )
            pairs += [
                {
                    "query": f"{word} {suffix}",
                    "language": "en",
                    "entity_type": kind,
                    "entity_id": f"{kind}-{i}",
                    "kind": "keyword",
                }
                | {"split": "dev" if suffix == "thing" else "train", "count": 1}
                for suffix in ("picture", "art", "thing")
            ]
    catalogue = pl.DataFrame(rows).with_columns(
        pl.Series("frozen", rng.normal(size=(len(rows), 256)).tolist(), dtype=pl.List(pl.Float32)),
        pl.Series("visual", rng.normal(size=(len(rows), 192)).tolist(), dtype=pl.List(pl.Float32)),
    )
    frame = pl.DataFrame(pairs)
    related: list[dict[str, Any]] = [
        {
            "query": f"{word} picture",
            "language": "en",
            "entity_type": "query",
            "entity_id": f"{word} art",
            "kind": "derived_shared",
        }
        | {"split": split, "count": 1}
        for word in words
        for split in ("train", "dev")
    ]
    return Dataset(
        with_engaged_queries(catalogue, frame),
        pl.concat((frame, pl.DataFrame(related).select(frame.columns))),
    )


def study(tables: Dataset, work: Path) -> Study:
    from benchmarks.paper_tables.data import TableData

    return Study(TableData(tables, np.eye(512, 256, dtype=np.float32)), SIZES, work)


@pytest.mark.slow
def test_run_every_kind_of_training_gives_its_figures(tables: Dataset, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    trainings = {
        line.training.key: line.training for line in LINES if line.training.kind != "reference"
    }
    for key in (
        "mix",
        "separate",
        "searchsage",
        "omni",
        "single-ad",
        "single-query",
        "rows-token",
        "new-type",
        "versions",
    ):
        found = run(study(tables, tmp_path), trainings[key], 0)
        json.dumps(found)
        for line in LINES:
            if line.training.key == key and line.table != "logq":
                assert all(
                    0 <= figure(found, line.variant, metric) <= 1 for metric in line.metrics
                ), line


@pytest.mark.slow
def test_run_separate_tower_leaves_other_types_bitwise(tables: Dataset, tmp_path: Path) -> None:
    found = run(study(tables, tmp_path), NEW_TYPE, 0)
    for metric in ("pin/entity", "product/entity", "query/query"):
        assert found["own tower"]["recall"][metric] == found["before"]["recall"][metric]
