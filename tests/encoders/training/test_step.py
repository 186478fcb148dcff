"""One step: what is encoded, and what it leaves on the towers."""

import numpy as np
import pytest
import torch

from encoders.training.data.batches import BatchPlan, DatasetBatch, ShardedBatch
from encoders.training.inputs import Towers, TrainInputs, build_inputs, build_towers
from encoders.training.step import StepReport, _masks, loss_and_gradients
from tests.helpers.training_examples import small_config, tiny_query_encoder, world

DATASETS = [{"name": "pin", "candidates": ["entity", "vector:pinsage"]}, {"name": "query"}]


def make_inputs(**changes: object) -> TrainInputs:
    config = small_config(datasets=DATASETS, batch={"pairs": 40, "cross_fit": 2}, **changes)
    return build_inputs(world(vectors=True), config, tiny_query_encoder(), torch.device("cpu"))


@pytest.fixture
def inputs() -> TrainInputs:
    return make_inputs()


def batch_of(inputs: TrainInputs, step: int = 0) -> list[DatasetBatch]:
    return BatchPlan(inputs.prepared, inputs.config).step(step)


def take(inputs: TrainInputs, batch: list[DatasetBatch]) -> tuple[Towers, StepReport]:
    """Without dropout."""
    towers = build_towers(tiny_query_encoder(), inputs).eval()
    return towers, loss_and_gradients(towers, inputs, batch, measure=True)


def test_step_distinct_texts_and_views_are_encoded_once(inputs: TrainInputs) -> None:
    batch = batch_of(inputs)
    (pins, related), (of_pins, of_related) = inputs.prepared.pair_sets, batch
    texts = [pins.queries[of_pins.pairs], related.queries[of_related.pairs]]
    texts += [related.candidates[of_related.pairs], related.pool[of_related.negatives]]
    catalogue = len(inputs.prepared.catalogue)
    views = [
        pins.candidates[of_pins.pairs] + pins.folds[of_pins.pairs] * catalogue,
        pins.pool[of_pins.negatives] + of_pins.negative_folds * catalogue,
    ]
    _, report = take(inputs, batch)
    assert report.queries == len(np.unique(np.concatenate(texts)))
    assert report.entities == len(np.unique(np.concatenate(views)))
    assert list(report.task_losses) == ["pin/entity", "pin/vector:pinsage", "query/query"]
    assert report.batch_recall.keys() == report.task_losses.keys()


def test_step_loss_is_sum_of_tasks_with_gradients_on_all_towers(inputs: TrainInputs) -> None:
    towers, report = take(inputs, batch_of(inputs))
    total = sum(float(loss) for loss in report.task_losses.values())
    assert float(report.loss) == pytest.approx(total, rel=1e-6)
    assert towers.log_scales.grad is not None and (towers.log_scales.grad != 0).all()
    for tower in (towers.query, towers.entities["unified"]):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())


def test_step_compatibility_rows_without_vector_do_not_count() -> None:
    """Pink pins have no frozen vector: the loss is that of the batch without them.

    Without logQ, which depends on the size of the batch.
    """
    inputs = make_inputs(loss={"log_q": False})
    batch = batch_of(inputs)
    pins = inputs.prepared.pair_sets[0]
    has_vector = inputs.vectors["pinsage"].any(dim=1).numpy()
    present = has_vector[pins.candidates[batch[0].pairs]]
    assert 0 < present.sum() < len(present)
    without = DatasetBatch(batch[0].pairs[present], batch[0].negatives, batch[0].negative_folds)
    _, whole = take(inputs, batch)
    _, part = take(inputs, [without, batch[1]])
    name = "pin/vector:pinsage"
    torch.testing.assert_close(whole.task_losses[name], part.task_losses[name])
    assert float(whole.task_losses["pin/entity"]) != float(part.task_losses["pin/entity"])


def test_step_related_query_is_no_negative_of_itself(inputs: TrainInputs) -> None:
    related = inputs.prepared.pair_sets[1]
    met = 0
    for step in range(5):
        shard = ShardedBatch(related, batch_of(inputs, step)[1], 0, 1)
        masks = _masks(shard, torch.device("cpu"))
        queries = related.queries[shard.batch.pairs]
        positives = related.candidates[shard.batch.pairs]
        negatives = related.pool[shard.batch.negatives]
        for candidates, mask in ((positives, masks.in_batch), (negatives, masks.random)):
            own = queries[:, None] == candidates[None, :]
            met += own.sum()
            assert mask.numpy()[own].all()
    assert met > 0


def test_step_loss_not_finite_is_nan_and_leaves_no_gradient(inputs: TrainInputs) -> None:
    towers = build_towers(tiny_query_encoder(), inputs)
    with torch.no_grad():
        towers.log_scales.fill_(float("nan"))
    report = loss_and_gradients(towers, inputs, batch_of(inputs))
    assert torch.isnan(report.loss)
    assert all(p.grad is None for p in towers.parameters())
