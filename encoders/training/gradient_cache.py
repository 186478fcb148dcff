"""Train on batches larger than memory: encode chunks without a graph, replay each for its gradient.

This is GradCache (Gao et al., 2021): the loss is taken on all vectors in between. The memory of
activations is one chunk's, whatever the batch; the price is a second forward pass. Random state is
kept per chunk, so that dropout is the same in both passes and the gradients equal those of one big
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

C = TypeVar("C")


class _RandomState:
    """The state of torch's generators at a moment: CPU and the current CUDA device."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda: Tensor | None = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.cuda = torch.cuda.get_rng_state()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class Encoding(Generic[C]):
    """Encodes chunks with one tower, and hands the vectors' gradient on to the tower's parameters.

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
        self._encode = encode
        self._chunks = chunks
        self._after_backward = after_backward
        self._cached = cached and torch.is_grad_enabled()
        self._states: list[_RandomState] = []
        if self._cached:
            self.vectors = self._encode_without_graph().requires_grad_()
        else:
            parts = [encode(chunk) for chunk in chunks]
            self.vectors = torch.cat(parts) if len(parts) > 1 else parts[0]

    def _encode_without_graph(self) -> Tensor:
        parts: list[Tensor] = []
        with torch.no_grad():
            for chunk in self._chunks:
                self._states.append(_RandomState())
                parts.append(self._encode(chunk))
        return torch.cat(parts)

    def backward(self) -> None:
        """Add each chunk's gradient to the parameters, after ``loss.backward()``.

        With caching each chunk is replayed; without, ``loss.backward()`` did it.
        """
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
