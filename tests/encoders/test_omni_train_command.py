"""`omni train` as people run it: repeating a finished run, data that does not fit, and what to do next."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner, Result
from training_examples import DIMENSION, tiny_query_encoder, world

from encoders.bundle import load_bundle
from encoders.evaluate_command import command as evaluate
from encoders.train_command import command

CONFIG = f"""
steps = 2
device = "cpu"
checkpoint_every = 0

[data]
catalogue = ["catalogue.parquet"]
pairs = ["pairs.parquet"]

[model]
query_encoder = "QUERY"
dimension = {DIMENSION}

[entity_tower]
table_rows = 500
token_dimension = 16
hidden = [32]

[batch]
pairs = 32

[loss]
random_negatives = 1.0
random_query_negatives = 1.0
sketch_width = 4096

[validation]
fraction = 0.1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config, its tables and a query tower."""
    monkeypatch.delenv("OMNI_DATA", raising=False)
    data = world()
    data.catalogue.write_parquet(tmp_path / "catalogue.parquet")
    data.pairs.write_parquet(tmp_path / "pairs.parquet")
    tiny_query_encoder().save(tmp_path / "query")
    (tmp_path / "run.toml").write_text(CONFIG.replace("QUERY", str(tmp_path / "query")))
    return tmp_path


def omni_train(folder: Path, *more: str) -> Result:
    return CliRunner().invoke(command, [str(folder / "run.toml"), "--out", str(folder / "out"), *more])


def give_pairs(folder: Path, pairs: pl.DataFrame) -> None:
    pairs.write_parquet(folder / "pairs.parquet")


def add_datasets(folder: Path, names: Sequence[str], more: str = "") -> None:
    tables = "".join(f'[[datasets]]\nname = "{name}"\n{more}\n' for name in names)
    (folder / "run.toml").write_text((folder / "run.toml").read_text() + "\n" + tables)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_repeating_a_finished_run_changes_nothing(folder: Path) -> None:
    first = omni_train(folder, "--json")
    assert first.exit_code == 0, first.stderr
    model = folder / "out" / "model"
    (model / "forms" / "query.onnx").write_bytes(b"exported")
    space = json.loads((model / "space.json").read_text())
    (model / "space.json").write_text(json.dumps({**space, "compatible": [{"space_id": "an older one"}]}))
    before = contents(folder / "out")
    again = omni_train(folder)
    assert again.exit_code == 0, again.stderr
    assert contents(folder / "out") == before
    assert "kept" in again.stderr
    assert "nan" not in again.stdout
    told = omni_train(folder, "--json")
    assert json.loads(told.stdout)["metrics"] == json.loads(first.stdout)["metrics"]


def test_a_bundle_of_another_space_is_replaced(folder: Path) -> None:
    assert omni_train(folder).exit_code == 0
    first = load_bundle(folder / "out" / "model").space_id
    shutil.rmtree(folder / "out" / "checkpoints")
    result = omni_train(folder, "--seed", "1")
    assert result.exit_code == 0, result.stderr
    assert load_bundle(folder / "out" / "model").space_id != first
    assert [path.name for path in (folder / "out").iterdir() if path.name.startswith(".")] == []


def test_a_damaged_bundle_is_written_again(folder: Path) -> None:
    assert omni_train(folder).exit_code == 0
    space_id = load_bundle(folder / "out" / "model").space_id
    (folder / "out" / "model" / "config.json").unlink()
    assert omni_train(folder).exit_code == 0
    assert load_bundle(folder / "out" / "model").space_id == space_id
