"""The commands on releases: results on stdout, errors in one line, exit codes that tell the truth."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result

from encoders.errors import InvalidVectors, OmniError, RowError
from encoders.inference.signal_store import SignalStore
from index_builder.building.build import build_release
from index_builder.building.update import apply_changes, attributes_of, embed_again, read_changes
from index_builder.commands import explain as explain_commands
from index_builder.commands import rebuild as rebuild_command
from index_builder.commands import release as release_commands
from index_builder.commands import update as update_command
from index_builder.errors import UnknownEntityType
from index_builder.live_log.reader import LiveLogReader
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.explain import (
    FreshVectors,
    LabelledPairs,
    explain_id,
    recall_waterfall,
)
from tests.helpers.release_makers import SPACE, make_bundle, make_input, quick, unit_vectors


class FakeBundle:
    """Embeds by title, so that a test can say which vector a row gets."""

    space_id = SPACE

    def embed_entities(self, catalogue: pl.DataFrame) -> np.ndarray:
        return np.concatenate(
            [unit_vectors(1, sum(map(ord, title or ""))) for title in catalogue["title"].to_list()]
        )


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    store = ReleaseStore(tmp_path / "store")
    bundle = make_bundle(tmp_path / "bundle")
    for seed in (0, 1):
        build_release(
            {"pin": make_input("pin", 200, seed=seed), "ad": make_input("ad", 20)},
            bundle,
            store,
            quick(release_id=f"r{seed}"),
        )
    return store


def run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments], prog_name="omni")  # type: ignore[arg-type]


def test_list_show_verify_diff_rollback_activate_and_gc(store: ReleaseStore) -> None:
    at = ("--store", store.root)
    listed = json.loads(run(release_commands.group, "list", *at, "--json").stdout)
    assert [(s["release_id"], s["active"]) for s in listed] == [("r0", False), ("r1", True)]
    shown = json.loads(run(release_commands.group, "show", *at, "--json").stdout)
    assert shown["entities"]["pin"]["count"] == 200
    assert shown["entities"]["pin"]["norms"]["min"] == pytest.approx(1, abs=1e-4)
    assert run(release_commands.group, "show", *at).exit_code == 0
    assert all(
        r["ok"]
        for r in json.loads(
            run(release_commands.group, "verify", "--all", "--live", *at, "--json").stdout
        )
    )
    diff = json.loads(run(release_commands.group, "diff", "r0", "r1", *at, "--json").stdout)
    assert diff["entities"]["ad"]["golden"]["overlap_at_10"] == 1.0
    assert run(release_commands.group, "diff", "r0", "r1", *at).exit_code == 0
    assert json.loads(run(release_commands.group, "rollback", *at, "--json").stdout) == {
        "active": "r0",
        "before": "r1",
    }
    assert run(release_commands.group, "activate", "r1", *at).exit_code == 0
    assert (
        json.loads(run(release_commands.group, "gc", "--keep", "1", *at, "--json").stdout)[
            "removed"
        ]
        == []
    )


def test_a_damaged_release_makes_verify_exit_1_and_the_error_is_one_line(
    store: ReleaseStore,
) -> None:
    victim = store.path_of("r0") / "pin" / "vectors.npy"
    victim.write_bytes(victim.read_bytes()[:-1])
    result = run(release_commands.group, "verify", "--all", "--store", store.root)
    assert result.exit_code == 1
    assert "DAMAGED" in result.stdout
    result = run(release_commands.group, "activate", "r0", "--store", store.root)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert store.current() == "r1"


def test_verify_all_and_list_see_releases_that_lost_their_manifest(store: ReleaseStore) -> None:
    at = ("--store", store.root)
    (store.path_of("r1") / "manifest.json").unlink()
    result = run(release_commands.group, "verify", "--all", *at, "--json")
    assert result.exit_code == 1
    assert {r["what"]: r["ok"] for r in json.loads(result.stdout)} == {"r0": True, "r1": False}
    assert "DAMAGED" in run(release_commands.group, "verify", "--all", *at).stdout
    listed = run(release_commands.group, "list", *at)
    assert (listed.exit_code, "DAMAGED" in listed.stdout) == (0, True)
    assert [
        (s["release_id"], s["active"])
        for s in json.loads(run(release_commands.group, "list", *at, "--json").stdout)
    ] == [
        ("r0", False),
        ("r1", True),
    ]
    assert (
        json.loads(run(release_commands.group, "gc", "--keep", "1", *at, "--json").stdout)[
            "removed"
        ]
        == []
    )
    shutil.rmtree(store.path_of("r1"))
    assert (
        run(release_commands.group, "verify", "--all", *at).exit_code == 1
    )  # the active release is gone
    store.activate("r0")
    assert run(release_commands.group, "verify", "--all", *at).exit_code == 0


def test_verify_all_reports_a_damaged_current_beside_the_releases(store: ReleaseStore) -> None:
    (store.releases / "CURRENT").write_bytes(b"{}")
    result = run(release_commands.group, "verify", "--all", "--store", store.root, "--json")
    assert result.exit_code == 1
    assert {r["what"]: r["ok"] for r in json.loads(result.stdout)} == {
        "r0": True,
        "r1": True,
        "CURRENT": False,
    }


def test_diff_without_arguments_compares_the_active_release_with_the_one_before(
    store: ReleaseStore,
) -> None:
    """Right after a rebuild the newest release is the active one; it was compared with itself."""
    at = ("--store", store.root)
    diff = json.loads(run(release_commands.group, "diff", *at, "--json").stdout)
    assert (diff["before"], diff["after"]) == ("r0", "r1")
    said = run(release_commands.group, "diff", *at)
    assert "r0 -> r1" in said.output and "active before" in said.output
    store.activate("r0")
    diff = json.loads(run(release_commands.group, "diff", *at, "--json").stdout)
    assert (diff["before"], diff["after"]) == (
        "r0",
        "r1",
    )  # the newest is not active: what activating it would change
    shutil.rmtree(store.path_of("r1"))
    store.activate("r0")
    result = run(release_commands.group, "diff", *at)
    assert result.exit_code == 1
    assert "nothing to compare" in result.output


def test_diff_of_the_newest_release_compares_it_with_the_active_one_or_the_one_before(
    store: ReleaseStore,
) -> None:
    """`diff NEWEST` compared NEWEST with itself: nothing added, nothing removed, whatever it held."""
    at = ("--store", store.root)

    def compared(*named: str) -> tuple[str, str]:
        diff = json.loads(run(release_commands.group, "diff", *named, *at, "--json").stdout)
        return diff["before"], diff["after"]

    assert compared("r1") == ("r0", "r1")  # it is active: with the one active before
    store.activate("r0")
    assert compared("r1") == ("r0", "r1")  # it is not: with the active one
    assert (
        "(the active release, and the newest)"
        in run(release_commands.group, "diff", "r1", *at).output
    )
    assert compared("r0") == ("r0", "r1")
    shutil.rmtree(store.path_of("r1"))
    store.activate("r0")
    result = run(release_commands.group, "diff", "r0", *at)
    assert result.exit_code == 1
    assert "nothing to compare r0 with" in result.output
    (store.releases / "CURRENT").unlink()
    result = run(release_commands.group, "diff", "r0", *at)
    assert result.exit_code == 1
    assert "nothing to compare r0 with" in result.output


def test_a_release_may_be_named_by_the_start_of_its_id(store: ReleaseStore) -> None:
    at = ("--store", store.root)
    for old, new in (("r0", "2026-01-14T09-30-12Z-ab12"), ("r1", "2026-01-15T09-30-12Z-cd34")):
        path = store.path_of(old) / "manifest.json"
        manifest = replace(read_manifest(path.parent), release_id=new)
        path.write_bytes(manifest.to_bytes())
        path.parent.rename(store.path_of(new))
    first, second = store.ids()
    assert (
        json.loads(run(release_commands.group, "activate", "2026-01-14", *at, "--json").stdout)[
            "active"
        ]
        == first
    )
    assert store.current() == first
    assert (
        json.loads(run(release_commands.group, "show", "2026-01-15", *at, "--json").stdout)[
            "release_id"
        ]
        == second
    )
    assert (
        json.loads(run(release_commands.group, "verify", "2026-01-15", *at, "--json").stdout)[0][
            "what"
        ]
        == second
    )
    diff = json.loads(
        run(release_commands.group, "diff", "2026-01-14", "2026-01-15", *at, "--json").stdout
    )
    assert (diff["before"], diff["after"]) == (first, second)
    options = ("--entity-type", "pin", "--like", "pin-3", "--release", "2026-01-15", "--json")
    assert (
        json.loads(run(explain_commands.group, "query", *at, *options).stdout)["release_id"]
        == second
    )
    result = run(release_commands.group, "activate", "2026", *at)
    assert (result.exit_code, store.current()) == (1, first)
    assert f"2 releases begin with '2026': {first}, {second}" in " ".join(result.output.split())
    assert run(release_commands.group, "activate", "26", *at).exit_code == 1
    shutil.copytree(store.path_of(second), store.releases / "2026")
    result = run(release_commands.group, "verify", "2026", *at, "--json")
    assert json.loads(result.stdout)[0]["what"] == "2026", (
        "a whole id is that release, whatever else begins so"
    )


@pytest.mark.parametrize("arguments", [("show",), ("verify",), ("rollback",), ("activate", "nope")])
def test_an_empty_store_is_told_with_the_next_step(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = run(release_commands.group, *arguments, "--store", tmp_path / "empty")
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_rebuild_from_signals_with_a_plan_first(tmp_path: Path) -> None:
    from encoders.towers.bundle import compute_space_id

    bundle = make_bundle(tmp_path / "bundle")
    space = compute_space_id(bundle)
    (bundle / "space.json").write_text(json.dumps({"space_id": space, "dimension": 64}))
    signals = SignalStore(tmp_path / "signals")
    signals.write("pin", [f"p{i}" for i in range(80)], unit_vectors(80, 0), space)
    options = (
        "--store",
        tmp_path / "store",
        "--bundle",
        bundle,
        "--signals",
        signals.root,
        "--index",
        "hnsw",
        "--threads",
        1,
    )
    plan = json.loads(run(rebuild_command.command, *options, "--dry-run", "--json").stdout)
    assert plan["build"]["pin"]["entities"] == 80
    assert not (tmp_path / "store" / "releases" / "CURRENT").exists()
    result = run(rebuild_command.command, *options, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["active"]
    assert made["entities"]["pin"]["count"] == 80
    again = run(
        rebuild_command.command,
        "--store",
        tmp_path / "store",
        "--from-active",
        "--index",
        "hnsw",
        "--threads",
        1,
        "--json",
    )
    assert json.loads(again.stdout)["entities"]["pin"]["count"] == 80
    (bundle / "query_encoder" / "weights.bin").write_bytes(b"changed")
    result = run(rebuild_command.command, *options)
    assert result.exit_code == 1
    assert "space id" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--from-active", "--bundle", "x"),
        ("--bundle", "x"),
        ("--max-memory", "lots", "--from-active"),
        ("--min-recall", "2", "--from-active"),
    ],
)
def test_bad_usage_of_rebuild_exits_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert run(rebuild_command.command, "--store", tmp_path / "s", *arguments).exit_code == 2


@pytest.mark.parametrize(
    ("text", "mib"), [("4G", 4096), ("800M", 800), ("1.5GiB", 1536), (str(2**21), 2), (None, None)]
)
def test_memory_sizes(text: str | None, mib: int | None) -> None:
    assert rebuild_command.parse_memory(text) == mib


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_update_embeds_writes_and_is_seen(store: ReleaseStore, tmp_path: Path) -> None:
    rows = [
        {"id": "new", "entity_type": "pin", "title": "purple dragon", "number": 4},
        {"id": "pin-3", "entity_type": "pin", "op": "delete"},
        {"id": "ad-1", "entity_type": "ad", "op": "delete"},
        {"id": "ad-1", "entity_type": "ad", "title": "back again", "op": "upsert"},
        {"id": "ready", "entity_type": "pin", "embedding": unit_vectors(1, 9)[0].tolist()},
    ]
    changes = read_changes(
        write_lines(tmp_path / "c.jsonl", rows), read_manifest(store.path_of("r1"))
    )
    assert changes.counts() == {
        "ad": {"upserts": 1, "deletes": 0},
        "pin": {"upserts": 2, "deletes": 1},
    }
    assert apply_changes(changes, store, FakeBundle()) == {"pin": 3, "ad": 1}
    with store.open_current() as release:
        LiveFollower(store, release).catch_up()
        pin = release.entity("pin")
        dragon = unit_vectors(1, sum(map(ord, "purple dragon")))[0]
        assert pin.search(dragon, 1, filter="number == 4").ids[0] == "new"
        assert pin.vector("pin-3") is None
        assert pin.search(unit_vectors(1, 9)[0], 1).ids == ["ready"]
        assert release.entity("ad").count == 20
    entries = LiveLogReader(store.live_root, "pin").poll()
    again = embed_again([e for e in entries if e.source and e.id == "new"], FakeBundle())
    (was,) = [e for e in entries if e.id == "new"]
    assert [(e.id, e.time_ns, e.attributes["title"]) for e in again] == [
        ("new", was.time_ns, "purple dragon")
    ]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"title": "no id"}], RowError),
        ([{"id": "a", "entity_type": "pin", "title": "t", "op": "replace"}], RowError),
        ([{"id": "a", "entity_type": "pinn", "title": "t"}], OmniError),
        ([{"id": "a", "entity_type": "product", "title": "t"}], UnknownEntityType),
        ([{"id": "a", "entity_type": "pin", "embedding": [0.5] * 64}], InvalidVectors),
        ([{"id": "a", "entity_type": "pin", "embedding": [1.0]}], InvalidVectors),
    ],
)
def test_a_bad_file_of_changes_writes_nothing(
    store: ReleaseStore, tmp_path: Path, rows: list[dict], error: type[Exception]
) -> None:
    good = {"id": "good", "entity_type": "pin", "embedding": unit_vectors(1, 9)[0].tolist()}
    path = write_lines(tmp_path / "c.jsonl", [good, *rows])
    with pytest.raises(error):
        read_changes(path, read_manifest(store.path_of("r1")))
    assert run(update_command.command, path, "--store", store.root).exit_code in (1, 2)
    assert not (store.live_root / "pin").exists()


def test_update_of_ready_vectors_from_the_command_line(store: ReleaseStore, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "c.jsonl",
        [{"id": "x", "entity_type": "pin", "embedding": unit_vectors(1, 9)[0].tolist()}],
    )
    assert (
        json.loads(
            run(update_command.command, path, "--store", store.root, "--dry-run", "--json").stdout
        )["last_sequence"]
        == {}
    )
    assert json.loads(run(update_command.command, path, "--store", store.root, "--json").stdout)[
        "last_sequence"
    ] == {"pin": 1}


def test_nested_values_and_vectors_are_no_attributes() -> None:
    row = {
        "id": "a",
        "entity_type": "pin",
        "title": "t",
        "pinsage": [0.1],
        "tags": ["x"],
        "deep": [[1]],
        "none": None,
        "map": {"a": 1},
    }
    assert attributes_of(row) == {"title": "t", "tags": ["x"]}


def test_explain_says_why_an_id_was_not_returned(store: ReleaseStore) -> None:
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


def test_the_waterfall_attributes_every_loss_to_its_step(store: ReleaseStore) -> None:
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


def test_every_command_has_help_that_ends_with_an_example() -> None:
    for command in (
        rebuild_command.command,
        update_command.command,
        *release_commands.group.commands.values(),
        *explain_commands.group.commands.values(),
    ):
        text = run(command, "--help").output
        assert "Example: omni " in text
