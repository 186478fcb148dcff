"""Ask the finished release real queries, and say the three numbers that count."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoders.commands.console import say
from encoders.progress import duration
from index_builder.releases.store import ReleaseStore
from retrieval.client import RetrievalClient

WARM_UP = 10
MEASURED = 200
"""Queries that are timed, each asked once: none is answered from a cache."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of a query over gRPC, one at a time, its text encoded."""

    queries: int
    p50: float
    p99: float


def measure_latency(
    client: RetrievalClient, entity_type: str, texts: Sequence[str]
) -> Latency | None:
    """Time distinct queries; None: there are none."""
    distinct = list(dict.fromkeys(texts))[: WARM_UP + MEASURED]
    times = []
    for text in distinct:
        start = time.perf_counter_ns()
        client.retrieve(text, entity_type, 10)
        times.append((time.perf_counter_ns() - start) / 1e6)
    timed = times[WARM_UP:] or times
    if not timed:
        return None
    p50, p99 = np.percentile(timed, [50, 99]).round(2).tolist()
    return Latency(len(timed), p50, p99)


def recalls(report: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Take Recall@10 of towers and BM25 by entity type from what ``omni evaluate --json`` says."""
    found = {}
    for name, task in (report or {}).get("tasks", {}).items():
        systems = {system: facts["all"] for system, facts in task["systems"].items()}
        bm25 = systems.pop("bm25")
        (towers,) = systems.values()
        found[name] = {
            "queries": towers["queries"],
            "towers": _rounded(towers["recall@10"]["value"]),
            "bm25": _rounded(bm25["recall@10"]["value"]),
        }
    return found


def fusions(store: Path) -> dict[str, dict[str, Any]]:
    """Take what fused answers gain from the active release, by entity type."""
    with ReleaseStore(store).open_current() as release:
        facts = {
            name: entity.index.get("fusion") for name, entity in release.manifest.entities.items()
        }
    return {
        name: {
            "on": fusion["enabled"],
            "queries": fusion["queries"],
            "vectors": _rounded(fusion["dense_recall"]),
            "fused": _rounded(fusion["fused_recall"]),
        }
        for name, fusion in facts.items()
        if fusion
    }


def sizes(store: Path) -> dict[str, Any]:
    """Return the entities by type and the bytes of the active release."""
    with ReleaseStore(store).open_current() as release:
        manifest = release.manifest
        return {
            "entities": {name: entity.count for name, entity in manifest.entities.items()},
            "bytes": manifest.total_bytes(),
        }


def show(summary: Mapping[str, Any]) -> None:
    """Print recall beside BM25, latency, size and time."""
    say("\nWhat counts")
    if not summary["recall@10"]:
        say("  recall@10  not measured: no pair is held out")
    for name, recall in summary["recall@10"].items():
        say(
            f"  recall@10  {recall['towers']:.3f} beside BM25's {recall['bm25']:.3f}"
            f" ({name}, vectors alone, {recall['queries']:,} held-out queries)"
        )
    for name, fusion in summary["fusion"].items():
        if fusion["queries"]:
            say(
                f"             {fusion['vectors']:.3f} by vectors, {fusion['fused']:.3f} with words"
                f" and known queries ({name}, {fusion['queries']:,} queries):"
                f" {'served so' if fusion['on'] else 'not proved, so vectors alone are served'}"
            )
        elif fusion["on"]:
            say(f"             words count beside vectors ({name}): usual weights, not measured")
    latency = summary["latency_ms"]
    if latency is not None:
        say(
            f"  latency    p50 {latency['p50']:.2f} ms, p99 {latency['p99']:.2f} ms over gRPC"
            f" ({latency['queries']} queries, none cached)"
        )
    held = ", ".join(f"{count:,} {name}" for name, count in summary["entities"].items())
    seconds = duration(summary["total_seconds"])
    say(f"  size       {held}; {summary['bytes'] / 2**20:,.0f} MiB; {seconds} in all")


def _rounded(value: float | None) -> float:
    return round(value or 0.0, 4)
