"""Keep the memory that a loop frees and asks for again, in place of handing it back each time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Names and numbers of malloc.h (glibc); the thresholds afterwards are the highest that glibc's
# own rule arrives at.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
_UNLIMITED = 2**31 - 1
_USUAL_MMAP_MAX = 65_536
_HIGHEST_MMAP_THRESHOLD = 32 * 2**20


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed blocks of every size in the process while the block runs (glibc; else nothing).

    The usual allocator maps each large tensor anew and the kernel clears its pages: a training
    step asks for the same sizes again and again. The peak is that of the loop; what is free at the
    end is given back. For the whole process.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, _UNLIMITED)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, _USUAL_MMAP_MAX)
        libc.mallopt(M_MMAP_THRESHOLD, _HIGHEST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * _HIGHEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)
