"""Measured figures that plans of size rest on; each names its record and its place there.

All were measured at 256 dimensions and ANN recall@10 of 0.95, on a shared AMD EPYC with two cores.
"""

from __future__ import annotations

from dataclasses import dataclass

DIMENSION = 256
SMALL_ENTITIES = 100_000
LARGE_ENTITIES = 800_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number.

    Attributes:
        what: It is.
        value: In ``unit``.
        unit: Of the value.
        record: File in ``benchmarks/results``, without its ending.
        place: Keys below ``metrics``; an engine's name finds its entry in a list.
    """

    what: str
    value: float
    unit: str
    record: str
    place: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFigures:
    """What one kind of index costs.

    Attributes:
        kind: As a release names it.
        flags: Of ``omni rebuild``, which build it.
        search_small: A search of ``SMALL_ENTITIES``, one thread.
        search_large: Of ``LARGE_ENTITIES``.
        build_small: Building ``SMALL_ENTITIES``.
        build_large: Building ``LARGE_ENTITIES``.
        private: Memory of ``LARGE_ENTITIES`` that belongs to the process.
        mapped: Memory of files that it reads and that must stay cached.
    """

    kind: str
    flags: str
    search_small: Figure
    search_large: Figure
    build_small: Figure
    build_large: Figure
    private: Figure
    mapped: Figure


_SMALL = "2026-11-21-ann-in-distribution-100k"
_LARGE = "2026-11-21-ann-in-distribution-800k"


def _index(kind: str, flags: str, engine: str, values: tuple[float, ...]) -> IndexFigures:
    """Name the figures of an engine in the two records; ``values`` in the order of the fields."""
    named = (
        ("search of 100,000", "us", _SMALL, "us@0.95"),
        ("search of 800,000", "us", _LARGE, "us@0.95"),
        ("build of 100,000", "CPU s", _SMALL, "build_cpu_s"),
        ("build of 800,000", "CPU s", _LARGE, "build_cpu_s"),
        ("private memory of 800,000", "MB", _LARGE, "private_mb"),
        ("mapped memory of 800,000", "MB", _LARGE, "mapped_mb"),
    )
    figures = [
        Figure(
            what=f"{kind}: {what}",
            value=value,
            unit=unit,
            record=record,
            place=("results", engine, key),
        )
        for (what, unit, record, key), value in zip(named, values)
    ]
    return IndexFigures(
        kind=kind,
        flags=flags,
        search_small=figures[0],
        search_large=figures[1],
        build_small=figures[2],
        build_large=figures[3],
        private=figures[4],
        mapped=figures[5],
    )


SYMQG = _index("symqg", "--index symqg", "ours auto", (40.9, 54.6, 27.8, 326.8, 1910.5, 23.3))
INT8_GRAPH = _index(
    "int8-graph",
    "--index int8-graph --no-sketched-links",
    "ours lean",
    (76.1, 106.7, 27.7, 273.4, 17.5, 1117.5),
)
KINDS = {figures.kind: figures for figures in (SYMQG, INT8_GRAPH)}

SEARCHED = Figure(
    what="a call with a cached text that is searched, 100,000 in symqg",
    value=4972.077777777777,
    unit="calls per CPU s",
    record="2026-11-28-serve",
    place=("echo", "cached_retrieve", "per_server_cpu_second"),
)
KEPT = Figure(
    what="a call whose answer is cached",
    value=10674.802267795909,
    unit="calls per CPU s",
    record="2026-11-28-serve",
    place=("echo", "kept_cached_retrieve", "per_server_cpu_second"),
)
ENCODE = Figure(
    what="encoding one query, int8, batch of one",
    value=0.5299,
    unit="ms",
    record="2026-11-21-encode",
    place=("query_at_batch_1", "onnx-int8", "p50_ms"),
)
NEW_P50 = Figure(
    what="a call with a new text, one client, 77,256 in symqg, p50",
    value=1.0166,
    unit="ms",
    record="2026-11-21-latency",
    place=("1", "query", "encoded", "client", "p50"),
)
ONE_WORKER = Figure(
    what="memory of a server with one worker, an index of 100,000 included",
    value=670,
    unit="MiB",
    record="2026-11-21-serve-workers",
    place=("workers", "memory_mib", "one"),
)
TWO_WORKERS = Figure(
    what="the same with two workers",
    value=1025,
    unit="MiB",
    record="2026-11-21-serve-workers",
    place=("workers", "memory_mib", "several"),
)
EMBED = Figure(
    what="embedding entities, text only, one core",
    value=14220,
    unit="entities per CPU s",
    record="2026-11-21-encode",
    place=("figures", "text only cpu fp32", "rows_per_core_second"),
)
BUILD_PEAK = Figure(
    what="private memory at the peak of a build of 800,000, symqg",
    value=4835.3,
    unit="MiB",
    record="2026-11-22-build-800k",
    place=("peak_private_mib",),
)
DISK = Figure(
    what="a release of 800,000 on disk, symqg",
    value=2652.9,
    unit="MiB",
    record="2026-11-22-build-800k",
    place=("disk_mib",),
)
LOADING = Figure(
    what="loading a release of 800,000, checked",
    value=4.701,
    unit="s",
    record="2026-11-22-build-800k",
    place=("loading_seconds",),
)
GENERAL = (
    SEARCHED,
    KEPT,
    ENCODE,
    NEW_P50,
    ONE_WORKER,
    TWO_WORKERS,
    EMBED,
    BUILD_PEAK,
    DISK,
    LOADING,
)


def all_figures() -> list[Figure]:
    """Return every figure, those of the kinds first."""
    of_kinds = [
        figure
        for kind in KINDS.values()
        for figure in (
            kind.search_small,
            kind.search_large,
            kind.build_small,
            kind.build_large,
            kind.private,
            kind.mapped,
        )
    ]
    return [*of_kinds, *GENERAL]
