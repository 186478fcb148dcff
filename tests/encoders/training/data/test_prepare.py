import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import ConfigError, DataError, SchemaError
from encoders.training.data.prepare import prepare, split_by_share
from encoders.training.data.source_tables import TrainingData
from tests.helpers.training_examples import DIMENSION, small_config, world

few = settings(max_examples=40, deadline=None)


@few
@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=6), st.integers(1, 500), st.integers(1, 4))
def test_split_by_share_any_shares_fill_the_batch(
    shares: list[float], units: int, multiple: int
) -> None:
    pairs = units * multiple
    if units < len(shares):
        with pytest.raises(ConfigError, match=f"too small for {len(shares)} datasets"):
            split_by_share(shares, pairs, multiple)
        return
    given_pairs = split_by_share(shares, pairs, multiple)
    assert sum(given_pairs) == pairs
    assert all(n >= multiple and n % multiple == 0 for n in given_pairs)
    for n, share in zip(given_pairs, shares, strict=True):
        assert n <= share / sum(shares) * pairs + multiple * len(shares)


def test_split_by_share_paper_shares_give_paper_batch() -> None:
    assert split_by_share([8, 4, 2, 2], 10_240) == [5120, 2560, 1280, 1280]


def test_prepare_cross_fit_hides_own_query_from_entity() -> None:
    config = small_config(batch={"cross_fit": 3})
    prepared = prepare(world(), config)
    assert len(prepared.catalogue_views) == 3
    for pair_set in prepared.pair_sets:
        if pair_set.is_related_queries:
            continue
        for query, row, fold in zip(
            pair_set.queries, pair_set.candidates, pair_set.folds, strict=True
        ):
            assert (
                prepared.texts[query]
                not in prepared.catalogue_views[fold].row(int(row), named=True)["engaged_queries"]
            )
    kept = [
        view["engaged_queries"].explode().drop_nulls().len() for view in prepared.catalogue_views
    ]
    whole = prepared.catalogue["engaged_queries"].explode().len()
    assert sum(kept) == 2 * whole  # every engaged query is hidden in exactly one view


def test_prepare_held_back_queries_in_no_pair_and_no_entity_text() -> None:
    prepared = prepare(world(), small_config(validation={"fraction": 0.2}))
    held = {prepared.texts[q] for queries, _ in prepared.validation.values() for q in queries}
    assert len(held) > 10
    trained = {prepared.texts[q] for pair_set in prepared.pair_sets for q in pair_set.queries}
    assert not held & trained
    assert not held & set(
        prepared.catalogue_views[0]["engaged_queries"].explode().drop_nulls().to_list()
    )


def test_prepare_engaged_queries_of_arrays_are_hidden_like_lists() -> None:
    data = world()
    array = data.catalogue.with_columns(pl.col("engaged_queries").cast(pl.Array(pl.String, 2)))
    config = small_config(validation={"fraction": 0.2}, batch={"cross_fit": 3})
    expected = prepare(data, config)
    found = prepare(TrainingData(array, data.pairs), config)
    assert found.visible_catalogue.equals(expected.visible_catalogue)
    assert len(found.catalogue_views) == 3
    for view, other in zip(found.catalogue_views, expected.catalogue_views, strict=True):
        assert view.equals(other)


@pytest.mark.parametrize(
    "changes", [{"validation": {"fraction": 0.2}}, {"batch": {"cross_fit": 3}}]
)
def test_prepare_engaged_queries_as_one_text_are_refused(changes: dict) -> None:
    data = world()
    text = data.catalogue.with_columns(pl.col("engaged_queries").list.join(" | "))
    with pytest.raises(SchemaError, match="must be a list of texts an entity, but is String"):
        prepare(TrainingData(text, data.pairs), small_config(**changes))
    prepare(TrainingData(text, data.pairs), small_config(batch={"cross_fit": 0}))  # nothing to hide


@pytest.mark.parametrize("own_split", [False, True])
def test_prepare_held_back_query_is_no_related_query(own_split: bool) -> None:
    """Both sides of a related-query pair are read by the query tower."""
    data = world()
    queries = data.pairs["query"].unique(maintain_order=True).to_list()
    related = pl.DataFrame(
        {
            "query": queries[:-1],
            "entity_type": "query",
            "entity_id": [text.upper() for text in queries[1:]],
        }
    )
    pairs = pl.concat([data.pairs, related], how="diagonal_relaxed")
    if own_split:
        held_here = pl.col("query").is_in(queries[::5])
        pairs = pairs.with_columns(
            split=pl.when(held_here).then(pl.lit("validation")).otherwise(pl.lit("train"))
        )
    prepared = prepare(
        TrainingData(data.catalogue, pairs), small_config(validation={"fraction": 0.2})
    )
    held = {prepared.texts[q].lower() for rows, _ in prepared.validation.values() for q in rows}
    sets = [pair_set for pair_set in prepared.pair_sets if pair_set.is_related_queries]
    shown = {prepared.texts[q].lower() for pair_set in sets for q in pair_set.candidates}
    assert len(held) > 10 and len(shown) > 10 and not held & shown


def test_prepare_own_validation_split_is_used() -> None:
    data = world()
    split = pl.Series(
        "split",
        [
            "validation" if i % 10 == 0 else "heldout" if i % 10 == 1 else "train"
            for i in range(data.pairs.height)
        ],
    )
    prepared = prepare(
        TrainingData(data.catalogue, data.pairs.with_columns(split)),
        small_config(validation={"fraction": 0.5}),
    )
    assert sum(len(q) for q, _ in prepared.validation.values()) == (split == "validation").sum()
    assert prepared.pairs_total == (split == "train").sum()


@pytest.mark.parametrize("column", ["query", "entity_id", "entity_type"])
def test_prepare_missing_column_is_named(column: str) -> None:
    data = world()
    with pytest.raises(SchemaError, match=rf"table pairs: missing column.* {column}"):
        prepare(TrainingData(data.catalogue, data.pairs.drop(column)), small_config())


def test_prepare_bad_tables_raise_distinct_errors() -> None:
    data = world(vectors=True)
    with pytest.raises(SchemaError, match=r"table catalogue: missing column\(s\) id"):
        prepare(TrainingData(data.catalogue.drop("id"), data.pairs), small_config())
    with pytest.raises(
        DataError,
        match=(
            r"dataset 'ad' is empty: no training pair of entity type 'ad'.*the pairs have pin,"
            r" product, query"
        ),
    ):
        prepare(data, small_config(datasets=[{"name": "ad"}]))
    with pytest.raises(DataError, match="with action checkout"):
        prepare(
            data,
            small_config(
                datasets=[{"name": "offsite", "entity_type": "product", "actions": ["checkout"]}]
            ),
        )
    blank = data.pairs.with_columns(
        pl.when(pl.int_range(pl.len()) == 2)
        .then(pl.lit(" \t "))
        .otherwise(pl.col("query"))
        .alias("query")
    )
    with pytest.raises(
        DataError, match=r"1 pairs have a query of only white space \(first: row 2\)"
    ):
        prepare(TrainingData(data.catalogue, blank), small_config())
    with pytest.raises(DataError, match="twice under one entity type"):
        prepare(
            TrainingData(pl.concat((data.catalogue, data.catalogue[:1])), data.pairs),
            small_config(),
        )
    with pytest.raises(DataError, match=r"none of the .* pairs names an entity"):
        prepare(
            TrainingData(data.catalogue[:1], data.pairs.filter(pl.col("entity_type") == "product")),
            small_config(),
        )
    with pytest.raises(DataError, match="has no rows"):
        prepare(TrainingData(data.catalogue, data.pairs[:0]), small_config())


def test_prepare_frozen_column_missing_or_misfit_is_refused() -> None:
    data = world(vectors=True)
    task = {"name": "pin", "candidates": ["vector:pinsage"]}
    prepared = prepare(data, small_config(datasets=[task]))
    norms = prepared.vectors["pinsage"].norm(dim=1)
    assert set(norms.round(decimals=3).tolist()) == {
        0.0,
        1.0,
    }  # absent vectors are zeros, the others of unit length
    with pytest.raises(SchemaError, match="vector column 'itemsage' is not in the catalogue"):
        prepare(data, small_config(datasets=[{**task, "candidates": ["vector:itemsage"]}]))
    with pytest.raises(
        ConfigError, match=f"holds vectors of {DIMENSION} numbers, but model.dimension is 8"
    ):
        prepare(data, small_config(datasets=[task], model={"dimension": 8}))
    none = data.catalogue.with_columns(pl.lit(None, pl.List(pl.Float32)).alias("pinsage"))
    with pytest.raises(ConfigError, match="vectors of 0 numbers"):
        prepare(TrainingData(none, data.pairs), small_config(datasets=[task]))
    broken = data.catalogue.with_columns(pl.col("pinsage").list.eval(pl.element() * float("nan")))
    with pytest.raises(DataError, match="pinsage holds NaN"):
        prepare(TrainingData(broken, data.pairs), small_config(datasets=[task]))
