"""``omni bench recall-contract``: what searches claim about their recall, against what it is.

Real vectors and corpora that codes and graphs find hard, every plan, filters of several
selectivities and kinds, live writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import polars as pl

from benchmarks.index.engines import one_blas_thread
from benchmarks.index.vectors import load_vectors
from benchmarks.record import Measurement, out_option, write_record
from encoders.commands.console import (
    data_option,
    fail,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.datasets.dataset import load_sample
from encoders.towers.pretrained_models import create_query_encoder
from index_builder.ann import AnnConfig
from index_builder.live_log.records import LiveEntry
from index_builder.search.calibration import TIE
from index_builder.search.entity_index import EntityIndex, IndexConfig
from index_builder.search.live_state import LiveBase, LiveState

K = 10
SPACE = "ab" * 32
FILTERS = ("none", "with", "against", "apart", "independent")
SHARES = (0.5, 0.2, 0.05)
GROUPS = 20
CALIBRATION_QUERIES = 400
DEVIATIONS = 3.3
"""Standard errors of an interval: of several hundred cells none is outside by chance (99.9%)."""


class CorpusOfBench(NamedTuple):
    """Unit rows of one shape."""

    name: str
    vectors: np.ndarray
    queries: np.ndarray
    calibration: np.ndarray


@dataclass(frozen=True, slots=True)
class Cell:
    """One corpus, kind of index, target and kind of filter; figures are means over queries.

    Attributes:
        corpus: Its name.
        kind: Of the index.
        target: ``min_recall`` of the requests; None: the default, 0.95.
        filter: Kind of the filter, and the share of rows that it passes.
        plans: Plan -> answers by it.
        claimed: Mean ``estimated_recall`` of the answers that claim one; None: none does.
        recall: Mean true recall@10 by exact scan.
        low: Lower end of its interval.
        high: Upper end.
        holds: Whether nothing is claimed above the interval and the target is not above it.
        us: Median microseconds of a search.
    """

    corpus: str
    kind: str
    target: float | None
    filter: str
    plans: dict[str, int]
    claimed: float | None
    recall: float
    low: float
    high: float
    holds: bool
    us: float


def unit(rows: np.ndarray) -> np.ndarray:
    """Divide rows by their norms; float32."""
    norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray((rows / norms).astype(np.float32))


def hard_corpora(size: int, queries: int, dimensions: tuple[int, ...]) -> Iterator[CorpusOfBench]:
    """Make the corpora that are hard on purpose."""
    total = size + queries + CALIBRATION_QUERIES
    for dimension in dimensions:
        rng = np.random.default_rng(dimension)
        noise = rng.standard_normal((total, dimension)).astype(np.float32)
        centres = unit(rng.standard_normal((GROUPS, dimension)))
        near = centres[rng.integers(GROUPS, size=total)]
        for cosine in (0.99, 0.9999):
            spread = np.float32((1 / cosine - 1) ** 0.5 / dimension**0.5)
            yield _split(f"groups {cosine}, {dimension}-d", unit(near + spread * noise), queries)
        dominant = noise.copy()
        dominant[:, 0] = 5 * dimension**0.5
        yield _split(f"dominant component, {dimension}-d", unit(dominant), queries)
        slope = np.arange(1, dimension + 1, dtype=np.float32) ** -1.0
        yield _split(f"power law, {dimension}-d", unit(noise * slope), queries)
        copies = noise.copy()
        copies[size * 2 // 5 : size] = copies[
            rng.integers(size * 2 // 5, size=size - size * 2 // 5)
        ]
        yield _split(f"60% duplicates, {dimension}-d", unit(copies * slope**0.5), queries)


def real_corpus(data_dir: Path | None, size: int, queries: int) -> CorpusOfBench:
    """Embed real texts: WordLlama over ``large``, or the shipped tower over the sample."""
    if data_dir is not None:
        loaded = load_vectors(data_dir, size=size)
        corpus, asked = loaded.corpus, loaded.queries[:queries]
        return CorpusOfBench(
            "WordLlama texts", corpus, asked, loaded.calibration[:CALIBRATION_QUERIES]
        )
    texts = load_sample().pairs["query"].unique(maintain_order=True).to_list()
    encoder = create_query_encoder("tiny-multilingual")
    vectors = np.unique(
        unit(np.asarray(encoder.encode(texts[: size + queries + CALIBRATION_QUERIES], 512))), axis=0
    )
    vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    return _split("sample queries, tiny-multilingual", vectors, queries)


def _split(name: str, rows: np.ndarray, queries: int) -> CorpusOfBench:
    """Hold out the last rows, some as queries and some for calibration."""
    size = len(rows) - queries - CALIBRATION_QUERIES
    return CorpusOfBench(name, rows[:size], rows[size : size + queries], rows[size + queries :])


class _Filters:
    """Filters of one corpus: columns whose ranges pass a share of the rows in a given way."""

    def __init__(self, corpus: CorpusOfBench) -> None:
        vectors, rng = corpus.vectors, np.random.default_rng(7)
        self._count = len(vectors)
        # Ranks of rows by nearness to a few anchors, one of which is chosen by the query
        self._anchors = vectors[rng.integers(self._count, size=8)]
        orders = np.argsort(-(vectors @ self._anchors.T), axis=0)
        ranks = np.empty_like(orders)
        for anchor in range(8):
            ranks[orders[:, anchor], anchor] = np.arange(self._count)
        columns = {f"near_{anchor}": ranks[:, anchor] for anchor in range(8)}
        columns["number"] = rng.permutation(self._count)
        self.columns = columns
        self.frame = pl.DataFrame(columns)

    def make(self, kind: str, share: float, query: np.ndarray, number: int) -> tuple[str, Any]:
        """Return an expression and the mask of the rows that pass it."""
        size = max(2 * K, int(share * self._count))
        closeness = self._anchors @ query
        if kind == "independent":
            name, low = "number", number * 37 % max(1, self._count - size)
        elif kind == "with":
            name, low = f"near_{int(closeness.argmax())}", 0
        elif kind == "against":
            name, low = f"near_{int(closeness.argmax())}", self._count - size
        else:
            name, low = f"near_{int(closeness.argmin())}", 0
        column = self.columns[name]
        return f"{name} >= {low} and {name} < {low + size}", (column >= low) & (column < low + size)


def measure_index(
    corpus: CorpusOfBench, kind: str, targets: tuple[float | None, ...], live: bool
) -> list[Cell]:
    """Measure every filter and target of one index; ``live``: a tenth of it is written live."""
    filters = _Filters(corpus)
    count = len(corpus.vectors)
    ids = [str(i) for i in range(count)]
    based = count - count // 10 if live else count
    index = EntityIndex.build(
        "pin",
        ids[:based],
        corpus.vectors[:based],
        filters.frame.head(based),
        IndexConfig(kind=kind, ann=AnnConfig(ef_construction=100)),
        calibration_queries=corpus.calibration,
    )
    index.attribute_table.warm()
    if live:
        _write_live(index, corpus.vectors, filters.frame, based)
    cells = []
    for target in targets:
        for filter_ in FILTERS:
            for share in (1.0,) if filter_ == "none" else SHARES:
                cells.append(_cell(corpus, index, filters, filter_, share, target, live))
    return cells


def _write_live(index: EntityIndex, vectors: np.ndarray, frame: pl.DataFrame, based: int) -> None:
    """Apply the rows behind ``based`` as live entries."""
    state = LiveState(LiveBase(vectors.shape[1], SPACE, index.row_of, rows=based), background=False)
    rows = frame.slice(based).to_dicts()
    state.apply(
        LiveEntry(id=str(based + i), vector=vectors[based + i], space_id=SPACE, attributes=row)
        for i, row in enumerate(rows)
    )
    state.compact()
    index.set_live(state.view)


def _cell(
    corpus: CorpusOfBench,
    index: EntityIndex,
    filters: _Filters,
    kind: str,
    share: float,
    target: float | None,
    live: bool,
) -> Cell:
    recalls, claims, times = [], [], []
    plans: dict[str, int] = {}
    for number, query in enumerate(corpus.queries):
        expression, mask = None, slice(None)
        if kind != "none":
            expression, mask = filters.make(kind, share, query, number)
        start = time.perf_counter_ns()
        answer = index.search(query, K, filter=expression, min_recall=target)
        times.append((time.perf_counter_ns() - start) / 1000)
        scores = corpus.vectors @ query
        visible = scores[mask]
        kth = np.partition(visible, len(visible) - K)[len(visible) - K]
        found = scores[[int(i) for i in answer.ids]]
        recalls.append(np.count_nonzero(found >= kth - TIE) / K)
        plans[answer.plan] = plans.get(answer.plan, 0) + 1
        if answer.estimated_recall is not None:
            claims.append(answer.estimated_recall)
    mean = float(np.mean(recalls))
    # With every recall alike, as if one query had missed half an answer
    spread = max(float(np.std(recalls)), 0.05 / len(recalls) ** 0.5)
    half = DEVIATIONS * spread / len(recalls) ** 0.5
    claimed = float(np.mean(claims)) if claims else None
    high = mean + half
    holds = (target or index.default_recall) <= high and (claimed is None or claimed <= high)
    return Cell(
        corpus=corpus.name,
        kind=f"{index.kind}{' + live' if live else ''}",
        target=target,
        filter=kind if kind == "none" else f"{kind} {share:g}",
        plans=plans,
        claimed=None if claimed is None else round(claimed, 4),
        recall=round(mean, 4),
        low=round(max(0.0, mean - half), 4),
        high=round(min(1.0, high), 4),
        holds=holds,
        us=round(float(np.median(times)), 1),
    )


def measure(
    corpora: Iterator[CorpusOfBench], kinds: tuple[str, ...], progress: Callable[[str], None]
) -> list[Cell]:
    """Measure every corpus with every kind of index, and one of them with live writes."""
    cells = []
    for corpus in corpora:
        for kind in kinds:
            for live in (False, True) if kind == kinds[0] else (False,):
                with stage(f"{corpus.name}: {kind}{' with live writes' if live else ''}"):
                    done = measure_index(corpus, kind, (None, 0.99), live)
                broken = [cell for cell in done if not cell.holds]
                for cell in broken:
                    progress(f"  does not hold: {cell}")
                cells += done
    return cells


@click.command("recall-contract")
@data_option
@click.option("--size", default=8_000, show_default=True, help="Vectors of each corpus.")
@click.option("--queries", default=200, show_default=True, help="Queries of each cell.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    default=("int8-graph", "hnsw"),
    show_default=True,
    help="Kinds of index; the first one also with a tenth of the rows written live.",
)
@click.option(
    "--dimension",
    "dimensions",
    type=int,
    multiple=True,
    default=(64, 256, 1_024),
    show_default=True,
    help="Widths of the hard corpora.",
)
@out_option
@json_option
@handle_errors
def command(
    data_dir: Path | None,
    size: int,
    queries: int,
    kinds: tuple[str, ...],
    dimensions: tuple[int, ...],
    out: Path,
    as_json: bool,
) -> None:
    """Claimed against true recall@10 of every plan, on real vectors and on hard ones.

    Hard: groups of cosine 0.99 and 0.9999, one dominant component, a power-law spectrum, 60%
    duplicates, each in 64, 256 and 1,024 dimensions. Filters pass 50%, 20% and 5% of the rows:
    those nearest to the query or farthest, those near to another entity, or any. A cell holds where
    neither the mean claim nor the target is above the 99.9% interval of the true recall; the
    command fails where one does not.

    Example:
        omni bench recall-contract --data data
    """

    def corpora() -> Iterator[CorpusOfBench]:
        yield real_corpus(data_dir, size, queries)
        yield from hard_corpora(size, queries, dimensions)

    with one_blas_thread():
        cells = measure(corpora(), kinds, say)
    rows = [{name: getattr(cell, name) for name in Cell.__dataclass_fields__} for cell in cells]
    broken = sum(not cell.holds for cell in cells)
    write_record(
        "recall-contract",
        Measurement(
            dataset={
                "corpora": sorted({cell.corpus for cell in cells}),
                "real": "the first; the others are simulated to be hard",
                "vectors": size,
            },
            config={"k": K, "shares": SHARES, "filters": FILTERS, "kinds": kinds},
            protocol={
                "queries": queries,
                "calibration_queries": CALIBRATION_QUERIES,
                "interval": f"mean of true recall, {DEVIATIONS} standard errors",
                "truth": "exact scan; scores within 1e-6 are ties",
            },
            metrics={"cells": rows, "count": len(cells), "broken": broken},
            libraries=("hnswlib", "rabitqlib", "numpy"),
        ),
        folder=out,
    )
    if as_json:
        print_json({"cells": rows, "count": len(cells), "broken": broken})
    else:
        _print(cells)
    if broken:
        fail(f"{broken} of {len(cells)} cells do not hold; the record names them.", 1)


def _print(cells: list[Cell]) -> None:
    """Print one row a corpus, kind and target: the worst of its filters."""
    groups: dict[tuple[str, str, float | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.corpus, cell.kind, cell.target), []).append(cell)
    rows = []
    for (corpus, kind, target), group in groups.items():
        worst = min(group, key=lambda cell: cell.recall)
        plans = sorted({plan for cell in group for plan in cell.plans})
        rows.append(
            [
                corpus,
                kind,
                target or "default",
                f"{sum(cell.holds for cell in group)} of {len(group)}",
                worst.filter,
                f"{worst.recall:.3f} ({worst.low:.3f}-{worst.high:.3f})",
                "none" if worst.claimed is None else f"{worst.claimed:.3f}",
                ", ".join(plans),
            ]
        )
    head = ["corpus", "index", "target", "holds", "worst filter", "recall", "claimed", "plans"]
    print_table("claimed and true recall@10", head, rows)
