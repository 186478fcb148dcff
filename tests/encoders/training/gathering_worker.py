"""The real training step on one process's slice of a batch; run as a script it is one process of a
gloo group and saves what it got.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from encoders.training.data.batches import BatchPlan
from encoders.training.distributed import (
    all_processes,
    average_gradients,
    broadcast_parameters,
    gather_with_gradient,
    process_rank,
    world_size,
)
from encoders.training.inputs import build_inputs, build_towers
from encoders.training.step import loss_and_gradients
from tests.helpers.training_examples import small_config, tiny_query_encoder, world

DATASETS = [
    {"name": "pin", "candidates": ["entity", "vector:pinsage"]},
    {"name": "product"},
    {"name": "query"},
]


def step_results(rank: int, cached: bool) -> dict[str, Any]:
    """Losses per task and averaged gradients of two steps, over all processes of the group (or this
    one alone).
    """
    config = small_config(datasets=DATASETS, batch={"pairs": 32, "gradient_cache": cached}, seed=3)
    inputs = build_inputs(
        world(vectors=True), config, tiny_query_encoder(), torch.device("cpu"), processes=2
    )
    # Other weights on rank 1: broadcasting must level them.
    towers = build_towers(tiny_query_encoder(seed=rank), inputs)
    broadcast_parameters(towers)
    towers.eval()  # dropout falls differently on different slices; everything else must agree
    losses = []
    for step in range(2):
        report = loss_and_gradients(
            towers, inputs, BatchPlan(inputs.prepared, config, processes=2).step(step)
        )
        losses.append(torch.stack([*report.task_losses.values(), report.loss]))
    parameters = {name: p for name, p in towers.named_parameters() if p.requires_grad}
    average_gradients(parameters.values())
    loss = torch.stack(losses)
    if world_size() > 1:
        dist.all_reduce(loss)
    return {
        "loss": loss / world_size(),
        "gradients": {name: p.grad for name, p in parameters.items()},
    }


def main(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    assert (process_rank(), world_size()) == (rank, processes)
    simple = torch.full((2, 3), float(rank + 1), requires_grad=True)
    gathered = gather_with_gradient(simple)
    (gathered * torch.arange(len(gathered))[:, None] * (rank + 1)).sum().backward()
    agreed = [
        all_processes(condition, torch.device("cpu")) for condition in (True, rank == 0, False)
    ]
    result: dict[str, Any] = {
        "gathered": gathered.detach(),
        "simple": simple.grad,
        "agreed": agreed,
    }
    result |= {mode: step_results(rank, mode == "cached") for mode in ("plain", "cached")}
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
