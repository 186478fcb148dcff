"""Servers to measure against, as real processes: ``omni serve``, Milvus, a bare gRPC echo."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import psutil

from benchmarks.index.vectors import default_cache
from encoders.errors import MissingDependency, OmniError

ETCD_PORT = 2379
"""Where the etcd inside Milvus listens, always."""


class ServerDidNotStart(OmniError):
    """A server process ended or stayed silent; the message holds its last output."""


@dataclass(frozen=True, slots=True)
class Process:
    """A running server.

    Attributes:
        address: ``host:port`` of its gRPC port.
        pid: Its main process.
    """

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of the process and its children so far."""
        total = 0.0
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory_mib(self) -> float:
        """Return memory of the process and its children, shared pages counted once (PSS)."""
        total = 0
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
        return total / 2**20

    def _all(self) -> list[psutil.Process]:
        main = psutil.Process(self.pid)
        return [main, *main.children(recursive=True)]


@contextmanager
def omni_server(
    store: Path, flags: Sequence[str] = (), *, timeout_seconds: float = 120
) -> Iterator[Process]:
    """Run ``omni serve`` on a free port until the block ends.

    Raises:
        ServerDidNotStart: It printed no address, or has no release to serve.
    """
    arguments = [
        sys.executable,
        "-m",
        "retrieval.cli",
        "serve",
        "--releases",
        str(store),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--json",
        *flags,
    ]
    with _started(arguments) as (process, log):
        line = _first_line(process, log, timeout_seconds)
        info = json.loads(line)
        if not info.get("release_id"):
            raise ServerDidNotStart(
                f"omni serve has nothing to serve: {info.get('reason')}. Publish a release to"
                f" {store} first."
            )
        yield Process(f"127.0.0.1:{info['port']}", process.pid)


@contextmanager
def echo_server(response_bytes: int) -> Iterator[Process]:
    """Run a bare ``grpc.aio`` + uvloop server that answers ``response_bytes`` bytes."""
    with _started(
        [sys.executable, "-m", "benchmarks.serving.peer_servers", str(response_bytes)]
    ) as (process, log):
        yield Process(f"127.0.0.1:{json.loads(_first_line(process, log, 60))['port']}", process.pid)


def require_fastapi() -> None:
    """Raise ``MissingDependency`` unless all that the FastAPI server needs is installed."""
    if any(util.find_spec(name) is None for name in ("fastapi", "httptools", "orjson")):
        raise MissingDependency("fastapi", "bench", "The FastAPI server to compare with")


@contextmanager
def fastapi_server(store: Path, vectors: Path, *, are_cached: bool) -> Iterator[Process]:
    """Run the FastAPI server of ``fastapi_peer``; raises as ``require_fastapi``."""
    require_fastapi()
    module = "benchmarks.serving.fastapi_peer"
    arguments = [sys.executable, "-m", module, str(store), str(vectors), str(int(are_cached))]
    with _started(arguments) as (process, log):
        port = json.loads(_first_line(process, log, 120))["port"]
        yield Process(f"127.0.0.1:{port}", process.pid)


def milvus_is_installed() -> bool:
    """Tell whether the PyPI packages ``milvus`` (the server) and ``pymilvus`` are installed."""
    return util.find_spec("milvus") is not None and util.find_spec("pymilvus") is not None


@contextmanager
def milvus_server(*, timeout_seconds: float = 240) -> Iterator[Process]:
    """Run a Milvus standalone server in a temporary folder on free ports until the block ends.

    Raises:
        MissingDependency: The package ``milvus`` or ``pymilvus`` is not installed.
        ServerDidNotStart: It did not answer in time.
    """
    if not milvus_is_installed():
        raise MissingDependency("milvus", None, "A Milvus server to compare with")
    folder = default_cache() / "milvus"  # kept: unpacking the server's binaries takes a minute
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # its etcd has one fixed port: one server at a time
        with socket.socket() as etcd:
            if etcd.connect_ex(("127.0.0.1", ETCD_PORT)) == 0:
                raise ServerDidNotStart(
                    f"Milvus needs 127.0.0.1:{ETCD_PORT} for its etcd, but something listens there:"
                    " stop it (a Milvus left behind?)."
                )
        for name in ("data", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)
        port = free_port()
        arguments = [
            sys.executable,
            "-c",
            "import milvus; milvus.main()",
            "--data",
            str(folder),
            "--proxy-port",
            str(port),
        ]
        with _started(arguments) as (process, log):
            address = f"127.0.0.1:{port}"
            end = time.monotonic() + timeout_seconds
            while not _milvus_answers(address):
                if process.poll() is not None or time.monotonic() > end:
                    raise ServerDidNotStart(
                        f"Milvus did not answer on {address} within {timeout_seconds:.0f} s:"
                        f" {_tail(log)}"
                    )
                time.sleep(1)
            yield Process(address, process.pid)


def _milvus_answers(address: str) -> bool:
    from pymilvus import MilvusClient

    try:
        client = MilvusClient(f"http://{address}", timeout=5)
        client.list_collections(timeout=5)
        client.close()
    except Exception:
        return False
    return True


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _started(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    handle, name = tempfile.mkstemp(suffix=".log")
    log = Path(name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=handle, start_new_session=True, env=environment
    )
    try:
        yield process, log
    finally:
        children = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os.close(handle)
        log.unlink(missing_ok=True)


def _first_line(process: subprocess.Popen[bytes], log: Path, timeout_seconds: float) -> str:
    assert process.stdout is not None
    end = time.monotonic() + timeout_seconds
    text = ""
    while time.monotonic() < end and "\n" not in text:
        if select.select([process.stdout], [], [], 0.2)[0]:
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                break
            text += piece.decode()
    if "\n" not in text:
        raise ServerDidNotStart(
            f"The server said nothing within {timeout_seconds:.0f} s: {_tail(log)}"
        )
    return text.split("\n", 1)[0]


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])


def serve_echo(response_bytes: int) -> None:
    """Body of the echo process: answers any unary call of any service; prints its port as JSON."""
    import grpc
    import uvloop

    answer = bytes(response_bytes)

    class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            async def handle(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
                return answer

            return grpc.unary_unary_rpc_method_handler(handle)

    async def main() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Echo(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        sys.stdout.write(json.dumps({"port": port}) + "\n")
        sys.stdout.flush()
        await server.wait_for_termination()

    uvloop.run(main())


if __name__ == "__main__":
    serve_echo(int(sys.argv[1]))
