import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from encoders.towers.hash_embedding import hash_rows, sum_bags


def test_hash_rows_equal_pinned_values():
    """The hash functions are part of every saved model."""
    assert hash_rows(4, 100_000).tolist() == GOLDEN_ROWS
    assert hash_rows(1_000_000, 100_000)[999_999].tolist() == GOLDEN_LAST_ROW


GOLDEN_ROWS = [[7535, 22465], [48110, 39053], [3978, 58618], [10592, 74487]]
GOLDEN_LAST_ROW = [96108, 88308]


def test_hash_rows_are_even_and_independent():
    rows = hash_rows(200_000, 1_000)
    for column in rows.T:
        counts = np.bincount(column, minlength=1_000)
        assert counts.min() > 130 and counts.max() < 275  # 200 expected, standard deviation 14
    assert abs((rows[:, 0] == rows[:, 1]).mean() - 1e-3) < 4e-4
    assert (
        len(np.unique(rows[:, 0].astype(np.int64) * 1_000 + rows[:, 1])) > 0.89 * 200_000
    )  # few tokens share both rows


def slow_sums(table, rows, weights, offsets):
    sums = [
        sum((weights[j] * table[rows[j]] for j in range(a, b)), start=torch.zeros(table.shape[1]))
        for a, b in itertools.pairwise(offsets)
    ]
    return torch.stack(sums) if sums else table.new_zeros(0, table.shape[1])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.integers(0, 4), max_size=5),
    st.integers(0, 2**31),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_hash_embedding_sums_and_gradients_equal_slow_loop(table_rows, lengths, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
    rows = torch.randint(0, table_rows, (total,), generator=generator).to(dtype)
    upstream = torch.randn(len(lengths), 3, generator=generator)
    results = []
    for function in (sum_bags, lambda t, r, w, o: slow_sums(t, r.tolist(), w, o.tolist())):
        table = torch.randn(
            table_rows, 3, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        weights = torch.randn(total, generator=torch.Generator().manual_seed(2)).requires_grad_()
        sums = function(table, rows, weights, offsets)
        loss = (sums * upstream).sum() + 0 * table.sum() + 0 * weights.sum()
        loss.backward()
        results.append((sums.detach(), table.grad, weights.grad))
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_hash_embedding_gradients_equal_pytorch():
    generator = torch.Generator().manual_seed(0)
    table, weights = torch.randn(50, 16, generator=generator), torch.randn(400, generator=generator)
    rows = torch.randint(0, 50, (400,), generator=generator, dtype=torch.int32)
    offsets = torch.tensor([0, 0, 100, 100, 399, 400], dtype=torch.int32)
    gradients = []
    for ours in (True, False):
        t, w = table.clone().requires_grad_(), weights.clone().requires_grad_()
        sums = (
            sum_bags(t, rows, w, offsets)
            if ours
            else functional.embedding_bag(rows, t, offsets[:-1], mode="sum", per_sample_weights=w)
        )
        sums.square().sum().backward()
        gradients.append((t.grad, w.grad))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_hash_embedding_backward_is_repeatable_bitwise():
    def run():
        generator = torch.Generator().manual_seed(0)
        table, weights = (
            torch.randn(100, 32, generator=generator).requires_grad_(),
            torch.randn(5_000, generator=generator).requires_grad_(),
        )
        rows = torch.randint(0, 100, (5_000,), generator=generator, dtype=torch.int32)
        sum_bags(
            table, rows, weights, torch.arange(0, 5_001, 50, dtype=torch.int32)
        ).square().sum().backward()
        return table.grad, weights.grad

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hash_embedding_on_gpu_equals_cpu():
    generator = torch.Generator().manual_seed(0)
    table, weights = torch.randn(50, 16, generator=generator), torch.randn(400, generator=generator)
    rows = torch.randint(0, 50, (400,), generator=generator, dtype=torch.int32)
    offsets = torch.tensor([0, 0, 100, 100, 399, 400], dtype=torch.int32)
    gradients = []
    for device in ("cpu", "cuda"):
        t, w = (
            table.clone().to(device).requires_grad_(),
            weights.clone().to(device).requires_grad_(),
        )
        sum_bags(t, rows.to(device), w, offsets.to(device)).square().sum().backward()
        gradients.append((t.grad.cpu(), w.grad.cpu()))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
