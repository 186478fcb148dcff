"""What a server refuses unless it is told otherwise, and one policy on all of its ports."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest

from encoders.errors import ConfigError
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.config import ServeConfig
from retrieval.errors import PermissionDenied
from retrieval.security import VISITOR
from retrieval.server import reloading
from tests.helpers.serving.certificates import Certificates, make_certificates, needs_openssl
from tests.helpers.serving.real_server import Running, SmallStore, serving
from tests.helpers.waiting import until

ASK = pb.RetrieveRequest(query="red cat", entity_type="pin", k=3)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def token_file(folder: Path, **entries: str) -> Path:
    """A file of tokens; each is its name's own text and holds the given lines."""
    path = folder / "tokens.toml"
    path.write_text(
        "".join(
            f'[[token]]\nname = "{name}"\nsha256 = "{sha256(name.encode()).hexdigest()}"\n{line}\n'
            for name, line in entries.items()
        )
    )
    return path


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def code_of(call: Any, message: Any, token: str = "") -> grpc.StatusCode:
    try:
        call(message, timeout=60, metadata=bearer(token) if token else None)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def fetch(url: str, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.1.2.3", "search.internal", ""])
def test_config_beyond_loopback_needs_tokens_mtls_or_insecure(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tokens.*--tls-client-ca.*--insecure"):
        ServeConfig(releases=tmp_path, host=host)
    with pytest.raises(ConfigError, match="--insecure"):  # TLS alone lets everybody ask
        ServeConfig(releases=tmp_path, host=host, tls_cert=tmp_path, tls_key=tmp_path)
    for settings in (
        {"insecure": True},
        {"tokens": tmp_path},
        {"tls_cert": tmp_path, "tls_key": tmp_path, "tls_client_ca": tmp_path},
    ):
        ServeConfig(releases=tmp_path, host=host, **settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_config_loopback_needs_nothing(host: str, tmp_path: Path) -> None:
    assert ServeConfig(releases=tmp_path, host=host).is_local
    assert ServeConfig(releases=tmp_path).is_local, "the default"


def test_visitor_is_told_how_admin_calls_become_possible() -> None:
    with pytest.raises(PermissionDenied, match=r"--tokens.*127\.0\.0\.1"):
        VISITOR.require_admin()


@pytest.fixture(scope="module")
def open_server(
    small_store: SmallStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server that listens on every address, without tokens."""
    store = small_store.copy(tmp_path_factory.mktemp("open") / "store")
    with serving(store, host="0.0.0.0", insecure=True) as running:
        yield running


def test_insecure_server_answers_and_refuses_every_change(open_server: Running) -> None:
    with grpc.insecure_channel(open_server.address) as channel:
        retrieval, admin = rpc.RetrievalStub(channel), rpc.AdminStub(channel)
        assert code_of(retrieval.Retrieve, ASK) is grpc.StatusCode.OK
        for call, message in (
            (admin.Activate, pb.ActivateRequest(release_id="x")),
            (admin.Rollback, pb.RollbackRequest()),
            (admin.Upsert, pb.UpsertRequest(entity_type="pin")),
            (admin.Delete, pb.DeleteRequest(entity_type="pin", ids=["pin-1"])),
        ):
            assert code_of(call, message) is grpc.StatusCode.PERMISSION_DENIED
    request = urllib.request.Request(
        open_server.http + "/omnisearchsage.v1.Admin/Delete",
        b'{"entityType": "pin", "ids": ["pin-1"]}',
        {"content-type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 403
    assert json.loads(refused.value.read())["code"] == "permission_denied"


def test_foreign_host_header_is_refused(running_server: Running) -> None:
    url = running_server.http + "/api/search?q=red+cat&k=1"
    assert fetch(url)[0] == 200
    assert fetch(url, Host="evil.example")[0] == 421


def test_tokens_guard_every_port_and_reveal_only_their_own_types(
    small_store: SmallStore, tmp_path: Path
) -> None:
    tokens = token_file(tmp_path, web='entity_types = ["pin"]', ops="admin = true")
    with serving(small_store, tokens=tokens, probe_port=0) as running:
        web, ops = "Bearer web", "Bearer ops"
        for path in ("/api/search?q=red+cat&k=1&type=pin", "/api/describe", "/metrics"):
            assert fetch(running.http + path)[0] == 401, path
            assert fetch(running.http + path, Authorization="Bearer nobody")[0] == 401
            assert fetch(running.http + path, Authorization=web)[0] == 200
        assert json.loads(fetch(running.http + "/healthz")[1]) == {"ready": True}
        assert "entity_types" in json.loads(fetch(running.http + "/healthz", Authorization=ops)[1])
        described = json.loads(fetch(running.http + "/api/describe", Authorization=web)[1])
        assert [entity["entity_type"] for entity in described["entities"]] == ["pin"]
        probe = f"http://127.0.0.1:{running.server.probe_port}"
        for path in ("/healthz", "/livez", "/readyz", "/metrics"):
            assert fetch(probe + path)[0] == 200
        assert fetch(probe + "/api/describe")[0] == 404
        with grpc.insecure_channel(running.address) as channel:
            stub = rpc.RetrievalStub(channel)
            wanted = pb.DescribeReleaseRequest()
            shown = stub.DescribeRelease(wanted, metadata=bearer("web"))
            everything = stub.DescribeRelease(wanted, metadata=bearer("ops"))
            assert [entity.entity_type for entity in shown.entities] == ["pin"]
            assert len(everything.entities) == 4
            for other in ("product", '"query"', '"ad"'):
                assert other in everything.manifest_json and other not in shown.manifest_json
            with pytest.raises(grpc.RpcError) as unknown:
                stub.Retrieve(
                    pb.RetrieveRequest(query="x", entity_type="video", k=1), metadata=bearer("web")
                )
            assert "product" not in unknown.value.details()


def test_tokens_are_read_again_when_their_file_changes(
    small_store: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "POLL_SECONDS", 0.05)
    tokens = token_file(tmp_path, old="")
    with (
        serving(small_store, tokens=tokens) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        call = rpc.RetrievalStub(channel).Retrieve
        assert code_of(call, ASK, "old") is grpc.StatusCode.OK
        assert code_of(call, ASK, "new") is grpc.StatusCode.UNAUTHENTICATED
        token_file(tmp_path, new="")
        until(lambda: code_of(call, ASK, "new") is grpc.StatusCode.OK)
        assert code_of(call, ASK, "old") is grpc.StatusCode.UNAUTHENTICATED
        tokens.write_text("[[token]]\nname = 1")  # a mistake grants and takes nothing
        until(
            lambda: (
                running.server.reloader._stamps[0]
                == reloading._stamps(running.server.reloader._watched[0])
            )
        )
        assert code_of(call, ASK, "new") is grpc.StatusCode.OK


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_reads_tokens_again(small_store: SmallStore, tmp_path: Path, workers: str) -> None:
    tokens = token_file(tmp_path, old="")
    command = [sys.executable, "-m", "retrieval.cli", "serve", "--json", "--store"]
    command += [str(small_store.store.root), "--port", "0", "--metrics-port", "-1"]
    command += ["--tokens", str(tokens), "--workers", workers, "--encoder-form", "torch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = json.loads(process.stdout.readline())["port"]
            stamp = tokens.stat()
            content = (
                tokens.read_text()
                .replace("old", "new")
                .replace(sha256(b"old").hexdigest(), sha256(b"new").hexdigest())
            )
            with open(tokens, "r+") as file:  # unnoticed: the same size, time and place
                file.write(content)
            os.utime(tokens, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            process.send_signal(signal.SIGHUP)
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = rpc.RetrievalStub(channel).Retrieve
                until(lambda: code_of(call, ASK, "new") is grpc.StatusCode.OK)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


@needs_openssl
@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_certificates_are_read_again_when_their_files_change(
    certificates: Certificates,
    small_store: SmallStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
) -> None:
    monkeypatch.setattr(reloading, "POLL_SECONDS", 0.05)
    files = {name: tmp_path / name for name in ("server.pem", "server.key", "ca.pem")}

    def install(server: str, authority: str) -> None:
        shutil.copy(certificates[f"{server}.pem"], files["server.pem"])
        shutil.copy(certificates[f"{server}.key"], files["server.key"])
        shutil.copy(certificates[f"{authority}.pem"], files["ca.pem"])

    install("server", "ca")
    with serving(
        small_store,
        transport=transport,
        tls_cert=files["server.pem"],
        tls_key=files["server.key"],
        tls_client_ca=files["ca.pem"],
    ) as running:
        ports = [int(running.address.rpartition(":")[2]), running.server.metrics_port]
        kinds = [["h2"], ["http/1.1"]]

        def enters(client: str, authority: str) -> set[bool]:
            """Whether the ports trust the client, and show a certificate of the authority."""
            found = []
            for port, protocols in zip(ports, kinds, strict=True):
                context = ssl.create_default_context(cafile=certificates[f"{authority}.pem"])
                context.load_cert_chain(
                    certificates[f"{client}.pem"], certificates[f"{client}.key"]
                )
                context.set_alpn_protocols(protocols)
                found.append(certificates.enters(context, int(port or 0)))
            return set(found)

        assert enters("client", "ca") == {True}
        assert enters("stranger", "ca") == {False}
        install("stranger", "other")
        until(lambda: enters("stranger", "other") == {True})
        assert enters("client", "other") == {False}


@needs_openssl
def test_mutual_tls_guards_the_http_port(
    certificates: Certificates, small_store: SmallStore
) -> None:
    with serving(
        small_store,
        tls_cert=certificates["server.pem"],
        tls_key=certificates["server.key"],
        tls_client_ca=certificates["ca.pem"],
    ) as running:
        port = int(running.server.metrics_port or 0)
        with pytest.raises(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/search?q=lamp", timeout=60)
        context = ssl.create_default_context(cafile=certificates["ca.pem"])
        with pytest.raises(OSError):
            urllib.request.urlopen(f"https://localhost:{port}/healthz", context=context, timeout=60)
        context.load_cert_chain(certificates["client.pem"], certificates["client.key"])
        url = f"https://localhost:{port}/api/search?q=lamp&k=2"
        with urllib.request.urlopen(url, context=context, timeout=60) as answer:
            assert len(json.loads(answer.read())["hits"]) == 2
