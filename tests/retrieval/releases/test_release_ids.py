"""Release ids from callers: what can be none is their mistake, and none of them writes lines into
the log.
"""

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
from retrieval.releases.manager import LiveReleases
from retrieval.security import Caller
from retrieval.server.supervisor import Supervisor
from retrieval.service.admin import Changes
from retrieval.status import status_for

FORGED = "x\n2026-01-01 00:00:00,000 INFO omni.service: anonymous: release good -> FORGED"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the releases' logger writes."""
    written: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: written.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("omni.releases")
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
async def test_an_id_that_can_be_none_is_the_callers_mistake(
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


async def test_a_release_that_is_not_there_is_the_callers_mistake(
    tmp_path: Path, lines: list[str]
) -> None:
    """It counted as a refused release, so that a mistyped id set off the alert on damaged ones."""
    releases = releases_of(tmp_path)
    with pytest.raises(UnknownRelease) as refused:
        await releases.activate("r7")
    assert status_for(refused.value)[0] is grpc.StatusCode.NOT_FOUND
    assert "omni_releases_refused" not in releases.metrics.snapshot() and not lines
    await releases.stop()


async def test_an_active_release_that_is_not_there_is_refused_in_one_line(
    tmp_path: Path, lines: list[str]
) -> None:
    """Here the store is at fault, and somebody has to look after it."""
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
async def test_with_several_workers_it_does_not_reach_the_supervisor(
    tmp_path: Path, release_id: str
) -> None:
    """It came back FAILED_PRECONDITION there, and INVALID_ARGUMENT from a server of one worker."""
    asked: list[str] = []

    async def supervisor(wanted: str) -> tuple[str, str]:
        asked.append(wanted)
        return wanted, ""

    (tmp_path / "releases" / "r7").mkdir(parents=True)
    releases = releases_of(tmp_path)
    changes = Changes(releases.config, releases, supervisor)
    caller = Caller("anonymous", True)
    with pytest.raises(
        InvalidRequest, match="release_id: a release id has 1 to 128 letters"
    ) as refused:
        await changes.activate(pb.ActivateRequest(release_id=release_id), None, caller, 0)
    assert status_for(refused.value)[0] is grpc.StatusCode.INVALID_ARGUMENT and not asked
    await changes.activate(pb.ActivateRequest(release_id="r7"), None, caller, 0)
    assert asked == ["r7"]
    with pytest.raises(UnknownRelease):
        await changes.activate(pb.ActivateRequest(release_id="r8"), None, caller, 0)
    assert asked == ["r7"]
    changes.close()
    await releases.stop()


def test_a_dropped_change_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    supervisor: Any = SimpleNamespace(fleet=deque())
    Supervisor._carry_out(supervisor, SimpleNamespace(), FORGED)  # type: ignore[arg-type]
    Supervisor._carry_out(supervisor, SimpleNamespace(), "")  # type: ignore[arg-type]
    forged, back = (record.getMessage() for record in caplog.records)
    assert "\n" not in forged and "FORGED" in forged
    assert "the release before" in back
