"""``omni explain``: why an id was not returned, and where labelled recall is lost."""

import json
from dataclasses import replace

import numpy as np

from index_builder.commands import explain as explain_commands
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
from tests.helpers.release_makers import SPACE, unit_vectors
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
