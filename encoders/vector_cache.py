"""Keep vectors of texts in a folder, so that the commands of a job embed each text once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from encoders.file_modes import follow_umask

TEXT_VECTORS = "OMNI_TEXT_VECTORS"
"""Environment variable that names a folder to keep vectors in from command to command."""
_KEY_BYTES = 16
_SUFFIX = ".npy"


class VectorCache:
    """Vectors of one tower by the hash of their text; the texts themselves are not kept.

    Each ``add`` is a file of its own, renamed into place, so processes may share a folder and an
    interrupted one leaves what it had. A damaged file is removed and its texts embedded again.

    Args:
        folder: Made when it is first written to.
        dimension: Width of the vectors, D.
        most: Texts that the folder holds at most; the oldest files beyond are removed.
    """

    def __init__(self, folder: Path, dimension: int, most: int) -> None:
        self.folder = folder
        self._row = np.dtype([("key", f"V{_KEY_BYTES}"), ("vector", np.float16, (dimension,))])
        self._vectors = self._read(most)

    def find(self, texts: Sequence[str]) -> dict[str, npt.NDArray[np.float16]]:
        """Return the vectors of those texts that have one."""
        found = ((text, self._vectors.get(_key(text))) for text in texts)
        return {text: vector for text, vector in found if vector is not None}

    def add(self, texts: Sequence[str], vectors: npt.NDArray[np.float16]) -> None:
        """Keep N texts' vectors, (N, D).

        Raises:
            OSError: The folder cannot be written.
        """
        rows = np.empty(len(texts), self._row)
        rows["key"] = np.frombuffer(b"".join(map(_key, texts)), rows["key"].dtype)
        rows["vector"] = vectors
        self.folder.mkdir(parents=True, exist_ok=True)
        number, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
        with os.fdopen(number, "wb") as file:
            np.save(file, rows)
        follow_umask(Path(partial))
        os.replace(partial, Path(partial).with_suffix(_SUFFIX))
        self._vectors.update(zip(map(_key, texts), rows["vector"], strict=True))

    def _read(self, most: int) -> dict[bytes, npt.NDArray[np.float16]]:
        found: dict[bytes, npt.NDArray[np.float16]] = {}
        newest_first = sorted(self.folder.glob(f"*{_SUFFIX}"), key=_age_ns)
        for file in newest_first:
            rows = self._rows(file) if len(found) < most else None
            if rows is None:
                with suppress(OSError):
                    file.unlink()
                continue
            found.update(zip(map(bytes, rows["key"]), rows["vector"], strict=True))
        return found

    def _rows(self, file: Path) -> npt.NDArray[np.void] | None:
        """Read a file; None: it is damaged."""
        try:
            rows: npt.NDArray[np.void] = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        whole = rows.dtype == self._row and np.isfinite(rows["vector"]).all()
        return rows if whole else None


def _key(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=_KEY_BYTES).digest()


def _age_ns(file: Path) -> int:
    with suppress(FileNotFoundError):  # another process may remove it
        return -file.stat().st_mtime_ns
    return 0
