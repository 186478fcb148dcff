"""The demo's fused answers: queries that fit the weights, and what each leg finds of others.

Neither training nor any leg has seen the held-out queries. Half of those of ``dev`` fit the weights
of the legs; the table shows the other half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from encoders.datasets.dataset import Dataset
from encoders.datasets.halves import DEV
from encoders.text.hashing import text_bucket

SHOWN = "shown"
CALIBRATION = "validation"
COLUMNS = ("dense", "lexical", "votes", "fused")
SHOWN_PAIRS = 3_000
QUICK_SHOWN_PAIRS = 500
"""Pairs of one entity type that the table looks at."""
_SEED = 1919


class LegRow(NamedTuple):
    """Labelled Recall@10 of one entity type and language."""

    entity_type: str
    language: str
    pairs: int
    recall: dict[str, float]


def pairs_for_legs(dataset: Dataset) -> pl.DataFrame:
    """Return train pairs, which vote, and the dev half, in splits ``validation`` and ``shown``."""
    held = dataset.split(DEV)
    halves = pl.Series(text_bucket(held["query"], _SEED, 2))
    split = pl.when(halves == 0).then(pl.lit(CALIBRATION)).otherwise(pl.lit(SHOWN))
    return pl.concat([dataset.split("train"), held.with_columns(split.alias("split"))])


def measure_legs(
    store_root: Path, bundle_path: Path, pairs: pl.DataFrame, most_pairs: int = SHOWN_PAIRS
) -> list[LegRow]:
    """Measure dense, lexical, votes and fused of the active release, by type and language.

    Args:
        store_root: Of the release.
        bundle_path: Whose query tower is served.
        pairs: Of ``pairs_for_legs``.
        most_pairs: Of one entity type that are looked at.
    """
    from encoders.towers.bundle import load_bundle
    from index_builder.fusion.explain_legs import FOUND_BY, leg_hits
    from index_builder.releases.store import ReleaseStore
    from index_builder.search.explain import LabelledPairs

    tower = load_bundle(bundle_path)
    rows = []
    with ReleaseStore(store_root).open_current() as release:
        for entity_type, legs in release.fused.items():
            shown = pairs.filter(
                (pl.col("split") == SHOWN) & (pl.col("entity_type") == entity_type)
            )
            if legs.fusion is None or not shown.height:
                continue
            shown = shown.sample(min(most_pairs, shown.height), seed=0, shuffle=True)
            texts = shown["query"].to_list()
            labelled = LabelledPairs(
                queries=tower.embed_queries(texts), targets=shown["entity_id"].to_list()
            )
            hits = leg_hits(legs, texts, labelled, legs.fusion.weights, 10)
            found = dict(zip(FOUND_BY, hits.T, strict=True))
            rows += _rows(entity_type, shown["language"].to_numpy(), found)
    return rows


def _rows(entity_type: str, languages: np.ndarray, found: dict[str, np.ndarray]) -> list[LegRow]:
    """Return the row of all languages, and one for each where there are several."""
    names = np.unique(languages).tolist()
    parts = [("all", np.ones(len(languages), np.bool_))]
    parts += [(name, languages == name) for name in (names if len(names) > 1 else ())]
    return [
        LegRow(
            entity_type,
            name,
            int(part.sum()),
            {leg: round(float(found[leg][part].mean()), 3) for leg in COLUMNS},
        )
        for name, part in parts
    ]


def table_of(rows: list[LegRow]) -> list[list[Any]]:
    """Lay rows out for a table: type, language, pairs, and the recall of ``COLUMNS``."""
    return [
        [row.entity_type, row.language, row.pairs, *(row.recall[leg] for leg in COLUMNS)]
        for row in rows
    ]
