"""Waiting for conditions: however busy the machine, a test goes on as soon as they hold."""

import asyncio
import time
from collections.abc import Callable

PATIENCE_SECONDS = 60.0
"""How long a condition that should hold at once may take on a machine full of other work."""
PAUSE_SECONDS = 0.01


def until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Return once the condition holds; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen within {seconds:.0f} s"
        time.sleep(PAUSE_SECONDS)


async def until_async(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Let the event loop run until the condition holds; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen within {seconds:.0f} s"
        await asyncio.sleep(PAUSE_SECONDS)
