import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import BundleError, ConfigError, DataError, RowError, SchemaError
from encoders.towers.entity_features import (
    EntityBatch,
    EntityFeatureConfig,
    EntityFeaturizer,
    concatenate,
)


def catalogue(**columns) -> pl.DataFrame:
    rows = len(next(iter(columns.values())))
    return pl.DataFrame({"id": [f"p{i}" for i in range(rows)], **columns})


CATALOGUE = catalogue(
    title=["red shoes", None, "Blue shoes", ""],
    board_titles=[["my shoes", "to buy"], [], None, ["blue", None, "sky"]],
    engaged_queries=[["red shoes"], ["trainers", "sneakers"], [], []],
    brand=["acme", "acme", None, None],
)
CONFIG = EntityFeatureConfig(text_fields=("title", "board_titles", "engaged_queries", "brand"))
FEATURIZER = EntityFeaturizer.fit(CATALOGUE, CONFIG)


def bag(batch: EntityBatch, entity: int, field: int) -> list[str]:
    place = entity * batch.fields + field
    ids = batch.token_ids[batch.offsets[place] : batch.offsets[place + 1]].tolist()
    return sorted(FEATURIZER.vocabulary.table["text"][i] for i in ids)


def test_featurizer_each_field_has_its_own_bag():
    batch = FEATURIZER(CATALOGUE)
    assert len(batch) == 4 and batch.fields == 4 and batch.continuous is None
    assert {"red", "shoes", "red shoes"} <= set(bag(batch, 0, 0))
    assert bag(batch, 1, 0) == [] and bag(batch, 3, 0) == [] and bag(batch, 2, 1) == []
    assert {"acme"} <= set(bag(batch, 1, 3)) and bag(batch, 2, 3) == []


def test_featurizer_bigrams_do_not_cross_list_items():
    found = bag(FEATURIZER(CATALOGUE), 0, 1)
    assert "my shoes" in found and "to buy" in found and "shoes to" not in found


def test_featurizer_absent_text_columns_read_as_empty():
    batch = FEATURIZER(CATALOGUE.select("id", "title"))
    assert FEATURIZER.missing_columns(CATALOGUE.select("id", "title")) == [
        "board_titles",
        "engaged_queries",
        "brand",
    ]
    assert bag(batch, 0, 0) == bag(FEATURIZER(CATALOGUE), 0, 0)
    assert bag(batch, 0, 1) == []


def test_featurizer_empty_catalogue_gives_empty_batch():
    batch = FEATURIZER(CATALOGUE.head(0))
    assert len(batch) == 0 and batch.offsets.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8))
def test_batch_select_equals_featurizing_selected_rows(rows):
    config = EntityFeatureConfig(text_fields=CONFIG.text_fields, continuous={"v": 2})
    frame = CATALOGUE.with_columns(v=pl.Series([[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0]]))
    featurizer = EntityFeaturizer(config, FEATURIZER.vocabulary)
    assert_same(featurizer(frame).select(rows), featurizer(frame[rows]))


def assert_same(a: EntityBatch, b: EntityBatch) -> None:
    assert (
        torch.equal(a.token_ids, b.token_ids)
        and torch.equal(a.offsets, b.offsets)
        and a.fields == b.fields
    )
    assert (a.continuous is None) == (b.continuous is None)
    if a.continuous is not None and b.continuous is not None:
        assert torch.equal(a.continuous, b.continuous)


def test_batch_slices_concatenate_to_whole():
    batch = FEATURIZER(CATALOGUE)
    assert_same(concatenate([batch.slice(0, 1), batch.slice(1, 1), batch.slice(1, 4)]), batch)
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])


def test_featurizer_fit_on_stream_gives_same_vocabulary():
    streamed = EntityFeaturizer.fit((CATALOGUE[i : i + 1] for i in range(4)), CONFIG)
    assert streamed.vocabulary.table.equals(FEATURIZER.vocabulary.table)


VECTORS = EntityFeaturizer(
    EntityFeatureConfig(text_fields=("title",), continuous={"a": 2, "b": 3}), FEATURIZER.vocabulary
)
TITLES = ["x", "y", "z"]


def continuous(**columns) -> np.ndarray:
    batch = VECTORS(catalogue(title=TITLES, **columns))
    assert batch.continuous is not None and batch.continuous.dtype == torch.float32
    return batch.continuous.numpy()


def test_featurizer_vectors_stand_side_by_side_absent_are_zeros():
    found = continuous(a=[[1.0, 2.0], None, []], b=[[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], None])
    assert found.tolist() == [[1, 2, 1, 1, 1], [0, 0, 2, 2, 2], [0, 0, 0, 0, 0]]
    assert continuous(a=[None, None, None]).tolist() == [[0] * 5] * 3


def test_featurizer_several_vectors_are_averaged():
    found = continuous(a=[[[1.0, 2.0], [3.0, 6.0]], None, [[5.0, 5.0], None]])
    assert found[:, :2].tolist() == [[2, 4], [0, 0], [5, 5]]


def test_featurizer_fixed_width_and_integer_vectors_are_read():
    array = pl.Series("a", [[1, 2], [3, 4], None], dtype=pl.Array(pl.Int32, 2))
    assert continuous(a=array)[:, :2].tolist() == [[1, 2], [3, 4], [0, 0]]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1.0, 2.0], [1.0], None], "entity 'p1': a must hold 2 numbers, but holds 1"),
        ([[1.0, 2.0], [1.0, float("nan")], None], "entity 'p1': a holds NaN"),
        ([None, None, [float("inf"), 1.0]], "entity 'p2': a holds NaN, Inf"),
        ([None, [1.0, None], None], "entity 'p1': a holds NaN, Inf or null"),
        ([None, [[1.0, 2.0], [1.0]], None], "entity 'p1': a must hold 2 numbers, but holds 1"),
    ],
)
def test_featurizer_bad_vectors_name_the_entity(column, message):
    with pytest.raises(RowError, match=message):
        continuous(a=column)


@pytest.mark.parametrize("column", [["1,2", None, None], [1.0, 2.0, 3.0], [["a"], [], []]])
def test_featurizer_vector_column_of_another_type_is_refused(column):
    with pytest.raises(SchemaError, match="vector column 'a' must be a list of 2 numbers"):
        continuous(a=column)


def test_featurizer_text_column_of_another_type_is_refused():
    with pytest.raises(SchemaError, match="text field 'title' must be text"):
        FEATURIZER(catalogue(title=[{"en": "x"}]))


def test_featurizer_fit_missing_columns_are_named():
    with pytest.raises(SchemaError, match="none of the text fields"):
        EntityFeaturizer.fit(catalogue(name=["x"]), CONFIG)
    with pytest.raises(SchemaError, match=r"lacks the declared vector column\(s\) \['visual'\]"):
        EntityFeaturizer.fit(CATALOGUE, EntityFeatureConfig(continuous={"visual": 4}))


def test_featurizer_fit_white_space_only_is_refused():
    with pytest.raises(DataError, match="vocabulary would be empty"):
        EntityFeaturizer.fit(catalogue(title=[" ", "\n", None]), CONFIG)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"text_fields": ()}, "text_fields is empty"),
        ({"text_fields": ("title", "title")}, "title is declared twice"),
        ({"continuous": {"title": 3}}, "title is declared twice"),
        ({"continuous": {"v": 0}}, r"continuous\['v'\] \(0\)"),
    ],
)
def test_entity_feature_config_bad_settings_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        EntityFeatureConfig(**settings_)


def test_featurizer_saved_and_loaded_makes_same_batch(tmp_path):
    VECTORS.save(tmp_path)
    loaded = EntityFeaturizer.load(tmp_path)
    frame = catalogue(title=TITLES, a=[[1.0, 2.0], None, None])
    assert loaded.config == VECTORS.config
    assert_same(loaded(frame), VECTORS(frame))


def test_featurizer_load_damaged_file_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"features\.json"):
        EntityFeaturizer.load(tmp_path)
    FEATURIZER.save(tmp_path)
    described = json.loads((tmp_path / "features.json").read_text())
    (tmp_path / "features.json").write_text(json.dumps(described | {"format_version": 2}))
    with pytest.raises(BundleError, match="format 2, but this code reads 1"):
        EntityFeaturizer.load(tmp_path)
    (tmp_path / "features.json").write_text(json.dumps(described | {"surprise": 2}))
    with pytest.raises(BundleError, match="surprise"):
        EntityFeaturizer.load(tmp_path)
