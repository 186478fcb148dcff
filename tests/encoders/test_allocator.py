"""Freed memory stays in the process inside the block, and goes back at its end."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from encoders.allocator import freed_memory_kept

BYTES = 256 * 2**20

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc"
)


def resident() -> int:
    """Return the bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def touch() -> None:
    torch.ones(BYTES // 4)


def test_freed_memory_kept_inside_stays_and_afterwards_goes_back() -> None:
    touch()
    before = resident()
    with freed_memory_kept():
        touch()
        inside = resident()
    assert inside - before > 0.9 * BYTES
    assert resident() - before < 0.2 * BYTES
    touch()
    assert resident() - before < 0.2 * BYTES
