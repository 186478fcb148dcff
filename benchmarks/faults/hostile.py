"""``omni bench hostile``: every flood, bomb and fuzzed byte of ``attacks``, a good client beside.

What is measured is the neighbour: its slowest call, its errors, and the server's memory. And how
long thousands of clients wait that connect again at once.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import grpc

from benchmarks.faults.attacks import Attack, attacks, run_numbered
from benchmarks.faults.reconnect import reconnect
from benchmarks.faults.servers import ServerProcess
from benchmarks.record import Measurement, out_option, write_record
from benchmarks.small_releases import small_release, write_small_bundle
from encoders.commands.console import (
    fail,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from index_builder.releases.store import ReleaseStore
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc

MAX_CALL_MS = 250.0
MAX_GROWTH_MIB = 200.0
CALL_SECONDS = 0.02
DEADLINE_SECONDS = 20.0
COUNTS = {"pin": 2000, "product": 200}
TRANSPORTS = ("http2", "grpcio")
RECONNECT_SECONDS = 2.0
RECONNECT_WORKERS = 2


class GoodClient:
    """Asks one cached question every 20 ms on a connection of its own.

    Args:
        address: Of the server.
    """

    def __init__(self, address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = rpc.RetrievalStub(self._channel)
        self._question = pb.RetrieveRequest(query="blue whale", entity_type="pin", k=5)
        self._stop = threading.Event()
        self.milliseconds: list[float] = []
        self.errors: Counter[str] = Counter()
        for _ in range(3):
            self._call(wait_for_ready=True)
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._stop.is_set():
            began = time.perf_counter()
            self._call()
            self.milliseconds.append((time.perf_counter() - began) * 1e3)
            self._stop.wait(CALL_SECONDS)

    def _call(self, *, wait_for_ready: bool = False) -> None:
        """Ask, and count an error: one that an earlier attack has left behind, too."""
        try:
            self._stub.Retrieve(
                self._question, timeout=DEADLINE_SECONDS, wait_for_ready=wait_for_ready
            )
        except grpc.RpcError as error:
            self.errors[error.code().name] += 1

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        self._thread.join(DEADLINE_SECONDS)
        self._channel.close()


def attack_beside(
    server: ServerProcess, attack: Attack, number: int, seconds: float, seed: int
) -> dict[str, Any]:
    """Run one attack from another process, and say what the good client saw."""
    before = server.rss_mib()
    good = GoodClient(server.address)
    port = int(server.info["port"])
    attacker = multiprocessing.get_context("spawn").Process(
        target=run_numbered, args=(number, seed, port, seconds), daemon=True
    )
    attacker.start()
    peak = before
    while attacker.is_alive():
        attacker.join(0.1)
        peak = max(peak, server.rss_mib())
    time.sleep(0.2)
    good.close()
    if attacker.exitcode:
        raise RuntimeError(f"{attack.name}: the attacker ended with exit code {attacker.exitcode}")
    slowest = max(good.milliseconds)
    growth = max(peak, server.rss_mib()) - before
    ordered = sorted(good.milliseconds)
    return {
        "attack": attack.name,
        "calls": len(ordered),
        "errors": dict(good.errors),
        "p50_ms": round(ordered[len(ordered) // 2], 2),
        "slowest_ms": round(slowest, 1),
        "growth_mib": round(growth, 1),
        "ok": not good.errors and slowest <= MAX_CALL_MS and growth <= MAX_GROWTH_MIB,
    }


def hostile(
    transport: str, seconds: float, names: tuple[str, ...], seed: int
) -> list[dict[str, Any]]:
    """Run the attacks one after the other against one server."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        encoder = write_small_bundle(root / "bundle", seed=1)
        store = ReleaseStore(root / "store")
        small_release(store, root / "bundle", encoder, counts=COUNTS)
        server = ServerProcess(store.root, "--transport", transport)
        try:
            rows = []
            for number, attack in enumerate(attacks(seed)):
                if not names or any(name in attack.name for name in names):
                    with stage(f"{transport}: {attack.name}"):
                        rows.append(attack_beside(server, attack, number, seconds, seed))
                    say(f"slowest call {rows[-1]['slowest_ms']} ms, {rows[-1]['growth_mib']} MiB")
            return rows
        finally:
            server.stop()


def reconnecting(transport: str, clients: int) -> dict[str, Any]:
    """Have clients connect at once to a server of two workers."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        encoder = write_small_bundle(root / "bundle", seed=1)
        store = ReleaseStore(root / "store")
        small_release(store, root / "bundle", encoder, counts=COUNTS)
        flags = ("--transport", transport, "--workers", str(RECONNECT_WORKERS))
        server = ServerProcess(store.root, *flags)
        try:
            with stage(f"{transport}: {clients} clients connect at once"):
                found = reconnect(server, clients)
        finally:
            server.stop()
    is_ok = not found["failed"] and found["served_s"] <= RECONNECT_SECONDS
    say(f"all served after {found['served_s']} s, {found['failed']} failed")
    return {**found, "workers": RECONNECT_WORKERS, "ok": is_ok}


@click.command("hostile", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seconds", default=10.0, show_default=True, help="Length of each attack.")
@click.option(
    "--transport",
    "transports",
    multiple=True,
    type=click.Choice(TRANSPORTS),
    help="Run only against this one; repeat. Default: both.",
)
@click.option(
    "--attack",
    "names",
    multiple=True,
    help="Run only attacks with this in their name; repeat. Default: all.",
)
@click.option(
    "--clients",
    default=5000,
    show_default=True,
    help="That connect at once to two workers; 0: none.",
)
@click.option("--seed", default=0, show_default=True, help="Of the fuzzer.")
@out_option
@json_option
@handle_errors
def command(
    seconds: float,
    transports: tuple[str, ...],
    names: tuple[str, ...],
    clients: int,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Attack a real server in every known way, a good client beside.

    Exit code 1 if the good client has an error or a call of more than 250 ms, if the server grows
    by more than 200 MiB, or if clients that connect at once are not all served within 2 s.

    Example: omni bench hostile --seconds 2 --transport http2
    """
    chosen = transports or TRANSPORTS
    metrics = {transport: hostile(transport, seconds, names, seed) for transport in chosen}
    storms = {name: reconnecting(name, clients) for name in chosen} if clients else {}
    write_record(
        "hostile",
        Measurement(
            dataset={"name": "small release of a random tower", "real": False, "counts": COUNTS},
            config={"seconds": seconds, "attacks": list(names), "seed": seed},
            protocol={
                "client": "grpcio, one cached Retrieve every 20 ms, on the same machine",
                "attacker": "a process of its own that connects again when the server hangs up",
                "limits": {
                    "slowest_ms": MAX_CALL_MS,
                    "growth_mib": MAX_GROWTH_MIB,
                    "reconnect_s": RECONNECT_SECONDS,
                },
            },
            metrics={**metrics, "reconnect": storms},
            libraries=("grpcio",),
        ),
        folder=out,
    )
    failed = [row for rows in metrics.values() for row in rows if not row["ok"]]
    late = [name for name, storm in storms.items() if not storm["ok"]]
    if as_json:
        print_json({**metrics, "reconnect": storms})
    else:
        for transport, rows in metrics.items():
            print_table(
                f"A good client beside one attacker, {transport}",
                ["attack", "calls", "errors", "p50 ms", "slowest ms", "memory MiB", ""],
                [[*list(row.values())[:-1], "ok" if row["ok"] else "FAILED"] for row in rows],
            )
        if storms:
            print_table(
                f"Clients that connect at once, {RECONNECT_WORKERS} workers",
                ["transport", "clients", "all served s", "p50 ms", "failed", ""],
                [
                    [name, *list(one.values())[:4], "ok" if one["ok"] else "FAILED"]
                    for name, one in storms.items()
                ],
            )
    if failed:
        fail(f"{len(failed)} attacks hurt the good client or the server's memory.")
    if late:
        fail(f"clients that connect at once waited too long: {', '.join(late)}.")
