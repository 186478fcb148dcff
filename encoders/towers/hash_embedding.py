"""Sum hash embeddings per bag: two table rows per token id, signed learned weights.

Paper section 4.2.1: ``token(i) = w[i, 0] * E[h0(i)] + w[i, 1] * E[h1(i)]``. Letters: V token ids, R
table rows, d width, B bags, M rows read. Notable: on a CPU the gradient of the table is itself a
sum of bags, read in the order of the table; `omni bench encode` measures it against PyTorch's own
backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from encoders.text.hashing import splitmix64_finalise

HASHES = 2
_SEED = np.uint64(0x9E3779B97F4A7C15)


def hash_rows(vocabulary_size: int, table_rows: int) -> npt.NDArray[np.int32]:
    """Hash every token id to its two table rows.

    The functions are part of the model, pinned by golden values in the tests.

    Args:
        vocabulary_size: Number of token ids V.
        table_rows: Rows of the embedding table R.

    Returns:
        (V, 2) int32 in ``[0, table_rows)``.
    """
    ids = np.arange(vocabulary_size, dtype=np.uint64)
    columns = [
        splitmix64_finalise(ids * np.uint64(HASHES) + np.uint64(h) + _SEED) % np.uint64(table_rows)
        for h in range(HASHES)
    ]
    return np.stack(columns, axis=1).astype(np.int32)


def sum_bags(table: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Sum weighted table rows per bag.

    Args:
        table: (R, d) float.
        rows: (M,) int32 or int64 table rows.
        weights: (M,) float.
        offsets: (B + 1,) of the dtype of ``rows``; bag b owns ``rows[offsets[b]:offsets[b + 1]]``.

    Returns:
        (B, d): per bag ``sum_j weights[j] * table[rows[j]]``, zeros for an empty bag.
        Differentiable in ``table`` and ``weights``.
    """
    if table.is_cuda or not torch.is_grad_enabled():
        return functional.embedding_bag(
            rows, table, offsets[:-1], mode="sum", per_sample_weights=weights
        )
    sums: Tensor = _SumBags.apply(table, rows, weights, offsets)
    return sums


class _SumBags(torch.autograd.Function):
    """``sum_bags`` on a CPU, with the table's gradient as a sum of bags."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(table, rows, weights, offsets)
        return functional.embedding_bag(
            rows, table, offsets[:-1], mode="sum", per_sample_weights=weights
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        table, rows, weights, offsets = ctx.saved_tensors
        gradient = gradient.contiguous()
        numbers = torch.arange(len(offsets) - 1, dtype=rows.dtype)
        bags = torch.repeat_interleave(numbers, offsets.diff())  # (M,) the bag of each row read
        for_table = for_weights = None
        if ctx.needs_input_grad[0]:
            # A table row's gradient is itself a bag: the weighted sum of the gradients of the bags
            # that read it.
            order = torch.sort(rows, stable=True).indices
            starts = torch.zeros(len(table), dtype=rows.dtype)
            reads = torch.bincount(rows, minlength=len(table))[:-1]
            torch.cumsum(reads, 0, out=starts[1:], dtype=rows.dtype)
            for_table = functional.embedding_bag(
                bags[order], gradient, starts, mode="sum", per_sample_weights=weights[order]
            )
        if ctx.needs_input_grad[2]:
            for_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                gradient, table, rows.long(), offsets[:-1].long(), bags.long(), 0
            )
        return for_table, None, for_weights, None
