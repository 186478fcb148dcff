"""Blocking clients for load tests; apart from the tests, because a started process imports them."""

import time
from collections.abc import Callable

Client = tuple[Callable[[int], None], Callable[[], None]]
"""Makes the call of a number; closes."""


def slow_client(seconds: float) -> Client:
    return lambda i: time.sleep(seconds), lambda: None


def failing_client() -> Client:
    def ask(i: int) -> None:
        time.sleep(0.01)
        raise ValueError("no")

    return ask, lambda: None
