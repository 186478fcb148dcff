"""The model behind ``omni plan`` and docs/scale.md: from a size to parts, machines, memory, CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from encoders.errors import ConfigError
from retrieval.sizing import figures as measured
from retrieval.sizing.figures import INT8_GRAPH, KINDS, SYMQG, IndexFigures

GIB = 2**30
MIB = 2**20
IN_MEMORY_WHILE_SWITCHING = 2
"""Releases in a server of ``--keep-releases 1`` while it switches: the old one and the new one."""
BUSY = 0.6
"""Share of its cores that a server uses at the peak; more leaves no room for bursts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a plan is for.

    Attributes:
        entities: In all types together.
        rps: Calls a second at the peak.
        dimension: Of the vectors.
        kind: Of the index; ``auto``: symqg where it fits a machine, else int8-graph.
        cached_texts: Share of calls whose text was encoded before and is in the query cache.
        cached_answers: Share of calls whose answer is cached; their texts are, too.
        latency_ms: Most that a call with a new text may take at the median; None: anything.
        cores: Of a machine.
        memory_gib: Of a machine.
        spares: Servers that may fail at the peak.
    """

    entities: int
    rps: float
    dimension: int = measured.DIMENSION
    kind: str = "auto"
    cached_texts: float = 0.0
    cached_answers: float = 0.0
    latency_ms: float | None = None
    cores: int = 32
    memory_gib: float = 128.0
    spares: int = 1

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is out of its range.
        """
        checks = (
            ("entities", self.entities >= 1, "at least 1"),
            ("rps", self.rps > 0, "more than 0"),
            ("dimension", self.dimension >= 1, "at least 1"),
            ("kind", self.kind in ("auto", *KINDS), f"auto, {', '.join(KINDS)}"),
            ("cached_texts", 0 <= self.cached_texts <= 1, "0 to 1"),
            ("cached_answers", 0 <= self.cached_answers <= 1, "0 to 1"),
            ("cores", self.cores >= 1, "at least 1"),
            ("memory_gib", self.memory_gib > 0, "more than 0"),
            ("spares", self.spares >= 0, "0 or more"),
        )
        for name, is_right, expected in checks:
            if not is_right:
                raise ConfigError(f"{name}: expected {expected}, but got {getattr(self, name)!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a size needs.

    Attributes:
        kind: Of the index.
        fits: Whether a server's memory fits a machine.
        servers: Machines that serve, spares included.
        server_memory_gib: Of each, while it switches releases.
        server_cores: Busy at the peak, all servers together.
        call_cpu_us: Server CPU of an average call.
        new_text_ms: Median of a call with a new text on a quiet server.
        release_gib: On disk, and in the object store.
        build_memory_gib: At the peak of a build.
        build_cpu_hours: Of a full build of the indexes.
        embed_cpu_hours: Of embedding every entity once, text only.
        load_seconds: From disk to READY.
        parts: What to run.
        notes: What is extrapolated, what is not met.
    """

    kind: str
    fits: bool
    servers: int
    server_memory_gib: float
    server_cores: float
    call_cpu_us: float
    new_text_ms: float
    release_gib: float
    build_memory_gib: float
    build_cpu_hours: float
    embed_cpu_hours: float
    load_seconds: float
    parts: tuple[str, ...]
    notes: tuple[str, ...]


def plan_for(wanted: Wanted) -> Plan:
    """Work out a plan; kinds are tried in turn where ``kind`` is ``auto``."""
    kinds = (SYMQG, INT8_GRAPH) if wanted.kind == "auto" else (KINDS[wanted.kind],)
    plans = [_plan(wanted, kind) for kind in kinds]
    return next((plan for plan in plans if plan.fits), plans[-1])


def _plan(wanted: Wanted, kind: IndexFigures) -> Plan:
    size, width = wanted.entities, wanted.dimension / measured.DIMENSION
    call_us, new_text_ms = _call_cost(wanted, kind)
    memory = _server_memory_gib(wanted, kind)
    cores = wanted.rps * call_us / 1e6
    servers = math.ceil(cores / (BUSY * wanted.cores)) + wanted.spares
    fits = memory <= wanted.memory_gib
    per_entity = size * width / measured.LARGE_ENTITIES
    return Plan(
        kind=kind.kind,
        fits=fits,
        servers=servers,
        server_memory_gib=memory,
        server_cores=cores,
        call_cpu_us=call_us,
        new_text_ms=new_text_ms,
        release_gib=_disk_bytes(kind) * per_entity / GIB,
        build_memory_gib=measured.BUILD_PEAK.value * MIB * per_entity / GIB,
        build_cpu_hours=_grown(kind.build_small.value, kind.build_large.value, size) * width / 3600,
        embed_cpu_hours=size / measured.EMBED.value / 3600,
        load_seconds=measured.LOADING.value * per_entity,
        parts=_parts(kind, fits, servers, wanted),
        notes=_notes(wanted, kind, memory, new_text_ms),
    )


def _grown(small: float, large: float, entities: int) -> float:
    """Carry a figure to another size along the power of the size that joins the measured two."""
    power = math.log(large / small) / math.log(measured.LARGE_ENTITIES / measured.SMALL_ENTITIES)
    return float(small * (entities / measured.SMALL_ENTITIES) ** power)


def _search_us(kind: IndexFigures, entities: int) -> float:
    """Return the time of a search at 256 dimensions; a small corpus counts as the smallest one."""
    size = max(entities, measured.SMALL_ENTITIES)
    return _grown(kind.search_small.value, kind.search_large.value, size)


def _call_cost(wanted: Wanted, kind: IndexFigures) -> tuple[float, float]:
    """Return server CPU of an average call in us, and the median of one with a new text in ms."""
    width = wanted.dimension / measured.DIMENSION
    kept_us, searched_us = 1e6 / measured.KEPT.value, 1e6 / measured.SEARCHED.value
    more_us = _search_us(kind, wanted.entities) * width - SYMQG.search_small.value
    searched = 1 - wanted.cached_answers
    encoded = min(searched, 1 - wanted.cached_texts)
    cpu_us = kept_us + searched * max(searched_us - kept_us + more_us, 0.0)
    cpu_us += encoded * measured.ENCODE.value * 1000
    return cpu_us, measured.NEW_P50.value + more_us / 1000


def _server_memory_gib(wanted: Wanted, kind: IndexFigures) -> float:
    per_worker = measured.TWO_WORKERS.value - measured.ONE_WORKER.value
    processes = (measured.ONE_WORKER.value + (wanted.cores - 1) * per_worker) * MIB
    index = (kind.private.value + kind.mapped.value) * 1e6 * wanted.entities
    index *= wanted.dimension / measured.DIMENSION / measured.LARGE_ENTITIES
    return (processes + IN_MEMORY_WHILE_SWITCHING * index) / GIB


def _disk_bytes(kind: IndexFigures) -> float:
    """Return bytes of a release of ``LARGE_ENTITIES``; of int8-graph what a server maps of it."""
    if kind is SYMQG:
        return measured.DISK.value * MIB
    return (kind.private.value + kind.mapped.value) * 1e6


def _parts(kind: IndexFigures, fits: bool, servers: int, wanted: Wanted) -> tuple[str, ...]:
    parts = [
        f"a build machine: omni rebuild {kind.flags}",
        f"{servers} x omni serve --workers {wanted.cores} --keep-releases 1, every server with the"
        " whole index",
    ]
    if servers > 1:
        parts.insert(1, "an object store: omni release push, omni serve --store URL")
        parts.append("a balancer for gRPC before the servers")
        if wanted.cached_texts < 1:
            parts.append("Redis: query vectors that all servers share (--redis)")
    if not fits:
        parts.append(
            "or, as an index is not divided among servers: servers by entity type, or the vectors"
            " in Milvus (docs/howto/milvus.md; its machines are not planned here)"
        )
    return tuple(parts)


def _notes(
    wanted: Wanted, kind: IndexFigures, memory_gib: float, new_text_ms: float
) -> tuple[str, ...]:
    notes = []
    if wanted.entities > measured.LARGE_ENTITIES:
        notes.append(
            f"extrapolated: {wanted.entities:,} entities, measured to {measured.LARGE_ENTITIES:,};"
            " search and build time along the power of the size between 100,000 and 800,000,"
            " memory and disk in proportion"
        )
    if wanted.dimension != measured.DIMENSION:
        notes.append(
            f"extrapolated: {wanted.dimension} dimensions, measured at {measured.DIMENSION};"
            " everything of the index in proportion"
        )
    if wanted.cores > 2:
        notes.append(
            f"extrapolated: {wanted.cores} cores, measured on 2; CPU a call is taken to stay"
        )
    if kind is INT8_GRAPH:
        notes.append(
            "not measured for int8-graph: the peak of its build (that of symqg stands here) and its"
            " disk (what it maps stands here)"
        )
    if memory_gib > wanted.memory_gib:
        notes.append(
            f"does not fit: a server needs {memory_gib:,.0f} GiB while it switches releases, and a"
            f" machine has {wanted.memory_gib:,.0f}"
        )
    if wanted.latency_ms is not None and new_text_ms > wanted.latency_ms:
        notes.append(
            f"not met: a new text takes {new_text_ms:.2f} ms at the median on a quiet server, and"
            f" {wanted.latency_ms:g} were wanted"
        )
    return tuple(notes)


def scale_table() -> list[str]:
    """Return the table of docs/scale.md, as lines of Markdown."""
    lines = [
        "| entities | calls/s | index | servers | memory of each | CPU a call | busy cores"
        " | release | build: CPU, memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entities in (1_000_000, 100_000_000, 1_000_000_000):
        for rps in (100, 10_000, 300_000):
            plan = plan_for(Wanted(entities=entities, rps=rps))
            lines.append(
                f"| {entities // 1_000_000:,}M | {rps:,} | {plan.kind} | {plan.servers}"
                f" | {_gib(plan.server_memory_gib)}{'' if plan.fits else ' **(does not fit)**'}"
                f" | {plan.call_cpu_us:,.0f} us | {plan.server_cores:,.1f}"
                f" | {_gib(plan.release_gib)}"
                f" | {plan.build_cpu_hours:,.1f} h, {_gib(plan.build_memory_gib)} |"
            )
    return lines


def figures_table() -> list[str]:
    """Return the figures with their records, as lines of Markdown."""
    lines = ["| figure | value | record |", "|---|---|---|"]
    for figure in measured.all_figures():
        lines.append(
            f"| {figure.what} | {figure.value:,.6g} {figure.unit}"
            f" | `{figure.record.split('-', 3)[3]}` ({figure.record[:10]}) |"
        )
    return lines


def _gib(value: float) -> str:
    return f"{value:,.1f} GiB" if value < 100 else f"{value:,.0f} GiB"
