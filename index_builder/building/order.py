"""Which wins, a row of the source or a live write: by versions, never by times of embedding.

The rule (``docs/reference/releases.md``): what was written after the source was read, or after the
time that it states, wins. What was written before loses to a row of the source; a delete only to a
source that is known to be newer. Known newer is one that says so, or that is read after an earlier
catalogue had caught up with the write (``Settled``). An upsert whose id the source lacks stays,
unless the source is known to be newer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from index_builder.building.inputs import EntityInput
from index_builder.building.update import attributes_of
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.source_age import MODIFIED_AT, NOTHING_SETTLED, Order, Settled

_SAME_COSINE = 0.999
"""Vectors closer than this say the same."""
_NAMED = 10
"""Ids that a message names."""


class LiveWrites(NamedTuple):
    """What the live log holds behind a watermark."""

    latest: dict[str, LiveEntry]
    """The last write per id."""
    watermark: int
    """Sequence of the last write."""


@dataclass(frozen=True, slots=True)
class Folded:
    """What was decided between an input and the live log.

    Attributes:
        watermark: Live sequence up to which the log was read.
        upserts: Live upserts that are in effect.
        deletes: Live deletes that are in effect.
        confirmed: Live upserts whose row in the source says the same.
        overridden: Ids upserted live whose row in the source wins, and says something else.
        relisted: Ids deleted live that the source, which says that it is newer, has.
        dropped: Ids upserted live that the source, which says that it is newer, does not have.
        held_back: Rows that a live delete keeps out, though the source was read after it.
        foreign: Ids whose live vector belongs to another space.
        settled: Live writes that a catalogue has caught up with.
    """

    watermark: int
    upserts: int = 0
    deletes: int = 0
    confirmed: int = 0
    overridden: list[str] = field(default_factory=list)
    relisted: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    held_back: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    settled: Settled = NOTHING_SETTLED

    @property
    def lost(self) -> list[str]:
        """Ids about which an acknowledged live write is no longer in effect."""
        return sorted([*self.overridden, *self.relisted, *self.dropped])

    def __str__(self) -> str:
        """Say what was folded; empty where nothing was."""
        if not any(value for value in self.report().values()):
            return ""
        return (
            f"live log up to {self.watermark}: {self.upserts:,} upserts and {self.deletes:,}"
            f" deletes in effect, {self.confirmed:,} upserts as the source has them"
        )

    def warnings(self) -> list[str]:
        """Name what was overridden, dropped or held back, one line a kind."""
        lines = []
        for ids, what in (
            (self.overridden, "live upserts overridden by the newer source"),
            (self.relisted, "live deletes undone: the newer source has the entity again"),
            (self.dropped, "live upserts dropped: the newer source does not have the entity"),
            (
                self.held_back,
                "rows of the source held back by a live delete. If the source is newer than the"
                " delete, say so (--exported-at, a column modified_at), or upsert them live",
            ),
        ):
            if ids:
                lines.append(f"{len(ids):,} {what}: {some_ids(ids)}")
        return lines

    def report(self) -> dict[str, Any]:
        """Return counts, and ids by what was decided, for the manifest and ``--json``."""
        return {
            "upserts": self.upserts,
            "deletes": self.deletes,
            "confirmed": self.confirmed,
            "overridden": self.overridden,
            "relisted": self.relisted,
            "dropped": self.dropped,
            "held_back": self.held_back,
            "foreign": self.foreign,
        }


class LiveChanges(NamedTuple):
    """What live writes do to the rows of an input."""

    dead: list[int]
    """Rows replaced, deleted or held back."""
    fresh: list[LiveEntry]
    """Upserts, to be appended."""
    foreign: list[LiveEntry]
    """Upserts in effect whose vector belongs to another space."""
    deleted: list[int]
    """Sequences of the deletes in effect."""
    folded: Folded


def decide(entities: EntityInput, live: LiveWrites) -> LiveChanges:
    """Decide for each live write whether it is in effect over the rows of an input."""
    return _Decision(entities, live).made()


def some_ids(ids: Sequence[str]) -> str:
    """Name the first ids, and how many there are besides."""
    more = f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else ""
    return ", ".join(repr(id_) for id_ in ids[:_NAMED]) + more


class _Decision:
    """Collects what is decided, one live write after the other."""

    def __init__(self, entities: EntityInput, live: LiveWrites) -> None:
        self.entities = entities
        self.live = live
        self.row_of = {id_: row for row, id_ in enumerate(entities.ids) if id_ in live.latest}
        self.dead: list[int] = []
        self.fresh: list[LiveEntry] = []
        self.foreign: list[LiveEntry] = []
        self.open: set[int] = set()
        self.deleted: list[int] = []
        self.losers: list[tuple[LiveEntry, int]] = []
        """Upserts that lose to a row."""
        self.relisted: list[str] = []
        self.dropped: list[str] = []
        self.held_back: list[str] = []

    def made(self) -> LiveChanges:
        """Decide about every id."""
        for id_ in sorted(self.live.latest):
            entry, row = self.live.latest[id_], self.row_of.get(id_)
            if entry.is_delete:
                self._delete(entry, row)
            else:
                self._upsert(entry, row)
        same = _same(self.entities, self.losers)
        overridden = [
            entry.id
            for entry, _ in self.losers
            if entry.id not in same and not self._is_settled(entry)
        ]
        settled = self.entities.settled
        if self.entities.age is not None:
            settled = Settled(self.live.watermark, frozenset(self.open))
        folded = Folded(
            watermark=self.live.watermark,
            upserts=len(self.fresh),
            deletes=len(self.deleted),
            confirmed=len(same),
            overridden=overridden,
            relisted=self.relisted,
            dropped=self.dropped,
            held_back=self.held_back,
            foreign=[entry.id for entry in self.foreign],
            settled=settled,
        )
        return LiveChanges(self.dead, self.fresh, self.foreign, self.deleted, folded)

    def _order(self, entry: LiveEntry, row: int | None) -> Order:
        age = self.entities.age
        return Order.LATER if age is None else age.order(entry, row)

    def _is_settled(self, entry: LiveEntry) -> bool:
        """Return whether a catalogue took the entity over: what it says now is no loss."""
        return self.entities.settled.holds(entry.version)

    def _known_earlier(self, entry: LiveEntry, order: Order) -> bool:
        return order is Order.EARLIER or (order is Order.UNKNOWN and self._is_settled(entry))

    def _delete(self, entry: LiveEntry, row: int | None) -> None:
        order = self._order(entry, row)
        if row is None:
            self.deleted.append(entry.sequence)
            if order is Order.LATER:
                self.open.add(entry.version)
        elif self._known_earlier(entry, order):
            if not self._is_settled(entry):
                self.relisted.append(entry.id)
        else:
            self.deleted.append(entry.sequence)
            self.dead.append(row)
            self.open.add(entry.version)
            if order is Order.UNKNOWN:
                self.held_back.append(entry.id)

    def _upsert(self, entry: LiveEntry, row: int | None) -> None:
        order = self._order(entry, row)
        if row is not None and order is not Order.LATER:
            self.losers.append((entry, row))
            return
        if row is None and self._known_earlier(entry, order):
            if not self._is_settled(entry):
                self.dropped.append(entry.id)
            return
        self.open.add(entry.version)
        if entry.space_id != self.entities.space_id:
            self.foreign.append(entry)
            return
        if row is not None:
            self.dead.append(row)
        self.fresh.append(entry)


def _same(entities: EntityInput, losers: Sequence[tuple[LiveEntry, int]]) -> set[str]:
    """Return the ids whose live upsert says what their row says."""
    rows = [row for _, row in losers]
    attributes: list[Mapping[str, Any]] = [{}] * len(rows)
    if rows and entities.attributes is not None and entities.attributes.width:
        attributes = [attributes_of(row) for row in _rows(entities.attributes, rows)]
    return {
        entry.id
        for (entry, row), values in zip(losers, attributes, strict=True)
        if _says_the_same(entry, entities, row, values)
    }


def _rows(frame: pl.DataFrame, rows: Sequence[int]) -> list[dict[str, Any]]:
    return frame[np.asarray(rows)].to_dicts()


def _says_the_same(
    entry: LiveEntry, entities: EntityInput, row: int, values: Mapping[str, Any]
) -> bool:
    said = {name: value for name, value in entry.attributes.items() if name != MODIFIED_AT}
    if said:
        return all(values.get(name) == value for name, value in said.items())
    assert entry.vector is not None
    if entry.space_id != entities.space_id:
        return False
    return float(np.dot(entry.vector, entities.vectors[row])) > _SAME_COSINE
