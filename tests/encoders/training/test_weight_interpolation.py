"""What a tower adds to its text embedding is scaled per entity type by what held-back queries say,
after training.
"""

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
    smallest_within_error,
    with_residual_weights,
)
from tests.helpers.training_examples import small_config, tiny_query_encoder, world

SCALES = [1.0, 0.0, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scales")
    tiny_query_encoder(1, 256).save(path / "frozen")
    return path


def run(folder: Path, scales: list[float]) -> TrainResult:
    """The same run each time: trained once, then only its end is done again with other scales."""
    features = {"text_embedding": str(folder / "frozen")}
    validation = {"fraction": 0.25, "residual_weights": scales}
    config = small_config(
        steps=25, model={"dimension": 256}, features=features, validation=validation
    )
    start = TrainStart(tiny_query_encoder(0, 256))
    return train(config, world(), start=start, output=folder / "run", quiet=True)


def test_each_type_gets_a_scale_and_what_was_trained_stays(folder: Path) -> None:
    chosen, trained = run(folder, SCALES), run(folder, [])
    assert "residual_weight/pin" not in trained.metrics
    alone = {scale: run(folder, [scale]).metrics for scale in SCALES}
    for name in ("pin", "product"):
        key, scale = f"validation/recall@10/{name}", chosen.metrics[f"residual_weight/{name}"]
        assert chosen.metrics[key] == alone[scale][key]
        assert torch.equal(
            chosen.entity_encoders[name].mlp[-1].weight,
            trained.entity_encoders[name].mlp[-1].weight * max(scale, SMALLEST_RESIDUAL),
        )
        assert torch.equal(chosen.entity_encoders[name].table, trained.entity_encoders[name].table)
        assert alone[1.0][key] == trained.metrics[key]


def test_the_smallest_scale_that_is_not_clearly_worse_is_taken() -> None:
    none, some, most = (np.arange(1000) < count for count in (400, 596, 600))
    queries = np.arange(1000)
    assert smallest_within_error({0.0: none, 0.5: most, 1.0: some}, queries) == 0.5
    assert (
        smallest_within_error({0.0: none, 0.5: some, 1.0: most}, queries) == 1.0
    )  # four pairs more, none less: beyond the error of two
    one_query = np.where((queries >= 596) & (queries < 600), 0, queries)
    assert (
        smallest_within_error({0.0: none, 0.5: some, 1.0: most}, one_query) == 0.5
    )  # all four of one query
    assert smallest_within_error({0.0: most, 0.5: most}, queries) == 0.0


def test_scale_zero_is_the_text_embedding(folder: Path) -> None:
    rows = world().catalogue.head(5)
    vectors = run(folder, [0.0]).entity_encoders["pin"].encode(rows)
    np.testing.assert_allclose(vectors, text_embedding(str(folder / "frozen"))(rows), atol=2e-3)


def test_at_scale_zero_an_entity_without_title_and_queries_still_has_a_unit_vector(
    folder: Path,
) -> None:
    rows = (
        world()
        .catalogue.head(2)
        .with_columns(title=pl.lit(""), engaged_queries=pl.lit([], dtype=pl.List(pl.String)))
    )
    vectors = run(folder, [0.0]).entity_encoders["pin"].encode(rows)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_types_with_one_tower_and_one_scale_share_it(folder: Path) -> None:
    towers = run(folder, []).entity_encoders
    towers["ad"] = towers["pin"]
    scaled = with_residual_weights(towers, {"pin": 0.5, "product": 0.5})
    assert scaled["pin"] is scaled["product"] is not towers["pin"]
    assert scaled["ad"] is towers["pin"]


@pytest.mark.parametrize(
    ("validation", "features"),
    [
        ({"residual_weights": [1.5]}, {"text_embedding": "tiny-multilingual"}),
        ({"residual_weights": [0.5]}, {}),
    ],
)
def test_scales_that_mean_nothing_are_refused(validation: dict, features: dict) -> None:
    with pytest.raises(ConfigError, match="residual_weights"):
        small_config(validation=validation, features=features)
