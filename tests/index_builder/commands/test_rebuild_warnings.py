"""``omni rebuild`` warns of a catalogue that lacks what the towers were trained on."""

import json
from pathlib import Path

import polars as pl
import pytest

from index_builder.commands.rebuild_sources import _warn_of_empty_fields


@pytest.mark.parametrize(
    ("queries", "filled", "warned"),
    [
        (None, {"engaged_queries": 0.6}, True),
        ([["red"], []], {"engaged_queries": 0.6}, False),
        (None, {"engaged_queries": 0.0}, False),
        (None, {}, False),
    ],
)
def test_rebuild_field_that_training_had_filled_and_is_empty_is_named(
    queries: list | None,
    filled: dict[str, float],
    warned: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    catalogue = pl.DataFrame({"id": ["a", "b"], "entity_type": "pin", "title": "x"})
    if queries is not None:
        catalogue = catalogue.with_columns(pl.Series("engaged_queries", queries))
    (tmp_path / "config.json").write_text(json.dumps({"filled": filled}))
    _warn_of_empty_fields(catalogue, tmp_path)
    assert ("engaged_queries has a value in 0.0%" in capsys.readouterr().err) == warned


def test_rebuild_bundle_of_an_earlier_version_warns_of_nothing(tmp_path: Path) -> None:
    _warn_of_empty_fields(pl.DataFrame({"id": ["a"]}), tmp_path)
