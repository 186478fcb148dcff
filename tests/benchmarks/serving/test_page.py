"""The comparison of what a page asks: real servers, tiny sizes."""

import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from benchmarks.serving.comparison import Plan
from benchmarks.serving.http_load import http_load
from benchmarks.serving.load import Load
from benchmarks.serving.page import (
    ATTRIBUTES,
    SHARES,
    PageRelease,
    PageSize,
    json_questions,
    page_lines,
    page_release,
    print_page,
    shares_of,
)
from benchmarks.serving.peer_servers import fastapi_server, omni_server
from benchmarks.serving.serve import command
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.service.validation import from_value

TINY = PageSize(pins=60, questions=5, warm_seconds=0.1)
needs_fastapi = pytest.mark.skipif(
    any(util.find_spec(name) is None for name in ("fastapi", "httptools", "orjson")),
    reason="the extra bench is not installed",
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> PageRelease:
    return page_release(tmp_path_factory.mktemp("page"), TINY)


@needs_fastapi
@pytest.mark.slow
def test_both_servers_answer_the_same_hits_with_the_same_attributes(release: PageRelease) -> None:
    with (
        omni_server(release.store, ["--metrics-port", "-1"]) as ours,
        fastapi_server(release.store, release.vectors, are_cached=True) as peer,
        grpc.insecure_channel(ours.address) as channel,
    ):
        for text, body in zip(release.texts, json_questions(release.texts, 4), strict=True):
            url = f"http://{peer.address}/retrieve"
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            answers = []
            for _ in range(2):  # searched, then cached
                with urllib.request.urlopen(request, timeout=60) as response:
                    answers.append(json.loads(response.read()))
            wanted = pb.RetrieveRequest(query=text, entity_type="pin", k=4, attributes=ATTRIBUTES)
            found = rpc.RetrievalStub(channel).Retrieve(wanted, timeout=60)
            expected = [
                (hit.id, {name: from_value(value) for name, value in hit.attributes.items()})
                for hit in found.hits
            ]
            for answer in answers:
                assert [(hit["id"], hit["attributes"]) for hit in answer["hits"]] == expected
                assert answer["releaseId"] == found.release_id


@needs_fastapi
@pytest.mark.slow
def test_page_lines_every_side_answers_without_errors(capsys: pytest.CaptureFixture[str]) -> None:
    found = page_lines(3, Plan((1, 2), rounds=1, seconds=0.2), TINY)
    assert found["concurrency"] == 2
    for name in ("searched", "cached"):
        sides = {side: row for side, row in found[name].items() if side != "shares"}
        assert {side for pair in SHARES.values() for side in pair} == set(sides)
        assert all(row["errors"] == 0 and row["p50_ms"] > 0 for row in sides.values())
        assert found[name]["shares"].keys() == SHARES.keys()
    print_page(found)
    assert "gRPC, attributes" in capsys.readouterr().out


def test_shares_are_medians_of_ratios_within_a_round() -> None:
    rates = {"gRPC": [1.0, 10.0, 100.0], "gRPC, attributes": [0.5, 9.0, 70.0]}
    rows = {
        side: {"per_server_cpu_second_by_round": rates.get(side, [1.0, 1.0, 1.0])}
        for pair in SHARES.values()
        for side in pair
    }
    assert shares_of(rows)["attributes"] == 0.7


def test_serve_page_without_fastapi_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        util, "find_spec", lambda name, package=None: None if name == "fastapi" else object()
    )
    result = CliRunner().invoke(command, ["--peer", "page", "--out", str(tmp_path)])
    assert result.exit_code != 0
    assert "fastapi" in result.output and "omnisearchsage[bench]" in result.output
    assert not list(tmp_path.iterdir())


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """An HTTP server in a thread that refuses every second request, its answers in two pieces."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            count = 0
            while connection.recv(65536):
                count += 1
                status = b"200 OK" if count % 2 else b"503 Service Unavailable"
                connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Le")
                connection.sendall(b"ngth: 3\r\n\r\nabc")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    listening.close()
    thread.join(10)


def test_http_load_counts_answers_and_refusals_apart(refusing_server: str) -> None:
    load = Load(concurrency=1, seconds=0.3, warmup_seconds=0.0)
    outcome = http_load(refusing_server, "/retrieve", [b"{}", b"[]"], load)
    assert outcome.errors.keys() == {"503"}
    assert abs(outcome.errors["503"] - len(outcome.latencies_ms)) <= 1
