"""Plot what one query costs as the corpus grows, from the records of ``omni bench ann``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PANELS = {
    "in-distribution": "queries like the corpus",
    "out-of-distribution": "queries unlike the corpus",
}


def draw_costs(folder: Path) -> Path | None:
    """Write ``ann-cost.png``: time of a query at recall 0.95 by corpus size; None with one size."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*-ann-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        newest[record["dataset"]["name"]] = record
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, record in newest.items():
        panel = next((p for p in PANELS if name.startswith(p)), None)
        for row in record["metrics"]["results"] if panel else ():
            if row.get("us@0.95"):
                panels.setdefault(str(panel), {}).setdefault(row["engine"], []).append(
                    (record["dataset"]["vectors"], row["us@0.95"])
                )
    if not any(len(points) > 1 for curves in panels.values() for points in curves.values()):
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), layout="constrained", squeeze=False
    )
    for axes, (panel, curves) in zip(all_axes[0], sorted(panels.items())):
        for engine, points in curves.items():
            points.sort()
            axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=engine)
        axes.set(
            title=PANELS[panel],
            xlabel="vectors",
            ylabel="CPU microseconds a query at recall 0.95",
            xscale="log",
            yscale="log",
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path = folder / "ann-cost.png"
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
