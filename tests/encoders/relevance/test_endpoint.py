"""A language model grades over HTTP: bounded, resumed, retried, and its key goes nowhere else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from encoders.errors import ConfigError, DataError
from encoders.relevance import endpoint
from encoders.relevance.endpoint import EndpointConfig, grade_by_endpoint, grade_of_answer
from encoders.relevance.grades import GradeBook
from encoders.relevance.sample import Sample


class Model(ThreadingHTTPServer):
    """Answers as a chat endpoint does; ``script`` says how, by the number of the question."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.script: dict[int, tuple[int, str]] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Model

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body)
            self.server.keys.add(self.headers.get("Authorization", ""))
        status, content = self.server.script.get(number, (200, "2"))
        answer = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.url + "/elsewhere")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setattr(endpoint, "_pause", lambda attempt, after: 0.0)
    with Model() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def config(model: Model, **changes: Any) -> EndpointConfig:
    return EndpointConfig(url=model.url, model="m", **{"key": "secret", "concurrency": 1} | changes)


def test_endpoint_grades_every_item_and_sends_its_key(sample: Sample, model: Model) -> None:
    with GradeBook(sample, "m", "model") as book:
        run = grade_by_endpoint(sample, book, config(model, concurrency=4))
        assert set(book.grades.values()) == {2}
    assert (run.asked, run.graded, run.left) == (36, 36, 0)
    assert model.keys == {"Bearer secret"}
    question = json.loads(model.asked[0]["messages"][1]["content"])
    assert set(question) == {"query", "language", "result"}
    assert "good" not in json.dumps(model.asked)


def test_endpoint_limit_bounds_a_run_and_the_next_goes_on(sample: Sample, model: Model) -> None:
    with GradeBook(sample, "m", "model") as book:
        first = grade_by_endpoint(sample, book, config(model, limit=10))
        second = grade_by_endpoint(sample, book, config(model, limit=30))
    assert (first.asked, first.left, second.asked, second.left) == (10, 26, 26, 0)
    assert len(model.asked) == 36


def test_endpoint_overloaded_is_asked_again(sample: Sample, model: Model) -> None:
    model.script = {0: (429, ""), 1: (503, ""), 2: (200, "1")}
    with GradeBook(sample, "m", "model") as book:
        run = grade_by_endpoint(sample, book, config(model, limit=1))
        assert book.grades == {1: 1} and run.graded == 1


def test_endpoint_refusal_ends_the_run_and_keeps_what_was_graded(
    sample: Sample, model: Model
) -> None:
    model.script = {3: (401, "")}
    with GradeBook(sample, "m", "model") as book:
        with pytest.raises(DataError, match=r"401.*saved"):
            grade_by_endpoint(sample, book, config(model))
        assert len(book.grades) == 3
    with GradeBook(sample, "m", "model") as book:
        assert len(book.grades) == 3


def test_endpoint_redirect_is_not_followed(sample: Sample, model: Model) -> None:
    model.script = {0: (302, "")}
    with GradeBook(sample, "m", "model") as book, pytest.raises(DataError, match="302"):
        grade_by_endpoint(sample, book, config(model))
    assert len(model.asked) == 1


def test_endpoint_answer_without_a_grade_leaves_its_item(sample: Sample, model: Model) -> None:
    model.script = {0: (200, "no idea")}
    with GradeBook(sample, "m", "model") as book:
        run = grade_by_endpoint(sample, book, config(model, limit=2))
        assert book.grades == {2: 2} and run.not_understood == 1


def test_endpoint_out_of_reach_is_named(sample: Sample, model: Model) -> None:
    unreachable = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", attempts=2)
    with GradeBook(sample, "m", "model") as book, pytest.raises(DataError, match="reached"):
        grade_by_endpoint(sample, book, unreachable)


@pytest.mark.parametrize(
    ("content", "grade"),
    [
        ("3", 3),
        (" 0\n", 0),
        ("Grade: 1", 1),
        ("<think>2 or 3?</think>1", 1),
        ("10", None),
        ("", None),
        (None, None),
    ],
)
def test_grade_of_answer_is_the_first_number(content: object, grade: int | None) -> None:
    assert grade_of_answer({"choices": [{"message": {"content": content}}]}) == grade


@pytest.mark.parametrize("answer", [None, {}, {"choices": []}, {"choices": [{}]}, [1], "2"])
def test_grade_of_answer_of_another_form_is_none(answer: object) -> None:
    assert grade_of_answer(answer) is None


def test_endpoint_key_is_not_sent_in_the_clear() -> None:
    with pytest.raises(ConfigError, match="https"):
        EndpointConfig(url="http://models.example.com/v1", model="m", key="secret")
    with pytest.raises(ConfigError, match="--url"):
        EndpointConfig(url="file:///etc/passwd", model="m")
    EndpointConfig(url="http://models.example.com/v1", model="m")
