"""Find rows of an earlier signal store, so that unchanged rows need not be embedded again.

Rows are found by id, content hash and runtime form.

Notable: 32 bytes of memory per stored row; vectors are read from the part files only when rows of a
part are looked up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import xxhash

from encoders.errors import DataError
from encoders.inference.signal_store import Signals, SignalStore, part_form, read_part

_PARTS_HELD = 3


def _key(id: str, content_hash: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{id}\x1f{content_hash}".encode("utf-8", "surrogatepass"))


class KnownSignals:
    """The rows of one entity type that were embedded under one space id in one runtime form."""

    def __init__(
        self,
        keys: npt.NDArray[np.uint64],
        parts: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        paths: Sequence[Path],
        other_form: Collection[int] = (),
    ) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._parts = parts[order]
        self._rows = rows[order]
        self._paths = list(paths)
        self._other_form = frozenset(other_form)
        self._held: OrderedDict[int, Signals] = OrderedDict()
        self.in_other_form = 0
        """Rows of the last ``find`` with the same content, but made in another form."""

    @classmethod
    def open(
        cls, store: SignalStore, entity_type: str, space_id: str, form_id: str = ""
    ) -> KnownSignals:
        """Index what the store holds of this type.

        Empty if it holds nothing, nothing readable, or another space.

        Args:
            store: The earlier store.
            entity_type: Which of its folders.
            space_id: Rows of another space are unknown.
            form_id: Rows made in another form are only counted (``in_other_form``). A part without
                a mark counts as the form that ``signals.json`` states.
        """
        keys: list[int] = []
        parts: list[int] = []
        rows: list[int] = []
        other_form: list[int] = []
        try:
            described = store.describe(entity_type)
            paths = store.part_paths(entity_type) if described["space_id"] == space_id else []
            for number, path in enumerate(paths):
                table = pq.read_table(path, columns=["id", "content_hash"])
                if (part_form(table.schema) or described.get("form_id") or "") != form_id:
                    other_form.append(number)
                pairs = zip(table["id"].to_pylist(), table["content_hash"].to_pylist())
                keys += [
                    _key(id, content_hash) if content_hash else 0 for id, content_hash in pairs
                ]
                parts += [number] * len(table)
                rows += range(len(table))
        except (DataError, OSError, KeyError, ValueError):
            return cls(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.int32), [])
        return cls(
            np.array(keys, np.uint64),
            np.array(parts, np.int32),
            np.array(rows, np.int32),
            paths,
            other_form,
        )

    def find(
        self, ids: Sequence[str], hashes: Sequence[str], dimension: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.datetime64], npt.NDArray[np.bool_]]:
        """Look rows up.

        Args:
            ids: N ids.
            hashes: N content hashes.
            dimension: Width D of the vectors.

        Returns:
            Vectors (N, D) float32, their times (N,) datetime64[us] UTC (now for rows that were not
            found), and found (N,) bool. Only the vectors of found rows are set.
        """
        vectors = np.zeros((len(ids), dimension), dtype=np.float32)
        stamps = np.full(len(ids), np.datetime64("now", "us"))
        found = np.zeros(len(ids), dtype=bool)
        self.in_other_form = 0
        if not len(self._keys):
            return vectors, stamps, found
        keys = np.fromiter(
            (_key(id, content_hash) for id, content_hash in zip(ids, hashes)), np.uint64, len(ids)
        )
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        candidates = np.flatnonzero(self._keys[places] == keys)
        for number in np.unique(self._parts[places[candidates]]).tolist():
            if number in self._other_form:
                self.in_other_form += int((self._parts[places[candidates]] == number).sum())
                continue
            part = self._part(number)
            if part is None or part.vectors.shape[1] != dimension:
                continue
            for n in candidates[self._parts[places[candidates]] == number].tolist():
                row = int(self._rows[places[n]])
                if part.ids[row] == ids[n] and part.content_hashes[row] == hashes[n]:
                    vectors[n] = part.vectors[row]
                    found[n] = True
                    stamps[n] = part.updated_at[row]
        return vectors, stamps, found

    def _part(self, number: int) -> Signals | None:
        if number not in self._held:
            try:
                self._held[number] = read_part(self._paths[number])
            except DataError:
                return None
            if len(self._held) > _PARTS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]
