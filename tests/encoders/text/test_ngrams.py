"""The vectorised tokeniser against a slow obvious one, and the vocabulary's promises."""

import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from encoders.errors import BundleError, ConfigError, DataError
from encoders.text import ngrams
from encoders.text.ngrams import (
    ALONE,
    DROPPED,
    JOINS,
    KINDS,
    SEPARATOR,
    analyse,
    batches_by_size,
    character_class,
    ngram_text,
)
from encoders.text.normal_forms import fold
from encoders.text.vocabulary import NgramConfig, NgramCounter, Vocabulary


def slow_ngrams(text: str) -> dict[str, list[str]]:
    """Unigrams, bigrams and trigrams of one text, one character at a time."""
    lines: list[list[str]] = [[]]
    word = ""
    characters = [c for c in fold(text.replace("\x00", " ")) if character_class(c) != DROPPED]
    kinds = [character_class(c) for c in characters]
    for signs in re.finditer("[+#]+", "".join(characters)):
        before = kinds[signs.start() - 1] if signs.start() else SEPARATOR
        after = kinds[signs.end()] if signs.end() < len(kinds) else SEPARATOR
        if before == JOINS and after != JOINS:
            kinds[signs.start() : signs.end()] = [JOINS] * (signs.end() - signs.start())
    for c, kind in zip(characters, kinds, strict=True):
        if kind == JOINS:
            word += c
            continue
        if word:
            lines[-1].append(word)
            word = ""
        if kind == ALONE:
            lines[-1].append(c)
        if c == "\n":
            lines.append([])
    if word:
        lines[-1].append(word)
    seen = [c if kind != SEPARATOR else " " for c, kind in zip(characters, kinds, strict=True)]
    spaced = [" ", *seen, " "]
    return {
        "unigram": [w for line in lines for w in line],
        "bigram": [f"{a} {b}" for line in lines for a, b in itertools.pairwise(line)],
        "trigram": [
            "".join(spaced[i - 1 : i + 2]) for i in range(1, len(spaced) - 1) if spaced[i] != " "
        ],
    }


def fast_ngrams(texts: list[str]) -> list[dict[str, list[str]]]:
    analysis = analyse(texts)
    found: list[dict[str, list[str]]] = [{kind: [] for kind in KINDS} for _ in texts]
    for kind, occurrences in enumerate(analysis.kinds):
        owners = np.searchsorted(analysis.text_ends, occurrences.starts)
        for owner, ngram in zip(
            owners.tolist(), ngram_text(analysis, kind, np.arange(len(occurrences.keys)))
        ):
            found[owner][KINDS[kind]].append(ngram)
    return found


any_text = st.text(max_size=30)
wordy_text = st.text(
    st.sampled_from(
        "abcAB+#€$ éß中文字คำ한국\u200b\u200d\u00ad\ufe0f\U0001f600\n\t.,-_'0½ﬁ\u0301\x00𠀀"
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(any_text, wordy_text), max_size=6))
@example(
    [
        "",
        "a",
        "a b",
        "\x00",
        "a\x00b",
        "\n\n",
        "foo\nbar baz",
        "中文字",
        "a\u00adb",
        "👍🏽 ok",
        "\ufdfa",
        "\u0345\u0300",
        "c++ c# a+b +x ##",
    ]
)
@example(["\ud800 lone surrogate \udfff"])
def test_analyse_any_texts_equals_slow_reference(texts):
    assert fast_ngrams(texts) == [slow_ngrams(text) for text in texts]


@pytest.mark.slow
def test_analyse_every_code_point_between_letters_equals_slow_reference():
    texts = [f"a{chr(code)}b" for code in range(0x110000)]
    for start in range(0, len(texts), 16_384):
        part = texts[start : start + 16_384 : 23]
        assert fast_ngrams(part) == [slow_ngrams(text) for text in part]


def test_slow_reference_words_and_ideographs_as_documented():
    assert slow_ngrams("Red-SHOES\n红鞋 🙂") == {
        "unigram": ["red", "shoes", "红", "鞋", "🙂"],
        "bigram": ["red shoes", "红 鞋", "鞋 🙂"],
        "trigram": [
            " re",
            "red",
            "ed ",
            " sh",
            "sho",
            "hoe",
            "oes",
            "es ",
            " 红鞋",
            "红鞋 ",
            " 🙂 ",
        ],
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(wordy_text, max_size=8))
def test_analyse_keys_are_equal_only_for_equal_ngrams(texts):
    analysis = analyse(texts)
    keys: dict[tuple[int, str], set[int]] = {}
    for kind, occurrences in enumerate(analysis.kinds):
        for ngram, key in zip(
            ngram_text(analysis, kind, np.arange(len(occurrences.keys))), occurrences.keys.tolist()
        ):
            keys.setdefault((kind, ngram), set()).add(key)
    assert all(len(found) == 1 for found in keys.values())
    assert len(set().union(*keys.values())) == len(keys) if keys else True


@pytest.mark.slow
def test_analyse_many_similar_words_have_distinct_keys():
    words = [
        f"{a}{b}{c}{d}" for a in "ab01" for b in "abcdefgh" for c in "xyzxyz" for d in range(2_000)
    ]
    assert len(set(analyse([" ".join(words)]).kinds[0].keys.tolist())) == len(set(words))


GOLDEN_KEYS = [9961048005467401263, 13892106971209819163, 15780139749719867544]


def test_analyse_keys_equal_pinned_values():
    """Keys are stored in vocabularies: changing them breaks every saved model."""
    words, bigrams, trigrams = analyse(["Red shoe"]).kinds
    assert [int(words.keys[0]), int(bigrams.keys[0]), int(trigrams.keys[0])] == GOLDEN_KEYS


def count(texts, **settings_):
    counter = NgramCounter(NgramConfig(**settings_))
    counter.add(texts)
    return counter.vocabulary()


def test_vocabulary_rows_are_by_frequency_then_text():
    vocabulary = count(["b a", "a b", "a c"])
    table = vocabulary.table.filter(pl.col("kind") == "unigram")
    assert table["text"].to_list() == ["a", "b", "c"]
    assert table["count"].to_list() == [3, 2, 1]
    assert vocabulary.table["kind"].unique(maintain_order=True).to_list() == list(KINDS)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(wordy_text, min_size=1, max_size=10),
    st.lists(wordy_text, max_size=10),
    st.integers(1, 5),
)
def test_tokenize_any_texts_equals_lookup_of_each_ngram(seen, unseen, size):
    if not any(slow_ngrams(text)["unigram"] for text in seen):
        with pytest.raises(DataError, match="empty"):
            count(seen)
        return
    vocabulary = count(seen, unigrams=size, bigrams=size * 3, trigrams=size * 5)
    number = {
        (kind, text): i
        for i, (kind, text) in enumerate(vocabulary.table.select("kind", "text").rows())
    }
    ids, offsets = vocabulary.tokenize(seen + unseen)
    assert (
        offsets[0] == 0 and offsets[-1] == len(ids) and len(offsets) == len(seen) + len(unseen) + 1
    )
    for i, text in enumerate(seen + unseen):
        wanted = Counter(
            number[kind, ngram]
            for kind, found in slow_ngrams(text).items()
            for ngram in found
            if (kind, ngram) in number
        )
        assert Counter(ids[offsets[i] : offsets[i + 1]].tolist()) == wanted


@pytest.mark.slow
def test_counter_any_batches_equals_exact_counts(monkeypatch):
    rng = random.Random(0)
    texts = [
        " ".join(rng.choices(["rot", "red", "赤", "schuhe", "x", "long-word"], k=rng.randrange(8)))
        for _ in range(500)
    ]
    wanted: Counter[tuple[str, str]] = Counter()
    for text in texts:
        for kind, found in slow_ngrams(text).items():
            wanted.update((kind, ngram) for ngram in found)
    whole = count(texts)
    assert {(k, t): c for k, t, c, _ in whole.table.rows()} == dict(wanted)
    monkeypatch.setattr(ngrams, "_BATCH_CHARACTERS", 100)
    counter = NgramCounter(NgramConfig())
    for text in texts:
        counter.add([text])
    assert counter.vocabulary().table.equals(whole.table)
    assert whole.undercount == (0, 0, 0)


@pytest.mark.slow
def test_counter_at_its_bound_keeps_frequent_ngrams_and_bounds_error():
    rng = np.random.default_rng(0)
    common = [f"common{i}" for i in range(20)]
    texts = [
        " ".join(
            [*rng.choice(common, 5).tolist(), *(f"rare{n}" for n in rng.integers(0, 10**9, 5))]
        )
        for _ in range(2_000)
    ]
    exact = Counter(word for text in texts for word in text.split())
    counter = NgramCounter(NgramConfig(unigrams=20, bigrams=0, trigrams=0, max_tracked=1_000))
    for text in texts:
        counter.add([text])
        assert counter._tracked[0].height + counter._waiting_rows[0] <= 1_000 + 250 + 10
    vocabulary = counter.vocabulary()
    assert set(vocabulary.table["text"]) == set(common)
    assert 0 < vocabulary.undercount[0] < 200
    for text, found in vocabulary.table.select("text", "count").rows():
        assert exact[text] - vocabulary.undercount[0] <= found <= exact[text]


def test_vocabulary_with_min_count_drops_rare_ngrams():
    assert count(["a b", "a"], min_count=2).table.filter(pl.col("kind") == "unigram")[
        "text"
    ].to_list() == ["a"]


def test_tokenize_one_word_vocabulary_drops_unknown_words():
    vocabulary = count(["x"], bigrams=0, trigrams=0)
    assert len(vocabulary) == 1
    assert vocabulary.tokenize(["x y x", "", "y"])[1].tolist() == [0, 2, 2, 2]


def test_tokenize_empty_texts_returns_no_ids():
    vocabulary = count(["x"])
    for texts in ([], ["", " "]):
        ids, offsets = vocabulary.tokenize(texts)
        assert len(ids) == 0 and offsets.tolist() == [0] * (len(texts) + 1)


@pytest.mark.parametrize("texts", [[], [""], [" \n"], ["...", "-"]])
def test_vocabulary_without_words_raises_data_error(texts):
    with pytest.raises(DataError, match="vocabulary would be empty"):
        count(texts)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"unigrams": -1}, "unigrams \\(-1\\)"),
        ({"unigrams": 0, "bigrams": 0, "trigrams": 0}, "all 0"),
        ({"min_count": 0}, "min_count \\(0\\)"),
        ({"max_tracked": 10}, "max_tracked \\(10\\)"),
    ],
)
def test_ngram_config_bad_value_raises_config_error(settings_, message):
    with pytest.raises(ConfigError, match=message):
        NgramConfig(**settings_)


def test_vocabulary_saved_and_loaded_tokenizes_alike(tmp_path):
    vocabulary = count(["red shoes", "rote Schuhe", "赤い靴"], unigrams=5)
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert loaded.config == vocabulary.config
    for a, b in zip(
        vocabulary.tokenize(["red schuhe 赤い"]),
        loaded.tokenize(["red schuhe 赤い"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_vocabulary_damaged_raises_bundle_error(tmp_path):
    vocabulary = count(["red shoes"])
    with pytest.raises(BundleError, match="no readable vocabulary"):
        Vocabulary.load(tmp_path)
    vocabulary.save(tmp_path)
    described = json.loads((tmp_path / "vocabulary.json").read_text())
    (tmp_path / "vocabulary.json").write_text(json.dumps(described | {"format_version": 99}))
    with pytest.raises(BundleError, match="format 99, but this code reads 1"):
        Vocabulary.load(tmp_path)
    (tmp_path / "vocabulary.json").write_text(json.dumps(described | {"rows": 7_000}))
    with pytest.raises(BundleError, match="expected 7000 vocabulary rows"):
        Vocabulary.load(tmp_path)
    (tmp_path / "vocabulary.parquet").write_bytes(
        (tmp_path / "vocabulary.parquet").read_bytes()[:100]
    )
    with pytest.raises(BundleError, match="no readable vocabulary"):
        Vocabulary.load(tmp_path)


@settings(max_examples=50, deadline=None)
@given(st.lists(any_text, max_size=20), st.integers(1, 20))
def test_batches_by_size_keep_order_and_every_text(texts, characters):
    batches = list(batches_by_size(texts, characters))
    assert [text for batch in batches for text in batch] == texts
    assert all(batches)


def test_signs_and_currencies_are_told_apart():
    words = [slow["unigram"] for slow in fast_ngrams(["C++", "C#", "C", "€5", "$5"])]
    assert words == [["c++"], ["c#"], ["c"], ["€", "5"], ["$", "5"]]


def test_vocabulary_of_version_0_1_reads_by_its_own_rules(tmp_path):
    counter = NgramCounter(NgramConfig())
    counter.add(["c x"])
    counter.vocabulary().save(tmp_path)
    described = json.loads((tmp_path / "vocabulary.json").read_text())
    del described["text_rules"]
    (tmp_path / "vocabulary.json").write_text(json.dumps(described))
    older = Vocabulary.load(tmp_path)
    np.testing.assert_array_equal(older.tokenize(["C++ x"])[0], older.tokenize(["c x"])[0])
    older.save(tmp_path)
    assert Vocabulary.load(tmp_path).rules == 1


@pytest.mark.parametrize("key", ["text_rules", "unicode_version"])
def test_vocabulary_of_other_rules_is_refused_and_of_other_unicode_noted(tmp_path, caplog, key):
    counter = NgramCounter(NgramConfig())
    counter.add(["red shoes"])
    counter.vocabulary().save(tmp_path)
    described = json.loads((tmp_path / "vocabulary.json").read_text())
    described[key] = 99
    (tmp_path / "vocabulary.json").write_text(json.dumps(described))
    if key == "text_rules":
        with pytest.raises(BundleError, match="text rules 99"):
            Vocabulary.load(tmp_path)
    else:
        Vocabulary.load(tmp_path)
        assert "Unicode 99" in caplog.text
