"""Small parts of the server: re-ranking, admission, settings, tokens, request checks, shadow
recall's arithmetic.
"""

import asyncio
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import ConfigError, SpaceMismatch
from protos import retrieval_pb2 as pb
from retrieval.config import Limits, ServeConfig
from retrieval.errors import (
    DeadlinePassed,
    EmptyQuery,
    InvalidEmbedding,
    InvalidK,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    RequestTooLarge,
    Unauthenticated,
)
from retrieval.observability.shadow_recall import estimate, recall_of_answer, selectivity_bucket
from retrieval.security import Tokens
from retrieval.service.admission import Admission, Refusals, check_deadline
from retrieval.service.diversity import collapse_near_duplicates, maximal_marginal_relevance, rerank
from retrieval.service.validation import (
    checked_embedding,
    checked_query,
    checked_target,
    from_value,
    to_value,
)

LIMITS = Limits()


def pool(count: int, seed: int, dimension: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = rng.standard_normal(dimension).astype(np.float32)
    scores = vectors @ (query / np.linalg.norm(query))
    order = np.argsort(-scores, kind="stable")
    return scores[order], vectors[order]


def slow_mmr(scores: np.ndarray, vectors: np.ndarray, k: int, trade_off: float) -> list[int]:
    chosen = [int(np.argmax(scores))]
    while len(chosen) < min(k, len(scores)):
        rest = [i for i in range(len(scores)) if i not in chosen]
        chosen.append(
            max(
                rest,
                key=lambda i: (
                    trade_off * scores[i]
                    - (1 - trade_off) * max(float(vectors[i] @ vectors[j]) for j in chosen)
                ),
            )
        )
    return chosen


@pytest.mark.parametrize("trade_off", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_mmr_agrees_with_its_definition(trade_off: float, seed: int) -> None:
    scores, vectors = pool(30, seed)
    assert maximal_marginal_relevance(scores, vectors, 8, trade_off) == slow_mmr(
        scores, vectors, 8, trade_off
    )


def test_lambda_one_is_plain_ranking_and_less_lambda_means_more_variety() -> None:
    scores, vectors = pool(60, 5)
    assert rerank(scores, vectors, 10, 1.0, None) == list(range(10))

    def similarity(rows: list[int]) -> float:
        return float((vectors[rows] @ vectors[rows].T).mean())

    assert similarity(rerank(scores, vectors, 10, 0.2, None)) < similarity(
        rerank(scores, vectors, 10, 1.0, None)
    )


def test_collapsing_keeps_the_better_of_each_pair() -> None:
    scores, vectors = pool(20, 1)
    doubled = np.repeat(vectors, 2, axis=0)
    assert collapse_near_duplicates(doubled, 0.999) == list(range(0, 40, 2))
    assert collapse_near_duplicates(vectors, 1.0) == list(range(20))
    assert rerank(scores[:0], vectors[:0], 5, 0.5, 0.5) == []


def test_those_who_come_in_one_read_hold_their_places_before_they_enter() -> None:
    async def read() -> None:
        admission = Admission(3)
        refusals = Refusals("Retrieve", admission, lambda name, labels: None)
        admission.enter()
        for _ in range(2):
            assert refusals.at_the_door() is None
            admission.announce()
        assert refusals.at_the_door() is not None, "the third place is for one who is on the way"
        await asyncio.sleep(0)
        assert refusals.at_the_door() is None, "who did not enter in the next turn holds nothing"

    asyncio.run(read())


def test_a_pause_is_short_beside_the_time_inside() -> None:
    admission = Admission(1)
    for milliseconds, pause in ((0.5, 0.0), (100.0, 12.0), (5000.0, 20.0)):
        for _ in range(1000):
            admission.enter()
            admission.leave(1, milliseconds / 1e3)
        assert admission.pause_ms() == pause


def test_admission_counts_places_refuses_with_a_hint_and_forgets_nothing() -> None:
    admission = Admission(10)
    assert admission.cost_of(64) == 5 and admission.cost_of(0) == 1
    for _ in range(2):
        admission.enter(5)
    with pytest.raises(Overloaded, match="all 10 places"):
        admission.enter(1)
    admission.leave(5, 0.2)
    admission.enter(1)
    admission.leave(1, 0.1)
    admission.leave(5, 0.1)
    assert admission.in_flight == 0 and admission.refused == 1 and admission.peak == 10
    check_deadline(None)
    check_deadline(0.1)
    with pytest.raises(DeadlinePassed):
        check_deadline(0.0)


@pytest.mark.parametrize(
    "settings_",
    [
        {"port": 70_000},
        {"workers": 0},
        {"shadow_fraction": 1.5},
        {"device": "tpu"},
        {"tls_cert": Path("x")},
        {"cache_ttl_seconds": 0},
    ],
)
def test_impossible_settings_are_refused_by_name(settings_: dict) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ServeConfig(releases=Path("."), **settings_)


@pytest.mark.parametrize("text", ["", "   ", "\u3000\n\t", "\u200b\u200d"])
def test_a_query_without_a_visible_character_is_empty(text: str) -> None:
    with pytest.raises(EmptyQuery):
        checked_query(text, LIMITS)


def test_queries_are_normalised_and_bounded() -> None:
    assert checked_query("  blue \u00a0 whale\n", LIMITS) == "blue whale"
    with pytest.raises(RequestTooLarge, match="2048 bytes"):
        checked_query("ж" * 1025, LIMITS)
    assert checked_query("ж" * 1024, LIMITS)


@pytest.mark.parametrize("k", [0, -1, 1001, 2**31 - 1])
def test_k_outside_its_range_names_both_numbers(k: int) -> None:
    with pytest.raises(InvalidK, match=f"1 to 1000, but got {k}"):
        checked_target(pb.RetrieveRequest(k=k), LIMITS)


@pytest.mark.parametrize(
    "field",
    [
        {"min_recall": 0.0},
        {"min_recall": 1.1},
        {"min_score": math.nan},
        {"diversity": -0.1},
        {"collapse_above": math.inf},
    ],
)
def test_numbers_outside_their_range_are_refused(field: dict) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(field))):
        checked_target(pb.Target(k=5, **field), LIMITS)
    checked_target(
        pb.Target(k=5, min_recall=1.0, min_score=-1.0, diversity=0.0, collapse_above=1.0), LIMITS
    )


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_as_an_embedding_are_a_unit_vector_or_a_typed_error(content: bytes) -> None:
    try:
        vector = checked_embedding(content, "s", 16, "s")
    except InvalidRequest:
        return
    assert vector.shape == (16,) and abs(float(np.linalg.norm(vector)) - 1) <= 1e-3


def test_an_embedding_of_another_space_is_refused() -> None:
    content = pool(1, 0)[1][0].tobytes()
    with pytest.raises(SpaceMismatch):
        checked_embedding(content, "b" * 64, 16, "a" * 64)
    with pytest.raises(InvalidEmbedding, match="length 2"):
        checked_embedding((pool(1, 0)[1][0] * 2).tobytes(), "a", 16, "a")


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
def test_attribute_values_survive_the_wire(value: object) -> None:
    assert from_value(pb.Value.FromString(to_value(value).SerializeToString())) == value


def test_tokens_hold_rights_and_nothing_else_gets_in(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"web-secret").hexdigest()
    (tmp_path / "t.toml").write_text(
        f'[[token]]\nname = "web"\nsha256 = "{digest}"\nentity_types = ["pin"]\n'
    )
    tokens = Tokens.load(tmp_path / "t.toml")
    caller = tokens.caller([("user-agent", "x"), ("authorization", "Bearer web-secret")])
    caller.require_entity_types(["pin"])
    with pytest.raises(PermissionDenied, match="may retrieve pin"):
        caller.require_entity_types(["pin", "ad"])
    with pytest.raises(PermissionDenied, match="admin"):
        caller.require_admin()
    for metadata in (
        [],
        [("authorization", "Bearer wrong")],
        [("authorization", "Basic web-secret")],
        [("authorization", digest)],
    ):
        with pytest.raises(Unauthenticated):
            tokens.caller(metadata)
    for content in (
        "",
        "[[token]]\nname='a'",
        "[[token]]\nname='a'\nsha256='00'",
        "not toml",
        f"[[token]]\nname='a'\nsha256='{digest}'\nadmn=true",
    ):
        (tmp_path / "bad.toml").write_text(content)
        with pytest.raises(ConfigError):
            Tokens.load(tmp_path / "bad.toml")


def test_the_interval_covers_the_truth_and_narrows() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        found = estimate((rng.binomial(10, 0.95, size=200) / 10).tolist())
        covered += found.low <= 0.95 <= found.high
    assert covered >= 270
    few, many = estimate([1.0] * 5), estimate([1.0] * 500)
    assert few.low < many.low < 1.0 and few.high == pytest.approx(1.0)


def test_a_tie_counts_as_found_and_an_empty_answer_is_right_only_if_nothing_matches() -> None:
    exact = np.array([0.9, 0.8, 0.8], dtype=np.float32)
    assert recall_of_answer(["a", "b", "x"], exact, ["a", "b", "c"], exact) == 1.0
    assert recall_of_answer(["a"], exact[:1], ["a", "b", "c"], exact) == pytest.approx(1 / 3)
    assert recall_of_answer([], exact[:0], [], exact[:0]) == 1.0
    assert [selectivity_bucket(s) for s in (None, 0.9, 0.2, 0.05, 0.001)] == [
        "none",
        ">50%",
        "10-50%",
        "1-10%",
        "<1%",
    ]
