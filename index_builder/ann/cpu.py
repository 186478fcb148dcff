"""Instruction sets of this machine's CPU."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def cpu_features() -> frozenset[str]:
    """Read this CPU's feature flags from ``/proc/cpuinfo``; none where that file does not exist."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())
