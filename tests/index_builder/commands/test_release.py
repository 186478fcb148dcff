"""The commands on releases: results on stdout, errors in one line, exit codes that agree."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from index_builder.commands import explain as explain_commands
from index_builder.commands import release as release_commands
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from tests.helpers.run_command import run


def test_release_commands_on_two_releases_give_their_results(store: ReleaseStore) -> None:
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


def test_verify_damaged_release_exits_1_with_one_line(
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


def test_verify_all_release_without_manifest_is_reported(store: ReleaseStore) -> None:
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


def test_verify_all_damaged_current_is_reported(store: ReleaseStore) -> None:
    (store.releases / "CURRENT").write_bytes(b"{}")
    result = run(release_commands.group, "verify", "--all", "--store", store.root, "--json")
    assert result.exit_code == 1
    assert {r["what"]: r["ok"] for r in json.loads(result.stdout)} == {
        "r0": True,
        "r1": True,
        "CURRENT": False,
    }


def test_diff_without_arguments_compares_active_with_predecessor(
    store: ReleaseStore,
) -> None:
    """Right after a rebuild the newest release is the active one."""
    at = ("--store", store.root)
    diff = json.loads(run(release_commands.group, "diff", *at, "--json").stdout)
    assert (diff["before"], diff["after"]) == ("r0", "r1")
    shown = run(release_commands.group, "diff", *at)
    assert "r0 -> r1" in shown.output and "active before" in shown.output
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


def test_diff_newest_compares_with_active_or_predecessor(
    store: ReleaseStore,
) -> None:
    """`diff NEWEST` compared NEWEST with itself: nothing added or removed, whatever it held."""
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


def test_release_named_by_unique_prefix_is_found(store: ReleaseStore) -> None:
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
def test_release_commands_empty_store_names_next_step(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = run(release_commands.group, *arguments, "--store", tmp_path / "empty")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
