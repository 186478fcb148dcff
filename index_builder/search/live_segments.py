"""Live entries made searchable: scanned up to a few thousand, small graph segments built behind them, and tombstones over the base.

One thread applies entries (``LiveState.apply``) and publishes immutable pictures (``LiveView``);
searches never lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from index_builder.ann import AnnIndex
from index_builder.live_log.records import LiveEntry
from index_builder.native import live_scan
from index_builder.search.live_blocks import Block

EXACT_LIMIT = 4096 if live_scan is not None else 1024
"""Entries of a segment that is scanned; larger ones get a graph, as do sealed ones where the compiled scan was not built.

Scanning 2,000 x 256 in float32 takes as long as searching a graph of 100,000; by one bit a
dimension it takes a seventh of that.
"""
MERGE_FACTOR = 4
"""Segments of about one size that are merged into one; keeps their number logarithmic."""
_EF = 32
"""Candidate-list size of segment graphs: of the top k few are live, so the best few of a segment are what must be found."""
_NO_ROWS, _NO_SCORES = np.zeros(0, np.int64), np.zeros(0, np.float32)
_EXACT_SHARE = 0.2
"""Below this share of searchable rows the matching rows are scanned exactly instead of walking the graph."""


Answer = tuple[list[str], np.ndarray]
"""Ids and float32 scores, best first."""


class LiveSegment:
    """Row-aligned live entries; rows with ``alive`` False were replaced or deleted later.

    Attributes:
        ids: Entity ids.
        vectors: float32 ``(n, D)``, unit rows.
        alive: bool ``(n,)``.
        alive_count: How many rows are alive.
    """

    __slots__ = ("_block", "alive", "alive_count", "ids", "size", "vectors")

    def __init__(self, block: Block, size: int, alive: np.ndarray) -> None:
        self._block = block
        self.size = size
        self.ids: Sequence[str] = block.ids
        self.vectors = block.vectors[:size]
        self.alive = alive
        self.alive_count = int(np.count_nonzero(alive))

    def __len__(self) -> int:
        return self.size

    def holds(self, block: Block) -> bool:
        """Whether this is a picture of ``block``."""
        return self._block is block

    @property
    def attributes(self) -> pl.DataFrame:
        """Attributes of the rows, ``n`` rows; columns that no entry set are missing.

        Built when first asked for.
        """
        return self._block.attributes(self.size)

    def merge(
        self,
        query: np.ndarray,
        k: int,
        ids: list[str],
        scores: np.ndarray,
        mask: np.ndarray | None = None,
        exact: bool = False,
    ) -> Answer:
        """The best ``k`` of an answer and of the living rows.

        Args:
            query: float32 ``(1, D)``, unit norm.
            k: Wanted.
            ids: At most ``k`` ids, best first, none of them alive here.
            scores: float32, their inner products with the query.
            mask: bool ``(n,)``; only rows where it is True. None: all.
            exact: Score every row in float32.

        Returns:
            Ids and float32 scores, best first; the very arguments where no row is good enough.
        """
        block = self._block
        if block.bits is not None and not exact:
            usable = self.alive if mask is None else self.alive & mask
            out = np.empty(k, np.float32)
            merged = live_scan.merge(
                query,
                k,
                block.vectors,
                block.bits,
                block.facts,
                usable,
                block.ids,
                ids,
                scores,
                out,
            )
            return (ids, scores) if merged is ids else (merged, out[: len(merged)])
        rows, found = self.search(
            query, k, mask, float(scores[-1]) if len(ids) == k else -np.inf, exact
        )
        if len(rows) == 0:
            return ids, scores
        both = np.concatenate([scores, found])
        best = (-both).argsort(kind="stable")[:k]
        return [
            ids[i] if i < len(ids) else block.ids[rows[i - len(ids)]] for i in best.tolist()
        ], both[best]

    def search(
        self,
        query: np.ndarray,
        k: int,
        mask: np.ndarray | None = None,
        floor: float = -np.inf,
        exact: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best living rows for one query.

        Args:
            query: float32 ``(D,)`` or ``(1, D)``, unit norm.
            k: At most this many.
            mask: bool ``(n,)``; only rows where it is True. None: all.
            floor: If no row scores above it, none need be returned.
            exact: Walk no graph.

        Returns:
            Rows int64 and inner products float32, best first, ties by row. Exact in the tail; in
            large segments approximate unless the mask is narrow.
        """
        if mask is None:
            usable, matching = self.alive, self.alive_count
        else:
            usable = self.alive & mask
            matching = int(np.count_nonzero(usable))
        if matching == 0 or k <= 0:
            return _NO_ROWS, _NO_SCORES
        graph = self._block.graph
        if (
            graph is not None
            and not exact
            and matching > _EXACT_SHARE * self.size
            and matching > EXACT_LIMIT // 2
        ):
            found = _search_graph(
                graph, query.reshape(1, -1), min(k, matching), usable, self.size / matching, floor
            )
            if found is not None:
                return found
        query = query.reshape(-1)
        if matching == self.size:
            scores = self.vectors @ query  # (n, D) @ (D,) -> (n,)
            best = _best(scores, k)
            return best, scores[best]
        rows = np.flatnonzero(usable)
        scores = (
            self.vectors[rows] @ query
            if matching < self.size // 2
            else (self.vectors @ query)[rows]
        )
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
    graph: AnnIndex,
    query: np.ndarray,
    wanted: int,
    usable: np.ndarray,
    inflation: float,
    floor: float,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Search ``(1, D)`` wider until ``wanted`` usable rows survive; None when an exact scan is the better way, no rows below ``floor``."""
    size = len(usable)
    ask = min(size, wanted if inflation == 1.0 else int(wanted * inflation * 1.5) + 8)
    while ask <= min(size, 2048):
        try:
            rows, distances = graph.search(query, ask, max(_EF, 2 * ask))
        except RuntimeError:  # fewer than ``ask`` nodes can be reached from the entry point
            return None
        if 1.0 - 0.5 * float(distances[0]) <= floor:
            return _NO_ROWS, _NO_SCORES
        rows = rows.astype(np.int64)
        if inflation == 1.0 and len(rows) == wanted:
            return rows, 1.0 - distances / 2
        keep = usable[rows]
        if int(np.count_nonzero(keep)) >= wanted:
            return rows[keep][:wanted], (1.0 - distances[keep][:wanted] / 2).astype(np.float32)
        if ask == size:
            return None
        ask = min(size, ask * 4)
    return None


@dataclass(frozen=True, slots=True)
class LiveView:
    """Immutable picture of everything written after a release's watermark.

    Attributes:
        sequence: Of the last entry inside.
        segments: Every living id is alive in exactly one of them.
        hidden_rows: bool ``(N_base,)``: base rows deleted or replaced, never to be returned; None
            when there are none.
        hidden_count: How many.
        live_count: Living entries in all segments.
        foreign_count: Upserts skipped because they were embedded under another space id (the base
            row keeps answering).
    """

    sequence: int
    segments: tuple[LiveSegment, ...] = ()
    hidden_rows: np.ndarray | None = None
    hidden_count: int = 0
    live_count: int = 0
    foreign_count: int = 0
    places: Mapping[str, tuple[Block, int]] = field(default_factory=dict, repr=False, compare=False)
    """Where each id lives now; shared with the state, so possibly newer than this picture: ``find`` checks it."""

    def find(self, id: str) -> tuple[LiveSegment, int] | None:
        """The segment and row where ``id`` is alive in this picture, or None."""
        place = self.places.get(id)
        if place is None:
            return None
        for segment in self.segments:
            if segment.holds(place[0]) and place[1] < segment.size and segment.alive[place[1]]:
                return segment, place[1]
        # Replaced or moved by a merge since this picture was taken: rare, so a linear search is
        # fine.
        return self.search_for(id)

    def search_for(self, id: str) -> tuple[LiveSegment, int] | None:
        """``find`` by looking at every living entry: right also for an id that is being deleted after this picture was taken."""
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
        exact_limit: Entries in the tail before it is sealed; segments up to this size are scanned.
        scans: Whether the compiled scan is used where it was built.
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
        scans: bool = True,
    ) -> None:
        self._dimension, self._space_id, self._row_of = dimension, space_id, row_of
        self._exact_limit = exact_limit
        self._scans = scans and live_scan is not None
        self._sequence = sequence
        self._tail = self._new_block(exact_limit)
        self._sealed: list[Block] = []
        self._where: dict[str, tuple[Block, int]] = {}
        self._hidden = np.zeros(base_count, bool)
        self._hidden_count = 0
        self._foreign: set[str] = set()
        self._lock = threading.Lock()
        self._executor = (
            ThreadPoolExecutor(1, thread_name_prefix="live-segments") if background else None
        )
        self._merging = False
        self._view = LiveView(sequence)

    @property
    def view(self) -> LiveView:
        """The newest picture."""
        return self._view

    def apply(self, entries: Iterable[LiveEntry]) -> LiveView:
        """Apply entries in order and return the new picture.

        An entry at or below the current sequence number is skipped.
        """
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
            if self._merging or not blocks or (len(blocks) == 1 and blocks[0].ready and not dead):
                return False
            if blocks[-1] is self._tail:
                self._sealed.append(self._tail)
                self._tail = self._new_block(self._exact_limit)
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

    def _new_block(self, capacity: int) -> Block:
        return Block(
            capacity, self._dimension, scanned=self._scans and capacity <= self._exact_limit
        )

    def _apply(self, entry: LiveEntry) -> None:
        if entry.vector is not None and entry.space_id != self._space_id:
            self._foreign.add(entry.id)
            return
        self._foreign.discard(entry.id)
        # What replaces an entry overwrites its place below: a search that holds the old picture
        # must not miss the id meanwhile.
        before = (
            self._where.pop(entry.id, None) if entry.vector is None else self._where.get(entry.id)
        )
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
        block, self._tail = self._tail, self._new_block(self._exact_limit)
        self._sealed.append(block)
        if self._executor is None:
            block.build_graph()
            self._merge_if_due()
        else:
            self._executor.submit(self._build, block)

    def _build(self, block: Block) -> None:
        block.build_graph()
        with self._lock:
            self._merge_if_due()

    def _merge_if_due(self) -> None:
        """With the lock held: start merging when enough segments of one size class wait."""
        if self._merging:
            return
        classes: dict[int, list[Block]] = {}
        for block in self._sealed:
            level = int(
                np.log(max(block.count, 1) / self._exact_limit + 1e-9) / np.log(MERGE_FACTOR) + 0.5
            )
            classes.setdefault(level, []).append(block)
        due = next(
            (
                blocks
                for blocks in classes.values()
                if len(blocks) >= MERGE_FACTOR and all(b.ready for b in blocks)
            ),
            None,
        )
        if due is None:
            return
        self._merging = True
        if self._executor is None:
            self._install(due, self._merged(due))
        else:
            self._executor.submit(self._merge, due)

    def _merge(self, blocks: list[Block]) -> Future[None] | None:
        merged = self._merged(blocks)
        with self._lock:
            self._install(blocks, merged)
            self._view = self._picture()
        return None

    def _merged(self, blocks: list[Block]) -> Block:
        parts = [(block, np.flatnonzero(block.alive[: block.count])) for block in blocks]
        merged = self._new_block(max(sum(len(rows) for _, rows in parts), 1))
        for block, rows in parts:
            start = len(merged.ids)
            merged.vectors[start : start + len(rows)] = block.vectors[rows]
            merged.ids.extend(block.ids[int(r)] for r in rows)
            merged.values.extend(block.values[int(r)] for r in rows)
        merged.alive[: merged.count] = True
        if merged.count:
            merged.encode()
            merged.build_graph()
        return merged

    def _install(self, blocks: list[Block], merged: Block) -> None:
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
        for block in blocks:
            block.encode()
        segments = tuple(
            LiveSegment(block, block.count, block.alive[: block.count].copy()) for block in blocks
        )
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
