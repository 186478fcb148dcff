"""Files read again while a server runs."""

import asyncio
import logging
from pathlib import Path

import pytest

from retrieval.server import reloading
from retrieval.server.reloading import Reloaded, Reloader


async def test_reloader_goes_on_after_an_error_of_any_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reloading, "POLL_SECONDS", 0.01)
    path = tmp_path / "tokens.toml"
    path.write_text("wrong")
    read: list[str] = []

    def reload() -> None:
        content = path.read_text()
        read.append(content)
        if content == "wrong again":
            raise TypeError("not what it should be")

    reloader = Reloader([Reloaded("tokens", (path,), reload)])
    reloader.start()
    for content in ("wrong again", "right"):
        path.write_text(content)
        async with asyncio.timeout(5):
            while content not in read:
                await asyncio.sleep(0.01)
    reloader.stop()
    assert any(line.levelno == logging.ERROR and line.exc_info for line in caplog.records)
