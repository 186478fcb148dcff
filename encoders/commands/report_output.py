"""Evaluation reports as terminal tables, JSON and plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from encoders.commands.console import print_table
from encoders.evaluation.report import EvaluationReport, TaskReport
from encoders.evaluation.slices import SliceMetrics

SHOWN_LABELS = 20
"""Labels of a slice that a table shows (most pairs first); JSON holds all."""


def print_report(
    report: EvaluationReport,
    comparisons: Iterable[tuple[str, str]] = (),
    shown_slices: Sequence[str] = (),
    source: str = "",
) -> None:
    """Print the tables of a report to stdout: all systems per type, the slices asked for, the comparisons.

    Args:
        report: From ``evaluate_systems``.
        comparisons: Pairs of systems to compare.
        shown_slices: Slices to print a table of.
        source: What was evaluated, for the titles; empty: the split and name of the data set.
    """
    source = source or f"{report.split} pairs of {report.dataset!r}"
    for entity_type, task in report.tasks.items():
        title = f"{entity_type}: {source} ({report.label}), against {task.task.corpus_description}"
        columns = [
            "system",
            "pairs",
            "R@1",
            "R@10",
            "95%",
            "ceiling@10",
            "of ceiling",
            "R@100",
            "MRR",
            "nDCG@10",
            "R@10 by query",
        ]
        print_table(
            title,
            columns,
            [[name, *overall_row(metrics)] for name, metrics in task.overall.items()],
        )
        for name in shown_slices:
            if name in task.labels:
                print_table(
                    f"{entity_type}: labelled Recall@10 by {name}", *_slice_table(task, name)
                )
    rows = []
    for first, second in comparisons:
        for entity_type, task in report.tasks.items():
            (value, low, high), p, wins, losses = task.compare(first, second)
            rows.append(
                [
                    entity_type,
                    f"{first} - {second}",
                    f"{value:+.3f}",
                    f"[{low:+.3f}, {high:+.3f}]",
                    f"{p:.4f}",
                    wins,
                    losses,
                ]
            )
    if rows:
        columns = [
            "type",
            "labelled Recall@10",
            "difference",
            "95%",
            "p",
            "queries won",
            "queries lost",
        ]
        print_table("Paired comparison on the same pairs (bootstrap over queries)", columns, rows)


def overall_row(metrics: SliceMetrics) -> list[object]:
    """The figures of one system as table cells, pairs first."""
    ten, ceiling = metrics.recall[10], metrics.ceiling[10]
    share = ten.value / ceiling if ceiling else None
    interval = f"[{ten.low:.3f}, {ten.high:.3f}]"
    recalls = (
        metrics.recall[1].value,
        ten.value,
        interval,
        ceiling,
        share,
        metrics.recall[100].value,
    )
    return [metrics.pairs, *recalls, metrics.mrr.value, metrics.ndcg, metrics.query_recall]


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
                *(f"{c.value:.3f} [{c.low:.3f}, {c.high:.3f}]" for c in cells),
                metrics.ceiling[10],
            ]
        )
    return [name, "pairs", *systems, "ceiling"], rows


def plot_report(report: EvaluationReport, path: Path) -> None:
    """Draw labelled Recall@10 with intervals and ceilings, one panel per entity type and one per type's languages, to an image file."""
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
        task, axis = report.tasks[name], axes[0][column]
        for row, metrics in enumerate(task.overall.values()):
            value, low, high = metrics.recall[10]
            axis.barh(
                row,
                value,
                color=f"C{row}",
                xerr=(
                    [[max(0.0, value - low)], [max(0.0, high - value)]]
                    if math.isfinite(low)
                    else None
                ),
            )
            axis.annotate(
                f" {value:.3f}", (0.0, row), va="center", color="white" if value > 0.15 else "black"
            )
        axis.axvline(
            next(iter(task.overall.values())).ceiling[10],
            linestyle="--",
            color="grey",
            label="ceiling",
        )
        axis.set(
            yticks=range(len(task.overall)),
            yticklabels=list(task.overall),
            xlim=(0, 1),
            title=name,
            xlabel="labelled Recall@10",
        )
        axis.invert_yaxis()
        axis.legend(loc="lower right")
        if name in with_languages:
            for row, system in enumerate(task.overall):
                points = list(task.slices[system]["language"].items())[:SHOWN_LABELS]
                axes[1][column].plot(
                    [m.recall[10].value for _, m in points],
                    range(len(points)),
                    "o",
                    color=f"C{row}",
                    label=system,
                )
                axes[1][column].set(
                    yticks=range(len(points)),
                    yticklabels=[f"{label} ({m.pairs:,})" for label, m in points],
                    xlim=(0, 1),
                )
            axes[1][column].invert_yaxis()
            axes[1][column].grid(axis="x", alpha=0.3)
    figure.suptitle(f"{report.split} pairs of {report.dataset} ({report.label})", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
