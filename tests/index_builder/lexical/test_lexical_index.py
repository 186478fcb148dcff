"""BM25 over posting lists: a slow exact reference, both searches alike, masks and budgets."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.datasets.dataset import load_sample
from encoders.errors import ConfigError
from index_builder.lexical.counting import text_fields
from index_builder.lexical.lexical_index import LexicalConfig, LexicalIndex
from index_builder.lexical.postings import Bm25
from index_builder.lexical.scan import ScanRequest
from index_builder.lexical.terms import are_grams, query_terms, text_terms
from index_builder.native import Postings as CompiledPostings

COMPILED = [False] if CompiledPostings is None else [False, True]
WORDS = st.sampled_from(["red", "redder", "blue", "cat", "cats", "犬", "犬小屋", "x1", "🎂"])
TEXTS = st.lists(st.lists(WORDS, max_size=6).map(" ".join), min_size=1, max_size=30)


def counts_of(texts: Sequence[str]) -> list[Counter[int]]:
    return [Counter(text_terms([text])[0].tolist()) for text in texts]


def exact_scores(counts: Sequence[Counter[int]], query: str, config: LexicalConfig) -> list[float]:
    """BM25 in floating point by its formula, one text after the other."""
    lengths = [sum(count.values()) for count in counts]
    average = sum(lengths) / max(1, sum(length > 0 for length in lengths))
    terms = query_terms(query)
    weights = np.where(are_grams(terms), config.gram_weight, 1.0)
    scores = [0.0] * len(counts)
    for term, weight in zip(terms.tolist(), weights.tolist(), strict=True):
        frequency = sum(term in count for count in counts)
        rarity = math.log(1 + (len(counts) - frequency + 0.5) / (frequency + 0.5))
        for row, count in enumerate(counts):
            if not count[term]:
                continue
            k1, b = config.bm25.k1, config.bm25.b
            norm = k1 * (1 - b + b * lengths[row] / average)
            scores[row] += weight * rarity * count[term] * (k1 + 1) / (count[term] + norm)
    return scores


def indexes(texts: Sequence[str]) -> list[LexicalIndex]:
    fields = {"title": texts}
    return [LexicalIndex.build(fields, len(texts), compiled=way) for way in COMPILED]


@given(TEXTS, st.lists(WORDS, min_size=1, max_size=4).map(" ".join))
def test_search_every_row_scores_near_the_formula(texts: list[str], query: str) -> None:
    expected = np.array(exact_scores(counts_of(texts), query, LexicalConfig()))
    for index in indexes(texts):
        every = np.arange(len(texts), dtype=np.uint32)
        hits = index.search(index.query(query), ScanRequest(k=len(texts), also=every))
        assert hits.is_exact
        np.testing.assert_allclose(hits.also, expected, rtol=0.02, atol=0.03)
        assert sorted(hits.rows.tolist()) == np.flatnonzero(expected > 0).tolist()
        assert np.array_equal(hits.scores, hits.also[hits.rows])
        assert (np.diff(hits.scores) <= 0).all()
        assert float(hits.scores.max(initial=0)) <= index.query(query).maximum


@pytest.mark.slow
@given(
    TEXTS,
    st.lists(WORDS, min_size=1, max_size=4).map(" ".join),
    st.integers(1, 6),
    st.integers(1, 40),
    st.data(),
)
def test_search_budget_and_masks_compiled_equals_numpy(
    texts: list[str], query: str, k: int, budget: int, data: st.DataObject
) -> None:
    masks = st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))
    allowed = data.draw(st.none() | masks.map(np.array))
    hidden = data.draw(st.none() | masks.map(np.array))
    rows = st.lists(st.integers(0, len(texts) - 1), max_size=5)
    request = ScanRequest(
        k=k,
        also=np.array(data.draw(rows), np.uint32),
        allowed=allowed,
        hidden=hidden,
        budget=budget,
        complete=data.draw(st.integers(0, 8)),
    )
    exact = ScanRequest(k=k, also=request.also, allowed=allowed, hidden=hidden, budget=0)
    answers = []
    for index in indexes(texts):
        prepared = index.query(query)
        hits, best = index.search(prepared, request), index.search(prepared, exact)
        assert best.is_exact
        assert np.array_equal(hits.also, best.also)
        if hits.is_exact:
            assert np.array_equal(hits.rows, best.rows)
            assert np.array_equal(hits.scores, best.scores)
        for row in hits.rows.tolist():
            assert allowed is None or allowed[row]
            assert hidden is None or not hidden[row]
        answers.append([hits.rows.tolist(), hits.scores.tolist(), hits.also.tolist()])
        answers[-1].append(hits.is_exact)
    assert all(answer == answers[0] for answer in answers)


def test_search_budget_that_leaves_terms_out_compiled_equals_numpy() -> None:
    if CompiledPostings is None:
        pytest.skip("the extension was not built")
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(200)]
    shares = 1 / np.arange(1, 201)
    shares /= shares.sum()
    rows = 2_000
    texts = [" ".join(rng.choice(words, 6, p=shares)) for _ in range(rows)]
    plain, compiled = indexes(texts)
    left_out = 0
    for number in range(60):
        query = plain.query(" ".join(rng.choice(words, rng.integers(1, 8), p=shares)))
        request = ScanRequest(
            k=int(rng.integers(1, 10)),
            also=rng.integers(0, rows, 20).astype(np.uint32),
            allowed=rng.random(rows) < 0.3 if number % 3 == 0 else None,
            hidden=rng.random(rows) < 0.1 if number % 2 == 0 else None,
            budget=int(rng.integers(1, 2_000)),
            complete=int(rng.integers(0, 30)),
        )
        one, other = plain.search(query, request), compiled.search(query, request)
        best = compiled.search(query, replace(request, budget=0))
        assert [array.tolist() for array in one[:3]] == [array.tolist() for array in other[:3]]
        assert one.is_exact == other.is_exact
        assert best.also.tolist() == other.also.tolist()
        if other.is_exact:
            assert best.rows.tolist() == other.rows.tolist()
        left_out += not other.is_exact
    assert left_out > 20


@pytest.mark.slow
def test_search_budget_on_real_texts_overlaps_exact_formula() -> None:
    dataset = load_sample(engaged_queries=20, images=False)
    pins = dataset.of_type("pin")
    fields = text_fields(pins)
    texts = ["\n".join(parts) for parts in zip(*fields.values(), strict=True)]
    index = LexicalIndex.build({"title": texts}, len(texts))
    queries = dataset.split("heldout")["query"].unique(maintain_order=True).to_list()[:60]
    counts = counts_of(texts)
    shared = wanted = 0
    for query in queries:
        scores = np.array(exact_scores(counts, query, LexicalConfig()))
        hits = index.search(index.query(query), ScanRequest(k=10))
        best = np.sort(scores[scores > 0])[::-1][:10]
        # Rows that tie with the last, but for rounding, are as good
        shared += sum(scores[row] >= best[-1] * 0.995 for row in hits.rows.tolist())
        wanted += len(best)
    assert shared / wanted >= 0.99


def test_query_unknown_word_counts_as_rarest() -> None:
    index = LexicalIndex.build({"title": ["red cat", "blue cat"]}, 2)
    query = index.query("cat sku123")
    factors = dict(zip(query.keys.tolist(), query.factors.tolist(), strict=True))
    words = query_terms("sku123")[~are_grams(query_terms("sku123"))].tolist()
    assert factors[words[0]] == max(query.factors)


def test_build_field_weight_raises_rows_that_match_there() -> None:
    fields = {"title": ["cat", "dog"], "board_titles": ["dog", "cat"]}
    config = LexicalConfig(field_weights={"title": 4.0})
    index = LexicalIndex.build(fields, 2, config)
    hits = index.search(index.query("cat"), ScanRequest(k=2))
    assert hits.rows.tolist() == [0, 1]
    assert hits.scores[0] > hits.scores[1]


def test_segment_scores_equal_rows_of_the_base() -> None:
    texts = ["red cat", "blue cat", "a red house by the sea", "dog"]
    base = LexicalIndex.build({"title": texts}, len(texts))
    segment = base.segment({"title": ["red cat", "sku77"]}, 2)
    query = base.query("red cat")
    hits = segment.search(query, ScanRequest(k=2))
    assert hits.rows.tolist() == [0]
    assert hits.scores[0] == base.search(query, ScanRequest(k=1)).scores[0]
    unknown = base.query("sku77")
    assert segment.search(unknown, ScanRequest(k=2)).rows.tolist() == [1]
    assert len(base.search(unknown, ScanRequest(k=2)).rows) == 0


@pytest.mark.parametrize("compiled", COMPILED)
def test_search_no_texts_answers_nothing(compiled: bool) -> None:
    for fields, rows in (({}, 0), ({}, 3), ({"title": ["", " ", "..."]}, 3)):
        index = LexicalIndex.build(fields, rows, compiled=compiled)
        hits = index.search(index.query("cat"), ScanRequest(k=5))
        assert (len(hits.rows), hits.is_exact) == (0, True)
    index = LexicalIndex.build({"title": ["cat"]}, 1, compiled=compiled)
    for text in ("", "?!", "\x00", "dog"):
        assert len(index.search(index.query(text), ScanRequest(k=5)).rows) == 0


def test_search_from_many_threads_answers_the_same() -> None:
    texts = [f"word{number % 97} word{number % 13} red" for number in range(3_000)]
    index = LexicalIndex.build({"title": texts}, len(texts))
    request = ScanRequest(k=20, budget=300)
    queries = [f"word{number} red" for number in range(40)]
    expected = [index.search(index.query(q), request).rows.tolist() for q in queries]
    wrong = []

    def ask() -> None:
        for query, rows in zip(queries * 5, expected * 5, strict=True):
            if index.search(index.query(query), request).rows.tolist() != rows:
                wrong.append(query)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(CompiledPostings is None, reason="the compiled part was not built")
def test_search_large_index_among_small_ones_answers_the_same() -> None:
    """A thread's buffers shrink when only small indexes are searched, and grow again."""
    rows = 300_000
    large = LexicalIndex.build({"title": ["zebra one"] + [""] * (rows - 2) + ["zebra"]}, rows)
    small = LexicalIndex.build({"title": ["zebra", "lion"]}, 2)
    ask_large, ask_small = large.query("zebra one"), small.query("lion")
    for _ in range(2):
        assert large.search(ask_large, ScanRequest(k=3)).rows.tolist() == [0, rows - 1]
        for _ in range(1_002):
            assert small.search(ask_small, ScanRequest(k=2)).rows.tolist() == [1]


def test_text_fields_lists_are_lines_and_nulls_empty() -> None:
    frame = pl.DataFrame(
        {
            "title": ["a", None],
            "board_titles": [["x", "y"], None],
            "caption": pl.Series([None, None], dtype=pl.String),
            "rank": [1, 2],
        }
    )
    assert text_fields(frame) == {"title": ["a", ""], "board_titles": ["x\ny", ""]}
    assert text_fields(None) == {}


@pytest.mark.parametrize(
    "changes", [{"gram_weight": 0.0}, {"bm25": Bm25(b=1.5)}, {"field_weights": {"title": math.nan}}]
)
def test_config_out_of_range_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be between"):
        LexicalConfig(**changes)  # type: ignore[arg-type]


def test_save_and_load_answer_the_same(tmp_path: Path) -> None:
    texts = [f"word{number % 7} thing{number}" for number in range(50)]
    index = LexicalIndex.build({"title": texts}, len(texts))
    index.save(tmp_path)
    for compiled in COMPILED:
        loaded = LexicalIndex.load(tmp_path, len(texts), compiled=compiled)
        assert loaded.describe() == index.describe()
        request = ScanRequest(k=10)
        before = index.search(index.query("word3 thing11"), request)
        after = loaded.search(loaded.query("word3 thing11"), request)
        assert before.rows.tolist() == after.rows.tolist()
        assert before.scores.tolist() == after.scores.tolist()


@given(TEXTS, TEXTS, st.data())
def test_updated_rows_equal_those_that_stay_and_those_added(
    texts: list[str], added: list[str], data: st.DataObject
) -> None:
    masks = st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))
    keep = np.array(data.draw(masks), np.bool_)
    base = LexicalIndex.build({"title": texts}, len(texts))
    updated = base.updated(keep, {"title": added}, len(added))
    left = [text for text, stays in zip(texts, keep, strict=True) if stays] + added
    expected = base.segment({"title": left}, len(left)).postings
    assert updated.postings.count == len(left)
    for name in ("keys", "offsets", "rows", "weights", "best"):
        assert np.array_equal(getattr(updated.postings, name), getattr(expected, name))
