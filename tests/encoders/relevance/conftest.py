"""A small sample of two systems, drawn anew for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from encoders.relevance.sample import Sample, SampleSettings, load_sample_folder, write_sample
from encoders.relevance.systems import draw_sample, query_population
from tests.helpers.judged_systems import small_dataset, stored


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """12 queries, the first 2 results of `good` and `bad`: 3 items a query."""
    dataset = small_dataset()
    path = tmp_path / "judged"
    drawn = draw_sample(
        path,
        dataset,
        {"good": stored(0), "bad": stored(1)},
        query_population(dataset, "pin", "heldout"),
        SampleSettings(entity_type="pin", queries=12, k=2),
    )
    write_sample(drawn, {"p0": "<svg xmlns='http://www.w3.org/2000/svg'/>"})
    return load_sample_folder(path)
