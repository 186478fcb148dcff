"""JSON and gRPC-Web on the gRPC port, by curl, nghttp2's tools and raw frames."""

import json
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import hpack
import pytest

from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.http2 import frames, responses
from retrieval.web import over_http2
from tests.helpers.serving.certificates import make_certificates, needs_openssl
from tests.helpers.serving.raw_http2 import HELLO, goaway_code, read_frames, read_until_pong
from tests.helpers.serving.real_server import Running, SmallStore, serving

RETRIEVE = "/omnisearchsage.v1.Retrieval/Retrieve"
ASK = {"query": "red cat", "entityType": "pin", "k": 3}
ASK_BYTES = json.dumps(ASK).encode()
JSON = ("content-type", "application/json")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs the curl program")
needs_nghttp = pytest.mark.skipif(
    shutil.which("nghttp") is None, reason="needs nghttp (Debian: apt-get install nghttp2-client)"
)


def curl(url: str, body: Any, *flags: str, path: str = RETRIEVE) -> tuple[int, bytes]:
    """The status and the body of an answer to a POST."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    command = ["curl", "--silent", "--show-error", "--max-time", "60"]
    if not any(flag.startswith("content-type") for flag in flags):
        command += ["-H", ": ".join(JSON)]
    command += ["--write-out", "\n%{http_code}", "--data-binary", "@-", *flags, url + path]
    run = subprocess.run(command, input=content, capture_output=True, check=False)
    answer, _, status = run.stdout.rpartition(b"\n")
    assert run.returncode == 0, run.stderr
    return int(status), answer


def curl_h2(running: Running, body: Any, *flags: str, path: str = RETRIEVE) -> tuple[int, bytes]:
    url = f"http://{running.address}"
    return curl(url, body, "--http2-prior-knowledge", *flags, path=path)


def over_grpc(running: Running, **fields: Any) -> pb.RetrieveResponse:
    with grpc.insecure_channel(running.address) as channel:
        wanted = pb.RetrieveRequest(**{"query": "red cat", "entity_type": "pin", "k": 3, **fields})
        return rpc.RetrievalStub(channel).Retrieve(wanted, timeout=60)


@pytest.fixture
def raw(running_server: Running) -> Iterator[socket.socket]:
    """A connection to the gRPC port that has greeted."""
    host, _, port = running_server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(HELLO)
        yield connection


def opening(stream: int, *more: tuple[str, str], method: str = "POST", flags: int = 0) -> bytes:
    fields = [
        (":method", method),
        (":scheme", "http"),
        (":path", RETRIEVE),
        (":authority", "127.0.0.1"),
        *(more or (JSON,)),
    ]
    block = hpack.Encoder().encode(fields)
    return frames.frame(frames.HEADERS, frames.END_HEADERS | flags, stream, block)


def data(stream: int, content: bytes, flags: int = frames.END_STREAM) -> bytes:
    return frames.frame(frames.DATA, flags, stream, content)


def answers(found: list[tuple[int, int, int, bytes]]) -> dict[int, tuple[int, bytes]]:
    """By stream, the status and the body of each answer."""
    decoder = hpack.Decoder()
    read: dict[int, tuple[int, bytes]] = {}
    for kind, _, stream, payload in found:
        if kind == frames.HEADERS:
            read[stream] = int(dict(decoder.decode(payload))[":status"]), b""
        elif kind == frames.DATA:
            read[stream] = read[stream][0], read[stream][1] + payload
    return read


def all_ended(*streams: int) -> Any:
    """Whether these streams have ended, with headers or with data."""
    kinds = (frames.DATA, frames.HEADERS)

    def enough(found: list[tuple[int, int, int, bytes]]) -> bool:
        ended = {s for kind, flags, s, _ in found if kind in kinds and flags & frames.END_STREAM}
        return ended >= set(streams)

    return enough


@needs_curl
def test_curl_on_the_grpc_port_gets_the_answer_of_grpc_as_json(running_server: Running) -> None:
    status, content = curl_h2(running_server, {**ASK, "attributes": ["*"]})
    expected = over_grpc(running_server, attributes=["*"])
    answer = json.loads(content)
    assert status == 200 and answer["releaseId"] == expected.release_id
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected.hits]
    assert set(answer["hits"][0]["attributes"]) == set(expected.hits[0].attributes)


@needs_curl
@pytest.mark.parametrize(
    ("path", "body", "flags", "status", "text"),
    [
        (RETRIEVE, {**ASK, "k": 0}, (), 400, "invalid_argument"),
        (RETRIEVE, b"{", (), 400, "invalid_argument"),
        (RETRIEVE, b'{"excludeIds":[' + b'"",' * 200_000 + b'""]}', (), 400, "at most 100000"),
        (RETRIEVE, b" " * 2**22, (), 429, "Split the request"),
        (RETRIEVE, {**ASK, "query": "new"}, ("-H", "connect-timeout-ms: 0"), 504, "deadline"),
        (RETRIEVE, ASK, ("-H", "content-type: text/plain"), 415, "application/json"),
        (RETRIEVE, ASK, ("-H", "host: evil.example"), 421, "--allowed-host"),
        (RETRIEVE, ASK, ("--request", "PUT"), 405, "Not Allowed"),
        ("/omnisearchsage.v1.Retrieval/Nothing", {}, (), 404, "unimplemented"),
        ("/metrics", {}, (), 404, "Not Found"),
    ],
)
def test_errors_on_the_grpc_port_are_those_of_the_web_port(
    running_server: Running, path: str, body: Any, flags: tuple[str, ...], status: int, text: str
) -> None:
    found = curl_h2(running_server, body, *flags, path=path)
    assert found[0] == status and text in found[1].decode()
    if path != "/metrics":
        assert curl(running_server.http, body, *flags, path=path) == found


@needs_curl
def test_openapi_and_its_head_are_answered(running_server: Running) -> None:
    url = f"http://{running_server.address}/openapi.json"
    command = ["curl", "--silent", "--fail", "--http2-prior-knowledge", url]
    content = subprocess.run(command, check=True, capture_output=True).stdout
    assert "paths" in json.loads(content)
    head = subprocess.run([*command, "--head"], check=True, capture_output=True).stdout
    assert f"content-length: {len(content)}" in head.decode()


@needs_curl
def test_http1_client_is_told_where_http1_is_spoken(running_server: Running) -> None:
    url = f"http://{running_server.address}"
    for version in ("--http1.0", "--http1.1", "--http2"):
        status, text = curl(url, ASK, version)
        assert status == 505 and "--metrics-port" in text.decode()


@needs_curl
@needs_openssl
def test_curl_with_tls_chooses_http2_and_needs_a_token(
    small_store: SmallStore, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)
    tokens = tmp_path / "tokens.toml"
    digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of "secret"
    tokens.write_text(f'[[token]]\nname = "web"\nsha256 = "{digest}"\n')
    settings = {
        "tls_cert": certificates["server.pem"],
        "tls_key": certificates["server.key"],
        "tls_client_ca": certificates["ca.pem"],
        "tokens": tokens,
    }
    with serving(small_store, **settings) as running:
        url = f"https://{running.address}"
        trusted = ["--cacert", str(certificates["ca.pem"]), "--http2"]
        trusted += ["--cert", str(certificates["client.pem"])]
        trusted += ["--key", str(certificates["client.key"])]
        assert curl(url, ASK, *trusted)[0] == 401
        status, content = curl(url, ASK, *trusted, "-H", "authorization: Bearer secret")
        assert status == 200 and len(json.loads(content)["hits"]) == 3
        assert curl(url, ASK, *trusted, "--http1.1")[0] == 505


@needs_nghttp
def test_h2load_gets_every_answer(running_server: Running, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_bytes(ASK_BYTES)
    command = ["h2load", "-n", "200", "-c", "2", "-m", "20", "-d", str(body)]
    command += ["-H", ": ".join(JSON), f"http://{running_server.address}{RETRIEVE}"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "200 succeeded" in run.stdout and "2xx" in run.stdout and "200 2xx" in run.stdout


def test_body_in_many_frames_with_trailers_is_read(raw: socket.socket) -> None:
    raw.sendall(opening(1))
    for at in range(len(ASK_BYTES)):
        raw.sendall(data(1, ASK_BYTES[at : at + 1], 0))
    trailers = hpack.Encoder().encode([("x", "y")])
    raw.sendall(frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, trailers))
    status, content = answers(read_frames(raw, all_ended(1)))[1]
    assert status == 200 and len(json.loads(content)["hits"]) == 3


def test_answer_waits_for_the_stream_window(raw: socket.socket) -> None:
    raw.sendall(frames.settings({frames.INITIAL_WINDOW_SIZE: 100}))
    raw.sendall(opening(1) + data(1, ASK_BYTES))

    def is_blocked(found: list[tuple[int, int, int, bytes]]) -> bool:
        return sum(len(payload) for kind, *_, payload in found if kind == frames.DATA) == 100

    found = read_frames(raw, is_blocked)
    raw.sendall(frames.window_update(1, 2**20))
    found += read_frames(raw, all_ended(1))
    assert len(json.loads(answers(found)[1][1])["hits"]) == 3


def test_requests_and_grpc_calls_share_a_connection(raw: socket.socket) -> None:
    question = pb.RetrieveRequest(query="red cat", entity_type="pin", k=3).SerializeToString()
    message = struct.pack(">BI", 0, len(question)) + question
    for stream, kind in ((1, "application/grpc"), (3, "application/grpc-web+proto")):
        raw.sendall(opening(stream, ("content-type", kind)) + data(stream, message))
    raw.sendall(opening(5) + data(5, ASK_BYTES))
    found = answers_of_all(read_frames(raw, all_ended(1, 3, 5)))
    ids = [hit["id"] for hit in json.loads(found[5])["hits"]]
    for stream in (1, 3):
        size = int.from_bytes(found[stream][1:5], "big")
        answer = pb.RetrieveResponse.FromString(found[stream][5 : 5 + size])
        assert [hit.id for hit in answer.hits] == ids
    assert b"grpc-status: 0" in found[3]


def answers_of_all(found: list[tuple[int, int, int, bytes]]) -> dict[int, bytes]:
    read: dict[int, bytes] = {}
    for kind, _, stream, payload in found:
        if kind == frames.DATA:
            read[stream] = read.get(stream, b"") + payload
    return read


def test_body_that_does_not_come_ends_its_request_alone(
    raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(over_http2, "REQUEST_SECONDS", 0.2)
    raw.sendall(opening(1) + data(1, b"{", 0))
    assert answers(read_frames(raw, all_ended(1)))[1][0] == 499
    raw.sendall(opening(3) + data(3, ASK_BYTES))
    assert answers(read_frames(raw, all_ended(3)))[3][0] == 200


def test_reset_drops_the_request(raw: socket.socket, running_server: Running) -> None:
    raw.sendall(opening(1) + data(1, b"{", 0))
    raw.sendall(frames.reset_stream(1, frames.CANCEL))
    raw.sendall(opening(3) + data(3, ASK_BYTES))
    found = read_frames(raw, all_ended(3)) + read_until_pong(raw)
    assert set(answers(found)) == {3}
    assert running_server.server.grpc_server.buffers.held == 0  # type: ignore[union-attr]


def test_body_longer_or_shorter_than_announced_is_a_protocol_error(raw: socket.socket) -> None:
    for stream, length in ((1, 3), (3, 2000)):
        raw.sendall(opening(stream, JSON, ("content-length", str(length))))
        raw.sendall(data(stream, ASK_BYTES))
    resets = [
        (stream, int.from_bytes(payload, "big"))
        for kind, _, stream, payload in read_until_pong(raw)
        if kind == frames.RST_STREAM
    ]
    assert resets == [(1, frames.PROTOCOL_ERROR), (3, frames.PROTOCOL_ERROR)]


def test_requests_that_reach_no_method_end_the_connection_at_last(raw: socket.socket) -> None:
    streams = range(1, 2 * 1500, 2)
    try:
        for first in range(0, len(streams), 50):
            part = streams[first : first + 50]
            raw.sendall(b"".join(opening(s, method="GET", flags=frames.END_STREAM) for s in part))
            found = read_frames(raw, all_ended(*part))
            if goaway_code(found) is not None:
                break
    except ConnectionError:
        return
    assert goaway_code(found) == frames.ENHANCE_YOUR_CALM


def resets(found: list[tuple[int, int, int, bytes]]) -> list[tuple[int, bytes]]:
    """Streams that were reset, with the codes."""
    return [(stream, code) for kind, _, stream, code in found if kind == frames.RST_STREAM]


def test_answer_before_the_body_has_come_leaves_time_to_read_it(
    raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "STOP_SECONDS", 0.3)
    raw.sendall(opening(1, ("content-type", "text/plain")))
    raw.sendall(opening(3, ("content-type", "text/plain")))
    found = read_frames(raw, all_ended(1, 3))
    assert {answer[0] for answer in answers(found).values()} == {415}
    raw.sendall(data(1, ASK_BYTES, 0) + data(3, ASK_BYTES))  # the second one ends
    found += read_until_pong(raw)
    assert resets(found) == []
    found = read_frames(raw, resets)
    assert resets(found) == [(1, struct.pack(">I", frames.NO_ERROR))]
    time.sleep(0.3)
    raw.sendall(data(1, ASK_BYTES))  # was on its way
    assert resets(read_until_pong(raw)) == []


def test_answers_before_their_bodies_are_reset_at_once_where_they_are_too_many(
    raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "MAX_LINGERING", 2)
    for stream in (1, 3, 5):
        raw.sendall(opening(stream, ("content-type", "text/plain")))
        read_frames(raw, all_ended(stream))
    raw.sendall(frames.reset_stream(1, frames.NO_ERROR))
    raw.sendall(opening(7, ("content-type", "text/plain")))
    found = read_frames(raw, all_ended(7)) + read_until_pong(raw)
    assert 7 not in dict(resets(found)), "the client's reset has made room"


@needs_curl
def test_uploads_that_are_refused_get_their_answer_from_a_busy_server(
    running_server: Running,
) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: curl_h2(running_server, b" " * 2**22)[0], range(24)))
    assert found == [429] * 24
