"""Compiled parts of filtered search and of live entries; without them the rest works, slower."""

from __future__ import annotations

import importlib
from typing import Any

try:
    _engine: Any = importlib.import_module("index_builder.native._engine")
except ImportError:  # no compiler where this was installed
    _engine = None
try:
    live_scan: Any = importlib.import_module("index_builder.native._live")
    """``encode`` and ``merge`` of ``live.cpp``; None where the extension was not built."""
except ImportError:
    live_scan = None

Engine: Any = getattr(_engine, "Engine", None)
"""Searches of one entity type, see ``engine.cpp``; None where the extension was not built."""
link_records: Any = getattr(_engine, "link_records", None)
"""``link_records(vectors, dimension, graph, scale, out)``, see ``links.h``; None likewise."""
SIMD: str = getattr(_engine, "simd", "none")
"""Instruction set of the kernels: ``avx512vnni``, ``avx2``, ``plain``; ``none`` without them."""
