"""Measure labelled Recall@10 of held-back pairs: exact, against every entity of the type."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.exact_search import count_above
from encoders.training.data.sampling import vector_column
from encoders.training.inputs import Towers, TrainInputs
from encoders.training.losses import cut_to_prefix

QUERY_POOL = 20_000
"""Most queries that related-query validation searches: those of the pairs, then the first others.

Each costs a pass through the transformer.
"""
_BLOCK = 1024
"""Queries ranked together."""
_ENTITIES = 4096
"""Entities encoded together."""
_QUERIES = 256
"""Queries encoded together."""


def validation_recall(towers: Towers, inputs: TrainInputs, k: int = 10) -> dict[str, float]:
    """Measure the share of held-back pairs whose annotated candidate ranks in the top ``k``.

    Returns:
        ``validation/recall@{k}/<entity type>`` per type with held-back pairs, and
        ``validation/recall@{k}``, their mean; empty without any. Where a type has several
        candidates, also ``validation/recall@{k}/<entity type>/<candidate>`` of each but the first,
        over the pairs whose entity has a vector.
    """
    recalls = {
        f"validation/recall@{k}/{name}": float(hits.mean())
        for name, hits in validation_hits(towers, inputs, k).items()
    }
    if recalls:
        recalls[f"validation/recall@{k}"] = float(np.mean(list(recalls.values())))
    return recalls | _recall_of_other_candidates(towers, inputs, k)


def candidates_of(inputs: TrainInputs, entity_type: str) -> list[str]:
    """List what a type's datasets train against, the entity tower first; each once."""
    found = {
        candidate: None
        for pair_set in inputs.prepared.pair_sets
        if pair_set.config.entity_type == entity_type
        for candidate in pair_set.config.candidates
    }
    return sorted(found, key=lambda candidate: vector_column(candidate) is not None)


@torch.no_grad()
def _recall_of_other_candidates(towers: Towers, inputs: TrainInputs, k: int) -> dict[str, float]:
    """Measure each candidate of a type beside the first: frozen vector columns."""
    towers.query.eval()
    recalls: dict[str, float] = {}
    for entity_type, (queries, candidates) in inputs.prepared.validation.items():
        columns = [vector_column(c) for c in candidates_of(inputs, entity_type)[1:]]
        for column in filter(None, columns):
            vectors = inputs.vectors[column]
            there = vectors.any(dim=1).cpu().numpy()
            pool = inputs.prepared.pools[entity_type]
            pool, measured = pool[there[pool]], there[candidates]
            if measured.any():
                hits = top_k_hits(
                    _query_vectors(towers, inputs, queries[measured]),
                    vectors[torch.from_numpy(pool).to(inputs.device)],
                    place_in_pool(pool, candidates[measured]),
                    None,
                    k,
                )
                name = f"validation/recall@{k}/{entity_type}/vector:{column}"
                recalls[name] = float(hits.mean())
    towers.query.train()
    return recalls


@torch.no_grad()
def validation_hits(
    towers: Towers, inputs: TrainInputs, k: int = 10, entity_types: Collection[str] | None = None
) -> dict[str, npt.NDArray[np.bool_]]:
    """Say of each held-back pair whether its annotated candidate ranks in the top ``k``.

    A type is ranked against its entity tower where any of its datasets trains one, otherwise
    against the first frozen column. Entities are seen with their engaged queries but for the
    held-back ones (cross-fit view 0 when cross-fitting, so a fold is missing).

    Args:
        towers: What is learned.
        inputs: What they read.
        k: Depth.
        entity_types: Only these; None: all with held-back pairs.

    Returns:
        Entity type -> bool ``(P,)``, in the order of ``inputs.prepared.validation``.
    """
    towers.query.eval()
    towers.entities.eval()
    trained = {pair_set.config.entity_type for pair_set in inputs.prepared.pair_sets}
    found: dict[str, npt.NDArray[np.bool_]] = {}
    for entity_type, held_back in inputs.prepared.validation.items():
        is_wanted = entity_types is None or entity_type in entity_types
        if is_wanted and entity_type in trained and len(held_back.queries):
            found[entity_type] = _hits_of_type(towers, inputs, entity_type, k)
    towers.query.train()
    towers.entities.train()
    return found


def _hits_of_type(
    towers: Towers, inputs: TrainInputs, entity_type: str, k: int
) -> npt.NDArray[np.bool_]:
    queries, candidates = inputs.prepared.validation[entity_type]
    pool = inputs.prepared.pools[entity_type]
    own: npt.NDArray[np.int64] | None = None
    if entity_type == "query":
        others = pool[: max(QUERY_POOL - len(candidates), 0)]
        pool = np.unique(np.concatenate((candidates, others)))
        vectors = _query_vectors(towers, inputs, pool)
        own = place_in_pool(pool, queries)
    else:
        vectors = _entity_vectors(towers, inputs, entity_type, pool)
    query_vectors = _query_vectors(towers, inputs, queries)
    return top_k_hits(query_vectors, vectors, place_in_pool(pool, candidates), own, k)


def place_in_pool(
    pool: npt.NDArray[np.int64], members: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Find where members stand in a sorted pool, ``(P,)``; -1 where they do not."""
    places = np.searchsorted(pool, members).clip(max=len(pool) - 1)
    return np.where(pool[places] == members, places, -1)


def _entity_vectors(
    towers: Towers, inputs: TrainInputs, entity_type: str, rows: npt.NDArray[np.int64]
) -> Tensor:
    """Embed catalogue rows with their type's tower, or read the first frozen column without one."""
    column = vector_column(candidates_of(inputs, entity_type)[0])
    if column is not None:
        return inputs.vectors[column][torch.from_numpy(rows).to(inputs.device)]
    tower = towers.entities[inputs.tower_of(entity_type)]
    blocks = [rows[start : start + _ENTITIES] for start in range(0, len(rows), _ENTITIES)]
    vectors = [tower(inputs.features.select(block)).float() for block in blocks]
    return F.normalize(torch.cat(vectors), dim=-1)


def _query_vectors(towers: Towers, inputs: TrainInputs, numbers: npt.NDArray[np.int64]) -> Tensor:
    """Embed queries by number, ``(len(numbers), D)``; repeats are encoded once."""
    distinct, inverse = np.unique(numbers, return_inverse=True)
    vectors: list[Tensor] = []
    chunks = inputs.tokens.by_length(distinct, _QUERIES)
    for chunk in chunks:
        ids, mask = inputs.tokens.padded(chunk)
        vectors.append(towers.query(ids.to(inputs.device), mask.to(inputs.device)).float())
    place = np.empty(len(distinct), dtype=np.int64)
    place[np.searchsorted(distinct, np.concatenate(chunks))] = np.arange(len(distinct))
    return torch.cat(vectors)[torch.from_numpy(place[inverse]).to(inputs.device)]


def top_k_hits(
    queries: Tensor,
    candidates: Tensor,
    positives: npt.NDArray[np.int64],
    hidden: npt.NDArray[np.int64] | None,
    k: int,
) -> npt.NDArray[np.bool_]:
    """Say of each query whether its positive is in the exact top ``k``, bool ``(P,)``.

    Of equal scores the earlier row is first, as in ``encoders.evaluation.ranking``.

    Args:
        queries: Unit rows ``(P, D)``, compared on their first W numbers.
        candidates: Unit rows ``(N, W)``.
        positives: Row of each query's positive, ``(P,)``.
        hidden: Row that each query must not find (itself), -1 for none, ``(P,)``; None: no row is
            hidden.
        k: Depth.
    """
    queries = cut_to_prefix(queries, candidates.shape[1])
    columns = torch.arange(len(candidates), device=candidates.device)
    hits = []
    for start in range(0, len(queries), _BLOCK):
        block = slice(start, start + _BLOCK)
        scores = queries[block] @ candidates.T  # (B, N)
        if hidden is not None:
            own = torch.from_numpy(hidden[block]).to(columns.device)
            scores = scores.masked_fill(own[:, None] == columns, -2.0)
        place = torch.from_numpy(positives[block]).to(columns.device)
        positive = scores.gather(1, place[:, None]).squeeze(1)
        hits.append((count_above(scores, positive, place) < k).cpu().numpy())
    return np.concatenate(hits)
