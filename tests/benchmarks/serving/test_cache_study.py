import numpy as np
import pytest

from benchmarks.serving.cache import (
    Traffic,
    encoder_change,
    misses_per_second,
    simulate,
    zipf_ranks,
)

SMALL = Traffic(requests=20_000, distinct=2_000, fresh_share=0.0, days=30.0)


def test_simulate_hit_rate_equals_formula() -> None:
    """With a cache that never evicts by size, the simulated encodes/s are those of r / (1 + r *
    ttl), summed over queries.
    """
    front = SMALL.requests / (SMALL.days * 86_400)
    expected = misses_per_second(front, SMALL.distinct, SMALL.exponent, 3 * 86_400) / front
    assert 1 - simulate(SMALL, 3.0, 10_000).hit_rate == pytest.approx(expected, rel=0.08)


def test_simulate_longer_life_and_more_room_raise_hit_rate() -> None:
    short, long = simulate(SMALL, 1.0, 10_000), simulate(SMALL, 10.0, 10_000)
    assert short.hit_rate < long.hit_rate and short.mean_age_days < long.mean_age_days <= 10.0
    assert (
        simulate(SMALL, 10.0, 100).hit_rate < long.hit_rate
        and simulate(SMALL, 10.0, 100).entries <= 100
    )


def test_encoder_change_prewarming_keeps_hit_rate() -> None:
    cold, warm = (np.mean(encoder_change(SMALL, 10_000, n, windows=20)) for n in (0, 500))
    assert warm > cold + 0.2


def test_zipf_ranks_are_replayable_and_fresh_queries_unique() -> None:
    traffic = Traffic(requests=5_000, distinct=100, fresh_share=0.2)
    ranks = zipf_ranks(traffic)
    np.testing.assert_array_equal(ranks, zipf_ranks(traffic))
    fresh = ranks[ranks >= 100]
    assert len(fresh) == len(set(fresh.tolist())) > 800
