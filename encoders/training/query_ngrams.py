"""Fit the query tower's n-gram table after training, by ridge regression, and weigh it.

The transformer reads a rare name as pieces that say little. The table learns, for every bucket of
words and character n-grams, what the entities of train queries with it have in common: ``W``
minimises ``|X W - (Y - mean)|^2 + ridge |W|^2``, where a row of ``X`` is one train query's
buckets, weighted by inverse document frequency and of length 1, and a row of ``Y`` the direction of
the mean of its entities' vectors. It is solved by conjugate gradients, all columns at once. The
weight of the table beside the transformer's vector is chosen on held-back queries, as in
``weight_interpolation``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor

from encoders.config.train_config import ENTITY
from encoders.text.query_ngrams import ngram_buckets
from encoders.towers.entity_tower import EntityEncoder
from encoders.towers.query_ngrams import QueryNgrams
from encoders.towers.query_tower import QueryEncoder
from encoders.training.inputs import TrainInputs
from encoders.training.validation import place_in_pool, top_k_hits
from encoders.training.weight_interpolation import smallest_within_error

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

RIDGE = 1.0
ITERATIONS = 14
"""Of conjugate gradients; more change the vectors by less than one percent."""
MOST_QUERIES = 1_000_000
"""Train queries that the table is fitted on, at most."""
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Weights of the table that held-back queries choose from, relative to the transformer's vector."""
UNVALIDATED_WEIGHT = 0.5
"""Weight where no query is held back."""
_ENTITIES = 4096
_QUERIES = 256


def fit_query_ngrams(
    tower: QueryEncoder,
    entities: Mapping[str, EntityEncoder],
    inputs: TrainInputs,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Give the query tower the n-gram table that ``config.model.query_ngrams`` asks for.

    Args:
        tower: Trained; gets the table, unless held-back queries are found better without.
        entities: Trained entity towers by type.
        inputs: What they read.
        say: Takes a line for each weight that is tried.

    Returns:
        ``query_ngram_weight`` and the validation Recall@10 under it; empty without a table.
    """
    buckets = inputs.config.model.query_ngrams
    tower.ngrams = None
    if not buckets:
        return {}
    vectors = {name: _entity_vectors(inputs, name, entities[name]) for name in _types(inputs)}
    queries, targets = _targets(inputs, vectors)
    if not len(queries):
        return {}
    table, weights = _fit([inputs.prepared.texts[i] for i in queries], targets, buckets)
    ngrams = QueryNgrams(buckets, tower.dimension)
    with torch.no_grad():
        ngrams.table[:buckets] = torch.from_numpy(table)
        ngrams.weights[:buckets] = torch.from_numpy(weights)
    ngrams.to(inputs.device)
    sample = queries[:: max(1, len(queries) // 2048)]
    length = float(_projected(tower, inputs, sample).norm(dim=1).mean())
    weight, metrics = _choose(tower, ngrams, vectors, inputs, length, say)
    if weight:
        with torch.no_grad():
            ngrams.table.mul_(weight * length)
            for values in (ngrams.table, ngrams.weights):
                values.copy_(values.half().float())  # as it will be saved
        tower.ngrams = ngrams
    return metrics | {"query_ngram_weight": weight}


def _types(inputs: TrainInputs) -> list[str]:
    """List the entity types whose pairs train an entity tower."""
    return sorted(
        {
            pair_set.config.entity_type
            for pair_set in inputs.prepared.pair_sets
            if ENTITY in pair_set.config.candidates
        }
    )


@torch.no_grad()
def _entity_vectors(inputs: TrainInputs, entity_type: str, tower: EntityEncoder) -> Tensor:
    """Embed a type's catalogue rows in all views: ``(views * rows, D)``, zeros for other types."""
    rows = len(inputs.prepared.catalogue)
    pool = inputs.prepared.pools[entity_type]
    views = len(inputs.prepared.catalogue_views)
    places = np.concatenate([pool + view * rows for view in range(views)])
    tower.eval()
    out = torch.zeros(views * rows, tower.config.dimension, device=inputs.device)
    for start in range(0, len(places), _ENTITIES):
        part = torch.from_numpy(places[start : start + _ENTITIES]).to(inputs.device)
        out[part] = F.normalize(tower(inputs.features.select(part)).float(), dim=-1)
    return out


def _targets(inputs: TrainInputs, vectors: Mapping[str, Tensor]) -> tuple[Int64, Float32]:
    """Find the direction of the mean entity vector of each train query.

    An entity is read in the view of the pair's fold, which hides the query from it.

    Returns:
        Query numbers ``(N,)`` and unit rows ``(N, D)``.
    """
    rows = len(inputs.prepared.catalogue)
    width = next(iter(vectors.values())).shape[1]
    total = np.zeros((len(inputs.prepared.texts), width), np.float32)
    for pair_set in inputs.prepared.pair_sets:
        if pair_set.config.entity_type not in vectors or ENTITY not in pair_set.config.candidates:
            continue
        places = pair_set.candidates
        if len(inputs.prepared.catalogue_views) > 1:
            places = places + pair_set.folds * rows
        of_type = vectors[pair_set.config.entity_type].cpu().numpy()
        np.add.at(total, pair_set.queries, of_type[places])
    queries = np.flatnonzero(total.any(axis=1))
    step = -(-len(queries) // MOST_QUERIES)
    queries = queries[:: max(1, step)]
    chosen = total[queries]
    return queries, chosen / np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-6)


def _fit(texts: list[str], targets: Float32, buckets: int) -> tuple[Float32, Float32]:
    """Solve the ridge regression.

    Returns:
        The table ``(buckets, D)``, each row times its weight, and the weights ``(buckets,)``.
    """
    ids, offsets = ngram_buckets(texts, buckets)
    seen = np.bincount(ids, minlength=buckets)
    weights = np.log((1 + len(texts)) / (1 + seen)).astype(np.float32)
    weights[seen == 0] = 0  # never read in training: no vector, and no part in the length
    values = weights[ids]
    rows = csr_matrix((values, ids, offsets), (len(texts), buckets))
    lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    values = values / np.repeat(np.maximum(lengths, 1e-3), np.diff(offsets))
    inputs = csr_matrix((values.astype(np.float32), ids, offsets), (len(texts), buckets))
    solved = ridge(inputs, targets - targets.mean(0), RIDGE, ITERATIONS)
    table: Float32 = solved * weights[:, None]
    return table, weights


def ridge(inputs: csr_matrix, targets: Float32, penalty: float, iterations: int) -> Float32:
    """Minimise ``|X W - Y|^2 + penalty |W|^2`` by conjugate gradients, each column by itself.

    Args:
        inputs: X, float32 ``(N, F)``.
        targets: Y, float32 ``(N, D)``.
        penalty: Above 0.
        iterations: Steps.

    Returns:
        W, float32 ``(F, D)``.
    """
    transposed = inputs.T.tocsr()
    residual = transposed @ targets
    solved = np.zeros_like(residual)
    direction = residual.copy()
    square = (residual * residual).sum(0)
    for _ in range(iterations):
        moved = transposed @ (inputs @ direction) + penalty * direction
        step = square / np.maximum((direction * moved).sum(0), 1e-12)
        solved += step * direction
        residual -= step * moved
        now = (residual * residual).sum(0)
        direction = residual + (now / np.maximum(square, 1e-12)) * direction
        square = now
    found: Float32 = solved.astype(np.float32)
    return found


@torch.no_grad()
def _projected(tower: QueryEncoder, inputs: TrainInputs, numbers: Int64) -> Tensor:
    """Compute the transformer's vectors of queries before normalisation, ``(N, D)``."""
    tower.eval()
    out = torch.empty(len(numbers), tower.dimension, device=inputs.device)
    order = np.argsort(inputs.tokens.lengths[numbers], kind="stable")
    for start in range(0, len(order), _QUERIES):
        rows = order[start : start + _QUERIES]
        ids, mask = inputs.tokens.padded(numbers[rows])
        projected = tower.project(ids.to(inputs.device), mask.to(inputs.device))
        out[torch.from_numpy(rows).to(inputs.device)] = projected
    return out


@torch.no_grad()
def _choose(
    tower: QueryEncoder,
    ngrams: QueryNgrams,
    vectors: Mapping[str, Tensor],
    inputs: TrainInputs,
    length: float,
    say: Callable[[str], None],
) -> tuple[float, dict[str, float]]:
    """Choose the table's weight on held-back queries, and measure them under it."""
    held_back = {n: p for n, p in inputs.prepared.validation.items() if n in vectors}
    hits: dict[str, dict[float, npt.NDArray[np.bool_]]] = {}
    for name, (queries, candidates) in held_back.items():
        if not len(queries):
            continue
        pool = inputs.prepared.pools[name]
        projected = _projected(tower, inputs, queries)
        read = ngrams.read([inputs.prepared.texts[i] for i in queries])
        parts = np.array_split(np.arange(len(queries)), len(queries) // 1024 + 1)
        added = torch.cat([ngrams(ngrams.pad(*read, part).to(inputs.device)) for part in parts])
        entities = vectors[name][torch.from_numpy(pool).to(inputs.device)]
        places = place_in_pool(pool, candidates)
        hits[name] = {}
        for weight in WEIGHTS:
            mixed = F.normalize(projected + weight * length * added, dim=-1)
            hits[name][weight] = top_k_hits(mixed, entities, places, None, 10)
    if not hits:
        return UNVALIDATED_WEIGHT, {}
    for weight in WEIGHTS:
        recalls = (f"{name} recall@10 {of[weight].mean():.4f}" for name, of in hits.items())
        say(f"query n-grams {weight:g} | {' | '.join(recalls)}")
    # One weight serves all types: as in the query interpolation, the largest that one needs, but
    # no larger than the one that is best on average.
    needed = max(smallest_within_error(of, held_back[n].queries) for n, of in hits.items())
    best = max(WEIGHTS, key=lambda w: float(np.mean([of[w].mean() for of in hits.values()])))
    chosen = min(needed, best)
    return chosen, {f"validation/recall@10/{n}": float(of[chosen].mean()) for n, of in hits.items()}
