"""One BLAS thread while CPU time is measured: idle workers of BLAS spin after each product, and the process's CPU time counts them."""

from __future__ import annotations

from contextlib import AbstractContextManager

from threadpoolctl import threadpool_limits


def one_blas_thread() -> AbstractContextManager[object]:
    """Keep BLAS and OpenMP of this process to one thread inside a ``with`` block."""
    limits: AbstractContextManager[object] = threadpool_limits(limits=1)
    return limits
