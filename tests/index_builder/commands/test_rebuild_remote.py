"""``omni rebuild --store URL``: the parent is pulled; what passes the gates is pushed."""

import json
from pathlib import Path

import pytest
from click.testing import Result

from encoders.inference.signal_store import SignalStore
from encoders.towers.bundle import compute_space_id
from index_builder.commands import rebuild, rebuild_remote
from index_builder.errors import PublishError
from index_builder.releases.store import ReleaseStore
from index_builder.remote.collection import list_remote
from index_builder.remote.object_store import ObjectStore
from index_builder.remote.pull import pull_release
from tests.helpers.release_makers import make_bundle, unit_vectors
from tests.helpers.run_command import run


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return f"file://{tmp_path}/remote"


@pytest.fixture
def sources(tmp_path: Path) -> tuple[object, ...]:
    """Flags that build 80 pins and 60 ads."""
    bundle = make_bundle(tmp_path / "bundle")
    space = compute_space_id(bundle)
    (bundle / "space.json").write_text(json.dumps({"space_id": space, "dimension": 64}))
    signals = SignalStore(tmp_path / "signals")
    for name, count in (("pin", 80), ("ad", 60)):
        signals.write(name, [f"{name}{i}" for i in range(count)], unit_vectors(count, 0), space)
    return ("--bundle", bundle, "--signals", signals.root)


def build(url: str, *flags: object) -> Result:
    options = ("--index", "hnsw", "--threads", 1, "--json")
    return run(rebuild.command, "--store", url, *options, *flags)


def published(url: str) -> list[tuple[str, bool]]:
    return [(s.release_id, s.active) for s in list_remote(ObjectStore(url))]


def test_rebuild_url_builds_over_what_is_active_there_and_pushes(
    url: str, sources: tuple[object, ...], tmp_path: Path
) -> None:
    first = build(url, *sources, "--release-id", "r1")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["active"] and published(url) == [("r1", True)]
    dry = build(url, *sources, "--entity-type", "pin", "--dry-run")
    assert json.loads(dry.stdout)["parent"] == "r1" and published(url) == [("r1", True)]
    # Another machine: its cache is empty
    other = ("--store-cache", tmp_path / "other")
    second = build(url, *sources, *other, "--entity-type", "pin", "--release-id", "r2")
    assert second.exit_code == 0, second.output
    assert json.loads(second.stdout)["entities"]["ad"]["carried_from"] == "r1"
    assert published(url) == [("r1", False), ("r2", True)]
    third = build(url, "--from-active", "--release-id", "r3", "--no-activate")
    assert third.exit_code == 0 and not json.loads(third.stdout)["active"]
    assert published(url) == [("r1", False), ("r2", True), ("r3", False)]
    here = ReleaseStore(tmp_path / "here")
    pull_release(here, ObjectStore(url))
    assert here.verify("r2").parent == "r1"


def test_rebuild_url_gate_that_fails_pushes_nothing(url: str, sources: tuple[object, ...]) -> None:
    assert build(url, *sources, "--release-id", "r1").exit_code == 0
    refused = build(url, *sources, "--release-id", "r2", "--min-recall", "0.99999")
    assert refused.exit_code == 1 and "nothing was published" in refused.output
    assert published(url) == [("r1", True)]


def test_rebuild_url_over_a_parent_that_changed_is_refused(
    url: str, sources: tuple[object, ...], tmp_path: Path
) -> None:
    assert build(url, *sources, "--release-id", "r1").exit_code == 0
    slow = rebuild_remote.open_target(url, tmp_path / "slow")
    assert build(url, *sources, "--release-id", "r2").exit_code == 0
    with pytest.raises(PublishError, match="built over r1, but r2 became active"):
        slow.push("r1x", activate=True)
    assert published(url) == [("r1", False), ("r2", True)]


def test_rebuild_store_cache_without_a_url_is_refused(tmp_path: Path) -> None:
    refused = run(rebuild.command, "--store", tmp_path, "--store-cache", tmp_path, "--from-active")
    assert refused.exit_code == 2 and "expected a URL" in refused.output
