"""``omni bench durability``: kill -9 at random moments, and damaged files.

Publishing, updating and collecting are killed; files are truncated, bit-flipped and swapped.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.record import Measurement, write_record
from encoders.commands.console import (
    fail,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    track,
)
from encoders.errors import OmniError
from index_builder.ann import AnnConfig
from index_builder.building.build import build_release
from index_builder.building.inputs import EntityInput
from index_builder.building.plan import RebuildConfig
from index_builder.live_log.reader import LiveLogReader
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.manifest import MANIFEST_NAME
from index_builder.releases.store import CURRENT_NAME, ReleaseStore
from index_builder.search.entity_index import IndexConfig

DIMENSION = 64
SPACE = "5a" * 32
KINDS = ("hnsw", "symqg", "exact", "int8-graph")


def unit_vectors(count: int, seed: int) -> np.ndarray:
    """float32 ``(count, DIMENSION)`` random unit rows: enough for faults, not for recall."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION), dtype=np.float32)
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def make_bundle(folder: Path) -> Path:
    """A folder with the shape of a model bundle; its towers are bytes that nobody loads here."""
    for part in ("query_encoder", "entity_encoder"):
        (folder / part).mkdir(parents=True)
        (folder / part / "weights.bin").write_bytes(bytes(range(256)) * 64)
    (folder / "space.json").write_text(json.dumps({"space_id": SPACE, "dimension": DIMENSION}))
    return folder


def inputs(seed: int, count: int = 2500) -> dict[str, EntityInput]:
    """Two entity types."""
    return {
        "pin": EntityInput(
            ids=[f"pin-{i}" for i in range(count)],
            vectors=unit_vectors(count, seed),
            space_id=SPACE,
        ),
        "ad": EntityInput(
            ids=[f"ad-{i}" for i in range(50)], vectors=unit_vectors(50, seed + 1), space_id=SPACE
        ),
    }


def config(kind: str = "auto", **changes: Any) -> RebuildConfig:
    """Fast builds: few calibration queries, a low gate."""
    index = IndexConfig(kind=kind, ann=AnnConfig(m=8, ef_construction=40))
    return replace(
        RebuildConfig(index=index, min_recall=0.5, calibration_queries=50, golden_queries=8),
        **changes,
    )


# --- kill -9 --------------------------------------------------------------------------------------


def in_child(work: Callable[[], None], kill_after_seconds: float | None) -> tuple[bool, float]:
    """Run ``work`` in a forked process and SIGKILL it; returns (was killed, seconds)."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    if kill_after_seconds is not None:
        time.sleep(kill_after_seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), time.perf_counter() - started


def _rebuild(store: ReleaseStore, bundle: Path, seed: int) -> None:
    kind = KINDS[seed % len(KINDS)]
    build_release(inputs(seed), bundle, store, config(kind))


def _update(store: ReleaseStore, acknowledged: Path, seed: int) -> None:
    """Write entries for ever; note acknowledged sequence numbers in a file that survives."""
    rng = np.random.default_rng(seed)
    writer = LiveLogWriter(store.live_root, "pin", DIMENSION, file_bytes=200_000)
    descriptor = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        entries = []
        for _ in range(int(rng.integers(1, 40))):
            number = int(rng.integers(0, 4000))
            if rng.random() < 0.2:
                entries.append(LiveEntry(id=f"pin-{number}"))
            else:
                vector = unit_vectors(1, int(rng.integers(1 << 31)))[0]
                entries.append(
                    LiveEntry(
                        id=f"pin-{number}", vector=vector, space_id=SPACE, attributes={"n": number}
                    )
                )
        last = writer.write(entries)
        lines = [
            f"{last - len(entries) + 1 + i} {'-' if e.is_delete else '+'} {e.id}\n"
            for i, e in enumerate(entries)
        ]
        os.write(descriptor, "".join(lines).encode())


def _activate_and_collect(store: ReleaseStore, seed: int) -> None:
    rng = random.Random(seed)
    while True:
        store.activate(rng.choice(store.ids()))
        if rng.random() < 0.5:
            store.rollback()
        if rng.random() < 0.3:
            store.gc(keep=2)
        _publish_copy(store)


def _publish_copy(store: ReleaseStore) -> None:
    """Publish the active release under a new id: the whole publishing path without a build."""
    with store.lock("build", 5.0), store.open_current() as release:
        staging = store.staging(f"copy-{os.getpid()}-{time.time_ns()}")
        shutil.rmtree(staging)
        shutil.copytree(release.path, staging, ignore=shutil.ignore_patterns(MANIFEST_NAME))
        store.publish(
            staging,
            replace(
                release.manifest, release_id=f"copy-{time.time_ns()}", parent=release.release_id
            ),
        )


def check_store(store: ReleaseStore, acknowledged: Path) -> int:
    """The two promises: the active release is whole and answers, and no acknowledged write is lost.

    Returns:
        Acknowledged writes found again.

    Raises:
        OmniError: The store is not whole.
        AssertionError: A write is lost.
    """
    release = store.open_current()
    release.replay_golden()
    follower = LiveFollower(store, release)
    # Adopts what a killed writer wrote and did not promise: that may count or not, but for all
    # alike from now on
    follower.catch_up()
    reader = LiveLogReader(store.live_root, "pin")
    found: dict[int, tuple[str, str]] = {}
    while batch := reader.poll(10_000):
        found |= {e.sequence: ("-" if e.is_delete else "+", e.id) for e in batch}
    lines = acknowledged.read_text().splitlines() if acknowledged.exists() else []
    for line in lines:
        parts = line.split(" ")
        if len(parts) == 3:
            assert found.get(int(parts[0])) == (
                parts[1],
                parts[2],
            ), f"acknowledged write {line!r} is lost: {found.get(int(parts[0]))}"
    latest = {identifier: operation for _, (operation, identifier) in sorted(found.items())}
    assert follower.view("pin").sequence == max(found, default=0), "the view is not that of the log"
    index, query = release.entity("pin"), unit_vectors(1, 1)[0]
    answer = index.search(query, 100).ids
    assert len(set(answer)) == len(answer), "an id came twice"
    assert not [i for i in answer if latest.get(i) == "-"], "a deleted id was returned"
    follower.stop()
    release.close()
    return len(lines)


def kill_rounds(root: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Kill a rebuild, an update or a publish loop ``rounds`` times; check the store after each.

    The publish loop also activates and collects.
    """
    rng = random.Random(seed)
    bundle, store, acknowledged = (
        make_bundle(root / "bundle"),
        ReleaseStore(root / "store"),
        root / "acknowledged.txt",
    )
    in_child(partial(_rebuild, store, bundle, 0), None)
    _, build_seconds = in_child(partial(_rebuild, store, bundle, 1), None)
    assert len(store.ids()) == 2, "an undisturbed rebuild must succeed"
    say(f"an undisturbed rebuild takes {build_seconds:.2f} s here")
    killed: Counter[str] = Counter()
    finished: Counter[str] = Counter()
    writes = 0
    failures: list[str] = []
    stages: Counter[str] = Counter()
    for number in track(range(rounds), "kill -9", rounds):
        what = ("rebuild", "update", "publish, activate, rollback, gc")[number % 3]
        if what == "rebuild":
            work, after = (
                partial(_rebuild, store, bundle, number // 3 % 8),
                rng.uniform(0.0, build_seconds * 1.05),
            )
        elif what == "update":
            work, after = partial(_update, store, acknowledged, number), rng.uniform(0.0, 0.4)
        else:
            work, after = partial(_activate_and_collect, store, number), rng.uniform(0.0, 0.8)
        was_killed, _ = in_child(work, after)
        (killed if was_killed else finished)[what] += 1
        left = [
            p.name.split("-")[0]
            for p in store.releases.iterdir()
            if p.name.startswith((".staging", ".trash", ".CURRENT"))
        ]
        stages.update(f"left behind: {name}" for name in set(left))
        # Checked in a child as well, so that this process never starts the threads of a library,
        # which a fork would break.
        report = root / "check.json"
        report.unlink(missing_ok=True)
        crashed, _ = in_child(partial(_check_into, store, acknowledged, report), None)
        outcome = (
            json.loads(report.read_text())
            if report.exists()
            else {"error": "the checking process died"}
        )
        if crashed or outcome["error"]:
            failures.append(
                f"round {number} ({what} killed after {after:.3f} s): {outcome['error']}"
            )
            say(failures[-1])
        else:
            writes = int(outcome["writes"])
        if number % 10 == 9:
            store.gc(keep=2)
    return {
        "rounds": rounds,
        "killed": dict(killed),
        "had_finished": dict(finished),
        "acknowledged_writes_found_again": writes,
        "rounds_with": dict(stages),
        "failures": failures,
    }


def _check_into(store: ReleaseStore, acknowledged: Path, report: Path) -> None:
    try:
        outcome: dict[str, Any] = {"writes": check_store(store, acknowledged), "error": None}
    except (OmniError, AssertionError) as error:
        outcome = {"writes": 0, "error": f"{type(error).__name__}: {error}"}
    report.write_text(json.dumps(outcome))


# --- corruption -----------------------------------------------------------------------------------


def damage(
    paths: list[Path], rng: random.Random, kinds: tuple[str, ...]
) -> tuple[str, Callable[[], None]]:
    """Damage one file (or swap two) in place; returns what was done and how to undo it."""
    kind = rng.choice(kinds)
    path = rng.choice(paths)
    content = path.read_bytes()
    if kind == "swap":
        other = rng.choice([p for p in paths if p != path])
        other_content = other.read_bytes()
        if other_content != content:
            path.write_bytes(other_content)
            other.write_bytes(content)
            return (
                f"swap {path.name}",
                lambda: (
                    path.write_bytes(content),
                    other.write_bytes(other_content),
                    None,
                )[2],
            )
        kind = "flip"
    if kind == "remove":
        path.unlink()
    elif kind == "append":
        path.write_bytes(content + bytes([rng.randrange(256) for _ in range(rng.randrange(1, 20))]))
    elif kind == "truncate" or not content:
        path.write_bytes(content[: rng.randrange(len(content))] if content else b"x")
    else:
        changed = bytearray(content)
        at = rng.randrange(len(changed))
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
    return f"{kind} {path.name}", lambda: (path.write_bytes(content), None)[1]


def _refused(store: ReleaseStore, live: bool) -> str | None:
    """Name of the error that refuses the damaged store; None if nothing was noticed."""
    try:
        if live:
            reader = LiveLogReader(store.live_root, "pin")
            while reader.poll(10_000):
                pass
        else:
            store.open_current().close()
    except OmniError as error:
        return type(error).__name__
    return None


def corruption_rounds(root: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Damage releases of every index kind and the live log; each must be a typed refusal."""
    rng = random.Random(seed)
    bundle = make_bundle(root / "bundle")
    stores = []
    for number, kind in enumerate(KINDS):
        store = ReleaseStore(root / kind)
        build_release(inputs(number, 2200), bundle, store, config(kind))
        stores.append(store)
    log_store = stores[0]
    writer = LiveLogWriter(log_store.live_root, "pin", DIMENSION, file_bytes=20_000)
    for i in range(300):
        writer.write(
            [
                LiveEntry(
                    id=f"pin-{i}", vector=unit_vectors(1, i)[0], space_id=SPACE, attributes={"n": i}
                )
            ]
        )
    errors: Counter[str] = Counter()
    accepted: list[str] = []
    foreign: list[str] = []
    for number in track(range(rounds), "damage", rounds):
        live = number % 10 == 9
        store = log_store if live else stores[number % len(stores)]
        if live:
            paths = sorted(
                p for p in (store.live_root / "pin").iterdir() if p.name != "writer.lock"
            )
        else:
            current = store.current()
            assert current is not None
            paths = [
                *sorted(p for p in store.path_of(current).rglob("*") if p.is_file()),
                store.releases / CURRENT_NAME,
            ]
        # Bytes behind the acknowledged end of a log are a torn tail, which is tolerated, so nothing
        # is appended to logs here.
        done, undo = damage(
            paths,
            rng,
            (
                ("truncate", "flip", "swap", "remove")
                if live
                else ("truncate", "flip", "swap", "append", "remove")
            ),
        )
        try:
            name = _refused(store, live)
        except Exception as error:
            foreign.append(f"{done}: {type(error).__name__}: {error}")
            name = "(untyped)"
        errors[name or "(accepted)"] += 1
        if name is None:
            accepted.append(done)
        undo()
    for store in stores:
        store.open_current().close()  # undone: whole again
    return {
        "rounds": rounds,
        "refused_by": dict(errors.most_common()),
        "accepted": accepted,
        "untyped_errors": foreign,
    }


@click.command()
@click.option("--kills", type=int, default=200, show_default=True, help="kill -9 rounds.")
@click.option(
    "--damages",
    type=int,
    default=1000,
    show_default=True,
    help="Truncations, bit flips, swaps, removals.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of every random choice.")
@click.option("--no-record", is_flag=True, help="Print only; write no record.")
@json_option
@handle_errors
def command(kills: int, damages: int, seed: int, no_record: bool, as_json: bool) -> None:
    """Kill -9 at random moments of rebuild, update, publish and gc; damage files.

    Checked after each: the active release is whole and answers, no acknowledged write is lost,
    damage is refused by a typed error. Random vectors: faults do not depend on what vectors mean.

    Example: omni bench durability --kills 20 --damages 100 --no-record
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        killing = kill_rounds(Path(folder) / "kill", kills, seed) if kills else {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"

        def work() -> None:  # in a child: a crash of a library would be seen, and counted
            report.write_text(json.dumps(corruption_rounds(Path(folder), damages, seed)))

        crashed, _ = in_child(work, None) if damages else (False, 0.0)
        damaging = json.loads(report.read_text()) if report.exists() else {}
        if damages and not damaging:
            fail(f"the process that opened damaged files {'crashed' if crashed else 'failed'}")
    metrics = {
        "kill": killing,
        "corruption": damaging,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if not no_record:
        write_record(
            "durability",
            Measurement(
                dataset={
                    "name": "random unit vectors (simulated)",
                    "entities": 2550,
                    "dimension": DIMENSION,
                },
                config={"kills": kills, "damages": damages, "seed": seed, "index_kinds": KINDS},
                protocol={
                    "kill": (
                        "SIGKILL after a random time; then the store is opened, verified,"
                        " replayed and searched"
                    ),
                    "clock": "perf_counter",
                },
                metrics=metrics,
                libraries=("hnswlib", "rabitqlib", "numpy"),
            ),
        )
    if as_json:
        print_json(metrics)
        return
    rows: list[tuple[object, ...]] = []
    if killing:
        rows += [
            ("kill -9 rounds", killing["rounds"]),
            ("  process killed in", str(killing["killed"])),
            ("  had finished", str(killing["had_finished"])),
        ]
        rows += [("  acknowledged writes found again", killing["acknowledged_writes_found_again"])]
        rows += [("  rounds with a damaged release or a lost write", len(killing["failures"]))]
    if damaging:
        rows += [
            ("damaged files", damaging["rounds"]),
            ("  refused by", str(damaging["refused_by"])),
        ]
        rows += [
            ("  accepted", len(damaging["accepted"])),
            ("  untyped errors or crashes", len(damaging["untyped_errors"])),
        ]
    print_table(
        "durability (random vectors, simulated)", ("what", "result"), [(a, str(b)) for a, b in rows]
    )
    if killing and killing["failures"]:
        sys.exit(1)
    if damaging and (damaging["accepted"] or damaging["untyped_errors"]):
        say("\n".join([*damaging["accepted"], *damaging["untyped_errors"]]))
        sys.exit(1)
