"""Raw little-endian arrays on disk, whose lengths another file gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from index_builder.errors import IndexFormatError


def map_array(path: Path, dtype: str, length: int) -> np.ndarray:
    """Map an array of a known length, read-only, so that processes share it.

    Raises:
        IndexFormatError: The file is missing or has another size.
    """
    try:
        size = path.stat().st_size
        expected = length * np.dtype(dtype).itemsize
        if size != expected:
            raise IndexFormatError(
                f"{path.parent.name}/{path.name}: expected {expected:,} bytes, but got {size:,}."
                " Rebuild this release."
            )
        if not length:
            return np.zeros(0, dtype)
        # A plain view of the map: indexing a memmap is slow.
        return np.asarray(np.memmap(path, dtype, "r"))
    except OSError as error:
        raise IndexFormatError(
            f"{path.parent.name}/{path.name} cannot be read ({error}). Rebuild this release."
        ) from error
