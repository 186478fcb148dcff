"""The supervisor's own logic, with stand-ins for workers and releases: what goes wrong in a change
must never cost the healthy workers.

Each scenario runs in a process of its own (``python test_workers_supervisor.py NAME FOLDER``):
pytest has threads, and must not be forked.
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
from retrieval.server import supervisor as workers
from retrieval.server.worker import Assignment, write_cache


def test_a_release_that_does_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    found = play("memory", tmp_path)
    assert found["replies"] == [
        ["r2", "", "MemoryError"],
        ["r3", "r3", ""],
    ], "refused with a reply; the next change works"
    assert found["after_refusal"] == ["r1", 2] and found["end"] == ["r3", 2]


@pytest.mark.parametrize(
    ("scenario", "kind"), [("read_only", "OSError"), ("busy", "PublisherBusy")]
)
def test_when_the_store_cannot_be_written_the_old_generation_goes_on(
    tmp_path: Path, scenario: str, kind: str
) -> None:
    found = play(scenario, tmp_path)
    assert found["replies"] == [["r2", "", kind], ["r2", "r2", ""]]
    assert (
        found["after_refusal"] == ["r1", 2] and found["same_workers"] and found["current"] == "r1"
    )
    assert found["end"] == ["r2", 2] and found["current_end"] == "r2"


def test_a_fork_that_fails_refuses_the_change_and_delays_a_replacement(tmp_path: Path) -> None:
    found = play("fork", tmp_path)
    assert found["replies"] == [["r2", "", "BlockingIOError"]]
    assert found["after_refusal"] == ["r1", 2] and found["same_workers"]
    assert found["without_forks"] == ["r1", 1] and found["end"] == ["r1", 2]


def test_replacements_that_die_while_loading_are_replaced_but_ever_more_rarely(
    tmp_path: Path,
) -> None:
    found = play("crash_loop", tmp_path)
    assert 2 <= found["deaths"] <= 4, "0.2, 0.4, 0.8 s: a crash loop does not spin"
    assert found["end"] == ["r1", 2]


def test_after_a_first_refusal_workers_say_so_and_the_release_is_tried_again(
    tmp_path: Path,
) -> None:
    found = play("first_refused", tmp_path)
    assert found["announced"] == [None, "golden recall too low"]
    assert found["empty"] == ["", 2] and found["end"] == ["r1", 2]


def test_a_second_change_waits_for_the_first(tmp_path: Path) -> None:
    found = play("twice", tmp_path)
    assert found["replies"] == [["r2", "r2", ""], ["r3", "r3", ""]]
    assert found["most"] == 4, "two generations at most, beside what leaves"
    assert found["end"] == ["r3", 2]


def test_a_generation_that_returns_is_not_confused_with_its_leaving_workers(tmp_path: Path) -> None:
    found = play("back", tmp_path)
    assert found["replies"] == [["r2", "r2", ""], ["", "r1", ""]]
    assert found["end"] == ["r1", 2] and found["forks"] == 6, (
        "leaving workers of the same release are neither counted nor replaced"
    )


def test_nothing_is_left_of_refused_releases_and_hand_overs(tmp_path: Path) -> None:
    found = play("leftovers", tmp_path)
    assert found["graphs"] == ["r1"]
    assert found["files"] == [] and found["handed_over"] == 2 and found["end"] == ["r3", 2]


def test_a_dead_worker_is_replaced_while_a_large_release_is_verified(tmp_path: Path) -> None:
    """Its files were hashed in the run loop: nobody replaced a worker meanwhile."""
    found = play("verifying", tmp_path)
    assert found["meanwhile"] == ["r1", 2] and found["replaced"]
    assert found["replies"] == [["r2", "r2", ""]] and found["end"] == ["r2", 2]


def test_what_verifying_finds_is_told_and_its_process_may_die(tmp_path: Path) -> None:
    found = play("damaged", tmp_path)
    assert found["replies"] == [["r2", "", "ReleaseRefused"], ["r3", "", "ReleaseRefused"]]
    assert found["same_workers"] and found["end"] == ["r1", 2]
    assert (
        "r2: checksum differs" in found["told"]
        and "r3: the process that verified it has died" in found["told"]
    )


def test_a_server_that_is_told_to_end_does_not_wait_for_verifying(tmp_path: Path) -> None:
    assert play("ending", tmp_path)["end"] == ["r1", 2]


def test_a_cache_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
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
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


# --- in the process of a scenario ---


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


class Stage:
    """A supervisor of two stand-in workers over the releases r1 (active), r2 and r3, and a script
    beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for release_id in ("r1", "r2", "r3"):
            (folder / "store" / "releases" / release_id).mkdir(parents=True)
            (folder / "store" / "releases" / release_id / "manifest.json").write_text("{}")
        publishing.read_manifest = lambda path: None  # type: ignore[assignment, return-value]
        ReleaseStore.verify = self.verify  # type: ignore[assignment, method-assign]
        workers.read_manifest = lambda path: SimpleNamespace(entities={"pin": None})  # type: ignore[assignment, return-value]
        workers.EntityIndex.load_graph = staticmethod(lambda path: None)  # type: ignore[assignment]
        workers.choose_form = lambda *args, **kwargs: "onnx-int8"
        workers.run_worker = self.stand_in  # type: ignore[assignment]
        workers.RESTART_SECONDS = 0.2
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
        )
        self.supervisor = workers.Supervisor(
            config, lambda info: self.announced.extend([info["release_id"], info["reason"]])
        )

    def stand_in(self, control: Any, given: Assignment) -> int:
        """What a worker does as far as its supervisor can see; every worker asks for the changes
        that the script names for it.
        """
        leaving: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: leaving.append(number))
        control.setblocking(False)
        deadly, refusing, slow = (self.folder / name for name in ("deadly", "refusing", "slow"))
        if slow.exists():
            time.sleep(0.5)
        if deadly.exists():
            with (self.folder / "deaths").open("a") as deaths:
                deaths.write(".")
            os._exit(137)
        refused = bool(given.release_id) and refusing.exists()
        say = lambda **message: control.sendall(json.dumps(message).encode() + b"\n")  # noqa: E731
        say(type="ready", error="golden recall too low" if refused else "")
        if refused:
            return 1
        (self.folder / "handed_over").write_text(
            str(sum(path.exists() for path in given.handed_over))
        )
        asked: list[str] = []
        buffer = b""
        while asked or not leaving or (self.folder / "slow-end").exists():
            order = self.folder / f"order-{given.number}"
            if order.exists():
                wanted = json.loads(order.read_text())
                order.unlink()
                asked += wanted
                for release in wanted:
                    say(type="change", release_id=release)
            try:
                content = control.recv(65536)
                if not content:
                    return 0
                buffer += content
            except BlockingIOError:
                time.sleep(0.01)
            *lines, buffer = buffer.split(b"\n")
            for message in map(json.loads, lines):
                if message["type"] == "dump":
                    Path(message["path"]).write_bytes(b"queries")
                    say(type="dumped")
                else:
                    with (self.folder / "replies").open("a") as replies:
                        replies.write(
                            json.dumps([asked.pop(0), message["now"], message["kind"]]) + "\n"
                        )
        return 0

    def verify(self, release_id: str) -> None:
        """Reads for as long as it is told to, then finds what it is told to find."""
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

    def alive(self) -> list[int]:
        return [
            worker.pid
            for worker in list(self.supervisor.fleet.workers.values())
            if worker.is_running()
        ]

    def state(self) -> list[Any]:
        return [self.supervisor.release_id, len(self.alive())]

    def ask(self, *wanted: str) -> None:
        """Have a serving worker ask for changes, and wait for the replies."""
        number = next(
            worker.number for worker in self.supervisor.fleet.workers.values() if not worker.leaving
        )
        expected = len(self.replies()) + len(wanted)
        path = self.folder / f"order-{number}"
        path.with_suffix(".part").write_text(json.dumps(wanted))
        path.with_suffix(".part").rename(path)
        until(lambda: len(self.replies()) == expected)

    def settle(self, release_id: str, count: int = 2) -> None:
        until(
            lambda: (
                self.state() == [release_id, count]
                and all(worker.ready for worker in self.supervisor.fleet.workers.values())
            )
        )

    def run(self, script: Callable[["Stage"], None]) -> None:
        def beside() -> None:
            try:
                until(lambda: self.announced)
                script(self)
                self.found.update(
                    replies=self.replies(), announced=self.announced, end=self.state()
                )
                (self.folder / "found.json").write_text(json.dumps(self.found))
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=beside)
        thread.start()
        self.supervisor.run()
        thread.join()


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


def memory(stage: Stage) -> None:
    workers.EntityIndex.load_graph = staticmethod(  # type: ignore[assignment]
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
    os.kill(stage.alive()[0], signal.SIGKILL)
    time.sleep(1.5)
    stage.found["deaths"] = len((stage.folder / "deaths").read_text())
    stage.flag("deadly", False)
    stage.settle("r1")


def first_refused(stage: Stage) -> None:
    stage.settle("")
    stage.found["empty"] = stage.state()
    stage.flag("refusing", False)
    stage.settle("r1")


def twice(stage: Stage) -> None:
    counts = [0]
    fork_one = stage.supervisor.fleet.fork

    def counting(*args: Any) -> Any:
        worker = fork_one(*args)
        counts.append(sum(not worker.leaving for worker in stage.supervisor.fleet.workers.values()))
        return worker

    stage.supervisor.fleet.fork = counting  # type: ignore[method-assign]
    stage.flag("slow")
    number = max(worker.number for worker in stage.supervisor.fleet.workers.values())
    (stage.folder / f"order-{number}").write_text(json.dumps(["r2"]))
    until(lambda: len(stage.alive()) == 4)
    stage.ask("r3")
    until(lambda: len(stage.replies()) == 2)
    stage.settle("r3")
    stage.found["most"] = max(counts)


def verifying(stage: Stage) -> None:
    before = stage.alive()
    stage.flag("reading")
    number = max(worker.number for worker in stage.supervisor.fleet.workers.values())
    (stage.folder / f"order-{number}").write_text(json.dumps(["r2"]))
    time.sleep(0.2)
    os.kill(
        next(
            worker.pid
            for worker in list(stage.supervisor.fleet.workers.values())
            if worker.number != number
        ),
        signal.SIGKILL,
    )
    until(lambda: stage.alive() != before)
    stage.settle("r1")
    stage.found.update(meanwhile=stage.state(), replaced=stage.alive() != before)
    stage.flag("reading", False)
    until(lambda: stage.replies())
    stage.settle("r2")


def damaged(stage: Stage) -> None:
    told: list[str] = []
    workers.log.addFilter(lambda record: told.append(record.getMessage()) or True)  # type: ignore[func-returns-value]
    before = stage.alive()
    stage.flag("damaged-r2")
    stage.flag("deadly-r3")
    stage.ask("r2", "r3")
    stage.settle("r1")
    stage.found.update(same_workers=stage.alive() == before, told="; ".join(told))


def ending(stage: Stage) -> None:
    stage.flag("reading")
    number = max(worker.number for worker in stage.supervisor.fleet.workers.values())
    (stage.folder / f"order-{number}").write_text(json.dumps(["r2"]))
    time.sleep(0.2)


def back(stage: Stage) -> None:
    stage.flag("slow-end")
    stage.ask("r2")
    leaving = [worker.pid for worker in stage.supervisor.fleet.workers.values() if worker.leaving]
    stage.ask("")
    stage.flag("slow-end", False)
    for pid in [
        *leaving,
        *(worker.pid for worker in stage.supervisor.fleet.workers.values() if worker.leaving),
    ]:
        os.kill(pid, signal.SIGKILL)
    stage.settle("r1")
    time.sleep(0.6)
    stage.found["forks"] = stage.supervisor.fleet.forks


def leftovers(stage: Stage) -> None:
    workers.choose_form = raising(ConfigError("no such form"))
    stage.ask("r2")
    stage.found["graphs"] = list(stage.supervisor._graphs)
    workers.choose_form = lambda *args, **kwargs: "onnx-int8"
    stage.ask("r3")
    stage.settle("r3")
    stage.found["files"] = [path.name for path in stage.supervisor._folder.iterdir()]
    stage.found["handed_over"] = int((stage.folder / "handed_over").read_text())


def main() -> None:
    """Play the scenario named on the command line."""
    logging.basicConfig(level=logging.INFO)
    name, folder = sys.argv[1], Path(sys.argv[2])
    stage = Stage(folder)
    if name == "first_refused":
        stage.flag("refusing")
        workers.RETRY_REFUSED_SECONDS = 0.5
    stage.run(globals()[name])


if __name__ == "__main__":
    main()
