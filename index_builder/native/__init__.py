"""The compiled part: 8-bit scans and filter-aware graph walks; without it everything works, only filters are slower."""

from __future__ import annotations

import importlib
from typing import Any

try:
    _engine: Any = importlib.import_module("index_builder.native._engine")
except ImportError:  # no compiler where this was installed
    _engine = None

Engine: Any = getattr(_engine, "Engine", None)
SIMD: str = getattr(_engine, "simd", "none")
"""Instruction set chosen for this CPU: ``avx512vnni``, ``avx2``, ``plain``, or ``none`` where the extension was not built."""
