"""Attributes of live entries: what no column can hold is refused before it is written, and where a
log holds it already no other entry is affected.
"""

import dataclasses
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from index_builder.building.build import build_release
from index_builder.building.inputs import EntityInput
from index_builder.building.order import LiveWrites
from index_builder.building.update import attributes_of, read_changes
from index_builder.commands import update as update_command
from index_builder.errors import BadAttribute
from index_builder.filters.attributes import AttributeTable
from index_builder.filters.json_values import check_attributes
from index_builder.live_log.records import LiveEntry
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import EntityIndex, IndexConfig
from index_builder.search.live_blocks import attribute_frame
from index_builder.search.live_state import LiveBase, LiveState
from tests.helpers.live_logs import fold_live
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
    folded = fold_live(BASE, LiveWrites({new.id: new}, 1), into / "folded")
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
    folded = fold_live(BASE, LiveWrites(entries, 2), tmp_path / "folded")
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
    assert code and "c.jsonl" in message and f"'{next(iter(bad))}'" in message
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


def test_read_changes_lists_of_dates_are_read_from_csv(tmp_path: Path) -> None:
    days = FRAME.with_columns(days=pl.Series([[date(2024, 5, 1)]] * COUNT))
    store = ReleaseStore(tmp_path / "store")
    inputs = {"pin": dataclasses.replace(BASE, attributes=days)}
    build_release(inputs, make_bundle(tmp_path / "bundle"), store, quick("exact"))
    path = tmp_path / "c.csv"
    vector = json.dumps(unit_vectors(1, 5)[0].tolist())
    path.write_text(f'id,entity_type,embedding,days\nu,pin,"{vector}","[""2024-06-01""]"\n')
    (found,) = read_changes(path, read_manifest(store.path_of(str(store.current())))).ready["pin"]
    assert found.attributes == {"days": ["2024-06-01"]}


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


def test_fold_live_new_attribute_has_the_type_that_was_written_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts were made of all: "['a']", "True"."""
    written = {"n4": "m", "n3": None, "n2": 1, "n1": ["a"], "n0": "x", "n5": True}
    entries = {
        name: entry(name, i + 1, {"new": value}) for i, (name, value) in enumerate(written.items())
    }
    folded = fold_live(BASE, LiveWrites(entries, 6), tmp_path / "folded")
    assert folded.attributes is not None
    found = dict(zip(folded.ids, folded.attributes["new"].to_list()))
    assert {name: found[name] for name in written} == {
        **dict.fromkeys(written),
        "n4": "m",
        "n0": "x",
    }
    assert "3 live values are not string" in caplog.text


def test_update_new_attribute_keeps_the_type_of_the_live_log(
    store: ReleaseStore, tmp_path: Path
) -> None:
    def write(name: str, *values: Any) -> tuple[int, str]:
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {
                "id": f"{name}{i}",
                "entity_type": "pin",
                "embedding": unit_vectors(1, i)[0].tolist(),
                "new": value,
            }
            for i, value in enumerate(values)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return update(store, path)

    assert write("a", 5)[0] == 0
    for bad in ("m", ["a"], True):
        code, message = write("b", bad)
        assert code and "attribute 'new' is int in this index" in " ".join(message.split())
    assert write("c", 7, 2.5)[0] == 0
    table = tmp_path / "d.csv"
    vector = json.dumps(unit_vectors(1, 5)[0].tolist())
    table.write_text(f'id,entity_type,embedding,new\nd,pin,"{vector}",8\n')
    assert update(store, table)[0] == 0, "texts of CSV take the type, too"


def test_attributes_of_a_deleted_id_are_gone() -> None:
    """``vector`` knew of the delete, ``attributes`` still answered."""
    index = make_index()
    state = make_state(index)
    state.apply([LiveEntry(id="p5", sequence=1), entry("p6", 2, {"brand": "y"})])
    index.set_live(state.view)
    assert index.vector("p5") is None
    assert index.attributes(["p5", "p6", "p7", "zz"], ["price", "brand"]) == [
        {},
        {"brand": "y"},
        {"price": 7, "brand": "x"},
        {},
    ]


def test_filter_on_id_finds_base_and_live_entries() -> None:
    index = make_index()
    state = make_state(index)
    state.apply([entry("n1", 1), entry("p3", 2, {"price": 4}), LiveEntry(id="p4", sequence=3)])
    index.set_live(state.view)

    def ids(expression: str) -> set[str]:
        return set(index.search(QUERY, 200, filter=expression).ids)

    assert ids('id in ["n1", "p3", "p4", "p5", "zz"]') == {"n1", "p3", "p5"}
    assert ids('id == "p3"') == {"p3"} and ids('id == "p3" and price == 4') == {"p3"}
    assert ids('id == "p3" and price == 3') == set()
    assert ids('id != "n1"') == {f"p{i}" for i in range(COUNT) if i != 4}
    state.apply([entry("n1", 4, {"price": 1}), entry("p3", 5)])
    index.set_live(state.view)
    assert ids('id in ["n1"] and price == 1') == {"n1"}
    assert ids('id == "p3" and price is null') == {"p3"}


def test_filter_over_live_dates_compares_instants() -> None:
    frame = FRAME.with_columns(added=pl.lit("2024-05-01T10:00:00"))
    index = EntityIndex.build("pin", BASE.ids, BASE.vectors, frame, IndexConfig(kind="exact"))
    state = make_state(index)
    texts = ["2024-05-01T23:30:00-02:00", "2024-05-01", "2024-05-01T12:00:00Z", "soon", None]
    state.apply([entry(f"n{i}", i + 1, {"added": text}) for i, text in enumerate(texts)])
    index.set_live(state.view)
    assert found(index, "added == 2024-05-01") == {"n1", "n2"}
    assert found(index, 'added >= "2024-05-01T14:00:00+02:00"') == {"n0", "n2"}
    assert found(index, "added is null") == {"n3", "n4"}
    with pytest.raises(BadAttribute, match=r"'added' is time .* got 'soon'"):
        check_attributes({"added": "soon"}, index.attribute_table.schema, "row 1")
    check_attributes({"added": "2024-05-01 12:00+02"}, index.attribute_table.schema, "row 1")


def test_filter_over_4000_live_entries_takes_microseconds() -> None:
    """All columns were typed and sorted anew for each request and segment: 1.3 ms."""
    index = make_index()
    state = LiveState(LiveBase(D, SPACE, index.row_of, rows=COUNT), background=False)
    vector = unit_vectors(1, 1)[0]
    state.apply(
        LiveEntry(
            id=f"n{i}",
            vector=vector,
            space_id=SPACE,
            attributes={**GOOD, "price": i},
            sequence=i + 1,
        )
        for i in range(4000)
    )
    table = index.attribute_table
    (segment,) = state.view.segments
    assert int(segment.mask("price < 100 and price >= 7", table).sum()) == 93
    times = []
    for i in range(200):
        start = time.process_time_ns()
        mask = segment.mask(f"price < {i} and price >= 7", table)
        times.append(time.process_time_ns() - start)
        assert int(mask.sum()) == max(0, i - 7)
    assert sorted(times)[100] < 150_000
    state.apply([entry("m", 5000, {"price": 50})])
    assert int(state.view.segments[0].mask("price == 50", table).sum()) == 2
    assert int(segment.mask("price == 50", table).sum()) == 1, "a view keeps what it shows"


def test_fold_live_keeps_dates_of_live_entries(tmp_path: Path) -> None:
    """A catalogue's column of dates took no text, so that a rebuild lost what was written live."""
    day = pl.Series([date(2024, 5, 1)] * COUNT)
    frame = FRAME.with_columns(
        day=day,
        at=day.cast(pl.Datetime("ms", "Europe/Berlin")),
        days=pl.Series([[date(2024, 5, 1)]] * COUNT),
    )
    base = dataclasses.replace(BASE, attributes=frame)
    written = {"day": "2024-06-01", "at": "2024-06-01T10:00:00Z", "days": ["2024-06-01"]}
    bad = {"day": "soon", "at": "later", "days": ["2024-07-01", "soon"]}
    entries = {"n": entry("n", 1, written), "o": entry("o", 2, bad)}
    folded = fold_live(base, LiveWrites(entries, 2), tmp_path / "folded")
    assert folded.attributes is not None
    found = folded.attributes.select(*written).to_dicts()
    assert found[-2] == written
    assert found[-1] == {"day": None, "at": None, "days": ["2024-07-01"]}
    assert folded.attributes["at"][0] == "2024-05-01T02:00:00+02:00"
    schema = AttributeTable(folded.attributes).schema
    assert [schema[name] for name in written] == ["time", "time", "list<time>"]


def fold_whens(into: Path, whens: list[Any], row: int, written: Any) -> pl.DataFrame:
    """Fold a live upsert of one row into a base with a column ``when``."""
    count = len(whens)
    base = dataclasses.replace(
        BASE,
        ids=BASE.ids[:count],
        vectors=BASE.vectors[:count],
        attributes=pl.DataFrame({"when": whens}),
    )
    schema = AttributeTable(base.attributes).schema
    new = entry(base.ids[row], 1, {"when": written})
    if schema["when"].endswith("string"):
        check_attributes(new.attributes, schema, "a write")
    folded = fold_live(base, LiveWrites({new.id: new}, 1), into / "folded")
    assert folded.attributes is not None
    return folded.attributes


@pytest.mark.parametrize("nested", [False, True])
def test_fold_live_text_among_dates_stays_where_the_base_is_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, nested: bool
) -> None:
    """The row that made the column text is the one replaced: what stays of it are dates."""
    whens: list[Any] = ["2024-01-01", "soon"]
    written: Any = "later"
    if nested:
        whens, written = [["2024-01-01"], ["soon"]], ["later", "2024-02-02"]
    folded = fold_whens(tmp_path, whens, 1, written)
    assert folded["when"].to_list() == [whens[0], written]
    assert not caplog.messages


@pytest.mark.parametrize("nested", [False, True])
def test_fold_live_stray_text_is_dropped_and_logged_where_no_date_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, nested: bool
) -> None:
    whens: list[Any] = ["2024-01-01"]
    stray: Any = "soon"
    if nested:
        whens, stray = [whens], ["2024-01-02", "soon"]
    folded = fold_whens(tmp_path, whens, 0, stray)
    assert folded["when"].to_list() == ([["2024-01-02"]] if nested else [None])
    (line,) = caplog.messages
    assert "'when': 1 live values" in line


def test_attribute_types_new_live_ones_are_known(tmp_path: Path) -> None:
    index = make_index()
    state = make_state(index)
    state.apply([entry("a", 1, {"new": "x", "none": None, "empty": []}), entry("b", 2)])
    state.apply([entry("c", 3, {"new": 5, "other": [1], "price": 2})])
    index.set_live(state.view)
    types = index.attribute_types(["new", "other", "none", "empty", "price"])
    assert types == {**index.attribute_table.schema, "new": "string", "other": "list<int>"}
    assert index.attribute_types([]) == index.attribute_table.schema
