"""``omni explain``: why an id was not returned, and where labelled recall is lost."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from encoders.towers.query_tower import QueryEncoder
from index_builder.building.build import build_release
from index_builder.commands import explain as explain_commands
from index_builder.fusion.engagements import Engagements
from index_builder.fusion.query_gate import QueryGate
from index_builder.fusion.weights import given_fusion
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.store import ReleaseStore
from index_builder.search.explain import (
    FreshVectors,
    LabelledPairs,
    explain_id,
    recall_waterfall,
)
from tests.helpers.release_makers import SPACE, make_bundle, make_input, quick, unit_vectors
from tests.helpers.run_command import run


def test_explain_id_not_returned_names_reason(store: ReleaseStore) -> None:
    query = unit_vectors(200, 1)[3]
    with LiveLogWriter(store.live_root, "pin", 64) as writer:
        writer.write(
            [
                LiveEntry(id="pin-5"),
                LiveEntry(id="live", vector=query, space_id=SPACE, attributes={"colour": "green"}),
            ]
        )
    with store.open_current() as release:
        follower = LiveFollower(store, release)
        follower.catch_up()
        index = release.entity("pin")

        def why(identifier: str, k: int = 3, expression: str | None = None) -> tuple[str, str]:
            verdict = explain_id(index, query, identifier, k, expression)
            return verdict.state, verdict.reason

        assert why("nope")[0] == "missing"
        assert why("pin-5")[0] == "tombstoned"
        assert why("live")[0] == "live"
        assert why("live")[1] in ("it is answer 1 of 3", "it is answer 2 of 3")
        far = index.search(query, 199).ids[-1]
        assert "below the top 3" in why(far)[1]
        assert explain_id(index, query, far, 3).exact_rank in (199, 200)
        assert "the filter excludes it" in why("pin-3", 3, "colour == 'green'")[1]
        assert explain_id(index, query, "live", 3, "colour == 'green'").rank_after_filter == 1
        follower.stop()
    result = run(
        explain_commands.group,
        "query",
        "--store",
        store.root,
        "--entity-type",
        "pin",
        "--like",
        "pin-3",
        "--id",
        "pin-5",
        "--json",
    )
    assert json.loads(result.stdout)["why"][0]["state"] == "tombstoned"
    assert json.loads(result.stdout)["answers"][0]["id"] in ("pin-3", "live")
    assert (
        run(
            explain_commands.group, "query", "--store", store.root, "--entity-type", "pin"
        ).exit_code
        == 2
    )


def test_recall_waterfall_attributes_every_loss_to_its_step(store: ReleaseStore) -> None:
    """Each target is made to be lost at one known step."""
    vectors = unit_vectors(200, 1)
    with LiveLogWriter(store.live_root, "pin", 64) as writer:
        # Stale: the encoder would find it, what is served does not hold it
        writer.write([LiveEntry(id="pin-7")])
    with store.open_current() as release:
        LiveFollower(store, release).catch_up()
        index = release.entity("pin")
        queries = np.stack([vectors[3], vectors[7], vectors[9], -vectors[11]])
        pairs = LabelledPairs(
            queries=queries,
            # Found, stale, filtered out (odd is blue), the encoder's own miss
            targets=["pin-3", "pin-7", "pin-9", "pin-11"],
            filters=[None, None, "colour == 'red'", None],
        )
        fresh = FreshVectors([f"pin-{i}" for i in range(200)], vectors)
        waterfall = recall_waterfall(index, pairs, k=5, fresh=fresh)
        assert waterfall.lost_to == {
            "labels": 0,
            "encoder": 1,
            "dimension cut": 0,
            "staleness": 1,
            "quantisation": 0,
            "graph": 0,
            "filter": 1,
        }
        many = replace(pairs, positives=[10, 10, 1, 1])
        crowded = recall_waterfall(index, many, k=5, fresh=fresh)
        assert crowded.recall["labels"] == 0.75
        assert (crowded.lost_to["labels"], crowded.lost_to["encoder"]) == (1, 0)
        assert list(waterfall.recall.values()) == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.5, 0.25]
        wide = np.concatenate(
            [np.full((200, 64), 0.0, np.float32), np.eye(200, dtype=np.float32)[:, :200]], axis=1
        )
        wide[:, :64] = 0.01 * vectors[::-1]
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
        first = LabelledPairs(queries=vectors[:1], targets=["pin-0"])
        cut = recall_waterfall(index, first, k=1, fresh=FreshVectors(fresh.ids, wide, wide[:1]))
        assert cut.measured["dimension cut"]


@pytest.fixture
def fused_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReleaseStore:
    """Pins that are fused by default: ``sku<i>`` names pin ``i``, a known query leads to pin 7."""
    monkeypatch.setattr(
        QueryEncoder,
        "load",
        lambda path: SimpleNamespace(encode=lambda texts: unit_vectors(len(texts), 3)),
    )
    store = ReleaseStore(tmp_path / "fused")
    titles = pl.DataFrame({"title": [f"lamp sku{1000 + i}" for i in range(60)]})
    pairs = pl.DataFrame({"query": ["bright lamp"], "entity_id": ["pin-7"]})
    fusion = replace(given_fusion((1.0, 4.0, 0.5)), gate=QueryGate(2.0, 0.05))
    pins = make_input("pin", 60, seed=1)
    inputs = {
        "pin": replace(
            pins, texts=titles, attributes=titles, engagements=Engagements(pairs, fusion=fusion)
        ),
        "query": make_input("query", 1, seed=2, ids=["bright lamp"], attributes=None),
    }
    build_release(inputs, make_bundle(tmp_path / "bundle"), store, quick("exact"))
    return store


def test_explain_fused_answer_shows_rank_and_share_of_each_leg(fused_store: ReleaseStore) -> None:
    arguments = ("query", "--store", fused_store.root, "--entity-type", "pin", "--text", "sku1033")
    asked = (*arguments, "--id", "pin-33", "--id", "pin-7", "--k", "3")
    found = json.loads(run(explain_commands.group, *asked, "--json").stdout)
    best = found["fused"]["answers"][0]
    assert best["id"] == "pin-33" and best["rank"] == 1
    assert best["legs"]["lexical"]["rank"] == 1 and best["legs"]["votes"]["rank"] is None
    assert sum(leg["share"] for leg in best["legs"].values()) == pytest.approx(1.0, abs=0.01)
    weights = {"dense": 1.0, "lexical": 4.0, "votes": 0.5}
    parts = sum(weights[name] * leg["score"] for name, leg in best["legs"].items())
    assert parts == pytest.approx(best["fused"], abs=1e-4)
    assert found["fused"]["is_nonsense"] is False
    assert found["fused"]["nearest_queries"][0][0] == "bright lamp"
    assert "fused answer 1 of 3" in found["why"][0]["fused"]
    assert "below the top 3" in found["why"][1]["fused"]
    shown = run(explain_commands.group, *asked)
    assert "#1" in shown.stdout and "lets it pass" in shown.stderr
    plain = json.loads(run(explain_commands.group, *asked, "--no-fused", "--json").stdout)
    assert plain["fused"] is None and plain["why"][0]["fused"] is None


def test_explain_fused_without_weights_is_refused(store: ReleaseStore) -> None:
    arguments = ("query", "--store", store.root, "--entity-type", "pin", "--like", "pin-3")
    result = run(explain_commands.group, *arguments, "--fused")
    assert result.exit_code == 2 and "no weights" in result.stderr


def test_explain_misses_says_what_each_leg_finds(fused_store: ReleaseStore, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    rows = [f"sku{1000 + i},pin,pin-{i}" for i in range(20)]
    path.write_text("\n".join(["query,entity_type,entity_id", *rows, "bright lamp,pin,pin-7"]))
    arguments = ("misses", "--store", fused_store.root, "--pairs", path, "--k", "2")
    (legs,) = json.loads(run(explain_commands.group, *arguments, "--json").stdout)["legs"]
    assert legs["pairs"] == 21
    assert legs["recall"]["lexical"] > 0.9 and legs["recall"]["fused"] > 0.9
    assert legs["recall"]["candidates"] == 1.0, "60 pins, 100 candidates a leg"
    assert legs["only"]["lexical"] > 15
    assert legs["lost_to"]["no leg"] == 0
    assert "candidates" in run(explain_commands.group, *arguments).stdout
