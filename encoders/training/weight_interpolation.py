"""How much of what the entity tower learned to add to an entity's text embedding, per entity type, decided on held-back queries.

A tower with a residual gives ``normalise(MLP(x) + text embedding)``. Where an entity type has few
pairs the MLP knows its entities by heart and held-out queries suffer; scaling its output down,
towards the embedding it started from, is the interpolation between start and fine-tuned weights of
WiSE-FT (Wortsman et al., CVPR 2022) for the one layer that is linear in the output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from encoders.towers.entity_tower import EntityEncoder
from encoders.training.inputs import Towers, TrainInputs
from encoders.training.progress import Talk
from encoders.training.validation import validation_hits

SMALLEST_SCALE = 1e-3
"""What scale 0 stands for: an entity without title and engaged queries has no text embedding, and a zero vector would be left of it."""


def choose_residual_scales(
    towers: Towers, inputs: TrainInputs, talk: Talk
) -> tuple[dict[str, float], dict[str, float]]:
    """The scale of ``config.validation.residual_weights`` for each entity type with held-back pairs, by ``smallest_within_error``.

    Returns:
        Entity type -> scale, and the validation Recall@10 under these scales. The towers are left
        as they were.
    """
    pairs = {
        name: queries
        for name, (queries, _) in inputs.prepared.validation.items()
        if name != "query"
    }
    hits: dict[str, dict[float, npt.NDArray[np.bool_]]] = {name: {} for name in pairs}
    for scale in sorted(set(inputs.config.validation.residual_weights)):
        with residuals_scaled(towers, scale):
            found = validation_hits(towers, inputs, entity_types=pairs)
        talk(
            f"residual scale {scale:g} | "
            + " | ".join(f"{name} recall@10 {hit.mean():.4f}" for name, hit in found.items())
        )
        for name, hit in found.items():
            hits[name][scale] = hit
    scales = {
        name: smallest_within_error(by_scale, pairs[name])
        for name, by_scale in hits.items()
        if by_scale
    }
    return scales, {
        f"validation/recall@10/{name}": float(hits[name][scale].mean())
        for name, scale in scales.items()
    }


@contextmanager
def residuals_scaled(towers: Towers, scale: float) -> Iterator[None]:
    """Inside the block all entity towers add ``scale`` times what they learned; afterwards they are as they were."""
    last = [
        _last_layer(tower) for tower in towers.entities.values() if isinstance(tower, EntityEncoder)
    ]
    learned = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in last]
    for layer, (weight, bias) in zip(last, learned, strict=True):
        _scale(layer, weight, bias, scale)
    try:
        yield
    finally:
        for layer, (weight, bias) in zip(last, learned, strict=True):
            _scale(layer, weight, bias, 1.0)


def smallest_within_error(
    hits: Mapping[float, npt.NDArray[np.bool_]], queries: npt.NDArray[np.integer]
) -> float:
    """The smallest scale whose recall is less than one standard error below the best one's (Breiman's rule, on paired differences).

    With few held-back pairs that is close to the text embedding, which needs no proof; with many
    the best scale wins.

    Args:
        hits: Scale -> bool ``(P,)``, the same pairs under each.
        queries: ``(P,)``, equal for pairs of one query, which are not independent.
    """
    best = max(sorted(hits), key=lambda scale: hits[scale].mean())
    _, query = np.unique(queries, return_inverse=True)
    for scale in sorted(hits):
        lost = np.bincount(query, weights=hits[best].astype(np.float64) - hits[scale])  # (Q,)
        if lost.sum() <= np.sqrt(
            np.square(lost).sum()
        ):  # the error of the sum if there were no difference
            return scale
    return best


def scaled_towers(
    encoders: dict[str, EntityEncoder], scales: dict[str, float]
) -> dict[str, EntityEncoder]:
    """Towers with the MLP's output scaled; types of one tower and one scale share one object, and scale 1 is the tower itself."""
    made: dict[tuple[int, float], EntityEncoder] = {}
    for name, tower in encoders.items():
        key = id(tower), scales.get(name, 1.0)
        if key not in made:
            made[key] = tower if key[1] == 1.0 else copy.deepcopy(tower)
            if made[key] is not tower:
                layer = _last_layer(made[key])
                _scale(layer, layer.weight.detach(), layer.bias.detach(), key[1])
    return {name: made[id(tower), scales.get(name, 1.0)] for name, tower in encoders.items()}


def _last_layer(tower: EntityEncoder) -> nn.Linear:
    layer = tower.mlp[-1]
    assert isinstance(layer, nn.Linear), "an entity tower ends in a linear layer"
    return layer


def _scale(layer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor, scale: float) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight * max(scale, SMALLEST_SCALE))
        layer.bias.copy_(bias * max(scale, SMALLEST_SCALE))


def learned_parameters(tower: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that training changes, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in tower.named_parameters()
        if parameter.requires_grad
    }


def choose_query_scale(
    towers: Towers,
    inputs: TrainInputs,
    start: Mapping[str, Tensor],
    residual_scales: Mapping[str, float],
    talk: Talk,
) -> tuple[float, dict[str, float]]:
    """The scale of ``config.validation.query_interpolation`` for the query tower, which is left with it.

    Args:
        towers: Trained.
        inputs: What they read, and the held-back pairs.
        start: ``learned_parameters`` of the query tower before the first step.
        residual_scales: What was chosen for each entity type before; others are 1.
        talk: Says each scale's recall.

    Returns:
        The largest of the types' ``smallest_within_error``, and the validation Recall@10 under it.
        1 without held-back pairs of entities.
    """
    pairs = {
        name: queries
        for name, (queries, _) in inputs.prepared.validation.items()
        if name != "query"
    }
    trained = learned_parameters(towers.query)
    hits: dict[str, dict[float, npt.NDArray[np.bool_]]] = {name: {} for name in pairs}
    for scale in sorted(set(inputs.config.validation.query_interpolation)):
        interpolate(towers.query, start, trained, scale)
        for name in pairs:
            with residuals_scaled(towers, residual_scales.get(name, 1.0)):
                found = validation_hits(towers, inputs, entity_types=[name])
            if name in found:
                hits[name][scale] = found[name]
        shown = " | ".join(
            f"{name} recall@10 {by_scale[scale].mean():.4f}"
            for name, by_scale in hits.items()
            if by_scale
        )
        talk(f"query scale {scale:g} | {shown}")
    measured = {name: by_scale for name, by_scale in hits.items() if by_scale}
    chosen = max(
        (smallest_within_error(by_scale, pairs[name]) for name, by_scale in measured.items()),
        default=1.0,
    )
    interpolate(towers.query, start, trained, chosen)
    return chosen, {
        f"validation/recall@10/{name}": float(by_scale[chosen].mean())
        for name, by_scale in measured.items()
    }


def interpolate(
    tower: nn.Module, start: Mapping[str, Tensor], trained: Mapping[str, Tensor], scale: float
) -> None:
    """Set the parameters to ``start + scale * (trained - start)``; exactly the trained ones at 1 and the start at 0."""
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name in trained:
                parameter.copy_(torch.lerp(start[name].to(parameter.device), trained[name], scale))
