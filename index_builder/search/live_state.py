"""The state of live entries over one base: entries applied in order, small segments merged.

One thread applies entries (``LiveState.apply``) and publishes immutable views (``LiveView``);
searches never lock. A delete sets the tombstone of a row here; ``plans.py`` and the engine leave
the row out of every answer.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.lexical.live_words import LiveWords
from index_builder.live_log.records import LiveEntry
from index_builder.native import live_scan
from index_builder.search.live_blocks import Block
from index_builder.search.live_segments import EXACT_LIMIT, LiveSegment, LiveView
from index_builder.storage.engine_arrays import MAX_DIMENSION

log = logging.getLogger(__name__)

MERGE_FACTOR = 4
"""Segments of about one size that are merged into one; keeps their number logarithmic."""
_CROWDED_SHARE = 0.8
"""Below this share of living rows a segment is worth merging alone."""
_WAITS = 16
"""A finished merge may start another."""


class LiveBase(NamedTuple):
    """What live entries are applied over."""

    dimension: int
    """Length of the vectors."""
    space_id: str
    """Space of the base; upserts of another space are counted and skipped."""
    row_of: Callable[[str], int | None]
    """Base row of an id, or None."""
    rows: int
    """Rows of the base."""
    watermark: int = 0
    """Sequence of the last entry that the base contains."""
    lexical: LexicalIndex | None = None
    """Words of the base; None: words of live entries are not kept."""
    rows_of: Callable[[Sequence[str]], np.ndarray] | None = None
    """Base rows of many ids, int64, -1 where there is none; None: ``row_of`` is asked for each."""

    def find_rows(self, ids: Sequence[str]) -> list[int]:
        """Return the base row of each id, -1 where there is none."""
        if self.rows_of is not None:
            rows: list[int] = self.rows_of(ids).tolist()
            return rows
        found = map(self.row_of, ids)
        return [-1 if row is None else row for row in found]


class LiveState:
    """Applies live entries over one base index.

    Args:
        base: What they are applied over.
        exact_limit: Entries in the tail before it is sealed.
        scans: Whether the compiled scan is used where it was built; else every entry is scored in
            float32.
        background: False merges segments at once (tests, batch tools).

    Attributes:
        error: Why the last merge of segments failed; None once one has succeeded.
    """

    def __init__(
        self,
        base: LiveBase,
        *,
        exact_limit: int = EXACT_LIMIT,
        background: bool = True,
        scans: bool = True,
    ) -> None:
        self._base = base
        self._exact_limit = exact_limit
        self._scans = scans and live_scan is not None and base.dimension <= MAX_DIMENSION
        self._sequence = base.watermark
        self._tail = self._new_block(exact_limit)
        self._sealed: list[Block] = []
        self._pending: deque[LiveEntry] = deque()
        self._where: dict[str, tuple[Block, int]] = {}
        self._hidden = np.zeros(base.rows, bool)
        self._hidden_count = 0
        self._foreign: set[str] = set()
        self._lock = threading.Lock()
        self._executor = (
            ThreadPoolExecutor(1, thread_name_prefix="live-segments") if background else None
        )
        self._merging = False
        self.error: Exception | None = None
        self._view = LiveView(base.watermark)

    @property
    def view(self) -> LiveView:
        """The newest view."""
        return self._view

    def apply(self, entries: Iterable[LiveEntry]) -> LiveView:
        """Apply entries in order and return the new view.

        An entry at or below the current sequence number is skipped. Where memory runs out, what
        is not applied yet waits for the next call.
        """
        with self._lock:
            self._pending.extend(entries)
            for row in self._base.find_rows([entry.id for entry in self._pending]):
                entry = self._pending[0]
                if not entry.sequence or entry.sequence > self._sequence:
                    self._apply(entry, row)
                    self._sequence = max(self._sequence, entry.sequence)
                self._pending.popleft()
            self._view = self._new_view()
            return self._view

    @property
    def is_behind(self) -> bool:
        """Whether an ``apply`` failed before all it was given is visible; the next goes on."""
        return bool(self._pending) or self._view.sequence < self._sequence

    def close(self) -> None:
        """Stop merging segments."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def compact(self) -> bool:
        """Start merging everything but a short tail into one segment.

        Call it when no writes come, since each segment costs every search.

        Returns:
            Whether a merge was started; False when it would change nothing or one is running.
        """
        with self._lock:
            blocks = list(self._sealed)
            if self._tail.count > self._exact_limit // 4:
                blocks.append(self._tail)
            if self._merging or not _worth_merging(blocks):
                return False
            if blocks[-1] is self._tail:
                self._replace_tail()
            self._start_merge(blocks)
            if self._executor is None:
                self._view = self._new_view()
            return True

    def wait(self) -> None:
        """Block until no segments are being merged (tests and tools)."""
        if self._executor is not None:
            for _ in range(_WAITS):
                self._executor.submit(lambda: None).result()
        with self._lock:
            self._view = self._new_view()

    def _new_block(self, capacity: int) -> Block:
        return Block(capacity, self._base.dimension, self._scans, self._base.lexical)

    def _apply(self, entry: LiveEntry, row: int) -> None:
        """Apply an entry; ``row``: of its id in the base, -1 where there is none."""
        if entry.vector is not None and entry.space_id != self._base.space_id:
            self._foreign.add(entry.id)
            return
        if entry.vector is not None and self._tail.count >= self._exact_limit:
            self._seal()  # may lack memory: before anything is hidden
        self._foreign.discard(entry.id)
        # What replaces an entry overwrites its place below: a search that holds the old view must
        # not miss the id meanwhile.
        if entry.vector is None:
            replaced = self._where.pop(entry.id, None)
        else:
            replaced = self._where.get(entry.id)
        if replaced is not None:
            block, live_row = replaced
            block.alive[live_row] = False
        if row >= 0 and not self._hidden[row]:
            self._hidden[row] = True
            self._hidden_count += 1
        if entry.vector is not None:
            self._where[entry.id] = (self._tail, self._tail.append(entry))

    def _seal(self) -> None:
        self._replace_tail()
        self._merge_if_due()

    def _replace_tail(self) -> None:
        # First: without memory nothing is changed, and a merge copies no row that is not normal yet
        fresh = self._new_block(self._exact_limit)
        self._tail.encode()
        self._sealed.append(self._tail)
        self._tail = fresh

    def _merge_if_due(self) -> None:
        """Start merging when enough segments of one size class wait; the lock is held."""
        if self._merging:
            return
        due = self._due()
        if due is None:
            return
        self._start_merge(due)

    def _start_merge(self, blocks: list[Block]) -> None:
        """Merge blocks, in the background if there is one; the lock is held."""
        self._merging = True
        if self._executor is not None:
            try:
                self._executor.submit(self._merge, blocks)
            except RuntimeError as error:  # closed, or no thread could be started
                self._merge_failed(error)
            return
        merged = self._try_merging(blocks)
        if merged is not None:
            self._install(blocks, merged)

    def _due(self) -> list[Block] | None:
        """Return blocks of one size class that are enough for a merge."""
        classes: dict[int, list[Block]] = {}
        for block in self._sealed:
            tails = max(block.count, 1) / self._exact_limit
            level = int(np.log(tails + 1e-9) / np.log(MERGE_FACTOR) + 0.5)
            classes.setdefault(level, []).append(block)
        for blocks in classes.values():
            if len(blocks) >= MERGE_FACTOR:
                return blocks
        return None

    def _merge(self, blocks: list[Block]) -> None:
        """Merge blocks and show the result; runs in the background."""
        merged = self._try_merging(blocks)
        if merged is None:
            return
        with self._lock:
            try:
                self._install(blocks, merged)
                self._view = self._new_view()
            except Exception as error:
                self._merge_failed(error)

    def _try_merging(self, blocks: list[Block]) -> Block | None:
        """Merge blocks; None where that failed: they stay as they are, and searches are right."""
        try:
            return self._merged(blocks)
        except Exception as error:  # memory is short, say; a later seal or ``compact`` tries again
            self._merge_failed(error)
            return None

    def _merge_failed(self, error: Exception) -> None:
        repeated = self.error is not None
        self.error = error
        self._merging = False
        if repeated:
            return
        log.error(
            "live entries: merging segments failed (%s: %s); searches stay right but slow down, and"
            " the next sealed segment tries again",
            type(error).__name__,
            error,
        )

    def _merged(self, blocks: list[Block]) -> Block:
        """Copy the living rows of some blocks into one block that is fast to search."""
        parts = [(block, np.flatnonzero(block.alive[: block.count])) for block in blocks]
        merged = self._new_block(max(sum(len(rows) for _, rows in parts), 1))
        for block, rows in parts:
            start = len(merged.ids)
            merged.vectors[start : start + len(rows)] = block.vectors[rows]
            merged.ids.extend(map(block.ids.__getitem__, rows.tolist()))
            merged.values.extend(map(block.values.__getitem__, rows.tolist()))
        merged.alive[: merged.count] = True
        merged.words = self._merged_words(parts) or merged.words
        if merged.count:
            merged.encode()
        return merged

    def _merged_words(self, parts: Sequence[tuple[Block, np.ndarray]]) -> LiveWords | None:
        """Return the words of rows of some blocks; None where a block has not counted all yet."""
        lexical = self._base.lexical
        if lexical is None:
            return None
        words = [block.words.taken(rows) for block, rows in parts if block.words is not None]
        known = [part for part in words if part is not None]
        return LiveWords.behind_each_other(lexical, known) if len(known) == len(parts) else None

    def _install(self, blocks: list[Block], merged: Block) -> None:
        """Put ``merged`` in the place of ``blocks``; the lock is held.

        Ids replaced or deleted while it was built are dead in it.
        """
        gone = set(map(id, blocks))
        sealed = [block for block in self._sealed if id(block) not in gone]
        if merged.count:
            sealed.append(merged)
        # Nothing below needs memory, so that no id is moved to a block that is not installed
        for row, identifier in enumerate(merged.ids):
            place = self._where.get(identifier)
            if place is not None and id(place[0]) in gone:
                self._where[identifier] = (merged, row)
            else:
                merged.alive[row] = False
        self._sealed = sealed
        self._merging = False
        self.error = None
        self._merge_if_due()

    def _new_view(self) -> LiveView:
        blocks = [block for block in [*self._sealed, self._tail] if block.count]
        for block in blocks:
            block.encode()
        segments = tuple(
            LiveSegment(block, block.count, block.alive[: block.count].copy()) for block in blocks
        )
        return LiveView(
            sequence=self._sequence,
            segments=tuple(segment for segment in segments if segment.alive_count),
            hidden_rows=self._hidden.copy() if self._hidden_count else None,
            hidden_count=self._hidden_count,
            live_count=len(self._where),
            foreign_count=len(self._foreign),
            places=self._where,
        )


def _worth_merging(blocks: list[Block]) -> bool:
    """Return whether one block would be faster to search than these."""
    if len(blocks) != 1:
        return bool(blocks)
    block = blocks[0]
    living = np.count_nonzero(block.alive[: block.count])
    return bool(living < _CROWDED_SHARE * block.count)
