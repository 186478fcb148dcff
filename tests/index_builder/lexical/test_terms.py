"""Terms: words of the one splitter, and n-grams that know the border of a word."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from encoders.text.normal_forms import fold
from encoders.text.words import words_of
from index_builder.lexical.terms import (
    MAX_QUERY_CHARACTERS,
    are_grams,
    query_terms,
    text_terms,
)


def test_text_terms_short_word_are_word_and_padded_grams() -> None:
    keys, counts = text_terms(["cat"])
    assert counts.tolist() == [6]  # cat; _ca, cat, at_; _cat, cat_
    assert are_grams(keys).tolist() == [False, True, True, True, True, True]
    assert len(set(keys.tolist())) == 6


@given(st.lists(st.text(max_size=30), max_size=5))
def test_text_terms_words_are_those_of_the_splitter(texts: list[str]) -> None:
    keys, counts = text_terms(texts)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    for number, text in enumerate(texts):
        own = keys[bounds[number] : bounds[number + 1]]
        assert np.count_nonzero(~are_grams(own)) == len(words_of(text))


@given(st.text(max_size=40))
def test_query_terms_folded_text_gives_same_terms(text: str) -> None:
    assert np.array_equal(query_terms(text), query_terms(fold(text)))


def test_query_terms_case_and_width_do_not_matter() -> None:
    assert np.array_equal(query_terms("ＡＢＣ-12 straße"), query_terms("abc 12 STRASSE"))


def test_query_terms_long_query_is_cut() -> None:
    text = " ".join(f"word{number}" for number in range(10_000))
    assert np.array_equal(query_terms(text), query_terms(text[:MAX_QUERY_CHARACTERS]))


def test_text_terms_keys_are_the_same_on_every_machine() -> None:
    assert text_terms(["sku-7"])[0][:2].tolist() == SKU_KEYS


SKU_KEYS = [15098701634020691024, 3364778099732825867]
"""The word ``sku``, and its gram `` sk``."""
