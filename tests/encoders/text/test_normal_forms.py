"""Each normal form on its examples, and where the two folded forms differ."""

import unicodedata

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import DataError
from encoders.text.normal_forms import (
    collapse_white_space,
    fold,
    folded_queries,
    normalize_id,
    normalize_queries,
    normalize_query,
)


def test_normalize_id_decomposed_returns_nfc():
    assert normalize_id("cafe\u0301") == "caf\u00e9"


@pytest.mark.parametrize("value", ["", " ", "\u3000\n"])
def test_normalize_id_invisible_raises_data_error(value):
    with pytest.raises(DataError, match="visible character"):
        normalize_id(value)


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("  red \t shoes\n", "red shoes"),
        ("rote\u00a0Schuhe", "rote Schuhe"),
        ("赤い\u3000靴", "赤い 靴"),
        (" \n", ""),
        ("ÉTÉ", "ÉTÉ"),
    ],
)
def test_normalize_query_collapses_white_space_and_keeps_case(raw, normal):
    assert normalize_query(raw) == normal
    assert normalize_queries(pl.Series([raw, "as it is", raw])).to_list() == [
        normal,
        "as it is",
        normal,
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("a \u00a0\u3000\n\t\x85\x1c\x1fé"), max_size=6), max_size=5)
)
def test_white_space_any_column_collapses_as_each_text(texts):
    column = pl.Series("q", texts, dtype=pl.String)
    expected = [normalize_query(text) for text in texts]
    assert normalize_queries(column).to_list() == expected
    collapsed = column.to_frame().select(collapse_white_space(pl.col("q")))["q"]
    assert collapsed.to_list() == expected


@pytest.mark.parametrize(
    ("raw", "folded"),
    [
        ("Straße ＡＢＣ ﬁ", "strasse abc fi"),
        ("İ", "i̇"),
        ("ΣΑΣ", "σασ"),
        ("½", "1⁄2"),
        ("ABC", "abc"),
    ],
)
def test_fold_examples(raw, folded):
    assert fold(raw) == folded


def test_fold_every_code_point_is_idempotent():
    changed = [
        c
        for c in map(chr, range(0x110000))
        if not c.isascii() and unicodedata.category(c) != "Cs" and fold(fold(c)) != fold(c)
    ]
    assert changed == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=8),
        max_size=6,
    )
)
def test_fold_joined_batch_equals_its_parts(texts):
    assert fold("\x00".join(texts)) == "\x00".join(map(fold, texts))


@pytest.mark.parametrize(
    ("text", "as_query", "as_text"),
    [
        (" Red\u3000 SHOES ", "red shoes", "red shoes"),
        ("Straße", "straße", "strasse"),
        ("ＡＢＣ ﬁ", "abc fi", "abc fi"),
    ],
)
def test_folded_forms_differ_in_case_folding_only(text, as_query, as_text):
    assert folded_queries([text]) == [as_query]
    assert fold(normalize_query(text)) == as_text
