"""Labelled Recall@10 of held-back pairs while training: exact, against every entity of the type."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.config.train_config import ENTITY, VECTOR_PREFIX
from encoders.exact_search import count_above
from encoders.training.inputs import Towers, TrainInputs

QUERY_POOL = 20_000
"""Related-query validation searches at most so many queries (those of the pairs, then the first others): each costs a transformer pass."""
_BLOCK = 1024


def validation_recall(towers: Towers, inputs: TrainInputs, k: int = 10) -> dict[str, float]:
    """Share of the held-back pairs whose annotated candidate ranks in the top ``k``.

    Returns:
        ``validation/recall@{k}/<entity type>`` per type with held-back pairs, and
        ``validation/recall@{k}``, their mean.
    """
    recalls = {
        f"validation/recall@{k}/{name}": float(hits.mean())
        for name, hits in validation_hits(towers, inputs, k).items()
    }
    return (
        {**recalls, f"validation/recall@{k}": float(np.mean(list(recalls.values())))}
        if recalls
        else {}
    )


@torch.no_grad()
def validation_hits(
    towers: Towers, inputs: TrainInputs, k: int = 10, entity_types: Collection[str] | None = None
) -> dict[str, npt.NDArray[np.bool_]]:
    """Does the annotated candidate of each held-back pair rank in the top ``k``?

    Entities are seen with their engaged queries but for the held-back ones (cross-fit view 0 when
    cross-fitting, so a fold is missing).

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
    found: dict[str, npt.NDArray[np.bool_]] = {}
    learned = {
        pair_set.config.entity_type: pair_set.config.candidates
        for pair_set in inputs.prepared.pair_sets
    }
    for entity_type, (queries, candidates) in inputs.prepared.validation.items():
        if (
            entity_type not in learned
            or not len(queries)
            or (entity_types is not None and entity_type not in entity_types)
        ):
            continue
        pool = inputs.prepared.pools[entity_type]
        if entity_type == "query":
            pool = np.unique(
                np.concatenate((candidates, pool[: max(QUERY_POOL - len(candidates), 0)]))
            )
            vectors = _queries(towers, inputs, pool)
        elif ENTITY in learned[entity_type]:
            tower = towers.entities[inputs.tower_of(entity_type)]
            blocks = [pool[start : start + 4096] for start in range(0, len(pool), 4096)]
            vectors = torch.cat(
                [
                    F.normalize(tower(inputs.features.select(rows)).float(), dim=-1)
                    for rows in blocks
                ]
            )
        else:
            vectors = inputs.vectors[learned[entity_type][0].removeprefix(VECTOR_PREFIX)][
                torch.from_numpy(pool).to(inputs.device)
            ]
        places = torch.from_numpy(np.searchsorted(pool, candidates)).to(inputs.device)
        own = torch.from_numpy(queries) if entity_type == "query" else None
        found[entity_type] = _hits(_queries(towers, inputs, queries), vectors, places, own, pool, k)
    towers.query.train()
    towers.entities.train()
    return found


def _queries(towers: Towers, inputs: TrainInputs, rows: np.ndarray) -> Tensor:
    out: Tensor | None = None
    distinct, inverse = np.unique(rows, return_inverse=True)
    for chunk in inputs.tokens.by_length(distinct, 256):
        ids, mask = inputs.tokens.padded(chunk)
        vectors = towers.query(ids.to(inputs.device), mask.to(inputs.device)).float()
        out = vectors.new_empty((len(distinct), vectors.shape[1])) if out is None else out
        out[torch.from_numpy(np.searchsorted(distinct, chunk)).to(inputs.device)] = vectors
    assert out is not None, "there is at least one query"
    return out[torch.from_numpy(inverse).to(inputs.device)]


def _hits(
    queries: Tensor,
    candidates: Tensor,
    places: Tensor,
    own: Tensor | None,
    pool: np.ndarray,
    k: int,
) -> npt.NDArray[np.bool_]:
    """Bool ``(P,)``: fewer than ``k`` candidates score higher, or as high in an earlier row, as in ``encoders.evaluation.ranking``."""
    hits = []
    pool_numbers = torch.from_numpy(pool)
    for start in range(0, len(queries), _BLOCK):
        block = slice(start, start + _BLOCK)
        scores = queries[block] @ candidates.T  # (B, N)
        if own is not None:  # a query must not find itself
            scores = scores.masked_fill(
                (own[block][:, None] == pool_numbers[None, :]).to(scores.device), -2.0
            )
        place = places[block]
        positive = scores.gather(1, place[:, None]).squeeze(1)
        hits.append((count_above(scores, positive, place) < k).cpu().numpy())
    return np.concatenate(hits)
