"""A wrong --data folder: the error says what is missing, and which command makes it."""

from pathlib import Path

import pytest

from encoders.datasets.dataset import load_dataset
from encoders.errors import ConfigError


def put(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_load_dataset_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder") as missing:
        load_dataset(tmp_path / "nowhere")
    assert "entities.jsonl.gz" not in str(missing.value) and "--data" in str(missing.value)


def test_load_dataset_empty_folder_names_both_layouts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"entities\.jsonl\.gz") as empty:
        load_dataset(tmp_path)
    assert "catalogue" in str(empty.value) and "pairs" in str(empty.value)


def test_load_dataset_without_pairs_names_command_that_makes_them(tmp_path: Path) -> None:
    put(tmp_path, "catalogue.csv", "id,entity_type,title\na,pin,x\n")
    with pytest.raises(ConfigError, match="`omni pairs`"):
        load_dataset(tmp_path)
