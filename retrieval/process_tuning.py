"""Keep background work and garbage collection away from requests.

A full garbage collection visits every object of every library and nothing is answered meanwhile.
Objects that start-up has made live as long as the process, so they are frozen (``gc.freeze``) and
no longer visited. A release that is dropped later is freed by its reference counts, without the
collector.
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
    """Collect and freeze the objects of start-up once the first release is active.

    That is done before the release is announced.

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
    """Lower the priority of the calling thread; on Linux each thread has its own niceness."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    except (OSError, AttributeError):
        log.debug("the background thread keeps its normal priority")
