"""Release ids from callers: what can be none is their mistake, and none of them writes lines into the log."""

import logging
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from retrieval.cache import QueryCache
from retrieval.errors import InvalidRequest, UnknownRelease
from retrieval.live_releases import LiveReleases
from retrieval.observability import Metrics
from retrieval.serve_config import ServeConfig
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
    return LiveReleases(config, QueryCache(config.cache_bytes, config.cache_ttl_seconds), Metrics(), watch=False)


@pytest.mark.parametrize("release_id", [FORGED, "../escape", ".hidden", "a" * 129, "a/b", "a\x1b[2J"])
async def test_an_id_that_can_be_none_is_the_callers_mistake(tmp_path: Path, lines: list[str], release_id: str) -> None:
    releases = releases_of(tmp_path)
    with pytest.raises(InvalidRequest, match="release_id: a release id has 1 to 128 letters") as refused:
        await releases.activate(release_id)
    assert status_for(refused.value)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "omni_releases_refused" not in releases.metrics.snapshot(), "an alert hangs on it"
    assert not [line for line in lines if "FORGED" in line or not line.isprintable()]
    await releases.stop()


async def test_a_release_that_is_not_there_is_refused_in_one_line(tmp_path: Path, lines: list[str]) -> None:
    releases = releases_of(tmp_path)
    with pytest.raises(UnknownRelease):
        await releases.activate("r7")
    assert len(lines) == 1 and lines[0].startswith("release 'r7' refused: ")
    await releases.stop()
