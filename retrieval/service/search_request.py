"""One search as a caller wants it: parsed from protobuf once, checked, apart from the wire."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from index_builder.fusion.fused_search import FusedIndex
from index_builder.search.request import SearchOptions
from protos import retrieval_pb2 as pb
from retrieval.config import Limits
from retrieval.errors import InvalidK, InvalidRequest, RequestTooLarge

MAX_LEG_WEIGHT = 1e6


class FusedLegs(NamedTuple):
    """How a fused request is answered."""

    fused_index: FusedIndex
    weights: tuple[float, float, float] | None
    """None: the release's."""
    gate: bool = False
    """Whether queries that the query gate takes for nonsense get no answer."""


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
    attributes: tuple[str, ...] = ()
    """Names to return with each hit, each once; ``*`` for all."""
    fused: bool | None = None
    """Whether words and known queries count, too; None: see ``legs_of``."""
    leg_weights: tuple[float, float, float] | None = None
    """Of cosine, words and votes; None: the release's."""
    min_probability: float | None = None
    """Lowest probability of a hit; None: no limit."""
    gate: bool | None = None
    """Whether nonsense gets no answer; None: as the server is configured."""

    @classmethod
    def parse(cls, message: pb.RetrieveRequest | pb.Target, limits: Limits) -> SearchRequest:
        """Read and check the fields that RetrieveRequest and Target share.

        Raises:
            InvalidK: k outside 1..max_k.
            InvalidRequest: A number outside its range, or NaN.
            RequestTooLarge: Filter, excluded ids or attributes beyond the limits.
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
            tuple(dict.fromkeys(message.attributes)) if message.attributes else (),
        )
        if has("fusion"):
            fusion = message.fusion
            request.fused = fusion.enabled if fusion.HasField("enabled") else None
            request.leg_weights = _leg_weights(fusion.weights)
            request.gate = fusion.gate if fusion.HasField("gate") else None
        if has("min_probability"):
            request.min_probability = message.min_probability
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
        if self.attributes:
            self._check_attributes(limits)
        if self.min_score is not None and not -1.0 <= self.min_score <= 1.0:
            raise _out_of_range("min_score", self.min_score, "-1 to 1")
        if self.min_recall is not None and not 0.0 < self.min_recall <= 1.0:
            raise _out_of_range("min_recall", self.min_recall, "more than 0 and at most 1")
        if self.diversity is not None and not 0.0 <= self.diversity <= 1.0:
            raise _out_of_range("diversity", self.diversity, "0 to 1")
        if self.collapse_above is not None and not 0.0 <= self.collapse_above <= 1.0:
            raise _out_of_range("collapse_above", self.collapse_above, "0 to 1")

        if self.min_probability is not None and not 0.0 <= self.min_probability <= 1.0:
            raise _out_of_range("min_probability", self.min_probability, "0 to 1")

    def _check_attributes(self, limits: Limits) -> None:
        if len(self.attributes) > limits.max_attributes:
            raise RequestTooLarge(
                "attributes", limits.max_attributes, len(self.attributes), " names"
            )
        longest = max(len(name.encode()) for name in self.attributes)
        if longest > limits.max_label_bytes:
            raise RequestTooLarge("attributes", limits.max_label_bytes, longest, " bytes a name")

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
        """Whether k, filter, min_recall, min_score and attributes alone decide the answer."""
        return not (
            self.exact
            or self.fused is not None
            or self.leg_weights is not None
            or self.gate is not None
            or self.min_probability is not None
            or self.exclude_ids
            or self.diversity is not None
            or self.collapse_above is not None
        )

    def attribute_names(self, schema: Iterable[str]) -> list[str]:
        """Return the names of the attributes to return, ``*`` replaced by those of a schema."""
        return list(schema) if "*" in self.attributes else list(self.attributes)

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


def legs_of(
    fused: FusedIndex, request: SearchRequest, *, gate_by_default: bool = False
) -> FusedLegs | None:
    """Return the legs that answer a request; None where vectors alone do.

    A request decides by ``fused``, else by giving weights; else the release, where it proved that
    fused answers are better.

    Args:
        fused: Legs of the entity type.
        request: Checked.
        gate_by_default: Whether the query gate holds where the request does not say.

    Raises:
        InvalidRequest: Fused answers are wanted, but neither request nor release has weights; or
            something is wanted that this answer cannot have: probabilities, or a query gate.
    """
    fusion = fused.fusion
    by_default = request.leg_weights is not None or (fusion is not None and fusion.enabled)
    is_fused = by_default if request.fused is None else request.fused
    is_calibrated = is_fused and request.leg_weights is None and bool(fusion and fusion.probability)
    if request.min_probability is not None and not is_calibrated:
        raise InvalidRequest(
            "min_probability: expected a fused answer by the release's own calibrated weights, but"
            f" {request.entity_type!r} has none here. Leave it out, or rebuild the release with"
            " --pairs that hold a split validation."
        )
    has_gate = is_fused and fusion is not None and fusion.gate is not None
    if request.gate and not has_gate:
        raise InvalidRequest(
            "fusion.gate: expected a fused answer of a release with a query gate, but"
            f" {request.entity_type!r} has none here. Leave it out, or rebuild the release with"
            " --pairs that hold 100 queries or more of a split validation."
        )
    if not is_fused:
        return None
    if request.leg_weights is None and fusion is None:
        raise InvalidRequest(
            f"fusion: expected weights, since this release has none for {request.entity_type!r}."
            " Give three numbers, or rebuild the release with --pairs."
        )
    return FusedLegs(
        fused,
        request.leg_weights,
        gate=has_gate and (gate_by_default if request.gate is None else request.gate),
    )


def _leg_weights(weights: Sequence[float]) -> tuple[float, float, float] | None:
    """Check the weights of a request; None where there are none.

    Raises:
        InvalidRequest: Not three numbers of 0 or more, one of them above 0.
    """
    if not weights:
        return None
    fits = len(weights) == 3 and all(0 <= weight <= MAX_LEG_WEIGHT for weight in weights)
    if not fits or not any(weights):
        raise InvalidRequest(
            "fusion.weights: expected three numbers from 0 to"
            f" {MAX_LEG_WEIGHT:g} (dense, lexical, votes), one of them above 0, but got"
            f" {', '.join(f'{weight:g}' for weight in weights[:4]) or 'none'}."
        )
    return weights[0], weights[1], weights[2]


def _out_of_range(name: str, value: float, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: expected {expected}, but got {value:g}.")


def stored_id(id_: str) -> str:
    """An id as indexes and logs hold it: in Unicode form NFC."""
    return id_ if id_.isascii() else unicodedata.normalize("NFC", id_)
