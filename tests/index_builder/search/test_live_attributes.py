"""Attributes of live entries: what no column can hold is refused before it is written, and where a
log holds it already no other entry is affected.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from index_builder.building.build import build_release
from index_builder.building.inputs import EntityInput, LiveWrites, fold_live
from index_builder.building.update import attributes_of, read_changes
from index_builder.commands import update as update_command
from index_builder.errors import BadAttribute
from index_builder.filters.json_values import check_attributes
from index_builder.live_log.records import LiveEntry
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import EntityIndex, IndexConfig
from index_builder.search.live_blocks import attribute_frame
from index_builder.search.live_state import LiveBase, LiveState
from tests.helpers.release_makers import SPACE, D, make_bundle, quick, unit_vectors

COUNT = 50
QUERY = unit_vectors(1, 99)[0]
FRAME = pl.DataFrame(
    {
        "tags": [["a", "b"]] * COUNT,
        "sold": [True] * COUNT,
        "price": list(range(COUNT)),
        "brand": ["x"] * COUNT,
    }
)
BASE = EntityInput(
    ids=[f"p{i}" for i in range(COUNT)],
    vectors=unit_vectors(COUNT, 1),
    space_id=SPACE,
    attributes=FRAME,
)
CLASHES: list[dict[str, Any]] = [
    {"tags": "red"},
    {"sold": "true"},
    {"brand": ["x", "y"]},
    {"price": [3]},
    {"tags": [["a"]]},
]


def make_index() -> EntityIndex:
    return EntityIndex.build("pin", BASE.ids, BASE.vectors, FRAME, IndexConfig(kind="exact"))


def make_state(index: EntityIndex) -> LiveState:
    return LiveState(
        LiveBase(D, SPACE, index.row_of, rows=COUNT),
        exact_limit=1000,
        background=False,
    )


def entry(name: str, sequence: int, attributes: dict[str, Any] | None = None) -> LiveEntry:
    return LiveEntry(
        id=name,
        vector=unit_vectors(1, sequence)[0],
        space_id=SPACE,
        attributes=attributes or {},
        sequence=sequence,
    )


def fold(into: Path, new: LiveEntry) -> pl.DataFrame:
    folded, _ = fold_live(BASE, LiveWrites({new.id: new}, 1), into / "folded")
    assert folded.attributes is not None
    return folded.attributes


def found(index: EntityIndex, expression: str) -> set[str]:
    return {
        name for name in index.search(QUERY, 200, filter=expression).ids if not name.startswith("p")
    }


@pytest.mark.parametrize("bad", CLASHES)
def test_filter_entry_clashing_with_schema_hides_no_other(
    tmp_path: Path, bad: dict[str, Any]
) -> None:
    index, (name,) = make_index(), bad
    state = make_state(index)
    state.apply([entry("bad", 1, bad)])
    index.set_live(state.view)
    assert len(index.search(QUERY, 200, filter='brand == "x"').ids) == COUNT
    state.apply([entry("good", 2, {"brand": "x", "price": 3, "tags": ["a"], "sold": True})])
    index.set_live(state.view)
    other = {
        "tags": 'brand == "x"',
        "sold": "price == 3",
        "brand": "price == 3",
        "price": 'brand == "x"',
    }[name]
    assert found(index, other) == {"good"}
    folded = fold(tmp_path, entry("bad", 1, bad))
    assert folded.height == COUNT + 1 and folded[name][-1] is None and folded.schema == FRAME.schema


GOOD = {"brand": "x", "price": 3, "tags": ["a"], "sold": True}
BY_GOOD = {
    "tags": 'array_contains(tags, "a")',
    "sold": "sold == true",
    "brand": 'brand == "x"',
    "price": "price == 3",
}


@pytest.mark.parametrize("bad", CLASHES)
@pytest.mark.parametrize(
    "steps", [[("bad", "good")], [("good", "bad")], [("bad",), ("good",)], [("good",), ("bad",)]]
)
def test_filter_block_with_clash_finds_entries_that_fit(
    tmp_path: Path, bad: dict[str, Any], steps: list[tuple[str, ...]]
) -> None:
    """A column of both became text as a whole: no filter on it found the good ones, and the next
    rebuild lost their values for good.
    """
    index, (name,) = make_index(), bad
    state = make_state(index)
    entries = {"bad": entry("bad", 1, bad), "good": entry("good", 2, GOOD)}
    for sequence, names in enumerate(steps):
        state.apply(
            [
                dataclasses.replace(entries[which], sequence=10 * sequence + i + 1)
                for i, which in enumerate(names)
            ]
        )
        index.set_live(state.view)
        assert (set(names) & found(index, BY_GOOD[name])) == (set(names) & {"good"})
    assert found(index, BY_GOOD[name]) == {"good"}
    assert index.attributes(["bad", "good"], [name]) == [
        bad,
        {name: GOOD[name]},
    ], "answers show what was written"
    folded, _ = fold_live(BASE, LiveWrites(entries, 2), tmp_path / "folded")
    assert folded.attributes is not None and folded.attributes.schema == FRAME.schema
    assert dict(zip(folded.ids, folded.attributes[name].to_list()))["good"] == GOOD[name]
    assert dict(zip(folded.ids, folded.attributes[name].to_list()))["bad"] is None


def test_join_frames_int_and_float_lists_keep_fractions() -> None:
    """The first list decided for all: 2.5 became 2, in filters, answers and rebuilds."""
    assert attribute_frame([{"n": [1]}, {"n": [2.5, 3]}, {"n": []}])["n"].to_list() == [
        [1.0],
        [2.5, 3.0],
        [],
    ]


@pytest.mark.parametrize("unknown", [{"a b": 1}, {"flags": [True]}, {"deep": [[1]]}])
def test_fold_live_impossible_attribute_is_left_out(
    tmp_path: Path, unknown: dict[str, Any]
) -> None:
    folded = fold(tmp_path, entry("n", 1, {**unknown, "price": 3}))
    assert folded.columns == FRAME.columns and folded["price"][-1] == 3


def test_filter_fraction_over_int_column_is_kept(tmp_path: Path) -> None:
    index = make_index()
    state = make_state(index)
    state.apply([entry("new", 1, {"price": 19.5})])
    index.set_live(state.view)
    assert found(index, "price <= 19") == set() and found(index, "price > 19 and price < 20") == {
        "new"
    }
    assert fold(tmp_path, entry("new", 1, {"price": 19.5}))["price"].to_list() == [
        *range(COUNT),
        19.5,
    ]


def test_filter_during_writes_sees_its_own_view() -> None:
    index = make_index()
    state = make_state(index)
    state.apply([entry(f"n{i}", i + 1, {"price": i}) for i in range(20)])
    index.set_live(state.view)
    # The same block grows; the index still holds the view before
    state.apply([entry(f"m{i}", i + 100, {"price": i}) for i in range(20)])
    assert found(index, "price != 10") == {f"n{i}" for i in range(20) if i != 10}
    assert found(index, "price < 1 or price > 18") == {"n0", "n19"}


@pytest.mark.parametrize(
    "expression",
    ['not array_contains(tags, "z")', "price >= 0", 'price >= 0 or not array_contains(tags, "z")'],
)
def test_filter_live_entry_without_attributes_matches_nothing(expression: str) -> None:
    index = make_index()
    state = make_state(index)
    state.apply([entry(f"n{i}", i + 1) for i in range(5)])
    index.set_live(state.view)
    assert found(index, expression) == set()
    assert len(index.search(QUERY, 200, filter=expression).ids) == COUNT


@pytest.mark.parametrize(
    "values",
    [
        {"price": 3},
        {"price": 3.5},
        {"tags": []},
        {"tags": ["a"]},
        {"sold": False},
        {"price": None},
        {"new": [1, 2.5]},
        {"größe": "m"},
    ],
)
def test_check_attributes_fitting_value_is_accepted(values: dict[str, Any]) -> None:
    check_attributes(values, make_index().attribute_table.schema, "row 1")


@pytest.mark.parametrize(
    "values",
    [
        *CLASHES,
        {"a b": 1},
        {"": 1},
        {"price": float("nan")},
        {"new": float("inf")},
        {"new": 2**63},
        {"new": [True]},
        {"new": ["a", 1]},
        {"new": {"a": 1}},
        {"price": True},
        {"brand": 3},
    ],
)
def test_check_attributes_misfit_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(BadAttribute, match=f"row 1: attribute '{next(iter(values))}'"):
        check_attributes(values, make_index().attribute_table.schema, "row 1")


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    store = ReleaseStore(tmp_path / "store")
    build_release({"pin": BASE}, make_bundle(tmp_path / "bundle"), store, quick("exact"))
    return store


def update(store: ReleaseStore, path: Path) -> tuple[int, str]:
    result = CliRunner().invoke(update_command.command, [str(path), "--store", str(store.root)])
    return result.exit_code, result.output


def test_read_changes_nan_is_a_missing_number(store: ReleaseStore, tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    rows = {
        "id": ["u", "v"],
        "entity_type": ["pin"] * 2,
        "embedding": unit_vectors(2, 5).tolist(),
        "price": [1.5, float("nan")],
    }
    pl.DataFrame(rows).write_parquet(path)
    assert update(store, path)[0] == 0
    assert attributes_of({"price": float("nan"), "brand": "x"}) == {"brand": "x"}


@pytest.mark.parametrize("bad", [{"price-usd": 3}, {"tags": "red"}, {"sold": 3}])
def test_update_impossible_attribute_writes_nothing(
    store: ReleaseStore, tmp_path: Path, bad: dict[str, Any]
) -> None:
    good = {"id": "good", "entity_type": "pin", "embedding": unit_vectors(1, 5)[0].tolist()}
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good | {"id": "bad"} | bad)))
    code, message = update(store, path)
    assert code and f"c.jsonl, pin 'bad': attribute '{next(iter(bad))}'" in " ".join(
        message.split()
    )
    assert not (store.live_root / "pin").exists()


def test_read_changes_texts_take_types_of_the_release(store: ReleaseStore, tmp_path: Path) -> None:
    vector = json.dumps(unit_vectors(1, 5)[0].tolist())
    path = tmp_path / "c.csv"
    rows = [f'u,pin,"{vector}",19.5,true,7', f'v,pin,"{vector}",,False,x']
    path.write_text("\n".join(["id,entity_type,embedding,price,sold,brand", *rows, ""]))
    entries = read_changes(path, read_manifest(store.path_of(str(store.current())))).ready["pin"]
    assert [entry.attributes for entry in entries] == [
        {"price": 19.5, "sold": True, "brand": "7"},
        {"sold": False, "brand": "x"},
    ]


def test_read_changes_bad_row_is_named_by_its_place(store: ReleaseStore, tmp_path: Path) -> None:
    rows = [{"id": f"g{i}", "entity_type": "pin", "op": "delete"} for i in (0, 1, 1, 2)]
    path = tmp_path / "c.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [*rows, {"id": "u", "entity_type": "pinn", "title": "t"}]
        )
    )
    assert "row 5" in update(store, path)[1]
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [*rows, {"id": "u", "entity_type": "pinn", "op": "delete"}]
        )
    )
    assert "row 5" in update(store, path)[1]


def test_rebuild_new_attribute_of_mixed_types_is_text(tmp_path: Path) -> None:
    entries = {
        f"n{i}": entry(f"n{i}", i + 1, {"new": value})
        for i, value in enumerate([1, "m", [2], [[3]], None])
    }
    folded, _ = fold_live(BASE, LiveWrites(entries, 5), tmp_path / "folded")
    assert folded.attributes is not None and folded.attributes["new"].to_list()[-5:] == [
        "1",
        "m",
        "[2]",
        None,
        None,
    ]
