"""The demo's server process: it answers, and its death gets a clear message."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from retrieval.client import RetrievalClient
from retrieval.config import ServeConfig
from retrieval.demo.questions import QUESTIONS
from retrieval.demo.server_process import DemoServer
from retrieval.errors import CannotListen, ServerDied
from retrieval.server.server import create_server
from tests.helpers.serving.real_server import SmallStore


@pytest.mark.slow
def test_demo_server_killed_process_is_reported(tmp_path: Path) -> None:
    with DemoServer(tmp_path) as server:  # an empty store: it listens and waits for a release
        server.check()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(60)
        with pytest.raises(ServerDied, match="killed by signal 9"):
            server.check()


@pytest.mark.slow
def test_demo_server_port_in_use_is_refused(small_store: SmallStore) -> None:
    root = small_store.store.root
    with DemoServer(root) as first, pytest.raises(ServerDied, match="cannot listen on"):
        DemoServer(root, port=first.info["port"])


@pytest.mark.slow
def test_demo_server_listening_on_a_port_taken_meanwhile_is_refused(
    small_store: SmallStore,
) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        # Bound and not listening: so is the port of a server that waits for its first release
        config = ServeConfig(releases=small_store.store.root, port=port, metrics_port=None)
        asyncio.run(_start_and_listen_before(config, taken))


async def _start_and_listen_before(config: ServeConfig, taken: socket.socket) -> None:
    server = await create_server(config)
    taken.listen()
    try:
        with pytest.raises(CannotListen, match="cannot listen on"):
            await server.start()
    finally:
        await server.stop()


@pytest.mark.slow
def test_demo_server_without_a_release_is_not_ready(tmp_path: Path) -> None:
    with DemoServer(tmp_path) as server, RetrievalClient(server.address) as client:
        assert not client.is_ready()


def test_questions_cover_six_languages_and_mark_zero_shot() -> None:
    assert len({question.language for question in QUESTIONS if question.entity_type == "pin"}) >= 6
    foreign = [q for q in QUESTIONS if q.entity_type in ("product", "ad") and q.language != "en"]
    assert foreign and all("zero-shot" in question.note for question in foreign)
    assert any(question.entity_type == "query" for question in QUESTIONS)
