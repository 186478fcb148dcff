"""Make the optimiser: parameter groups with peak rate and weight decay, and the rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from encoders.config.train_config import OptimiserConfig
from encoders.errors import MissingDependency
from encoders.towers.query_tower import QueryEncoder


def parameter_groups(
    query_encoder: QueryEncoder,
    entity_encoders: Iterable[nn.Module],
    log_scales: Iterable[nn.Parameter],
    config: OptimiserConfig,
) -> list[dict[str, Any]]:
    """Sort parameters into groups with ``lr`` and ``peak_lr``; those of rate 0 are frozen.

    Frozen parameters are in no group, and their ``requires_grad`` is off.

    Args:
        query_encoder: Its token embeddings and its transformer have rates of their own; its
            projection moves like the entity towers.
        entity_encoders: Distinct entity towers.
        log_scales: One learned log scale per task.
        config: Rates and decay. Matrices decay; embeddings, biases, norms and scales do not.
    """
    transformer: Any = query_encoder.transformer
    embeddings = {id(p) for p in transformer.get_input_embeddings().parameters()}
    rated: list[tuple[nn.Parameter, float, bool]] = []
    for name, parameter in transformer.named_parameters():
        is_embedding = id(parameter) in embeddings
        rate = config.token_embedding_learning_rate if is_embedding else config.query_learning_rate
        rated.append((parameter, rate, parameter.ndim >= 2 and "embedding" not in name))
    rated += [(p, config.learning_rate, p.ndim >= 2) for p in query_encoder.projection.parameters()]
    for tower in entity_encoders:
        for name, parameter in tower.named_parameters():
            rated.append(
                (parameter, config.learning_rate, parameter.ndim >= 2 and name.startswith("mlp."))
            )
    rated += [(scale, config.learning_rate, False) for scale in log_scales]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, rate, decays in rated:
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            groups.setdefault((rate, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate,
            "peak_lr": rate,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (rate, decays), parameters in groups.items()
    ]


def create_optimiser(
    groups: list[dict[str, Any]], config: OptimiserConfig
) -> torch.optim.Optimizer:
    """Make AdamW (fused) or LAMB.

    Raises:
        MissingDependency: The config names LAMB, and pytorch_optimizer is not installed.
    """
    betas = (config.beta1, config.beta2)
    if config.name == "adamw":
        # Fused and dense: one pass over memory. Sparse Adam over the hash table is several times
        # slower on CPU, because it sorts indices.
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    try:
        from pytorch_optimizer import Lamb
    except ImportError as error:
        raise MissingDependency("pytorch_optimizer", "lamb", "The optimiser 'lamb'") from error
    optimiser: torch.optim.Optimizer = Lamb(groups, betas=betas)
    return optimiser


def schedule(
    step: int, steps: int, config: OptimiserConfig, progress: float | None = None
) -> float:
    """Return the factor on peak rates: linear warm-up, then a cosine to ``final_fraction``.

    Args:
        step: The step about to be taken, from 0.
        steps: Steps of the whole run.
        config: Warm-up and end.
        progress: Part of the run that is over, in [0, 1], when time and not steps decides; None:
            ``step / steps``.
    """
    warmup = min(config.warmup_steps, steps // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = max((step - warmup) / max(steps - warmup, 1), progress or 0.0)
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (
        1 + math.cos(math.pi * min(done, 1.0))
    )


def set_learning_rates(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's ``lr`` to its peak times ``factor``."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_lr"] * factor
