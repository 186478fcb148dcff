"""Which kind of index to build: all kinds by name, what this CPU can run, and the choice of ``auto`` with its reason."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoders.errors import ConfigError
from index_builder.ann.exact import ExactIndex
from index_builder.ann.faiss_index import FaissHnswIndex, FaissIvfIndex
from index_builder.ann.hnsw import HnswIndex
from index_builder.ann.interface import AnnConfig, AnnIndex
from index_builder.ann.lean import LeanIndex
from index_builder.ann.rabitq import RabitqIndex
from index_builder.ann.swift import SwiftIndex
from index_builder.ann.symqg import (
    MAX_DIMENSION,
    MIN_DIMENSION,
    MIN_ROWS,
    SymqgIndex,
    symqg_available,
)
from index_builder.errors import IndexFormatError, UnsupportedCpu
from index_builder.native import Engine

KINDS: dict[str, type[AnnIndex]] = {
    cls.kind: cls
    for cls in (
        HnswIndex,
        SymqgIndex,
        RabitqIndex,
        LeanIndex,
        SwiftIndex,
        ExactIndex,
        FaissHnswIndex,
        FaissIvfIndex,
    )
}
EXACT_BELOW = 2_000
"""Corpora smaller than this are scanned: one matrix-vector product is as fast as a graph there and always right."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A kind of index and the reason it was chosen.

    Attributes:
        kind: What to build.
        why: For people.
        rival: A kind over the same graph that is faster for some corpora and queries; calibration
            queries decide.
    """

    kind: str
    why: str
    rival: str | None = None


@functools.cache
def cpu_features() -> frozenset[str]:
    """Instruction set names of this CPU as /proc/cpuinfo spells them; empty where that file does not exist."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def missing_features(kind: str, features: frozenset[str] | None = None) -> list[str]:
    """CPU features the kind needs and this CPU (or ``features``) lacks."""
    have = cpu_features() if features is None else features
    return [name for name in _kind(kind).cpu_features if name not in have]


def require_cpu(kind: str, features: frozenset[str] | None = None) -> None:
    """Check that this CPU can search the kind.

    Raises:
        UnsupportedCpu: It cannot; the message names what is missing.
    """
    missing = missing_features(kind, features)
    if missing:
        raise UnsupportedCpu(kind, missing)


def choose_kind(
    count: int,
    *,
    dimension: int = 256,
    lean: bool = False,
    deterministic: bool = False,
    features: frozenset[str] | None = None,
) -> Choice:
    """What ``--index auto`` builds.

    Args:
        count: Distinct vectors of the corpus.
        dimension: Their width.
        lean: Prefer at most 0.6 kB of private memory a vector over speed.
        deterministic: The same input must give the same bytes.
        features: CPU features to plan for; this machine's by default.
    """
    if count < EXACT_BELOW:
        return Choice(
            "exact",
            f"{count:,} vectors are fewer than {EXACT_BELOW:,}: an exact scan is as fast as a graph"
            " and never wrong",
        )
    if lean and Engine is not None:
        return Choice(
            "lean",
            "the lean profile was asked for: one byte a dimension and 32 links in memory, float32"
            " only in the mapped file",
        )
    if not symqg_available():
        return Choice(
            "hnsw",
            "rabitqlib is not installed, so symqg and rabitq are not available; hnsw runs anywhere",
        )
    kind = "rabitq" if lean else "symqg"
    missing = missing_features(kind, features)
    if missing:
        return Choice(
            "hnsw", f"this CPU lacks {', '.join(missing)}, which {kind} needs; hnsw runs anywhere"
        )
    if lean:
        return Choice(
            "rabitq",
            "the lean profile was asked for and the extension of 'lean' was not compiled: 8 bits a"
            " dimension, no float32 in memory",
        )
    if not MIN_DIMENSION <= dimension <= MAX_DIMENSION:
        return Choice(
            "hnsw",
            f"symqg needs {MIN_DIMENSION} to {MAX_DIMENSION:,} dimensions, and the vectors have"
            f" {dimension}",
        )
    if deterministic:
        return Choice(
            "hnsw",
            "a deterministic build was asked for, and symqg draws a random rotation that cannot be"
            " seeded",
        )
    why = (
        f"{count:,} vectors: the fastest immutable base on this CPU; live entries and tombstones"
        " are kept beside it"
    )
    return Choice("symqg", why, None if Engine is None else "swift")


def build_index(kind: str, vectors: np.ndarray, config: AnnConfig) -> AnnIndex:
    """Build an index of ``kind`` over ``vectors`` float32 ``(N, D)`` with unit rows.

    Raises:
        ConfigError: The kind is unknown, or too few rows for it.
        UnsupportedCpu: This CPU cannot run it.
    """
    require_cpu(kind)
    return _kind(kind).build(vectors, config)


def load_index(kind: str, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> AnnIndex:
    """Load an index of ``kind`` from ``<prefix>.*``.

    Raises:
        UnsupportedCpu: This CPU cannot run it.
        IndexFormatError: Files are missing or damaged, or this version does not know the kind.
    """
    if kind not in KINDS:
        raise IndexFormatError(
            f"index kind {kind!r} is unknown to this version, which reads {', '.join(KINDS)}. Open"
            " the release with the version of omnisearchsage that wrote it, or rebuild it with"
            " this one."
        )
    require_cpu(kind)
    return _kind(kind).load(prefix, vectors, config)


def _kind(kind: str) -> type[AnnIndex]:
    if kind not in KINDS:
        raise ConfigError(f"index kind must be one of auto, {', '.join(KINDS)}, but got {kind!r}.")
    return KINDS[kind]


__all__ = [
    "EXACT_BELOW",
    "KINDS",
    "MIN_ROWS",
    "Choice",
    "build_index",
    "choose_kind",
    "cpu_features",
    "load_index",
    "missing_features",
    "require_cpu",
]
