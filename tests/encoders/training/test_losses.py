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
    in_batch_mask,
    initial_log_scale,
    negative_log_q,
    positive_log_q,
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
    """One number at a time, in double precision, straight from the formula of DESIGN section 7."""
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
def test_task_loss_equals_the_slow_loop(batch: int, randoms: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    queries, positives, negatives = (
        unit(batch, 8, seed),
        unit(batch, 8, seed + 1),
        unit(randoms, 8, seed + 2),
    )
    query_ids, positive_ids = (torch.from_numpy(generator.integers(0, 3, batch)) for _ in range(2))
    random_ids = torch.from_numpy(generator.integers(0, 3, randoms))
    in_batch_counts, random_counts = (
        torch.from_numpy(generator.integers(1, 9, n)) for n in (batch, randoms)
    )
    pair_counts = torch.from_numpy(generator.integers(1, 4, batch))
    log_q_in_batch, log_q_random = (
        negative_log_q(in_batch_counts, 50, batch - 1),
        negative_log_q(random_counts, 30, randoms),
    )
    log_q_positive = positive_log_q(pair_counts, pair_counts + 2)
    masks = (
        in_batch_mask(query_ids, positive_ids, query_ids, positive_ids),
        random_mask(positive_ids, random_ids),
    )
    matryoshka = {
        2: 0.05,
        4: 0.1,
        8: 0.5,
        99: 0.5,
    }  # prefixes of the full width or more do not count
    fast = task_loss(
        queries,
        positives,
        Negatives(positives, masks[0], log_q_in_batch),
        Negatives(negatives, masks[1], log_q_random),
        torch.tensor(5.0),
        positive_log_q=log_q_positive,
        matryoshka=matryoshka,
    )
    terms = [
        (positives, masks[0].tolist(), log_q_in_batch.tolist()),
        (negatives, masks[1].tolist(), log_q_random.tolist()),
    ]
    slow = slow_loss(queries, positives, terms, 5.0, log_q_positive.tolist(), {2: 0.05, 4: 0.1})
    assert float(fast.total) == pytest.approx(slow, rel=1e-4, abs=1e-5)


@few
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(0, 12),
)
def test_in_batch_mask_equals_the_slow_loop(pairs: list[tuple[int, int]], own: int) -> None:
    rows = pairs[: max(own, 1)]
    mask = in_batch_mask(
        *(torch.tensor(column) for side in (rows, pairs) for column in zip(*side, strict=True))
    )
    positives_of = {q: {e for query, e in [*pairs, *rows] if query == q} for q, _ in rows}
    assert mask.tolist() == [[entity in positives_of[q] for _, entity in pairs] for q, _ in rows]


def test_random_mask_hides_only_the_rows_own_positive() -> None:
    mask = random_mask(torch.tensor([7, 8]), torch.tensor([8, 9, 7, 7]))
    assert mask.tolist() == [[False, False, True, True], [True, False, False, False]]


def test_other_positives_of_the_query_stay_negatives_in_the_random_term() -> None:
    """DESIGN section 7: the in-batch term hides every positive of the query, the random term only
    the row's own.
    """
    query_ids, positive_ids = torch.tensor([0, 0]), torch.tensor([1, 2])
    assert in_batch_mask(query_ids, positive_ids, query_ids, positive_ids).all()
    assert random_mask(positive_ids, positive_ids).tolist() == [[True, False], [False, True]]


def test_sampled_softmax_is_cross_entropy() -> None:
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
def test_uniform_frequencies_are_the_plain_softmax_up_to_a_constant(count: int, items: int) -> None:
    """With C(e) = c for all e the correction is one constant, so all negatives move together: log(n
    c / N).
    """
    negatives = 6
    log_q = negative_log_q(torch.full((negatives,), count), count * items, negatives)
    torch.testing.assert_close(
        log_q, torch.full((negatives,), math.log(negatives / items)), rtol=1e-4, atol=1e-5
    )
    queries, positives, vectors = unit(4, 8, 1), unit(4, 8, 2), unit(negatives, 8, 3)
    mask = torch.zeros(4, negatives, dtype=torch.bool)
    corrected = task_loss(
        queries, positives, None, Negatives(vectors, mask, log_q), torch.tensor(3.0), matryoshka={}
    )
    logits = torch.cat(
        (
            (queries * positives).sum(1, keepdim=True) * 3,
            queries @ vectors.T * 3 - math.log(negatives / items),
        ),
        dim=1,
    )
    torch.testing.assert_close(
        corrected.total,
        F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_every_catalogue_item_once_needs_no_correction() -> None:
    log_q = negative_log_q(torch.ones(40), 40, 40)
    torch.testing.assert_close(log_q, torch.zeros(40))


def test_masked_duplicate_has_no_gradient() -> None:
    queries, positives = unit(3, 8, 0), unit(3, 8, 1)
    negatives = torch.cat((positives[:1], unit(2, 8, 2))).requires_grad_()
    mask = random_mask(torch.tensor([0, 1, 2]), torch.tensor([0, 10, 11]))
    result = task_loss(
        queries[:1], positives[:1], None, Negatives(negatives, mask[:1]), torch.tensor(20.0)
    )
    result.total.backward()
    assert negatives.grad is not None
    assert negatives.grad[0].abs().max() == 0
    assert negatives.grad[1:].abs().max() > 0


def test_all_negatives_masked_is_zero_loss_and_finite_gradient() -> None:
    queries = unit(2, 8, 0).requires_grad_()
    positives = unit(2, 8, 1)
    mask = torch.ones(2, 2, dtype=torch.bool)
    result = task_loss(queries, positives, Negatives(positives, mask), None, torch.tensor(100.0))
    result.total.backward()
    assert float(result.total.detach()) == 0.0
    assert queries.grad is not None
    assert queries.grad.abs().max() == 0


def test_no_negatives_at_all_is_zero_loss() -> None:
    assert float(sampled_softmax(torch.tensor([3.0]), torch.empty(1, 0))) == 0.0


def test_neither_term_is_refused() -> None:
    with pytest.raises(ConfigError, match="got neither"):
        task_loss(unit(1, 4, 0), unit(1, 4, 1), None, None, torch.tensor(1.0))


def test_row_weight_zero_leaves_a_row_out() -> None:
    queries, positives, negatives = unit(3, 8, 0), unit(3, 8, 1), unit(5, 8, 2)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    weighted = task_loss(
        queries,
        positives,
        None,
        Negatives(negatives, mask),
        torch.tensor(9.0),
        row_weights=torch.tensor([0.5, 0.0, 0.5]),
    )
    kept = [0, 2]
    alone = task_loss(
        queries[kept], positives[kept], None, Negatives(negatives, mask[kept]), torch.tensor(9.0)
    )
    torch.testing.assert_close(weighted.total, alone.total)


def test_temperature_starts_at_0_07_and_its_scale_stops_at_100() -> None:
    assert float(scale_of(torch.tensor(initial_log_scale()))) == pytest.approx(1 / 0.07)
    log_scale = torch.tensor(9.0, requires_grad=True)
    assert float(scale_of(log_scale)) == 100.0
    scale_of(log_scale).backward()
    assert log_scale.grad is not None
    assert float(log_scale.grad) == 0.0
    with pytest.raises(ConfigError, match="above 0, but got 0"):
        initial_log_scale(0.0)


def test_scale_and_vectors_have_the_gradients_of_the_formula() -> None:
    queries = unit(3, 6, 0).double().requires_grad_()
    log_scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, 4, dtype=torch.bool)

    def loss(q, s):
        return task_loss(
            q, unit(3, 6, 1), None, Negatives(unit(4, 6, 2), mask), scale_of(s), matryoshka={2: 0.3}
        ).total

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


def test_matryoshka_weights_are_the_papers() -> None:
    assert MATRYOSHKA_WEIGHTS == {16: 0.05, 32: 0.05, 64: 0.05, 128: 0.05}
    assert math.exp(MASKED) == 0.0


def test_positive_correction_is_zero_for_a_query_with_one_positive_and_never_raises_a_logit_the_other_way() -> (
    None
):
    assert positive_log_q(torch.tensor([3]), torch.tensor([3])).tolist() == [0.0]
    assert float(positive_log_q(torch.tensor([1]), torch.tensor([4]))) == pytest.approx(
        -math.log(4)
    )
    assert (
        float(positive_log_q(torch.tensor([9]), torch.tensor([4]))) == 0.0
    )  # an over-counted pair


def test_corrected_softmax_is_unbiased_in_a_skewed_catalogue_and_the_uncorrected_is_not() -> None:
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
    log_q = negative_log_q(counts, total, drawn)
    corrected = (scores[choices] - log_q[choices]).exp().sum(dim=1)
    plain = scores[choices].exp().mean(dim=1) * items
    error = float(corrected.std()) / math.sqrt(trials)
    assert abs(float(corrected.mean()) - truth) < 4 * error
    assert abs(float(plain.mean()) / truth - 1) > 0.5


def test_training_with_the_correction_learns_the_true_scores_and_without_it_punishes_popular_items() -> (
    None
):
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
                logits = logits - negative_log_q(counts, int(counts.sum()), drawn)[negatives]
            logits = logits.masked_fill(random_mask(positives, negatives), MASKED)
            loss = sampled_softmax(scores[positives], logits).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return scores.detach()

    gap = [float(s[4:].mean() - s[:4].mean()) for s in (learn(True), learn(False))]
    assert abs(gap[0]) < 0.25
    assert gap[1] > 1.0
