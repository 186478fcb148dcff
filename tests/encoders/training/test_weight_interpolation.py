"""After training, held-back queries choose how far towers go back towards their start."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from encoders.errors import ConfigError
from encoders.towers.text_embedding import text_embedding
from encoders.training.loop import TrainResult, TrainStart, train
from encoders.training.weight_interpolation import (
    SMALLEST_RESIDUAL,
    interpolate,
    learned_parameters,
    smallest_within_error,
    with_residual_weights,
)
from tests.helpers.training_examples import small_config, tiny_query_encoder, world

WEIGHTS = [1.0, 0.0, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    tiny_query_encoder(1, 256).save(path / "frozen")
    return path


def run(folder: Path, residual: list[float], query: list[float] | None = None) -> TrainResult:
    """The same run each time: trained once, then only its end is done again with other weights."""
    config = small_config(
        steps=25,
        model={"dimension": 256},
        features={"text_embedding": str(folder / "frozen")},
        validation={
            "fraction": 0.25,
            "residual_weights": residual,
            "query_interpolation": query or [],
        },
    )
    start = TrainStart(tiny_query_encoder(0, 256))
    return train(config, world(), start=start, output=folder / "run", quiet=True)


@pytest.mark.slow
def test_residual_weights_chosen_per_type_leave_what_was_trained(folder: Path) -> None:
    chosen, trained = run(folder, WEIGHTS), run(folder, [])
    assert "residual_weight/pin" not in trained.metrics
    alone = {weight: run(folder, [weight]).metrics for weight in WEIGHTS}
    for name in ("pin", "product"):
        key, weight = f"validation/recall@10/{name}", chosen.metrics[f"residual_weight/{name}"]
        assert chosen.metrics[key] == alone[weight][key]
        tower, as_trained = chosen.entity_encoders[name], trained.entity_encoders[name]
        expected = as_trained.mlp[-1].weight * max(weight, SMALLEST_RESIDUAL)
        assert torch.equal(tower.mlp[-1].weight, expected)
        assert torch.equal(tower.table, as_trained.table)
        assert alone[1.0][key] == trained.metrics[key]


@pytest.mark.slow
def test_residual_weight_zero_is_text_embedding(folder: Path) -> None:
    rows = world().catalogue.head(5)
    vectors = run(folder, [0.0]).entity_encoders["pin"].encode(rows)
    np.testing.assert_allclose(vectors, text_embedding(str(folder / "frozen"))(rows), atol=2e-3)


def test_residual_weight_zero_entity_without_texts_has_unit_vector(folder: Path) -> None:
    no_queries = pl.lit([], dtype=pl.List(pl.String))
    rows = world().catalogue.head(2).with_columns(title=pl.lit(""), engaged_queries=no_queries)
    vectors = run(folder, [0.0]).entity_encoders["pin"].encode(rows)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_with_residual_weights_same_tower_and_weight_share_one_object(folder: Path) -> None:
    towers = run(folder, []).entity_encoders
    towers["ad"] = towers["pin"]
    weighted = with_residual_weights(towers, {"pin": 0.5, "product": 0.5})
    assert weighted["pin"] is weighted["product"] is not towers["pin"]
    assert weighted["ad"] is towers["pin"]


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_query_interpolation_tower_lies_between_start_and_trained(
    folder: Path, weight: float
) -> None:
    start = tiny_query_encoder(0, 256).state_dict()
    trained = run(folder, []).query_encoder.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in trained.items())
    result = run(folder, [], [weight])
    assert result.metrics["query_interpolation"] == weight
    for name, value in result.query_encoder.state_dict().items():
        expected = value
        if value.is_floating_point():
            expected = torch.lerp(start[name], trained[name], weight)
        assert torch.equal(value, expected) if weight == 1.0 else torch.allclose(value, expected)


def test_query_interpolation_reports_recall_under_chosen_weight(folder: Path) -> None:
    """Residual weights are chosen before, with the trained query tower, and stay."""
    chosen = run(folder, [0.25, 1.0], WEIGHTS)
    alone = {weight: run(folder, [0.25, 1.0], [weight]).metrics for weight in WEIGHTS}
    picked = chosen.metrics["query_interpolation"]
    assert picked in WEIGHTS
    for name in ("pin", "product"):
        for key in (f"validation/recall@10/{name}", f"residual_weight/{name}"):
            assert chosen.metrics[key] == alone[picked][key]


def test_query_interpolation_entity_towers_stay_as_trained(folder: Path) -> None:
    trained = run(folder, []).entity_encoders["pin"].state_dict()
    chosen = run(folder, [], [0.5]).entity_encoders["pin"].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in chosen.items())


def test_interpolate_frozen_parameters_are_neither_copied_nor_moved() -> None:
    tower = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    tower[0].requires_grad_(False)
    start = learned_parameters(tower)
    assert set(start) == {"1.weight", "1.bias"}
    before = tower[0].weight.clone()
    interpolate(tower, start, {name: value + 2 for name, value in start.items()}, 0.25)
    assert torch.equal(tower[0].weight, before)
    torch.testing.assert_close(tower[1].weight, start["1.weight"] + 0.5)


def test_smallest_within_error_takes_smallest_weight_not_clearly_worse() -> None:
    none, some, most = (np.arange(1000) < count for count in (400, 596, 600))
    queries = np.arange(1000)
    assert smallest_within_error({0.0: none, 0.5: most, 1.0: some}, queries) == 0.5
    # Four pairs more and none less are beyond the error of two ...
    assert smallest_within_error({0.0: none, 0.5: some, 1.0: most}, queries) == 1.0
    # ... but not when all four are of one query.
    one_query = np.where((queries >= 596) & (queries < 600), 0, queries)
    assert smallest_within_error({0.0: none, 0.5: some, 1.0: most}, one_query) == 0.5
    assert smallest_within_error({0.0: most, 0.5: most}, queries) == 0.0


@pytest.mark.parametrize(
    ("validation", "features"),
    [
        ({"residual_weights": [1.5]}, {"text_embedding": "tiny-multilingual"}),
        ({"residual_weights": [0.5]}, {}),
        ({"query_interpolation": [1.5]}, {}),
        ({"query_interpolation": [-0.1]}, {}),
        ({"query_interpolation": [float("nan")]}, {}),
    ],
)
def test_validation_config_impossible_weights_are_refused(validation: dict, features: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(validation))):
        small_config(validation=validation, features=features)
