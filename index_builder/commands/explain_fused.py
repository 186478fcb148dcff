"""What ``omni explain`` prints of fused answers: each leg's rank and share, and what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from encoders.commands.console import print_table, say
from encoders.errors import ConfigError
from index_builder.fusion.explain_legs import FusedPlace, LegRecall, Weights, fused_places
from index_builder.fusion.fused_search import DEPTH, FusedIndex, FusedQuery
from index_builder.fusion.weights import LEGS
from index_builder.search.entity_index import SearchOptions

_NAMED_QUERIES = 3
"""Nearest known queries that are shown."""


class FusedReport(NamedTuple):
    """A fused answer taken apart.

    Attributes:
        places: All candidates, best first.
        nearest: The nearest known queries with their cosines.
        is_nonsense: Whether the release's query gate would answer nothing; None without a gate.
    """

    places: list[FusedPlace]
    nearest: list[tuple[str, float]]
    is_nonsense: bool | None

    def as_dict(self, k: int) -> dict[str, Any]:
        """Return JSON of the ``k`` best."""
        return {
            "answers": [place_values(place) for place in self.places[:k]],
            "nearest_queries": self.nearest,
            "is_nonsense": self.is_nonsense,
        }


def place_values(place: FusedPlace) -> dict[str, Any]:
    """Return JSON of one candidate."""
    legs = {
        leg: {"score": round(part.score, 6), "rank": part.rank, "share": round(part.share, 4)}
        for leg, part in place.legs.items()
    }
    return {"id": place.id, "rank": place.rank, "fused": round(place.fused, 6), "legs": legs}


def weights_to_explain(fused: FusedIndex, wanted: bool | None) -> Weights | None:
    """Return the weights of the answer to take apart; None: it is by vectors alone.

    Args:
        fused: Of the entity type.
        wanted: Whether a fused answer is; None: what the release decides.

    Raises:
        ConfigError: It is wanted, and the release has no weights.
    """
    if fused.fusion is None:
        if wanted:
            raise ConfigError(
                f"this release has no weights for {fused.entities.entity_type!r}: leave --fused"
                " out, or rebuild it with --pairs"
            )
        return None
    return fused.fusion.weights if (fused.fusion.enabled if wanted is None else wanted) else None


def explain_fused(
    fused: FusedIndex, query: FusedQuery, weights: Weights, options: SearchOptions, k: int
) -> FusedReport:
    """Take a fused answer apart. Raises as ``FusedIndex.search``."""
    nearest: list[tuple[str, float]] = []
    if fused.queries is not None and len(query.neighbours):
        best = np.argsort(-query.cosines, kind="stable")[:_NAMED_QUERIES]
        names = fused.queries.ids.take(query.neighbours[best])
        nearest = [(n, round(float(query.cosines[row]), 4)) for n, row in zip(names, best)]
    is_nonsense = None
    if fused.fusion is not None and fused.fusion.gate is not None:
        found = fused.candidates(query, DEPTH, options)
        is_nonsense = fused.is_nonsense(query, found, options)
    return FusedReport(fused_places(fused, query, weights, options, k), nearest, is_nonsense)


def why_fused(report: FusedReport, identifier: str, k: int) -> str | None:
    """Say where an id stands in a fused answer; None where it is no candidate."""
    place = next((place for place in report.places if place.id == identifier), None)
    if place is None:
        return None
    parts = ", ".join(f"{leg} {part_text(place, leg)}" for leg in LEGS)
    where = f"fused answer {place.rank} of {min(k, len(report.places))}"
    if place.rank > k:
        where = f"the fused score ranks it {place.rank}, below the top {k}"
    return f"{where}: {place.fused:.4f} from {parts}"


def part_text(place: FusedPlace, leg: str) -> str:
    """Return a leg's rank and its share of the fused score."""
    part = place.legs[leg]
    return "-" if part.rank is None else f"#{part.rank} {part.share:.0%}"


def print_fused(caption: str, report: FusedReport, fused: FusedIndex, k: int) -> None:
    """Print the best places with each leg's rank and share."""
    places = report.places[:k]
    titles: list[Any] = [None] * len(places)
    if "title" in fused.entities.attribute_table.schema:
        values = fused.entities.attributes([place.id for place in places], ["title"])
        titles = [row.get("title") for row in values]
    rows = [
        [place.rank, place.id, round(place.fused, 4), *(part_text(place, leg) for leg in LEGS), t]
        for place, t in zip(places, titles, strict=True)
    ]
    columns = ["rank", "id", "fused", *(f"{leg} (rank, share)" for leg in LEGS), "title"]
    print_table(caption, columns, rows)
    if report.nearest:
        names = ", ".join(f"{name!r} {cosine:.2f}" for name, cosine in report.nearest)
        say(f"nearest known queries: {names}")
    if report.is_nonsense is not None:
        verdict = "takes it for nonsense" if report.is_nonsense else "lets it pass"
        say(f"the query gate, where it is on, {verdict}")


def print_leg_recall(found: Sequence[LegRecall]) -> None:
    """Print what each leg finds, and what no leg or only the weights lose."""
    rows = [
        [
            legs.entity_type,
            *(round(legs.recall[name], 4) for name in (*LEGS, "candidates", "fused")),
            " / ".join(str(legs.only[leg]) for leg in LEGS),
            legs.lost_to["no leg"],
            legs.lost_to["weights"],
        ]
        for legs in found
    ]
    if rows:
        print_table(
            f"fused answers: labelled Recall@{found[0].k} of each leg; candidates: in any leg's"
            f" best {DEPTH}",
            [
                "entity type",
                *LEGS,
                "candidates",
                "fused",
                "only " + " / ".join(LEGS),
                "lost to no leg",
                "to weights",
            ],
            rows,
        )
