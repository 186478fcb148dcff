"""``omni explain misses`` with pairs of another catalogue: refused by name, not blamed on the
encoder.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result

from encoders.towers.query_tower import QueryEncoder
from index_builder.commands import explain as explain_commands
from index_builder.releases.store import ReleaseStore
from tests.helpers.release_makers import unit_vectors


@pytest.fixture(autouse=True)
def random_query_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(texts: Sequence[str]) -> np.ndarray:
        return unit_vectors(len(texts), 3)

    monkeypatch.setattr(QueryEncoder, "load", lambda path: SimpleNamespace(encode=encode))


def misses(store: ReleaseStore, *arguments: object) -> Result:
    return CliRunner().invoke(
        explain_commands.group, ["misses", "--store", str(store.root), *map(str, arguments)]
    )


def write_pairs(folder: Path, *entity_ids: str) -> Path:
    path = folder / "mine.csv"
    path.write_text(
        "query,entity_type,entity_id\n"
        + "".join(f"query {i},pin,{id}\n" for i, id in enumerate(entity_ids))
    )
    return path


@pytest.mark.slow
def test_explain_sample_pairs_of_other_catalogue_are_refused(store: ReleaseStore) -> None:
    result = misses(store)
    assert result.exit_code == 1 and result.stdout == ""
    assert (
        "sample data in the package" in result.stderr and "release r1, e.g. '" in result.stderr
    ), "what was read"
    assert (
        "note:" not in result.stderr and "pin 200" in result.stderr and "'pin-0'" in result.stderr
    ), "what the release holds"
    assert "--pairs" in result.stderr and "--data" in result.stderr, "what to do"


def test_explain_file_of_unknown_pairs_is_named(store: ReleaseStore, tmp_path: Path) -> None:
    path = write_pairs(tmp_path, "other-1", "other-2")
    result = misses(store, "--pairs", path)
    assert result.exit_code == 1
    assert f"none of the 2 pairs of {path}" in result.stderr and "'other-1'" in result.stderr


def test_explain_mostly_unknown_pairs_are_noted(store: ReleaseStore, tmp_path: Path) -> None:
    result = misses(store, "--pairs", write_pairs(tmp_path, "pin-3", "other-1", "other-2"))
    assert result.exit_code == 0, result.stderr
    assert "note: pin: 2 of 3 pairs" in result.stderr and "'other-1'" in result.stderr
    result = misses(store, "--pairs", write_pairs(tmp_path, "pin-3", "pin-4", "other-1"))
    assert result.exit_code == 0 and "note:" not in result.stderr
