"""`omni train`: repeating a finished run, data that does not fit, and the next step it names."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner, Result

from encoders.commands.evaluate import command as evaluate
from encoders.commands.train import command
from encoders.errors import ConfigError
from encoders.towers.bundle import load_bundle
from tests.helpers.training_examples import world, write_run

FIRST = """
steps = 2
checkpoint_every = 0
"""
LAST = """
sketch_width = 4096

[validation]
fraction = 0.1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config, its tables and a query tower."""
    monkeypatch.delenv("OMNI_DATA", raising=False)
    write_run(tmp_path, FIRST, LAST)
    return tmp_path


def omni_train(folder: Path, *more: str) -> Result:
    return CliRunner().invoke(
        command, [str(folder / "run.toml"), "--out", str(folder / "out"), *more]
    )


def give_pairs(folder: Path, pairs: pl.DataFrame) -> None:
    pairs.write_parquet(folder / "pairs.parquet")


def add_datasets(folder: Path, names: Sequence[str], more: str = "") -> None:
    tables = "".join(f'[[datasets]]\nname = "{name}"\n{more}\n' for name in names)
    (folder / "run.toml").write_text((folder / "run.toml").read_text() + "\n" + tables)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_train_command_finished_run_repeated_changes_nothing(folder: Path) -> None:
    first = omni_train(folder, "--json")
    assert first.exit_code == 0, first.stderr
    model = folder / "out" / "model"
    (model / "forms" / "query.onnx").write_bytes(b"exported")
    space = json.loads((model / "space.json").read_text())
    (model / "space.json").write_text(
        json.dumps({**space, "compatible": [{"space_id": "an older one"}]})
    )
    before = contents(folder / "out")
    again = omni_train(folder)
    assert again.exit_code == 0, again.stderr
    assert contents(folder / "out") == before
    assert "left as it is" in again.stderr
    assert "nan" not in again.stdout
    assert (
        "pairs/s" in first.stderr
        and "pairs/s" not in again.stderr
        and "2 steps, all of them in earlier runs" in again.stderr
    )
    repeated = omni_train(folder, "--json")
    assert json.loads(repeated.stdout)["metrics"] == json.loads(first.stdout)["metrics"]
    assert (
        json.loads(first.stdout)["pairs_per_second"] > 0
        and json.loads(repeated.stdout)["pairs_per_second"] is None
    )


@pytest.mark.slow
def test_train_command_bundle_of_another_space_is_replaced(folder: Path) -> None:
    assert omni_train(folder).exit_code == 0
    first = load_bundle(folder / "out" / "model").space_id
    shutil.rmtree(folder / "out" / "checkpoints")
    result = omni_train(folder, "--seed", "1")
    assert result.exit_code == 0, result.stderr
    assert load_bundle(folder / "out" / "model").space_id != first
    assert [path.name for path in (folder / "out").iterdir() if path.name.startswith(".")] == []


def test_train_command_damaged_bundle_is_written_again(folder: Path) -> None:
    assert omni_train(folder).exit_code == 0
    space_id = load_bundle(folder / "out" / "model").space_id
    (folder / "out" / "model" / "config.json").unlink()
    assert omni_train(folder).exit_code == 0
    assert load_bundle(folder / "out" / "model").space_id == space_id


def test_train_command_no_train_pairs_names_next_step(folder: Path) -> None:
    give_pairs(folder, world().pairs.with_columns(split=pl.lit("heldout")))
    result = omni_train(folder)
    assert result.exit_code == 1, result.output
    assert "no train pairs" in result.stderr and "all 312 are held out" in result.stderr
    for way in ("--heldout-days", "--gap-days", "--train-end"):
        assert way in result.stderr


def test_train_command_single_query_held_back_is_refused(folder: Path) -> None:
    give_pairs(folder, world().pairs.head(1))
    config = folder / "run.toml"
    config.write_text(config.read_text().replace("fraction = 0.1", "fraction = 0.999999"))
    result = omni_train(folder)
    assert result.exit_code == 1, result.output
    assert "no train pairs" in result.stderr and "validation.fraction" in result.stderr


def test_train_command_no_entity_tower_is_refused_before_training(
    folder: Path,
) -> None:
    add_datasets(folder, ["query"])
    result = omni_train(folder)
    assert result.exit_code == 2, result.output
    assert "no dataset trains an entity tower" in result.stderr and "query: query" in result.stderr
    assert not (folder / "out").exists()


def test_train_command_ids_without_prefix_are_shown_from_both_sides(folder: Path) -> None:
    lost = (
        pl.when(pl.col("entity_type") == "query")
        .then("entity_id")
        .otherwise(pl.col("entity_id").str.replace("^(pin|product)-", ""))
    )
    give_pairs(folder, world().pairs.with_columns(lost.alias("entity_id")))
    result = omni_train(folder)
    assert result.exit_code == 1, result.output
    assert "234 of 234 entity pairs" in result.stderr
    assert "'red-chair'" in result.stderr and "'pin-red-chair'" in result.stderr
    assert not (folder / "out").exists()


def test_train_command_untrained_type_needs_no_catalogue(folder: Path) -> None:
    data = world()
    data.catalogue.filter(pl.col("entity_type") == "product").write_parquet(
        folder / "catalogue.parquet"
    )
    add_datasets(folder, ["product"])
    assert omni_train(folder).exit_code == 0


def test_train_command_untrained_types_are_named(folder: Path) -> None:
    add_datasets(folder, ["pin"])
    result = omni_train(folder)
    assert result.exit_code == 0, result.stderr
    assert (
        "not trained on: " in result.stderr
        and " product, " in result.stderr
        and " query pairs" in result.stderr
    )
    line = next(text for text in result.stderr.splitlines() if "not trained on" in text)
    assert "[[datasets]]" in line


def test_train_command_optional_dataset_without_pairs_is_left_out(folder: Path) -> None:
    add_datasets(folder, ["pin", "ad"], "optional = true")
    result = omni_train(folder)
    assert result.exit_code == 0, result.stderr
    assert "dataset 'ad' has no train pairs" in result.stderr


def test_train_command_required_dataset_without_pairs_is_refused(folder: Path) -> None:
    add_datasets(folder, ["pin", "ad"])
    result = omni_train(folder)
    assert result.exit_code == 1
    assert "dataset 'ad' is empty" in result.stderr and "optional = true" in result.stderr


def test_train_command_no_optional_dataset_with_pairs_is_refused(folder: Path) -> None:
    add_datasets(folder, ["ad", "video"], "optional = true")
    result = omni_train(folder)
    assert result.exit_code == 1, result.output
    assert "no dataset has train pairs" in result.stderr and "pin" in result.stderr


def test_train_command_printed_config_names_every_type_as_optional(folder: Path) -> None:
    import tomllib

    started = tomllib.loads(CliRunner().invoke(command, ["--print-config"]).stdout)["datasets"]
    assert {dataset["name"] for dataset in started} == {"pin", "product", "ad", "query"}
    assert all(dataset["optional"] for dataset in started)


def held_out_world() -> pl.DataFrame:
    every_fifth = pl.int_range(pl.len()) % 5 == 0
    split = pl.when(every_fifth).then(pl.lit("heldout")).otherwise(pl.lit("train"))
    return world().pairs.with_columns(split=split, language=pl.lit("en"), country=pl.lit("US"))


def test_train_command_next_step_evaluates_the_trained_data(folder: Path) -> None:
    (folder / "catalogue_of_last_year.csv").write_text("id")
    give_pairs(folder, held_out_world())
    result = omni_train(folder)
    assert result.exit_code == 0, result.stderr
    assert f"Next: omni evaluate {folder}/out/model --data {folder}\n" in result.stderr
    evaluated = CliRunner().invoke(
        evaluate, [f"{folder}/out/model", "--data", str(folder), "--resamples", "100"]
    )
    assert evaluated.exit_code == 0, evaluated.stderr
    assert f"held-out dev pairs of {folder} (your data)" in evaluated.stdout
    assert "was trained on" not in evaluated.stderr


@pytest.mark.slow
def test_evaluate_command_sample_with_bundle_of_other_data_warns(folder: Path) -> None:
    give_pairs(folder, held_out_world())
    assert omni_train(folder).exit_code == 0
    arguments = [
        f"{folder}/out/model",
        "--entity-type",
        "product",
        "--max-queries",
        "5",
        "--resamples",
        "100",
    ]
    result = CliRunner().invoke(evaluate, arguments)
    assert result.exit_code == 0, result.stderr
    assert f"was trained on {folder}/catalogue.parquet, {folder}/pairs.parquet" in result.stderr
    assert "--data" in result.stderr


def test_evaluate_command_types_without_tower_are_left_out(folder: Path) -> None:
    give_pairs(folder, held_out_world())
    config = folder / "run.toml"
    config.write_text(
        config.read_text().replace("[entity_tower]", 'entity_towers = "separate"\n\n[entity_tower]')
    )
    add_datasets(folder, ["pin"])
    assert omni_train(folder).exit_code == 0
    model = f"{folder}/out/model"
    arguments = [model, "--data", str(folder), "--resamples", "100", "--json"]
    result = CliRunner().invoke(evaluate, [*arguments, "--baselines", "random"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert list(report["tasks"]) == ["pin"] and set(report["tasks"]["pin"]["systems"]) == {
        "model",
        "random",
    }
    assert report["not_evaluated"] == {"product": f"no tower in {model}"}
    assert f"product: no tower in {model}; not evaluated" in result.stderr
    refused = CliRunner().invoke(
        evaluate, [*arguments, "--entity-type", "pin", "--entity-type", "product"]
    )
    assert (
        refused.exit_code == 2
        and f"product: no tower in {model}" in refused.stderr
        and "Recall@10" not in refused.stderr
    )
    data = world()
    data.catalogue.filter(pl.col("entity_type") == "product").write_parquet(
        folder / "catalogue.parquet"
    )
    nothing = CliRunner().invoke(evaluate, arguments)
    assert nothing.exit_code == 2 and f"product: no tower in {model}" in nothing.stderr


def test_train_command_tables_outside_data_folder_name_the_flag(folder: Path) -> None:
    (folder / "catalogue.parquet").rename(folder / "things.parquet")
    (folder / "run.toml").write_text(
        (folder / "run.toml").read_text().replace("catalogue.parquet", "things.parquet")
    )
    result = omni_train(folder)
    assert result.exit_code == 0, result.stderr
    assert "--data FOLDER" in result.stderr and "catalogue.* and pairs.*" in result.stderr


def test_train_command_own_validation_split_is_used(folder: Path) -> None:
    pairs = held_out_world().with_columns(
        split=pl.col("split").str.replace("heldout", "validation")
    )
    pairs.write_csv(folder / "pairs.csv")
    (folder / "run.toml").write_text(
        (folder / "run.toml").read_text().replace("pairs.parquet", "pairs.csv")
    )
    result = omni_train(folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert "validation/recall@10" in json.loads(result.stdout)["metrics"]


def test_train_command_unwritable_out_is_found_before_the_data_is_read(folder: Path) -> None:
    (folder / "file").touch()
    result = CliRunner().invoke(
        command, [str(folder / "run.toml"), "--out", str(folder / "file" / "out")]
    )
    assert result.exit_code == 1
    assert "Not a directory" in result.stderr
    assert "pairs" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_command_stopped_saves_a_checkpoint_and_goes_on(
    folder: Path, number: signal.Signals
) -> None:
    config = folder / "run.toml"
    config.write_text(config.read_text().replace("steps = 2", "steps = 100000\nlog_every = 1"))
    omni = [sys.executable, "-m", "encoders", "train", str(config), "--out", str(folder / "out")]
    process = subprocess.Popen(omni, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 2"):
            process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert "The same command goes on" in lines[-1]
    (checkpoint,) = (folder / "out" / "checkpoints").glob("step-*")
    assert int(checkpoint.name.rpartition("-")[2]) >= 2


def test_train_command_files_follow_the_umask(folder: Path) -> None:
    before = os.umask(0o022)
    try:
        assert omni_train(folder).exit_code == 0
    finally:
        os.umask(before)
    for path in [folder / "out" / "model", *(folder / "out" / "model").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_train_command_records_which_fields_had_values(folder: Path) -> None:
    assert omni_train(folder).exit_code == 0
    filled = json.loads((folder / "out" / "model" / "config.json").read_text())["filled"]
    assert filled["title"] == 1.0
    assert filled["description"] == 0.0


@pytest.mark.parametrize(("rank", "probes"), [("0", 1), ("1", 0)])
def test_train_one_process_of_several_probes_the_output_folder(
    rank: str, probes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each removes the folder that it made, while another may write its probe there."""
    probed: list[Path] = []

    def ends_here(device: str) -> None:
        raise ConfigError("far enough")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("encoders.commands.train._require_writable", probed.append)
    monkeypatch.setattr("encoders.commands.train._process_group", ends_here)
    result = CliRunner().invoke(command, [str(folder / "run.toml"), "--out", str(folder / "out")])
    assert "far enough" in result.stderr
    assert len(probed) == probes
