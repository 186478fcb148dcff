"""Entity ids by row and rows by id, in flat memory-mapped arrays.

Processes share one copy, and nothing is built at load.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from index_builder.errors import DuplicateIds, IndexBuildError, IndexFormatError

_FILES = ("ids.utf8", "ids.offsets.npy", "ids.hashes.npy", "ids.rows.npy")


def check_id(value: object, row: int) -> str:
    """Check that an id is a non-empty string in Unicode's composed form (NFC), and return it.

    Raises:
        IndexBuildError: It is not; names the row and the fix.
    """
    if not isinstance(value, str) or not value:
        raise IndexBuildError(
            f"row {row}: expected a non-empty string as id, but got {value!r}. Give every entity"
            " an id."
        )
    if not value.isascii():
        if not unicodedata.is_normalized("NFC", value):
            raise IndexBuildError(
                f"row {row}: id {value!r} is not in Unicode NFC. Normalise ids with"
                " unicodedata.normalize('NFC', id)."
            )
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise IndexBuildError(
                f"row {row}: id {value!r} is not valid Unicode (a lone surrogate). Fix the id at"
                " its source."
            ) from error
    return value


class IdTable(Sequence[str]):
    """Ids by row, and rows by id through sorted 64-bit hashes."""

    def __init__(
        self, blob: np.ndarray, offsets: np.ndarray, hashes: np.ndarray, rows: np.ndarray
    ) -> None:
        self.blob, self.offsets, self.hashes, self.rows = blob, offsets, hashes, rows
        self._view: memoryview = blob.data

    @classmethod
    def build(cls, ids: Iterable[object]) -> IdTable:
        """Check and store ids.

        Raises:
            IndexBuildError: An id is empty, not a string or not NFC.
            DuplicateIds: Two rows share an id.
        """
        encoded = [check_id(value, row).encode("utf-8") for row, value in enumerate(ids)]
        offsets = np.zeros(len(encoded) + 1, dtype=np.uint64)
        offsets[1:] = np.cumsum([len(e) for e in encoded], dtype=np.uint64)
        hashes = np.array([xxhash.xxh3_64_intdigest(e) for e in encoded], dtype=np.uint64)
        rows = np.argsort(hashes, kind="stable").astype(np.uint32)
        ordered = hashes[rows]
        for at in np.flatnonzero(ordered[1:] == ordered[:-1]):
            first, second = int(rows[at]), int(rows[at + 1])
            if encoded[first] == encoded[second]:
                raise DuplicateIds(
                    f"row {second}: id {encoded[second].decode()!r} was already given by row"
                    f" {first}. Keep one row per id (the newest) and build again."
                )
        return cls(
            np.frombuffer(b"".join(encoded) or b"\0", dtype=np.uint8), offsets, ordered, rows
        )

    def save(self, folder: Path) -> None:
        """Write ``ids.*``."""
        (folder / _FILES[0]).write_bytes(self.blob.tobytes())
        for name, array in zip(_FILES[1:], (self.offsets, self.hashes, self.rows), strict=True):
            np.save(folder / name, array)

    @classmethod
    def load(cls, folder: Path) -> IdTable:
        """Map ``ids.*``.

        Raises:
            IndexFormatError: A file is missing or does not fit the others.
        """
        try:
            blob = np.memmap(folder / _FILES[0], dtype=np.uint8, mode="r")
            offsets, hashes, rows = (
                np.asarray(np.load(folder / name, mmap_mode="r")) for name in _FILES[1:]
            )
        except (OSError, ValueError) as error:
            raise IndexFormatError(
                f"the id files of {folder.name!r} cannot be read ({error}). Rebuild this release."
            ) from error
        if not (len(offsets) - 1 == len(hashes) == len(rows)) or int(offsets[-1]) > len(blob):
            raise IndexFormatError(
                f"the id files of {folder.name!r} do not fit each other. Rebuild this release."
            )
        return cls(blob, offsets, hashes, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(row)
        return str(self._view[int(self.offsets[row]) : int(self.offsets[row + 1])], "utf-8")

    def take(self, rows: np.ndarray) -> list[str]:
        """Return the ids of ``rows``, in order."""
        view = self._view
        starts = self.offsets[rows].tolist()
        ends = self.offsets[rows + 1].tolist()
        return [str(view[a:b], "utf-8") for a, b in zip(starts, ends)]

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """Return the row of each id, int64; -1 where it is unknown."""
        digests = np.fromiter(
            (xxhash.xxh3_64_intdigest(i.encode("utf-8", "surrogatepass")) for i in ids),
            np.uint64,
            len(ids),
        )
        if not len(self.rows):
            return np.full(len(ids), -1, np.int64)
        places = np.minimum(self.hashes.searchsorted(digests), len(self.rows) - 1)
        rows = np.full(len(ids), -1, np.int64)
        known = np.flatnonzero(self.hashes[places] == digests)
        rows[known] = self.rows[places[known]]
        for number, found in zip(known.tolist(), self.take(rows[known]), strict=True):
            if found != ids[number]:  # one of several ids with this hash, or none of them
                row = self.row_of(ids[number])
                rows[number] = -1 if row is None else row
        return rows

    def row_of(self, id_: str) -> int | None:
        """Return the row of an id, or None."""
        try:
            encoded = id_.encode("utf-8")
        except UnicodeEncodeError:
            return None
        digest = np.uint64(xxhash.xxh3_64_intdigest(encoded))
        at = int(self.hashes.searchsorted(digest))
        while at < len(self.hashes) and self.hashes[at] == digest:
            row = int(self.rows[at])
            if self._view[int(self.offsets[row]) : int(self.offsets[row + 1])] == encoded:
                return row
            at += 1
        return None
