"""Calls over HTTP: the Connect protocol and gRPC-Web, by curl, by hand and by Connect's clients."""

import base64
import gzip
import json
import shutil
import struct
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from starlette.requests import Request

from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.http2.messages import inflated
from retrieval.web import dialects
from retrieval.web.http_calls import SMALL_BODY_BYTES, BodyBudget
from retrieval.web.http_errors import CallFailed
from tests.helpers.serving.node_clients import descriptor_set
from tests.helpers.serving.real_server import Running, SmallStore, serving

RETRIEVE = "/omnisearchsage.v1.Retrieval/Retrieve"
ASK = {"query": "red cat", "entityType": "pin", "k": 3}
JSON = {"content-type": "application/json"}


def post(
    url: str, body: bytes | dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[int, bytes, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, content, headers or JSON)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def over_grpc(running: Running, **fields: Any) -> pb.RetrieveResponse:
    with grpc.insecure_channel(running.address) as channel:
        wanted = pb.RetrieveRequest(**{"query": "red cat", "entity_type": "pin", "k": 3, **fields})
        return rpc.RetrievalStub(channel).Retrieve(wanted, timeout=60)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs the curl program")
def test_curl_gets_the_answer_of_grpc_as_json(running_server: Running) -> None:
    command = ["curl", "--silent", "--fail", "-H", "content-type: application/json"]
    command += ["-d", json.dumps({**ASK, "attributes": ["*"]}), running_server.http + RETRIEVE]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    expected = over_grpc(running_server, attributes=["*"])
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected.hits]
    assert answer["releaseId"] == expected.release_id
    assert set(answer["hits"][0]["attributes"]) == set(expected.hits[0].attributes)
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(
        [hit.score for hit in expected.hits]
    )


@pytest.mark.parametrize(
    ("method", "body", "field"),
    [
        ("Retrieval/Retrieve", ASK, "hits"),
        ("Retrieval/Retrieve", {"query": "x", "entity_type": "pin", "k": 1}, "hits"),
        (
            "Retrieval/RetrieveMulti",
            {"query": "x", "targets": [{"entityType": "ad", "k": 1}]},
            "answers",
        ),
        (
            "Retrieval/RetrieveBatch",
            {"queries": ["x"], "target": {"entityType": "pin", "k": 1}},
            "answers",
        ),
        ("Retrieval/Embed", {"queries": ["x"]}, "embeddings"),
        ("Retrieval/Score", {"query": "x", "entityType": "pin", "ids": ["pin-1", "?"]}, "scores"),
        ("Retrieval/DescribeRelease", {}, "entities"),
    ],
)
def test_every_question_is_answered_as_json(
    running_server: Running, method: str, body: dict[str, Any], field: str
) -> None:
    code, content, headers = post(f"{running_server.http}/omnisearchsage.v1.{method}", body)
    assert code == 200 and headers["content-type"] == "application/json"
    answer = json.loads(content)
    assert field in answer
    if method == "Retrieval/Score":
        assert answer["scores"][1] == "NaN", "as protobuf's JSON form writes it"


def test_admin_calls_are_answered_as_json(small_store: SmallStore, tmp_path: Path) -> None:
    with serving(small_store.copy(tmp_path / "store")) as running:
        url = f"{running.http}/omnisearchsage.v1.Admin/Delete"
        code, content, _ = post(url, {"entityType": "pin", "ids": ["pin-1"]})
        assert code == 200 and json.loads(content)["applied"] == 1


@pytest.mark.parametrize(
    ("path", "body", "code", "name"),
    [
        (RETRIEVE, {**ASK, "k": 0}, 400, "invalid_argument"),
        (RETRIEVE, {**ASK, "entityType": "video"}, 404, "not_found"),
        (RETRIEVE, {**ASK, "releaseId": "other"}, 400, "failed_precondition"),
        (RETRIEVE, {**ASK, "qurey": "typo"}, 400, "invalid_argument"),
        (RETRIEVE, {**ASK, "k": "many"}, 400, "invalid_argument"),
        (RETRIEVE, {}, 404, "not_found"),
        (RETRIEVE, b"{", 400, "invalid_argument"),
        (RETRIEVE, b"\xff\xfe", 400, "invalid_argument"),
        (RETRIEVE, b"[" * 100_000, 400, "invalid_argument"),
        (RETRIEVE, b'{"excludeIds":[' + b'"",' * 200_000 + b'""]}', 400, "invalid_argument"),
        (RETRIEVE, b"", 404, "not_found"),
        ("/omnisearchsage.v1.Retrieval/Nothing", {}, 404, "unimplemented"),
        ("/omnisearchsage.v1.Admin/Activate", {"releaseId": "nope"}, 404, "not_found"),
    ],
)
def test_errors_have_connects_form(
    running_server: Running, path: str, body: Any, code: int, name: str
) -> None:
    content = json.dumps(body).encode() if isinstance(body, list | dict) else body
    got, answer, headers = post(running_server.http + path, content)
    error = json.loads(answer)
    assert (got, error["code"]) == (code, name)
    assert error["message"] and headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
        "application/grpc",
    ],
)
def test_content_types_that_pages_may_send_unasked_are_refused(
    running_server: Running, content_type: str
) -> None:
    code, _, headers = post(running_server.http + RETRIEVE, ASK, {"content-type": content_type})
    assert code == 415 and "application/json" in headers["Accept-Post"]


def test_other_http_methods_are_refused(running_server: Running) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(running_server.http + RETRIEVE)
    assert refused.value.code == 405


def test_timeout_header_ends_the_call(running_server: Running) -> None:
    late = {**JSON, "connect-timeout-ms": "0"}
    code, answer, _ = post(running_server.http + RETRIEVE, {**ASK, "query": "never asked"}, late)
    assert (code, json.loads(answer)["code"]) == (504, "deadline_exceeded")
    wrong = {**JSON, "connect-timeout-ms": "soon"}
    assert post(running_server.http + RETRIEVE, ASK, wrong)[0] == 400


def test_compressed_bodies_are_read_and_bounded(running_server: Running) -> None:
    url = running_server.http + RETRIEVE
    packed = {**JSON, "content-encoding": "gzip"}
    assert post(url, gzip.compress(json.dumps(ASK).encode()), packed)[0] == 200
    assert post(url, gzip.compress(json.dumps(ASK).encode())[:-8], packed)[0] == 400
    code, answer, _ = post(url, gzip.compress(b" " * 2**25), packed)
    assert (code, json.loads(answer)["code"]) == (429, "resource_exhausted")
    code, answer, _ = post(url, b"{}", {**JSON, "content-encoding": "br"})
    assert (code, json.loads(answer)["code"]) == (501, "unimplemented")


def test_compressed_bodies_are_inflated_within_their_ratio_off_the_loop(
    running_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def noting(*arguments: Any) -> bytes:
        names.append(threading.current_thread().name)
        return inflated(*arguments)

    monkeypatch.setattr(dialects, "inflated", noting)
    url = running_server.http + RETRIEVE
    packed = {**JSON, "content-encoding": "gzip"}
    code, answer, _ = post(url, gzip.compress(b" " * 2**22), packed)
    assert (code, json.loads(answer)["code"]) == (429, "resource_exhausted")
    assert "100 times" in json.loads(answer)["message"] and names == ["parse-0"]


async def test_bodies_that_are_small_are_read_whatever_others_hold() -> None:
    async def body_of(size: int, budget: BodyBudget) -> int:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": bytes(size)}

        request = Request({"type": "http", "headers": []}, receive)
        async with budget.body_of(request, 2**20) as content:
            return len(content)

    budget = BodyBudget(max_held=10**6)
    budget.held = 10**6
    assert await body_of(SMALL_BODY_BYTES, budget) == SMALL_BODY_BYTES
    with pytest.raises(CallFailed):
        await body_of(SMALL_BODY_BYTES + 1, budget)
    assert budget.held == 10**6


def test_body_beyond_the_limit_is_refused(small_store: SmallStore) -> None:
    from retrieval.config import Limits

    with serving(small_store, limits=Limits(max_message_bytes=10_000)) as running:
        code, answer, _ = post(running.http + RETRIEVE, b" " * 30_000)
        assert (code, json.loads(answer)["code"]) == (429, "resource_exhausted")
        assert "20000 bytes" in json.loads(answer)["message"], "JSON may have twice as many"


def frames(content: bytes) -> tuple[bytes, dict[str, str]]:
    """The message and the trailers of a gRPC-Web answer."""
    message, trailers = b"", {}
    while content:
        flags, size = struct.unpack_from(">BI", content)
        part, content = content[5 : 5 + size], content[5 + size :]
        if flags & 0x80:
            lines = part.decode().split("\r\n")
            trailers = dict(line.split(": ", 1) for line in lines if line)
        else:
            message = part
    return message, trailers


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_grpc_web_answers_with_trailers(
    running_server: Running, is_text: bool, is_packed: bool
) -> None:
    def ask(**fields: Any) -> tuple[bytes, dict[str, str]]:
        message = pb.RetrieveRequest(query="red cat", entity_type="pin", **fields)
        content = message.SerializeToString()
        if is_packed:
            content = gzip.compress(content)
        body = struct.pack(">BI", int(is_packed), len(content)) + content
        kind = "application/grpc-web-text" if is_text else "application/grpc-web+proto"
        headers = {"content-type": kind, "grpc-encoding": "gzip", "grpc-timeout": "60S"}
        sent = base64.b64encode(body) if is_text else body
        code, answer, got = post(running_server.http + RETRIEVE, sent, headers)
        assert code == 200 and got["content-type"] == kind
        return frames(base64.b64decode(answer) if is_text else answer)

    message, trailers = ask(k=3)
    expected = over_grpc(running_server)
    assert trailers == {"grpc-status": "0"}
    found = pb.RetrieveResponse.FromString(message)
    assert [hit.id for hit in found.hits] == [hit.id for hit in expected.hits]
    message, trailers = ask(k=0)
    assert message == b"" and trailers["grpc-status"] == "3" and "k:" in trailers["grpc-message"]


def test_openapi_document_describes_every_call(running_server: Running) -> None:
    with urllib.request.urlopen(running_server.http + "/openapi.json") as response:
        document = json.loads(response.read())
    methods = [
        f"/{service.full_name}/{method.name}"
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    assert list(document["paths"]) == methods
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for reference in set(text.split("#/components/schemas/")[1:]):
        assert reference.partition('"')[0] in schemas
    retrieve = schemas["RetrieveRequest"]["properties"]
    assert retrieve["entityType"]["type"] == "string"
    assert "1 to the server's `max_k`" in retrieve["k"]["description"]
    assert schemas["RetrieveResponse"]["properties"]["hits"]["type"] == "array"


def test_committed_openapi_document_is_fresh() -> None:
    from retrieval.web.openapi import openapi_document

    path = Path(__file__).parents[3] / "docs" / "reference" / "openapi.json"
    assert json.loads(path.read_text()) == openapi_document(pb.DESCRIPTOR), (
        "run scripts/generate_protos.sh"
    )


@pytest.mark.slow
def test_connect_node_agrees_in_every_protocol(running_server: Running, node_folder: Path) -> None:
    command = ["node", "clients.mjs", str(descriptor_set(node_folder)), running_server.http]
    command.append(f"http://{running_server.address}")
    run = subprocess.run(command, cwd=node_folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert set(found) == {
        "connect json",
        "connect proto",
        "connect json, gRPC port",
        "connect proto, gRPC port",
        "grpc-web proto, gRPC port",
        "grpc-web proto",
        "grpc-web json",
        "grpc",
    }
    first = found["grpc"]
    assert len(first["ids"]) == 3 and min(first["attributes"]) > 0 and first["count"] > 0
    assert first["code"] == "InvalidArgument" and "k: expected" in first["message"]
    for name, answer in found.items():
        assert {**answer, "scores": None} == {**first, "scores": None}, name
        assert answer["scores"] == pytest.approx(first["scores"])


@pytest.fixture
def other_origin(node_folder: Path, tmp_path: Path) -> Iterator[str]:
    """A server of another origin, with the page of a browser client."""
    import http.server
    import threading

    bundle = ["npx", "esbuild", "browser.mjs", "--bundle", "--format=esm"]
    bundle.append(f"--outfile={tmp_path}/bundle.js")
    subprocess.run(bundle, cwd=node_folder, check=True, capture_output=True, timeout=120)
    (tmp_path / "index.html").write_text('<script type="module" src="bundle.js"></script>')

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Quiet(*arguments, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_connect_web_in_a_browser_needs_an_allowed_origin(
    small_store: SmallStore, other_origin: str, node_folder: Path, browser: Any
) -> None:
    from urllib.parse import urlencode

    from selenium.webdriver.support.ui import WebDriverWait

    descriptors = base64.b64encode(descriptor_set(node_folder).read_bytes()).decode()
    for origins in ((other_origin,), ()):
        with serving(small_store, cors_origins=origins) as running:
            given = urlencode({"server": running.http, "descriptors": descriptors})
            browser.get(f"{other_origin}/?{given}")
            WebDriverWait(browser, 60).until(lambda d: d.execute_script("return window.found"))
            found = browser.execute_script("return window.found")
            if origins:
                expected = [hit.id for hit in over_grpc(running).hits]
                assert found == {"connect": expected, "grpcWeb": expected}
            else:
                assert all("fetch" in answer for answer in found.values()), found
