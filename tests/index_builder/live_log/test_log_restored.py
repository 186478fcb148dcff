"""Readers show what was acknowledged and nothing else; a damaged log that was restored as its
message asks is read and written again.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from index_builder.errors import DiskFull, LiveLogCorrupt
from index_builder.live_log import maintenance as live_log_upkeep
from index_builder.live_log.files import log_files, read_acknowledged
from index_builder.live_log.reader import LiveLogReader
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.live_follower import LiveFollower
from index_builder.search.entity_index import EntityIndex
from tests.helpers.live_logs import before_sync, kill_before_sync

D = 8
SPACE = "ab" * 32


def vectors(count: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)
    return np.ascontiguousarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def upsert(identifier: str) -> LiveEntry:
    return LiveEntry(id=identifier, vector=vectors(1, 1)[0], space_id=SPACE)


def ids(reader: LiveLogReader) -> list[str]:
    return [entry.id for entry in reader.poll()]


def all_ids(root: Path, after: int = 0) -> list[str]:
    reader, found = LiveLogReader(root, "pin", after=after), []
    while more := ids(reader):
        found += more
    return found


def follower(root: Path) -> LiveFollower:
    index = EntityIndex.build("pin", [f"p{i}" for i in range(5)], vectors(5, 2))
    manifest = SimpleNamespace(entities={"pin": SimpleNamespace(watermark=0)})
    release: Any = SimpleNamespace(
        entities={"pin": index}, manifest=manifest, dimension=D, space_id=SPACE, release_id="r"
    )
    return LiveFollower(SimpleNamespace(live_root=root), release)


def damage(path: Path, share: float = 0.6) -> bytes:
    """Flip a bit and return what was there before."""
    good = path.read_bytes()
    bad = bytearray(good)
    bad[int(len(good) * share)] ^= 1
    path.write_bytes(bytes(bad))
    return good


def restore_in_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def restore_by_rename(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".restored")
    temporary.write_bytes(content)
    os.replace(temporary, path)


RESTORES = pytest.mark.parametrize("restore", [restore_in_place, restore_by_rename])


def test_reader_failed_write_is_never_shown_and_next_ones_are(tmp_path: Path) -> None:
    """A poll between write and fsync must not show the entry: its number goes to another write."""
    reader, seen = LiveLogReader(tmp_path, "pin"), list[str]()

    def full() -> None:
        seen.extend(ids(reader))
        raise OSError(28, "No space left on device")

    writer = LiveLogWriter(tmp_path, "pin", D)
    writer.write([upsert("a")])
    assert ids(reader) == ["a"]
    with before_sync(writer, full), pytest.raises(DiskFull):
        writer.write([upsert("a much longer name that is refused")])
    assert seen == []
    for name in ("c", "d"):
        writer.write([upsert(name)])
        assert ids(reader) == [name]


def test_reader_shows_entry_only_once_durable(tmp_path: Path) -> None:
    reader, seen = LiveLogReader(tmp_path, "pin"), list[str]()
    writer = LiveLogWriter(tmp_path, "pin", D, file_bytes=100)
    for n in range(5):  # each in a file of its own
        with before_sync(writer, lambda: seen.extend(ids(reader))):
            writer.write([upsert(f"e{n}")])
        assert seen == []
        assert ids(reader) == [f"e{n}"]


def test_writer_whole_entries_of_killed_one_are_acknowledged(tmp_path: Path) -> None:
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a")])
    kill_before_sync(tmp_path, D, [upsert("b"), upsert("c")])
    assert all_ids(tmp_path) == ["a"]
    LiveLogWriter(tmp_path, "pin", D)
    assert read_acknowledged(tmp_path / "pin").sequence == 3
    assert all_ids(tmp_path) == ["a", "b", "c"]


def test_follower_opened_after_crash_shows_whole_entries(tmp_path: Path) -> None:
    """Losing power may lose acknowledgements of durable writes, which must not wait for the next
    write to be seen again.
    """
    LiveLogWriter(tmp_path, "pin", D).write([upsert("a")])
    kill_before_sync(tmp_path, D, [upsert("b"), upsert("c")])
    opened = follower(tmp_path)
    assert opened.catch_up() == 3
    assert opened.view("pin").live_count == 3
    opened.stop()


def test_follower_read_only_or_locked_log_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index_builder.storage.durable_files import FileLock

    LiveLogWriter(tmp_path, "pin", D).write([upsert("a")])
    kill_before_sync(tmp_path, D, [upsert("b")])
    lock = FileLock(tmp_path / "pin" / "writer.lock")
    assert lock.acquire()
    monkeypatch.setattr(live_log_upkeep, "ADOPT_SECONDS", 0.01)
    opened = follower(tmp_path)
    assert opened.catch_up() == 1
    lock.release()

    def refused(*_: object, **__: object) -> bool:
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", refused)
    assert opened.catch_up() == 0
    opened.stop()


@RESTORES
def test_follower_damaged_log_shows_what_precedes_and_resumes(
    tmp_path: Path, restore: Callable[[Path, bytes], None]
) -> None:
    """The entries before the damage stay to be read until the log is restored."""
    writer = LiveLogWriter(tmp_path, "pin", D)
    for n in range(10):
        writer.write([upsert(f"e{n}")])
    path = log_files(tmp_path / "pin")[0][1]
    good = damage(path)
    opened = follower(tmp_path)
    before = opened.poll()
    assert 0 < before < 10
    with pytest.raises(LiveLogCorrupt, match="up to 10 were acknowledged"):
        opened.poll()
    assert opened.view("pin").live_count == before
    restore(path, good)
    assert opened.poll() == 10 - before
    assert opened.view("pin").live_count == 10
    opened.stop()


@RESTORES
def test_reader_unreadable_file_loses_no_earlier_entries(
    tmp_path: Path, restore: Callable[[Path, bytes], None]
) -> None:
    with LiveLogWriter(tmp_path, "pin", D, file_bytes=300) as writer:
        for n in range(9):
            writer.write([upsert(f"e{n}")])
    (_, _), (first, path), *_ = log_files(tmp_path / "pin")
    good = path.read_bytes()
    path.write_bytes(b"?" * len(good))
    reader = LiveLogReader(tmp_path, "pin")
    assert len(ids(reader)) == first - 1
    for _ in range(2):
        with pytest.raises(LiveLogCorrupt, match="header"):
            reader.poll()
    restore(path, good)
    assert ids(reader) == [f"e{n}" for n in range(first - 1, 9)]


def test_reader_without_descriptors_loses_no_earlier_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveLogWriter(tmp_path, "pin", D, file_bytes=100) as writer:
        for n in range(3):
            writer.write([upsert(f"e{n}")])
    second, plain = log_files(tmp_path / "pin")[1][1], os.open

    def out_of_descriptors(path: Any, *arguments: Any) -> int:
        if path == second:
            raise OSError(24, "Too many open files")
        return plain(path, *arguments)

    reader = LiveLogReader(tmp_path, "pin")
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", out_of_descriptors)
        assert ids(reader) == ["e0"]
        with pytest.raises(OSError, match="Too many"):
            reader.poll()
    assert ids(reader) == ["e1", "e2"]


@RESTORES
def test_log_restored_file_is_used_by_open_writers_and_readers(
    tmp_path: Path, restore: Callable[[Path, bytes], None]
) -> None:
    """A restore by rename leaves whoever has the log open with a file without a name."""
    writer, reader = LiveLogWriter(tmp_path, "pin", D), LiveLogReader(tmp_path, "pin")
    for n in range(5):
        writer.write([upsert(f"e{n}")])
    assert len(ids(reader)) == 5
    path = log_files(tmp_path / "pin")[0][1]
    restore(path, path.read_bytes())
    assert ids(reader) == []
    assert writer.write([upsert("new")]) == 6
    assert ids(reader) == ["new"]
    assert all_ids(tmp_path) == [f"e{n}" for n in range(5)] + ["new"]
    writer.close()
    assert LiveLogWriter(tmp_path, "pin", D).sequence == 6


@RESTORES
@pytest.mark.parametrize("acknowledged_too", [False, True])
def test_writer_log_restored_without_end_is_refused(
    tmp_path: Path, restore: Callable[[Path, bytes], None], acknowledged_too: bool
) -> None:
    """What was acknowledged since the copy was made is gone: the same numbers again would never be
    seen by those who read the old ones.
    """
    writer, reader = LiveLogWriter(tmp_path, "pin", D), LiveLogReader(tmp_path, "pin")
    path = tmp_path / "pin" / "log-00000000000000000001.bin"
    acknowledged = tmp_path / "pin" / "acknowledged"
    writer.write([upsert("a")])
    old, old_acknowledged = path.read_bytes(), acknowledged.read_bytes()
    writer.write([upsert("b")])
    assert ids(reader) == ["a", "b"]
    whole, whole_acknowledged = path.read_bytes(), acknowledged.read_bytes()
    restore(path, old)
    if acknowledged_too:
        restore(acknowledged, old_acknowledged)
    for _ in range(2):
        with pytest.raises(LiveLogCorrupt, match="up to 2 were acknowledged"):
            writer.write([upsert("c")])
        with pytest.raises(LiveLogCorrupt, match="up to 2"):
            reader.poll()
    assert path.read_bytes() == old
    restore(path, whole)
    restore(acknowledged, whole_acknowledged)
    assert ids(reader) == []
    assert writer.write([upsert("c")]) == 3
    assert ids(reader) == ["c"]


def test_writer_after_repaired_damage_writes_on(tmp_path: Path) -> None:
    first, second = LiveLogWriter(tmp_path, "pin", D), LiveLogWriter(tmp_path, "pin", D)
    first.write([upsert("a"), upsert("b")])
    path = log_files(tmp_path / "pin")[0][1]
    good = damage(path, 0.1)  # the header
    with pytest.raises(LiveLogCorrupt):
        second.write([upsert("c")])
    with pytest.raises(LiveLogCorrupt):
        second.write([upsert("c")])
    restore_in_place(path, good)
    assert second.write([upsert("c")]) == 3
    assert all_ids(tmp_path) == ["a", "b", "c"]


def test_log_folder_restored_as_copy_is_followed(tmp_path: Path) -> None:
    writer, reader = (
        LiveLogWriter(tmp_path, "pin", D, file_bytes=300),
        LiveLogReader(tmp_path, "pin"),
    )
    for n in range(7):
        writer.write([upsert(f"e{n}")])
    assert len(ids(reader)) == 7
    shutil.copytree(tmp_path / "pin", tmp_path / "copy")
    shutil.rmtree(tmp_path / "pin")
    os.replace(tmp_path / "copy", tmp_path / "pin")
    assert writer.write([upsert("new")]) == 8
    assert ids(reader) == ["new"]
