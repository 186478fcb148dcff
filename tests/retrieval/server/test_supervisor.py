"""The supervisor's own logic, with stand-ins for workers and releases: no failed change costs a
healthy worker.

Each scenario runs in a process of its own (``python test_supervisor.py NAME FOLDER``): pytest has
threads, and must not be forked.
"""

import asyncio
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from encoders.errors import ConfigError
from index_builder.errors import PublisherBusy, ReleaseCorrupt
from index_builder.releases import store as publishing
from index_builder.releases.store import ReleaseStore
from retrieval.config import ServeConfig
from retrieval.releases import current_file
from retrieval.server import release_graphs, supervisor
from retrieval.server.fleet import Worker
from retrieval.server.worker import RELEASE_ORDERS, Assignment, write_cache


@pytest.mark.slow
def test_change_release_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    found = play("memory", tmp_path)
    assert found["replies"] == [
        ["r2", "", "MemoryError"],
        ["r3", "r3", ""],
    ], "refused with a reply; the next change works"
    assert found["after_refusal"] == ["r1", 2] and found["end"] == ["r3", 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "kind"), [("read_only", "OSError"), ("busy", "PublisherBusy")]
)
def test_change_store_not_writable_former_generation_goes_on(
    tmp_path: Path, scenario: str, kind: str
) -> None:
    found = play(scenario, tmp_path)
    assert found["replies"] == [["r2", "", kind], ["r2", "r2", ""]]
    assert (
        found["after_refusal"] == ["r1", 2] and found["same_workers"] and found["current"] == "r1"
    )
    assert found["end"] == ["r2", 2] and found["current_end"] == "r2"


@pytest.mark.slow
def test_fork_failure_refuses_the_change_and_delays_a_replacement(tmp_path: Path) -> None:
    found = play("fork", tmp_path)
    assert found["replies"] == [["r2", "", "BlockingIOError"]]
    assert found["after_refusal"] == ["r1", 2] and found["same_workers"]
    assert found["without_forks"] == ["r1", 1] and found["end"] == ["r1", 2]


@pytest.mark.slow
def test_crash_loop_workers_are_replaced_ever_more_rarely(tmp_path: Path) -> None:
    found = play("crash_loop", tmp_path)
    assert found["seconds"] > 1.2, "pauses of 0.2, 0.4 and 0.8 s: a crash loop does not spin"
    assert found["end"] == ["r1", 2]


@pytest.mark.slow
def test_start_refused_release_is_reported_and_tried_again(tmp_path: Path) -> None:
    found = play("first_refused", tmp_path)
    assert found["announced"] == [None, "golden recall too low"]
    assert found["empty"] == ["", 2] and found["end"] == ["r1", 2]


@pytest.mark.slow
def test_change_during_a_change_waits_for_it(tmp_path: Path) -> None:
    found = play("twice", tmp_path)
    assert found["replies"] == [["r2", "r2", ""], ["r3", "r3", ""]]
    assert found["most"] == 4, "two generations at most, beside dismissed workers"
    assert found["end"] == ["r3", 2]


@pytest.mark.slow
def test_rollback_dismissed_workers_of_the_release_are_not_counted(tmp_path: Path) -> None:
    found = play("back", tmp_path)
    assert found["replies"] == [["r2", "r2", ""], ["", "r1", ""]]
    assert found["end"] == ["r1", 2] and found["forks"] == 6, (
        "dismissed workers of the same release are neither counted nor replaced"
    )


@pytest.mark.slow
def test_change_leaves_no_graphs_of_refused_releases_and_no_files(tmp_path: Path) -> None:
    found = play("leftovers", tmp_path)
    assert found["graphs"] == ["r1"]
    assert found["files"] == [] and found["handed_over"] == 2 and found["end"] == ["r3", 2]


@pytest.mark.slow
def test_verification_dead_worker_is_replaced_meanwhile(tmp_path: Path) -> None:
    """Hashing its files must not keep the run loop from the workers."""
    found = play("verifying", tmp_path)
    assert found["meanwhile"] == ["r1", 2] and found["replaced"]
    assert found["replies"] == [["r2", "r2", ""]] and found["end"] == ["r2", 2]


@pytest.mark.slow
def test_verification_failure_is_logged_and_its_process_may_die(tmp_path: Path) -> None:
    found = play("damaged", tmp_path)
    assert found["replies"] == [["r2", "", "ReleaseRefused"], ["r3", "", "ReleaseRefused"]]
    assert found["same_workers"] and found["end"] == ["r1", 2]
    assert (
        "r2: checksum differs" in found["logged"]
        and "r3: the process that verified it has died" in found["logged"]
    )


@pytest.mark.slow
def test_shutdown_does_not_wait_for_verification(tmp_path: Path) -> None:
    assert play("ending", tmp_path)["end"] == ["r1", 2]


@pytest.mark.slow
def test_change_in_place_all_load_before_any_serves(tmp_path: Path) -> None:
    found = play("in_place", tmp_path)
    assert found["replies"] == [["r2", "r2", ""], ["", "r1", ""]]
    assert found["orders"][:4] == ["prepare r2", "prepare r2", "serve r2", "serve r2"]
    assert found["same_workers"] and found["forks"] == 2 and found["end"] == ["r1", 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "kind"), [("refused_in_place", "ReleaseRefused"), ("busy_in_place", "OSError")]
)
def test_change_in_place_one_refuses_none_serves(tmp_path: Path, scenario: str, kind: str) -> None:
    found = play(scenario, tmp_path)
    assert found["replies"] == [["r2", "", kind]] and found["current"] == "r1"
    assert found["orders"] == ["prepare r2", "prepare r2", "forget ", "forget "]
    assert found["same_workers"] and found["end"] == ["r1", 2] and found["graphs"] == ["r1"]


@pytest.mark.slow
def test_change_in_place_worker_dies_it_is_replaced(tmp_path: Path) -> None:
    found = play("deaths_in_place", tmp_path)
    assert found["replies"][0] == ["r2", "", "ReleaseRefused"], "it may have died of the release"
    assert found["after_prepare"] == ["r1", 2] and found["current"] == "r1"
    assert found["end"] == ["r2", 2], "once all have it ready, a death is a death as any other"


def test_write_cache_full_disk_leaves_no_file(tmp_path: Path) -> None:
    async def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    server: Any = SimpleNamespace(releases=SimpleNamespace(hand_over=full))
    asyncio.run(write_cache(server, tmp_path / "cache-1.npz"))
    assert not list(tmp_path.iterdir())

    async def whole(path: Path) -> None:
        path.write_bytes(b"whole")

    server.releases.hand_over = whole
    asyncio.run(write_cache(server, tmp_path / "cache-1.npz"))
    assert [path.name for path in tmp_path.iterdir()] == ["cache-1.npz"]


def play(name: str, folder: Path) -> dict[str, Any]:
    """Run a scenario and return what it found."""
    done = subprocess.run(
        [sys.executable, __file__, name, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


# --- in the process of a scenario ---


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


class Stage:
    """A supervisor of two stand-in workers over the releases r1 (active), r2 and r3, and a script
    beside it.
    """

    def __init__(self, folder: Path, in_place_bytes: int = 0) -> None:
        self.folder = folder
        for release_id in ("r1", "r2", "r3"):
            (folder / "store" / "releases" / release_id).mkdir(parents=True)
            (folder / "store" / "releases" / release_id / "manifest.json").write_text("{}")
        stand_ins: list[tuple[object, str, object]] = [
            (publishing, "read_manifest", lambda path: SimpleNamespace(parent=None)),
            (ReleaseStore, "verify", self.verify),
            (release_graphs, "read_manifest", lambda path: SimpleNamespace(entities={"pin": None})),
            (release_graphs.EntityIndex, "load_graph", staticmethod(lambda path: None)),
            (release_graphs, "choose_form", lambda *args, **kwargs: "onnx-int8"),
            (supervisor, "run_worker", self.stand_in),
            (supervisor, "RESTART_SECONDS", 0.2),
        ]
        for place, name, stand_in in stand_ins:
            setattr(place, name, stand_in)
        self.store = ReleaseStore(folder / "store")
        self.store.activate("r1")
        self.announced: list[Any] = []
        self.found: dict[str, Any] = {}
        config = ServeConfig(
            releases=self.store.root,
            host="127.0.0.1",
            port=0,
            metrics_port=None,
            workers=2,
            poll_seconds=0.02,
            in_place_bytes=in_place_bytes,
        )
        self.supervisor = supervisor.Supervisor(
            config, lambda info: self.announced.extend([info["release_id"], info["reason"]])
        )

    def stand_in(self, control: Any, given: Assignment) -> int:
        """What a worker does as far as its supervisor can see; every worker asks for the changes
        that the script names for it.
        """
        ended: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
        control.setblocking(False)
        deadly, refusing, slow = (self.folder / name for name in ("deadly", "refusing", "slow"))
        while slow.exists():
            time.sleep(0.01)
        if deadly.exists():
            with (self.folder / "deaths").open("a") as deaths:
                deaths.write(".")
            os._exit(137)
        refused = bool(given.release_id) and refusing.exists()
        send = lambda **message: control.sendall(json.dumps(message).encode() + b"\n")  # noqa: E731
        send(type="ready", error="golden recall too low" if refused else "")
        if refused:
            return 1
        (self.folder / "handed_over").write_text(
            str(sum(path.exists() for path in given.handed_over))
        )
        asked: list[str] = []
        buffer = b""
        while asked or not ended or (self.folder / "slow-end").exists():
            order = self.folder / f"order-{given.number}"
            if order.exists():
                wanted = json.loads(order.read_text())
                order.unlink()
                asked += wanted
                for release in wanted:
                    send(type="change", release_id=release)
            try:
                content = control.recv(65536)
                if not content:
                    return 0
                buffer += content
            except BlockingIOError:
                time.sleep(0.01)
            *lines, buffer = buffer.split(b"\n")
            for message in map(json.loads, lines):
                if message["type"] == "write_cache":
                    Path(message["path"]).write_bytes(b"queries")
                    send(type="cache_written")
                elif message["type"] in RELEASE_ORDERS:
                    self.stand_in_order(given.number, message, send)
                else:
                    with (self.folder / "replies").open("a") as replies:
                        replies.write(
                            json.dumps([asked.pop(0), message["now"], message["kind"]]) + "\n"
                        )
        return 0

    def stand_in_order(self, number: int, message: Any, send: Callable[..., None]) -> None:
        """Note an order, and do what the flags say of it."""
        order, release_id = message["type"], message.get("release_id", "")
        with (self.folder / "orders").open("a") as orders:
            orders.write(f"{order} {release_id}\n")
        if (self.folder / f"deadly-{order}-{number}").exists():
            os._exit(137)
        refuses = (self.folder / f"refusing-{order}-{number}").exists()
        if answer := RELEASE_ORDERS[order]:
            error = "golden recall too low" if refuses else ""
            send(type=answer, release_id=release_id, error=error)

    def orders(self) -> list[str]:
        return (self.folder / "orders").read_text().splitlines()

    def verify(self, release_id: str) -> None:
        """Reads while its flag stands, then finds what the other flags say."""
        self.flag(f"verifying-{release_id}")
        while (self.folder / "reading").exists():
            time.sleep(0.01)
        if (self.folder / f"damaged-{release_id}").exists():
            raise ReleaseCorrupt(f"{release_id}: checksum differs")
        if (self.folder / f"deadly-{release_id}").exists():
            os._exit(137)

    def flag(self, name: str, on: bool = True) -> None:
        (self.folder / name).touch() if on else (self.folder / name).unlink()

    def replies(self) -> list[Any]:
        path = self.folder / "replies"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def workers(self) -> list[Worker]:
        """A copy: the supervisor's thread changes its own meanwhile."""
        return list(self.supervisor.fleet.workers.values())

    def alive(self) -> list[int]:
        return [worker.pid for worker in self.workers() if worker.is_running()]

    def state(self) -> list[Any]:
        return [self.supervisor.release_id, len(self.alive())]

    def order(self, number: int, *wanted: str) -> None:
        """Have a worker ask for changes; its file appears whole."""
        path = self.folder / f"order-{number}"
        path.with_suffix(".part").write_text(json.dumps(wanted))
        path.with_suffix(".part").rename(path)

    def ask(self, *wanted: str) -> None:
        """Have a serving worker ask for changes, and wait for the replies."""
        expected = len(self.replies()) + len(wanted)
        self.order(next(w.number for w in self.workers() if not w.dismissed), *wanted)
        until(lambda: len(self.replies()) >= expected)

    def settle(self, release_id: str, count: int = 2) -> list[Any]:
        """Wait until so many workers of a release run and are ready, and return that state."""
        until(
            lambda: (
                self.state() == [release_id, count]
                and all(worker.ready for worker in self.workers())
            )
        )
        return [release_id, count]

    def run(self, script: Callable[["Stage"], None]) -> None:
        failures: list[str] = []

        def beside() -> None:
            try:
                until(lambda: self.announced)
                script(self)
                self.found.update(
                    replies=self.replies(), announced=self.announced, end=self.state()
                )
                (self.folder / "found.json").write_text(json.dumps(self.found))
            except BaseException:
                failures.append(traceback.format_exc())
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=beside)
        thread.start()
        self.supervisor.run()
        thread.join()
        if failures:
            sys.exit(failures[0])


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


def memory(stage: Stage) -> None:
    release_graphs.EntityIndex.load_graph = staticmethod(  # type: ignore[assignment]
        lambda path: raising(MemoryError("std::bad_alloc"))() if "r2" in str(path) else None
    )
    stage.ask("r2")
    stage.settle("r1")
    stage.found["after_refusal"] = stage.state()
    stage.ask("r3")
    stage.settle("r3")


def unwritable(stage: Stage, error: Exception) -> None:
    before, works = stage.alive(), stage.supervisor.store.activate
    stage.supervisor.store.activate = raising(error)  # type: ignore[method-assign]
    stage.ask("r2")
    stage.settle("r1")
    stage.found.update(
        after_refusal=stage.state(),
        same_workers=stage.alive() == before,
        current=stage.store.current(),
    )
    stage.supervisor.store.activate = works  # type: ignore[method-assign]
    stage.ask("r2")
    stage.settle("r2")
    stage.found["current_end"] = stage.store.current()


def read_only(stage: Stage) -> None:
    unwritable(stage, OSError(errno.EROFS, "Read-only file system"))


def busy(stage: Stage) -> None:
    unwritable(stage, PublisherBusy("process 1 is publishing"))


def fork(stage: Stage) -> None:
    before, works, forks = stage.alive(), os.fork, []

    def second_fails() -> int:
        forks.append(1)
        return (
            works()
            if len(forks) <= 2
            else raising(BlockingIOError(errno.EAGAIN, "no more processes"))()
        )

    os.fork = second_fails
    stage.ask("r2")
    stage.settle("r1")
    stage.found.update(after_refusal=stage.state(), same_workers=stage.alive() == before)
    os.kill(before[0], signal.SIGKILL)
    tried = len(forks)
    until(lambda: len(forks) > tried)
    stage.found["without_forks"] = stage.state()
    os.fork = works
    stage.settle("r1")


def crash_loop(stage: Stage) -> None:
    stage.flag("deadly")
    began, deaths = time.monotonic(), stage.folder / "deaths"
    os.kill(stage.alive()[0], signal.SIGKILL)
    until(lambda: deaths.exists() and len(deaths.read_text()) >= 3)
    stage.found["seconds"] = time.monotonic() - began
    stage.flag("deadly", False)
    stage.settle("r1")


def first_refused(stage: Stage) -> None:
    stage.found["empty"] = stage.settle("")
    stage.flag("refusing", False)
    stage.settle("r1")


def twice(stage: Stage) -> None:
    counts = [0]
    fork_one = stage.supervisor.fleet.fork

    def counting(*args: Any) -> Any:
        worker = fork_one(*args)
        counts.append(sum(not worker.dismissed for worker in stage.workers()))
        return worker

    stage.supervisor.fleet.fork = counting  # type: ignore[method-assign]
    stage.flag("slow")
    first, second = sorted(worker.number for worker in stage.workers())
    stage.order(second, "r2")
    until(lambda: max(counts) == 4)  # the first change is under way
    stage.order(first, "r3")
    until(lambda: stage.supervisor.fleet.changes)  # the second has been noted
    stage.flag("slow", False)
    until(lambda: len(stage.replies()) == 2)
    stage.settle("r3")
    stage.found["most"] = max(counts)


def verifying(stage: Stage) -> None:
    before = stage.alive()
    stage.flag("reading")
    other, number = sorted(worker.number for worker in stage.workers())
    stage.order(number, "r2")
    until((stage.folder / "verifying-r2").exists)
    os.kill(
        next(worker.pid for worker in stage.workers() if worker.number == other), signal.SIGKILL
    )
    until(lambda: stage.alive() != before)
    stage.settle("r1")
    stage.found.update(meanwhile=stage.state(), replaced=stage.alive() != before)
    stage.flag("reading", False)
    until(lambda: stage.replies())
    stage.settle("r2")


def damaged(stage: Stage) -> None:
    logged: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        logged.append(record.getMessage())
        return True

    supervisor.log.addFilter(note)
    before = stage.alive()
    stage.flag("damaged-r2")
    stage.flag("deadly-r3")
    stage.ask("r2", "r3")
    stage.settle("r1")
    stage.found.update(same_workers=stage.alive() == before, logged="; ".join(logged))


def ending(stage: Stage) -> None:
    stage.flag("reading")
    stage.order(max(worker.number for worker in stage.workers()), "r2")
    until((stage.folder / "verifying-r2").exists)


def back(stage: Stage) -> None:
    stage.flag("slow-end")
    stage.ask("r2")
    dismissed = [worker.pid for worker in stage.workers() if worker.dismissed]
    stage.ask("")
    stage.flag("slow-end", False)
    dismissed += [worker.pid for worker in stage.workers() if worker.dismissed]
    for pid in dismissed:
        os.kill(pid, signal.SIGKILL)
    stage.settle("r1")
    time.sleep(0.6)
    stage.found["forks"] = stage.supervisor.fleet.forks


def in_place(stage: Stage) -> None:
    before = stage.alive()
    stage.ask("r2")
    stage.ask("")
    stage.settle("r1")
    stage.found.update(
        orders=stage.orders(),
        same_workers=stage.alive() == before,
        forks=stage.supervisor.fleet.forks,
    )


def not_in_place(stage: Stage) -> None:
    before = stage.alive()
    stage.ask("r2")
    until(lambda: len(stage.orders()) == 4)
    stage.found.update(
        orders=stage.orders(),
        same_workers=stage.alive() == before,
        current=stage.store.current(),
        graphs=list(stage.supervisor.graphs.by_release),
    )


def refused_in_place(stage: Stage) -> None:
    stage.flag("refusing-prepare-2")
    not_in_place(stage)


def busy_in_place(stage: Stage) -> None:
    error = OSError(errno.EROFS, "Read-only file system")
    stage.supervisor.store.activate = raising(error)  # type: ignore[method-assign]
    not_in_place(stage)


def deaths_in_place(stage: Stage) -> None:
    stage.flag("deadly-prepare-2")
    stage.order(1, "r2")
    until(stage.replies)
    stage.found["after_prepare"] = stage.settle("r1")
    stage.found["current"] = stage.store.current()
    stage.flag("deadly-serve-1")
    stage.order(3, "r2")
    until(lambda: len(stage.replies()) == 2)  # the death is known by then
    stage.settle("r2")


def leftovers(stage: Stage) -> None:
    release_graphs.choose_form = raising(ConfigError("no such form"))
    stage.ask("r2")
    stage.found["graphs"] = list(stage.supervisor.graphs.by_release)
    release_graphs.choose_form = lambda *args, **kwargs: "onnx-int8"
    stage.ask("r3")
    stage.settle("r3")
    stage.found["files"] = [path.name for path in stage.supervisor._folder.iterdir()]
    stage.found["handed_over"] = int((stage.folder / "handed_over").read_text())


def main() -> None:
    """Play the scenario named on the command line."""
    logging.basicConfig(level=logging.INFO)
    name, folder = sys.argv[1], Path(sys.argv[2])
    stage = Stage(folder, 2**20 if name.endswith("in_place") else 0)
    if name == "first_refused":
        stage.flag("refusing")
        current_file.RETRY_REFUSED_SECONDS = 0.5
    stage.run(globals()[name])


if __name__ == "__main__":
    main()
