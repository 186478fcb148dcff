"""One step: encode each distinct text and entity of the batch once, take every task's loss, and leave gradients on the towers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.config.train_config import ENTITY, QUERY, VECTOR_PREFIX
from encoders.towers.cls_state import takes_token_vectors
from encoders.towers.query_tower import QueryEncoder
from encoders.training.data.batches import DatasetBatch, process_slice
from encoders.training.data.sampling import PairSet, TaskData
from encoders.training.data.tokenised_texts import TokenisedTexts
from encoders.training.distributed import (
    all_processes,
    gather_with_gradient,
    process_rank,
    world_size,
)
from encoders.training.gradient_cache import Encoding
from encoders.training.inputs import Towers, TrainInputs
from encoders.training.losses import Negatives, in_batch_mask, random_mask, scale_of, task_loss

Int64 = npt.NDArray[np.int64]


@dataclass
class StepReport:
    """What a step says about itself."""

    loss: Tensor
    """Sum over tasks, scalar, detached; the mean over processes equals the loss of the union batch."""
    task_losses: dict[str, Tensor] = field(default_factory=dict)
    batch_recall: dict[str, float] = field(default_factory=dict)
    """Share of rows whose positive is among the best 10 of positives and in-batch and random negatives; only when measured."""
    queries: int = 0
    """Distinct queries encoded by this process."""
    entities: int = 0
    """Distinct entity views encoded by this process."""


class _Rows(NamedTuple):
    """Rows one dataset needs of this process, before vectors exist."""

    queries: Int64
    positives: Int64
    negatives: Int64


class _Pool:
    """Collects rows wanted from one tower, encodes each distinct one once, and hands vectors out by the wanted rows."""

    def __init__(self) -> None:
        self._wanted: list[Int64] = []
        self._place = np.empty(0, dtype=np.int64)
        self._distinct = np.empty(0, dtype=np.int64)
        self.encoding: Encoding[Int64] | None = None

    @property
    def is_wanted(self) -> bool:
        return bool(self._wanted)

    def want(self, rows: Int64) -> Int64:
        self._wanted.append(rows)
        return rows

    def distinct(self) -> Int64:
        self._distinct = np.unique(np.concatenate(self._wanted))
        return self._distinct

    def encoded(self, encoding: Encoding[Int64], chunks: list[Int64]) -> None:
        order = np.concatenate(chunks)
        self.encoding = encoding
        self._place = np.empty(len(order), dtype=np.int64)
        self._place[np.searchsorted(self._distinct, order)] = np.arange(len(order))

    def vectors(self, rows: Int64) -> Tensor:
        assert self.encoding is not None, "vectors are asked for after encoding"
        places = self._place[np.searchsorted(self._distinct, rows)]
        vectors = self.encoding.vectors
        return vectors.index_select(0, torch.from_numpy(places).to(vectors.device))


def loss_and_gradients(
    towers: Towers, inputs: TrainInputs, batch: list[DatasetBatch], *, measure: bool = False
) -> StepReport:
    """Forward and backward pass of one step on this process's slice of the batch.

    Args:
        towers: What is trained; gradients are added to its parameters.
        inputs: Texts, features and vectors.
        batch: The whole batch, of all processes.
        measure: Also compute the batch recall.
    """
    rank, processes = process_rank(), world_size()
    rows = len(inputs.prepared.catalogue)
    queries, entities = _Pool(), {key: _Pool() for key in towers.entities}
    wanted: list[_Rows] = []
    for pair_set, part in zip(inputs.prepared.pair_sets, batch, strict=True):
        mine = part.pairs[process_slice(len(part.pairs), rank, processes)]
        share = process_slice(len(part.negatives), rank, processes)
        q = queries.want(pair_set.queries[mine])
        if pair_set.is_related_queries:
            wanted.append(
                _Rows(
                    q,
                    queries.want(pair_set.candidates[mine]),
                    queries.want(pair_set.pool[part.negatives[share]]),
                )
            )
            continue
        views = len(inputs.prepared.catalogue_views)
        positives = pair_set.candidates[mine] + (pair_set.folds[mine] * rows if views > 1 else 0)
        negatives = pair_set.pool[part.negatives[share]] + part.negative_folds[share] * rows
        if ENTITY in pair_set.config.candidates:
            pool = entities[inputs.tower_of(pair_set.config.entity_type)]
            pool.want(positives)
            pool.want(negatives)
        wanted.append(_Rows(q, positives, negatives))

    encodings = [_encode_queries(towers.query, inputs, queries)]
    encodings += [
        _encode_entities(towers.entities[key], inputs, pool)
        for key, pool in entities.items()
        if pool.is_wanted
    ]
    report = StepReport(
        torch.zeros((), device=inputs.device),
        queries=len(encodings[0].vectors),
        entities=sum(len(e.vectors) for e in encodings[1:]),
    )

    total = torch.zeros((), device=inputs.device)
    index = 0
    for pair_set, part, need in zip(inputs.prepared.pair_sets, batch, wanted, strict=True):
        masks = _masks(pair_set, part, rank, processes, inputs.device)
        query_vectors = queries.vectors(need.queries)
        for task in pair_set.tasks:
            if task.candidate.startswith(VECTOR_PREFIX):
                frozen = inputs.vectors[task.candidate.removeprefix(VECTOR_PREFIX)]
                vectors = [
                    frozen[torch.from_numpy(r % rows).to(frozen.device)]
                    for r in (need.positives, need.negatives)
                ]
            else:
                source = (
                    queries
                    if task.candidate == QUERY
                    else entities[inputs.tower_of(pair_set.config.entity_type)]
                )
                vectors = [source.vectors(need.positives), source.vectors(need.negatives)]
            scale = scale_of(towers.log_scales[index])
            loss = _task(
                task,
                pair_set,
                part,
                masks,
                query_vectors,
                vectors[0],
                vectors[1],
                scale,
                inputs,
                report,
                measure,
            )
            total = total + loss
            index += 1
    if all_processes(
        bool(torch.isfinite(total)), inputs.device
    ):  # all or none: a process that skipped would leave the others waiting
        total.backward()  # type: ignore[no-untyped-call]
        for encoding in encodings:
            encoding.backward()
        report.loss = total.detach()
    else:
        report.loss = torch.full_like(total.detach(), float("nan"))
    return report


class _TokenRows:
    """The token embeddings of one step's queries, looked up once: the table gets one dense gradient, and not one per chunk.

    Attributes:
        vectors: ``(U, H)``, a leaf whose gradient all chunks add to.
    """

    def __init__(self, table: nn.Embedding, tokens: TokenisedTexts, rows: Int64) -> None:
        wanted = np.union1d(tokens.tokens_of(rows), [tokens.pad_id])
        self._place = np.zeros(table.num_embeddings, np.int64)
        self._place[wanted] = np.arange(len(wanted))
        self._rows = F.embedding(torch.from_numpy(wanted).to(table.weight.device), table.weight)
        self.vectors = self._rows.detach().requires_grad_(self._rows.requires_grad)

    def places(self, ids: Tensor) -> Tensor:
        """Where the vectors of token ids ``(B, T)`` stand."""
        return torch.from_numpy(self._place[ids.numpy()])

    def backward(self) -> None:
        """Hand the gradient that has gathered on ``vectors`` to the table."""
        if self.vectors.grad is not None:
            torch.autograd.backward(self._rows, self.vectors.grad)


def _encode_queries(tower: QueryEncoder, inputs: TrainInputs, pool: _Pool) -> Encoding[Int64]:
    size = inputs.config.batch.query_chunk or (64 if inputs.device.type == "cpu" else 1024)
    distinct = pool.distinct()
    chunks = inputs.tokens.by_length(distinct, size)
    looked_up = None
    if takes_token_vectors(tower.transformer):
        looked_up = _TokenRows(tower.transformer.get_input_embeddings(), inputs.tokens, distinct)  # type: ignore[operator]

    def encode(rows: Int64) -> Tensor:
        ids, mask = inputs.tokens.padded(rows)
        ids = looked_up.places(ids) if looked_up else ids
        ids, mask = (
            ids.to(inputs.device, non_blocking=True),
            mask.to(inputs.device, non_blocking=True),
        )
        with inputs.autocast():
            return F.normalize(
                tower(ids, mask, looked_up.vectors if looked_up else None).float(), dim=-1
            )

    encoding = Encoding(
        encode,
        chunks,
        cached=inputs.config.batch.gradient_cache,
        after_backward=looked_up.backward if looked_up else None,
    )
    pool.encoded(encoding, chunks)
    return encoding


def _encode_entities(tower: nn.Module, inputs: TrainInputs, pool: _Pool) -> Encoding[Int64]:
    rows, size = pool.distinct(), inputs.config.batch.entity_chunk
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]

    def encode(chunk: Int64) -> Tensor:
        with inputs.autocast():
            return F.normalize(tower(inputs.features.select(chunk)).float(), dim=-1)

    encoding = Encoding(encode, chunks, cached=inputs.config.batch.gradient_cache)
    pool.encoded(encoding, chunks)
    return encoding


class _Masks(NamedTuple):
    in_batch: Tensor
    random: Tensor


def _masks(
    pair_set: PairSet, part: DatasetBatch, rank: int, processes: int, device: torch.device
) -> _Masks:
    mine = process_slice(len(part.pairs), rank, processes)
    queries = torch.from_numpy(pair_set.queries[part.pairs]).to(device)
    positives = torch.from_numpy(pair_set.candidates[part.pairs]).to(device)
    negatives = torch.from_numpy(pair_set.pool[part.negatives]).to(device)
    return _Masks(
        in_batch_mask(queries[mine], positives[mine], queries, positives),
        random_mask(positives[mine], negatives),
    )


def _task(
    task: TaskData,
    pair_set: PairSet,
    part: DatasetBatch,
    masks: _Masks,
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    scale: Tensor,
    inputs: TrainInputs,
    report: StepReport,
    measure: bool,
) -> Tensor:
    """Loss of one task on this process's rows; in a compatibility task rows and candidates without a vector are left out."""
    rank, processes, device = process_rank(), world_size(), inputs.device
    mine = process_slice(len(part.pairs), rank, processes)
    frozen = task.candidate.startswith(VECTOR_PREFIX)
    all_positives = positives if frozen and processes == 1 else gather_with_gradient(positives)
    all_negatives = negatives if frozen and processes == 1 else gather_with_gradient(negatives)
    in_batch, random, weights = masks.in_batch, masks.random, None
    if frozen:
        absent_positives, absent_negatives = (~v.any(dim=1) for v in (all_positives, all_negatives))
        in_batch, random = in_batch | absent_positives, random | absent_negatives
        present = ~absent_positives
        weights = present[mine].float() * (processes / present.sum().clamp(min=1))
    config = inputs.config.loss
    log_q_in_batch = log_q_random = log_q_positive = None
    if config.log_q:
        log_q_in_batch = _log_q(task.in_batch_frequency[part.pairs], len(part.pairs) - 1, device)
        log_q_random = _log_q(task.random_frequency[part.negatives], len(part.negatives), device)
        log_q_positive = torch.from_numpy(task.pair_log_q[part.pairs[mine]]).to(device)
    result = task_loss(
        queries,
        positives,
        Negatives(all_positives, in_batch, log_q_in_batch),
        Negatives(all_negatives, random, log_q_random) if len(all_negatives) else None,
        scale,
        positive_log_q=log_q_positive,
        matryoshka=config.matryoshka,
        row_weights=weights,
    )
    report.task_losses[task.name] = result.total.detach()
    if measure:
        report.batch_recall[task.name] = _batch_recall(
            queries, positives, all_positives, all_negatives, in_batch, random
        )
    return result.total


def _log_q(frequency: npt.NDArray[np.float32], negatives: int, device: torch.device) -> Tensor:
    """``log(n * C(e) / N)`` from ``C(e) / N``; see ``losses.negative_log_q``."""
    return torch.log(torch.from_numpy(frequency).to(device) * max(negatives, 1))


@torch.no_grad()
def _batch_recall(
    queries: Tensor,
    positives: Tensor,
    in_batch: Tensor,
    random: Tensor,
    in_batch_mask_: Tensor,
    random_mask_: Tensor,
) -> float:
    positive = (queries * positives).sum(dim=1, keepdim=True)
    above = ((queries @ in_batch.T > positive) & ~in_batch_mask_).sum(dim=1) + (
        (queries @ random.T > positive) & ~random_mask_
    ).sum(dim=1)
    return float((above < 10).float().mean())
