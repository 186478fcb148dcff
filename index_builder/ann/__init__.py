"""Approximate nearest neighbour indexes behind one interface."""

from index_builder.ann.choice import (
    KINDS,
    Choice,
    build_index,
    choose_kind,
    cpu_features,
    load_index,
    missing_features,
    require_cpu,
)
from index_builder.ann.interface import AnnConfig, AnnIndex

__all__ = [
    "KINDS",
    "AnnConfig",
    "AnnIndex",
    "Choice",
    "build_index",
    "choose_kind",
    "cpu_features",
    "load_index",
    "missing_features",
    "require_cpu",
]
