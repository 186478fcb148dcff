"""Fields of requests: normalised, bounded, refused by name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import SpaceMismatch
from protos import retrieval_pb2 as pb
from retrieval.config import Limits
from retrieval.errors import EmptyQuery, InvalidEmbedding, InvalidRequest, RequestTooLarge
from retrieval.service.validation import (
    LABELS,
    check_answer_size,
    check_labels,
    checked_embedding,
    checked_query,
    from_value,
    to_value,
)

LIMITS = Limits()


@pytest.mark.parametrize("text", ["", "   ", "\u3000\n\t", "\u200b\u200d"])
def test_checked_query_without_visible_character_is_empty(text: str) -> None:
    with pytest.raises(EmptyQuery):
        checked_query(text, LIMITS)


def test_checked_query_normalises_and_bounds() -> None:
    assert checked_query("  blue \u00a0 whale\n", LIMITS) == "blue whale"
    with pytest.raises(RequestTooLarge, match="2048 bytes"):
        checked_query("ж" * 1025, LIMITS)
    assert checked_query("ж" * 1024, LIMITS)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=80))
def test_checked_embedding_any_bytes_give_unit_vector_or_typed_error(content: bytes) -> None:
    try:
        vector = checked_embedding(content, "s", 16, "s")
    except InvalidRequest:
        return
    assert vector.shape == (16,) and abs(float(np.linalg.norm(vector)) - 1) <= 1e-3


def unit_vector(dimension: int = 16) -> np.ndarray:
    vector = np.random.default_rng(0).standard_normal(dimension).astype(np.float32)
    return vector / np.linalg.norm(vector)


def test_checked_embedding_other_space_or_length_is_refused() -> None:
    content = unit_vector().tobytes()
    with pytest.raises(SpaceMismatch):
        checked_embedding(content, "b" * 64, 16, "a" * 64)
    with pytest.raises(InvalidEmbedding, match="length 2"):
        checked_embedding((unit_vector() * 2).tobytes(), "a", 16, "a")


attribute = st.recursive(
    st.one_of(
        st.text(max_size=5),
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
    ),
    lambda v: st.lists(v, max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(attribute)
def test_attribute_values_round_trip_over_the_wire(value: object) -> None:
    assert from_value(pb.Value.FromString(to_value(value).SerializeToString())) == value


@pytest.mark.parametrize("field", LABELS)
@pytest.mark.parametrize("letter", ["a", "ж", "😀"])
def test_labels_are_bounded_in_bytes(field: str, letter: str) -> None:
    fits = 256 // len(letter.encode())
    check_labels(pb.RetrieveRequest(**{field: letter * fits}), LIMITS)
    with pytest.raises(RequestTooLarge, match=f"{field}: expected at most 256 bytes"):
        check_labels(pb.RetrieveRequest(**{field: letter * (fits + 1)}), LIMITS)


def test_every_text_of_a_request_is_a_label_or_bounded_elsewhere() -> None:
    elsewhere = {"query", "queries", "filter", "exclude_ids", "ids", "attributes"}
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            texts = {f.name for f in method.input_type.fields if f.type == f.TYPE_STRING}
            assert texts <= elsewhere | set(LABELS), method.full_name


def test_answer_size_is_the_sum_over_all_searches() -> None:
    limits = Limits(max_answer_values=100)
    check_answer_size([(10, 4), (25, 1)], limits)
    with pytest.raises(RequestTooLarge, match=r"k x \(1 \+ attributes\).* 100 values, but got 101"):
        check_answer_size([(10, 4), (51, 0)], limits)
    check_answer_size([(1024 * 1000, 0)], LIMITS)
    with pytest.raises(RequestTooLarge):
        check_answer_size([(1024 * 1000, 1)], LIMITS)
