"""Places of a worker: taken, reserved, given back; refusals and their hints."""

import asyncio

import pytest

from retrieval.errors import DeadlinePassed, Overloaded
from retrieval.service.admission import Admission, Refusals, check_deadline


def test_admission_announce_reserves_place_until_next_loop_turn() -> None:
    async def read() -> None:
        admission = Admission(3)
        refusals = Refusals("Retrieve", admission, lambda name, labels: None)
        admission.enter()
        for _ in range(2):
            assert refusals.when_full() is None
            admission.announce()
        assert refusals.when_full() is not None, "the third place is for one who is on the way"
        await asyncio.sleep(0)
        assert refusals.when_full() is None, "who did not enter in the next turn holds nothing"

    asyncio.run(read())


def test_admission_pause_is_short_beside_the_time_inside() -> None:
    admission = Admission(1)
    for milliseconds, pause in ((0.5, 0.0), (100.0, 12.0), (5000.0, 20.0)):
        for _ in range(1000):
            admission.enter()
            admission.leave(1, milliseconds / 1e3)
        assert admission.pause_ms() == pause


def test_admission_full_refuses_with_hint_and_leaves_free_places() -> None:
    admission = Admission(10)
    assert admission.cost_of(64) == 5 and admission.cost_of(0) == 1
    for _ in range(2):
        admission.enter(5)
    with pytest.raises(Overloaded, match="all 10 places"):
        admission.enter(1)
    admission.leave(5, 0.2)
    admission.enter(1)
    admission.leave(1, 0.1)
    admission.leave(5, 0.1)
    assert admission.in_flight == 0 and admission.refused == 1 and admission.peak == 10
    check_deadline(None)
    check_deadline(0.1)
    with pytest.raises(DeadlinePassed):
        check_deadline(0.0)
