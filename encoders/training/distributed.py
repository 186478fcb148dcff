"""Share vectors between the processes of a training run, with the gradients of the whole batch.

Every process takes the mean loss over its own rows against the candidates of all processes, and
parameter gradients are averaged. The gradient of a gathered vector is the sum of its gradients on
all processes, and the average makes it the gradient of the mean over the union of all rows: that of
one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes; 1 when ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Return this process's rank; 0 when ``torch.distributed`` is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        ctx.rows = len(vectors)
        gathered = vectors.new_empty((world_size() * len(vectors), *vectors.shape[1:]))
        dist.all_gather(list(gathered.chunk(world_size())), vectors.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, op=dist.ReduceOp.SUM)
        start = process_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather_with_gradient(vectors: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order.

    Args:
        vectors: ``(B, ...)``, the same shape on every process.

    Returns:
        ``(world_size * B, ...)``; with one process, ``vectors`` itself.
    """
    if world_size() == 1:
        return vectors
    gathered: Tensor = _Gather.apply(vectors)
    return gathered


def all_processes(condition: bool, device: torch.device) -> bool:
    """Say whether a condition holds on every process; every process gets the same answer."""
    if world_size() == 1:
        return condition
    agreed = torch.tensor(int(condition), device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed.item())


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; a missing one counts as zero.

    They are reduced in one flat tensor per dtype. Every process must pass the same parameters in
    the same order.
    """
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        flat /= world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def broadcast_parameters(module: torch.nn.Module) -> None:
    """Give every process rank 0's parameters and buffers."""
    if world_size() == 1:
        return
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor, src=0)
