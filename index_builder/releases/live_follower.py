"""Keeps an opened release current: a thread polls the live logs and hands views to the indexes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Protocol

from index_builder.errors import LiveLogError
from index_builder.live_log.maintenance import adopt_tail
from index_builder.live_log.reader import LiveLogReader
from index_builder.releases.release import Release
from index_builder.search.live_segments import LiveView
from index_builder.search.live_state import LiveBase, LiveState

POLL_SECONDS = 0.1
IDLE_SECONDS = 2.0
"""Without writes for this long, all live segments of an entity type are merged into one."""
_BATCH = 20_000


class HasLiveRoot(Protocol):
    """A store, as far as the follower cares."""

    live_root: Path


class LiveFollower:
    """Follows the live log for one opened release.

    ``catch_up`` replays everything behind the release's watermark and returns when it is visible:
    call it before the release takes traffic (activation and rollback alike). ``start`` then polls
    in a daemon thread. When the log turns out to be damaged the last good view stays, ``error``
    says why, and polling goes on.

    Args:
        store: Where ``live/`` lies.
        release: The opened release; its indexes get ``set_live``.
        poll_seconds: Time between polls; entries are visible after at most this time plus the time
            to apply them.
    """

    def __init__(
        self, store: HasLiveRoot, release: Release, *, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self.release = release
        self.error: Exception | None = None
        self._live_root = store.live_root
        self._poll_seconds = poll_seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._last_write: dict[str, float] = {}
        self._shown: dict[str, LiveView] = {}
        self._followed: dict[str, tuple[LiveLogReader, LiveState]] = {}
        for entity_type, index in release.entities.items():
            watermark = release.manifest.entities[entity_type].watermark
            base = LiveBase(
                dimension=release.dimension,
                space_id=release.space_id,
                row_of=index.row_of,
                rows_of=index.ids.rows_of,
                rows=len(index.ids),
                watermark=watermark,
                lexical=index.lexical,
            )
            reader = LiveLogReader(store.live_root, entity_type, after=watermark)
            self._followed[entity_type] = (reader, LiveState(base))

    def poll(self) -> int:
        """Read and apply what is new in every log; return how many entries there were.

        Raises:
            LiveLogError: A log is damaged or was collected too far; the other logs were still
                applied.
            OSError: A log could not be read just now; the other logs were still applied.
        """
        count = 0
        now = time.monotonic()
        failure: LiveLogError | OSError | None = None
        with self._lock:
            for entity_type, (reader, state) in self._followed.items():
                try:
                    entries = reader.poll(_BATCH)
                except (LiveLogError, OSError) as error:
                    failure = error
                    continue
                if entries or state.is_behind:
                    count += len(entries)
                    state.apply(entries)
                    self._last_write[entity_type] = now
                elif now - self._last_write.get(entity_type, now) > IDLE_SECONDS:
                    state.compact()
                # New entries, or a segment that finished merging since
                if state.view is not self._shown.get(entity_type):
                    self._show(entity_type, state)
        if failure is not None:
            raise failure
        return count

    def _show(self, entity_type: str, state: LiveState) -> None:
        view = state.view  # a merge may replace it at any moment: show and remember the same one
        self.release.entities[entity_type].set_live(view)
        self._shown[entity_type] = view

    def catch_up(self) -> int:
        """Apply everything written so far; return how many entries that was.

        Raises as ``poll`` does.
        """
        for entity_type in self._followed:
            adopt_tail(self._live_root, entity_type)
        total = 0
        while count := self.poll():
            total += count
        return total

    def wait_for(self, entity_type: str, sequence: int, timeout_seconds: float = 5.0) -> bool:
        """Wait until the entry of that sequence number is visible; False when time ran out."""
        deadline = time.monotonic() + timeout_seconds
        while self._followed[entity_type][1].view.sequence < sequence:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True

    def view(self, entity_type: str) -> LiveView:
        """Return the newest view of one entity type."""
        return self._followed[entity_type][1].view

    def settle(self) -> None:
        """Wait until no segment is being built and show the result (benchmarks and tests)."""
        with self._lock:
            for entity_type, (_, state) in self._followed.items():
                state.wait()
                state.compact()
                state.wait()
                self._show(entity_type, state)

    def start(self) -> LiveFollower:
        """Catch up, then poll in a daemon thread.

        A damaged log does not raise here: see ``error``.
        """
        try:
            self.catch_up()
        except LiveLogError as error:
            self.error = error
        self._thread = threading.Thread(
            target=self._run, name=f"live-{self.release.release_id[:12]}", daemon=True
        )
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop the thread and the segment builders."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10.0)
        for reader, state in self._followed.values():
            reader.close()
            state.close()

    def _run(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            try:
                self.poll()
                # Merging runs in the background, where nobody else would see it fail
                states = (state for _, state in self._followed.values())
                self.error = next((s.error for s in states if s.error is not None), None)
            except Exception as error:
                # No file descriptors, a disk that does not answer: what passes must not end this
                self.error = error
