"""Compiled parts of filtered search, live entries and words; without them the rest is slower."""

from __future__ import annotations

import importlib
import os
from typing import Any

from encoders.errors import ConfigError

SIMD_LIMIT = "OMNI_SIMD"
"""Environment variable: the best kernels to use, for tests of those that this CPU would not take.

One of ``plain``, ``avx2`` and ``avx512vnni``; what the CPU has, where it is not set.
"""
_LIMITS = ("plain", "avx2", "avx512vnni")
if os.environ.get(SIMD_LIMIT, "") not in ("", *_LIMITS):
    raise ConfigError(
        f"{SIMD_LIMIT} must be one of {', '.join(_LIMITS)}, or not set, but got"
        f" {os.environ[SIMD_LIMIT]!r}."
    )

try:
    _engine: Any = importlib.import_module("index_builder.native._engine")
except ImportError:  # no compiler where this was installed
    _engine = None
try:
    live_scan: Any = importlib.import_module("index_builder.native._live")
    """``encode`` and ``merge`` of ``live.cpp``; None where the extension was not built."""
except ImportError:
    live_scan = None
try:
    _lexical: Any = importlib.import_module("index_builder.native._lexical")
except ImportError:
    _lexical = None

Engine: Any = getattr(_engine, "Engine", None)
"""Searches of one entity type, see ``engine.cpp``; None where the extension was not built."""
link_records: Any = getattr(_engine, "link_records", None)
"""``link_records(vectors, dimension, graph, scale, out)``, see ``links.h``; None likewise."""
carry_graph: Any = getattr(_engine, "carry_graph", None)
"""Links of a changed corpus from those of an earlier one, see ``carry.h``; None likewise."""
carry_link_records: Any = getattr(_engine, "carry_link_records", None)
"""``link_records`` that copies what an earlier corpus had, see ``carry.h``; None likewise."""
SIMD: str = getattr(_engine, "simd", "none")
"""Instruction set of the kernels: ``avx512vnni``, ``avx2``, ``plain``; ``none`` without them."""
Postings: Any = getattr(_lexical, "Postings", None)
"""Searches of posting lists, see ``lexical.cpp``; None where the extension was not built."""
