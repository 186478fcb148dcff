"""A sample is drawn evenly, stands for its population, and tells judges nothing about systems."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from encoders.errors import ConfigError, DataError
from encoders.relevance.sample import (
    Sample,
    SampleSettings,
    draw_queries,
    load_sample_folder,
    write_sample,
)
from encoders.relevance.systems import draw_sample, query_population, read_results
from tests.helpers.judged_systems import small_dataset, stored


def population(count: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "query": [f"q{i}" for i in range(count)],
            "language": [("en", "de", "fi")[i % 3 if i % 7 else 2] for i in range(count)],
            "count": [count - i for i in range(count)],
        }
    )


def test_draw_queries_takes_head_torso_and_tail_and_languages_in_turn() -> None:
    drawn = draw_queries(population(1000), SampleSettings(entity_type="pin", queries=90))
    assert drawn.group_by("popularity").len().sort("popularity").rows() == [
        ("head", 30),
        ("tail", 30),
        ("torso", 30),
    ]
    by_language = drawn.group_by("popularity", "language").len()["len"]
    assert by_language.min() == by_language.max() == 10
    assert drawn["query"].is_unique().all()
    head = drawn.filter(popularity="head")["query"].str.slice(1).cast(pl.Int64)
    assert head.max() < 100


def test_draw_queries_weights_stand_for_the_population() -> None:
    drawn = draw_queries(population(1000), SampleSettings(entity_type="pin", queries=90))
    assert drawn["weight"].sum() == pytest.approx(1000)
    assert drawn.filter(popularity="head")["weight"].sum() == pytest.approx(100)


def test_draw_queries_takes_all_when_there_are_few() -> None:
    drawn = draw_queries(population(20), SampleSettings(entity_type="pin", queries=90))
    assert drawn.height == 20
    assert (drawn["weight"] == 1).all()


def test_draw_queries_other_seed_draws_others() -> None:
    drawn = [
        draw_queries(population(1000), SampleSettings(entity_type="pin", queries=30, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0].equals(drawn[1])
    assert set(drawn[0]["query"]) != set(drawn[2]["query"])


def test_items_are_the_same_whoever_returned_them(tmp_path: Path) -> None:
    """Neither the order of systems nor their ranks can be read from what judges see."""
    dataset = small_dataset()
    queries = query_population(dataset, "pin", "heldout")
    settings = SampleSettings(entity_type="pin", queries=12, k=2)
    systems = {"good": stored(0), "bad": stored(1)}
    turned = {"x": stored(1), "y": stored(0)}
    one = draw_sample(tmp_path / "a", dataset, systems, queries, settings)
    other = draw_sample(tmp_path / "b", dataset, turned, queries, settings)
    assert one.items.equals(other.items)


def test_items_file_names_no_system_and_no_engaged_query(sample: Sample) -> None:
    text = (sample.path / "items.jsonl").read_text(encoding="utf-8")
    assert "good" not in text and "bad" not in text and "rank" not in text
    assert "secret" not in text
    assert "about the lamp" in text


def test_items_of_a_query_stand_together(sample: Sample) -> None:
    runs = sample.items["query"].rle().struct.field("value")
    assert runs.is_unique().all()
    assert sample.items["item"].to_list() == list(range(1, 37))


def test_results_hold_the_first_k_of_each_system(sample: Sample) -> None:
    counts = sample.results.group_by("system", "query").agg(pl.col("rank").sort())
    assert counts.height == 2 * 12
    assert all(ranks == [1, 2] for ranks in counts["rank"].to_list())


def test_pictures_are_named_by_item(sample: Sample) -> None:
    with_picture = sample.items.filter(entity_id="p0")["item"].to_list()
    found = sorted(int(path.stem) for path in (sample.path / "pictures").iterdir())
    assert found == sorted(with_picture)


def test_write_sample_existing_folder_is_refused(sample: Sample) -> None:
    with pytest.raises(ConfigError, match="new folder"):
        write_sample(sample, {})


def test_load_sample_folder_without_a_sample_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="omni judge sample"):
        load_sample_folder(tmp_path)


def test_load_sample_folder_of_another_version_is_refused(sample: Sample) -> None:
    path = sample.path / "sample.json"
    path.write_text(json.dumps(sample.about | {"format": 99}), encoding="utf-8")
    with pytest.raises(DataError, match="99"):
        load_sample_folder(sample.path)


def test_draw_sample_one_system_is_refused(tmp_path: Path) -> None:
    dataset = small_dataset()
    with pytest.raises(ConfigError, match="two systems"):
        draw_sample(
            tmp_path / "a",
            dataset,
            {"good": stored(0)},
            query_population(dataset, "pin", "heldout"),
            SampleSettings(entity_type="pin"),
        )


def test_draw_sample_unknown_entity_is_named(tmp_path: Path) -> None:
    dataset = small_dataset()
    strange = stored(0).with_columns(entity_id=pl.lit("elsewhere"))
    with pytest.raises(DataError, match="elsewhere"):
        draw_sample(
            tmp_path / "a",
            dataset,
            {"good": stored(0), "strange": strange},
            query_population(dataset, "pin", "heldout"),
            SampleSettings(entity_type="pin"),
        )


def test_read_results_needs_a_rank(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("query,entity_id,rank\nq,a,1\nq,b,\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 rows lack"):
        read_results(path)
    path.write_text("query,entity_id\nq,a\n", encoding="utf-8")
    with pytest.raises(DataError, match="rank"):
        read_results(path)
