"""Votes and weights of a release: made when its indexes are, proved on queries no leg has seen."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from encoders.datasets.halves import DEV, rows_of_split
from encoders.errors import DataError
from index_builder.building.inputs import EntityInput
from index_builder.fusion.engagements import (
    NO_PAIRS,
    CalibrationQueries,
    Engagements,
    NonsenseQueries,
)
from index_builder.fusion.fused_search import DEPTH, FusedIndex
from index_builder.fusion.measured_recall import measure_recall
from index_builder.fusion.nonsense import nonsense_queries
from index_builder.fusion.probability import MIN_QUERIES
from index_builder.fusion.votes import VOTES_FILE, Votes
from index_builder.fusion.weights import (
    FUSION_FILE,
    CalibrationCase,
    FusedRecall,
    Fusion,
    fit_fusion,
    given_fusion,
)
from index_builder.releases.manifest import EntityManifest
from index_builder.search.entity_index import EntityIndex

log = logging.getLogger(__name__)

KNOWN_QUERIES = "query"
"""Entity type whose index holds the known queries."""
POOLED = {"ad": "product"}
"""Types with few pairs, and the type whose calibration queries help to choose their weights."""
CALIBRATION_SPLIT = "validation"
FITTED_ON = f"pairs of split {CALIBRATION_SPLIT}, or held-out ones of {DEV}"
MOST_CALIBRATION_QUERIES = 2_000
"""Of each type; the rest is not needed."""
NONSENSE_QUERIES = 500
_FILES = (VOTES_FILE, "votes.offsets", "votes.rows", FUSION_FILE)


def with_engagements(
    inputs: Mapping[str, EntityInput],
    pairs: pl.DataFrame,
    embed: Callable[[Sequence[str]], np.ndarray],
    min_users: int,
) -> dict[str, EntityInput]:
    """Give each entity type the pairs that vote and the queries that calibrate.

    Train pairs vote. Those of split ``validation`` calibrate; where there are none, the held-out
    ones of the half ``dev`` do, which choices may look at.

    Args:
        inputs: By entity type.
        pairs: Table of pairs; a column ``users`` says how many asked the query.
        embed: Query texts -> float32 ``(Q, D)``, unit rows.
        min_users: Queries of fewer users are private and left out, where ``users`` is known.

    Raises:
        DataError: No pair is left.
    """
    if "users" in pairs.columns:
        # The most of one entity: summed over entities, one user would count several times
        asked = pl.col("users").fill_null(min_users).max().over("query", "entity_type")
        pairs = pairs.filter(asked >= min_users)
    if not pairs.height:
        raise DataError(
            f"the pairs hold no query of at least {min_users} users; give more, or lower"
            " --min-query-users"
        )
    changed = dict(inputs)
    nonsense = None
    for entity_type in sorted(set(inputs) - {KNOWN_QUERIES}):
        own = pairs.filter(pl.col("entity_type") == entity_type)
        if own.height:
            voting = own.filter(pl.col("split") == "train").select("query", "entity_id", "count")
            calibration = _calibration(own, embed)
            if calibration is not None:
                nonsense = nonsense or _nonsense(embed)
                calibration = calibration._replace(nonsense=nonsense)
            before = inputs[entity_type].engagements
            fusion = None
            if calibration is None and before is not None:
                fusion = before.fusion
            engagements = Engagements(voting, calibration, fusion)
            changed[entity_type] = replace(inputs[entity_type], engagements=engagements)
    return changed


def _nonsense(embed: Callable[[Sequence[str]], np.ndarray]) -> NonsenseQueries:
    """Return the queries that a query gate has to empty; the same for every type."""
    texts = nonsense_queries(NONSENSE_QUERIES)
    return NonsenseQueries(texts, embed(texts))


def with_weights(
    inputs: Mapping[str, EntityInput], weights: Sequence[float]
) -> dict[str, EntityInput]:
    """Give each entity type weights that hold where too few queries calibrate.

    Args:
        inputs: By entity type.
        weights: Of the legs: dense, lexical and perhaps votes.
    """
    changed = dict(inputs)
    for entity_type in sorted(set(inputs) - {KNOWN_QUERIES}):
        engagements = inputs[entity_type].engagements or Engagements(NO_PAIRS)
        engagements = replace(engagements, fusion=given_fusion(weights))
        changed[entity_type] = replace(inputs[entity_type], engagements=engagements)
    return changed


def _calibration(
    pairs: pl.DataFrame, embed: Callable[[Sequence[str]], np.ndarray]
) -> CalibrationQueries | None:
    """Return the queries that calibrate one entity type, a fixed choice where there are many."""
    chosen_pairs = pairs.filter(pl.col("split") == CALIBRATION_SPLIT)
    if not chosen_pairs.height:
        chosen_pairs = rows_of_split(pairs, DEV)
    answers = chosen_pairs.group_by("query", maintain_order=True).agg(
        pl.col("entity_id").unique(maintain_order=True)
    )
    if not answers.height:
        return None
    texts = answers["query"].to_list()
    order = np.argsort([zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in texts])
    chosen = answers[order[:MOST_CALIBRATION_QUERIES]]
    texts = chosen["query"].to_list()
    return CalibrationQueries(texts, embed(texts), chosen["entity_id"].to_list())


def add_fusion(
    content: Path, inputs: Mapping[str, EntityInput], entities: dict[str, EntityManifest]
) -> None:
    """Write votes and weights beside the indexes, and say so in ``entities``.

    Types that were taken over keep theirs, unless the index of known queries is another one now.

    Args:
        content: Staged release; the indexes lie in it.
        inputs: What was built.
        entities: Manifests by entity type; changed in place.
    """
    _drop_stale_votes(content, inputs, entities)
    known = entities.get(KNOWN_QUERIES)
    with_pairs = {
        name: engagements
        for name in sorted(inputs)
        if (engagements := inputs[name].engagements) is not None
    }
    if not with_pairs:
        return
    queries = None
    if known is None and any(engagements.pairs.height for engagements in with_pairs.values()):
        log.warning("no index of entity type query: there are no votes")
    if known is not None:
        queries = EntityIndex.load(content / KNOWN_QUERIES)
    legs = {
        name: _legs(content / name, queries, engagements)
        for name, engagements in with_pairs.items()
    }
    cases = {name: _cases(fused, with_pairs[name]) for name, fused in legs.items()}
    for name, fused in legs.items():
        facts: dict[str, Any] = {}
        if fused.votes is not None and known is not None:
            built_from = {KNOWN_QUERIES: known.built_from, name: entities[name].built_from}
            fused.votes.save(content / name, built_from)
            facts["votes"] = {**fused.votes.describe(), "queries_built_from": known.built_from}
        fusion = fused.fusion
        if cases[name] and (fusion is None or len(cases[name]) >= MIN_QUERIES):
            pooled = cases.get(POOLED.get(name, ""), [])
            nonsense = _nonsense_cases(fused, with_pairs[name])
            fusion = fit_fusion(cases[name], FITTED_ON, pooled, nonsense)
            fusion = replace(fusion, recall=_recall(fused, fusion, with_pairs[name]))
        if fusion is not None:
            fusion.save(content / name)
            facts["fusion"] = fusion.describe()
            log.info("%s: %s", name, fusion)
        entities[name] = replace(entities[name], index={**entities[name].index, **facts})


def _drop_stale_votes(
    content: Path, inputs: Mapping[str, EntityInput], entities: dict[str, EntityManifest]
) -> None:
    """Remove votes and weights of types taken over whose known queries are other ones now."""
    known = entities.get(KNOWN_QUERIES)
    built_from = None if known is None else known.built_from
    for name, entity in list(entities.items()):
        if name in inputs or "votes" not in entity.index:
            continue
        if entity.index["votes"]["queries_built_from"] != built_from:
            log.warning("%s: its votes are of another index of queries; left out", name)
            remove_fusion(content / name)
            kept = {k: v for k, v in entity.index.items() if k not in ("votes", "fusion")}
            entities[name] = replace(entity, index=kept)


def _legs(folder: Path, queries: EntityIndex | None, engagements: Engagements) -> FusedIndex:
    """Open a staged index with the votes for its entities, and the weights it had before."""
    index = EntityIndex.load(folder)
    votes = None
    if queries is not None and engagements.pairs.height:
        votes = Votes.build(engagements.pairs, queries.ids, index.ids)
    return FusedIndex(index, queries, votes, engagements.fusion)


def _cases(fused: FusedIndex, engagements: Engagements) -> list[CalibrationCase]:
    """Score the candidates of calibration queries; a query does not vote for itself."""
    calibration = engagements.calibration
    if calibration is None:
        return []
    own = np.full(len(calibration.texts), -1, np.int64)
    if fused.queries is not None:
        own = fused.queries.ids.rows_of(calibration.texts)
    cases = []
    for text, vector, ids, row in zip(
        calibration.texts, calibration.vectors, calibration.entity_ids, own, strict=True
    ):
        query = fused.query(text, vector)
        others = query.neighbours != row
        query = query._replace(neighbours=query.neighbours[others], cosines=query.cosines[others])
        found = fused.candidates(query, DEPTH, {"live": None})
        relevant = np.isin(found.rows, fused.entities.ids.rows_of(ids))
        case = CalibrationCase(found.scores, relevant, len(ids), query.nearest, found.is_cold)
        cases.append(case)
    return cases


def _recall(fused: FusedIndex, fusion: Fusion, engagements: Engagements) -> tuple[FusedRecall, ...]:
    """Measure answers by weights that were fitted, on the queries they were fitted on."""
    calibration = engagements.calibration
    assert calibration is not None, "there are cases"
    weighted = replace(fused, fusion=fusion)
    return measure_recall(weighted, calibration.texts, calibration.vectors)


def _nonsense_cases(fused: FusedIndex, engagements: Engagements) -> list[CalibrationCase]:
    """Score the candidates of nonsense queries, to which nothing is relevant."""
    calibration = engagements.calibration
    if calibration is None or calibration.nonsense is None:
        return []
    cases = []
    for text, vector in zip(*calibration.nonsense, strict=True):
        query = fused.query(text, vector)
        scores = fused.candidates(query, DEPTH, {"live": None}).scores
        cases.append(CalibrationCase(scores, np.zeros(len(scores), np.bool_), 0, query.nearest))
    return cases


def remove_fusion(folder: Path) -> None:
    """Remove votes and weights beside an index, if there are any."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
