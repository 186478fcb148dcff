"""The interface of nearest neighbour indexes and the configuration that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from encoders.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnConfig:
    """How a graph is built; each implementation reads the fields it knows and records them all."""

    m: int = 16
    """HNSW links per node above layer 0 (2*m at layer 0). Memory grows linearly with it."""
    degree: int = 32
    """SymphonyQG out-degree, a multiple of 32."""
    ef_construction: int = 200
    """Candidate-list size while inserting. Higher: better recall, slower build."""
    bits: int = 0
    """What ``symqg`` scores its last candidates with: 0 float32, else 8 bits a dimension."""
    sketched_links: bool = True
    """Whether links of ``int8-graph`` carry one-bit sketches: faster, 1.5 not 0.4 kB a vector."""
    threads: int = 1
    """Build threads.

    One thread gives the same bytes for the same input and seed; more are faster and not
    reproducible.
    """
    seed: int = 100
    reproducible: bool = False
    """Whether builders that cannot be seeded must be avoided."""
    scratch: Path | None = field(default=None, repr=False, compare=False)
    """Folder for files from which links are read during a build; None: the temporary folder."""

    def __post_init__(self) -> None:
        if self.reproducible and self.threads != 1:
            raise ConfigError(
                f"a reproducible build uses one thread, but got threads={self.threads}."
            )
        if self.m < 2 or self.m > 256:
            raise ConfigError(f"AnnConfig.m must be between 2 and 256, but got {self.m}.")
        if self.degree < 32 or self.degree % 32:
            raise ConfigError(
                f"AnnConfig.degree must be a positive multiple of 32, but got {self.degree}."
            )
        if self.ef_construction < max(self.m, 2):
            raise ConfigError(
                f"AnnConfig.ef_construction ({self.ef_construction}) must be at least m ({self.m})."
            )
        if self.bits < 0 or self.bits > 9:
            raise ConfigError(f"AnnConfig.bits must be between 0 and 9, but got {self.bits}.")
        if self.threads < 1:
            raise ConfigError(f"AnnConfig.threads must be at least 1, but got {self.threads}.")


class AnnIndex(ABC):
    """Rows of unit vectors, searchable by inner product.

    An index knows rows ``0..count-1`` only; ids, attributes, tombstones and live entries belong to
    ``EntityIndex``. After ``build`` or ``load`` it is immutable and safe to search from many
    threads at once.
    """

    kind: ClassVar[str]
    cpu_features: ClassVar[tuple[str, ...]] = ()
    """Names from /proc/cpuinfo without which the index cannot be searched."""
    exact: ClassVar[bool] = False
    """Whether every answer is the exact top k whatever ``ef`` is."""
    true_distances: bool = True
    """Whether ``search`` returns float32 distances of the vectors, not estimates from codes."""

    count: int
    dimension: int
    config: AnnConfig

    @classmethod
    @abstractmethod
    def build(cls, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Build over ``vectors``, float32 ``(N, D)`` with unit rows and N >= 1."""

    @classmethod
    @abstractmethod
    def load(cls, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Load what ``save`` wrote.

        Args:
            prefix: ``<prefix>.*`` are the files.
            vectors: The corpus, usually memory-mapped, for the kinds that share it.
            config: As at the build.

        Raises:
            IndexFormatError: A file is missing, damaged or of another size.
        """

    @abstractmethod
    def save(self, prefix: Path) -> list[Path]:
        """Write ``<prefix>.*`` and return the files written; none where the corpus is the index."""

    @abstractmethod
    def search(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search one query.

        Args:
            query: float32 ``(1, D)``, C-contiguous, unit norm.
            k: Neighbours wanted, ``1 <= k <= count``.
            ef: Size of the search's candidate list, at least ``k``. Higher: better recall, slower.

        Returns:
            Rows (an integer array, at most ``k`` long) and **squared Euclidean distances** float32,
            nearest first. On unit vectors the inner product is ``1 - distance / 2``.
        """

    def search_batch(self, queries: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search ``(B, D)`` queries.

        Returns:
            int64 rows ``(B, k)``, -1 where missing, and float32 distances ``(B, k)``.
        """
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        for i in range(len(queries)):
            found, found_distances = self.search(queries[i : i + 1], k, ef)
            rows[i, : len(found)] = found
            distances[i, : len(found)] = found_distances
        return rows, distances

    def parameters(self) -> dict[str, Any]:
        """Return the configuration as plain values for the manifest."""
        values = asdict(self.config)
        del values["sketched_links"]  # int8-graph alone reads it
        del values["scratch"]
        return values

    def neighbours(self) -> np.ndarray | None:
        """Return the base layer's out-links; None where there is no graph or it shows none.

        uint32 ``(N, degree)``; a node with fewer links is padded with links to itself.

        Raises:
            UnsupportedLibrary: The library that built it writes files of an unknown layout.
            DiskFull: The file from which they are read cannot be written.
        """
        return None
