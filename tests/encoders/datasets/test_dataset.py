"""The shipped data set: its counts, its split, what is derived from it, and no leak."""

import gzip
import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.datasets.dataset import (
    load_dataset,
    load_large,
    load_sample,
    split_by_query,
    with_engaged_queries,
)
from encoders.datasets.related_queries import query_entities, related_query_pairs
from encoders.errors import ConfigError
from encoders.tables.files import write_table
from encoders.text.normal_forms import fold_query


@pytest.fixture(scope="module")
def sample():
    return load_sample()


def folded(queries):
    return set(queries.to_frame("q").select(fold_query(pl.col("q")))["q"].to_list())


def test_load_sample_has_documented_sizes(sample):
    assert dict(sample.catalogue.group_by("entity_type").len().iter_rows()) == {
        "pin": 1594,
        "product": 4855,
        "ad": 378,
    }
    assert dict(sample.pairs.group_by("split").len().iter_rows()) == {
        "train": 195_245,
        "heldout": 21_951,
    }
    assert sample.pairs["language"].n_unique() == 17
    assert len(sample.images) == 6760 and set(sample.images) <= set(sample.catalogue["id"])
    assert sample.images["pin:1f480"].startswith(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    )
    skull = sample.catalogue.row(by_predicate=pl.col("id") == "pin:1f480", named=True)
    assert (skull["character"], skull["title"], skull["board_titles"]) == (
        "💀",
        "skull",
        ["smileys & emotion", "negative"],
    )


def test_load_sample_held_out_queries_are_in_no_training_text(sample):
    train, heldout = sample.split("train"), sample.split("heldout")
    held = folded(heldout["query"])
    assert not held & folded(train["query"])
    assert not held & folded(sample.catalogue["engaged_queries"].explode().drop_nulls())


def test_engaged_queries_are_own_capped_and_spread_over_languages(sample):
    assert sample.catalogue["engaged_queries"].list.len().max() == 20
    own = sample.split("train").filter(pl.col("entity_id") == "pin:1f480")
    queries = sample.catalogue.filter(pl.col("id") == "pin:1f480")["engaged_queries"][0].to_list()
    assert len(set(queries)) == 20 and set(queries) <= set(own["query"])
    first_17 = own.filter(pl.col("query").is_in(queries[:17]))
    assert first_17["language"].n_unique() == 17
    assert (
        with_engaged_queries(sample.catalogue, sample.pairs, 0)["engaged_queries"].list.len().max()
        == 0
    )
    with pytest.raises(ConfigError, match="-1"):
        with_engaged_queries(sample.catalogue, sample.pairs, -1)


def test_engaged_queries_within_language_are_rarest_first():
    pairs = pl.DataFrame(
        {
            "query": ["common", "common", "rare", "late"],
            "language": "en",
            "entity_id": ["a", "b", "a", "a"],
            "split": ["train"] * 3 + ["heldout"],
        }
    )
    got = with_engaged_queries(pl.DataFrame({"id": ["a", "b", "c"]}), pairs)
    assert got["engaged_queries"].to_list() == [["rare", "common"], ["common"], []]


def test_query_entities_are_distinct_strings_by_count(sample):
    queries = query_entities(sample.pairs)
    assert queries["id"].is_unique().all() and queries["id"].to_list() == queries["title"].to_list()
    assert queries["count"].sum() == sample.pairs.height and queries["count"].is_sorted(
        descending=True
    )
    train = query_entities(sample.pairs, "train")
    assert set(train["split"]) == {"train"} and train.height < queries.height


@pytest.mark.slow
def test_related_query_pairs_never_leak_and_never_repeat_query(sample):
    few = sample.pairs.filter(
        pl.col("entity_id").is_in(sample.of_type("pin")["id"].head(150).implode())
    )
    related = related_query_pairs(few, per_query=4)
    held = folded(sample.split("heldout")["query"])
    assert not held & folded(related["entity_id"])
    assert not held & folded(related.filter(pl.col("split") == "train")["query"])
    assert folded(related.filter(pl.col("split") == "heldout")["query"]) <= held
    assert related.filter(fold_query(pl.col("query")) == fold_query(pl.col("entity_id"))).is_empty()
    assert related.group_by("query").len()["len"].max() <= 4
    assert set(related["kind"]) == {"derived_translation", "derived_shared"}
    assert related.equals(related_query_pairs(few, per_query=4))


def test_related_query_pairs_weights_equal_hand_computed():
    # x: queries p, q (both only on x). y: queries p2, q2, r. p2 and q2 also share z.
    rows = [("p", "x"), ("q", "x"), ("p2", "y"), ("q2", "y"), ("r", "y"), ("p2", "z"), ("q2", "z")]
    pairs = pl.DataFrame(rows, schema=["query", "entity_id"], orient="row").with_columns(
        language=pl.lit("en"), kind=pl.lit("tag"), split=pl.lit("train")
    )
    got = {
        (q, e): w
        for q, e, w in related_query_pairs(pairs).select("query", "entity_id", "weight").iter_rows()
    }
    log3 = 1.584962500721156
    assert got[("p", "q")] == pytest.approx(1 / log3)
    assert got[("p2", "q2")] == pytest.approx((1 / 2 + 1 / log3) / 2)
    assert got[("r", "p2")] == pytest.approx(1 / 2 / 2**0.5)
    assert ("p", "r") not in got
    names = pairs.with_columns(
        kind=pl.when(pl.col("query").is_in(["p", "q"]))
        .then(pl.lit("name"))
        .otherwise(pl.lit("tag"))
    )
    by_kind = related_query_pairs(names).filter(pl.col("query") == "p").row(0, named=True)
    assert by_kind["kind"] == "derived_translation" and by_kind["weight"] == pytest.approx(
        1 + 1 / log3
    )


def test_related_query_pairs_query_of_many_entities_has_none():
    pairs = pl.DataFrame(
        {"query": ["off"] * 50 + ["one"], "entity_id": [f"e{i}" for i in range(50)] + ["e0"]}
    ).with_columns(language=pl.lit("en"), kind=pl.lit("tag"), split=pl.lit("train"))
    assert related_query_pairs(pairs, max_entities=40).is_empty()
    assert related_query_pairs(pairs, max_entities=50).height == 2


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=20), st.floats(0, 1), st.integers(0, 5))
def test_split_by_query_equal_strings_share_a_split(queries, share, seed):
    got = split_by_query(queries, heldout_share=share, seed=seed)
    respelt = [f"  {query.replace(' ', '  ')}\n" for query in queries]
    assert split_by_query(respelt, heldout_share=share, seed=seed) == got
    assert split_by_query(queries[::-1], heldout_share=share, seed=seed) == got[::-1]


def test_split_by_query_share_is_about_as_asked():
    sides = split_by_query([f"query {i}" for i in range(5000)], heldout_share=0.2)
    assert 0.17 < sides.count("heldout") / 5000 < 0.23
    with pytest.raises(ConfigError, match=r"1\.5"):
        split_by_query(["a"], heldout_share=1.5)


def write_large(folder):
    entities = [
        {
            "id": "emoji:fluent:1f480",
            "entity_type": "pin",
            "title": "skull",
            "source": "emoji/fluent",
            "boards": ["faces"],
        },
        {"id": "emoji:noto:1f480", "entity_type": "pin", "title": "skull", "source": "emoji/noto"},
        {
            "id": "ad:x",
            "entity_type": "ad",
            "title": "X",
            "source": "appstream",
            "description": "a tool",
            "advertiser": "{'de': 'Das Projekt', 'C': 'The Project'}",
        },
    ]
    entities.append(entities[-1])  # the real file has one of these
    rows = {
        "train": [["en", "skull", "emoji:fluent:1f480", "name"]],
        "dev": [["de", "Schädel", "emoji:fluent:1f480", "name"]],
    }
    with gzip.open(folder / "entities.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(entity) + "\n" for entity in entities)
    for part, lines in rows.items():
        with gzip.open(folder / f"pairs_{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def test_load_large_groups_one_emoji_by_several_artists(tmp_path):
    (tmp_path / "large").mkdir()
    write_large(tmp_path / "large")
    large = load_dataset(tmp_path)
    assert large.name == "large"
    assert large.groups == {"emoji:fluent:1f480": "emoji:1f480", "emoji:noto:1f480": "emoji:1f480"}
    assert large.catalogue["character"].to_list() == ["💀", "💀", None]
    assert large.pairs.select("query", "split").rows() == [
        ("skull", "train"),
        ("Schädel", "heldout"),
    ]
    assert load_large(tmp_path, sources=["appstream"]).catalogue.select(
        "id", "advertiser"
    ).rows() == [("ad:x", "The Project")]


def test_load_tables_reads_own_tables_and_names_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"entities\.jsonl\.gz"):
        load_dataset(tmp_path)
    write_table(
        pl.DataFrame({"id": ["a"], "entity_type": ["pin"], "title": ["apple"]}),
        tmp_path / "catalogue.csv",
    )
    with pytest.raises(ConfigError, match="'pairs'"):
        load_dataset(tmp_path)
    pairs = {
        "query": ["fruit", "red fruit"],
        "entity_type": ["pin"] * 2,
        "entity_id": ["a"] * 2,
        "split": ["train", "heldout"],
        "action": ["save"] * 2,
    }
    write_table(pl.DataFrame(pairs), tmp_path / "pairs.parquet")
    own = load_dataset(tmp_path)
    assert own.catalogue["engaged_queries"].to_list() == [["fruit"]]
    assert own.pairs["kind"].to_list() == ["save", "save"] and own.label == "your data"
