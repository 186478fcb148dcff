"""The live log: what is acknowledged survives, what is torn is cut off, damage is refused."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import InvalidVectors
from index_builder.errors import DiskFull, LiveLogBusy, LiveLogCorrupt, LiveLogError
from index_builder.live_log.files import log_files, read_acknowledged
from index_builder.live_log.maintenance import collect_files, trust_log
from index_builder.live_log.reader import LiveLogReader
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from tests.helpers.live_logs import before_sync, kill_before_sync

D = 8
SPACE = "ab" * 32


def unit(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    return vector / np.linalg.norm(vector)


def upsert(identifier: str, seed: int = 0, **attributes: object) -> LiveEntry:
    return LiveEntry(id=identifier, vector=unit(seed), space_id=SPACE, attributes=attributes)


def read_all(root: Path, after: int = 0) -> list[LiveEntry]:
    reader, entries = LiveLogReader(root, "pin", after=after), []
    while more := reader.poll():
        entries += more
    return entries


ids = (
    st.text(min_size=1, max_size=12)
    .map(lambda s: __import__("unicodedata").normalize("NFC", s))
    .filter(lambda s: s and not any(0xD800 <= ord(c) <= 0xDFFF for c in s))
)


@settings(max_examples=30, deadline=None)
@given(
    entries=st.lists(
        st.tuples(
            ids,
            st.booleans(),
            st.dictionaries(ids, st.one_of(st.integers(-10, 10), ids, st.booleans()), max_size=3),
        ),
        max_size=12,
    )
)
def test_writer_entries_are_read_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, bool, dict]]
) -> None:
    root = tmp_path_factory.mktemp("log")
    written = [
        LiveEntry(id=i) if delete else upsert(i, n) for n, (i, delete, _) in enumerate(entries)
    ]
    written = [
        e if e.is_delete else LiveEntry(id=e.id, vector=e.vector, space_id=SPACE, attributes=a)
        for e, (_, _, a) in zip(written, entries)
    ]
    with LiveLogWriter(root, "pin", D, file_bytes=400) as writer:
        for entry in written:
            writer.write([entry])
    found = read_all(root)
    assert [e.sequence for e in found] == list(range(1, len(written) + 1))
    for was, now in zip(written, found):
        assert (was.id, was.is_delete, was.attributes) == (now.id, now.is_delete, now.attributes)
        if was.vector is not None:
            np.testing.assert_array_equal(was.vector, now.vector)


def test_reader_new_entries_across_files_are_seen(tmp_path: Path) -> None:
    writer = LiveLogWriter(tmp_path, "pin", D, file_bytes=300)
    reader = LiveLogReader(tmp_path, "pin")
    assert reader.poll() == []
    for n in range(20):
        assert writer.write([upsert(f"e{n}", n)]) == n + 1
        assert [e.id for e in reader.poll()] == [f"e{n}"]
    assert len(log_files(tmp_path / "pin")) > 3
    assert [e.id for e in read_all(tmp_path, after=15)] == [f"e{n}" for n in range(15, 20)]


def test_writers_two_at_once_lose_no_entry(tmp_path: Path) -> None:
    writers = [LiveLogWriter(tmp_path, "pin", D, file_bytes=2000) for _ in range(2)]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for n in range(25):
                writers[number % 2].write([upsert(f"w{number}-{n}", n)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    found = read_all(tmp_path)
    assert [e.sequence for e in found] == list(range(1, 101))
    for number in range(4):
        assert [e.id for e in found if e.id.startswith(f"w{number}-")] == [
            f"w{number}-{n}" for n in range(25)
        ]


@pytest.mark.parametrize("cut", [1, 10, 24, 40])
def test_writer_torn_tail_is_cut_off(tmp_path: Path, cut: int) -> None:
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a"), upsert("b")])
    path = log_files(tmp_path / "pin")[0][1]
    whole = path.read_bytes()
    path.write_bytes(whole + whole[24 : 24 + cut])  # a record that a dying writer began
    assert [e.id for e in read_all(tmp_path)] == ["a", "b"]
    writer = LiveLogWriter(tmp_path, "pin", D)
    assert path.read_bytes() == whole
    assert writer.write([upsert("c")]) == 3
    assert [e.id for e in read_all(tmp_path)] == ["a", "b", "c"]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 0.9999), bit=st.integers(0, 7), which=st.integers(0, 10))
def test_reader_any_flipped_bit_is_refused(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int, which: int
) -> None:
    root = tmp_path_factory.mktemp("flip")
    with LiveLogWriter(root, "pin", D, file_bytes=300) as writer:
        for n in range(6):
            writer.write([upsert(f"e{n}", n, colour="red")])
    files = [path for _, path in log_files(root / "pin")] + [root / "pin" / "acknowledged"]
    path = files[which % len(files)]
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(bytes(content))
    with pytest.raises(LiveLogError):
        read_all(root)
    if path in (files[-1], files[-2]):  # a writer only reads the newest file
        with pytest.raises(LiveLogError):
            LiveLogWriter(root, "pin", D).write([upsert("z")])


def test_writer_lost_bytes_are_refused_and_not_overwritten(tmp_path: Path) -> None:
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a"), upsert("b")])
    path = log_files(tmp_path / "pin")[0][1]
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    with pytest.raises(LiveLogCorrupt, match="up to 2 were acknowledged"):
        read_all(tmp_path)
    with pytest.raises(LiveLogCorrupt, match="Nothing was written"):
        LiveLogWriter(tmp_path, "pin", D)
    assert path.read_bytes() == before


def test_reader_removed_files_are_noticed(tmp_path: Path) -> None:
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a")])
    log_files(tmp_path / "pin")[0][1].unlink()
    with pytest.raises(LiveLogCorrupt):
        read_all(tmp_path)
    with pytest.raises(LiveLogCorrupt):
        LiveLogWriter(tmp_path, "pin", D)


def test_reader_newer_format_is_refused(tmp_path: Path) -> None:
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a")])
    path = log_files(tmp_path / "pin")[0][1]
    content = bytearray(path.read_bytes())
    content[8] = 9
    path.write_bytes(bytes(content))
    with pytest.raises(LiveLogError, match="format 9"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (LiveEntry(id=""), "1 to 65,535 bytes"),
        (LiveEntry(id="e\u0301"), "NFC"),
        (LiveEntry(id="\ud800"), "UTF-8"),
        (LiveEntry(id="a", vector=unit(1), space_id="short"), "64 hexadecimal"),
        (LiveEntry(id="a", vector=np.full(D, np.nan, np.float32), space_id=SPACE), "NaN"),
        (LiveEntry(id="a", vector=np.zeros(D, np.float32), space_id=SPACE), "unit norm"),
        (LiveEntry(id="a", vector=unit(1).astype(np.float64), space_id=SPACE), "float64"),
        (LiveEntry(id="a", vector=unit(1)[:5], space_id=SPACE), "shape"),
        (LiveEntry(id="a", vector=unit(1), space_id=SPACE, attributes={"x": float("nan")}), "JSON"),
        (LiveEntry(id="a", vector=unit(1), space_id=SPACE, attributes={"x": object()}), "JSON"),
    ],
)
def test_writer_bad_entry_is_refused_before_writing(
    tmp_path: Path, entry: LiveEntry, message: str
) -> None:
    writer = LiveLogWriter(tmp_path, "pin", D)
    with pytest.raises((LiveLogError, InvalidVectors), match=message):
        writer.write([upsert("good"), entry])
    assert writer.sequence == 0
    assert read_all(tmp_path) == []


def test_writer_full_disk_leaves_log_whole(tmp_path: Path) -> None:
    def fails() -> None:
        raise OSError(28, "No space left on device")

    LiveLogWriter(tmp_path, "pin", D).write([upsert("a")])
    refused = LiveLogWriter(tmp_path, "pin", D)
    with before_sync(refused, fails), pytest.raises(DiskFull, match="full"):
        refused.write([upsert("b")])
    assert LiveLogWriter(tmp_path, "pin", D).write([upsert("c")]) == 2
    assert [e.id for e in read_all(tmp_path)] == ["a", "c"]


def test_writer_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = LiveLogWriter(tmp_path, "pin", D)
        writer.write([upsert("a")])
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        try:
            writer.write([upsert(f"b{n}") for n in range(20)])
        except DiskFull:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert [e.id for e in read_all(tmp_path)] == ["a"]


def test_writer_after_full_disk_leaves_no_lock(tmp_path: Path) -> None:
    """A writer that cannot even note its process id in the lock must not keep it."""
    child = os.fork()
    if child == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        refused = 0
        # Nothing can be written; the lock's note; the note and a part of the file's header
        for limit in (0, 16, 30):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                LiveLogWriter(tmp_path, "pin", D, lock_timeout_seconds=0.2).write([upsert("lost")])
            except DiskFull:
                refused += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        sequence = LiveLogWriter(tmp_path, "pin", D, lock_timeout_seconds=0.2).write([upsert("a")])
        os._exit(0 if (refused, sequence) == (3, 1) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [e.id for e in read_all(tmp_path)] == ["a"]


def test_writer_unacknowledged_entry_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index_builder.live_log import append

    writer = LiveLogWriter(tmp_path, "pin", D)
    writer.write([upsert("a")])

    def full(folder: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(append, "write_acknowledged", full)
        with pytest.raises(DiskFull, match="full"):
            writer.write([upsert("b")])
    assert writer.write([upsert("c")]) == 2
    assert [e.id for e in read_all(tmp_path)] == ["a", "c"]


def test_writer_lock_held_elsewhere_is_named(tmp_path: Path) -> None:
    LiveLogWriter(tmp_path, "pin", D)
    from index_builder.storage.durable_files import FileLock

    lock = FileLock(tmp_path / "pin" / "writer.lock")
    assert lock.acquire()
    with pytest.raises(LiveLogBusy, match=str(os.getpid())):
        LiveLogWriter(tmp_path, "pin", D, lock_timeout_seconds=0.05)
    lock.release()


def test_writer_killed_loses_nothing_acknowledged(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        writer = LiveLogWriter(tmp_path, "pin", D, file_bytes=5000)
        while True:
            os.write(writing, f"{writer.write([upsert('x', 1), upsert('y', 2)])}\n".encode())
    os.close(writing)
    lines = os.fdopen(reading)
    first = lines.readline()  # it writes now, however busy the machine
    time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    acknowledged = [int(line) for line in (first + lines.read()).split("\n")[:-1]]
    assert acknowledged
    assert len(read_all(tmp_path)) >= acknowledged[-1]
    assert read_acknowledged(tmp_path / "pin").sequence >= acknowledged[-1]
    assert LiveLogWriter(tmp_path, "pin", D).write([upsert("z")]) > acknowledged[-1]


def test_collect_files_keeps_unfolded_and_late_reader_is_refused(tmp_path: Path) -> None:
    writer = LiveLogWriter(tmp_path, "pin", D, file_bytes=300)
    for n in range(20):
        writer.write([upsert(f"e{n}", n)])
    starts = [first for first, _ in log_files(tmp_path / "pin")]
    removed = collect_files(tmp_path, "pin", watermark=starts[3] - 1)
    assert len(removed) == 3
    assert [e.sequence for e in read_all(tmp_path, after=starts[3] - 1)] == list(
        range(starts[3], 21)
    )
    with pytest.raises(LiveLogError, match="oldest kept"):
        read_all(tmp_path, after=0)
    assert writer.write([upsert("more")]) == 21


def test_reader_without_acknowledged_file_needs_trust_log(tmp_path: Path) -> None:
    """Without that file a log that lost its end looks whole."""
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a"), upsert("b")])
    (tmp_path / "pin" / "acknowledged").unlink()
    for use in (
        lambda: read_all(tmp_path),
        lambda: LiveLogWriter(tmp_path, "pin", D),
        lambda: read_acknowledged(tmp_path / "pin"),
    ):
        with pytest.raises(LiveLogCorrupt, match="--trust-log"):
            use()
    assert trust_log(tmp_path, "pin") == 2
    assert [e.id for e in read_all(tmp_path)] == ["a", "b"]
    assert LiveLogWriter(tmp_path, "pin", D).write([upsert("c")]) == 3


def test_trust_log_with_hole_is_refused(tmp_path: Path) -> None:
    with LiveLogWriter(tmp_path, "pin", D, file_bytes=100) as writer:
        for n in range(6):
            writer.write([upsert(f"e{n}", n)])
    log_files(tmp_path / "pin")[1][1].unlink()
    (tmp_path / "pin" / "acknowledged").unlink()
    with pytest.raises(LiveLogCorrupt, match="hole"):
        trust_log(tmp_path, "pin")


def test_writer_killed_before_first_acknowledgement_leaves_usable_log(tmp_path: Path) -> None:
    kill_before_sync(tmp_path, D, [upsert("a")])
    assert read_acknowledged(tmp_path / "pin").sequence == 0
    assert LiveLogWriter(tmp_path, "pin", D).write([upsert("b")]) in (1, 2)


def test_reader_log_begun_again_behind_release_is_noticed(tmp_path: Path) -> None:
    """Someone removed ``live/``: entries numbered from 1 again would be taken for ones that the
    release already holds.
    """
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a")])
    with pytest.raises(LiveLogCorrupt, match="up to 7"):
        read_all(tmp_path, after=7)


def test_writer_removed_log_begins_behind_the_release(tmp_path: Path) -> None:
    """Readers behind the release's watermark would never take sequence 1."""
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a"), upsert("b")])
    shutil.rmtree(tmp_path / "pin")
    assert LiveLogWriter(tmp_path, "pin", D, after=2).write([upsert("c")]) == 3
    assert [e.id for e in LiveLogReader(tmp_path, "pin", after=2).poll()] == ["c"]
    assert LiveLogWriter(tmp_path, "pin", D, after=2).write([upsert("d")]) == 4


def test_writer_log_removed_meanwhile_refuses_writes(tmp_path: Path) -> None:
    writer = LiveLogWriter(tmp_path, "pin", D)
    writer.write([upsert("a"), upsert("b")])
    shutil.rmtree(tmp_path / "pin")
    with pytest.raises(LiveLogCorrupt, match="entries up to 2 were acknowledged"):
        writer.write([upsert("c")])
    writer.after = 2  # a release holds both
    assert writer.write([upsert("c")]) == 3
    assert [e.id for e in LiveLogReader(tmp_path, "pin", after=2).poll()] == ["c"]


def test_writer_log_ending_before_release_refuses_writes(tmp_path: Path) -> None:
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a")])
    with pytest.raises(
        LiveLogCorrupt, match="entries up to 7 are in the release, but the log ends at 1"
    ):
        LiveLogWriter(tmp_path, "pin", D, after=7)
