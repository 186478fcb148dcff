"""``omni update``: a file of changes is checked, embedded, written and seen."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from encoders.errors import InvalidVectors, OmniError, RowError
from index_builder.building.update import apply_changes, attributes_of, embed_again, read_changes
from index_builder.commands import update as update_command
from index_builder.errors import UnknownEntityType
from index_builder.live_log.reader import LiveLogReader
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from tests.helpers.release_makers import SPACE, unit_vectors
from tests.helpers.run_command import run


class FakeBundle:
    """Embeds by title, so that a test can say which vector a row gets."""

    space_id = SPACE

    def embed_entities(self, catalogue: pl.DataFrame) -> np.ndarray:
        return np.concatenate(
            [unit_vectors(1, sum(map(ord, title or ""))) for title in catalogue["title"].to_list()]
        )


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_update_file_is_embedded_written_and_visible(store: ReleaseStore, tmp_path: Path) -> None:
    rows = [
        {"id": "new", "entity_type": "pin", "title": "purple dragon", "number": 4},
        {"id": "pin-3", "entity_type": "pin", "op": "delete"},
        {"id": "ad-1", "entity_type": "ad", "op": "delete"},
        {"id": "ad-1", "entity_type": "ad", "title": "back again", "op": "upsert"},
        {"id": "ready", "entity_type": "pin", "embedding": unit_vectors(1, 9)[0].tolist()},
    ]
    changes = read_changes(
        write_lines(tmp_path / "c.jsonl", rows), read_manifest(store.path_of("r1"))
    )
    assert changes.counts() == {
        "ad": {"upserts": 1, "deletes": 0},
        "pin": {"upserts": 2, "deletes": 1},
    }
    assert apply_changes(changes, store, FakeBundle()) == {"pin": 3, "ad": 1}
    with store.open_current() as release:
        LiveFollower(store, release).catch_up()
        pin = release.entity("pin")
        dragon = unit_vectors(1, sum(map(ord, "purple dragon")))[0]
        assert pin.search(dragon, 1, filter="number == 4").ids[0] == "new"
        assert pin.vector("pin-3") is None
        assert pin.search(unit_vectors(1, 9)[0], 1).ids == ["ready"]
        assert release.entity("ad").count == 20
    entries = LiveLogReader(store.live_root, "pin").poll()
    again = embed_again([e for e in entries if e.source and e.id == "new"], FakeBundle())
    (was,) = [e for e in entries if e.id == "new"]
    assert [(e.id, e.time_ns, e.attributes["title"]) for e in again] == [
        ("new", was.time_ns, "purple dragon")
    ]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"title": "no id"}], RowError),
        ([{"id": "a", "entity_type": "pin", "title": "t", "op": "replace"}], RowError),
        ([{"id": "a", "entity_type": "pinn", "title": "t"}], OmniError),
        ([{"id": "a", "entity_type": "product", "title": "t"}], UnknownEntityType),
        ([{"id": "a", "entity_type": "pin", "embedding": [0.5] * 64}], InvalidVectors),
        ([{"id": "a", "entity_type": "pin", "embedding": [1.0]}], InvalidVectors),
    ],
)
def test_update_bad_file_writes_nothing(
    store: ReleaseStore, tmp_path: Path, rows: list[dict], error: type[Exception]
) -> None:
    good = {"id": "good", "entity_type": "pin", "embedding": unit_vectors(1, 9)[0].tolist()}
    path = write_lines(tmp_path / "c.jsonl", [good, *rows])
    with pytest.raises(error):
        read_changes(path, read_manifest(store.path_of("r1")))
    assert run(update_command.command, path, "--store", store.root).exit_code in (1, 2)
    assert not (store.live_root / "pin").exists()


def test_update_ready_vectors_are_written(store: ReleaseStore, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "c.jsonl",
        [{"id": "x", "entity_type": "pin", "embedding": unit_vectors(1, 9)[0].tolist()}],
    )
    assert (
        json.loads(
            run(update_command.command, path, "--store", store.root, "--dry-run", "--json").stdout
        )["last_sequence"]
        == {}
    )
    assert json.loads(run(update_command.command, path, "--store", store.root, "--json").stdout)[
        "last_sequence"
    ] == {"pin": 1}


def test_attributes_of_row_leaves_out_nested_values_and_vectors() -> None:
    row = {
        "id": "a",
        "entity_type": "pin",
        "title": "t",
        "pinsage": [0.1],
        "tags": ["x"],
        "deep": [[1]],
        "none": None,
        "map": {"a": 1},
    }
    assert attributes_of(row) == {"title": "t", "tags": ["x"]}
