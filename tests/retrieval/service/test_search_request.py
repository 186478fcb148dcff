"""One search parsed from either message: defaults, limits, what may be cached."""

import math
import unicodedata
from typing import Any

import pytest

from protos import retrieval_pb2 as pb
from retrieval.config import Limits
from retrieval.errors import InvalidK, InvalidRequest, RequestTooLarge
from retrieval.service.search_request import SearchRequest

LIMITS = Limits()
EVERYTHING: dict[str, Any] = {
    "entity_type": "pin",
    "k": 7,
    "filter": "price < 5",
    "exclude_ids": ["a", "b"],
    "min_score": 0.25,
    "min_recall": 0.5,
    "diversity": 0.75,
    "collapse_above": 0.875,
    "exact": True,
    "attributes": ["title"],
}


@pytest.mark.parametrize("message", [pb.RetrieveRequest, pb.Target])
def test_search_request_parse_reads_every_field(message: Any) -> None:
    request = SearchRequest.parse(message(**EVERYTHING), LIMITS)
    for name, value in EVERYTHING.items():
        found = getattr(request, name)
        assert (list(found) if isinstance(value, list) else found) == value, name


@pytest.mark.parametrize("message", [pb.RetrieveRequest, pb.Target])
def test_search_request_parse_unset_field_differs_from_zero(message: Any) -> None:
    unset = SearchRequest.parse(message(k=3), LIMITS)
    zero = SearchRequest.parse(
        message(k=3, min_score=0.0, diversity=0.0, collapse_above=0.0), LIMITS
    )
    assert (unset.min_score, unset.diversity, unset.collapse_above) == (None, None, None)
    assert (zero.min_score, zero.diversity, zero.collapse_above) == (0.0, 0.0, 0.0)
    assert unset.min_recall is None and not unset.is_reranked and zero.is_reranked


@pytest.mark.parametrize("k", [0, -1, 1001, 2**31 - 1])
def test_search_request_k_out_of_range_names_both_numbers(k: int) -> None:
    with pytest.raises(InvalidK, match=f"1 to 1000, but got {k}"):
        SearchRequest.parse(pb.RetrieveRequest(k=k), LIMITS)


@pytest.mark.parametrize(
    "field",
    [
        {"min_recall": 0.0},
        {"min_recall": 1.1},
        {"min_score": math.nan},
        {"min_score": -1.5},
        {"diversity": -0.1},
        {"collapse_above": math.inf},
    ],
)
def test_search_request_number_out_of_range_is_refused_by_name(field: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(field))):
        SearchRequest.parse(pb.Target(k=5, **field), LIMITS)


def test_search_request_numbers_at_their_bounds_are_taken() -> None:
    bounds = {"min_recall": 1.0, "min_score": -1.0, "diversity": 0.0, "collapse_above": 1.0}
    assert SearchRequest.parse(pb.Target(k=5, **bounds), LIMITS).min_score == -1.0


def test_search_request_longer_than_the_limits_is_refused() -> None:
    limits = Limits(max_filter_bytes=10, max_exclude_ids=2)
    SearchRequest.parse(pb.Target(k=1, filter="a" * 10, exclude_ids=["a", "b"]), limits)
    with pytest.raises(RequestTooLarge, match="filter: expected at most 10 bytes, but got 12"):
        SearchRequest.parse(pb.Target(k=1, filter="ж" * 6), limits)
    with pytest.raises(RequestTooLarge, match="exclude_ids: expected at most 2 ids, but got 3"):
        SearchRequest.parse(pb.Target(k=1, exclude_ids=["a", "b", "c"]), limits)


def test_search_request_attributes_come_once_and_are_bounded() -> None:
    names = ["title", "price", "title"]
    request = SearchRequest.parse(pb.Target(k=1, attributes=names), LIMITS)
    assert request.attributes == ("title", "price") and request.is_cacheable
    assert request.attribute_names(["a", "b"]) == ["title", "price"]
    everything = SearchRequest.parse(pb.Target(k=1, attributes=["title", "*"]), LIMITS)
    assert everything.attribute_names(["a", "b"]) == ["a", "b"]
    many = [f"name-{i}" for i in range(65)]
    with pytest.raises(RequestTooLarge, match="attributes: expected at most 64 names, but got 65"):
        SearchRequest.parse(pb.Target(k=1, attributes=many), LIMITS)
    with pytest.raises(RequestTooLarge, match="attributes: expected at most 256 bytes a name"):
        SearchRequest.parse(pb.Target(k=1, attributes=["x" * 257]), LIMITS)


@pytest.mark.parametrize(
    "fields",
    [
        {"exclude_ids": ["a"]},
        {"exact": True},
        {"diversity": 0.5},
        {"collapse_above": 0.9},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_search_request_answer_that_depends_on_more_is_not_cacheable(
    fields: dict[str, Any],
) -> None:
    for message in (pb.RetrieveRequest, pb.Target):
        assert SearchRequest.parse(message(k=3, filter="sale"), LIMITS).is_cacheable
        assert not SearchRequest.parse(message(k=3, **fields), LIMITS).is_cacheable


def test_search_request_options_hold_only_what_was_asked_for() -> None:
    assert SearchRequest("pin", 3).options() == {}
    assert SearchRequest("pin", 3, diversity=0.5, attributes=("title",)).options() == {}
    spelled = unicodedata.normalize("NFD", "café")
    request = SearchRequest.parse(pb.Target(**{**EVERYTHING, "exclude_ids": [spelled]}), LIMITS)
    assert request.options() == {
        "filter": "price < 5",
        "exclude_ids": ("café",),
        "exact": True,
        "min_recall": 0.5,
        "min_score": 0.25,
    }
