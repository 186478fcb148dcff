"""The parity gate: golden queries through the trained tower and every export form in the staged release, at several batch sizes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from index_builder.search.golden import GoldenQueries

TOWER_COSINE = 0.999
"""Smallest cosine between a golden vector and what the staged tower makes of its text."""


def check_forms(content: Path, golden: GoldenQueries) -> dict[str, dict[str, Any]]:
    """Compare the staged tower with the golden vectors, and every staged export form with the tower.

    Args:
        content: The staged release, with ``query_encoder/`` and perhaps ``forms/``.
        golden: Queries with texts and the vectors that the indexes were proven with.

    Returns:
        Form id -> report without times; ``passed`` says whether the form may be served.
    """
    from encoders.inference.onnx_forms import measure_parity
    from encoders.towers.forms import FORM_FILES
    from encoders.towers.query_tower import QueryEncoder

    tower = QueryEncoder.load(content / "query_encoder")
    vectors = np.asarray(tower.encode(golden.texts), np.float32)
    smallest = float(np.einsum("nd,nd->n", vectors, golden.vectors).min()) if len(golden) else 1.0
    reports: dict[str, dict[str, Any]] = {
        "torch-fp32": {
            "texts": len(golden),
            "cosine_min": round(smallest, 6),
            "passed": smallest >= TOWER_COSINE,
        }
    }
    for form, file in FORM_FILES.items():
        if (content / "forms" / file).is_file():
            report = asdict(measure_parity(tower, content / "forms", form, golden.texts))
            reports[form] = {
                name: value for name, value in report.items() if not name.endswith("_ms")
            } | {"passed": report["within_tolerance"]}
    return reports
