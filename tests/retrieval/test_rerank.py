"""Re-ranking of a pool: maximal marginal relevance and near-duplicates."""

import numpy as np
import pytest

from retrieval.rerank import collapse_near_duplicates, maximal_marginal_relevance, rerank


def pool(count: int, seed: int, dimension: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = rng.standard_normal(dimension).astype(np.float32)
    scores = vectors @ (query / np.linalg.norm(query))
    order = np.argsort(-scores, kind="stable")
    return scores[order], vectors[order]


def slow_mmr(scores: np.ndarray, vectors: np.ndarray, k: int, trade_off: float) -> list[int]:
    chosen = [int(np.argmax(scores))]
    while len(chosen) < min(k, len(scores)):
        rest = [i for i in range(len(scores)) if i not in chosen]
        chosen.append(
            max(
                rest,
                key=lambda i: (
                    trade_off * scores[i]
                    - (1 - trade_off) * max(float(vectors[i] @ vectors[j]) for j in chosen)
                ),
            )
        )
    return chosen


@pytest.mark.parametrize("trade_off", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_maximal_marginal_relevance_random_pools_agree_with_its_definition(
    trade_off: float, seed: int
) -> None:
    scores, vectors = pool(30, seed)
    assert maximal_marginal_relevance(scores, vectors, 8, trade_off) == slow_mmr(
        scores, vectors, 8, trade_off
    )


def test_rerank_smaller_trade_off_gives_more_variety() -> None:
    scores, vectors = pool(60, 5)
    assert rerank(scores, vectors, 10, 1.0, None) == list(range(10))

    def similarity(rows: list[int]) -> float:
        return float((vectors[rows] @ vectors[rows].T).mean())

    assert similarity(rerank(scores, vectors, 10, 0.2, None)) < similarity(
        rerank(scores, vectors, 10, 1.0, None)
    )


def test_collapse_near_duplicates_pairs_keep_the_better() -> None:
    scores, vectors = pool(20, 1)
    doubled = np.repeat(vectors, 2, axis=0)
    assert collapse_near_duplicates(doubled, 0.999) == list(range(0, 40, 2))
    assert collapse_near_duplicates(vectors, 1.0) == list(range(20))
    assert rerank(scores[:0], vectors[:0], 5, 0.5, 0.5) == []
