"""A server begins to listen when it can answer, and ends whenever it is told to."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from tests.helpers.serving.real_server import Running, SmallStore
from tests.helpers.waiting import until

ASK = pb.RetrieveRequest(query="red cat", entity_type="pin", k=3)


def command(store: Path, port: int, *flags: str) -> list[str]:
    start = [sys.executable, "-m", "retrieval.cli", "serve", "--json", "--store", str(store)]
    return [*start, "--port", str(port), "--metrics-port", "-1", "--encoder-form", "torch", *flags]


def start(store: Path, port: int, *flags: str) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(command(store, port, *flags), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["port"]


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--workers", "2")])
def test_restart_loses_no_call_of_a_client_that_waits_for_ready(
    small_store: SmallStore, flags: tuple[str, ...]
) -> None:
    process, port = start(small_store.store.root, 0, *flags)
    codes: Counter[str] = Counter()
    stop = threading.Event()
    # Retries stay on: a call whose stream was opened as the GOAWAY arrived is sent again by grpc
    # itself, on the next connection, since the GOAWAY says that no server has seen it
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 300),
    ]

    def call() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            stub = rpc.RetrievalStub(channel)
            while not stop.is_set():
                try:
                    stub.Retrieve(ASK, timeout=120, wait_for_ready=True)
                    codes["OK"] += 1
                except grpc.RpcError as error:
                    codes[f"{error.code().name}: {error.details()}"] += 1
                time.sleep(0.005)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: codes["OK"] > 50)
        end(process)
        process, _ = start(small_store.store.root, port, *flags)
        before = codes["OK"]
        until(lambda: codes["OK"] > before + 50)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        end(process)
    assert set(codes) == {"OK"}, codes


@pytest.mark.slow
def test_start_two_servers_waiting_on_one_port_the_second_to_listen_ends(
    small_store: SmallStore, tmp_path: Path
) -> None:
    store = small_store.copy(tmp_path / "store").store
    current = store.releases / "CURRENT"
    kept = current.rename(tmp_path / "CURRENT")
    first, port = start(store.root, 0)
    second, _ = start(store.root, port)
    both = (first, second)
    kept.rename(current)
    until(lambda: any(process.poll() is not None for process in both))
    ended, serving = both if first.poll() is not None else both[::-1]
    try:
        assert ended.returncode == 1
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = rpc.RetrievalStub(channel).Retrieve(ASK, timeout=60, wait_for_ready=True)
        assert answer.hits
    finally:
        end(serving)


def catches_sigterm(pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) & (1 << (signal.SIGTERM - 1)))


def can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    made = subprocess.run(["unshare", "-p", "-f", "--mount-proc", "true"], capture_output=True)
    return made.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="needs unshare and the right to use it")
def test_sigterm_ends_process_1_during_start_up(small_store: SmallStore) -> None:
    inside = ["unshare", "-p", "-f", "--mount-proc", *command(small_store.store.root, 0)]
    with subprocess.Popen(inside, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: children.read_text().split())
        first = int(children.read_text().split()[0])
        until(lambda: catches_sigterm(first))
        os.kill(first, signal.SIGTERM)
        process.wait(60)
        assert process.stdout is not None and process.stdout.read() == b"", "it was not yet ready"


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_answers_in_both_versions(running_server: Running, version: str) -> None:
    with grpc.insecure_channel(running_server.address) as channel:
        ask = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        wanted = [reflection_pb2.ServerReflectionRequest(list_services="")]
        (listed,) = ask(iter(wanted), timeout=60)
        names = [service.name for service in listed.list_services_response.service]
        assert "omnisearchsage.v1.Retrieval" in names
        assert {f"grpc.reflection.{v}.ServerReflection" for v in ("v1", "v1alpha")} <= set(names)
        described = ask(
            iter(
                [
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
                    for name in names
                ]
            ),
            timeout=60,
        )
        assert all(one.HasField("file_descriptor_response") for one in described)
