"""Answers that were already searched for: kept by query text and target until a live write or another release can change them.

Search traffic repeats itself, and the top k of a query under one index and one picture of its live
entries is always the same. What is kept is the hits as they go over the wire, so that an answer
that comes again costs a look-up. Not kept: answers to ready vectors, and those that leave out ids,
are re-ranked, carry attributes or were asked to be exact.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from index_builder.search.entity_index import EntityIndex, SearchResult
from protos import retrieval_pb2 as pb

Float32 = npt.NDArray[np.float32]

ENTRY_OVERHEAD_BYTES = 640
"""Python objects of one answer beside its hits and text: key, links, fields (measured with tracemalloc, rounded up)."""


class Shape(NamedTuple):
    """What of a target decides the answer, beside the index and the query."""

    k: int
    min_recall: float | None
    filter: str
    min_score: float | None


class Key(NamedTuple):
    """What an answer is kept under.

    ``version`` is a new object with every release and every live write that a search can see.
    """

    version: object
    shape: Shape
    text: str


def shape_of(target: Any) -> Shape | None:
    """The shape of a RetrieveRequest or Target; None if its answers are not kept."""
    has = target.HasField
    if (
        target.exclude_ids
        or target.exact
        or target.attributes
        or has("diversity")
        or has("collapse_above")
    ):
        return None
    return Shape(
        target.k,
        target.min_recall if has("min_recall") else None,
        target.filter,
        target.min_score if has("min_score") else None,
    )


class KeptAnswer:
    """One answer.

    ``hits`` is the serialised field ``hits``, which has the same number in RetrieveResponse and
    Answer.
    """

    __slots__ = ("ef", "estimated_recall", "hits", "plan", "selectivity", "size")

    def __init__(self, hits: bytes, result: SearchResult, size: int) -> None:
        self.hits = hits
        self.plan = result.plan
        self.ef = result.ef
        self.estimated_recall = result.estimated_recall
        self.selectivity = result.selectivity
        self.size = size

    def result(self) -> SearchResult:
        """The answer as the index gave it."""
        ids, scores = ids_and_scores(pb.Answer.FromString(self.hits).hits)
        return SearchResult(
            ids, scores, self.plan, self.ef, self.estimated_recall, self.selectivity
        )


def hits_on_the_wire(ids: Sequence[str], scores: Float32) -> bytes:
    """Hits as field ``hits`` of a message."""
    message = pb.Answer()
    add = message.hits.add
    for id, score in zip(ids, scores.tolist()):
        add(id=id, score=score)
    serialised: bytes = message.SerializeToString()
    return serialised


def ids_and_scores(hits: Any) -> tuple[list[str], Float32]:
    """Ids and float32 scores of a message's ``hits``, best first."""
    return [hit.id for hit in hits], np.fromiter(
        (hit.score for hit in hits), dtype=np.float32, count=len(hits)
    )


class AnswerCache:
    """LRU with a byte bound, for one process. Not thread-safe: it lives on the event loop.

    Args:
        max_bytes: Bound over hits, texts and bookkeeping; 0 switches the cache off.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._answers: LRUCache[Key, KeptAnswer] = LRUCache(
            max(1, max_bytes), getsizeof=attrgetter("size")
        )

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def size_bytes(self) -> int:
        """Estimated bytes held."""
        return int(self._answers.currsize)

    def find(self, key: Key) -> KeptAnswer | None:
        """The answer kept under ``key``, or None.

        A miss is counted by ``keep``: until then another way may look as well.
        """
        try:
            answer: KeptAnswer = self._answers[key]
        except KeyError:
            return None
        self.hits += 1
        return answer

    def keep(self, key: Key, result: SearchResult, hits: bytes | None = None) -> None:
        """Keep what a search found.

        Args:
            key: Made before the search began: a write that came meanwhile then has another version.
            result: What the index found.
            hits: ``hits_on_the_wire`` of it, where they are known already.
        """
        if not self.max_bytes:
            return
        self.misses += 1
        if hits is None:
            hits = hits_on_the_wire(result.ids, result.scores)
        size = len(hits) + sys.getsizeof(key.text) + ENTRY_OVERHEAD_BYTES
        if size <= self.max_bytes:
            self._answers[key] = KeptAnswer(hits, result, size)


def key_of(index: EntityIndex, target: Any, text: str) -> Key | None:
    """What the answer to ``text`` is kept under; None for a ready vector (its text is empty) or a shape whose answers are not kept."""
    shape = shape_of(target) if text else None
    return None if shape is None else Key(index.version, shape, text)
