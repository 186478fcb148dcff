"""One search as a caller wants it: parsed from protobuf once, checked, apart from the wire."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from index_builder.search.request import SearchOptions
from protos import retrieval_pb2 as pb
from retrieval.config import Limits
from retrieval.errors import InvalidK, InvalidRequest, RequestTooLarge


@dataclass(slots=True)
class SearchRequest:
    """What to search for and how; the query is apart. Read-only by convention.

    Not frozen: making a frozen dataclass takes three times as long, and every call makes one.
    """

    entity_type: str
    k: int
    filter: str = ""
    """Expression over attributes; empty: no filter."""
    min_recall: float | None = None
    """Wanted share of the exact top k; None: the release's default."""
    min_score: float | None = None
    """Lowest cosine of a hit; None: no limit."""
    exact: bool = False
    exclude_ids: Sequence[str] = ()
    """As the caller spells them; ``stored_exclude_ids`` has the form of the index."""
    diversity: float | None = None
    """Trade-off of maximal marginal relevance; None: plain ranking."""
    collapse_above: float | None = None
    """Cosine between two hits above which the lower one is dropped; None: keep all."""
    attributes: Sequence[str] = ()
    """Names to return with each hit; ``*`` for all."""

    @classmethod
    def parse(cls, message: pb.RetrieveRequest | pb.Target, limits: Limits) -> SearchRequest:
        """Read and check the fields that RetrieveRequest and Target share.

        Raises:
            InvalidK: k outside 1..max_k.
            InvalidRequest: A number outside its range, or NaN.
            RequestTooLarge: Filter or excluded ids beyond the limits.
        """
        has = message.HasField
        request = cls(
            message.entity_type,
            message.k,
            message.filter,
            message.min_recall if has("min_recall") else None,
            message.min_score if has("min_score") else None,
            message.exact,
            message.exclude_ids or (),
            message.diversity if has("diversity") else None,
            message.collapse_above if has("collapse_above") else None,
            message.attributes or (),
        )
        request._check(limits)
        return request

    def _check(self, limits: Limits) -> None:
        if not 0 < self.k <= limits.max_k:
            raise InvalidK(self.k, limits.max_k)
        if self.filter:
            size = len(self.filter.encode())
            if size > limits.max_filter_bytes:
                raise RequestTooLarge("filter", limits.max_filter_bytes, size, " bytes")
        if len(self.exclude_ids) > limits.max_exclude_ids:
            raise RequestTooLarge(
                "exclude_ids", limits.max_exclude_ids, len(self.exclude_ids), " ids"
            )
        if self.min_score is not None and not -1.0 <= self.min_score <= 1.0:
            raise _out_of_range("min_score", self.min_score, "-1 to 1")
        if self.min_recall is not None and not 0.0 < self.min_recall <= 1.0:
            raise _out_of_range("min_recall", self.min_recall, "more than 0 and at most 1")
        if self.diversity is not None and not 0.0 <= self.diversity <= 1.0:
            raise _out_of_range("diversity", self.diversity, "0 to 1")
        if self.collapse_above is not None and not 0.0 <= self.collapse_above <= 1.0:
            raise _out_of_range("collapse_above", self.collapse_above, "0 to 1")

    @property
    def is_plain(self) -> bool:
        """Whether the index is searched as its release's calibration says, everything included."""
        return not (self.filter or self.exclude_ids or self.exact) and self.min_recall is None

    @property
    def is_reranked(self) -> bool:
        """Whether hits are chosen from a larger pool after the search."""
        return self.diversity is not None or self.collapse_above is not None

    @property
    def is_cacheable(self) -> bool:
        """Whether k, filter, min_recall and min_score alone decide the answer to a query."""
        return not (
            self.exact
            or self.exclude_ids
            or self.attributes
            or self.diversity is not None
            or self.collapse_above is not None
        )

    def stored_exclude_ids(self) -> tuple[str, ...]:
        """The ids to exclude in the form of the index."""
        return tuple(map(stored_id, self.exclude_ids))

    def options(self) -> SearchOptions:
        """Return the arguments of ``EntityIndex.search`` beside query and k."""
        options: SearchOptions = {}
        if self.filter:
            options["filter"] = self.filter
        if self.exclude_ids:
            options["exclude_ids"] = self.stored_exclude_ids()
        if self.exact:
            options["exact"] = True
        if self.min_recall is not None:
            options["min_recall"] = self.min_recall
        if self.min_score is not None:
            options["min_score"] = self.min_score
        return options


def _out_of_range(name: str, value: float, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: expected {expected}, but got {value:g}.")


def stored_id(id_: str) -> str:
    """An id as indexes and logs hold it: in Unicode form NFC."""
    return id_ if id_.isascii() else unicodedata.normalize("NFC", id_)
