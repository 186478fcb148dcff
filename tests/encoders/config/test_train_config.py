from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.config.train_config import (
    DatasetConfig,
    TrainConfig,
    load_train_config,
    to_table,
    train_config,
)
from encoders.errors import ConfigError

RECIPES = Path(__file__).parents[3] / "encoders" / "recipes"


def test_load_train_config_all_mistakes_are_reported_with_nearest_names(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'stepz = 5\nprecision = "bf61"\n[optimiser]\nlearning_rte = 1\nwarmup_steps ='
        ' "many"\n[loss]\ntemperature = -1.0\n[[datasets]]\nname = "pin"\ncandidates = ["entty"]\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_train_config(path)
    message = str(caught.value)
    for part in (
        "6 mistakes",
        "precision must be 'fp32' or 'bf16', but got 'bf61' (did you mean 'bf16'?)",
        "'stepz' (did you mean 'steps'?)",
        "'optimiser.learning_rte' (did you mean 'learning_rate'?)",
        "'optimiser.warmup_steps' must be int, but got str 'many'",
        "loss.temperature must be above 0, but got -1.0",
        "'entty' (did you mean 'entity'?)",
    ):
        assert part in message, part
    assert "run.toml" in message


def test_train_config_known_keys_bad_values_are_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        train_config({"precision": "bf61", "log_every": 0})
    assert "'bf61' (did you mean 'bf16'?)" in str(caught.value)
    assert "log_every must be at least 1, but got 0" in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"steps": 10, "epochs": 2.0}, "give steps or epochs, not both"),
        ({"epochs": -1.0}, "epochs must not be negative, but got -1.0"),
        ({"batch": {"pairs": 0}}, "batch.pairs must be at least 1, but got 0"),
        ({"batch": {"cross_fit": 1}}, "at least 2 folds, but got 1"),
        ({"optimiser": {"name": "lmab"}}, "'lmab' (did you mean 'lamb'?)"),
        ({"validation": {"patience": 2}}, "patience needs every_steps"),
        ({"loss": {"sketch_width": 1000}}, "power of two, but got 1000"),
        ({"datasets": [{"name": "pin"}, {"name": "pin"}]}, "dataset names must differ"),
        (
            {"datasets": [{"name": "query", "candidates": ["entity"]}]},
            "related queries need 'query'",
        ),
        ({"datasets": [{"share": 1}]}, "missing key 'datasets[0].name'"),
        ({"loss": {"matryoshka": {"wide": 1.0}}}, "key 'wide' of 'loss.matryoshka' must be int"),
        ({"model": 3}, "'model' must be a table"),
        ({"steps": True}, "'steps' must be int, but got bool True"),
        ({"features": {"text_fields": []}}, "text_fields is empty"),
    ],
)
def test_train_config_impossible_value_is_named(table: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train_config(table)
    assert message in str(caught.value)


def test_train_config_epochs_without_steps_decide() -> None:
    assert (train_config({"epochs": 2.0}).steps, train_config({}).steps) == (0, 1000)


def test_train_config_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert config.loss.random_negatives == 4.0
    assert config.loss.temperature == 0.07
    assert config.loss.matryoshka == {16: 0.05, 32: 0.05, 64: 0.05, 128: 0.05}
    assert config.entity_tower.table_rows == 100_000
    shares = [
        DatasetConfig(name=n, entity_type=t).share
        for n, t in (("pin", ""), ("product", ""), ("query", ""), ("product-offsite", "product"))
    ]
    assert shares == [8, 4, 2, 2]
    assert DatasetConfig(name="query").candidates == ("query",)
    assert DatasetConfig(name="pin").candidates == ("entity",)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 10**6),
    st.sampled_from(["fp32", "bf16"]),
    st.dictionaries(st.integers(1, 512), st.floats(0, 1), max_size=4),
    st.lists(st.sampled_from(["pin", "product", "ad", "query"]), unique=True),
)
def test_train_config_to_table_and_back_is_equal(
    steps: int, precision: str, matryoshka: dict[int, float], names: list[str]
) -> None:
    config = train_config(
        {
            "steps": steps,
            "precision": precision,
            "loss": {"matryoshka": matryoshka},
            "datasets": [{"name": n} for n in names],
        }
    )
    assert train_config(to_table(config)) == config


def test_train_config_former_names_are_read_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    former = {
        "features": {
            "text_embedding": "tiny-multilingual",
            "whole_text_weight": 2.0,
            "whole_text_queries": 20,
        },
        "validation": {"residual_scales": [0, 1], "query_scales": [0.5]},
    }
    config = train_config(former)
    assert config.features.full_text_weight == 2.0
    assert config.features.full_text_queries == 20
    assert config.validation.residual_weights == (0.0, 1.0)
    assert config.validation.query_interpolation == (0.5,)
    assert "validation.query_scales is now called validation.query_interpolation" in caplog.text


def test_train_config_former_and_present_name_together_are_refused() -> None:
    both = {"validation": {"query_scales": [0.5], "query_interpolation": [1.0]}}
    with pytest.raises(ConfigError, match="are one setting"):
        train_config(both)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.name)
def test_recipe_shipped_is_valid(recipe: Path) -> None:
    assert load_train_config(recipe).model.dimension == 256


def test_load_train_config_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: expected a TOML file"):
        load_train_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"broken.toml: not valid TOML.*line 1"):
        load_train_config(tmp_path / "broken.toml")


def test_load_train_config_data_paths_are_relative_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[data]\ncatalogue = ["c.parquet"]\npairs = ["p.parquet"]\n')
    assert load_train_config(tmp_path / "run.toml").data.catalogue == (tmp_path / "c.parquet",)


def test_train_command_printed_config_is_valid(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from encoders.commands.train import command

    printed = CliRunner().invoke(command, ["--print-config"])
    (tmp_path / "run.toml").write_text(printed.output)
    assert [d.name for d in load_train_config(tmp_path / "run.toml").datasets] == [
        "pin",
        "product",
        "ad",
        "query",
    ]
