"""Full garbage collections visit every object of every library, hundreds of thousands, and nothing is answered meanwhile.

What start-up has made stays for good, so it is set apart (``gc.freeze``) and no longer visited. A release that is dropped later is freed by
its reference counts, not by the collector: a test holds it to that.
"""

from __future__ import annotations

import gc
from typing import Any

from retrieval.live_releases import LiveReleases


def set_start_up_apart(releases: LiveReleases) -> None:
    """When the first release takes over, before it is announced: collect once more, and leave alone what is left from then on."""
    done = False

    async def once(serving: Any) -> None:
        nonlocal done
        if not done:
            done = True
            gc.collect()
            gc.freeze()

    releases.on_change.insert(0, once)
