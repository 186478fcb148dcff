"""Clients and proxies of others: grpc-js, buf curl for grpcurl, nghttp2's tools, nginx, HAProxy."""

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from tests.helpers.serving.certificates import make_certificates, needs_openssl
from tests.helpers.serving.node_clients import descriptor_set
from tests.helpers.serving.proxies import haproxy, needs_haproxy, needs_nginx, nginx
from tests.helpers.serving.real_server import COUNTS, Running, SmallStore, serving

RETRIEVE = "/omnisearchsage.v1.Retrieval/Retrieve"
ASK = pb.RetrieveRequest(query="red cat", entity_type="pin", k=3)
ASK_JSON = {"query": "red cat", "entityType": "pin", "k": 3}
SERVICES = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "omnisearchsage.v1.Admin",
    "omnisearchsage.v1.Retrieval",
]
needs_nghttp = pytest.mark.skipif(
    shutil.which("nghttp") is None, reason="needs nghttp (Debian: apt-get install nghttp2-client)"
)
LARGE = 2**20
Code = grpc.StatusCode


@pytest.fixture(scope="module", params=["http2", "grpcio"])
def server(request: pytest.FixtureRequest, small_store: SmallStore) -> Iterator[Running]:
    """A server on each of both transports of gRPC."""
    with serving(small_store, transport=request.param, allowed_hosts=("omni",)) as running:
        yield running


def ids_of(running: Running) -> list[str]:
    with grpc.insecure_channel(running.address) as channel:
        return [hit.id for hit in rpc.RetrievalStub(channel).Retrieve(ASK, timeout=60).hits]


def json_ids(content: str) -> list[str]:
    return [hit["id"] for hit in json.loads(content)["hits"]]


@pytest.mark.slow
def test_grpc_js_makes_every_kind_of_call(server: Running, node_folder: Path) -> None:
    command = ["node", "grpc_js.mjs", str(descriptor_set(node_folder)), server.address]
    run = subprocess.run(command, cwd=node_folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    expected = ids_of(server)
    assert found["unary"] == found["binary"] == expected
    if server.server.config.transport == "grpcio":
        assert found["gzip"]["code"] == "UNIMPLEMENTED"
    else:
        assert found["gzip"] == expected
    assert (
        found["error"]["code"] == "INVALID_ARGUMENT" and "k: expected" in found["error"]["details"]
    )
    assert (found["deadline"], found["cancelled"]) == ("DEADLINE_EXCEEDED", "CANCELLED")
    assert found["largeMetadata"] != "OK" and set(found["neighbours"]) == {"OK"}
    assert found["afterwards"] == "OK"
    assert found["hits"] == 200 * COUNTS["pin"] and found["parallel"] == {"OK": 200}
    assert found["watch"] == 1  # SERVING
    assert found["services"] == SERVICES and found["described"] >= 1


def buf_curl(folder: Path, *arguments: str) -> str:
    command = [str(folder / "node_modules" / ".bin" / "buf"), "curl", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_buf_curl_reads_the_contract_by_reflection(server: Running, node_folder: Path) -> None:
    flags = ("--protocol", "grpc", "--http2-prior-knowledge")
    url = f"http://{server.address}"
    assert buf_curl(node_folder, *flags, "--list-services", url).split() == SERVICES
    answer = buf_curl(node_folder, *flags, "--data", json.dumps(ASK_JSON), url + RETRIEVE)
    assert json_ids(answer) == ids_of(server)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["connect", "grpcweb"])
def test_buf_curl_asks_the_web_port(server: Running, node_folder: Path, protocol: str) -> None:
    flags = ("--protocol", protocol, "--schema", str(descriptor_set(node_folder)))
    url = server.http + RETRIEVE
    answer = buf_curl(node_folder, *flags, "--data", json.dumps(ASK_JSON), url)
    assert json_ids(answer) == ids_of(server)


@needs_nghttp
def test_h2load_loses_no_grpc_call(server: Running, tmp_path: Path) -> None:
    # What is beyond the limit of streams before its settings came, grpcio resets
    streams = 20 if server.server.config.transport == "grpcio" else 200
    content = ASK.SerializeToString()
    body = tmp_path / "message"
    body.write_bytes(bytes([0]) + len(content).to_bytes(4, "big") + content)
    command = ["h2load", "-n", "2000", "-c", "2", "-m", str(streams), "-d", str(body)]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    command.append(f"http://{server.address}{RETRIEVE}")
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "2000 succeeded, 0 failed, 0 errored" in run.stdout, run.stdout
    assert "2000 2xx" in run.stdout


@needs_nghttp
def test_nghttp_reads_the_openapi_document(running_server: Running) -> None:
    """Of the own transport alone: grpcio speaks nothing but gRPC on its port."""
    command = ["nghttp", f"http://{running_server.address}/openapi.json"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert RETRIEVE in json.loads(run.stdout)["paths"]


def check_through_proxy(channel: grpc.Channel, running: Running) -> None:
    """Answers, errors, 1 MB uploaded, 2 MB answered, and many calls at once pass unchanged."""
    stub = rpc.RetrievalStub(channel)
    answer = stub.Retrieve(ASK, timeout=60, wait_for_ready=True)
    assert [hit.id for hit in answer.hits] == ids_of(running)
    with pytest.raises(grpc.RpcError) as raised:
        stub.Retrieve(pb.RetrieveRequest(query="red cat", entity_type="pin", k=0), timeout=60)
    assert raised.value.code() is Code.INVALID_ARGUMENT
    assert "k: expected" in (raised.value.details() or "")

    target = pb.Target(entity_type="pin", k=100)
    queries = [f"cat {number}".ljust(LARGE // 1000) for number in range(1000)]
    large = stub.RetrieveBatch(pb.RetrieveBatchRequest(queries=queries, target=target), timeout=120)
    assert sum(len(one.hits) for one in large.answers) == 1000 * 100

    calls = [
        stub.Retrieve.future(
            pb.RetrieveRequest(query=f"cat {number % 9}", entity_type="pin", k=3), timeout=60
        )
        for number in range(200)
    ]
    for call in calls:
        call.exception()
    assert Counter(call.code() for call in calls) == {Code.OK: 200}


@pytest.mark.slow
@needs_haproxy
def test_calls_pass_haproxy(server: Running, tmp_path: Path) -> None:
    with haproxy(server, tmp_path) as socket, grpc.insecure_channel(f"unix:{socket}") as channel:
        check_through_proxy(channel, server)


@pytest.mark.slow
@needs_nginx
@needs_openssl
def test_calls_of_both_ports_pass_the_nginx_of_deploy(server: Running, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    credentials = grpc.ssl_channel_credentials(
        certificates["ca.pem"].read_bytes(),
        certificates["client.key"].read_bytes(),
        certificates["client.pem"].read_bytes(),
    )
    options = [("grpc.ssl_target_name_override", "localhost")]
    with nginx(server, certificates, tmp_path) as socket:
        with grpc.secure_channel(f"unix:{socket}", credentials, options) as channel:
            check_through_proxy(channel, server)
        ask = ["curl", "--silent", "--show-error", "--unix-socket", str(socket)]
        ask += ["--cacert", str(certificates["ca.pem"]), "--data", json.dumps(ASK_JSON)]
        ask += ["-H", "content-type: application/json", f"https://localhost{RETRIEVE}"]
        stranger = subprocess.run(ask, capture_output=True, text=True, timeout=60)
        assert "hits" not in stranger.stdout
        ask += ["--cert", str(certificates["client.pem"])]
        ask += ["--key", str(certificates["client.key"])]
        known = subprocess.run(ask, check=True, capture_output=True, text=True, timeout=60)
        assert json_ids(known.stdout) == ids_of(server)
