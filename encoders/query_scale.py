"""How much of what the query tower learned is kept, decided on held-back queries after training.

The tower goes part of the way back to the weights it started from: ``start + scale * (trained - start)``, the interpolation of WiSE-FT
(Wortsman et al., CVPR 2022). Training on the types with many pairs moves words that the types with few pairs need; on the way back those
gain before the others lose. One tower serves all types, so one scale does: the smallest that no type's recall notices.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from encoders.residual_scale import residuals_scaled, smallest_within_error
from encoders.train_progress import Talk
from encoders.train_steps import Towers, TrainInputs
from encoders.training_validation import validation_hits


def learned_parameters(tower: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that training changes, by name."""
    return {name: parameter.detach().clone() for name, parameter in tower.named_parameters() if parameter.requires_grad}


def choose_query_scale(
    towers: Towers, inputs: TrainInputs, start: Mapping[str, Tensor], residual_scales: Mapping[str, float], talk: Talk
) -> tuple[float, dict[str, float]]:
    """The scale of ``config.validation.query_scales`` for the query tower, which is left with it.

    Args:
        towers: Trained.
        inputs: What they read, and the held-back pairs.
        start: ``learned_parameters`` of the query tower before the first step.
        residual_scales: What was chosen for each entity type before; others are 1.
        talk: Says each scale's recall.

    Returns:
        The largest of the types' ``smallest_within_error``, and the validation Recall@10 under it. 1 without held-back pairs of entities.
    """
    pairs = {name: queries for name, (queries, _) in inputs.prepared.validation.items() if name != "query"}
    trained = learned_parameters(towers.query)
    hits: dict[str, dict[float, npt.NDArray[np.bool_]]] = {name: {} for name in pairs}
    for scale in sorted(set(inputs.config.validation.query_scales)):
        interpolate(towers.query, start, trained, scale)
        for name in pairs:
            with residuals_scaled(towers, residual_scales.get(name, 1.0)):
                found = validation_hits(towers, inputs, entity_types=[name])
            if name in found:
                hits[name][scale] = found[name]
        shown = " | ".join(f"{name} recall@10 {by_scale[scale].mean():.4f}" for name, by_scale in hits.items() if by_scale)
        talk(f"query scale {scale:g} | {shown}")
    measured = {name: by_scale for name, by_scale in hits.items() if by_scale}
    chosen = max((smallest_within_error(by_scale, pairs[name]) for name, by_scale in measured.items()), default=1.0)
    interpolate(towers.query, start, trained, chosen)
    return chosen, {f"validation/recall@10/{name}": float(by_scale[chosen].mean()) for name, by_scale in measured.items()}


def interpolate(tower: nn.Module, start: Mapping[str, Tensor], trained: Mapping[str, Tensor], scale: float) -> None:
    """Set the parameters to ``start + scale * (trained - start)``; exactly the trained ones at 1 and the start at 0."""
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name in trained:
                parameter.copy_(torch.lerp(start[name].to(parameter.device), trained[name], scale))
