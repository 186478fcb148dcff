"""What a server says of the store at a URL that it follows."""

from __future__ import annotations

import math
import time

from index_builder.remote.watch import read_status
from retrieval.config import ServeConfig
from retrieval.observability.metric_catalogue import Labels


def nothing_active(config: ServeConfig) -> str:
    """Say why no release is active, and what to do."""
    if config.remote_store is None:
        return (
            "no release is active in the store. Publish one with `omni rebuild`, or `omni release"
            " activate RELEASE_ID`"
        )
    status = read_status(config.releases, config.remote_store)
    reason = status.error
    if not reason and status.reached:
        reason = "it is being pulled, or none is active there yet (`omni release push`)"
    return f"no release has come from {config.remote_store} yet: {reason or 'it does not answer'}"


def remote_measurements(config: ServeConfig) -> list[tuple[str, Labels, float]]:
    """Say how a store at a URL is followed; nothing where there is none."""
    if config.remote_store is None:
        return []
    status = read_status(config.releases, config.remote_store)
    age = time.time() - status.reached if status.reached else math.inf
    return [
        ("omni_store_age_seconds", (), age),
        ("omni_store_failing", (), float(bool(status.error))),
    ]
