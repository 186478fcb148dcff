"""Each normal form on its examples; the three ways to the normal form of a query agree."""

import re
import unicodedata

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import DataError
from encoders.text.normal_forms import (
    INVISIBLE,
    fold,
    fold_query,
    folded_queries,
    normalize_id,
    normalize_queries,
    normalize_query,
    normalized_query,
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
        ("cafe\u0301", "caf\u00e9"),
        ("\ufeffred\u00ad\u200f sh\u200do\u2060es\u200e", "red shoes"),
        ("e\u034f\u0301", "\u00e9"),
        ("red\u200bshoes\x00now\x85", "red shoes now"),
        ("\u2764\ufe0f", "\u2764"),
        ("\u200f\u3164\u200b", ""),
        ("ＡＢＣ", "ＡＢＣ"),
    ],
)
def test_normalize_query_any_script_keeps_what_is_seen_and_its_case(raw, normal):
    assert normalize_query(raw) == normal
    assert normalize_queries(pl.Series([raw, "as it is", raw])).to_list() == [
        normal,
        "as it is",
        normal,
    ]


def test_invisible_holds_every_format_character_but_the_zero_width_space():
    formats = {chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Cf"}
    seen = {character for character in formats if not re.match(f"[{INVISIBLE}]", character)}
    assert seen == {"\u200b"}


odd_text = st.text(
    st.sampled_from(
        "aA \u00a0\u3000\n\t\x85\x1c\x1fé\u0301\u200b\u200d\ufeff\u00ad\x00\x7f\u034fİẞς🙂"
    ),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(odd_text, st.text(st.characters(exclude_categories=["Cs"]))), max_size=5))
def test_normal_form_any_column_equals_each_text(texts):
    column = pl.Series("q", texts, dtype=pl.String)
    expected = [normalize_query(text) for text in texts]
    assert normalize_queries(column).to_list() == expected
    as_expression = column.to_frame().select(normalized_query(pl.col("q")))["q"]
    assert as_expression.to_list() == expected
    assert [normalize_query(text) for text in expected] == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(odd_text, st.text(st.characters(exclude_categories=["Cs"]))), max_size=5))
def test_fold_query_any_column_equals_folded_texts(texts):
    column = pl.DataFrame({"q": texts}, schema={"q": pl.String})
    assert column.select(fold_query(pl.col("q")))["q"].to_list() == folded_queries(texts)


@pytest.mark.parametrize(
    ("raw", "folded"),
    [
        ("Straße ＡＢＣ ﬁ", "strasse abc fi"),
        ("İSTANBUL", "istanbul"),
        ("ΣΑΣ", "σασ"),
        ("½", "1⁄2"),
        ("ABC", "abc"),
    ],
)
def test_fold_examples(raw, folded):
    assert fold(raw) == folded


@pytest.mark.slow
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
    ("text", "folded"),
    [
        (" Red\u3000 SHOES ", "red shoes"),
        ("Straße", "strasse"),
        ("ΟΔΟΣ", "οδοσ"),
        ("İstanbul\u200f", "istanbul"),
        ("ＡＢＣ ﬁ", "abc fi"),
        (None, None),
    ],
)
def test_fold_query_equal_spellings_are_one_query(text, folded):
    column = pl.DataFrame({"q": [text]}, schema={"q": pl.String})
    assert column.select(fold_query(pl.col("q")))["q"].to_list() == [folded]
