import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import DataError
from encoders.text.normal_forms import fold, normalize_id, normalize_query


def test_ids_are_nfc():
    assert normalize_id("cafe\u0301") == "caf\u00e9"


@pytest.mark.parametrize("value", ["", " ", "\u3000\n"])
def test_an_invisible_id_is_refused(value):
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
def test_queries_are_trimmed_and_collapsed_and_keep_case_and_accents(raw, normal):
    assert normalize_query(raw) == normal


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
def test_folding(raw, folded):
    assert fold(raw) == folded


def test_folding_is_idempotent_on_every_code_point():
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
def test_a_joined_batch_folds_as_its_parts_do(texts):
    assert fold("\x00".join(texts)) == "\x00".join(map(fold, texts))
