"""The buckets of queries against a slow obvious reading; alone and together are the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from encoders.text.ngrams import SEPARATOR, character_class
from encoders.text.query_ngrams import MAX_CHARACTERS, ORDERS, ngram_buckets, padded
from encoders.text.words import runs_of

BUCKETS = 1 << 16

query = st.one_of(
    st.text(max_size=20),
    st.text(st.sampled_from("abcAB éß中文कि\u200b\u200d\n+#€🙂"), max_size=20),
)


def buckets_of(texts: list[str]) -> list[set[int]]:
    ids, offsets = ngram_buckets(texts, BUCKETS)
    return [set(ids[a:b].tolist()) for a, b in itertools.pairwise(offsets)]


def characters(run: str) -> set[str]:
    padded_run = f" {run} "
    grams = (padded_run[i : i + n] for n in ORDERS for i in range(len(padded_run) - n + 1))
    return set(grams) - {"  "}


@pytest.mark.slow
@settings(max_examples=200)
@given(st.lists(query, max_size=5))
@example(["", "a", " ", "中文字", "c++ a+b"])
def test_ngram_buckets_together_equal_each_alone(texts: list[str]) -> None:
    assert buckets_of(texts) == [buckets_of([text])[0] for text in texts]


def test_ngram_buckets_number_words_and_character_ngrams() -> None:
    for text in ("red shoes", "生日蛋糕", "C++", "a"):
        runs = runs_of(text)
        words = [c for c in text if not c.isascii()] or runs
        expected = len(set(words)) + len(set().union(*(characters(run) for run in runs)))
        assert len(buckets_of([text])[0]) == expected, text


def test_ngram_buckets_share_what_texts_share() -> None:
    red, spelt, other = buckets_of(["Red SHOES", "red\u200f  shoes", "xyz"])
    assert red == spelt
    assert not red & other
    one, two = buckets_of(["shoe", "shoes"])
    assert one & two and one - two and two - one


def test_ngram_buckets_long_texts_are_cut() -> None:
    long = "".join(chr(0x4E00 + i) for i in range(500))
    assert buckets_of([long]) == buckets_of([long[:MAX_CHARACTERS]])


def test_padded_fills_with_the_padding_row() -> None:
    ids, offsets = ngram_buckets(["a", "", "ab"], 64)
    rectangle = padded(ids, offsets, [2, 1, 0], 64)
    assert rectangle.shape == (3, int(np.diff(offsets).max()))
    assert (rectangle[1] == 64).all()
    assert padded(ids[:0], np.zeros(2, np.int64), [0], 64).tolist() == [[64]]
    assert character_class(" ") == SEPARATOR
