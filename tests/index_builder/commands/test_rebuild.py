"""``omni rebuild``: a plan first, then a release; bad usage is refused."""

import json
from pathlib import Path

import pytest

from encoders.inference.signal_store import SignalStore
from index_builder.commands import explain as explain_commands
from index_builder.commands import rebuild as rebuild_command
from index_builder.commands import release as release_commands
from index_builder.commands import update as update_command
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
