"""Release ids from callers: impossible ones are their mistake, and none writes into the log."""

import logging
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from protos import retrieval_pb2 as pb
from retrieval.config import ServeConfig
from retrieval.encoding.query_cache import QueryCache
from retrieval.errors import InvalidRequest, UnknownRelease
from retrieval.observability.metrics import Metrics
from retrieval.releases.manager import LiveReleases, ReleaseChange
from retrieval.security import EVERYONE
from retrieval.server.fleet import ChangeRequest
from retrieval.server.supervisor import Supervisor
from retrieval.service.admin import AdminService
from retrieval.service.calls import CallInfo
from retrieval.status import status_for

FORGED = (
    "x\n2026-01-01 00:00:00,000 INFO retrieval.service.admin: anonymous: release good -> FORGED"
)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the releases' logger writes."""
    written: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: written.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("retrieval.releases")
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)


def releases_of(folder: Path) -> LiveReleases:
    config = ServeConfig(releases=folder, metrics_port=None)
    return LiveReleases(
        config, QueryCache(config.cache_bytes, config.cache_ttl_seconds), Metrics(), watch=False
    )


@pytest.mark.parametrize(
    "release_id", [FORGED, "../escape", ".hidden", "a" * 129, "a/b", "a\x1b[2J"]
)
async def test_activate_impossible_id_is_the_callers_mistake(
    tmp_path: Path, lines: list[str], release_id: str
) -> None:
    releases = releases_of(tmp_path)
    with pytest.raises(
        InvalidRequest, match="release_id: a release id has 1 to 128 letters"
    ) as refused:
        await releases.activate(release_id)
    assert status_for(refused.value)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "omni_releases_refused" not in releases.metrics.snapshot(), "an alert hangs on it"
    assert not [line for line in lines if "FORGED" in line or not line.isprintable()]
    await releases.stop()


async def test_activate_unknown_release_is_the_callers_mistake(
    tmp_path: Path, lines: list[str]
) -> None:
    """A mistyped id must not set off the alert on damaged releases."""
    releases = releases_of(tmp_path)
    with pytest.raises(UnknownRelease) as refused:
        await releases.activate("r7")
    assert status_for(refused.value)[0] is grpc.StatusCode.NOT_FOUND
    assert "omni_releases_refused" not in releases.metrics.snapshot() and not lines
    await releases.stop()


async def test_start_active_release_that_is_gone_is_refused_in_one_line(
    tmp_path: Path, lines: list[str]
) -> None:
    """Here the store is at fault, and an operator has to look after it."""
    (tmp_path / "releases" / "r7").mkdir(parents=True)
    (tmp_path / "releases" / "r7" / "manifest.json").write_text("{}")
    releases = releases_of(tmp_path)
    releases.store._set_current("r7")
    shutil.rmtree(tmp_path / "releases" / "r7")
    await releases.start()
    assert releases.metrics.value("omni_releases_refused", ("UnknownRelease",)) == 1
    assert len([line for line in lines if line.startswith("release 'r7' refused: ")]) == 1
    await releases.stop()


@pytest.mark.parametrize("release_id", [FORGED, "../escape", "a" * 129])
async def test_activate_impossible_id_does_not_reach_the_supervisor(
    tmp_path: Path, release_id: str
) -> None:
    """One worker or several: the caller gets INVALID_ARGUMENT."""
    asked: list[str] = []

    async def supervisor(wanted: str) -> ReleaseChange:
        asked.append(wanted)
        return ReleaseChange(wanted, "")

    (tmp_path / "releases" / "r7").mkdir(parents=True)
    releases = releases_of(tmp_path)
    admin = AdminService(releases.config, releases, supervisor)
    call: Any = CallInfo(None, EVERYONE, 0)  # type: ignore[arg-type]
    with pytest.raises(
        InvalidRequest, match="release_id: a release id has 1 to 128 letters"
    ) as refused:
        await admin.activate(pb.ActivateRequest(release_id=release_id), call)
    assert status_for(refused.value)[0] is grpc.StatusCode.INVALID_ARGUMENT and not asked
    await admin.activate(pb.ActivateRequest(release_id="r7"), call)
    assert asked == ["r7"]
    with pytest.raises(UnknownRelease):
        await admin.activate(pb.ActivateRequest(release_id="r8"), call)
    assert asked == ["r7"]
    admin.close()
    await releases.stop()


def test_supervisor_dropped_change_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    supervisor: Any = SimpleNamespace(fleet=deque())
    worker: Any = SimpleNamespace()
    for release_id in (FORGED, ""):
        Supervisor._carry_out(supervisor, ChangeRequest(worker, release_id))
    forged, back = (record.getMessage() for record in caplog.records)
    assert "\n" not in forged and "FORGED" in forged
    assert "the previous release" in back
