"""Protobuf's JSON form, against the reference implementation."""

import json

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from protos import retrieval_pb2 as pb
from retrieval.web.json_form import json_form

# The reference does not read the largest float32 that it wrote itself: nothing comes close to it.
floats = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False) | st.sampled_from(
    [0.1, -0.0, float("nan"), float("inf"), float("-inf")]
)
values = st.recursive(
    st.one_of(
        st.builds(pb.Value, string_value=st.text(max_size=4)),
        st.builds(pb.Value, int_value=st.integers(-(2**63), 2**63 - 1)),
        st.builds(pb.Value, double_value=st.floats()),
        st.builds(pb.Value, bool_value=st.booleans()),
    ),
    lambda inner: st.builds(
        lambda items: pb.Value(list_value=pb.ValueList(values=items)), st.lists(inner, max_size=3)
    ),
    max_leaves=5,
)
hits = st.builds(
    pb.Hit,
    id=st.text(max_size=4),
    score=floats,
    attributes=st.dictionaries(st.text(max_size=3), values, max_size=3),
)
answers = st.builds(
    pb.RetrieveResponse,
    hits=st.lists(hits, max_size=3),
    release_id=st.text(max_size=3),
    cache_hit=st.booleans(),
    ef=st.integers(-(2**31), 2**31 - 1),
    estimated_recall=st.none() | floats,
    timings=st.none() | st.builds(pb.Timings, total_ns=st.integers(0, 2**64 - 1)),
)


@given(answers)
def test_json_form_is_that_of_the_reference(message: pb.RetrieveResponse) -> None:
    written = json_form(message.DESCRIPTOR)(message)
    reference = json_format.MessageToDict(message)
    assert json.dumps(written, sort_keys=True) == json.dumps(reference, sort_keys=True)
    back = json_format.Parse(json.dumps(written, allow_nan=False), pb.RetrieveResponse())
    assert back.SerializeToString(deterministic=True) == message.SerializeToString(
        deterministic=True
    ) or "NaN" in str(written)


@pytest.mark.parametrize("name", sorted(pb.DESCRIPTOR.message_types_by_name))
def test_json_form_knows_every_type_of_the_contract(name: str) -> None:
    json_form(pb.DESCRIPTOR.message_types_by_name[name])


def test_json_form_writes_bytes_as_base64_and_repeated_floats() -> None:
    embedded = pb.EmbedResponse(embeddings=b"\x00\xff\x10", cache_hits=[True, False])
    assert json_form(embedded.DESCRIPTOR)(embedded) == {
        "embeddings": "AP8Q",
        "cacheHits": [True, False],
    }
    scored = pb.ScoreResponse(scores=[0.1, float("nan"), float("inf")])
    assert json_form(scored.DESCRIPTOR)(scored) == {"scores": [0.1, "NaN", "Infinity"]}
