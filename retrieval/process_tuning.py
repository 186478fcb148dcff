"""Keep background work and garbage collection away from requests.

A full garbage collection visits every object of every library and nothing is answered meanwhile.
What start-up has made stays for good, so it is frozen (``gc.freeze``) and no longer visited. A
release that is dropped later is freed by its reference counts, not by the collector: a test holds
it to that.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

log = logging.getLogger(__name__)


def freeze_start_up_objects(on_change: list[Callable[[Any], Awaitable[None]]]) -> None:
    """Collect and freeze start-up's objects when the first release takes over, before it is announced.

    Args:
        on_change: The hooks that a change of the active release calls in order
            (``LiveReleases.on_change``).
    """
    done = False

    async def once(serving: Any) -> None:
        nonlocal done
        if not done:
            done = True
            gc.collect()
            gc.freeze()

    on_change.insert(0, once)


def lower_thread_priority() -> None:
    """Give the calling thread the lowest claim on the core; Linux gives each thread its own niceness."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    except (OSError, AttributeError):
        log.debug("the background thread keeps its normal priority")
