"""The query tower goes back part of the way to where it started, as far as held-back queries allow,
after training.
"""

from pathlib import Path

import pytest
import torch

from encoders.errors import ConfigError
from encoders.training.loop import TrainResult, TrainStart, train
from encoders.training.weight_interpolation import interpolate, learned_parameters
from tests.helpers.training_examples import small_config, tiny_query_encoder, world


def run(
    folder: Path, query_interpolation: list[float], residual_weights: tuple[float, ...] = ()
) -> TrainResult:
    """The same run each time: trained once, then only its end is done again."""
    if not (folder / "frozen").exists():
        tiny_query_encoder(1, 256).save(folder / "frozen")
    validation = {
        "fraction": 0.25,
        "query_interpolation": query_interpolation,
        "residual_weights": list(residual_weights),
    }
    config = small_config(
        steps=25,
        model={"dimension": 256},
        features={"text_embedding": str(folder / "frozen")},
        validation=validation,
    )
    start = TrainStart(tiny_query_encoder(0, 256))
    return train(config, world(), start=start, output=folder / "run", quiet=True)


def test_the_tower_lies_between_its_start_and_what_was_trained(tmp_path: Path) -> None:
    start, trained = (
        tiny_query_encoder(0, 256).state_dict(),
        run(tmp_path, []).query_encoder.state_dict(),
    )
    for scale in (0.0, 0.25, 1.0):
        result = run(tmp_path, [scale])
        assert result.metrics["query_interpolation"] == scale
        for name, value in result.query_encoder.state_dict().items():
            torch.testing.assert_close(
                value,
                (
                    torch.lerp(start[name], trained[name], scale)
                    if value.is_floating_point()
                    else value
                ),
            )
    assert all(
        torch.equal(value, trained[name])
        for name, value in run(tmp_path, [1.0]).query_encoder.state_dict().items()
    )
    assert any(not torch.equal(value, start[name]) for name, value in trained.items())


def test_the_scale_that_is_taken_is_the_one_whose_recall_is_told(tmp_path: Path) -> None:
    scales = [0.5, 0.0, 1.0]
    chosen = run(tmp_path, scales, (0.25, 1.0))
    alone = {scale: run(tmp_path, [scale], (0.25, 1.0)).metrics for scale in scales}
    picked = chosen.metrics["query_interpolation"]
    assert picked in scales
    for name in ("pin", "product"):
        key = f"validation/recall@10/{name}"
        assert chosen.metrics[key] == alone[picked][key]
        assert (
            chosen.metrics[f"residual_weight/{name}"] == alone[picked][f"residual_weight/{name}"]
        ), "chosen before, with the trained tower"


def test_entity_towers_stay_as_they_were_trained(tmp_path: Path) -> None:
    trained, chosen = (
        run(tmp_path, []).entity_encoders["pin"],
        run(tmp_path, [0.5]).entity_encoders["pin"],
    )
    assert all(
        torch.equal(value, trained.state_dict()[name])
        for name, value in chosen.state_dict().items()
    )


def test_frozen_parameters_are_neither_copied_nor_moved() -> None:
    tower = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    tower[0].requires_grad_(False)
    start = learned_parameters(tower)
    assert set(start) == {"1.weight", "1.bias"}
    before = tower[0].weight.clone()
    interpolate(tower, start, {name: value + 2 for name, value in start.items()}, 0.25)
    assert torch.equal(tower[0].weight, before)
    torch.testing.assert_close(tower[1].weight, start["1.weight"] + 0.5)


@pytest.mark.parametrize("scales", [[1.5], [-0.1], [float("nan")]])
def test_scales_outside_the_way_are_refused(scales: list[float]) -> None:
    with pytest.raises(ConfigError, match="query_interpolation"):
        small_config(validation={"query_interpolation": scales})
