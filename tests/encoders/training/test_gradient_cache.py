import pytest
import torch
from torch import nn

from encoders.training.gradient_cache import Encoding


def tower(dropout: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 4)
    ).double()


def gradients(
    dropout: float, sizes: list[int], cached: bool, towers: int = 1
) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a loss that couples all rows, over chunks of these sizes."""
    models = [tower(dropout) for _ in range(towers)]
    rows = torch.randn(
        sum(sizes), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    torch.manual_seed(7)
    encodings = [Encoding(model, rows.split(sizes), cached=cached) for model in models]
    vectors = torch.cat([encoding.vectors for encoding in encodings])
    loss = torch.logsumexp(vectors @ vectors.T, dim=1).mean()
    loss.backward()
    for encoding in encodings:
        encoding.backward()
    return float(loss.detach()), [
        p.grad for model in models for p in model.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("towers", [1, 2])
def test_encoding_cached_gradients_equal_uncached(dropout: float, towers: int) -> None:
    """With dropout too: each chunk's random state is replayed in the second pass."""
    plain, plain_gradients = gradients(dropout, [3, 4, 1], cached=False, towers=towers)
    cached, cached_gradients = gradients(dropout, [3, 4, 1], cached=True, towers=towers)
    assert plain == cached
    assert len(plain_gradients) == 4 * towers
    for expected, got in zip(plain_gradients, cached_gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_encoding_other_chunks_same_gradient() -> None:
    _, whole = gradients(0.0, [8], cached=False)
    _, pieces = gradients(0.0, [1, 5, 2], cached=True)
    for expected, got in zip(whole, pieces, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_encoding_cached_vectors_hold_no_graph() -> None:
    model = tower(0.0)
    encoding = Encoding(model, [torch.ones(2, 6, dtype=torch.float64)], cached=True)
    assert encoding.vectors.is_leaf
    assert encoding.vectors.requires_grad


def test_encoding_replay_leaves_random_state() -> None:
    model = tower(0.5)
    encoding = Encoding(model, [torch.ones(2, 6, dtype=torch.float64)] * 2, cached=True)
    encoding.vectors.sum().backward()
    expected = torch.get_rng_state()
    encoding.backward()
    torch.testing.assert_close(torch.get_rng_state(), expected)


def test_encoding_without_grad_caches_nothing() -> None:
    with torch.no_grad():
        encoding = Encoding(tower(0.0), [torch.ones(2, 6, dtype=torch.float64)], cached=True)
    assert not encoding.vectors.requires_grad
    encoding.backward()


def test_encoding_frozen_tower_gets_no_gradient() -> None:
    model = tower(0.0).requires_grad_(False)
    encoding = Encoding(model, [torch.ones(2, 6, dtype=torch.float64)], cached=True)
    encoding.vectors.sum().backward()
    encoding.backward()
    assert all(p.grad is None for p in model.parameters())
