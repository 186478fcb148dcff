"""The process beside a server that follows a store at a URL (``index_builder.remote.watch``)."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from index_builder.errors import RemoteUnreachable
from index_builder.releases.store import CURRENT_NAME, ReleaseStore
from index_builder.remote.watch import claim_cache, read_status
from retrieval.config import ServeConfig

log = logging.getLogger(__name__)

FIRST_LOOK_SECONDS = 120.0
"""How long a server without a cached release waits to hear whether the URL can be reached."""


@contextmanager
def following_remote_store(config: ServeConfig) -> Iterator[None]:
    """Pull what becomes active at ``config.remote_store`` into ``config.releases`` meanwhile.

    In a process of its own: neither a slow network nor checksums take time from calls, and workers
    can be forked. It ends when its standard input does, so that it never outlives the server.

    Raises:
        RemoteUnreachable: The URL cannot be reached, and the cache holds no release.
        ReleaseError: The folder is not a cache of this URL.
    """
    url = config.remote_store
    if url is None:
        yield
        return
    claim_cache(config.releases, url)
    arguments = (
        url,
        str(config.releases),
        str(config.remote_poll_seconds),
        str(config.keep_releases + 1),
    )
    started = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "index_builder.remote.watch", *arguments],
        stdin=subprocess.PIPE,
        start_new_session=True,  # what interrupts the server in a terminal lets it drain first
    )
    assert process.stdin is not None
    log.info("following %s, process %d, cache %s", url, process.pid, config.releases)
    try:
        if not (ReleaseStore(config.releases).releases / CURRENT_NAME).exists():
            _require_reached(config.releases, url, started)
        yield
    finally:
        process.stdin.close()
        process.wait()


def _require_reached(cache: Path, url: str, started: float) -> None:
    """Wait for the first look; raise if it failed: there is nothing to serve."""
    until = started + FIRST_LOOK_SECONDS
    while time.time() < until:
        status = read_status(cache, url)
        if status.looked >= started and status.reached < started:
            raise RemoteUnreachable(
                f"nothing can be served: the cache {cache} holds no release yet, and none can be"
                f" pulled: {status.error}"
            )
        if status.reached >= started:
            return
        time.sleep(0.05)
