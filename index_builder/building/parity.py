"""The parity gate: golden queries through the trained tower and every export form of a release."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from index_builder.errors import GateFailed
from index_builder.releases.golden import GoldenQueries

log = logging.getLogger(__name__)

TOWER_COSINE = 0.999
"""Smallest cosine between a golden vector and what the staged tower makes of its text."""


def check_forms(content: Path, golden: GoldenQueries) -> dict[str, dict[str, Any]]:
    """Compare the staged tower with the golden vectors, and every export form with the tower.

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
            timeless = {name: value for name, value in report.items() if not name.endswith("_ms")}
            reports[form] = {**timeless, "passed": report["within_tolerance"]}
    return reports


def require_forms(reports: dict[str, dict[str, Any]], reference: str) -> dict[str, dict[str, Any]]:
    """Return the reports of a parity gate if every form passed.

    Args:
        reports: As ``check_forms`` returns.
        reference: What the forms are compared with, for messages.

    Raises:
        GateFailed: A form differs; with its report.
    """
    for form, report in reports.items():
        passed = report.get("passed")
        log.info(f"form {form}: {'agrees with' if passed else 'DIFFERS from'} {reference}")
        if not passed:
            raise GateFailed(
                f"export form {form!r} does not agree with {reference}: {json.dumps(report)}."
                " Nothing was published; export again or remove the form."
            )
    return reports
