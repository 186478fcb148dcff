"""The texts that an export is calibrated on: the bundle's own where they are there, and it is said
which.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from encoders.commands import export as export_command
from encoders.errors import ConfigError

PAIRED = "query,entity_type,entity_id,split\n"


def put(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Texts of every export; no form is made."""
    calls: list[Any] = []

    def export_forms(tower: object, folder: Path, texts: list[str], forms: object) -> list[object]:
        calls.append(texts)
        raise ConfigError("far enough")

    monkeypatch.setattr(export_command, "export_forms", export_forms)
    return calls


def export(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[Path], *arguments: object
) -> Result:
    training = {"data": {"pairs": [str(path) for path in pairs]}}
    bundle = SimpleNamespace(config={"training": training}, query_encoder=None)
    monkeypatch.setattr(export_command, "load_bundle", lambda path: bundle)
    return CliRunner().invoke(
        export_command.command, [str(folder), *map(str, arguments)], env={"OMNI_DATA": ""}
    )


def test_export_command_reads_train_queries_of_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[Any]
) -> None:
    rows = [f"mine {i},pin,a,train\n" for i in range(150)] + ["kept back,pin,a,heldout\n"]
    pairs = put(tmp_path, "pairs.csv", PAIRED + "".join(rows))
    result = export(tmp_path, monkeypatch, [pairs])
    assert exported == [[f"mine {i}" for i in range(150)]], result.stderr
    assert str(pairs) in result.stderr and "sample" not in result.stderr


@pytest.mark.slow
def test_export_command_few_own_queries_are_filled_from_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[Any]
) -> None:
    pairs = put(tmp_path, "pairs.csv", PAIRED + "mine,pin,a,train\n")
    result = export(tmp_path, monkeypatch, [pairs], "--texts", 100)
    assert exported[0][0] == "mine" and len(set(exported[0])) == 100
    assert "only 1 train queries" in result.stderr and "sample" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_export_command_without_own_queries_names_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[Any], named: bool
) -> None:
    result = export(tmp_path, monkeypatch, [tmp_path / "gone.csv"] if named else [])
    assert len(exported[0]) == 2000
    assert "sample data" in result.stderr and "--data" in result.stderr
    assert ("gone.csv" in result.stderr) == named


def test_export_command_given_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[Any]
) -> None:
    put(tmp_path, "catalogue.csv", "id,entity_type,title\na,pin,x\n")
    rows = pl.DataFrame(
        {
            "query": [f"own {i}" for i in range(120)],
            "entity_type": "pin",
            "entity_id": "a",
            "split": "train",
        }
    )
    rows.write_csv(tmp_path / "pairs.csv")
    export(tmp_path, monkeypatch, [tmp_path / "gone.csv"], "--data", tmp_path)
    assert exported[0][:2] == ["own 0", "own 1"] and len(exported[0]) == 120
    result = export(tmp_path, monkeypatch, [], "--texts", 50)
    assert result.exit_code == 2 and "100" in result.stderr
