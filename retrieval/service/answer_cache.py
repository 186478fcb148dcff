"""Answers of earlier searches, cached until a live write or another release can change them.

Search traffic repeats itself, and the top k of a query under one index and one view of its live
entries is always the same. An entry holds the hits as they go over the wire, so that a cached
answer costs a look-up, its attributes included. Not cached: answers to ready vectors, and those
that exclude ids, are re-ranked or have to be exact.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from index_builder.search.entity_index import EntityIndex, SearchResult
from index_builder.search.request import FusedScores
from protos import retrieval_pb2 as pb
from retrieval.service.search_request import SearchRequest
from retrieval.service.validation import to_value

Float32 = npt.NDArray[np.float32]

ENTRY_OVERHEAD_BYTES = 512
"""Python objects of one entry beside its hits and text: key, links, fields.

Measured with tracemalloc, rounded up.
"""


HITS_TAG = bytes((pb.Answer.HITS_FIELD_NUMBER << 3 | 2,))
"""What stands before the length of one hit."""
SCORE_TAG = bytes((pb.Hit.SCORE_FIELD_NUMBER << 3 | 5,))
"""What stands before the four bytes of a score."""
MAX_ATTRIBUTE_BYTES = 16 * 2**20
"""Of the attributes that one process keeps serialised."""
ROW_OVERHEAD_BYTES = 200
"""Python objects of one hit's attributes beside their bytes and its id: headers and links."""

CacheKey = tuple[object, int, str, float | None, float | None, tuple[str, ...], str]
"""All that decides an answer: ``EntityIndex.version``, the request's fields, the text.

The version is a new object with every release and every live write that a search can see. A plain
tuple, because every call makes one.
"""


def cache_key(index: EntityIndex, request: SearchRequest, text: str) -> CacheKey:
    """Make the key of the answer to a text.

    Args:
        index: What is searched.
        request: How; must be cacheable (``SearchRequest.is_cacheable``).
        text: Normalised, not empty.
    """
    return (
        index.version,
        request.k,
        request.filter,
        request.min_recall,
        request.min_score,
        request.attributes,
        text,
    )


def key_bytes(key: CacheKey) -> int:
    """Return what the texts of a key take."""
    _, _, filter_text, _, _, attributes, text = key
    return (
        sys.getsizeof(text)
        + (sys.getsizeof(filter_text) if filter_text else 0)
        + sum(map(sys.getsizeof, attributes), sys.getsizeof(attributes) if attributes else 0)
    )


class CachedAnswer:
    """What an earlier search found, with its hits as they go over the wire.

    Has what ``searcher.Found`` has, so that a caller need not tell them apart.

    Args:
        result: What was found.
        hits: As ``serialize_hits`` made them, if they are made already.

    Attributes:
        hits: The serialised field ``hits``, which has the same number in RetrieveResponse and
            Answer.
        plan: This and the following as in ``SearchResult``.
        ef: Likewise.
        estimated_recall: Likewise.
        selectivity: Likewise.
        legs: Names of the legs of a fused answer; empty otherwise.
        size_bytes: What it takes in a cache, once it is in one.
    """

    __slots__ = ("ef", "estimated_recall", "hits", "legs", "plan", "selectivity", "size_bytes")

    search_ns = 0
    rerank_ns = 0
    is_cached = True

    def __init__(self, result: SearchResult, hits: bytes = b"") -> None:
        self.hits = hits or serialize_hits(result)
        self.legs: tuple[str, ...] = () if result.fused is None else result.fused.used
        self.plan = result.plan
        self.ef = result.ef
        self.estimated_recall = result.estimated_recall
        self.selectivity = result.selectivity
        self.size_bytes = 0

    @property
    def is_reranked(self) -> bool:
        """Whether hits were left out: a gated answer. Re-ranked ones are not cached."""
        return self.plan == "gated"

    @property
    def result(self) -> SearchResult:
        """The answer as the index gave it; parsed anew each time."""
        hits = pb.Answer.FromString(self.hits).hits
        return SearchResult(
            ids=[hit.id for hit in hits],
            scores=np.array([hit.score for hit in hits], dtype=np.float32),
            plan=self.plan,
            ef=self.ef,
            estimated_recall=self.estimated_recall,
            selectivity=self.selectivity,
            fused=_fused_scores(hits, self.legs) if self.legs else None,
        )


def _fused_scores(hits: Sequence[pb.Hit], legs: tuple[str, ...]) -> FusedScores:
    """Read the scores of a fused answer, without probabilities."""
    scores = [(hit.fused_score, hit.score, hit.lexical_score, hit.vote_score) for hit in hits]
    table = np.array(scores, np.float32).reshape(-1, 4)
    return FusedScores(table[:, 0], table[:, 1:], legs)


def serialize_hits(result: SearchResult, attributes: Sequence[bytes] = ()) -> bytes:
    """Return hits as they go over the wire, with the attributes of each or none at all.

    Args:
        result: The hits.
        attributes: Of each hit, as ``serialize_attributes`` returns them.
    """
    message = pb.Answer()
    if not attributes:
        add_hits(message.hits, result)
        serialized: bytes = message.SerializeToString()
        return serialized
    if result.fused is None:
        scores = result.scores.astype("<f4").tobytes()
        heads = [SCORE_TAG + scores[at : at + 4] for at in range(0, len(scores), 4)]
    else:
        add_hits(message.hits, result)
        heads = [hit.SerializeToString() for hit in message.hits]
    parts: list[bytes] = []
    for head, row in zip(heads, attributes, strict=True):  # parts of a message may be concatenated
        parts += (HITS_TAG, varint(len(head) + len(row)), head, row)
    return b"".join(parts)


def serialize_attributes(
    index: EntityIndex, ids: Sequence[str], names: Sequence[str]
) -> list[bytes]:
    """Return hits with id and attributes alone, serialised; all attributes are read at once."""
    serialized = []
    for id_, values in zip(ids, index.attributes(ids, names), strict=True):
        hit = pb.Hit(id=id_)
        fill_attributes(hit.attributes, values)
        serialized.append(hit.SerializeToString())
    return serialized


@lru_cache(4096)
def varint(value: int) -> bytes:
    """Return a length as protobuf writes it: seven bits a byte, lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def fill_attributes(wanted: MutableMapping[str, pb.Value], values: Mapping[str, object]) -> None:
    """Write the attributes of one hit; missing values stay out."""
    for name, value in values.items():
        if isinstance(value, str):
            wanted[name].string_value = value
        elif isinstance(value, float):
            wanted[name].double_value = value
        elif isinstance(value, bool):
            wanted[name].bool_value = value
        elif value is not None:
            wanted[name].CopyFrom(to_value(value))


def add_hits(hits: Any, result: SearchResult) -> None:
    """Write ids and scores into the repeated field ``hits`` of a message."""
    add = hits.add
    if result.fused is None:
        for id_, score in zip(result.ids, result.scores.tolist()):
            add(id=id_, score=score)
        return
    likely = result.fused.probabilities
    rows = zip(
        result.ids,
        result.fused.scores.tolist(),
        result.fused.legs.tolist(),
        [None] * len(result.ids) if likely is None else likely.tolist(),
        strict=True,
    )
    for id_, fused, legs, probability in rows:
        add(
            id=id_,
            score=legs[0],
            fused_score=fused,
            lexical_score=legs[1],
            vote_score=legs[2],
            probability=probability,
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
        self._answers: LRUCache[CacheKey, CachedAnswer] = LRUCache(
            max(1, max_bytes), getsizeof=attrgetter("size_bytes")
        )

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def size_bytes(self) -> int:
        """Estimated bytes held."""
        return int(self._answers.currsize)

    def find(self, key: CacheKey) -> CachedAnswer | None:
        """Return the answer under ``key``, or None.

        A hit is counted here, a miss in ``put``: both paths of a request may look.
        """
        try:
            answer: CachedAnswer = self._answers[key]
        except KeyError:
            return None
        self.hits += 1
        return answer

    def put(self, key: CacheKey, answer: CachedAnswer) -> None:
        """Cache what a search found.

        Args:
            key: Made before the search began: a write during it gives the index another version.
            answer: To be put under one key only.
        """
        if not self.max_bytes:
            return
        self.misses += 1
        size = len(answer.hits) + key_bytes(key) + ENTRY_OVERHEAD_BYTES
        if size <= self.max_bytes:
            answer.size_bytes = size
            self._answers[key] = answer


class AttributeCache:
    """Attributes of recent hits as they go over the wire, for one process.

    A few entities are hits of most queries; reading and writing their attributes anew takes several
    times as long as the search. Not thread-safe: it lives on the event loop.

    Args:
        max_bytes: What all may take; they are dropped together when they take more.

    Attributes:
        size_bytes: Estimated bytes held.
    """

    def __init__(self, max_bytes: int = MAX_ATTRIBUTE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[tuple[object, tuple[str, ...]], dict[str, bytes]] = {}
        self.size_bytes = 0

    def rows(self, version: object, names: Sequence[str]) -> dict[str, bytes]:
        """Return what is kept, by id; ``put`` adds to it.

        Args:
            version: ``EntityIndex.version``, looked up before the attributes are read.
            names: Of the attributes.
        """
        key = version, tuple(names)
        found = self._kept.get(key)
        if found is None:
            self._grow(ENTRY_OVERHEAD_BYTES + sum(map(sys.getsizeof, names)))
            found = self._kept[key] = {}
        return found

    def put(self, rows: dict[str, bytes], read: Mapping[str, bytes]) -> None:
        """Keep what was read."""
        self._grow(sum(len(id_) + len(row) + ROW_OVERHEAD_BYTES for id_, row in read.items()))
        rows.update(read)

    def _grow(self, size_bytes: int) -> None:
        if self.size_bytes + size_bytes > self._max_bytes:
            self._kept.clear()
            self.size_bytes = 0
        self.size_bytes += size_bytes
