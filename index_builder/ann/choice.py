"""Index kinds by name: build, load, check the CPU, and choose for ``--index auto``.

Two more places narrow the choice: ``building/plan.py`` where memory is limited, and
``search/construction.py``, which times two kinds against each other where either may win.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoders.errors import ConfigError
from index_builder.ann.cpu import cpu_features
from index_builder.ann.exact import ExactIndex
from index_builder.ann.faiss_index import FaissIndex, faiss_available, faiss_library
from index_builder.ann.hnsw import HnswIndex
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.ann.interface import AnnConfig, AnnIndex
from index_builder.ann.old_kinds import RENAMED_KINDS, RETIRED_KINDS, current_kind
from index_builder.ann.symqg import (
    MAX_DIMENSION,
    MIN_DIMENSION,
    MIN_ROWS,
    SymqgIndex,
    symqg_available,
    symqg_library,
)
from index_builder.errors import IndexFormatError, MissingExtension, UnsupportedCpu
from index_builder.native import Engine

KINDS: dict[str, type[AnnIndex]] = {
    cls.kind: cls for cls in (HnswIndex, SymqgIndex, Int8GraphIndex, ExactIndex, FaissIndex)
}
EXACT_BELOW = 2_000
"""Smaller corpora are scanned: a matrix-vector product is as fast as a graph there, and exact."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A kind of index and the reason it was chosen.

    Attributes:
        kind: What to build.
        why: One clause, which goes into the manifest.
        rival: A kind over the same graph that is faster for some corpora and queries; calibration
            queries decide.
        sketched_links: Setting of ``int8-graph``.
    """

    kind: str
    why: str
    rival: str | None = None
    sketched_links: bool = True


def missing_features(kind: str, features: frozenset[str] | None = None) -> list[str]:
    """List the CPU features that the kind needs and this CPU (or ``features``) lacks."""
    have = cpu_features() if features is None else features
    return [name for name in _class_of(kind).cpu_features if name not in have]


def require_cpu(kind: str, features: frozenset[str] | None = None) -> None:
    """Check that this CPU can search the kind.

    Raises:
        UnsupportedCpu: It cannot; the message names what is missing.
    """
    missing = missing_features(kind, features)
    if missing:
        raise UnsupportedCpu(kind, missing)


def kind_available(kind: str) -> bool:
    """Return whether this installation can build the kind: library, extension and CPU are there."""
    installed = {
        "int8-graph": Engine is not None,
        "symqg": symqg_available(),
        "faiss": faiss_available(),
    }
    return installed.get(kind, True) and not missing_features(kind)


def require_kind(kind: str) -> None:
    """Check that this installation can build the kind.

    Raises:
        MissingDependency: Its library is not installed.
        MissingExtension: It needs the compiled extension, which was not built.
        UnsupportedCpu: This CPU cannot search it.
    """
    if kind == "int8-graph" and Engine is None:
        raise MissingExtension(f"Index kind {kind!r}")
    if kind == "symqg":
        symqg_library()
    if kind == "faiss":
        faiss_library()
    if kind != "auto":
        require_cpu(kind)


def choose_kind(
    count: int,
    *,
    dimension: int = 256,
    low_memory: bool = False,
    deterministic: bool = False,
    features: frozenset[str] | None = None,
) -> Choice:
    """Choose what ``--index auto`` builds.

    Args:
        count: Distinct vectors of the corpus.
        dimension: Their width.
        low_memory: Prefer little private memory over speed.
        deterministic: The same input must give the same bytes.
        features: CPU features to plan for; this machine's by default.
    """
    if count < EXACT_BELOW:
        return Choice(
            "exact",
            f"{count:,} distinct vectors are fewer than {EXACT_BELOW:,}, so a scan is as fast as a"
            " graph",
        )
    if low_memory:
        return _choose_low_memory()
    if not symqg_available():
        return Choice("hnsw", "rabitqlib is not installed, which symqg needs; hnsw runs anywhere")
    missing = missing_features("symqg", features)
    if missing:
        return Choice(
            "hnsw", f"this CPU lacks {', '.join(missing)}, which symqg needs; hnsw runs anywhere"
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
            "the build is deterministic, and symqg draws a random rotation that cannot be seeded",
        )
    why = f"{count:,} distinct vectors: the fastest immutable index on this CPU"
    return Choice("symqg", why, None if Engine is None else "int8-graph")


def _choose_low_memory() -> Choice:
    """Choose the kind with the least private memory."""
    if Engine is None:
        return Choice(
            "hnsw",
            "little memory is preferred, but the compiled extension that int8-graph needs was not"
            " built; hnsw needs less than symqg",
        )
    return Choice(
        "int8-graph",
        "little memory is preferred: one byte a dimension and 32 links in memory, float32 only in"
        " the mapped file",
        sketched_links=False,
    )


def build_index(kind: str, vectors: np.ndarray, config: AnnConfig) -> AnnIndex:
    """Build an index of ``kind`` over ``vectors`` float32 ``(N, D)`` with unit rows.

    Raises:
        ConfigError: The kind is unknown or retired, or there are too few rows for it.
        UnsupportedCpu: This CPU cannot run it.
    """
    kind, config = current_kind(kind, config)
    require_cpu(kind)
    return _class_of(kind).build(vectors, config)


def load_index(kind: str, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> AnnIndex:
    """Load an index of ``kind`` from ``<prefix>.*``.

    Raises:
        UnsupportedCpu: This CPU cannot run it.
        IndexFormatError: Files are missing or damaged, or this version does not know the kind.
    """
    kind, config = current_kind(kind, config)
    if kind in RETIRED_KINDS:
        raise IndexFormatError(
            f"index kind {kind!r} is no longer read. Rebuild this release from its catalogue or"
            f" signals (omni rebuild --bundle ... --catalogue ...) with {RETIRED_KINDS[kind]}."
        )
    if kind not in KINDS:
        raise IndexFormatError(
            f"index kind {kind!r} is unknown to this version, which reads {', '.join(KINDS)}. Open"
            " the release with the version of omnisearchsage that wrote it, or rebuild it with"
            " this one."
        )
    require_cpu(kind)
    return _class_of(kind).load(prefix, vectors, config)


def check_kind(kind: str) -> None:
    """Check that the kind can be built.

    Raises:
        ConfigError: It is unknown or retired.
    """
    if kind in KINDS or kind in RENAMED_KINDS or kind == "auto":
        return
    instead = f" It is retired: use {RETIRED_KINDS[kind]}." if kind in RETIRED_KINDS else ""
    raise ConfigError(
        f"index kind must be one of auto, {', '.join(KINDS)}, but got {kind!r}.{instead}"
    )


def _class_of(kind: str) -> type[AnnIndex]:
    """Return the implementation of a kind; a ``ConfigError`` where it has none."""
    check_kind(kind)
    return KINDS[kind]


__all__ = [
    "EXACT_BELOW",
    "KINDS",
    "MIN_ROWS",
    "Choice",
    "build_index",
    "check_kind",
    "choose_kind",
    "cpu_features",
    "kind_available",
    "load_index",
    "missing_features",
    "require_cpu",
    "require_kind",
]
