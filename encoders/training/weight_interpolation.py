"""Interpolate trained weights with those they started from (WiSE-FT), by held-back recall.

Towers that are fine-tuned on few pairs overfit: they learn what the pairs say and lose what they
knew. WiSE-FT (Wortsman et al., CVPR 2022) takes ``start + w * (trained - start)``, with ``w``
chosen on held-back data after training. Here two things are interpolated:

- **Residual weight**, one per entity type: an entity tower with a residual gives
  ``normalise(MLP(x) + text embedding)`` and starts at the text embedding alone. Its last layer is
  linear in the output, so ``w`` scales that layer.
- **Query interpolation**, one for all types: all trained parameters of the query tower.

Both take the smallest weight whose recall is within one standard error of the best one's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from encoders.towers.entity_tower import EntityEncoder
from encoders.training.inputs import Towers, TrainInputs
from encoders.training.validation import validation_hits

SMALLEST_RESIDUAL = 1e-3
"""What residual weight 0 stands for: an entity without title and engaged queries has no text
embedding, and at 0 its vector would be zero.
"""

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ChosenWeights:
    """What held-back pairs chose."""

    residual: dict[str, float] = field(default_factory=dict)
    """By entity type; types that are not named have weight 1."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The weights, and the validation Recall@10 by entity type under them."""


def choose_weights(
    towers: Towers,
    inputs: TrainInputs,
    initial: Mapping[str, Tensor],
    say: Callable[[str], None],
) -> ChosenWeights:
    """Choose what ``config.validation`` asks for: residual weights, then the query interpolation.

    The query tower is left interpolated, the entity towers as they were trained.

    Args:
        towers: Trained.
        inputs: What they read, and the held-back pairs.
        initial: ``learned_parameters`` of the query tower before the first step.
        say: Takes a line for each weight that is tried.
    """
    settings, held_back = inputs.config.validation, inputs.prepared.validation
    queries = {name: pairs.queries for name, pairs in held_back.items() if name != "query"}
    residual: dict[str, float] = {}
    metrics: dict[str, float] = {}
    if held_back and settings.residual_weights:
        hits = _try(
            "residual weight",
            settings.residual_weights,
            lambda weight: _hits(towers, inputs, dict.fromkeys(queries, weight)),
            say,
        )
        residual = {name: smallest_within_error(hits[name], queries[name]) for name in hits}
        metrics |= _recalls(hits, residual)
        metrics |= {f"residual_weight/{name}": weight for name, weight in residual.items()}
    if held_back and settings.query_interpolation:
        trained = learned_parameters(towers.query)

        def hits_at(weight: float) -> dict[str, Bools]:
            interpolate(towers.query, initial, trained, weight)
            return _hits(towers, inputs, {name: residual.get(name, 1.0) for name in queries})

        hits = _try("query interpolation", settings.query_interpolation, hits_at, say)
        # One weight serves all types: the largest that one of them needs.
        needed = [smallest_within_error(hits[name], queries[name]) for name in hits]
        chosen = max(needed, default=1.0)
        interpolate(towers.query, initial, trained, chosen)
        metrics |= _recalls(hits, dict.fromkeys(hits, chosen))
        metrics["query_interpolation"] = chosen
    return ChosenWeights(residual, metrics)


def _try(
    what: str,
    weights: Iterable[float],
    hits_at: Callable[[float], Mapping[str, Bools]],
    say: Callable[[str], None],
) -> dict[str, dict[float, Bools]]:
    """Find the hits of held-back pairs under each weight: entity type -> weight -> hits."""
    hits: dict[str, dict[float, Bools]] = {}
    for weight in sorted(set(weights)):
        found = hits_at(weight)
        for name, of_type in found.items():
            hits.setdefault(name, {})[weight] = of_type
        recalls = (f"{name} recall@10 {of_type.mean():.4f}" for name, of_type in found.items())
        say(f"{what} {weight:g} | {' | '.join(recalls)}")
    return hits


def _recalls(
    hits: Mapping[str, Mapping[float, Bools]], weights: Mapping[str, float]
) -> dict[str, float]:
    return {
        f"validation/recall@10/{name}": float(hits[name][weight].mean())
        for name, weight in weights.items()
    }


def _hits(
    towers: Towers, inputs: TrainInputs, residual_weights: Mapping[str, float]
) -> dict[str, Bools]:
    """Find the hits of entity types, each with its residual weight."""
    hits: dict[str, Bools] = {}
    for name, weight in residual_weights.items():
        with residuals_weighted(towers, weight):
            hits |= validation_hits(towers, inputs, entity_types=[name])
    return hits


def smallest_within_error(hits: Mapping[float, Bools], queries: npt.NDArray[np.integer]) -> float:
    """Return the smallest weight whose recall is less than a standard error below the best one's.

    That is Breiman's rule, on paired differences. With few held-back pairs it stays close to the
    start, which needs no proof; with many the best weight wins.

    Args:
        hits: Weight -> bool ``(P,)``, the same pairs under each.
        queries: ``(P,)``, equal for pairs of one query, which are not independent.
    """
    best = max(sorted(hits), key=lambda weight: hits[weight].mean())
    _, query = np.unique(queries, return_inverse=True)
    for weight in sorted(hits):
        lost = np.bincount(query, weights=hits[best].astype(np.float64) - hits[weight])  # (Q,)
        error = np.sqrt(np.square(lost).sum())  # of the sum, if there were no difference
        if lost.sum() <= error:
            return weight
    return best


# ------------------------------------------------------------------------------------- query tower
def learned_parameters(tower: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters that training changes, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in tower.named_parameters()
        if parameter.requires_grad
    }


def interpolate(
    tower: nn.Module, start: Mapping[str, Tensor], trained: Mapping[str, Tensor], weight: float
) -> None:
    """Set parameters to ``start + weight * (trained - start)``, exactly so at 0 and 1."""
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name in trained:
                initial = start[name].to(parameter.device)
                parameter.copy_(torch.lerp(initial, trained[name], weight))


# ----------------------------------------------------------------------------------- entity towers
@contextmanager
def residuals_weighted(towers: Towers, weight: float) -> Iterator[None]:
    """Weight what all entity towers add to the text embedding, inside the block only."""
    last = [
        _last_layer(tower) for tower in towers.entities.values() if isinstance(tower, EntityEncoder)
    ]
    trained = [copy.deepcopy(layer) for layer in last]
    for layer in last:
        _weigh(layer, weight)
    try:
        yield
    finally:
        for layer, kept in zip(last, trained, strict=True):
            layer.load_state_dict(kept.state_dict())


def with_residual_weights(
    encoders: Mapping[str, EntityEncoder], weights: Mapping[str, float]
) -> dict[str, EntityEncoder]:
    """Return towers with the MLP's output weighted, by entity type; weight 1 is the tower itself.

    Types of one tower and one weight share one object.
    """
    made: dict[tuple[int, float], EntityEncoder] = {}
    weighted: dict[str, EntityEncoder] = {}
    for name, tower in encoders.items():
        weight = weights.get(name, 1.0)
        key = id(tower), weight
        if key not in made:
            made[key] = tower if weight == 1.0 else copy.deepcopy(tower)
            if weight != 1.0:
                _weigh(_last_layer(made[key]), weight)
        weighted[name] = made[key]
    return weighted


def _last_layer(tower: EntityEncoder) -> nn.Linear:
    layer = tower.mlp[-1]
    assert isinstance(layer, nn.Linear), "an entity tower ends in a linear layer"
    return layer


def _weigh(layer: nn.Linear, weight: float) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(max(weight, SMALLEST_RESIDUAL))
