import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import ConfigError, DataError, SchemaError
from encoders.training.data.balancing import balance_weights
from encoders.training.data.batches import BatchPlan, process_slice
from encoders.training.data.prepare import prepare, split_by_share
from encoders.training.data.sampling import whole_counts
from encoders.training.data.source_tables import TrainingData
from encoders.training.data.tokenised_texts import TokenisedTexts
from tests.helpers.training_examples import DIMENSION, small_config, world

few = settings(max_examples=40, deadline=None)


@few
@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=6), st.integers(1, 500), st.integers(1, 4))
def test_shares_divide_the_batch(shares: list[float], units: int, multiple: int) -> None:
    pairs = units * multiple
    if units < len(shares):
        with pytest.raises(ConfigError, match=f"too small for {len(shares)} datasets"):
            split_by_share(shares, pairs, multiple)
        return
    given_pairs = split_by_share(shares, pairs, multiple)
    assert sum(given_pairs) == pairs
    assert all(n >= multiple and n % multiple == 0 for n in given_pairs)
    for n, share in zip(given_pairs, shares, strict=True):
        assert n <= share / sum(shares) * pairs + multiple * len(shares)


def test_the_papers_batch() -> None:
    assert split_by_share([8, 4, 2, 2], 10_240) == [5120, 2560, 1280, 1280]


def test_an_epoch_meets_every_pair_once_and_the_next_in_another_order() -> None:
    config = small_config(datasets=[{"name": "pin"}], batch={"pairs": 36})
    prepared = prepare(world(), config)
    size = len(prepared.pair_sets[0].queries)
    assert size % 36 == 0
    plan = BatchPlan(prepared, config)
    epochs = [
        np.concatenate(
            [plan.step(step)[0].pairs for step in range(e * size // 36, (e + 1) * size // 36)]
        )
        for e in range(2)
    ]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(size))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    config = small_config(seed=5)
    first, second = (BatchPlan(prepare(world(), config), config) for _ in range(2))
    list(map(first.step, range(7)))  # what was asked before does not matter
    for a, b in zip(first.step(9), second.step(9), strict=True):
        for x, y in zip(
            (a.pairs, a.negatives, a.negative_folds),
            (b.pairs, b.negatives, b.negative_folds),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
    other = small_config(seed=6)
    assert (
        BatchPlan(prepare(world(), other), other).step(9)[0].pairs.tolist()
        != first.step(9)[0].pairs.tolist()
    )


def test_random_negatives_are_uniform_over_the_catalogue_of_the_type() -> None:
    config = small_config(datasets=[{"name": "pin"}], batch={"pairs": 8})
    prepared = prepare(world(), config)
    plan = BatchPlan(prepared, config)
    drawn = np.concatenate([plan.step(step)[0].negatives for step in range(600)])
    counts = np.bincount(drawn, minlength=48)
    assert len(counts) == 48
    assert abs(counts - 100).max() < 50  # 100 expected each; 50 is five standard deviations
    types = prepared.catalogue["entity_type"].to_numpy()[prepared.pair_sets[0].pool]
    assert set(types) == {"pin"}


def test_more_negatives_than_entities_means_every_entity_once_without_correction() -> None:
    config = small_config(datasets=[{"name": "product"}], loss={"random_negatives": 100.0})
    prepared = prepare(world(), config)
    plan = BatchPlan(prepared, config)
    assert plan.negatives_per_step(0) == 30
    assert sorted(plan.step(0)[0].negatives.tolist()) == list(range(30))
    np.testing.assert_allclose(prepared.pair_sets[0].tasks[0].random_frequency * 30, 1.0, rtol=1e-6)


def test_counts_weigh_the_draw_when_asked() -> None:
    config = small_config(datasets=[{"name": "pin"}], batch={"pairs": 64, "weighting": "count"})
    data = world()
    prepared = prepare(data, config)
    plan = BatchPlan(prepared, config)
    weights = prepared.pair_sets[0].weights
    drawn = np.concatenate([plan.step(step)[0].pairs for step in range(200)])
    share_of_threes = (weights[drawn] == 3).mean()
    assert share_of_threes == pytest.approx(3 / (1 + 2 + 3), abs=0.03)


@few
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 100)),
        min_size=1,
        max_size=60,
    ),
    st.floats(0, 1),
)
def test_balance_draws_a_value_by_what_its_pairs_weigh_to_the_exponent(
    rows: list[tuple[str | None, int]], exponent: float
) -> None:
    counts = np.array([count for _, count in rows], dtype=np.float64)
    if not counts.any():
        return
    weights = balance_weights(
        pl.Series([value for value, _ in rows], dtype=pl.String), counts, exponent
    )
    assert weights.mean() == pytest.approx(1)
    mass = {value: sum(count for v, count in rows if v == value) for value, _ in rows}
    total = sum(m**exponent for m in mass.values() if m)
    for value, m in mass.items():
        of_value = np.array([v == value for v, _ in rows])
        assert weights[of_value].sum() / weights.sum() == pytest.approx(
            m**exponent / total if m else 0
        )
        np.testing.assert_allclose(
            weights[of_value] * m, weights[of_value].sum() * counts[of_value], rtol=1e-9
        )  # as they were to each other


@few
@given(st.lists(st.floats(0, 50), min_size=1, max_size=30).filter(lambda w: max(w) > 1e-3))
def test_sketches_count_weights_in_proportion(weights: list[float]) -> None:
    given_weights = np.array(weights)
    counts = whole_counts(given_weights)
    assert ((counts > 0) == (given_weights > 0)).all() or np.array_equal(
        np.rint(given_weights), given_weights
    )
    expected = given_weights / given_weights.sum()
    if given_weights[given_weights > 0].min() > 1e-9:
        np.testing.assert_allclose(counts / counts.sum(), expected, rtol=0.01)
    assert whole_counts(np.array([0.0, 2.0, 3.0])).tolist() == [0, 2, 3]


def test_a_sketch_counts_thousands_of_rare_values_beside_a_frequent_one() -> None:
    values = pl.Series(["big"] * 100_000 + [f"rare {i}" for i in range(5_000)])
    weights = balance_weights(values, np.ones(len(values)), 0.0)
    counts = whole_counts(weights)
    np.testing.assert_allclose(counts / counts.sum(), weights / weights.sum(), rtol=0.01)


@pytest.mark.parametrize("side", ["pairs", "catalogue"])
def test_a_balanced_dataset_meets_rare_values_more_often_and_corrects_for_it(side: str) -> None:
    """One pin of 48 pins is of another source: as they occur 1 of 48 pairs, balanced to the full 1
    of 2; its logQ frequency says so.
    """
    data = world()
    rare = "pin-red-chair"
    source = (
        pl.when(pl.col("entity_id" if side == "pairs" else "id") == rare)
        .then(pl.lit("clip art"))
        .otherwise(pl.lit("emoji"))
    )
    data = (
        TrainingData(data.catalogue, data.pairs.with_columns(source=source))
        if side == "pairs"
        else TrainingData(data.catalogue.with_columns(source=source), data.pairs)
    )
    row = data.catalogue["id"].to_list().index(rare)
    for exponent, share in ((1.0, 1 / 48), (0.0, 1 / 2)):
        config = small_config(
            datasets=[{"name": "pin", "balance_by": "source", "balance_exponent": exponent}],
            batch={"pairs": 64},
        )
        prepared = prepare(data, config)
        pair_set = prepared.pair_sets[0]
        plan = BatchPlan(prepared, config)
        drawn = np.concatenate([plan.step(step)[0].pairs for step in range(100)])
        is_rare = pair_set.candidates == row
        assert is_rare[drawn].mean() == pytest.approx(share, abs=0.02)
        np.testing.assert_allclose(pair_set.tasks[0].in_batch_frequency[is_rare], share, rtol=0.01)


def test_balance_by_names_a_column_that_is_there() -> None:
    config = small_config(datasets=[{"name": "pin", "balance_by": "sauce"}])
    with pytest.raises(
        SchemaError,
        match=(
            r"dataset 'pin': balance_by names 'sauce', which is no column of the pairs or the"
            r" catalogue"
        ),
    ):
        prepare(world(), config)
    nested = small_config(datasets=[{"name": "pin", "balance_by": "engaged_queries"}])
    with pytest.raises(
        SchemaError, match=r"'engaged_queries', but that column of the catalogue holds List"
    ):
        prepare(world(), nested)
    with pytest.raises(ConfigError, match=r"balance_exponent must lie in \[0, 1\], but got 2"):
        small_config(datasets=[{"name": "pin", "balance_exponent": 2.0}])


def test_frequencies_follow_the_pairs() -> None:
    """In-batch: positives as often as they stand in pairs; conditional: one over the positives of
    the query.
    """
    pairs = pl.DataFrame(
        {
            "query": ["a", "a", "b", "c"],
            "entity_type": ["pin"] * 4,
            "entity_id": ["x", "y", "x", "x"],
        }
    )
    catalogue = pl.DataFrame(
        {"id": ["x", "y", "z"], "entity_type": ["pin"] * 3, "title": ["x", "y", "z"]}
    )
    task = (
        prepare(TrainingData(catalogue, pairs), small_config(batch={"pairs": 4}))
        .pair_sets[0]
        .tasks[0]
    )
    np.testing.assert_allclose(task.in_batch_frequency, [0.75, 0.25, 0.75, 0.75])
    np.testing.assert_allclose(task.pair_log_q, np.log([0.5, 0.5, 1, 1]), atol=1e-6)
    np.testing.assert_allclose(task.random_frequency, [1 / 3] * 3)


def test_frequencies_are_shares_of_all_draws_also_where_some_candidates_have_no_vector() -> None:
    """They are drawn like the others, and then left out."""
    pairs = pl.DataFrame(
        {
            "query": ["a", "a", "b", "c"],
            "entity_type": ["pin"] * 4,
            "entity_id": ["x", "y", "x", "x"],
        }
    )
    catalogue = pl.DataFrame(
        {
            "id": ["x", "y", "z"],
            "entity_type": ["pin"] * 3,
            "title": ["x", "y", "z"],
            "old": [[1.0] * DIMENSION, None, None],
        }
    )
    config = small_config(
        batch={"pairs": 4}, datasets=[{"name": "pin", "candidates": ["vector:old"]}]
    )
    task = prepare(TrainingData(catalogue, pairs), config).pair_sets[0].tasks[0]
    np.testing.assert_allclose(task.in_batch_frequency[[0, 2, 3]], 0.75)
    np.testing.assert_allclose(task.random_frequency, [1 / 3] * 3)


def test_related_queries_need_no_catalogue_rows_and_never_answer_themselves() -> None:
    data = world()
    loop = pl.DataFrame(
        {
            "query": ["red chair"],
            "entity_type": ["query"],
            "entity_id": ["red  chair"],
            "count": [1],
            "action": [""],
        }
    )
    prepared = prepare(
        TrainingData(data.catalogue, pl.concat((data.pairs, loop))),
        small_config(datasets=[{"name": "query"}]),
    )
    pair_set = prepared.pair_sets[0]
    assert pair_set.is_related_queries
    assert (pair_set.queries != pair_set.candidates).all()
    assert len(pair_set.queries) == 78
    assert prepared.texts[pair_set.candidates[0]] == "chair in red"


def test_cross_fitting_hides_a_pairs_query_from_its_entity() -> None:
    config = small_config(batch={"cross_fit": 3})
    prepared = prepare(world(), config)
    assert len(prepared.catalogue_views) == 3
    for pair_set in prepared.pair_sets:
        if pair_set.is_related_queries:
            continue
        for query, row, fold in zip(
            pair_set.queries, pair_set.candidates, pair_set.folds, strict=True
        ):
            assert (
                prepared.texts[query]
                not in prepared.catalogue_views[fold].row(int(row), named=True)["engaged_queries"]
            )
    kept = [
        view["engaged_queries"].explode().drop_nulls().len() for view in prepared.catalogue_views
    ]
    whole = prepared.catalogue["engaged_queries"].explode().len()
    assert sum(kept) == 2 * whole  # every engaged query is hidden in exactly one view


def test_held_back_queries_are_in_no_training_pair_and_no_entity_text() -> None:
    prepared = prepare(world(), small_config(validation={"fraction": 0.2}))
    held = {prepared.texts[q] for queries, _ in prepared.validation.values() for q in queries}
    assert len(held) > 10
    trained = {prepared.texts[q] for pair_set in prepared.pair_sets for q in pair_set.queries}
    assert not held & trained
    assert not held & set(
        prepared.catalogue_views[0]["engaged_queries"].explode().drop_nulls().to_list()
    )


@pytest.mark.parametrize("own_split", [False, True])
def test_a_held_back_query_is_nobodys_related_query(own_split: bool) -> None:
    """Both sides of a related-query pair are read by the query tower."""
    data = world()
    queries = data.pairs["query"].unique(maintain_order=True).to_list()
    related = pl.DataFrame(
        {
            "query": queries[:-1],
            "entity_type": "query",
            "entity_id": [text.upper() for text in queries[1:]],
        }
    )
    pairs = pl.concat([data.pairs, related], how="diagonal_relaxed")
    if own_split:
        held_here = pl.col("query").is_in(queries[::5])
        pairs = pairs.with_columns(
            split=pl.when(held_here).then(pl.lit("validation")).otherwise(pl.lit("train"))
        )
    prepared = prepare(
        TrainingData(data.catalogue, pairs), small_config(validation={"fraction": 0.2})
    )
    held = {prepared.texts[q].lower() for rows, _ in prepared.validation.values() for q in rows}
    sets = [pair_set for pair_set in prepared.pair_sets if pair_set.is_related_queries]
    shown = {prepared.texts[q].lower() for pair_set in sets for q in pair_set.candidates}
    assert len(held) > 10 and len(shown) > 10 and not held & shown


def test_a_split_of_the_users_validates_instead() -> None:
    data = world()
    split = pl.Series(
        "split",
        [
            "validation" if i % 10 == 0 else "heldout" if i % 10 == 1 else "train"
            for i in range(data.pairs.height)
        ],
    )
    prepared = prepare(
        TrainingData(data.catalogue, data.pairs.with_columns(split)),
        small_config(validation={"fraction": 0.5}),
    )
    assert sum(len(q) for q, _ in prepared.validation.values()) == (split == "validation").sum()
    assert prepared.pairs_total == (split == "train").sum()


@few
@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=30),
    st.integers(1, 8),
    st.randoms(),
)
def test_padded_batches_hold_the_sequences(sequences: list[list[int]], chunk: int, random) -> None:
    texts = TokenisedTexts(sequences, pad_id=0)
    rows = np.array(random.sample(range(len(sequences)), k=len(sequences)))
    chunks = texts.by_length(rows, chunk)
    assert sorted(np.concatenate(chunks).tolist()) == sorted(rows.tolist())
    longest = [max(len(sequences[r]) for r in c) for c in chunks]
    assert longest == sorted(longest)
    for c in chunks:
        ids, mask = texts.padded(c)
        for i, row in enumerate(c):
            assert ids[i][mask[i].bool()].tolist() == sequences[row]
            assert ids[i][~mask[i].bool()].eq(0).all()


def test_process_slices_tile_the_batch() -> None:
    assert [process_slice(12, rank, 3) for rank in range(3)] == [
        slice(0, 4),
        slice(4, 8),
        slice(8, 12),
    ]


@pytest.mark.parametrize("column", ["query", "entity_id", "entity_type"])
def test_a_missing_column_is_named(column: str) -> None:
    data = world()
    with pytest.raises(SchemaError, match=rf"table pairs: missing column.* {column}"):
        prepare(TrainingData(data.catalogue, data.pairs.drop(column)), small_config())


def test_bad_tables_are_told_apart() -> None:
    data = world(vectors=True)
    with pytest.raises(SchemaError, match=r"table catalogue: missing column\(s\) id"):
        prepare(TrainingData(data.catalogue.drop("id"), data.pairs), small_config())
    with pytest.raises(
        DataError,
        match=(
            r"dataset 'ad' is empty: no training pair of entity type 'ad'.*the pairs have pin,"
            r" product, query"
        ),
    ):
        prepare(data, small_config(datasets=[{"name": "ad"}]))
    with pytest.raises(DataError, match="with action checkout"):
        prepare(
            data,
            small_config(
                datasets=[{"name": "offsite", "entity_type": "product", "actions": ["checkout"]}]
            ),
        )
    blank = data.pairs.with_columns(
        pl.when(pl.int_range(pl.len()) == 2)
        .then(pl.lit(" \t "))
        .otherwise(pl.col("query"))
        .alias("query")
    )
    with pytest.raises(
        DataError, match=r"1 pairs have a query of only white space \(first: row 2\)"
    ):
        prepare(TrainingData(data.catalogue, blank), small_config())
    with pytest.raises(DataError, match="twice under one entity type"):
        prepare(
            TrainingData(pl.concat((data.catalogue, data.catalogue[:1])), data.pairs),
            small_config(),
        )
    with pytest.raises(DataError, match=r"none of the .* pairs names an entity"):
        prepare(
            TrainingData(data.catalogue[:1], data.pairs.filter(pl.col("entity_type") == "product")),
            small_config(),
        )
    with pytest.raises(DataError, match="has no rows"):
        prepare(TrainingData(data.catalogue, data.pairs[:0]), small_config())


def test_a_frozen_column_must_be_there_and_fit() -> None:
    data = world(vectors=True)
    task = {"name": "pin", "candidates": ["vector:pinsage"]}
    prepared = prepare(data, small_config(datasets=[task]))
    norms = prepared.vectors["pinsage"].norm(dim=1)
    assert set(norms.round(decimals=3).tolist()) == {
        0.0,
        1.0,
    }  # absent vectors are zeros, the others of unit length
    with pytest.raises(
        SchemaError, match="compatibility column 'itemsage' is not in the catalogue"
    ):
        prepare(data, small_config(datasets=[{**task, "candidates": ["vector:itemsage"]}]))
    with pytest.raises(
        ConfigError, match=f"holds vectors of {DIMENSION} numbers, but model.dimension is 8"
    ):
        prepare(data, small_config(datasets=[task], model={"dimension": 8}))
    broken = data.catalogue.with_columns(pl.col("pinsage").list.eval(pl.element() * float("nan")))
    with pytest.raises(DataError, match="pinsage holds NaN"):
        prepare(TrainingData(broken, data.pairs), small_config(datasets=[task]))
