"""Baselines: BM25 against its formula, the published figures of the sample, encoders and neighbours
on small cases.
"""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from encoders.datasets.dataset import Dataset, load_sample
from encoders.errors import ConfigError
from encoders.evaluation.baselines import (
    Bm25,
    ChosenBm25,
    Fused,
    NeighbouringQueries,
    ZeroShot,
    cached,
    character_ngrams,
    make_baseline,
)
from encoders.evaluation.ranking import TaskSettings, build_task, rank_task
from encoders.evaluation.slices import slice_metrics
from encoders.text.entity_texts import entity_texts


@pytest.fixture(scope="module")
def sample():
    return load_sample(images=False)


def tiny():
    catalogue = pl.DataFrame(
        {
            "id": ["a", "b", "c"],
            "entity_type": "pin",
            "title": ["red cat", "blue dog", "cat cat house"],
        }
    )
    rows = [
        ("kitten", "a", "train"),
        ("puppy", "b", "train"),
        ("cat", "c", "dev"),
        ("kitty", "a", "dev"),
        ("zzz", "b", "dev"),
    ]
    pairs = pl.DataFrame(rows, schema=["query", "entity_id", "split"], orient="row").with_columns(
        language=pl.lit("en"),
        country=pl.lit(""),
        entity_type=pl.lit("pin"),
        kind=pl.lit("tag"),
        count=pl.lit(1),
    )
    return Dataset(catalogue, pairs)


def test_words_and_trigrams_by_hand():
    assert character_ngrams("cat a", (3,)) == [" ca", "cat", "at ", " a "]
    assert character_ngrams("ab", (2, 4)) == [" a", "ab", "b ", " ab "]
    assert character_ngrams("生日 कि", (3,)) == [" 生日", "生日 ", " कि", "कि "]


def test_bm25_chinese_query_finds_part_of_a_longer_title():
    dataset = tiny()
    catalogue = dataset.catalogue.with_columns(title=pl.Series(["生日蛋糕", "猫", "हिंदी किताब"]))
    task = build_task(Dataset(catalogue, dataset.pairs), "pin")
    task = replace(task, queries=["蛋糕", "किताब", "कमल"])
    scores = Bm25()(task, Dataset(catalogue, dataset.pairs))(0, 3)
    assert (scores > 0).tolist() == [[True, False, False], [False, False, True], [False] * 3]


def test_entity_texts_absent_fields_are_left_out():
    catalogue = pl.DataFrame(
        {
            "title": ["t", None],
            "category": ["c", ""],
            "board_titles": [["x", "y"], []],
            "engaged_queries": [[], ["q"]],
        }
    )
    assert entity_texts(catalogue) == ["t. c. x. y", "q"]
    assert entity_texts(pl.DataFrame({"id": ["a"]})) == [""]


def test_bm25_words_equal_formula():
    dataset = tiny()
    task = build_task(dataset, "pin")
    scores = Bm25()(task, dataset)(0, len(task.queries)).numpy()
    lengths, mean = (
        [3, 3, 3],
        3.0,
    )  # titles plus one train query each ("kitten", "puppy", none): 3, 3, 3 words
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    want = [
        idf * f / (f + 1.5 * (1 - 0.75 + 0.75 * length / mean)) if f else -np.inf
        for f, length in zip([1, 0, 2], lengths, strict=True)
    ]
    np.testing.assert_allclose(scores[task.queries.index("cat")], want, rtol=1e-5)
    assert np.isneginf(scores[task.queries.index("zzz")]).all()


def test_bm25_trigrams_find_what_words_do_not():
    dataset = tiny()
    task = build_task(dataset, "pin")
    kitty = task.queries.index("kitty")
    assert np.isneginf(Bm25()(task, dataset)(kitty, kitty + 1).numpy()).all()
    assert Bm25((3,))(task, dataset)(kitty, kitty + 1).argmax().item() == 0


def letters(texts):
    """Bag of letters: an encoder that knows nothing but spelling."""
    return np.array(
        [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], dtype=np.float32
    )


def test_zero_shot_any_callable_is_ranked():
    dataset = tiny()
    task = build_task(dataset, "pin")
    ranking = rank_task(task, ZeroShot(letters, engaged_queries=1)(task, dataset), "letters")
    assert ranking.ranks[task.pairs["query"].to_list().index("kitty")] == 1


def test_neighbouring_queries_score_only_their_entities():
    dataset = tiny()
    task = build_task(dataset, "pin")
    row = task.queries.index("kitty")
    scores = NeighbouringQueries(letters, neighbours=1)(task, dataset)(row, row + 1)[0]
    assert scores[0] > 0 and np.isneginf(scores[1:].numpy()).all()


def test_chosen_bm25_takes_the_orders_that_find_most_on_dev():
    dataset = tiny()
    task = build_task(dataset, "pin")
    chosen = ChosenBm25()
    kitty = task.queries.index("kitty")
    assert chosen(task, dataset)(kitty, kitty + 1).argmax().item() == 0
    assert chosen.chosen["pin"] != ()  # "kitty" shares no word with its entity


def test_fused_weight_is_chosen_on_dev_and_adds_standardised_scores():
    dataset = tiny()
    task = build_task(dataset, "pin")

    def constant(rows):
        return lambda task, dataset: lambda a, b: torch.tensor([rows] * (b - a))

    wrong, right = constant([0.0, 1.0, 2.0]), constant([-torch.inf, 5.0, -torch.inf])
    scores = Fused(wrong, right)(task, dataset)(0, 1)
    assert scores.isfinite().all()
    assert scores.argmax().item() in (1, 2)
    alone = Fused(right, constant([0.0, 0.0, 0.0]))(task, dataset)(0, 1)
    assert alone.argmax().item() == 1  # what is constant adds nothing


def test_choices_on_dev_prepare_queries_and_systems_once(monkeypatch):
    dataset = tiny()
    task = build_task(dataset, "pin")
    built, prepared = [], []

    def counted(*arguments, **settings):
        built.append(arguments)
        return build_task(*arguments, **settings)

    def system(task, dataset):
        prepared.append(task)
        return lambda a, b: torch.zeros(b - a, 3)

    monkeypatch.setattr("encoders.evaluation.baselines.build_task", counted)
    Fused(system, system)(task, dataset)
    assert (len(built), len(prepared)) == (1, 4)
    ChosenBm25()(task, dataset)
    assert len(built) == 2


def test_cached_encoder_damaged_file_is_encoded_again(tmp_path):
    calls = []

    def encode(texts):
        calls.append(len(texts))
        return letters(texts)

    encoder = cached(encode, "letters", tmp_path)
    first = encoder(["ab", "c"])
    np.testing.assert_array_equal(encoder(["ab", "c"]), first)
    assert calls == [2]
    next(tmp_path.glob("*.npy")).write_bytes(b"damaged")
    np.testing.assert_array_equal(encoder(["ab", "c"]), first)
    assert calls == [2, 2]
    assert encoder(["ab", "d"]).shape == (2, 26) and calls == [2, 2, 2]


def test_make_baseline_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="bm25-trigrams"):
        make_baseline("bm26")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entity_type", "name", "expected"),
    [
        ("pin", "bm25", 0.306),
        ("product", "bm25", 0.139),
        ("ad", "bm25", 0.321),
        ("ad", "bm25-trigrams", 0.414),
        ("product", "random", 0.002),
    ],
)
def test_baselines_on_the_sample_equal_pinned_recall(sample, entity_type, name, expected):
    task = build_task(sample, entity_type, TaskSettings(split="heldout"))
    metrics = slice_metrics(rank_task(task, make_baseline(name)(task, sample), name), resamples=100)
    assert metrics.recall[10].value == pytest.approx(expected, abs=0.002)


@pytest.mark.slow
def test_recall_ceiling_of_the_sample_is_pinned(sample):
    ceilings = {}
    for entity_type in ("pin", "product", "ad"):
        task = build_task(sample, entity_type, TaskSettings(split="heldout"))
        ceilings[entity_type] = slice_metrics(
            rank_task(task, make_baseline("popular")(task, sample), "popular"), resamples=100
        ).ceiling[10]
    assert ceilings == pytest.approx({"pin": 0.908, "product": 0.446, "ad": 0.952}, abs=0.001)
