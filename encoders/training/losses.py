"""The paper's training loss (section 4.3): two sampled softmax terms per task, logQ-corrected, masked, with Matryoshka prefixes.

Letters: ``B`` rows (pairs of this process), ``G`` in-batch candidates (the positives of all
processes; ``G == B`` on one), ``R`` random negatives, ``D`` dimension. Everything here is a pure
function of tensors; logits are float32 whatever the towers ran in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.config.train_config import INITIAL_TEMPERATURE, MATRYOSHKA_WEIGHTS
from encoders.errors import ConfigError

MAXIMUM_SCALE = 100.0

MASKED = -1e30
"""The logit of a masked negative: exp() of it is exactly 0, and unlike -inf it never makes a gradient NaN."""


def scale_of(log_scale: Tensor) -> Tensor:
    """The factor on cosines, ``exp(log_scale)`` clamped at 100; learned in log space from ``-log(0.07)``."""
    return log_scale.exp().clamp(max=MAXIMUM_SCALE)


def initial_log_scale(temperature: float = INITIAL_TEMPERATURE) -> float:
    """The log scale that stands for a temperature.

    Raises:
        ConfigError: The temperature is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature must be above 0, but got {temperature}.")
    return -math.log(temperature)


def negative_log_q(counts: Tensor, total: float, negatives: int) -> Tensor:
    """``log(n * C(e) / N)``: the log of how often item e is expected among ``n`` negatives; subtracted from its logit.

    Args:
        counts: ``C(e)`` of each candidate, ``(N,)``, from the sketch of the distribution the
            negatives are drawn from.
        total: ``N``, the items counted.
        negatives: ``n``, the number of negatives in the term.

    Returns:
        float32 ``(N,)``. A count of zero (an item the sketch never saw) is read as one.
    """
    return torch.log(counts.clamp(min=1).float()) + (
        math.log(max(negatives, 1)) - math.log(max(total, 1))
    )


def positive_log_q(pair_counts: Tensor, query_counts: Tensor) -> Tensor:
    """``log(C(q, p) / C(q))``: the log of how often the positive is drawn given the query; subtracted from the positive's logit.

    Args:
        pair_counts: ``C(q, p)`` of each pair, ``(B,)``.
        query_counts: ``C(q)`` of each pair's query, ``(B,)``.

    Returns:
        float32 ``(B,)``, never above 0 (a sketch may over-count a pair beyond its query).
    """
    return (
        torch.log(pair_counts.clamp(min=1).float()) - torch.log(query_counts.clamp(min=1).float())
    ).clamp(max=0)


def random_mask(positive_ids: Tensor, random_ids: Tensor) -> Tensor:
    """Negatives of the random term that are the row's own positive: bool ``(B, R)``, True where masked."""
    return positive_ids[:, None] == random_ids[None, :]


def in_batch_mask(
    query_ids: Tensor, positive_ids: Tensor, all_query_ids: Tensor, all_positive_ids: Tensor
) -> Tensor:
    """Candidates of the in-batch term that are a positive of the row's query anywhere in the batch: bool ``(B, G)``, True where masked.

    That covers the row's own positive (which enters the term once, as the positive), the same
    entity under another query, and every other positive of the same query.

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
    """``-log(exp(positive) / (exp(positive) + sum_j exp(negatives_j)))`` per row, float32 ``(B,)``.

    Args:
        positive: Logits ``(B,)``.
        negatives: Logits ``(B, N)``; masked ones hold ``MASKED``. With none left the loss and its
            gradient are 0.
    """
    if negatives.shape[1] == 0:
        return positive * 0.0
    return F.softplus(torch.logsumexp(negatives, dim=1) - positive)


def corrected_logits(
    queries: Tensor, candidates: Tensor, scale: Tensor, log_q: Tensor | None, mask: Tensor
) -> Tensor:
    """``scale * <q, c> - log_q`` with masked entries at ``MASKED``: ``(B, D) x (N, D) -> (B, N)``."""
    scaled = queries * scale
    logits = (
        scaled @ candidates.T
        if log_q is None
        else torch.addmm(-log_q[None, :], scaled, candidates.T)
    )
    return logits.masked_fill_(mask, MASKED)


class Negatives(NamedTuple):
    """The candidates one term of the loss contrasts the positives with."""

    vectors: Tensor
    """``(N, D)`` unit rows."""
    mask: Tensor
    """bool ``(B, N)``, True where a candidate must not count as a negative of the row."""
    log_q: Tensor | None = None
    """``(N,)`` from ``negative_log_q``; None: uncorrected."""


class TaskLoss(NamedTuple):
    """The loss of one task and what it is made of (full dimension, detached)."""

    total: Tensor
    in_batch: Tensor
    random: Tensor


def task_loss(
    queries: Tensor,
    positives: Tensor,
    in_batch: Negatives | None,
    random: Negatives | None,
    scale: Tensor,
    *,
    positive_log_q: Tensor | None = None,
    matryoshka: Mapping[int, float] = MATRYOSHKA_WEIGHTS,
    row_weights: Tensor | None = None,
) -> TaskLoss:
    """Loss of one task (dataset, candidate tower): in-batch term + random term, summed over Matryoshka prefixes by weight.

    Args:
        queries: ``(B, D)`` unit rows.
        positives: ``(B, D)`` unit rows; row ``i`` answers ``queries[i]``.
        in_batch: The positives of the whole batch (``G`` rows, the row's own masked); None leaves
            the term out.
        random: Uniform catalogue negatives; None leaves the term out.
        scale: Scalar, from ``scale_of``.
        positive_log_q: ``(B,)`` from ``positive_log_q``; None: uncorrected.
        matryoshka: Prefix length -> weight. Prefixes of ``D`` or longer are ignored; both sides are
            normalised again.
        row_weights: ``(B,)``, what each row counts; None: ``1 / B``, which makes the mean. 0 leaves
            a row out.

    Returns:
        ``TaskLoss``; ``total`` carries the gradient.

    Raises:
        ConfigError: Both terms are left out.
    """
    terms = [term for term in (in_batch, random) if term is not None]
    if not terms:
        raise ConfigError("task_loss needs in-batch or random negatives, but got neither.")
    queries, positives = queries.float(), positives.float()
    vectors = [term.vectors.float() for term in terms]
    dimension = queries.shape[1]
    total = queries.new_zeros(())
    parts: list[Tensor] = []
    for prefix, weight in [
        *((d, w) for d, w in sorted(matryoshka.items()) if d < dimension and w),
        (dimension, 1.0),
    ]:
        full = prefix == dimension
        q = queries if full else F.normalize(queries[:, :prefix], dim=1)
        p = positives if full else F.normalize(positives[:, :prefix], dim=1)
        positive = scale * (q * p).sum(dim=1)  # (B,)
        if positive_log_q is not None:
            positive = positive - positive_log_q
        parts = []
        for term, candidates in zip(terms, vectors, strict=True):
            c = candidates if full else F.normalize(candidates[:, :prefix], dim=1)
            parts.append(
                _reduce(
                    sampled_softmax(positive, corrected_logits(q, c, scale, term.log_q, term.mask)),
                    row_weights,
                )
            )
        total = total + weight * torch.stack(parts).sum()
    values = iter(part.detach() for part in parts)
    zero = queries.new_zeros(())
    return TaskLoss(
        total,
        next(values) if in_batch is not None else zero,
        next(values) if random is not None else zero,
    )


def _reduce(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights).sum()
