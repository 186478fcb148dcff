"""How old the rows of a source are, and which live writes a catalogue has caught up with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from index_builder.errors import LiveLogError, ReleaseCorrupt
from index_builder.live_log.files import read_acknowledged
from index_builder.live_log.records import LiveEntry

MODIFIED_AT = "modified_at"
"""Column of a catalogue: when the row's data was last changed."""
SETTLED_NAME = "settled.npy"


class Order(Enum):
    """Whether a live write is later than a row of a source."""

    LATER = "later"
    EARLIER = "earlier"
    UNKNOWN = "unknown"
    """The source was read after the write, but nothing says whether its data is newer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTimes:
    """What is known of one kind of time, nanoseconds since 1970; 0: nothing.

    Attributes:
        rows: int64 ``(N,)``, one per row.
        absent: For ids that the source does not have.
    """

    rows: np.ndarray
    absent: int = 0

    def of(self, row: int | None) -> int:
        """Return the time of a row; None: of an id that the source does not have."""
        return self.absent if row is None else int(self.rows[row])


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceAge:
    """How old the rows of a source are, against the live log of the same entity type.

    Instants are compared with the times that the log's one writing machine recorded, never with
    times of embedding.

    Attributes:
        read_at: Live sequence when reading began; what was written later wins.
        stated: Instants at which the source says its data was current (``modified_at``,
            ``--exported-at``); None: it does not say.
        limit: Instants after which no row can have been written (its file's time); None: unknown.
    """

    read_at: int
    stated: RowTimes | None = None
    limit: RowTimes | None = None

    def order(self, entry: LiveEntry, row: int | None) -> Order:
        """Compare a live write with a row of the source, or with its not having the id (None)."""
        if entry.version > self.read_at:
            return Order.LATER
        stated = self.stated.of(row) if self.stated is not None else 0
        if stated:
            return Order.LATER if entry.time_ns > stated else Order.EARLIER
        limit = self.limit.of(row) if self.limit is not None else 0
        return Order.LATER if limit and entry.time_ns > limit else Order.UNKNOWN


@dataclass(frozen=True, slots=True)
class Settled:
    """Live writes that a catalogue has caught up with: a later catalogue is newer than they are.

    Attributes:
        sequence: Live sequence that the last rebuild from a catalogue reached.
        open: Writes up to there that no catalogue has caught up with.
    """

    sequence: int = 0
    open: frozenset[int] = frozenset()

    def holds(self, version: int) -> bool:
        """Return whether the write of that sequence number is settled."""
        return version <= self.sequence and version not in self.open

    def write(self, folder: Path) -> None:
        """Write ``settled.npy`` into the folder of an entity type; nothing where none is."""
        if self.sequence:
            np.save(folder / SETTLED_NAME, np.array([self.sequence, *sorted(self.open)], np.int64))

    @classmethod
    def read(cls, folder: Path) -> Settled:
        """Read what ``write`` wrote; nothing is settled where there is no file.

        Raises:
            ReleaseCorrupt: The file is damaged.
        """
        try:
            values = np.load(folder / SETTLED_NAME, allow_pickle=False).tolist()
            return cls(int(values[0]), frozenset(values[1:]))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, EOFError, IndexError, TypeError) as error:
            raise ReleaseCorrupt(
                f"{folder}/{SETTLED_NAME} cannot be read ({error}). Restore the release or roll"
                " back."
            ) from error


NOTHING_SETTLED = Settled()


def live_sequences(live_root: Path) -> dict[str, int]:
    """Return the last acknowledged sequence of every live log, to be noted before a source is read.

    A log that does not say is 0: all its writes are later than the source.
    """
    sequences = {}
    for folder in sorted(live_root.iterdir()) if live_root.is_dir() else []:
        try:
            sequences[folder.name] = read_acknowledged(folder).sequence
        except (LiveLogError, OSError):
            sequences[folder.name] = 0
    return sequences
