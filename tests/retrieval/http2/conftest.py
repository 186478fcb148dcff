"""Budgets of connections do not fill up while a test runs, however slow the machine is."""

import pytest

from retrieval.http2 import limits


@pytest.fixture(autouse=True)
def budget_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONTROL_FRAMES_PER_SECOND", 0)
