"""Servers under the same load in turns: rates, percentiles, and calls per CPU second of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.serving.load import Load, Outcome
from benchmarks.serving.peer_servers import Process
from encoders.commands.console import say
from encoders.errors import OmniError


class BenchFailed(OmniError):
    """A figure could not be taken."""


def median_of(rounds: Sequence[Outcome]) -> dict[str, Any]:
    """Median over rounds of rate and percentiles; errors summed."""
    rows = [outcome.summary() for outcome in rounds]
    merged: dict[str, Any] = {
        name: median(float(row[name]) for row in rows)
        for name in ("requests_per_second", "p50_ms", "p95_ms", "p99_ms")
    }
    return {**merged, "errors": sum(int(row["errors"]) for row in rows), "rounds": rows}


class Plan(NamedTuple):
    """How servers are loaded in turns."""

    concurrencies: Sequence[int]
    rounds: int
    seconds: float


def compare(
    runs: dict[str, Callable[[Load], Outcome]], servers: dict[str, Process], plan: Plan
) -> dict[str, dict[int, dict[str, Any]]]:
    """Run every side at every concurrency, in turns within a round, so that noise hits both alike.

    Beside rate and percentiles, each figure holds the requests per CPU second of the server
    process: on a machine that is busy with other work it says what the wall clock cannot.
    """
    per_cpu: dict[str, dict[int, list[float]]] = {
        side: {c: [] for c in plan.concurrencies} for side in runs
    }
    outcomes: dict[str, dict[int, list[Outcome]]] = {
        side: {c: [] for c in plan.concurrencies} for side in runs
    }
    for concurrency in plan.concurrencies:
        for number in range(plan.rounds):
            order = list(runs) if number % 2 == 0 else list(runs)[::-1]
            for side in order:
                before = servers[side].cpu_seconds()
                outcome = runs[side](
                    Load(concurrency=concurrency, seconds=plan.seconds, warmup_seconds=0.0)
                )
                per_cpu[side][concurrency].append(
                    len(outcome.latencies_ms) / max(1e-3, servers[side].cpu_seconds() - before)
                )
                if not len(outcome.latencies_ms):
                    raise BenchFailed(
                        f"{side} answered nothing at concurrency {concurrency}: {outcome.errors}"
                    )
                outcomes[side][concurrency].append(outcome)
                say(
                    f"{side}, concurrency {concurrency}: {outcome.summary()},"
                    f" {per_cpu[side][concurrency][-1]:.0f} per server CPU second"
                )
    return {
        side: {
            c: {
                **median_of(found),
                "per_server_cpu_second": median(per_cpu[side][c]),
                "per_server_cpu_second_by_round": per_cpu[side][c],
            }
            for c, found in by.items()
        }
        for side, by in outcomes.items()
    }
