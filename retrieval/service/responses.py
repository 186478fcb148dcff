"""What was found as the messages of protos/retrieval.proto."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from index_builder.search.entity_index import EntityIndex
from protos import retrieval_pb2 as pb
from retrieval.service.answer_cache import KeptAnswer
from retrieval.service.searcher import Found
from retrieval.service.validation import to_value


def fill_answer(
    answer: pb.Answer, index: EntityIndex, target: pb.Target, cached: bool, found: Found
) -> pb.Answer:
    """Write one search's results and how they were found into ``answer``; returns it."""
    result = found.result
    answer.plan, answer.ef, answer.search_ns, answer.cache_hit = (
        result.plan,
        result.ef,
        found.search_ns,
        cached,
    )
    answer.answer_cached = found.kept
    if result.estimated_recall is not None:
        answer.estimated_recall = result.estimated_recall
    if result.selectivity is not None:
        answer.selectivity = result.selectivity
    add = answer.hits.add
    for id, score in zip(found.ids, found.scores.tolist()):
        add(id=id, score=score)
    if target.attributes:
        add_attributes(answer.hits, index, found.ids, target.attributes)
    return answer


def fill_kept(answer: pb.Answer, known: KeptAnswer, cached: bool) -> None:
    """Write what an earlier search found into ``answer``."""
    answer.MergeFromString(
        known.hits
        + _how_kept(known.plan, known.ef, known.estimated_recall, known.selectivity, cached)
    )


@lru_cache(1000)
def _how_kept(
    plan: str, ef: int, recall: float | None, selectivity: float | None, cached: bool
) -> bytes:
    """The fields that repeat from answer to answer, serialised."""
    answer = pb.Answer(
        plan=plan,
        ef=ef,
        estimated_recall=recall,
        selectivity=selectivity,
        cache_hit=cached,
        answer_cached=True,
    )
    serialised: bytes = answer.SerializeToString()
    return serialised


def add_attributes(hits: Any, index: EntityIndex, ids: Sequence[str], names: Sequence[str]) -> None:
    """Give each hit the attributes that were asked for; ``*`` stands for all, missing values stay out."""
    wanted = list(index.attribute_table.schema) if "*" in names else list(names)
    for hit, attributes in zip(hits, index.attributes(list(ids), wanted), strict=True):
        for name, value in attributes.items():
            if value is not None:
                hit.attributes[name].CopyFrom(to_value(value))
