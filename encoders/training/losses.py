"""Compute the paper's training loss (section 4.3): sampled softmax, logQ, masks, Matryoshka.

Each task adds two terms: against the other positives of the batch, and against random candidates of
the catalogue. Everything here is a pure function of tensors; logits are float32 whatever the towers
ran in.

Letters: ``B`` rows (pairs of this process), ``G`` in-batch candidates (the positives of all
processes; ``G == B`` on one), ``R`` random negatives, ``N`` either of the two, ``D`` dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.config.train_config import INITIAL_TEMPERATURE, MATRYOSHKA_WEIGHTS
from encoders.errors import ConfigError

MAXIMUM_SCALE = 100.0

MASKED = -1e30
"""Logit of a masked negative: its exp() is exactly 0, and unlike -inf it makes no gradient NaN."""


def scale_of(log_scale: Tensor) -> Tensor:
    """Return the factor on cosines: ``exp(log_scale)``; ``limit_log_scales`` keeps it below 100."""
    return log_scale.exp()


@torch.no_grad()
def limit_log_scales(log_scales: Tensor) -> None:
    """Clamp log scales in place, so that no factor is above 100; call it after each step.

    Clamping the factor instead would leave a log scale above the limit without a gradient, and so
    without a way back.
    """
    log_scales.clamp_(max=math.log(MAXIMUM_SCALE))


def initial_log_scale(temperature: float = INITIAL_TEMPERATURE) -> float:
    """Return the log scale that stands for a temperature, at most that of a factor of 100.

    Raises:
        ConfigError: The temperature is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature must be above 0, but got {temperature}.")
    return min(-math.log(temperature), math.log(MAXIMUM_SCALE))


def negative_log_q(frequencies: Tensor, negatives: int) -> Tensor:
    """Return ``log(n * C(e) / N)``, what the logits of negatives are lowered by.

    It is the log of how often candidate ``e`` is expected among ``n`` negatives.

    Args:
        frequencies: ``C(e) / N`` of each candidate, float32 ``(N,)`` and above 0: its share of what
            the negatives are drawn from.
        negatives: ``n``, the number of negatives in the term.
    """
    return torch.log(frequencies * max(negatives, 1))


def random_mask(own_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """Mask candidates that are the row's own positive (or query): bool ``(B, R)``."""
    return own_ids[:, None] == candidate_ids[None, :]


def in_batch_mask(
    query_ids: Tensor, positive_ids: Tensor, all_query_ids: Tensor, all_positive_ids: Tensor
) -> Tensor:
    """Mask candidates of the in-batch term that are positives of the row's query: bool ``(B, G)``.

    They may be so anywhere in the batch. That covers the row's own positive (which enters the term
    once, as the positive), the same entity under another query, and every other positive of the
    same query.

    Args:
        query_ids: int64 ``(B,)``, equal for equal queries.
        positive_ids: int64 ``(B,)``, equal for equal entities.
        all_query_ids: ``(G,)``, of all processes.
        all_positive_ids: ``(G,)``, of all processes.
    """
    rows = len(query_ids)
    _, query_index = torch.unique(torch.cat((query_ids, all_query_ids)), return_inverse=True)
    _, entity_index = torch.unique(torch.cat((positive_ids, all_positive_ids)), return_inverse=True)
    is_positive = torch.zeros(
        int(query_index.max()) + 1,
        int(entity_index.max()) + 1,
        dtype=torch.bool,
        device=query_ids.device,
    )
    is_positive[query_index, entity_index] = True
    # (unique queries, unique entities) -> (B, unique entities) -> (B, G)
    return is_positive[query_index[:rows]].index_select(1, entity_index[rows:])


def sampled_softmax(positive: Tensor, negatives: Tensor) -> Tensor:
    """Return ``-log(exp(positive) / (exp(positive) + sum_j exp(negatives_j)))``, float32 ``(B,)``.

    Args:
        positive: Logits ``(B,)``.
        negatives: Logits ``(B, N)``; masked ones hold ``MASKED``. With none left the loss and its
            gradient are 0.
    """
    if negatives.shape[1] == 0:
        return positive * 0.0
    return F.softplus(torch.logsumexp(negatives, dim=1) - positive)


class Pairs(NamedTuple):
    """The rows of a task: queries and the positives that answer them."""

    queries: Tensor
    """``(B, D)`` unit rows."""
    positives: Tensor
    """``(B, D)`` unit rows; row ``i`` answers ``queries[i]``."""
    log_q: Tensor | None = None
    """``log(C(q, p) / C(q))`` of each pair, ``(B,)``; None: uncorrected."""
    weights: Tensor | None = None
    """What each row counts, ``(B,)``; None: ``1 / B``, which makes the mean. 0 leaves a row out."""


class Negatives(NamedTuple):
    """The candidates one term of the loss contrasts the positives with."""

    vectors: Tensor
    """``(N, D)`` unit rows."""
    mask: Tensor
    """bool ``(B, N)``, True where a candidate must not count as a negative of the row."""
    log_q: Tensor | None = None
    """``(N,)`` from ``negative_log_q``; None: uncorrected."""


def corrected_logits(queries: Tensor, negatives: Negatives, scale: Tensor) -> Tensor:
    """Return ``scale * <q, c> - log_q`` with masked entries at ``MASKED``, float32 ``(B, N)``."""
    scaled = queries * scale
    if negatives.log_q is None:
        logits = scaled @ negatives.vectors.T  # (B, D) @ (D, N)
    else:
        logits = torch.addmm(-negatives.log_q[None, :], scaled, negatives.vectors.T)
    return logits.masked_fill_(negatives.mask, MASKED)


def task_loss(
    pairs: Pairs,
    in_batch: Negatives | None,
    random: Negatives | None,
    scale: Tensor,
    matryoshka: Mapping[int, float] = MATRYOSHKA_WEIGHTS,
) -> Tensor:
    """Return the loss of one task: in-batch plus random term, summed over Matryoshka prefixes.

    Args:
        pairs: Queries and positives.
        in_batch: The positives of the whole batch (``G`` rows, the row's own masked); None leaves
            the term out.
        random: Random candidates of the catalogue (``R`` rows); None leaves the term out.
        scale: Scalar, from ``scale_of``.
        matryoshka: Prefix length -> weight; the full length has weight 1. Prefixes of ``D`` or
            longer are ignored; both sides of a prefix are normalised again.

    Returns:
        A scalar with the gradient.

    Raises:
        ConfigError: Both terms are left out.
    """
    terms = [term for term in (in_batch, random) if term is not None]
    if not terms:
        raise ConfigError("task_loss needs in-batch or random negatives, but got neither.")
    pairs = pairs._replace(queries=pairs.queries.float(), positives=pairs.positives.float())
    terms = [term._replace(vectors=term.vectors.float()) for term in terms]
    total = pairs.queries.new_zeros(())
    for prefix, weight in _prefixes(matryoshka, pairs.queries.shape[1]):
        queries = cut_to_prefix(pairs.queries, prefix)
        positive = scale * (queries * cut_to_prefix(pairs.positives, prefix)).sum(dim=1)  # (B,)
        if pairs.log_q is not None:
            positive = positive - pairs.log_q
        losses = []
        for term in terms:
            negatives = term._replace(vectors=cut_to_prefix(term.vectors, prefix))
            logits = corrected_logits(queries, negatives, scale)  # (B, N)
            losses.append(_reduce(sampled_softmax(positive, logits), pairs.weights))
        total = total + weight * torch.stack(losses).sum()
    return total


def _prefixes(matryoshka: Mapping[int, float], dimension: int) -> Iterator[tuple[int, float]]:
    """Yield prefix lengths and weights: the shorter ones in order, then all of the vector."""
    for prefix, weight in sorted(matryoshka.items()):
        if prefix < dimension and weight:
            yield prefix, weight
    yield dimension, 1.0


def cut_to_prefix(vectors: Tensor, prefix: int) -> Tensor:
    """Return the first ``prefix`` numbers of unit rows as unit rows."""
    if prefix == vectors.shape[1]:
        return vectors
    return F.normalize(vectors[:, :prefix], dim=1)


def _reduce(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights).sum()


@torch.no_grad()
def batch_recall(pairs: Pairs, in_batch: Negatives, random: Negatives | None, k: int = 10) -> float:
    """Return the share of rows whose positive is among the best ``k`` of it and all negatives."""
    positive = (pairs.queries * pairs.positives).sum(dim=1, keepdim=True)  # (B, 1)
    above = _count_above(positive, pairs.queries, in_batch)
    if random is not None:
        above = above + _count_above(positive, pairs.queries, random)
    return float((above < k).float().mean())


def _count_above(positive: Tensor, queries: Tensor, negatives: Negatives) -> Tensor:
    """Count each row's unmasked negatives that score above its positive: int64 ``(B,)``."""
    return ((queries @ negatives.vectors.T > positive) & ~negatives.mask).sum(dim=1)
