"""A small catalogue, and two systems over it whose results are stored."""

from __future__ import annotations

import polars as pl

from encoders.datasets.dataset import Dataset

THINGS = ("chair", "lamp", "sofa", "vase", "rug", "desk")


def small_dataset() -> Dataset:
    catalogue = pl.DataFrame(
        {
            "id": [f"p{i}" for i in range(len(THINGS))],
            "entity_type": "pin",
            "title": [f"a {thing}" for thing in THINGS],
            "description": [f"about the {thing}" for thing in THINGS],
            "engaged_queries": [[f"secret {thing}"] for thing in THINGS],
        }
    )
    rows = [
        (f"{thing} {n}", "en" if n % 2 else "de", "pin", f"p{i}", "save", 10 * i + n, "heldout")
        for i, thing in enumerate(THINGS)
        for n in range(4)
    ]
    columns = ["query", "language", "entity_type", "entity_id", "action", "count", "split"]
    return Dataset(catalogue, pl.DataFrame(rows, schema=columns, orient="row"), name="small")


def stored(shift: int) -> pl.DataFrame:
    """Results of a system that puts the right thing at place ``1 + shift``."""
    rows = [
        (f"{thing} {n}", f"p{(i - shift + place) % len(THINGS)}", place + 1)
        for i, thing in enumerate(THINGS)
        for n in range(4)
        for place in range(3)
    ]
    return pl.DataFrame(rows, schema=["query", "entity_id", "rank"], orient="row")
