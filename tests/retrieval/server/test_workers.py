"""Several real processes on one port: swap in place and by generations, rollback, a killed worker,
live writes seen by all, shared metrics.
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from index_builder.releases.store import ReleaseStore
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from tests.helpers.waiting import until


@pytest.fixture
def in_place_mib() -> str:
    return "128"


@pytest.fixture
def server(store: ReleaseStore, in_place_mib: str) -> Iterator[tuple[subprocess.Popen, dict]]:
    flags = [
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--workers",
        "2",
        "--in-place-mib",
        in_place_mib,
        "--json",
        "--shadow-fraction",
        "0",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "retrieval.cli", "serve", "--store", str(store.root), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    yield process, json.loads(process.stdout.readline())
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert not children(process.pid)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def fresh(info: dict) -> grpc.Channel:
    """A connection of its own, so that the kernel may give it to any worker."""
    return grpc.insecure_channel(
        f"127.0.0.1:{info['port']}", options=[("grpc.use_local_subchannel_pool", 1)]
    )


def ask(info: dict, **fields) -> pb.RetrieveResponse:
    with fresh(info) as channel:
        request = pb.RetrieveRequest(**{"query": "red cat", "entity_type": "pin", "k": 3, **fields})
        return rpc.RetrievalStub(channel).Retrieve(request, timeout=120, wait_for_ready=True)


def answered(info: dict) -> float:
    """Retrieves that the metrics count; never less than before, or Prometheus takes it for a
    restart and counts all of them again.
    """
    scraped = (
        urllib.request.urlopen(f"http://127.0.0.1:{info['metrics_port']}/metrics").read().decode()
    )
    return float(re.search(r'omni_requests_total\{code="OK",method="Retrieve"\} (\S+)', scraped)[1])


@pytest.mark.slow
@pytest.mark.parametrize("in_place_mib", ["128", "0"])
def test_workers_swap_crash_and_rollback_lose_no_call(
    server: tuple[subprocess.Popen, dict], in_place_mib: str
) -> None:
    process, info = server
    in_place = in_place_mib != "0"
    assert info["release_id"] == "a1" and info["workers"] == 2 and len(children(process.pid)) == 2
    first = ask(info)
    assert first.release_id == "a1"

    with fresh(info) as channel:
        vector = (
            rpc.RetrievalStub(channel).Embed(pb.EmbedRequest(queries=["night boat"])).embeddings
        )
        entity = pb.Entity(id="live-1", embedding=vector)
        rpc.AdminStub(channel).Upsert(
            pb.UpsertRequest(entity_type="pin", space_id=first.space_id, entities=[entity])
        )

    def shown() -> bool:
        """Whether eight connections, which reach both workers, all show the live entity."""
        return all(ask(info, query="night boat", k=1).hits[0].id == "live-1" for _ in range(8))

    until(shown)

    before, counted = set(children(process.pid)), answered(info)
    assert counted > 0
    with fresh(info) as channel:
        changed = rpc.AdminStub(channel).Activate(pb.ActivateRequest(release_id="b1"), timeout=120)
    assert (changed.release_id, changed.previous_release_id) == ("b1", "a1")
    stayed = before if in_place else set()
    until(lambda: len(children(process.pid)) == 2 and before & set(children(process.pid)) == stayed)
    assert {ask(info).release_id for _ in range(6)} == {"b1"}
    assert answered(info) >= counted, "what the generation before has counted stays"
    with fresh(info) as channel:
        assert rpc.AdminStub(channel).Rollback(pb.RollbackRequest(), timeout=120).release_id == "a1"
    until(lambda: len(children(process.pid)) == 2)
    assert ask(info, query="night boat", k=1).hits[0].id == "live-1", (
        "the live log is replayed after a rollback"
    )

    with fresh(info) as channel, pytest.raises(grpc.RpcError) as missing:
        rpc.AdminStub(channel).Activate(pb.ActivateRequest(release_id="nope"), timeout=120)
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND

    for victim in children(process.pid):
        counted = answered(info)
        os.kill(victim, signal.SIGKILL)
        until(
            lambda victim=victim: (
                len(children(process.pid)) == 2 and victim not in children(process.pid)
            )
        )
        assert ask(info).release_id == "a1"
        assert answered(info) >= counted, "what a killed worker has counted stays"

    scraped = (
        urllib.request.urlopen(f"http://127.0.0.1:{info['metrics_port']}/metrics").read().decode()
    )
    assert 'omni_release_info{form_id="torch-fp32",release_id="a1"' in scraped
