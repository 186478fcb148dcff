"""Evaluation reports as terminal tables, JSON and plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from encoders.commands.console import print_table
from encoders.datasets.halves import describe_split
from encoders.evaluation.metrics import PairedDifference
from encoders.evaluation.report import EvaluationReport, TaskReport
from encoders.evaluation.slices import SliceMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_LABELS = 20
"""Labels of a slice that a table shows (most pairs first); JSON holds all."""


OVERALL_COLUMNS = (
    "system",
    "pairs",
    "R@1",
    "R@10",
    "95%",
    "by query",
    "distinct",
    "ceiling",
    "R@100",
    "MRR",
    "nDCG@10",
)
COMPARISON_COLUMNS = (
    "type",
    "labelled Recall@10",
    "difference",
    "95%",
    "p",
    "queries won",
    "queries lost",
)


def print_report(
    report: EvaluationReport,
    comparisons: Iterable[tuple[str, str]] = (),
    shown_slices: Sequence[str] = (),
    source: str = "",
) -> None:
    """Print a report as tables to stdout: systems by type, slices, comparisons.

    Args:
        report: From ``evaluate_systems``.
        comparisons: Pairs of systems to compare.
        shown_slices: Slices to print a table of.
        source: What was evaluated, for the titles; empty: the split and name of the data set.
    """
    source = source or f"{describe_split(report.split)} pairs of {report.dataset!r}"
    for entity_type, task in report.tasks.items():
        title = f"{entity_type}: {source} ({report.label}), against {task.task.corpus_description}"
        rows = [[name, *overall_row(metrics)] for name, metrics in task.overall.items()]
        print_table(title, OVERALL_COLUMNS, rows)
        for name in shown_slices:
            if name in task.labels:
                title = f"{entity_type}: labelled Recall@10 by {name}"
                print_table(title, *_slice_table(task, name))
    compared = [
        [entity_type, f"{first} - {second}", *_comparison_cells(task.compare(first, second))]
        for first, second in comparisons
        for entity_type, task in report.tasks.items()
    ]
    if compared:
        title = "Paired comparison on the same pairs (bootstrap over queries)"
        print_table(title, COMPARISON_COLUMNS, compared)


def _comparison_cells(result: PairedDifference) -> list[object]:
    value, low, high = result.difference
    interval = f"[{low:+.3f}, {high:+.3f}]"
    return [f"{value:+.3f}", interval, f"{result.p_value:.4f}", result.wins, result.losses]


def overall_row(metrics: SliceMetrics) -> list[object]:
    """Write the figures of one system as table cells, in the order of ``OVERALL_COLUMNS``."""
    ten = metrics.recall[10]
    return [
        metrics.pairs,
        metrics.recall[1].value,
        ten.value,
        f"{ten.low:.3f}-{ten.high:.3f}",
        metrics.query_recall.value,
        metrics.distinct_recall,
        metrics.ceiling[10],
        metrics.recall[100].value,
        metrics.mrr.value,
        metrics.ndcg,
    ]


def _slice_table(task: TaskReport, name: str) -> tuple[list[str], list[list[object]]]:
    systems = list(task.overall)
    first = task.slices[systems[0]][name]
    rows: list[list[object]] = []
    for label, metrics in list(first.items())[:SHOWN_LABELS]:
        cells = [task.slices[system][name][label].recall[10] for system in systems]
        rows.append(
            [
                label,
                metrics.pairs,
                f"{cells[0].value:.3f} [{cells[0].low:.3f}, {cells[0].high:.3f}]",
                *(c.value for c in cells[1:]),
                metrics.ceiling[10],
            ]
        )
    return [name, "pairs", *systems, "ceiling"], rows


def plot_report(report: EvaluationReport, path: Path) -> None:
    """Draw labelled Recall@10 with intervals and ceilings to an image file.

    There is one panel per entity type, and below it one of its languages if they are known.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(report.tasks)
    with_languages = [name for name in names if "language" in report.tasks[name].labels]
    figure, axes = plt.subplots(
        2 if with_languages else 1,
        len(names),
        figsize=(4.6 * len(names), 8 if with_languages else 4),
        squeeze=False,
    )
    for column, name in enumerate(names):
        _plot_systems(axes[0][column], name, report.tasks[name])
        if name in with_languages:
            _plot_languages(axes[1][column], report.tasks[name])
    figure.suptitle(
        f"{describe_split(report.split)} pairs of {report.dataset} ({report.label})", fontsize=9
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_systems(axis: Axes, entity_type: str, task: TaskReport) -> None:
    """Draw one bar per system, with interval and ceiling."""
    for row, metrics in enumerate(task.overall.values()):
        value, low, high = metrics.recall[10]
        error = None
        if math.isfinite(low):
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.barh(row, value, color=f"C{row}", xerr=error)
        colour = "white" if value > 0.15 else "black"
        axis.annotate(f" {value:.3f}", (0.0, row), va="center", color=colour)
    ceiling = next(iter(task.overall.values())).ceiling[10]
    axis.axvline(ceiling, linestyle="--", color="grey", label="ceiling")
    axis.set(
        yticks=range(len(task.overall)),
        yticklabels=list(task.overall),
        xlim=(0, 1),
        title=entity_type,
        xlabel="labelled Recall@10",
    )
    axis.invert_yaxis()
    axis.legend(loc="lower right")


def _plot_languages(axis: Axes, task: TaskReport) -> None:
    """Draw one row of points per language."""
    for row, system in enumerate(task.overall):
        points = list(task.slices[system]["language"].items())[:SHOWN_LABELS]
        recalls = [metrics.recall[10].value for _, metrics in points]
        axis.plot(recalls, range(len(points)), "o", color=f"C{row}", label=system)
        axis.set(
            yticks=range(len(points)),
            yticklabels=[f"{label} ({metrics.pairs:,})" for label, metrics in points],
            xlim=(0, 1),
        )
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
