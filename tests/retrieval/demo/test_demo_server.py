"""The demo's server process: it answers, and its death gets a clear message."""

import os
import signal
from pathlib import Path

import pytest

from retrieval.client import RetrievalClient
from retrieval.demo.questions import QUESTIONS
from retrieval.demo.server_process import DemoServer
from retrieval.errors import ServerDied


@pytest.mark.slow
def test_demo_server_killed_process_is_reported(tmp_path: Path) -> None:
    with DemoServer(tmp_path) as server:  # an empty store: it listens and waits for a release
        server.check()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(60)
        with pytest.raises(ServerDied, match="killed by signal 9"):
            server.check()


@pytest.mark.slow
def test_demo_server_port_in_use_is_refused(tmp_path: Path) -> None:
    with DemoServer(tmp_path) as first, pytest.raises(ServerDied, match="cannot listen on"):
        DemoServer(tmp_path, port=first.info["port"])


@pytest.mark.slow
def test_demo_server_without_a_release_is_not_ready(tmp_path: Path) -> None:
    with DemoServer(tmp_path) as server, RetrievalClient(server.address) as client:
        assert not client.is_ready()


def test_questions_cover_six_languages_and_mark_zero_shot() -> None:
    assert len({question.language for question in QUESTIONS if question.entity_type == "pin"}) >= 6
    foreign = [q for q in QUESTIONS if q.entity_type in ("product", "ad") and q.language != "en"]
    assert foreign and all("zero-shot" in question.note for question in foreign)
    assert any(question.entity_type == "query" for question in QUESTIONS)
