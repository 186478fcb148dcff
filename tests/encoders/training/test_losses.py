"""The loss against slow, obvious loops and against the limits it must have."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.config.train_config import MATRYOSHKA_WEIGHTS
from encoders.errors import ConfigError
from encoders.training.losses import (
    MASKED,
    Negatives,
    Pairs,
    batch_recall,
    in_batch_mask,
    initial_log_scale,
    limit_log_scales,
    negative_log_q,
    random_mask,
    sampled_softmax,
    scale_of,
    task_loss,
)

few = settings(max_examples=25, deadline=None)


def unit(rows: int, dimension: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(
        torch.randn(rows, dimension, generator=generator, dtype=torch.float32), dim=1
    )


def slow_loss(queries, positives, terms, scale, positive_correction, matryoshka) -> float:
    """Compute the loss one number at a time in double precision (section 4.3 of the paper)."""
    dimension = queries.shape[1]
    total = 0.0
    for prefix, weight in [*matryoshka.items(), (dimension, 1.0)]:
        if prefix >= dimension and weight != 1.0:
            continue

        def cosine(a, b, prefix=prefix):
            a, b = a[:prefix].double(), b[:prefix].double()
            return float(a @ b / (a.norm() * b.norm()))

        for candidates, mask, log_q in terms:
            rows = []
            for i in range(len(queries)):
                positive = scale * cosine(queries[i], positives[i]) - positive_correction[i]
                denominator = math.exp(positive)
                for j in range(len(candidates)):
                    if not mask[i][j]:
                        denominator += math.exp(
                            scale * cosine(queries[i], candidates[j]) - log_q[j]
                        )
                rows.append(-math.log(math.exp(positive) / denominator))
            total += weight * sum(rows) / len(rows)
    return total


@few
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 10_000))
def test_task_loss_random_batches_equals_slow_loop(batch: int, randoms: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    queries, positives = unit(batch, 8, seed), unit(batch, 8, seed + 1)
    query_ids, positive_ids = (torch.from_numpy(generator.integers(0, 3, batch)) for _ in range(2))
    random_ids = torch.from_numpy(generator.integers(0, 3, randoms))
    in_batch_counts, random_counts = (
        torch.from_numpy(generator.integers(1, 9, n)) for n in (batch, randoms)
    )
    pairs = Pairs(queries, positives, torch.from_numpy(np.log(generator.uniform(0.1, 1, batch))))
    in_batch = Negatives(
        positives,
        in_batch_mask(query_ids, positive_ids, query_ids, positive_ids),
        negative_log_q(in_batch_counts / 50, batch - 1),
    )
    random = Negatives(
        unit(randoms, 8, seed + 2),
        random_mask(positive_ids, random_ids),
        negative_log_q(random_counts / 30, randoms),
    )
    # Prefixes of the full width or more do not count.
    matryoshka = {2: 0.05, 4: 0.1, 8: 0.5, 99: 0.5}
    fast = task_loss(pairs, in_batch, random, torch.tensor(5.0), matryoshka)
    terms = [(term.vectors, term.mask.tolist(), term.log_q.tolist()) for term in (in_batch, random)]
    slow = slow_loss(queries, positives, terms, 5.0, pairs.log_q.tolist(), {2: 0.05, 4: 0.1})
    assert float(fast) == pytest.approx(slow, rel=1e-4, abs=1e-5)


@few
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(0, 12),
)
def test_in_batch_mask_random_pairs_equals_slow_loop(
    pairs: list[tuple[int, int]], own: int
) -> None:
    rows = pairs[: max(own, 1)]
    mask = in_batch_mask(
        *(torch.tensor(column) for side in (rows, pairs) for column in zip(*side, strict=True))
    )
    positives_of = {q: {e for query, e in [*pairs, *rows] if query == q} for q, _ in rows}
    assert mask.tolist() == [[entity in positives_of[q] for _, entity in pairs] for q, _ in rows]


def test_random_mask_repeated_positive_hides_only_own_row() -> None:
    mask = random_mask(torch.tensor([7, 8]), torch.tensor([8, 9, 7, 7]))
    assert mask.tolist() == [[False, False, True, True], [True, False, False, False]]


def test_masks_other_positive_of_query_hidden_only_in_batch() -> None:
    """Paper, section 4.3: the in-batch term hides every positive of the query, the random term only
    the row's own.
    """
    query_ids, positive_ids = torch.tensor([0, 0]), torch.tensor([1, 2])
    assert in_batch_mask(query_ids, positive_ids, query_ids, positive_ids).all()
    assert random_mask(positive_ids, positive_ids).tolist() == [[True, False], [False, True]]


def test_sampled_softmax_random_logits_equals_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negatives = (
        torch.randn(5, generator=generator),
        torch.randn(5, 9, generator=generator) * 10,
    )
    reference = F.cross_entropy(
        torch.cat((positive[:, None], negatives), dim=1),
        torch.zeros(5, dtype=torch.long),
        reduction="none",
    )
    torch.testing.assert_close(sampled_softmax(positive, negatives), reference)


@few
@given(st.integers(1, 50), st.integers(2, 1000))
def test_task_loss_uniform_frequencies_equals_shifted_softmax(count: int, items: int) -> None:
    """With C(e) = c for all e all negatives move together, by log(n c / N)."""
    negatives = 6
    log_q = negative_log_q(torch.full((negatives,), count) / (count * items), negatives)
    torch.testing.assert_close(
        log_q, torch.full((negatives,), math.log(negatives / items)), rtol=1e-4, atol=1e-5
    )
    queries, positives, vectors = unit(4, 8, 1), unit(4, 8, 2), unit(negatives, 8, 3)
    mask = torch.zeros(4, negatives, dtype=torch.bool)
    random = Negatives(vectors, mask, log_q)
    corrected = task_loss(Pairs(queries, positives), None, random, torch.tensor(3.0), {})
    positive = (queries * positives).sum(1, keepdim=True) * 3
    logits = torch.cat((positive, queries @ vectors.T * 3 - math.log(negatives / items)), dim=1)
    plain = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(corrected, plain, rtol=1e-4, atol=1e-5)


def test_negative_log_q_every_item_once_is_zero() -> None:
    log_q = negative_log_q(torch.ones(40) / 40, 40)
    torch.testing.assert_close(log_q, torch.zeros(40))


def test_task_loss_masked_duplicate_has_no_gradient() -> None:
    queries, positives = unit(3, 8, 0), unit(3, 8, 1)
    negatives = torch.cat((positives[:1], unit(2, 8, 2))).requires_grad_()
    mask = random_mask(torch.tensor([0, 1, 2]), torch.tensor([0, 10, 11]))
    pairs = Pairs(queries[:1], positives[:1])
    task_loss(pairs, None, Negatives(negatives, mask[:1]), torch.tensor(20.0)).backward()
    assert negatives.grad is not None
    assert negatives.grad[0].abs().max() == 0
    assert negatives.grad[1:].abs().max() > 0


def test_task_loss_all_negatives_masked_is_zero_with_zero_gradient() -> None:
    queries = unit(2, 8, 0).requires_grad_()
    positives = unit(2, 8, 1)
    mask = torch.ones(2, 2, dtype=torch.bool)
    in_batch = Negatives(positives, mask)
    loss = task_loss(Pairs(queries, positives), in_batch, None, torch.tensor(100.0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert queries.grad is not None
    assert queries.grad.abs().max() == 0


def test_sampled_softmax_no_negatives_is_zero() -> None:
    assert float(sampled_softmax(torch.tensor([3.0]), torch.empty(1, 0))) == 0.0


def test_task_loss_neither_term_raises_config_error() -> None:
    with pytest.raises(ConfigError, match="got neither"):
        task_loss(Pairs(unit(1, 4, 0), unit(1, 4, 1)), None, None, torch.tensor(1.0))


def test_task_loss_row_weight_zero_leaves_row_out() -> None:
    queries, positives, negatives = unit(3, 8, 0), unit(3, 8, 1), unit(5, 8, 2)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    pairs = Pairs(queries, positives, weights=torch.tensor([0.5, 0.0, 0.5]))
    weighted = task_loss(pairs, None, Negatives(negatives, mask), torch.tensor(9.0))
    kept = [0, 2]
    pairs = Pairs(queries[kept], positives[kept])
    alone = task_loss(pairs, None, Negatives(negatives, mask[kept]), torch.tensor(9.0))
    torch.testing.assert_close(weighted, alone)


def test_scale_of_log_scale_past_limit_comes_back() -> None:
    """The limit holds the parameter: a gradient is left to lower it by."""
    log_scale = torch.nn.Parameter(torch.tensor([9.0, 2.0]))
    limit_log_scales(log_scale)
    torch.testing.assert_close(scale_of(log_scale.detach()), torch.tensor([100.0, math.exp(2.0)]))
    optimiser = torch.optim.SGD([log_scale], lr=1e-3)
    for _ in range(3):
        scale_of(log_scale).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert float(scale_of(log_scale.detach())[0]) < 90.0


def test_initial_log_scale_temperature_stops_at_a_factor_of_100() -> None:
    assert float(scale_of(torch.tensor(initial_log_scale()))) == pytest.approx(1 / 0.07)
    assert math.exp(initial_log_scale(0.001)) == pytest.approx(100.0)
    with pytest.raises(ConfigError, match="above 0, but got 0"):
        initial_log_scale(0.0)


def test_task_loss_gradients_equal_finite_differences() -> None:
    queries = unit(3, 6, 0).double().requires_grad_()
    log_scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, 4, dtype=torch.bool)

    def loss(q, s):
        random = Negatives(unit(4, 6, 2), mask)
        return task_loss(Pairs(q, unit(3, 6, 1)), None, random, scale_of(s), {2: 0.3})

    loss(queries, log_scale).backward()
    for tensor, index in ((queries, (1, 2)), (log_scale, ())):
        step = torch.zeros_like(tensor)
        step[index] = 1e-2
        difference = [
            float(
                loss(
                    queries + sign * step if tensor is queries else queries,
                    log_scale + sign * step if tensor is log_scale else log_scale,
                )
            )
            for sign in (1, -1)
        ]
        assert float(tensor.grad[index]) == pytest.approx(
            (difference[0] - difference[1]) / 2e-2, rel=0.02, abs=1e-4
        )


def test_constants_matryoshka_and_mask_are_the_papers() -> None:
    assert MATRYOSHKA_WEIGHTS == {16: 0.05, 32: 0.05, 64: 0.05, 128: 0.05}
    assert math.exp(MASKED) == 0.0


def test_batch_recall_counts_rows_with_fewer_than_k_better_negatives() -> None:
    """Four candidates on a quarter circle; the positive of a row is the i-th best of its term."""
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4])
    candidates = torch.stack((torch.cos(angles), torch.sin(angles)), dim=1)
    queries = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    own = torch.eye(4, dtype=torch.bool)
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    pairs, in_batch = Pairs(queries, candidates), Negatives(candidates, own)
    assert [batch_recall(pairs, in_batch, None, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    # A second set of the same candidates doubles what stands above.
    assert batch_recall(pairs, in_batch, Negatives(candidates, nothing), 3) == 0.5
    assert batch_recall(pairs, Negatives(candidates, ~nothing), None, 1) == 1.0, "all are masked"


def test_negative_log_q_skewed_catalogue_makes_partition_sum_unbiased() -> None:
    """Negatives drawn with Zipf popularity: the mean of the corrected partition sum over many draws
    is the full sum over the catalogue.

    The scores grow with popularity, as they do in practice, so that the uncorrected sum is far off.
    """
    generator = np.random.default_rng(0)
    items, drawn, trials = 200, 50, 4000
    popularity = 1 / np.arange(1, items + 1)
    counts = torch.from_numpy(np.ceil(popularity * 10_000)).long()
    total = int(counts.sum())
    scores = torch.from_numpy(generator.normal(size=items) + 0.5 * np.log(popularity)).float()
    truth = float(scores.exp().sum())
    choices = torch.from_numpy(
        generator.choice(items, size=(trials, drawn), p=counts.numpy() / total)
    )
    log_q = negative_log_q(counts / total, drawn)
    corrected = (scores[choices] - log_q[choices]).exp().sum(dim=1)
    plain = scores[choices].exp().mean(dim=1) * items
    error = float(corrected.std()) / math.sqrt(trials)
    assert abs(float(corrected.mean()) - truth) < 4 * error
    assert abs(float(plain.mean()) / truth - 1) > 0.5


def test_negative_log_q_popular_negatives_learn_level_scores() -> None:
    """All items are relevant equally often, but four are ten times as often negatives: only logQ
    keeps their scores level.
    """
    generator = np.random.default_rng(1)
    items, drawn = 12, 64
    counts = torch.tensor([30] * 4 + [3] * 8)
    probabilities = counts.numpy() / int(counts.sum())

    def learn(corrected: bool) -> torch.Tensor:
        scores = torch.zeros(items, requires_grad=True)
        optimiser = torch.optim.Adam([scores], lr=0.05)
        for _ in range(300):
            positives = torch.from_numpy(
                generator.integers(0, items, 32)
            )  # every item is relevant equally often
            negatives = torch.from_numpy(generator.choice(items, drawn, p=probabilities))
            logits = scores[negatives].expand(32, -1)
            if corrected:
                logits = logits - negative_log_q(counts / counts.sum(), drawn)[negatives]
            logits = logits.masked_fill(random_mask(positives, negatives), MASKED)
            loss = sampled_softmax(scores[positives], logits).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return scores.detach()

    gap = [float(s[4:].mean() - s[:4].mean()) for s in (learn(True), learn(False))]
    assert abs(gap[0]) < 0.25
    assert gap[1] > 1.0
