"""A server whose store is a URL: takes what becomes active there, and serves on without it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from index_builder.releases.store import ReleaseStore
from index_builder.remote.object_store import ObjectStore
from index_builder.remote.push import push_release
from index_builder.remote.recipe import PACKS
from index_builder.remote.watch import read_status
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from tests.helpers.serving.s3_server import BUCKET, s3_server
from tests.helpers.waiting import until

ASK = pb.RetrieveRequest(query="red cat", entity_type="pin", k=3)
PATIENCE = 120


class Served:
    """A server process on a URL.

    Attributes:
        info: What it announced.
        log_file: Its standard error.
    """

    def __init__(self, process: subprocess.Popen[str], log_file: Path) -> None:
        assert process.stdout is not None
        self.process = process
        self.log_file = log_file
        self.info: dict[str, Any] = json.loads(process.stdout.readline() or "{}")

    def metric(self, name: str) -> float:
        url = f"http://127.0.0.1:{self.info['metrics_port']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line.split(" ")[1] for line in lines if line.startswith(f"{name} ")))

    def log(self) -> str:
        return self.log_file.read_text()

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(f"127.0.0.1:{self.info['port']}") as channel:
            yield channel


def command(url: str, cache: Path, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "retrieval.cli", "serve", "--json", "--store", url),
        *("--store-cache", str(cache), "--store-poll-seconds", "0.2", "--port", "0"),
        *("--metrics-port", "0", "--encoder-form", "torch", *flags),
    ]


@contextmanager
def served(url: str, cache: Path, *flags: str, code: int = 0) -> Iterator[Served]:
    """Run a server on a URL; it ends with ``code``."""
    log_file = cache.with_name("log.txt")
    with open(log_file, "w") as log:
        process = subprocess.Popen(
            command(url, cache, *flags), stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        yield Served(process, log_file)
        process.terminate()
        assert process.wait(PATIENCE) == code
    finally:
        process.kill()
        process.wait()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["one", "two-workers"])
def test_server_on_s3_follows_it_and_survives_its_end(
    store: ReleaseStore, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    cache = tmp_path / "cache"
    with s3_server():
        url = f"s3://{BUCKET}/shop"
        remote = ObjectStore(url)
        push_release(store, "a1", remote)
        with served(url, cache, *flags) as server, server.channel() as channel:
            stub, admin = rpc.RetrievalStub(channel), rpc.AdminStub(channel)

            def release() -> str:
                return str(stub.Retrieve(ASK, timeout=60, wait_for_ready=True).release_id)

            until(lambda: release() == "a1", PATIENCE)
            packs = remote.sizes(PACKS)
            push_release(store, "a2", remote, activate=False)
            (name,) = remote.sizes(PACKS).keys() - packs.keys()
            whole = remote.get(f"{PACKS}/{name}")
            remote.put(f"{PACKS}/{name}", whole[:-1] + bytes([whole[-1] ^ 1]))
            push_release(store, "a2", remote)
            until(lambda: "not the block" in read_status(cache, url).error, PATIENCE)
            until(lambda: server.metric("omni_store_failing") == 1.0, PATIENCE)
            assert release() == "a1" and ReleaseStore(cache).ids() == ["a1"]
            assert "a1 is served on" in server.log()
            remote.put(f"{PACKS}/{name}", whole)
            until(lambda: release() == "a2", PATIENCE)
            until(lambda: server.metric("omni_store_failing") == 0.0, PATIENCE)
            with pytest.raises(grpc.RpcError) as refused:
                admin.Delete(pb.DeleteRequest(entity_type="pin", ids=["x"]))
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert url in (refused.value.details() or "")
            assert admin.Rollback(pb.RollbackRequest()).release_id == "a1"
            reached = read_status(cache, url).reached
            until(lambda: read_status(cache, url).reached > reached + 0.3)
            assert release() == "a1", "a rollback holds"
    # The S3 server is gone: a server starts all the same, on what it has
    with served(url, cache, *flags) as server:
        assert server.info["release_id"] == "a1"
        until(lambda: server.metric("omni_store_failing") == 1.0, PATIENCE)
        assert server.metric("omni_ready") == 1.0
        assert server.metric("omni_store_age_seconds") > 0.5
        assert "a1 is served on, from the cache" in server.log()
        with server.channel() as channel:
            assert rpc.RetrievalStub(channel).Retrieve(ASK, timeout=60).release_id == "a1"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_server_without_a_cache_says_that_the_url_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    with socket.socket() as taken:  # bound and not listened to: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        process = subprocess.run(
            command("s3://bucket/shop", tmp_path / "cache"), capture_output=True, text=True
        )
    assert process.returncode == 1 and not process.stdout
    last = process.stderr.splitlines()[-1]
    assert last.startswith("error: nothing can be served: the cache")
    assert "s3://bucket/shop: reading CURRENT failed" in last


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_server_on_an_empty_url_waits_and_killed_takes_its_follower_along(
    store: ReleaseStore, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/remote"
    with served(url, tmp_path / "cache", code=-signal.SIGKILL) as server:
        assert server.info["release_id"] is None
        assert "omni release push" in server.info["reason"]
        push_release(store, "a1", ObjectStore(url))
        until(lambda: server.metric("omni_ready") == 1.0, PATIENCE)
        follower = int(re.findall(r"following .* process (\d+)", server.log())[0])
        assert is_running(follower)
        server.process.kill()
        until(lambda: not is_running(follower))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_server_refuses_a_store_as_a_cache(store: ReleaseStore, tmp_path: Path) -> None:
    process = subprocess.run(
        command(f"file://{tmp_path}/remote", store.root), capture_output=True, text=True
    )
    assert process.returncode == 1 and "is a store, not the cache of" in process.stderr
