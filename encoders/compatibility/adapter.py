"""Map one embedding space to another linearly, learned from texts embedded in both.

``x -> normalise(W x)``, without a bias: lengths do not matter on the sphere, so a query tower that
ends in a linear layer takes the whole adapter into that layer (``fold``), and an adapted tower
costs nothing more to run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from encoders.errors import BundleError, ConfigError, InvalidVectors
from encoders.towers.query_tower import QueryEncoder

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SpaceAdapter:
    """A linear map ``left @ right``, float32 ``(to, from)``.

    At full rank ``left`` is the matrix itself and ``right`` is None.
    """

    left: Float32
    right: Float32 | None = None

    @property
    def matrix(self) -> Float32:
        """The map, ``(to, from)``."""
        return self.left if self.right is None else self.left @ self.right

    @property
    def rank(self) -> int:
        """Rank of a low-rank adapter; of a full one the smaller of its two widths."""
        return int(min(self.left.shape))

    def apply(self, vectors: Float32) -> Float32:
        """Map ``(N, from)`` rows to unit rows ``(N, to)``.

        Raises:
            InvalidVectors: The rows have another width.
        """
        matrix = self.matrix
        if vectors.ndim != 2 or vectors.shape[1] != matrix.shape[1]:
            raise InvalidVectors(
                f"this adapter takes vectors of {matrix.shape[1]} numbers, but got an array of"
                f" shape {vectors.shape}."
            )
        return _unit(vectors @ matrix.T)

    def fold(self, tower: QueryEncoder) -> QueryEncoder:
        """Copy a query tower with the matrix multiplied into its last linear layer.

        Raises:
            BundleError: The tower gives vectors of another width.
        """
        matrix = torch.from_numpy(self.matrix).double()
        if tower.dimension != matrix.shape[1]:
            raise BundleError(
                f"the adapter takes vectors of {matrix.shape[1]} numbers, but the query tower gives"
                f" {tower.dimension}."
            )
        adapted = QueryEncoder(
            copy.deepcopy(tower.transformer),
            tower.tokenizer,
            int(matrix.shape[0]),
            tower.max_tokens,
            tower.pooling,
            copy.deepcopy(list(tower.dense)),  # type: ignore[arg-type]
        )
        if tower.ngrams is not None:
            adapted.ngrams = tower.ngrams.turned(matrix)
        with torch.no_grad():
            adapted.projection.weight.copy_(matrix @ tower.projection.weight.double())
            adapted.projection.bias.copy_(matrix @ tower.projection.bias.double())
        return adapted.eval()

    def save(self, path: Path) -> None:
        """Write a safetensors file: ``matrix``, or ``left`` and ``right``."""
        if self.right is None:
            save_file({"matrix": self.left}, path)
        else:
            save_file({"left": self.left, "right": self.right}, path)

    @classmethod
    def load(cls, path: Path, shape: tuple[int, int]) -> SpaceAdapter:
        """Read an adapter.

        Args:
            path: Written by ``save``.
            shape: ``(to, from)`` that the two spaces need.

        Raises:
            BundleError: Unreadable, of other shapes, not float32, or with values that are not
                finite.
        """
        try:
            parts = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise BundleError(
                f"{path}: the adapter cannot be read ({error}). Declare the compatibility again."
            ) from error
        left = parts.get("matrix", parts.get("left"))
        right = parts.get("right")
        shapes = {name: f"{value.dtype} {value.shape}" for name, value in parts.items()}
        if (
            left is None
            or set(parts) not in ({"matrix"}, {"left", "right"})
            or any(v.dtype != np.float32 or v.ndim != 2 for v in parts.values())
        ):
            raise BundleError(
                f"{path}: expected float32 'matrix', or 'left' and 'right', of two dimensions, but"
                f" got {shapes}."
            )
        found = left.shape if right is None else (left.shape[0], right.shape[1])
        if found != shape or (right is not None and left.shape[1] != right.shape[0]):
            raise BundleError(
                f"{path}: the adapter should map {shape[1]} numbers to {shape[0]}, but holds"
                f" {shapes}."
            )
        if not all(np.isfinite(value).all() for value in parts.values()):
            raise BundleError(
                f"{path}: the adapter holds NaN or infinity. Declare the compatibility again."
            )
        return cls(left, right)


def fit_adapter(
    source: Float32, target: Float32, *, rank: int = 0, ridge: float = 1e-2
) -> SpaceAdapter:
    """Fit a linear map from ``source`` rows to ``target`` rows by ridge regression.

    Args:
        source: ``(N, from)`` unit rows.
        target: ``(N, to)``, what each row should become.
        rank: At most this rank, by reduced-rank regression: the fitted values are cut to their
            first principal directions; 0: full rank.
        ridge: Shrinkage relative to the mean variance of a source direction, above 0.

    Raises:
        ConfigError: No rows, a rank or ridge out of range.
        InvalidVectors: Shapes do not fit, or a value is not finite.
    """
    if source.ndim != 2 or target.ndim != 2 or len(source) != len(target):
        raise InvalidVectors(
            f"an adapter is fitted on pairs of rows, but got {source.shape} and {target.shape}."
        )
    if len(source) == 0:
        raise ConfigError("an adapter is learned from train queries, but there are none.")
    widths = target.shape[1], source.shape[1]
    if not 0 <= rank <= min(widths):
        raise ConfigError(
            f"the rank of an adapter from {widths[1]} to {widths[0]} numbers is 0 (full) to"
            f" {min(widths)}, but got {rank}."
        )
    if not ridge > 0:
        raise ConfigError(f"ridge must be above 0, but got {ridge}.")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise InvalidVectors(
            "an adapter cannot be learned from vectors with NaN or infinity. Embed again."
        )
    x, y = source.astype(np.float64), target.astype(np.float64)
    moments = x.T @ x  # (from, from)
    shrink = ridge * np.trace(moments) / len(moments)
    solution = np.linalg.solve(moments + shrink * np.eye(len(moments)), x.T @ y)  # (from, to)
    if rank == 0 or rank == min(widths):
        return SpaceAdapter(np.ascontiguousarray(solution.T, dtype=np.float32))
    root = np.linalg.cholesky(moments + shrink * np.eye(len(moments))).T
    _, _, directions = np.linalg.svd(root @ solution, full_matrices=False)
    basis = directions[:rank]  # (rank, to)
    left = np.ascontiguousarray(basis.T, dtype=np.float32)
    right = np.ascontiguousarray((solution @ basis.T).T, dtype=np.float32)
    return SpaceAdapter(left, right)


def _unit(vectors: Float32) -> Float32:
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit: Float32 = (vectors / norms).astype(np.float32)
    return unit
