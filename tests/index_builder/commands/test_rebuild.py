"""``omni rebuild``: a plan first, then a release; bad usage is refused."""

import json
from pathlib import Path

import polars as pl
import pytest

from encoders.enrichment.engaged_pairs import read_engaged_pairs
from encoders.enrichment.engaged_queries import EngagedQueriesConfig
from encoders.enrichment.engaged_state import EngagedQueriesState, StateError
from encoders.inference.signal_store import SignalStore
from encoders.tables.files import write_table
from index_builder.commands import explain as explain_commands
from index_builder.commands import rebuild as rebuild_command
from index_builder.commands import release as release_commands
from index_builder.commands import update as update_command
from index_builder.commands.rebuild_sources import RebuildSources, engaged_and_calibrating
from index_builder.releases.store import ReleaseStore
from tests.helpers.log_examples import events_of
from tests.helpers.release_makers import make_bundle, unit_vectors
from tests.helpers.run_command import run


def test_rebuild_from_signals_dry_run_then_build(tmp_path: Path) -> None:
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


def voting_queries(store: Path) -> set[str]:
    """Known queries that vote for some pin in the active release."""
    with ReleaseStore(store).open_current() as release:
        fused = release.fused["pin"]
        if fused.votes is None or fused.queries is None:
            return set()
        return set(fused.votes.pairs(fused.queries.ids, fused.entities.ids)["query"])


def test_rebuild_state_votes_and_forgotten_users_and_queries_no_longer_do(tmp_path: Path) -> None:
    from encoders.towers.bundle import compute_space_id

    bundle, store = make_bundle(tmp_path / "bundle"), tmp_path / "store"
    space = compute_space_id(bundle)
    (bundle / "space.json").write_text(json.dumps({"space_id": space, "dimension": 64}))
    signals = SignalStore(tmp_path / "signals")
    signals.write("pin", [f"p{i}" for i in range(40)], unit_vectors(40, 0), space)
    signals.write("query", ["lamp", "sofa", "my secret"], unit_vectors(3, 1), space)
    config = EngagedQueriesConfig(min_users=1, window_days=400, top=3)
    events = [(1, "lamp", f"u{i}", "pin", "p1", "save") for i in range(3)]
    events += [(1, "sofa", f"u{i}", "pin", "p2", "save") for i in range(4)]
    # One user with three pins is still one user
    events += [(1, "my secret", "u0", "pin", f"p{i}", "save") for i in range(3)]
    state = EngagedQueriesState.create(tmp_path / "state", config)
    state.merge(events_of(*events))
    given = ("--store", store, "--state", tmp_path / "state", "--index", "exact", "--threads", 1)
    first = run(rebuild_command.command, *given, "--bundle", bundle, "--signals", signals.root)
    assert first.exit_code == 0, first.output
    assert voting_queries(store) == {"lamp", "sofa"}
    state.delete_users(["u0"])  # "lamp" has two users left
    assert run(rebuild_command.command, *given, "--from-active").exit_code == 0
    assert voting_queries(store) == {"sofa"}
    state.delete_queries(["Sofa"])
    state.merge(events_of(*((2, "chair", f"u{i}", "pin", "p3", "save") for i in range(1, 4))))
    assert run(rebuild_command.command, *given, "--from-active").exit_code == 0
    assert voting_queries(store) == set(), "chair is not in the index of queries"
    state.close()


def test_rebuild_state_leaves_deleted_queries_out_of_the_pairs_that_fit(tmp_path: Path) -> None:
    pairs = pl.DataFrame(
        {
            "query": ["lamp", "Sofa", "chair"],
            "entity_type": ["pin"] * 3,
            "entity_id": ["p1", "p2", "p3"],
            "split": ["train", "validation", "validation"],
            "count": [1, 1, 1],
        }
    )
    write_table(pairs, tmp_path / "pairs.parquet")
    config = EngagedQueriesConfig(min_users=1, window_days=400, top=3)
    with EngagedQueriesState.create(tmp_path / "state", config) as state:
        state.merge(events_of((1, "bed", "u1", "pin", "p4", "save")))
        state.delete_queries(["sofa"])
    sources = RebuildSources(
        bundle=None,
        catalogue=(),
        signals=None,
        from_active=True,
        entity_types=(),
        queries=None,
        pairs=tmp_path / "pairs.parquet",
        state=tmp_path / "state",
    )
    found = engaged_and_calibrating(sources)
    assert found.select("query", "split").rows() == [("bed", "train"), ("chair", "validation")]


def test_rebuild_state_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="omni enrich queries"):
        read_engaged_pairs(tmp_path)
    (tmp_path / "state.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StateError, match="not a readable state"):
        read_engaged_pairs(tmp_path)


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
def test_rebuild_bad_usage_exits_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert run(rebuild_command.command, "--store", tmp_path / "s", *arguments).exit_code == 2


def test_rebuild_query_tower_with_exported_at_is_refused(tmp_path: Path) -> None:
    arguments = ("--query-tower", tmp_path / "new", "--exported-at", "2024-01-01")
    result = run(rebuild_command.command, "--store", tmp_path / "s", *arguments)
    assert result.exit_code == 2
    assert "leave --exported-at out" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "mib"), [("4G", 4096), ("800M", 800), ("1.5GiB", 1536), (str(2**21), 2), (None, None)]
)
def test_parse_memory_sizes_as_mib(text: str | None, mib: int | None) -> None:
    assert rebuild_command.parse_memory(text) == mib


def test_commands_help_ends_with_example() -> None:
    for command in (
        rebuild_command.command,
        update_command.command,
        *release_commands.group.commands.values(),
        *explain_commands.group.commands.values(),
    ):
        text = run(command, "--help").output
        assert "Example: omni " in text
