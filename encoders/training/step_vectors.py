"""Encode what a step reads: each distinct text and entity of the batch once, for all its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.config.train_config import ENTITY
from encoders.towers.cls_state import takes_token_vectors
from encoders.towers.query_tower import QueryEncoder
from encoders.training.data.batches import ShardedBatch
from encoders.training.data.sampling import TaskData
from encoders.training.data.tokenised_texts import TokenisedTexts
from encoders.training.gradient_cache import Encoding
from encoders.training.inputs import Towers, TrainInputs
from encoders.training.losses import cut_to_prefix

Int64 = npt.NDArray[np.int64]


class TaskVectors(NamedTuple):
    """What a task compares on this process: unit rows, zeros where a frozen vector is absent."""

    queries: Tensor
    """``(B, D)``"""
    positives: Tensor
    """``(B, D)``"""
    negatives: Tensor
    """``(R / processes, D)``, the random ones."""

    @classmethod
    def as_wide_as_candidates(
        cls, queries: Tensor, positives: Tensor, negatives: Tensor
    ) -> TaskVectors:
        """Compare queries on their first numbers where frozen candidates are narrower."""
        return cls(cut_to_prefix(queries, positives.shape[1]), positives, negatives)


class StepVectors:
    """Vectors of this process's rows of one batch, with gradients to the towers.

    Args:
        towers: What encodes.
        inputs: Texts, features and frozen vectors.
        shards: The batch, per dataset.
    """

    def __init__(self, towers: Towers, inputs: TrainInputs, shards: Sequence[ShardedBatch]) -> None:
        self._inputs = inputs
        self._rows = [_rows_of(shard, inputs) for shard in shards]
        texts = [rows.queries for rows in self._rows]
        for rows in self._rows:
            if rows.are_queries:
                texts += [rows.positives, rows.negatives]
        self._queries = _encode_queries(towers.query, inputs, _distinct(texts))
        self._entities: dict[str, _EncodedRows] = {}
        for key, tower in towers.entities.items():
            read = [rows for rows in self._rows if rows.entity_tower == key]
            if read:
                places = [array for rows in read for array in (rows.positives, rows.negatives)]
                self._entities[key] = _encode_entities(tower, inputs, _distinct(places))

    @property
    def query_count(self) -> int:
        """Distinct queries."""
        return len(self._queries)

    @property
    def entity_count(self) -> int:
        """Distinct entity views."""
        return sum(len(encoded) for encoded in self._entities.values())

    def queries(self, dataset: int) -> Tensor:
        """Return the vectors of a dataset's queries, ``(B, D)``."""
        return self._queries.vectors(self._rows[dataset].queries)

    def candidates(self, dataset: int, task: TaskData) -> tuple[Tensor, Tensor]:
        """Return the vectors of positives and random negatives for a task of a dataset."""
        rows = self._rows[dataset]
        if task.vector_column is not None:
            frozen = self._inputs.vectors[task.vector_column]
            return _frozen_rows(frozen, rows.positives), _frozen_rows(frozen, rows.negatives)
        encoded = self._queries
        if rows.entity_tower is not None:
            encoded = self._entities[rows.entity_tower]
        return encoded.vectors(rows.positives), encoded.vectors(rows.negatives)

    def backward(self) -> None:
        """Hand the gradient of the vectors on to the towers, after ``loss.backward()``."""
        for encoded in (self._queries, *self._entities.values()):
            encoded.encoding.backward()


class _DatasetRows(NamedTuple):
    """Rows that this process needs of one dataset."""

    queries: Int64
    """Query numbers, ``(B,)``."""
    positives: Int64
    """Query numbers of related queries, else places among the catalogue views, ``(B,)``."""
    negatives: Int64
    """Likewise, ``(R / processes,)``."""
    are_queries: bool
    """Whether positives and negatives are queries."""
    entity_tower: str | None
    """Key of the entity tower that encodes positives and negatives; None: none does."""


def _rows_of(shard: ShardedBatch, inputs: TrainInputs) -> _DatasetRows:
    pair_set, batch, prepared = shard.pair_set, shard.batch, inputs.prepared
    pairs = batch.pairs[shard.own_pairs]
    queries, positives = pair_set.queries[pairs], pair_set.candidates[pairs]
    negatives = pair_set.pool[batch.negatives[shard.own_negatives]]
    if pair_set.is_related_queries:
        return _DatasetRows(queries, positives, negatives, True, None)
    catalogue = len(prepared.catalogue)
    if len(prepared.catalogue_views) > 1:
        positives = positives + pair_set.folds[pairs] * catalogue
    negatives = negatives + batch.negative_folds[shard.own_negatives] * catalogue
    tower = None
    if ENTITY in pair_set.config.candidates:
        tower = inputs.tower_of(pair_set.config.entity_type)
    return _DatasetRows(queries, positives, negatives, False, tower)


def _frozen_rows(frozen: Tensor, places: Int64) -> Tensor:
    """Look up a catalogue's frozen vectors, which are the same in all views."""
    return frozen[torch.from_numpy(places % len(frozen)).to(frozen.device)]


def _distinct(rows: Sequence[Int64]) -> Int64:
    distinct: Int64 = np.unique(np.concatenate(rows))
    return distinct


class _EncodedRows:
    """Vectors of distinct rows of one tower, looked up by row.

    Args:
        encoding: Encodes the chunks.
        chunks: The distinct rows, in any order.
    """

    def __init__(self, encoding: Encoding[Int64], chunks: Sequence[Int64]) -> None:
        self.encoding = encoding
        encoded = np.concatenate(chunks)
        self._place = np.argsort(encoded)
        self._sorted = encoded[self._place]

    def __len__(self) -> int:
        return len(self._sorted)

    def vectors(self, rows: Int64) -> Tensor:
        """Return the vectors of some rows, ``(len(rows), D)``; repeats allowed."""
        places = torch.from_numpy(self._place[np.searchsorted(self._sorted, rows)])
        vectors = self.encoding.vectors
        return vectors.index_select(0, places.to(vectors.device))


def _encode_queries(tower: QueryEncoder, inputs: TrainInputs, rows: Int64) -> _EncodedRows:
    batch = inputs.config.batch
    size = batch.query_chunk or (64 if inputs.device.type == "cpu" else 1024)
    chunks = inputs.tokens.by_length(rows, size)
    table = None
    if takes_token_vectors(tower.transformer):
        transformer: Any = tower.transformer
        table = _TokenRows(transformer.get_input_embeddings(), inputs.tokens, rows)

    def encode(chunk: Int64) -> Tensor:
        ids, mask = inputs.tokens.padded(chunk)
        if table is not None:
            ids = table.places(ids)
        ids = ids.to(inputs.device, non_blocking=True)
        mask = mask.to(inputs.device, non_blocking=True)
        with inputs.autocast():
            vectors = tower(ids, mask, table.vectors if table else None)
            return F.normalize(vectors.float(), dim=-1)

    after = table.backward if table else None
    encoding = Encoding(encode, chunks, cached=batch.gradient_cache, after_backward=after)
    return _EncodedRows(encoding, chunks)


def _encode_entities(tower: nn.Module, inputs: TrainInputs, rows: Int64) -> _EncodedRows:
    batch = inputs.config.batch
    starts = range(0, len(rows), batch.entity_chunk)
    chunks = [rows[start : start + batch.entity_chunk] for start in starts]

    def encode(chunk: Int64) -> Tensor:
        with inputs.autocast():
            return F.normalize(tower(inputs.features.select(chunk)).float(), dim=-1)

    return _EncodedRows(Encoding(encode, chunks, cached=batch.gradient_cache), chunks)


class _TokenRows:
    """The token embeddings of one step's queries, looked up once.

    The table gets one dense gradient, and not one per chunk.

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
        """Return the rows of ``vectors`` that hold token ids ``(B, T)``."""
        return torch.from_numpy(self._place[ids.numpy()])

    def backward(self) -> None:
        """Hand the gradient that has gathered on ``vectors`` to the table."""
        if self.vectors.grad is not None:
            torch.autograd.backward(self._rows, self.vectors.grad)
