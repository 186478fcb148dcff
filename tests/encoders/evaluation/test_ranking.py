"""Ranking labelled pairs: against a slow obvious ranking, with ties, near-duplicates and random
corpora.
"""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.datasets.dataset import Dataset
from encoders.errors import ConfigError, InvalidVectors, SchemaError
from encoders.evaluation.metrics import UNRANKED
from encoders.evaluation.ranking import TaskSettings, build_task, rank_task, vector_scores
from encoders.evaluation.slices import compare, metrics_by_slice, pair_slices, slice_metrics


def make_dataset(positives, entities=12, groups=None, **columns):
    """``positives``: (query, entity number) pairs, all held out."""
    catalogue = pl.DataFrame(
        {
            "id": [f"e{i}" for i in range(entities)],
            "entity_type": "pin",
            "title": [f"t{i}" for i in range(entities)],
        }
    )
    pairs = pl.DataFrame(
        {
            "query": [q for q, _ in positives],
            "language": "en",
            "country": "",
            "entity_type": "pin",
            "entity_id": [f"e{e}" for _, e in positives],
            "kind": "tag",
            "count": 1,
            "split": "dev",
            **columns,
        }
    )
    return Dataset(catalogue, pairs, groups=groups or {})


def slow_rank(scores, entity, corpus, group):
    """Rank of ``entity`` among ``corpus`` for one query; ``group[i]``: near-duplicates of row i."""
    members = [i for i in range(len(scores)) if group[i] == group[entity]]
    best = max(members, key=lambda i: (scores[i], -i))
    if scores[best] == -np.inf:
        return UNRANKED
    return 1 + sum(
        group[c] != group[entity]
        and (scores[c] > scores[best] or (scores[c] == scores[best] and c < best))
        for c in corpus
    )


def slow_list_rank(scores, entity, corpus, group, answers):
    """Place of the answer in the list of corpus and answers, each answer once at its best row."""
    best = {
        g: max((i for i in range(len(scores)) if group[i] == g), key=lambda i: (scores[i], -i))
        for g in {group[a] for a in answers}
    }
    if scores[best[group[entity]]] == -np.inf:
        return UNRANKED
    listed = [c for c in corpus if group[c] not in best] + list(best.values())
    return 1 + sorted(listed, key=lambda i: (-scores[i], i)).index(best[group[entity]])


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 1, 4, 30]), st.booleans(), st.booleans())
def test_rank_task_random_scores_equal_slow_ranking(seed, corpus_size, grouped, holes):
    rng = np.random.default_rng(seed)
    n, q = 12, 5
    positives = sorted({(f"q{rng.integers(q)}", int(rng.integers(n))) for _ in range(14)})
    group = {f"e{i}": f"g{i // 3}" for i in range(n)} if grouped else {}
    sizes = TaskSettings(corpus_size=corpus_size, seed=seed)
    task = build_task(make_dataset(positives, n, group), "pin", sizes)
    full = rng.integers(-2, 3, (q, n)).astype(np.float32)  # few values: ties all the time
    if holes:
        full[rng.random((q, n)) < 0.4] = -np.inf
    rows = [int(id[1:]) for id in task.candidates["id"]]
    table = full[np.ix_([int(name[1:]) for name in task.queries], rows)]
    ranking = rank_task(
        task, lambda start, stop: torch.from_numpy(table[start:stop].copy()), "table"
    )
    corpus = [rows[i] for i in np.flatnonzero(task.in_corpus)]
    assert len(corpus) == min(corpus_size or n, n)
    # Rows that are no candidates do not exist for the slow ranking either.
    groups = {i: group.get(f"e{i}", f"e{i}") for i in rows}
    full[:, [i for i in range(n) if i not in rows]] = -np.inf
    labels = [groups.get(i, f"none{i}") for i in range(n)]
    answers = {name: [e for p, e in positives if p == name] for name in task.queries}
    for pair, rank in zip(task.pairs.iter_rows(named=True), ranking.ranks.tolist(), strict=True):
        scores, entity = full[int(pair["query"][1:])], int(pair["entity_id"][1:])
        assert rank == slow_rank(scores, entity, corpus, labels)
        assert ranking.list_ranks[pair["target"]] == slow_list_rank(
            scores, entity, corpus, labels, answers[pair["query"]]
        )


def test_slice_metrics_known_ranking_by_hand():
    dataset = make_dataset([("a", 0), ("a", 1), ("b", 2)], entities=4)
    task = build_task(dataset, "pin")
    candidates = np.eye(4, dtype=np.float32)
    queries = np.array(
        [[0.5, 0.1, 0.9, 0.3], [0.9, 0.8, 0.1, 0.2]], dtype=np.float32
    )  # a: e2 e0 e3 e1; b: e0 e1 e3 e2
    ranking = rank_task(task, vector_scores(queries, candidates), "hand")
    assert ranking.ranks.tolist() == [2, 4, 4]
    metrics = slice_metrics(ranking, ks=(1, 2, 4))
    assert [metrics.recall[k].value for k in (1, 2, 4)] == pytest.approx([0, 1 / 3, 1])
    assert [metrics.ceiling[k] for k in (1, 2, 4)] == pytest.approx([2 / 3, 1, 1])
    assert metrics.mrr.value == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    ndcg_a = (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert metrics.ndcg == pytest.approx((ndcg_a + 1 / np.log2(5)) / 2)
    assert metrics.query_recall.value == 1.0
    assert (metrics.distinct_pairs, metrics.distinct_recall) == (3, 1.0)


def test_slice_metrics_by_query_and_distinct_pairs_by_hand():
    languages = {"language": ["en", "de", "en", "en"]}  # one pair stands in two languages
    dataset = make_dataset([("a", 0), ("a", 0), ("a", 19), ("b", 1)], entities=20, **languages)
    task = build_task(dataset, "pin")
    scores = np.stack([np.arange(20)[::-1], np.arange(20)[::-1]]).astype(np.float32)
    ranking = rank_task(task, lambda start, stop: torch.from_numpy(scores[start:stop].copy()), "x")
    metrics = slice_metrics(ranking)
    assert metrics.recall[10].value == pytest.approx(3 / 4)
    assert metrics.query_recall.value == pytest.approx((2 / 3 + 1) / 2)
    assert metrics.query_recall.low <= metrics.query_recall.value <= metrics.query_recall.high
    assert (metrics.distinct_pairs, metrics.distinct_recall) == (3, pytest.approx(2 / 3))


def test_rank_task_any_entity_of_group_counts():
    groups = {"e0": "emoji", "e1": "emoji"}
    task = build_task(make_dataset([("a", 0)], entities=4, groups=groups), "pin")
    scores = vector_scores(
        np.array([[0.1, 0.9, 0.5, 0.4]], dtype=np.float32), np.eye(4, dtype=np.float32)
    )
    assert rank_task(task, scores, "x").ranks.tolist() == [1]


def test_rank_task_perfect_system_reaches_ceiling_constant_is_unranked():
    dataset = make_dataset([("q", e) for e in range(12)] + [("r", 0)], entities=20)
    task = build_task(dataset, "pin")
    relevant = torch.zeros(2, 20)
    for pair in task.pairs.iter_rows(named=True):
        relevant[pair["query_index"], int(pair["entity_id"][1:])] = 1
    perfect = slice_metrics(rank_task(task, lambda a, b: relevant[a:b].clone(), "perfect"))
    assert perfect.recall[10].value == pytest.approx(perfect.ceiling[10]) == pytest.approx(11 / 13)
    assert perfect.ndcg == pytest.approx(1.0)
    blind = rank_task(task, lambda a, b: torch.full((b - a, 20), -torch.inf), "blind")
    assert set(blind.ranks.tolist()) == {UNRANKED}
    assert slice_metrics(blind).recall[10].value == 0


def test_build_task_random_corpus_is_easier_and_replayable():
    rng = np.random.default_rng(0)
    dataset = make_dataset([(f"q{i}", i) for i in range(200)], entities=400)
    queries, candidates = (
        rng.standard_normal((200, 8)).astype(np.float32),
        rng.standard_normal((400, 8)).astype(np.float32),
    )

    def recall(size, seed=0):
        task = build_task(dataset, "pin", TaskSettings(corpus_size=size, seed=seed))
        rows = [int(id[1:]) for id in task.candidates["id"]]
        return (
            slice_metrics(rank_task(task, vector_scores(queries, candidates[rows]), "x"))
            .recall[10]
            .value
        )

    assert recall(20) > recall(100) > recall(400)
    assert recall(100, seed=5) == recall(100, seed=5)
    assert recall(400) == recall(None)


def test_slices_partition_pairs_and_comparison_is_paired():
    rng = np.random.default_rng(1)
    dataset = make_dataset(
        [(f"q{i}", i % 40) for i in range(120)], entities=40, language=["en", "de", "fr"] * 40
    )
    task = build_task(dataset, "pin")
    base = rng.standard_normal((120, 40)).astype(np.float32)
    better = base.copy()
    better[np.arange(0, 120, 3), [int(e[1:]) for e in task.pairs["entity_id"].to_list()[::3]]] = (
        9.0  # English ones are put first
    )
    one = rank_task(task, lambda a, b: torch.from_numpy(base[a:b].copy()), "one")
    two = rank_task(task, lambda a, b: torch.from_numpy(better[a:b].copy()), "two")
    slices = pair_slices(task, dataset.split("train"))
    for labels in metrics_by_slice(two, slices).values():
        assert sum(m.pairs for m in labels.values()) == 120
    result = metrics_by_slice(two, slices)
    assert result["english"]["en"].recall[10].value == 1.0
    assert list(result["popularity"]) == ["head", "torso", "tail"]
    assert compare(two, one).difference.low > 0
    french = (slices["language"] == "fr").to_numpy()
    assert compare(two, one, french).difference.value == 0
    with pytest.raises(ConfigError, match="same task"):
        part = build_task(dataset, "pin", TaskSettings(max_queries=10))
        compare(two, rank_task(part, lambda a, b: torch.zeros(b - a, 40), "x"))


def test_metrics_by_slice_ordered_labels_keep_order() -> None:
    """Labels of equal size keep the order of their ``Enum``, not the alphabet's."""
    dataset = make_dataset([("a", 0), ("b", 1), ("c", 8), ("d", 8)], entities=10)
    task = build_task(dataset, "pin")
    ranking = rank_task(task, lambda a, b: torch.zeros(b - a, 10), "x")
    slices = pair_slices(task, dataset.pairs.filter(pl.col("entity_id") != "e8"))
    assert {
        label: m.pairs for label, m in metrics_by_slice(ranking, slices)["popularity"].items()
    } == {"head": 1, "torso": 1, "tail": 2}
    assert list(metrics_by_slice(ranking, slices)["popularity"]) == ["head", "torso", "tail"]


def test_build_task_bad_input_is_named():
    dataset = make_dataset([("a", 0)])
    with pytest.raises(ConfigError, match="no 'held-out dev' pairs of entity type 'ad'"):
        build_task(dataset, "ad")
    with pytest.raises(ConfigError, match="corpus_size is 0"):
        build_task(dataset, "pin", TaskSettings(corpus_size=0))
    with pytest.raises(SchemaError, match="'e77'"):
        build_task(make_dataset([("a", 77)]), "pin")
    with pytest.raises(InvalidVectors, match=r"\(1, 3\) and \(2, 4\)"):
        vector_scores(np.zeros((1, 3), np.float32), np.zeros((2, 4), np.float32))
    with pytest.raises(InvalidVectors, match="candidate row 1"):
        vector_scores(np.zeros((1, 2), np.float32), np.array([[0, 0], [np.nan, 0]], np.float32))


def test_rank_task_other_chunks_same_ranks(monkeypatch):
    rng = np.random.default_rng(2)
    task = build_task(
        make_dataset([(f"q{i % 30}", int(rng.integers(50))) for i in range(90)], entities=50), "pin"
    )
    scores = vector_scores(
        rng.integers(-1, 2, (30, 4)).astype(np.float32),
        rng.integers(-1, 2, (50, 4)).astype(np.float32),
    )
    whole = rank_task(task, scores, "x", run_depth=7)
    monkeypatch.setattr("encoders.evaluation.ranking.SCORES_AT_ONCE", 120)
    parts = rank_task(task, scores, "x", run_depth=7)
    np.testing.assert_array_equal(whole.ranks, parts.ranks)
    np.testing.assert_array_equal(whole.list_ranks, parts.list_ranks)
    np.testing.assert_array_equal(whole.run[0], parts.run[0])


def test_metrics_by_slice_pairs_without_label_are_unknown() -> None:
    pairs = pl.DataFrame(
        {
            "query": ["a", "b", "c"],
            "entity_type": ["pin"] * 3,
            "entity_id": ["x", "y", "z"],
            "split": ["dev"] * 3,
        }
    )
    catalogue = pl.DataFrame(
        {"id": ["x", "y", "z"], "entity_type": ["pin"] * 3, "title": ["x", "y", "z"]}
    )
    task = build_task(
        Dataset(
            catalogue, pairs.with_columns(language=pl.lit(""), country=pl.lit(""), kind=pl.lit(""))
        ),
        "pin",
    )
    ranking = rank_task(
        task, vector_scores(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)), "x"
    )
    found = metrics_by_slice(
        ranking, {"source": pl.Series("source", ["s", None, "s"])}, resamples=10
    )
    assert {label: metrics.pairs for label, metrics in found["source"].items()} == {
        "s": 2,
        "unknown": 1,
    }
