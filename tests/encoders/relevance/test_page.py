"""The page grades, saves at once, resumes after a kill, and answers this machine only."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from encoders.errors import ConfigError
from encoders.relevance.grades import GradeBook
from encoders.relevance.page import JudgeServer
from encoders.relevance.sample import Sample


@pytest.fixture
def server(sample: Sample) -> Iterator[JudgeServer]:
    with GradeBook(sample, "ann", "person") as book, JudgeServer(sample, book) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def call(
    port: int, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    given = {"Content-Type": "application/json"} if body is not None else {}
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, given | headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def state(port: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(port, "GET", "/api/items")[1])
    return found


def test_page_files_run_under_their_own_policy(server: JudgeServer) -> None:
    status, page, headers = call(server.server_port, "GET", "/")
    assert status == 200 and b"/judge_page.js" in page and b"onclick" not in page
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    status, _, headers = call(server.server_port, "GET", "/judge_page.js")
    assert status == 200 and headers["Content-Type"].startswith("text/javascript")


def test_items_hold_no_system(server: JudgeServer, sample: Sample) -> None:
    found = state(server.server_port)
    assert [item["item"] for item in found["items"]] == sample.items["item"].to_list()
    assert "good" not in json.dumps(found) and "rank" not in json.dumps(found)


def test_grade_is_on_the_disk_when_it_is_answered(server: JudgeServer, sample: Sample) -> None:
    port = server.server_port
    assert call(port, "POST", "/api/grade", {"item": 5, "grade": 2})[0] == 200
    line = (sample.path / "grades" / "ann.jsonl").read_text(encoding="utf-8")
    assert json.loads(line)["grade"] == 2
    assert state(port)["grades"] == {"5": 2}
    assert call(port, "POST", "/api/grade", {"item": 5, "grade": None})[0] == 200
    assert state(port)["grades"] == {}


@pytest.mark.parametrize(
    "body", [{"item": 99, "grade": 1}, {"item": 1, "grade": 9}, {"item": "1", "grade": 1}, [], {}]
)
def test_grade_that_is_none_is_refused(server: JudgeServer, body: object) -> None:
    status, answer, _ = call(server.server_port, "POST", "/api/grade", body)
    assert status == 400 and json.loads(answer)["error"]
    assert state(server.server_port)["grades"] == {}


def test_grade_of_another_origin_is_refused(server: JudgeServer) -> None:
    """A page elsewhere can send texts without asking first, or know this machine as its own."""
    grade = {"item": 1, "grade": 1}
    port = server.server_port
    plain = call(port, "POST", "/api/grade", grade, **{"Content-Type": "text/plain"})
    assert plain[0] == 400
    assert call(port, "POST", "/api/grade", grade, Host="evil.example")[0] == 403
    assert call(port, "GET", "/api/items", Host=f"evil.example:{port}")[0] == 403
    assert call(port, "GET", "/api/items", Host=f"localhost:{port}")[0] == 200
    assert state(port)["grades"] == {}


def test_long_body_is_refused_unread(server: JudgeServer) -> None:
    status, _, headers = call(server.server_port, "POST", "/api/grade", "x" * 5000)
    assert status == 400 and headers["Connection"] == "close"


def test_pictures_of_the_sample_run_no_script(server: JudgeServer) -> None:
    shown = {item["entity_id"]: item["picture"] for item in state(server.server_port)["items"]}
    status, content, headers = call(server.server_port, "GET", shown["p0"])
    assert status == 200 and content.startswith(b"<svg")
    assert headers["Content-Type"] == "image/svg+xml"
    assert headers["Content-Security-Policy"].endswith("sandbox")
    assert shown["p1"] == ""
    assert call(server.server_port, "GET", "/picture/../sample.json")[0] == 404
    assert call(server.server_port, "GET", "/picture/99999")[0] == 404


def test_pictures_stay_below_their_folder(sample: Sample, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "in.png").write_bytes(b"png")
    (tmp_path / "out.png").write_bytes(b"secret")
    paths = ["in.png", "../out.png", "https://example.com/a.png", "javascript:alert(1)", ""]
    cycled = [paths[i % 5] for i in range(sample.items.height)]
    changed = Sample(
        sample.path,
        sample.about,
        sample.queries,
        sample.items.drop("image").with_columns(image=pl.Series(cycled)),
        sample.results,
    )
    with (
        GradeBook(sample, "bo", "person") as book,
        JudgeServer(changed, book, images=images) as server,
    ):
        found = {
            cycled[item["item"] - 1]: item["picture"]
            for item in server.items
            if item["entity_id"] != "p0"
        }
    assert found["in.png"].startswith("/picture/")
    assert found["https://example.com/a.png"] == "https://example.com/a.png"
    assert found["../out.png"] == found["javascript:alert(1)"] == found[""] == ""


def test_port_that_is_taken_is_named(server: JudgeServer, sample: Sample) -> None:
    with GradeBook(sample, "bo", "person") as book, pytest.raises(ConfigError, match="--port"):
        JudgeServer(sample, book, port=server.server_port)


def start_page(sample: Sample) -> tuple[subprocess.Popen[str], int]:
    script = "from encoders.__main__ import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "judge", "page", str(sample.path), "--judge", "ann"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("http://127.0.0.1:"), line
    return process, int(line.split(":")[2].split("/")[0])


@pytest.mark.slow
def test_page_killed_goes_on_where_it_stopped(sample: Sample) -> None:
    process, port = start_page(sample)
    try:
        for item in (1, 2, 3):
            assert call(port, "POST", "/api/grade", {"item": item, "grade": item % 4})[0] == 200
    finally:
        process.kill()
        process.communicate()
    process, port = start_page(sample)
    try:
        assert state(port)["grades"] == {"1": 1, "2": 2, "3": 3}
    finally:
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert "3 of 36 items are graded" in rest
