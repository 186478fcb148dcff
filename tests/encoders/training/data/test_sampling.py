import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.config.train_config import LossConfig
from encoders.errors import ConfigError, SchemaError
from encoders.training.data.balancing import balance_weights
from encoders.training.data.batches import BatchPlan
from encoders.training.data.prepare import prepare
from encoders.training.data.sampling import positive_log_q, whole_counts
from encoders.training.data.source_tables import TrainingData
from tests.helpers.training_examples import DIMENSION, small_config, world

few = settings(max_examples=40, deadline=None)


@few
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 100)),
        min_size=1,
        max_size=60,
    ),
    st.floats(0, 1),
)
def test_balance_weights_any_exponent_draws_in_proportion_to_power(
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
def test_whole_counts_any_weights_keep_proportions(weights: list[float]) -> None:
    given_weights = np.array(weights)
    counts = whole_counts(given_weights)
    assert ((counts > 0) == (given_weights > 0)).all() or np.array_equal(
        np.rint(given_weights), given_weights
    )
    expected = given_weights / given_weights.sum()
    if given_weights[given_weights > 0].min() > 1e-9:
        np.testing.assert_allclose(counts / counts.sum(), expected, rtol=0.01)
    assert whole_counts(np.array([0.0, 2.0, 3.0])).tolist() == [0, 2, 3]


def test_whole_counts_rare_beside_frequent_value_keep_proportions() -> None:
    values = pl.Series(["big"] * 100_000 + [f"rare {i}" for i in range(5_000)])
    weights = balance_weights(values, np.ones(len(values)), 0.0)
    counts = whole_counts(weights)
    np.testing.assert_allclose(counts / counts.sum(), weights / weights.sum(), rtol=0.01)


@pytest.mark.parametrize("side", ["pairs", "catalogue"])
def test_make_pair_set_balance_by_draws_rare_value_and_corrects_frequency(side: str) -> None:
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


def test_make_pair_set_unknown_or_nested_balance_column_raises_schema_error() -> None:
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


def test_make_pair_set_frequencies_follow_pairs() -> None:
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


def test_make_pair_set_many_pairs_log_q_is_exact() -> None:
    rng = np.random.default_rng(0)
    queries, entities = rng.zipf(1.3, 60_000) % 30_000, rng.integers(0, 3_000, 60_000)
    pairs = pl.DataFrame(
        {
            "query": [f"q{number}" for number in queries],
            "entity_type": "pin",
            "entity_id": [f"e{number}" for number in entities],
        }
    )
    ids = [f"e{number}" for number in range(3_000)]
    catalogue = pl.DataFrame({"id": ids, "entity_type": "pin", "title": ids})
    config = small_config(loss={"sketch_width": LossConfig().sketch_width})
    task = prepare(TrainingData(catalogue, pairs), config).pair_sets[0].tasks[0]
    of_pair = pairs.select(pl.len().over("query", "entity_id"))["len"].to_numpy()
    of_query = pairs.select(pl.len().over("query"))["len"].to_numpy()
    of_entity = pairs.select(pl.len().over("entity_id"))["len"].to_numpy()
    np.testing.assert_allclose(task.pair_log_q, np.log(of_pair / of_query), atol=1e-6)
    np.testing.assert_allclose(task.in_batch_frequency, of_entity / 60_000, rtol=1e-6)


def test_make_pair_set_absent_vectors_frequencies_are_shares_of_all_draws() -> None:
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


def test_positive_log_q_over_counted_pair_is_never_above_zero() -> None:
    """A sketch may count a pair more often than its query."""
    log_q = positive_log_q(np.array([3, 1, 9, 0]), np.array([3, 4, 4, 0]))
    np.testing.assert_allclose(log_q, [0.0, -np.log(4), 0.0, 0.0], rtol=1e-6)


def test_make_pair_set_related_queries_leave_out_themselves() -> None:
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
