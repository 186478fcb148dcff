import numpy as np
import pytest

from encoders.training.data.batches import BatchPlan, process_slice
from encoders.training.data.prepare import prepare
from tests.helpers.training_examples import small_config, world


def test_batch_plan_two_epochs_each_pair_once_in_new_order() -> None:
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


def test_batch_plan_step_depends_on_seed_and_step_alone() -> None:
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


def test_batch_plan_negatives_are_uniform_over_type() -> None:
    config = small_config(datasets=[{"name": "pin"}], batch={"pairs": 8})
    prepared = prepare(world(), config)
    plan = BatchPlan(prepared, config)
    drawn = np.concatenate([plan.step(step)[0].negatives for step in range(600)])
    counts = np.bincount(drawn, minlength=48)
    assert len(counts) == 48
    assert abs(counts - 100).max() < 50  # 100 expected each; 50 is five standard deviations
    types = prepared.catalogue["entity_type"].to_numpy()[prepared.pair_sets[0].pool]
    assert set(types) == {"pin"}


def test_batch_plan_more_negatives_than_entities_takes_each_once() -> None:
    config = small_config(datasets=[{"name": "product"}], loss={"random_negatives": 100.0})
    prepared = prepare(world(), config)
    plan = BatchPlan(prepared, config)
    assert plan.negatives_per_step(0) == 30
    assert sorted(plan.step(0)[0].negatives.tolist()) == list(range(30))
    np.testing.assert_allclose(prepared.pair_sets[0].tasks[0].random_frequency * 30, 1.0, rtol=1e-6)


def test_batch_plan_weighting_by_count_draws_in_proportion() -> None:
    config = small_config(datasets=[{"name": "pin"}], batch={"pairs": 64, "weighting": "count"})
    data = world()
    prepared = prepare(data, config)
    plan = BatchPlan(prepared, config)
    weights = prepared.pair_sets[0].weights
    drawn = np.concatenate([plan.step(step)[0].pairs for step in range(200)])
    share_of_threes = (weights[drawn] == 3).mean()
    assert share_of_threes == pytest.approx(3 / (1 + 2 + 3), abs=0.03)


def test_process_slice_all_ranks_tile_the_batch() -> None:
    assert [process_slice(12, rank, 3) for rank in range(3)] == [
        slice(0, 4),
        slice(4, 8),
        slice(8, 12),
    ]
