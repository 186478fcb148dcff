"""How much of what the entity tower learned to add to an entity's text embedding, per entity type, decided on held-back queries.

A tower with a residual gives ``normalise(MLP(x) + text embedding)``. Where an entity type has few pairs the MLP knows its entities by
heart and held-out queries suffer; scaling its output down, towards the embedding it started from, is the interpolation between start and
fine-tuned weights of WiSE-FT (Wortsman et al., CVPR 2022) for the one layer that is linear in the output.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from encoders.entity_tower import EntityEncoder
from encoders.train_progress import Talk
from encoders.train_steps import Towers, TrainInputs
from encoders.training_validation import validation_recall


def choose_residual_scales(towers: Towers, inputs: TrainInputs, talk: Talk) -> tuple[dict[str, float], dict[str, float]]:
    """The scale of ``config.validation.residual_scales`` with the best validation Recall@10, for each entity type with held-back pairs.

    Returns:
        Entity type -> scale (the smaller of two equally good ones), and the validation recalls under these scales. The towers are left
        as they were.
    """
    types = [name for name in inputs.prepared.validation if name != "query"]
    last = [_last_layer(tower) for tower in towers.entities.values() if isinstance(tower, EntityEncoder)]
    learned = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in last]
    scales, best = dict.fromkeys(types, 1.0), dict.fromkeys(types, -1.0)
    for scale in sorted(inputs.config.validation.residual_scales):
        for layer, (weight, bias) in zip(last, learned, strict=True):
            _set(layer, weight * scale, bias * scale)
        recalls = validation_recall(towers, inputs, entity_types=types)
        talk(f"residual scale {scale:g} | " + " | ".join(f"{name} recall@10 {recalls[_key(name)]:.4f}" for name in types))
        for name in types:
            if recalls[_key(name)] > best[name]:
                scales[name], best[name] = scale, recalls[_key(name)]
    for layer, (weight, bias) in zip(last, learned, strict=True):
        _set(layer, weight, bias)
    return scales, {_key(name): best[name] for name in types}


def scaled_towers(encoders: dict[str, EntityEncoder], scales: dict[str, float]) -> dict[str, EntityEncoder]:
    """Towers with the MLP's output scaled; types of one tower and one scale share one object, and scale 1 is the tower itself."""
    made: dict[tuple[int, float], EntityEncoder] = {}
    for name, tower in encoders.items():
        key = id(tower), scales.get(name, 1.0)
        if key not in made:
            made[key] = tower if key[1] == 1.0 else copy.deepcopy(tower)
            if made[key] is not tower:
                layer = _last_layer(made[key])
                _set(layer, layer.weight.detach() * key[1], layer.bias.detach() * key[1])
    return {name: made[id(tower), scales.get(name, 1.0)] for name, tower in encoders.items()}


def _last_layer(tower: EntityEncoder) -> nn.Linear:
    layer = tower.mlp[-1]
    assert isinstance(layer, nn.Linear), "an entity tower ends in a linear layer"
    return layer


def _set(layer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def _key(entity_type: str) -> str:
    return f"validation/recall@10/{entity_type}"
