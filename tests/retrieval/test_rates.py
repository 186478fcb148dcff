"""The rate of one token."""

import pytest

from retrieval import rates
from retrieval.errors import Overloaded
from retrieval.rates import Rate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as ``Rate`` sees it."""
    now = [1000.0]
    monkeypatch.setattr(rates.time, "monotonic", lambda: now[0])
    return now


def test_rate_allows_the_burst_then_the_rate(clock: list[float]) -> None:
    rate = Rate("web", per_second=10, burst=5)
    assert [rate.try_take() for _ in range(7)] == [True] * 5 + [False] * 2
    clock[0] += 0.1
    assert [rate.try_take(), rate.try_take()] == [True, False]
    clock[0] += 3600
    assert sum(rate.try_take() for _ in range(100)) == 5, "a rest gives no more than the burst"


def test_rate_large_call_is_let_in_and_the_next_ones_wait_for_it(clock: list[float]) -> None:
    rate = Rate("web", per_second=10, burst=5)
    rate.take(100)
    with pytest.raises(Overloaded, match="'web': 10 searches a second") as refused:
        rate.take()
    assert refused.value.retry_after_ms == pytest.approx(9600, rel=0.01)
    clock[0] += 9.5
    assert not rate.try_take()
    clock[0] += 0.2
    assert rate.try_take()
