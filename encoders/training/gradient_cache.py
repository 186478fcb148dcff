"""Batches larger than memory: encode in chunks without a graph, take the loss on the vectors, then replay each chunk for its gradient.

This is GradCache (Gao et al., 2021). The memory of activations is one chunk's, whatever the batch;
the price is a second forward pass. Random state is kept per chunk, so that dropout falls the same
way in both passes and the gradients equal those of one big pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

C = TypeVar("C")


class _RandomState:
    """The generators' state at a moment, CPU and the current CUDA device."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = (
            torch.cuda.get_rng_state()
            if torch.cuda.is_available() and torch.cuda.is_initialized()
            else None
        )

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class Encoding(Generic[C]):
    """Vectors of all chunks of one tower, and the way back from their gradient to the tower's parameters.

    Args:
        encode: Tower forward of one chunk: ``chunk -> (rows, D)``. Deterministic but for torch's
            generators.
        chunks: At least one.
        cached: True: gradient caching. False: keep the graph of every chunk (faster, memory of the
            whole batch).
        after_backward: Called at the end of ``backward``, when every chunk has its gradient.

    Attributes:
        vectors: ``(sum of rows, D)``, in the order of the chunks. Use it in the loss, call
            ``loss.backward()``, then ``backward()`` here.
    """

    def __init__(
        self,
        encode: Callable[[C], Tensor],
        chunks: Sequence[C],
        *,
        cached: bool,
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        self._encode, self._chunks, self._cached, self._after_backward = (
            encode,
            chunks,
            cached,
            after_backward,
        )
        self._states: list[_RandomState] = []
        parts: list[Tensor] = []
        if cached and torch.is_grad_enabled():
            with torch.no_grad():
                for chunk in chunks:
                    self._states.append(_RandomState())
                    parts.append(encode(chunk))
            self.vectors = torch.cat(parts).requires_grad_()
        else:
            self._cached = False
            parts = [encode(chunk) for chunk in chunks]
            self.vectors = torch.cat(parts) if len(parts) > 1 else parts[0]

    def backward(self) -> None:
        """After ``loss.backward()``: replay each chunk and add its gradient to the parameters; without caching nothing is replayed."""
        if self._cached and self.vectors.grad is not None:
            self._replay(self.vectors.grad)
        if self._after_backward is not None:
            self._after_backward()

    def _replay(self, gradients: Tensor) -> None:
        after = _RandomState()
        start = 0
        for chunk, state in zip(self._chunks, self._states, strict=True):
            state.restore()
            vectors = self._encode(chunk)
            gradient = gradients[start : start + len(vectors)]
            if vectors.requires_grad:
                torch.autograd.backward(vectors, gradient)
            start += len(vectors)
        after.restore()
