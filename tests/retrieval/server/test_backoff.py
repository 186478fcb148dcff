"""Pauses before restarts."""

import pytest

from retrieval.server import backoff
from retrieval.server.backoff import Backoff


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(backoff, "time", found)
    return found


def test_backoff_pauses_double_up_to_the_longest(clock: Clock) -> None:
    pauses = Backoff(1.0, 6.0)
    found = []
    for _ in range(5):
        pauses.fail()
        found.append(pauses.remaining_seconds())
        clock.now += found[-1]
    assert found == [1.0, 2.0, 4.0, 6.0, 6.0] and pauses.remaining_seconds() == 0.0


def test_backoff_failures_during_a_pause_count_once(clock: Clock) -> None:
    pauses = Backoff(1.0, 6.0)
    for _ in range(3):
        pauses.fail()
    assert pauses.remaining_seconds() == 1.0
    clock.now += 1.0
    pauses.fail()
    assert pauses.remaining_seconds() == 2.0


@pytest.mark.parametrize("by", ["time", "reset"])
def test_backoff_after_a_calm_while_begins_anew(clock: Clock, by: str) -> None:
    pauses = Backoff(1.0, 6.0)
    for _ in range(3):
        pauses.fail()
        clock.now += pauses.remaining_seconds()
    if by == "time":
        clock.now += 12.1
    else:
        pauses.reset()
    pauses.fail()
    assert pauses.remaining_seconds() == 1.0
