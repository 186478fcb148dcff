"""``omni update``: a file of changes is checked, embedded, written and seen."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from encoders.errors import DataError, InvalidVectors, OmniError, RowError
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


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def test_read_changes_csv_cells_become_the_lists_that_the_release_has(
    store: ReleaseStore, tmp_path: Path
) -> None:
    manifest = read_manifest(store.path_of("r1"))
    manifest.entities["pin"].index["attributes"] |= {"tags": "list<string>", "sizes": "list<int>"}
    path = put(
        tmp_path,
        "c.csv",
        'id,entity_type,title,tags,sizes\nx,pin,a,"[""red"",""blue""]","[1, 2]"\n'
        "y,pin,b,red|green,3\nz,pin,c,,\n",
    )
    rows = read_changes(path, manifest).upserts
    assert rows["tags"].to_list() == [["red", "blue"], ["red", "green"], None]
    assert rows["sizes"].to_list() == [[1, 2], [3], None]


def test_read_changes_ids_of_any_unicode_form_name_one_entity(
    store: ReleaseStore, tmp_path: Path
) -> None:
    nfd, nfc = unicodedata.normalize("NFD", "é1"), unicodedata.normalize("NFC", "é1")
    manifest = read_manifest(store.path_of("r1"))
    path = put(tmp_path, "c.csv", f"id,entity_type,op\n{nfd},pin,delete\n")
    assert read_changes(path, manifest).deletes == {"pin": [nfc]}
    path = put(
        tmp_path, "d.csv", f"id,entity_type,op,title\n{nfd},pin,delete,\n{nfc},pin,upsert,back\n"
    )
    changes = read_changes(path, manifest)
    assert (changes.upserts["id"].to_list(), changes.deletes) == ([nfc], {})


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("half.jsonl", '{"id":"x\\ud83d","entity_type":"pin","op":"delete"}\n', "row 1.*surrogate"),
        ("cell.csv", "id,entity_type,embedding\nx,pin,no list\n", "'x': embedding must be a JSON"),
        ("deep.csv", f"id,entity_type,embedding\nx,pin,{'[' * 5000}\n", "must be a JSON list"),
        ("short.csv", "id,entity_type,title\nx,pin\n", "row 1: expected 3 cells, got 2"),
        ("blank.csv", 'id,entity_type,op\n"  ",pin,delete\n', "row 1, column 'id'"),
        ("nul.jsonl", '{"id":"x\\u0000","entity_type":"pin","op":"delete"}\n', "NUL"),
        ("empty.csv", "", "'id' is missing"),
    ],
)
def test_read_changes_odd_file_is_refused_with_its_place(
    store: ReleaseStore, tmp_path: Path, name: str, text: str, part: str
) -> None:
    with pytest.raises(DataError, match=part):
        read_changes(put(tmp_path, name, text), read_manifest(store.path_of("r1")))


def test_read_changes_backslash_escaped_csv_loses_no_row(
    store: ReleaseStore, tmp_path: Path
) -> None:
    path = put(
        tmp_path, "c.csv", 'id,entity_type,title\na,pin,"5\\" pipe"\nb,pin,x\nc,pin,"27\\" tv"\n'
    )
    rows = read_changes(path, read_manifest(store.path_of("r1"))).upserts
    assert rows["title"].to_list() == ['5" pipe', "x", '27" tv']
