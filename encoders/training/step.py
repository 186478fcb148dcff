"""Take one training step: sum the losses of all tasks on a batch, leave gradients on the towers."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from encoders.training.data.batches import DatasetBatch, ShardedBatch
from encoders.training.data.sampling import TaskData
from encoders.training.distributed import (
    all_processes,
    gather_with_gradient,
    process_rank,
    world_size,
)
from encoders.training.inputs import Towers, TrainInputs
from encoders.training.losses import (
    Negatives,
    Pairs,
    batch_recall,
    in_batch_mask,
    negative_log_q,
    random_mask,
    scale_of,
    task_loss,
)
from encoders.training.step_vectors import StepVectors, TaskVectors


@dataclass
class StepReport:
    """What a step found out."""

    loss: Tensor
    """Sum over tasks, scalar, detached; NaN where it is not finite on some process.

    The mean over processes equals the loss of the union batch.
    """
    queries: int
    """Distinct queries encoded by this process."""
    entities: int
    """Distinct entity views encoded by this process."""
    task_losses: dict[str, Tensor] = field(default_factory=dict)
    batch_recall: dict[str, float] = field(default_factory=dict)
    """By task, only when measured: the share of rows whose positive is among the best 10 of it and
    all in-batch and random negatives.
    """


def loss_and_gradients(
    towers: Towers, inputs: TrainInputs, batch: list[DatasetBatch], *, measure: bool = False
) -> StepReport:
    """Run the forward and backward pass of one step on this process's share of the batch.

    Args:
        towers: What is trained; gradients are added to its parameters.
        inputs: Texts, features and vectors.
        batch: The whole batch, of all processes.
        measure: Also compute the batch recall.
    """
    config = inputs.config.loss
    shards = [
        ShardedBatch(pair_set, part, process_rank(), world_size())
        for pair_set, part in zip(inputs.prepared.pair_sets, batch, strict=True)
    ]
    vectors = StepVectors(towers, inputs, shards)
    total = torch.zeros((), device=inputs.device)
    report = StepReport(total, vectors.query_count, vectors.entity_count)
    task_numbers = count()
    for number, shard in enumerate(shards):
        masks = _masks(shard, inputs.device)
        queries = vectors.queries(number)
        for task in shard.pair_set.tasks:
            candidates = vectors.candidates(number, task)
            compared = TaskVectors.as_wide_as_candidates(queries, *candidates)
            terms = task_terms(task, shard, masks, compared, correct=config.log_q)
            scale = scale_of(towers.log_scales[next(task_numbers)])
            loss = task_loss(*terms, scale, config.matryoshka)
            report.task_losses[task.name] = loss.detach()
            if measure:
                report.batch_recall[task.name] = batch_recall(*terms)
            total = total + loss
    # All processes or none: one that skipped the backward pass would leave the others waiting.
    if all_processes(bool(torch.isfinite(total)), inputs.device):
        total.backward()  # type: ignore[no-untyped-call]
        vectors.backward()
        report.loss = total.detach()
    else:
        report.loss = torch.full_like(total.detach(), float("nan"))
    return report


class _Masks(NamedTuple):
    """What must not count as a negative: bool, True where masked."""

    in_batch: Tensor
    """``(B, G)``"""
    random: Tensor
    """``(B, R)``"""


def _masks(shard: ShardedBatch, device: torch.device) -> _Masks:
    pair_set, batch, own = shard.pair_set, shard.batch, shard.own_pairs
    queries = torch.from_numpy(pair_set.queries[batch.pairs]).to(device)
    positives = torch.from_numpy(pair_set.candidates[batch.pairs]).to(device)
    negatives = torch.from_numpy(pair_set.pool[batch.negatives]).to(device)
    in_batch = in_batch_mask(queries[own], positives[own], queries, positives)
    random = random_mask(positives[own], negatives)
    if pair_set.is_related_queries:  # a query is no negative of itself: its cosine is 1
        in_batch |= random_mask(queries[own], positives)
        random |= random_mask(queries[own], negatives)
    return _Masks(in_batch, random)


class TaskTerms(NamedTuple):
    """What the loss of a task is computed from, in the order of ``losses.task_loss``."""

    pairs: Pairs
    in_batch: Negatives
    random: Negatives | None


def task_terms(
    task: TaskData, shard: ShardedBatch, masks: _Masks, vectors: TaskVectors, *, correct: bool
) -> TaskTerms:
    """Gather the candidates of all processes, with their masks and corrections.

    In a compatibility task, rows and candidates without a vector are left out.

    Args:
        task: One of the tasks of the shard's dataset.
        shard: The dataset's part of the batch.
        masks: Of the shard, for candidates that are there.
        vectors: Of this process's rows.
        correct: Correct logits for the sampling frequency of their candidates (logQ).
    """
    device = vectors.queries.device
    positives = gather_with_gradient(vectors.positives)  # (G, D)
    negatives = gather_with_gradient(vectors.negatives)  # (R, D)
    in_batch, random = masks
    weights = None
    if task.vector_column is not None:
        present = positives.any(dim=1)
        in_batch = in_batch | ~present
        random = random | ~negatives.any(dim=1)
        share = shard.processes / present.sum().clamp(min=1)
        weights = present[shard.own_pairs].float() * share
    log_q = _log_q(task, shard, device) if correct else _LogQ()
    return TaskTerms(
        Pairs(vectors.queries, vectors.positives, log_q.pairs, weights),
        Negatives(positives, in_batch, log_q.in_batch),
        Negatives(negatives, random, log_q.random) if len(negatives) else None,
    )


class _LogQ(NamedTuple):
    """Corrections of one task's logits; None: uncorrected."""

    pairs: Tensor | None = None
    """``(B,)``"""
    in_batch: Tensor | None = None
    """``(G,)``"""
    random: Tensor | None = None
    """``(R,)``"""


def _log_q(task: TaskData, shard: ShardedBatch, device: torch.device) -> _LogQ:
    pairs, negatives = shard.batch.pairs, shard.batch.negatives

    def to_device(values: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(values).to(device)

    return _LogQ(
        pairs=to_device(task.pair_log_q[pairs[shard.own_pairs]]),
        in_batch=negative_log_q(to_device(task.in_batch_frequency[pairs]), len(pairs) - 1),
        random=negative_log_q(to_device(task.random_frequency[negatives]), len(negatives)),
    )
