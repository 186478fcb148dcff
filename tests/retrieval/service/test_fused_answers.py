"""Fused answers over gRPC: what a release decides, what a call decides, every kind of call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from index_builder.building.build import build_release
from index_builder.building.inputs import EntityInput
from index_builder.building.plan import RebuildConfig
from index_builder.fusion.engagements import Engagements
from index_builder.fusion.probability import ProbabilityCurve
from index_builder.fusion.query_gate import QueryGate
from index_builder.fusion.weights import given_fusion
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import IndexConfig
from retrieval.client import EntityWrite, RetrievalClient, Target
from retrieval.client.errors import CallError
from tests.helpers.serving.real_server import Running, SmallBundle, SmallStore, serving
from tests.helpers.waiting import until

pytestmark = pytest.mark.slow
TITLES = [f"lamp model{i} sku{1000 + i}" for i in range(60)]
KNOWN = ["bright lamp", "reading light"]
FITTED = replace(
    given_fusion((1.0, 8.0, 0.5)),
    probability=ProbabilityCurve((0.0, 6.0), (0.1, 0.9)),
    gate=QueryGate(2.0, 0.05),  # no cosine reaches it: words alone decide
)
NONSENSE = "qqqq zzzz"


@pytest.fixture(scope="module")
def running(
    small_bundle: SmallBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Pins that are fused by default, products with words alone, and known queries."""
    pairs = pl.DataFrame({"query": KNOWN, "entity_id": ["p7", "p8"]})
    encode = small_bundle.encoder.encode
    texts = pl.DataFrame({"title": TITLES})
    shared = {"space_id": small_bundle.space_id, "texts": texts, "attributes": texts}
    ids = [f"p{i}" for i in range(60)]
    vectors = np.ascontiguousarray(encode(TITLES))
    inputs = {
        "pin": EntityInput(
            ids=ids, vectors=vectors, engagements=Engagements(pairs, fusion=FITTED), **shared
        ),
        "product": EntityInput(ids=ids, vectors=vectors, **shared),
        "query": EntityInput(ids=KNOWN, vectors=encode(KNOWN), space_id=small_bundle.space_id),
    }
    store = ReleaseStore(tmp_path_factory.mktemp("fused") / "store")
    config = RebuildConfig(index=IndexConfig(kind="exact"), golden_queries=4)
    release_id = build_release(inputs, small_bundle.folder, store, config)
    with serving(SmallStore(store, small_bundle, release_id), shadow_fraction=1.0) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[RetrievalClient]:
    with RetrievalClient(running.address) as found:
        yield found


def test_retrieve_release_that_proved_it_answers_fused(client: RetrievalClient) -> None:
    first = client.retrieve("sku1033", "pin", 5)
    assert first.legs == ("dense", "lexical", "votes")
    assert first.plan == "fused" and first.estimated_recall is None, "nothing was measured"
    assert first.ids[0] == "p33"
    assert first.fused is not None
    assert [score.dense for score in first.fused] == [hit.score for hit in first.hits]
    assert [score.fused for score in first.fused] == sorted(
        (score.fused for score in first.fused), reverse=True
    )
    again = client.retrieve("sku1033", "pin", 5)
    assert again.answer_cached
    assert (again.hits, again.fused, again.legs) == (first.hits, first.fused, first.legs)


def test_retrieve_call_decides_before_the_release(client: RetrievalClient) -> None:
    dense = client.retrieve("sku1033", "pin", 5, fusion=False)
    assert dense.legs == () and dense.fused is None and dense.plan != "fused"
    weighted = client.retrieve("sku1033", "product", 5, fusion=(0.0, 1.0, 0.0))
    assert weighted.ids[0] == "p33"
    assert weighted.legs == ("lexical",)


def test_retrieve_known_query_votes_for_its_entity(client: RetrievalClient) -> None:
    found = client.retrieve("bright lamp", "pin", 60, fusion=(0.0, 0.0, 1.0))
    assert found.ids[0] == "p7"
    assert found.fused is not None and found.fused[0].votes > 0


def test_retrieve_release_without_weights_refuses_fusion(client: RetrievalClient) -> None:
    assert client.retrieve("sku1033", "product", 5).legs == ()
    with pytest.raises(CallError, match="Give three numbers"):
        client.retrieve("sku1033", "product", 5, fusion=True)


def test_retrieve_min_probability_drops_unlikely_hits(client: RetrievalClient) -> None:
    every = client.retrieve("sku1033", "pin", 20)
    assert every.fused is not None
    chances = [s.probability for s in every.fused if s.probability is not None]
    assert len(chances) == len(every.fused) and chances == sorted(chances, reverse=True)
    middle = (chances[0] + chances[-1]) / 2
    likely = client.retrieve("sku1033", "pin", 20, min_probability=middle)
    kept = sum(chance >= middle for chance in chances)
    assert likely.ids == every.ids[:kept] and 0 < kept < 20
    assert client.retrieve("sku1033", "pin", 20, min_probability=1.0).ids == []
    weighted = client.retrieve("sku1033", "pin", 5, fusion=(1.0, 1.0, 1.0))
    assert weighted.fused is not None and weighted.fused[0].probability is None


@pytest.mark.parametrize(
    "options", [{"fusion": False}, {"fusion": (1.0, 1.0, 1.0)}, {"entity_type": "product"}]
)
def test_retrieve_min_probability_without_calibration_is_refused(
    client: RetrievalClient, options: dict[str, object]
) -> None:
    wanted = {"entity_type": "pin", "min_probability": 0.5, **options}
    with pytest.raises(CallError, match="calibrated weights"):
        client.retrieve("sku1033", **wanted)  # type: ignore[arg-type]


def test_retrieve_gate_answers_nothing_to_nonsense_where_asked(client: RetrievalClient) -> None:
    assert len(client.retrieve(NONSENSE, "pin", 5).ids) == 5, "off unless asked"
    gated = client.retrieve(NONSENSE, "pin", 5, gate=True)
    assert gated.ids == [] and gated.plan == "gated"
    assert gated.legs == ("dense", "lexical", "votes")
    known = client.retrieve("sku1033", "pin", 5, gate=True)
    assert known.ids == client.retrieve("sku1033", "pin", 5).ids and known.plan == "fused"
    varied = client.retrieve(NONSENSE, "pin", 5, gate=True, diversity=0.5, min_probability=0.1)
    assert varied.ids == [] and varied.plan == "gated"


def test_retrieve_gate_judges_the_query_and_not_what_a_filter_leaves(
    client: RetrievalClient,
) -> None:
    excluded = client.retrieve("sku1033", "pin", 5, gate=True, exclude_ids=["p33"])
    assert len(excluded.ids) == 5
    filtered = client.retrieve("sku1033", "pin", 5, gate=True, filter=f'title == "{TITLES[1]}"')
    assert filtered.ids == ["p1"]


def test_batch_and_multi_gate_nonsense_beside_known_queries(client: RetrievalClient) -> None:
    target = Target(entity_type="pin", k=4, gate=True)
    batch = client.retrieve_batch([NONSENSE, "sku1001"], target)
    assert [len(answer.ids) for answer in batch.answers] == [0, 4]
    assert [answer.plan for answer in batch.answers] == ["gated", "fused"]
    multi = client.retrieve_multi(NONSENSE, [target, Target(entity_type="product", k=4)])
    assert [len(answer.ids) for answer in multi.answers] == [0, 4]


def test_retrieve_embedding_passes_the_gate(running: Running, client: RetrievalClient) -> None:
    vector = running.encoder.encode([NONSENSE])[0]
    found = client.retrieve("", "pin", 5, embedding=vector, space_id=running.space_id, gate=True)
    assert len(found.ids) == 5


@pytest.mark.parametrize("options", [{"entity_type": "product"}, {"fusion": False}])
def test_retrieve_gate_that_cannot_hold_is_refused(
    client: RetrievalClient, options: dict[str, object]
) -> None:
    wanted = {"entity_type": "pin", "gate": True, **options}
    with pytest.raises(CallError, match="query gate"):
        client.retrieve("sku1033", **wanted)  # type: ignore[arg-type]


def test_serve_query_gate_holds_unless_the_call_says_no(running: Running) -> None:
    with (
        serving(running.made, query_gate=True) as server,
        RetrievalClient(server.address) as client,
    ):
        first, again = (client.retrieve(NONSENSE, "pin", 5) for _ in range(2))
        assert first.plan == again.plan == "gated" and first.ids == again.ids == []
        assert again.answer_cached and again.legs == first.legs
        assert len(client.retrieve(NONSENSE, "pin", 5, gate=False).ids) == 5
        assert len(client.retrieve(NONSENSE, "product", 5).ids) == 5, "it has no gate"


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, -1.0, 0.0), (0.0, 0.0, 0.0), (1.0, float("nan"), 0.0)]
)
def test_retrieve_bad_weights_are_refused(
    client: RetrievalClient, weights: tuple[float, ...]
) -> None:
    with pytest.raises(CallError, match="expected three numbers"):
        client.retrieve("sku1033", "pin", 5, fusion=weights)


def test_retrieve_embedding_has_no_words(running: Running, client: RetrievalClient) -> None:
    vector = running.encoder.encode(["sku1033"])[0]
    found = client.retrieve("", "pin", 5, embedding=vector, space_id=running.space_id)
    assert found.legs == ("dense", "votes")
    assert found.fused is not None and all(score.lexical == 0 for score in found.fused)


def test_retrieve_options_hold_in_every_leg(client: RetrievalClient) -> None:
    found = client.retrieve("sku1033 sku1034", "pin", 5, exclude_ids=["p33"])
    assert found.ids[0] == "p34" and "p33" not in found.ids
    filtered = client.retrieve("sku1033", "pin", 5, filter=f'title != "{TITLES[33]}"')
    assert "p33" not in filtered.ids and filtered.selectivity is not None
    exact = client.retrieve("sku1033", "pin", 5, exact=True)
    assert exact.estimated_recall == 1.0 and exact.ids[0] == "p33"
    varied = client.retrieve("sku1033", "pin", 5, diversity=0.5)
    assert varied.ids[0] == "p33" and len(varied.ids) == 5
    assert varied.fused is not None and len(varied.fused) == 5


def test_batch_and_multi_answer_as_single_calls_do(client: RetrievalClient) -> None:
    queries = ["sku1001", "bright lamp", "model9 lamp"]
    single = [client.retrieve(query, "pin", 4) for query in queries]
    batch = client.retrieve_batch(queries, Target(entity_type="pin", k=4))
    target = Target(entity_type="pin", k=4, fusion=True)
    explicit = client.retrieve_batch(queries, target)
    for answers in (batch.answers, explicit.answers):
        assert [answer.hits for answer in answers] == [result.hits for result in single]
        assert [answer.fused for answer in answers] == [result.fused for result in single]
    multi = client.retrieve_multi(
        queries[0], [Target(entity_type="pin", k=4), Target(entity_type="product", k=4)]
    )
    assert multi.answers[0].hits == single[0].hits
    assert multi.answers[1].legs == ()


def test_retrieve_min_recall_of_unmeasured_release_takes_exact_legs(
    client: RetrievalClient,
) -> None:
    found = client.retrieve("sku1033", "pin", 5, min_recall=0.9)
    assert found.plan == "fused" and found.estimated_recall == 1.0
    assert found.ids == client.retrieve("sku1033", "pin", 5, exact=True).ids


def test_shadow_recall_of_fused_answers_compares_fused_scores(
    running: Running, client: RetrievalClient
) -> None:
    """Of fresh and cached answers, with filters and the weights of a call."""
    shadow = running.server.service.recorder.shadow
    for i in range(5):
        client.retrieve(f"sku10{i}0", "pin", 5, language="fused")
        client.retrieve(f"sku10{i}0", "pin", 5, language="fused")
        client.retrieve(f"sku10{i}0", "pin", 5, language="fused", fusion=(0.0, 1.0, 0.0))
    labels = ("pin", "none", "fused")
    until(lambda: labels in shadow.estimates() and shadow.estimates()[labels].samples >= 15)
    assert shadow.estimates()[labels].recall == 1.0


def test_upserted_text_is_found_by_words_and_deleted_id_is_not(
    running: Running, client: RetrievalClient
) -> None:
    vector = running.encoder.encode(["something else"])[0]
    written = EntityWrite(id="new", vector=vector, attributes={"title": "zebra sku9999"})
    client.upsert("pin", [written], space_id=running.space_id)
    until(lambda: client.retrieve("sku9999", "pin", 3).ids[0] == "new")
    client.delete("pin", ["new"])
    until(lambda: "new" not in client.retrieve("sku9999", "pin", 60).ids)
