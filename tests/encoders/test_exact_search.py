"""Exact search against a slow obvious one: ties, masks, blocks, padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import ConfigError, InvalidVectors
from encoders.exact_search import count_above, exact_top_k


def slow_top_k(queries, corpus, k, mask=None):
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for i, query in enumerate(queries):
        allowed = [
            j
            for j in range(len(corpus))
            if mask is None or (mask[j] if mask.ndim == 1 else mask[i, j])
        ]
        ranked = sorted(allowed, key=lambda j: (-float(query @ corpus[j]), j))[:k]
        rows[i, : len(ranked)] = ranked
        scores[i, : len(ranked)] = [query @ corpus[j] for j in ranked]
    return rows, scores


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 5),
    st.integers(0, 40),
    st.integers(1, 12),
    st.integers(1, 50),
    st.sampled_from([None, 1, 2]),
)
def test_exact_top_k_many_ties_equals_a_slow_search(seed, b, n, k, block_rows, mask_dims):
    rng = np.random.default_rng(seed)
    # Small integers: products are exact in float32 and tie all the time.
    queries, corpus = (
        rng.integers(-1, 2, (b, 3)).astype(np.float32),
        rng.integers(-1, 2, (n, 3)).astype(np.float32),
    )
    mask = None if mask_dims is None else rng.random((n,) if mask_dims == 1 else (b, n)) < 0.6
    rows, scores = exact_top_k(queries, corpus, k, block_rows=block_rows, mask=mask)
    want_rows, want_scores = slow_top_k(queries, corpus, k, mask)
    np.testing.assert_array_equal(rows, want_rows)
    np.testing.assert_array_equal(scores, want_scores)
    assert rows.dtype == np.int64 and scores.dtype == np.float32


def test_exact_top_k_memory_map_is_read_block_by_block(tmp_path):
    rng = np.random.default_rng(0)
    corpus, queries = (
        rng.standard_normal((1000, 16)).astype(np.float32),
        rng.standard_normal((7, 16)).astype(np.float32),
    )
    np.save(tmp_path / "corpus.npy", corpus)
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    rows, scores = exact_top_k(queries, mapped, 10, block_rows=64)
    np.testing.assert_array_equal(
        rows, np.argsort(-(queries @ corpus.T), axis=1, kind="stable")[:, :10]
    )
    np.testing.assert_allclose(
        scores, np.take_along_axis(queries @ corpus.T, rows, axis=1), atol=1e-5
    )


def test_exact_top_k_dimension_mismatch_names_both_shapes():
    with pytest.raises(InvalidVectors, match=r"\(2, 4\) and \(3, 5\)"):
        exact_top_k(np.zeros((2, 4), np.float32), np.zeros((3, 5), np.float32), 1)


def test_exact_top_k_wrong_mask_or_k_is_refused():
    with pytest.raises(InvalidVectors, match=r"\(4,\)"):
        exact_top_k(
            np.zeros((2, 4), np.float32), np.zeros((3, 4), np.float32), 1, mask=np.ones(4, bool)
        )
    with pytest.raises(ConfigError, match="k=0"):
        exact_top_k(np.zeros((2, 4), np.float32), np.zeros((3, 4), np.float32), 0)


def test_count_above_ties_count_further_left_only():
    scores = torch.tensor([[2.0, 1.0, 2.0, 3.0], [1.0, 1.0, -torch.inf, 1.0]])
    limit = torch.tensor([2.0, 1.0])
    assert count_above(scores, limit, torch.tensor([2, 0])).tolist() == [2, 0]
    assert count_above(scores, limit, torch.tensor([0, 3])).tolist() == [1, 2]
    hidden = torch.tensor([-torch.inf, -torch.inf])
    assert count_above(scores, hidden, torch.tensor([0, 2])).tolist() == [4, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_exact_top_k_on_gpu_equals_cpu():
    rng = np.random.default_rng(1)
    corpus = rng.integers(-2, 3, (5000, 8)).astype(np.float32)
    queries = rng.integers(-2, 3, (50, 8)).astype(np.float32)
    for got, want in zip(
        exact_top_k(queries, corpus, 10, device="cuda"),
        exact_top_k(queries, corpus, 10),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
