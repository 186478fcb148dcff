"""One picture per design question of ``omni bench tables``, from the rows of its tables alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_tables.settings import VERSION_NAMES

Rows = Sequence[dict[str, Any]]
NAMES = {
    "pin/entity": "pins",
    "product/entity": "products",
    "ad/entity": "ads",
    "query/query": "related queries",
}


def draw(rows: Rows, folder: Path, stem: str) -> list[Path]:
    """Write ``STEM-TABLE.png`` for every design question that has figures; return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    questions: dict[str, tuple[str, str, Callable[[Any, Rows], None]]] = {
        "rows": ("Rows of the hash table", "", _by_setting),
        "volume": ("Products at 1/1000 of the volume", "", _by_setting),
        "new-type": ("Ads as a new type of a trained model", "", _by_setting),
        "versions": (
            "A query tower and successive versions of frozen vectors (pins)",
            "vectors ranked",
            _versions,
        ),
        "prefixes": ("Prefixes of the vectors (pins)", "numbers kept", _prefixes),
        "logq": ("logQ correction by frequency of the entity", "", _parts),
    }
    paths = []
    for table, (title, label, plot) in questions.items():
        chosen = [row for row in rows if row["table"] == table and row["mean"] is not None]
        if not chosen:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        plot(axes, chosen)
        seeds = min(row["seeds"] for row in chosen)
        axes.set(
            title=f"{title}; {seeds} or more seeds, 95% intervals",
            ylabel="labelled Recall@10",
            xlabel=label,
            ylim=(0, None),
        )
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        paths.append(folder / f"{stem}-{table}.png")
        figure.savefig(paths[-1], dpi=100)
        pyplot.close(figure)
    return paths


def _curve(axes: Any, places: Sequence[Any], rows: Rows, label: str) -> None:
    axes.errorbar(
        places,
        [row["mean"] for row in rows],
        [row["interval"] or 0.0 for row in rows],
        marker="o",
        capsize=3,
        label=label,
    )


def _by_setting(axes: Any, rows: Rows) -> None:
    """Settings on the x axis, a curve per metric."""
    for metric in dict.fromkeys(row["metric"] for row in rows):
        chosen = [row for row in rows if row["metric"] == metric]
        _curve(
            axes,
            [row["setting"].replace(", ", ",\n").replace(": ", ":\n") for row in chosen],
            chosen,
            NAMES.get(metric, metric),
        )
    axes.tick_params(axis="x", labelsize=7, rotation=12)


def _versions(axes: Any, rows: Rows) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        chosen = [row for row in rows if row["setting"] == setting]
        _curve(axes, VERSION_NAMES[: len(chosen)], chosen, setting)


def _prefixes(axes: Any, rows: Rows) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        chosen = [row for row in rows if row["setting"] == setting]
        _curve(axes, [int(row["metric"].rsplit("/", 1)[1]) for row in chosen], chosen, setting)
    axes.set_xscale("log", base=2)


def _parts(axes: Any, rows: Rows) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        chosen = [row for row in rows if row["setting"] == setting]
        _curve(axes, [row["metric"].replace("/entity/", ", ") for row in chosen], chosen, setting)
