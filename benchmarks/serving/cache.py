"""``omni bench cache``: encodes that the query cache saves, on simulated Zipf traffic.

A virtual clock drives it; the paper's scale is computed by formula.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from benchmarks.record import Measurement, out_option, write_record
from encoders.commands.console import handle_errors, json_option, print_json, print_table, stage
from retrieval.config import DAY_SECONDS
from retrieval.encoding.query_cache import QueryCache, entry_bytes

Float64 = npt.NDArray[np.float64]

PAPER_FRONT, PAPER_BEHIND = 300_000.0, 500.0
"""Requests/s before and behind the cache (arXiv 2404.16260, serving)."""
DIMENSION = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Zipf traffic: the query of rank r is asked in proportion to ``r ** -exponent``.

    A share of requests is never asked again.
    """

    requests: int = 400_000
    distinct: int = 60_000
    exponent: float = 1.0
    fresh_share: float = 0.01
    days: float = 120.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run over the second half of the traffic (the first half warms the cache)."""

    hit_rate: float
    encodes_per_1000: float
    mean_age_days: float
    p99_age_days: float
    entries: int


def zipf_ranks(traffic: Traffic) -> npt.NDArray[np.int64]:
    """Draw ranks, int64 ``(requests,)``; ranks from ``distinct`` on occur only once."""
    rng = np.random.default_rng(traffic.seed)
    weights = np.arange(1, traffic.distinct + 1, dtype=np.float64) ** -traffic.exponent
    ranks = np.searchsorted(
        np.cumsum(weights / weights.sum()), rng.random(traffic.requests)
    ).astype(np.int64)
    ranks = np.minimum(ranks, traffic.distinct - 1)
    fresh = np.flatnonzero(rng.random(traffic.requests) < traffic.fresh_share)
    ranks[fresh] = traffic.distinct + np.arange(len(fresh))
    return ranks


_ENTRY_BYTES = entry_bytes("q" * 12, 4 * DIMENSION)
"""Of the keys used here, which have about twelve letters."""


def simulate(traffic: Traffic, ttl_days: float, entries: int) -> Outcome:
    """Drive the server's own ``QueryCache`` on a virtual clock."""
    now = 0.0
    cache = QueryCache(entries * _ENTRY_BYTES, ttl_days * DAY_SECONDS, lambda: now)
    vector = np.zeros(DIMENSION, dtype=np.float32)
    step = traffic.days * DAY_SECONDS / traffic.requests
    written: dict[int, float] = {}
    hits, ages, half = 0, [], traffic.requests // 2
    for i, rank in enumerate(zipf_ranks(traffic).tolist()):
        now = i * step
        key = str(rank)
        if cache.get(key) is not None:
            if i >= half:
                hits += 1
                ages.append(now - written[rank])
        else:
            cache.put(key, vector)
            written[rank] = now
    counted = traffic.requests - half
    days = np.asarray(ages or [0.0]) / DAY_SECONDS
    return Outcome(
        hits / counted,
        1000 * (1 - hits / counted),
        float(days.mean()),
        float(np.percentile(days, 99)),
        len(cache),
    )


def misses_per_second(front: float, distinct: float, exponent: float, ttl_seconds: float) -> float:
    """Return encodes/s behind an unbounded cache: ``r / (1 + r * ttl)`` for a query of rate r.

    Ranks are summed one by one up to 10,000 and in logarithmic steps above.
    """
    head = np.arange(1.0, min(10_000.0, distinct) + 1)
    edges = (
        np.geomspace(10_001.0, max(distinct, 10_002.0), 4_000)
        if distinct > 10_000
        else np.array([])
    )
    middles = np.sqrt(edges[:-1] * edges[1:]) if len(edges) else np.array([])
    ranks, counts = (
        np.concatenate([head, middles]),
        np.concatenate([np.ones_like(head), np.diff(edges) if len(edges) else np.array([])]),
    )
    weights = ranks**-exponent
    rates = front * weights / float((weights * counts).sum())
    return float((counts * rates / (1 + rates * ttl_seconds)).sum())


def encoder_change(traffic: Traffic, entries: int, prewarm: int, windows: int = 10) -> list[float]:
    """Hit rate right after a change of the encoder, in windows of a thousandth of the traffic each.

    Args:
        traffic: The first half warms the cache under the old encoder.
        entries: Size of the cache.
        prewarm: Most frequent queries encoded again before the swap.
        windows: How many windows to report.
    """
    now = 0.0
    cache = QueryCache(entries * _ENTRY_BYTES, 30 * DAY_SECONDS, lambda: now)
    vector = np.zeros(DIMENSION, dtype=np.float32)
    step = traffic.days * DAY_SECONDS / traffic.requests
    ranks = zipf_ranks(traffic).tolist()
    half, width = traffic.requests // 2, max(1, traffic.requests // 1000)
    rates: list[float] = []
    hits = 0
    for i, rank in enumerate(ranks[: half + windows * width]):
        now = i * step
        if i == half:
            for text in reversed(cache.frequent("old/", prewarm)):
                cache.put("new/" + text, vector)
        key = f"{'old' if i < half else 'new'}/{rank}"
        if cache.get(key) is not None:
            hits += i >= half
        else:
            cache.put(key, vector)
        if i >= half and (i - half + 1) % width == 0:
            rates.append(hits / width)
            hits = 0
    return rates


@click.command("cache")
@click.option("--requests", default=400_000, show_default=True, help="Simulated requests per run.")
@out_option
@json_option
@handle_errors
def command(requests: int, out: Path, as_json: bool) -> None:
    """Study the cache: TTL x size, age of served vectors, encoder changes, the paper's 600:1.

    Traffic is simulated (Zipf) and the clock is virtual; the cache is the server's own.

    \b
    Example:
        omni bench cache --requests 100000
    """  # noqa: D301
    traffic = Traffic(requests=requests, distinct=max(1000, requests // 7))
    study: list[dict[str, Any]] = []
    with stage("time to live x size"):
        for ttl in (7.0, 30.0, 90.0):
            for share in (0.05, 0.25, 2.0):
                entries = max(10, int(share * traffic.distinct))
                study.append(
                    {"ttl_days": ttl, "entries": entries, **asdict(simulate(traffic, ttl, entries))}
                )
    with stage("encoder change"):
        entries = 2 * traffic.distinct
        changes = {
            str(n): encoder_change(traffic, entries, n)
            for n in (0, traffic.distinct // 100, traffic.distinct // 10)
        }
        steady = simulate(traffic, 30.0, entries).hit_rate
    scale = [
        {
            "distinct": distinct,
            "exponent": s,
            "ttl_days": ttl,
            "behind_per_s": misses_per_second(PAPER_FRONT, distinct, s, ttl * DAY_SECONDS),
        }
        for distinct in (1e8, 1e9)
        for s in (0.9, 1.0, 1.1)
        for ttl in (7.0, 30.0, 90.0)
    ]
    metrics = {
        "study": study,
        "steady_hit_rate": steady,
        "hit_rate_after_change": changes,
        "paper_scale_by_formula": scale,
    }
    record = write_record(
        "cache",
        Measurement(
            dataset={"name": "simulated Zipf traffic", "real": False, **asdict(traffic)},
            config={
                "dimension": DIMENSION,
                "paper_front_per_s": PAPER_FRONT,
                "paper_behind_per_s": PAPER_BEHIND,
            },
            protocol={"clock": "virtual", "warmup": "first half of the requests"},
            metrics=metrics,
            libraries=("cachetools",),
        ),
        folder=out,
    )
    if as_json:
        print_json({"record": str(record), **metrics})
        return
    print_table(
        f"SIMULATED Zipf(1.0) traffic, {requests:,} in {traffic.days:.0f} virtual days,"
        f" {traffic.distinct:,} distinct + 1% asked once",
        [
            "TTL days",
            "cache entries",
            "hit rate",
            "encodes per 1000",
            "mean age days",
            "p99 age days",
        ],
        [
            [
                r["ttl_days"],
                r["entries"],
                r["hit_rate"],
                r["encodes_per_1000"],
                r["mean_age_days"],
                r["p99_age_days"],
            ]
            for r in study
        ],
    )
    print_table(
        "SIMULATED encoder change: hit rate in the thousandths of traffic after it (steady:"
        f" {steady:.3f})",
        ["prewarmed queries", *(f"+{i + 1}" for i in range(5))],
        [[int(n), *rates[:5]] for n, rates in changes.items()],
    )
    print_table(
        f"BY FORMULA, {PAPER_FRONT:,.0f}/s in front, unbounded cache: encodes/s behind (paper:"
        f" about {PAPER_BEHIND:.0f})",
        ["distinct queries", "Zipf exponent", "TTL 7 d", "TTL 30 d", "TTL 90 d"],
        [
            [
                f"{d:.0e}",
                s,
                *(
                    round(r["behind_per_s"])
                    for r in scale
                    if r["distinct"] == d and r["exponent"] == s
                ),
            ]
            for d in (1e8, 1e9)
            for s in (0.9, 1.0, 1.1)
        ],
    )
    click.echo(
        f"record: {record.name}; ratio in front to behind in the paper:"
        f" {math.floor(PAPER_FRONT / PAPER_BEHIND)}:1",
        err=True,
    )
