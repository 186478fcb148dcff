"""Live entries made searchable: an exact tail of up to a few thousand, small graph segments built behind it, and tombstones over the base.

One thread applies entries (``LiveState.apply``) and publishes immutable pictures (``LiveView``); searches never lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from encoders.errors import ConfigError
from index_builder.ann import AnnConfig, AnnIndex, build_index
from index_builder.ann.choice import missing_features
from index_builder.ann.symqg import MIN_ROWS
from index_builder.live_records import LiveEntry

EXACT_LIMIT = 1024
"""Entries scanned exactly before they are sealed into a segment with a graph: scanning 2,000 x 256 takes as long as searching 100,000."""
MERGE_FACTOR = 4
"""Segments of about one size that are merged into one; keeps their number logarithmic."""
_EF = 64
_SEGMENT = AnnConfig(m=16, ef_construction=100)
_EXACT_SHARE = 0.2
"""Below this share of searchable rows the matching rows are scanned exactly instead of walking the graph."""


class LiveSegment:
    """Row-aligned live entries; rows with ``alive`` False were replaced or deleted later.

    Attributes:
        ids: Entity ids.
        vectors: float32 ``(n, D)``, unit rows.
        alive: bool ``(n,)``.
        alive_count: How many rows are alive.
    """

    __slots__ = ("_block", "alive", "alive_count", "ids", "size", "vectors")

    def __init__(self, block: _Block, size: int, alive: np.ndarray) -> None:
        self._block = block
        self.size = size
        self.ids: Sequence[str] = block.ids
        self.vectors = block.vectors[:size]
        self.alive = alive
        self.alive_count = int(np.count_nonzero(alive))

    def __len__(self) -> int:
        return self.size

    def holds(self, block: _Block) -> bool:
        """Whether this is a picture of ``block``."""
        return self._block is block

    @property
    def attributes(self) -> pl.DataFrame:
        """Attributes of the rows, ``n`` rows; columns that no entry set are missing. Built when first asked for."""
        return self._block.attributes(self.size)

    def search(self, query: np.ndarray, k: int, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The best living rows for one query.

        Args:
            query: float32 ``(D,)`` or ``(1, D)``, unit norm.
            k: At most this many.
            mask: bool ``(n,)``; only rows where it is True. None: all.

        Returns:
            Rows int64 and inner products float32, best first, ties by row. Exact in the tail; in sealed segments approximate unless the
            mask is narrow.
        """
        query = query.reshape(-1)
        if mask is None:
            usable, matching = self.alive, self.alive_count
        else:
            usable = self.alive & mask
            matching = int(np.count_nonzero(usable))
        if matching == 0 or k <= 0:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        graph = self._block.graph
        if graph is not None and matching > _EXACT_SHARE * self.size and matching > EXACT_LIMIT // 2:
            found = _search_graph(graph, query, min(k, matching), usable, self.size / matching)
            if found is not None:
                return found
        if matching == self.size:
            scores = self.vectors @ query
            best = _best(scores, k)
            return best, scores[best]
        rows = np.flatnonzero(usable)
        scores = self.vectors[rows] @ query if matching < self.size // 2 else (self.vectors @ query)[rows]
        best = _best(scores, k)
        return rows[best], scores[best]


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the ``k`` highest of ``scores``, best first, ties by place."""
    size = len(scores)
    if size <= k:
        return (-scores).argsort(kind="stable")
    top = scores.argpartition(size - k)[size - k :]
    top.sort()
    return np.asarray(top[(-scores[top]).argsort(kind="stable")])


def _search_graph(
    graph: AnnIndex, query: np.ndarray, wanted: int, usable: np.ndarray, inflation: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Search wider until ``wanted`` usable rows survive; None when an exact scan is the better way."""
    size = len(usable)
    ask = min(size, wanted if inflation == 1.0 else int(wanted * inflation * 1.5) + 8)
    while ask <= min(size, 2048):
        try:
            rows, distances = graph.search(query.reshape(1, -1), ask, max(_EF, 2 * ask))
        except RuntimeError:  # fewer than ``ask`` nodes can be reached from the entry point
            return None
        rows = rows.astype(np.int64)
        keep = usable[rows]
        if inflation == 1.0 and len(rows) == wanted:
            return rows, 1.0 - distances / 2
        if int(np.count_nonzero(keep)) >= wanted:
            return rows[keep][:wanted], (1.0 - distances[keep][:wanted] / 2).astype(np.float32)
        if ask == size:
            return None
        ask = min(size, ask * 4)
    return None


def _build_graph(vectors: np.ndarray) -> AnnIndex:
    """The fastest small graph this machine can search: SymphonyQG where it runs, else HNSW."""
    if len(vectors) >= MIN_ROWS and not missing_features("symqg"):
        try:
            return build_index("symqg", vectors, _SEGMENT)
        except (ConfigError, ImportError, ValueError):  # not installed, too few rows, or a dimension it does not know
            pass
    return build_index("hnsw", vectors, _SEGMENT)


class _Block:
    """Storage shared by the pictures of one segment: rows are only ever appended, so a picture of ``n`` rows stays true."""

    def __init__(self, capacity: int, dimension: int) -> None:
        self.ids: list[str] = []
        self.vectors = np.zeros((capacity, dimension), np.float32)
        self.values: list[dict[str, Any]] = []
        self.alive = np.zeros(capacity, bool)
        self.graph: AnnIndex | None = None
        self._frame = pl.DataFrame()
        self._frame_rows = 0
        self._frame_lock = threading.Lock()

    @property
    def count(self) -> int:
        return len(self.ids)

    def append(self, entry: LiveEntry) -> int:
        assert entry.vector is not None
        row = len(self.ids)
        self.vectors[row] = entry.vector
        self.values.append(entry.attributes)
        self.alive[row] = True
        self.ids.append(entry.id)
        return row

    def attributes(self, size: int) -> pl.DataFrame:
        with self._frame_lock:
            if self._frame_rows < size:
                fresh = attribute_frame(self.values[self._frame_rows : size])
                self._frame = (
                    fresh if self._frame_rows == 0 else join_frames([self._frame, fresh], [self._frame_rows, size - self._frame_rows])
                )
                self._frame_rows = size
            return self._frame if self._frame_rows == size else self._frame.head(size)

    def build_graph(self) -> None:
        self.graph = _build_graph(self.vectors[: self.count])


def attribute_frame(values: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Attribute dictionaries as a table with as many rows; a column whose values do not fit one type becomes text.

    Args:
        values: One dictionary per row.
    """
    names = list(dict.fromkeys(name for row in values for name in row))
    columns = {}
    for name in names:
        cells = [row.get(name) for row in values]
        try:
            columns[name] = pl.Series(name, cells, strict=True)
        except (TypeError, pl.exceptions.PolarsError, OverflowError):
            try:
                columns[name] = pl.Series(name, cells, strict=False)
            except (TypeError, pl.exceptions.PolarsError, OverflowError):
                columns[name] = pl.Series(name, [None if cell is None else str(cell) for cell in cells])
    return pl.DataFrame(columns) if columns else pl.DataFrame({"": [None] * len(values)}).select()


def join_frames(frames: Sequence[pl.DataFrame], heights: Sequence[int]) -> pl.DataFrame:
    """Stack attribute tables with different columns; missing cells are null, clashing types become text.

    Args:
        frames: Tables, some possibly without any column (and therefore without a height of their own).
        heights: Rows of each.
    """
    total = sum(heights)
    names = list(dict.fromkeys(name for frame in frames for name in frame.columns))
    columns = []
    for name in names:
        parts = [frame[name] if name in frame.columns else pl.Series(name, [None] * height) for frame, height in zip(frames, heights)]
        kinds = {part.dtype for part in parts if part.dtype != pl.Null}
        try:
            columns.append(
                pl.concat([part.to_frame() for part in parts], how="vertical_relaxed")[name] if kinds else pl.Series(name, [None] * total)
            )
        except pl.exceptions.PolarsError:
            columns.append(pl.concat([part.cast(pl.String, strict=False).to_frame() for part in parts])[name])
    return pl.DataFrame(columns)


@dataclass(frozen=True, slots=True)
class LiveView:
    """Immutable picture of everything written after a release's watermark.

    Attributes:
        sequence: Of the last entry inside.
        segments: Every living id is alive in exactly one of them.
        hidden_rows: bool ``(N_base,)``: base rows deleted or replaced, never to be returned; None when there are none.
        hidden_count: How many.
        live_count: Living entries in all segments.
        foreign_count: Upserts skipped because they were embedded under another space id (the base row keeps answering).
    """

    sequence: int
    segments: tuple[LiveSegment, ...] = ()
    hidden_rows: np.ndarray | None = None
    hidden_count: int = 0
    live_count: int = 0
    foreign_count: int = 0
    places: Mapping[str, tuple[_Block, int]] = field(default_factory=dict, repr=False, compare=False)
    """Where each id lives now; shared with the state, so possibly newer than this picture: ``find`` checks it."""

    def find(self, id: str) -> tuple[LiveSegment, int] | None:
        """The segment and row where ``id`` is alive in this picture, or None."""
        place = self.places.get(id)
        if place is None:
            return None
        for segment in self.segments:
            if segment.holds(place[0]) and place[1] < segment.size and segment.alive[place[1]]:
                return segment, place[1]
        # Replaced or moved by a merge since this picture was taken: rare, so a linear search is fine.
        for segment in self.segments:
            for row in np.flatnonzero(segment.alive):
                if segment.ids[int(row)] == id:
                    return segment, int(row)
        return None


class LiveState:
    """Applies live entries over one base index.

    Args:
        dimension: Length of the vectors.
        space_id: Space of the base; upserts of another space are counted and skipped.
        row_of: Base row of an id, or None.
        base_count: Rows of the base.
        sequence: The base's watermark.
        exact_limit: Entries in the exact tail before it is sealed.
        background: False builds graphs at once (tests, batch tools).
    """

    def __init__(
        self,
        *,
        dimension: int,
        space_id: str,
        row_of: Callable[[str], int | None],
        base_count: int,
        sequence: int = 0,
        exact_limit: int = EXACT_LIMIT,
        background: bool = True,
    ) -> None:
        self._dimension, self._space_id, self._row_of = dimension, space_id, row_of
        self._exact_limit = exact_limit
        self._sequence = sequence
        self._tail = _Block(exact_limit, dimension)
        self._sealed: list[_Block] = []
        self._where: dict[str, tuple[_Block, int]] = {}
        self._hidden = np.zeros(base_count, bool)
        self._hidden_count = 0
        self._foreign: set[str] = set()
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="live-segments") if background else None
        self._merging = False
        self._view = LiveView(sequence)

    @property
    def view(self) -> LiveView:
        """The newest picture."""
        return self._view

    def apply(self, entries: Iterable[LiveEntry]) -> LiveView:
        """Apply entries in order and return the new picture. An entry at or below the current sequence number is skipped."""
        with self._lock:
            for entry in entries:
                if entry.sequence and entry.sequence <= self._sequence:
                    continue
                self._apply(entry)
                self._sequence = max(self._sequence, entry.sequence)
            self._view = self._picture()
            return self._view

    def close(self) -> None:
        """Stop building segments."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def compact(self) -> bool:
        """Start merging everything but a short tail into one segment; call it when no writes come, since each segment costs every search.

        Returns:
            Whether a merge was started; False when it would change nothing or one is running.
        """
        with self._lock:
            blocks = list(self._sealed)
            if self._tail.count > self._exact_limit // 4:
                blocks.append(self._tail)
            dead = any(np.count_nonzero(b.alive[: b.count]) < 0.8 * b.count for b in blocks)
            if self._merging or not blocks or (len(blocks) == 1 and blocks[0].graph is not None and not dead):
                return False
            if blocks[-1] is self._tail:
                self._sealed.append(self._tail)
                self._tail = _Block(self._exact_limit, self._dimension)
            self._merging = True
            if self._executor is None:
                self._install(blocks, self._merged(blocks))
                self._view = self._picture()
            else:
                self._executor.submit(self._merge, blocks)
            return True

    def wait(self) -> None:
        """Block until no segment is being built (tests and tools)."""
        if self._executor is not None:
            for _ in range(16):  # a finished build may start a merge
                self._executor.submit(lambda: None).result()
        with self._lock:
            self._view = self._picture()

    def _apply(self, entry: LiveEntry) -> None:
        if entry.vector is not None and entry.space_id != self._space_id:
            self._foreign.add(entry.id)
            return
        self._foreign.discard(entry.id)
        before = self._where.pop(entry.id, None)
        if before is not None:
            before[0].alive[before[1]] = False
        row = self._row_of(entry.id)
        if row is not None and not self._hidden[row]:
            self._hidden[row] = True
            self._hidden_count += 1
        if entry.vector is None:
            return
        if self._tail.count >= self._exact_limit:
            self._seal()
        self._where[entry.id] = (self._tail, self._tail.append(entry))

    def _seal(self) -> None:
        block, self._tail = self._tail, _Block(self._exact_limit, self._dimension)
        self._sealed.append(block)
        if self._executor is None:
            block.build_graph()
            self._merge_if_due()
        else:
            self._executor.submit(self._build, block)

    def _build(self, block: _Block) -> None:
        block.build_graph()
        with self._lock:
            self._merge_if_due()

    def _merge_if_due(self) -> None:
        """With the lock held: start merging when enough segments of one size class wait."""
        if self._merging:
            return
        classes: dict[int, list[_Block]] = {}
        for block in self._sealed:
            level = int(np.log(max(block.count, 1) / self._exact_limit + 1e-9) / np.log(MERGE_FACTOR) + 0.5)
            classes.setdefault(level, []).append(block)
        due = next(
            (blocks for blocks in classes.values() if len(blocks) >= MERGE_FACTOR and all(b.graph is not None for b in blocks)), None
        )
        if due is None:
            return
        self._merging = True
        if self._executor is None:
            self._install(due, self._merged(due))
        else:
            self._executor.submit(self._merge, due)

    def _merge(self, blocks: list[_Block]) -> Future[None] | None:
        merged = self._merged(blocks)
        with self._lock:
            self._install(blocks, merged)
            self._view = self._picture()
        return None

    def _merged(self, blocks: list[_Block]) -> _Block:
        parts = [(block, np.flatnonzero(block.alive[: block.count])) for block in blocks]
        merged = _Block(max(sum(len(rows) for _, rows in parts), 1), self._dimension)
        for block, rows in parts:
            start = len(merged.ids)
            merged.vectors[start : start + len(rows)] = block.vectors[rows]
            merged.ids.extend(block.ids[int(r)] for r in rows)
            merged.values.extend(block.values[int(r)] for r in rows)
        merged.alive[: merged.count] = True
        if merged.count:
            merged.build_graph()
        return merged

    def _install(self, blocks: list[_Block], merged: _Block) -> None:
        """With the lock held: put ``merged`` in the place of ``blocks``; ids replaced or deleted while it was built are dead in it."""
        gone = set(map(id, blocks))
        for row, identifier in enumerate(merged.ids):
            place = self._where.get(identifier)
            if place is not None and id(place[0]) in gone:
                self._where[identifier] = (merged, row)
            else:
                merged.alive[row] = False
        self._sealed = [block for block in self._sealed if id(block) not in gone]
        if merged.count:
            self._sealed.append(merged)
        self._merging = False
        self._merge_if_due()

    def _picture(self) -> LiveView:
        blocks = [block for block in [*self._sealed, self._tail] if block.count]
        segments = tuple(LiveSegment(block, block.count, block.alive[: block.count].copy()) for block in blocks)
        segments = tuple(segment for segment in segments if segment.alive_count)
        return LiveView(
            sequence=self._sequence,
            segments=segments,
            hidden_rows=self._hidden.copy() if self._hidden_count else None,
            hidden_count=self._hidden_count,
            live_count=len(self._where),
            foreign_count=len(self._foreign),
            places=self._where,
        )
