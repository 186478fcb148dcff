"""Small stores and real server processes for fault injection."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil

from benchmarks.small_releases import entity_texts, small_release, write_small_bundle
from encoders.inference.onnx_forms import FEWEST_TEXTS, export_forms
from index_builder.releases.store import ReleaseStore
from protos import retrieval_pb2_grpc as rpc

COUNTS = {"pin": 2000, "product": 500}
DIMENSION = 64


def prepare_store(root: Path) -> tuple[ReleaseStore, Any]:
    """Publish two releases of one space (a1, a2) and one of another (b1).

    Every id starts with its release's name. Returns the store and encoder a.

    They are what `omni rebuild` makes for a server without a GPU: the tower's int8 form, and the
    index kind that it mostly chooses.
    """
    store = ReleaseStore(root / "store")
    first = None
    for space, seed in (("a", 1), ("b", 2)):
        encoder = write_small_bundle(root / space, seed, DIMENSION)
        export_forms(
            encoder, root / space / "forms", entity_texts(FEWEST_TEXTS, seed=13), ("onnx-int8",)
        )
        first = first or encoder
        for number in (1, 2) if space == "a" else (1,):
            name = f"{space}{number}"
            active, prefix = name == "a1", f"{name}:"
            small_release(
                store,
                root / space,
                encoder,
                release_id=name,
                counts=COUNTS,
                id_prefix=prefix,
                activate=active,
                kind="symqg",
            )
    return store, first


class ServerProcess:
    """``omni serve`` as a child process, on ``cores`` if they are given."""

    def __init__(
        self,
        store: Path,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        cores: set[int] | None = None,
    ) -> None:
        self.cores = cores or os.sched_getaffinity(0)
        arguments = [
            "serve",
            "--store",
            str(store),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--metrics-port",
            "0",
            "--json",
            *flags,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "retrieval.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
            preexec_fn=lambda: os.sched_setaffinity(0, self.cores),
        )
        atexit.register(self._end)  # a part that fails leaves no server behind
        assert self.process.stdout is not None, "stdout is a pipe"
        line = self.process.stdout.readline()
        self.info: dict[str, Any] = json.loads(line) if line else {}
        self.address = f"127.0.0.1:{self.info.get('port')}"

    def metrics(self) -> str:
        """What Prometheus would scrape."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.info['metrics_port']}/metrics", timeout=10
        ) as answer:
            return str(answer.read().decode())

    def rss_mib(self) -> float:
        """Resident memory, MiB."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    def cpu_seconds(self) -> float:
        """CPU time so far, all threads."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def stop(self) -> None:
        """SIGTERM, then wait."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """End it with kill -9."""
        self.process.kill()
        self.process.wait()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    values = np.asarray(seconds or [0.0]) * 1e3
    return {
        "p50_ms": round(float(np.percentile(values, 50)), 3),
        "p99_ms": round(float(np.percentile(values, 99)), 3),
    }


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[rpc.RetrievalStub, rpc.AdminStub]]:
    """Stubs on one channel."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield rpc.RetrievalStub(channel), rpc.AdminStub(channel)


def hash_of(text: str) -> int:
    """A small stable hash."""
    return sum(text.encode())
