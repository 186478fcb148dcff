"""Files that Spark, pandas, MySQL, Postgres, Excel, BigQuery and DuckDB write: each has a verdict.

A file is read whole, to the last row, or it is refused with the row and a fix; whoever reads in
chunks (embed, rebuild, update) reads what whoever reads whole (validate, pairs, train) does.
"""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from encoders.commands.data import group
from encoders.errors import DataError, OmniError, SchemaError
from encoders.tables import delimited
from encoders.tables.files import check_table
from encoders.tables.parts import TableFile, join_frames
from encoders.tables.reading import read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.stream import stream_catalogue
from tests.helpers.tables.odd_files import CASES, put
from tests.helpers.tables.odd_makers import HEADER, parquet, rows


@pytest.mark.parametrize("name", CASES)
def test_odd_file_is_read_whole_or_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    # What a pattern would find instead.
    for other in ("a1.parquet", "axb1.csv", "x.arrow"):
        (tmp_path / other).write_bytes(b"no table")
    path = put(case, tmp_path)
    if isinstance(case.wanted, str):
        with pytest.raises(DataError, match=f"(?s){case.wanted}"):
            check_table(path, "catalogue", reading=case.options)
        with pytest.raises(DataError, match=f"(?s){case.wanted}"):
            list(stream_catalogue([path], reading=case.options))
        return
    checked = check_table(path, "catalogue", reading=case.options)
    assert checked.frame[case.column].to_list() == case.wanted
    assert any(case.noted in note for note in checked.report.notes) or not case.noted
    chunks = stream_catalogue([path], reading=case.options, chunk_rows=1)
    streamed = join_frames(list(chunks))
    shared = [name for name in streamed.columns if streamed.schema[name] != pl.Null]
    assert streamed.select(shared).equals(checked.frame.select(shared))


def test_cases_are_at_least_sixty() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if n.endswith((".csv", ".tsv")) and "utf16" not in n]
)
def test_delimited_file_reads_equally_in_blocks_of_any_size(
    name: str, block: int, tmp_path: Path
) -> None:
    """Where a block ends changes nothing, once the first one told how the file is written."""
    case = CASES[name]
    if isinstance(case.wanted, str):
        return
    path = put(case, tmp_path)
    whole = pl.concat(delimited.delimited_chunks(path, case.options, []))
    layout = _layout(path, case.options)
    if layout is None:
        return
    reader = delimited._Reader(path.name, layout[0], case.options)
    rest = layout[1]
    block = max(block, len(rest) // 500)  # every block scans an open cell from its start
    frames = [
        reader.read(rest[start : start + block], start + block >= len(rest))
        for start in range(0, len(rest), block)
    ]
    columns = [name for name in whole.columns if name != "price"]
    assert pl.concat(frames).select(columns).equals(whole.select(columns))


def _layout(path: Path, options: ReadingOptions) -> tuple[Any, bytes] | None:
    from encoders.tables.dialect import find_layout
    from encoders.tables.parts import format_of
    from encoders.text.text_blocks import text_blocks

    block = b"".join(text_blocks(path, options.encoding))
    layout = find_layout(block, True, format_of(path), options, path.name)
    return None if layout is None else (layout, block[layout.start :])


def test_backslash_file_of_sixty_thousand_rows_loses_none(tmp_path: Path) -> None:
    count = 60_000
    lines = [
        f'p{n},pin,"tv {n}\\" wide",{n}\n' if n % 50 == 3 else f"p{n},pin,red barn {n},{n}\n"
        for n in range(count)
    ]
    path = tmp_path / "c.csv"
    path.write_text(HEADER + "".join(lines))
    checked = check_table(path, "catalogue")
    assert checked.frame.height == count
    assert checked.frame["title"][3] == 'tv 3" wide'


def test_malformed_rows_are_counted_and_listed_beside_good_ones(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text(rows("a", "b") + "p7,pin\n" + 'p8,pin,"x" y,1\n' + "p9,pin,z,1\n")
    checked = check_table(path, "catalogue", on_bad_rows="drop")
    assert checked.frame["id"].to_list() == ["p0", "p1", "p9"]
    assert checked.rejected["row"].to_list() == [3, 4]
    assert checked.report.rows_read == 5
    assert sum(checked.report.rules_broken.values()) == 2


def test_folder_of_parts_hidden_and_marked_files_are_no_part(tmp_path: Path) -> None:
    for name in (".hidden.parquet", "_tmp.parquet", "._x.parquet"):
        (tmp_path / name).write_bytes(b"no table")
    parquet(title=pa.array(["a"]))(tmp_path / "part-0.parquet")
    assert check_table(tmp_path, "catalogue").frame["title"].to_list() == ["a"]


def test_folder_of_hive_folders_has_their_columns(tmp_path: Path) -> None:
    for country, year, n in (("DE", "2024", 1), ("A%2FT", "2025", 2), (None, "2025", 3)):
        value = country or "__HIVE_DEFAULT_PARTITION__"
        folder = tmp_path / f"country={value}" / f"year={year}"
        folder.mkdir(parents=True)
        parquet(id=pa.array([f"p{n}"]))(folder / "part.parquet")
    read = check_table(tmp_path, "catalogue").frame.sort("id")
    assert read["country"].to_list() == ["DE", "A/T", None]
    assert read["year"].to_list() == [2024, 2025, 2025]
    streamed = pl.concat(stream_catalogue([tmp_path])).sort("id")
    assert streamed["country"].to_list() == ["DE", "A/T", None]


def test_folder_of_parts_in_subfolders_is_read_and_mixed_ones_refused(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / f"day{n}").mkdir()
        parquet(id=pa.array([f"p{n}"]))(tmp_path / f"day{n}" / "part.parquet")
    assert check_table(tmp_path, "catalogue").frame.height == 2
    parquet(id=pa.array(["p3"]))(tmp_path / "part.parquet")
    with pytest.raises(DataError, match="subfolders"):
        check_table(tmp_path, "catalogue")


def test_folder_with_glob_characters_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "run[2]"
    folder.mkdir()
    parquet(title=pa.array(["a"]))(folder / "part-0.parquet")
    assert check_table(folder, "catalogue").frame["title"].to_list() == ["a"]


def test_empty_part_beside_others_is_left_out_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "part-0.csv").write_text("")
    (tmp_path / "part-1.csv").write_text(rows("a"))
    checked = check_table(tmp_path, "catalogue")
    assert checked.frame.height == 1
    assert any("empty" in note for note in checked.report.notes)


def test_parts_whose_left_out_columns_differ_in_type_are_joined(tmp_path: Path) -> None:
    parquet(id=pa.array(["p0"]), x=pa.array([{"a": 1}]))(tmp_path / "a.parquet")
    parquet(id=pa.array(["p1"]), x=pa.array([b"x"]))(tmp_path / "b.parquet")
    assert check_table(tmp_path, "catalogue").frame["id"].to_list() == ["p0", "p1"]


def test_rejected_rows_of_parts_of_differing_types_are_listed(tmp_path: Path) -> None:
    parquet(id=pa.array([None, "p0"]), x=pa.array([{"a": 1}] * 2))(tmp_path / "a.parquet")
    parquet(id=pa.array([None, "p1"]), x=pa.array([b"x"] * 2))(tmp_path / "b.parquet")
    rejected = check_table(tmp_path, "catalogue", on_bad_rows="drop").rejected
    assert rejected["x"].to_list() == ["{'a': 1}", "b'x'"]


@pytest.mark.parametrize("number", [pa.int8(), pa.int64(), pa.float64()])
def test_parts_with_dates_and_numbers_in_a_column_are_refused(
    number: pa.DataType, tmp_path: Path
) -> None:
    days = pa.array([[dt.date(2024, 5, 1)]])
    parquet(id=pa.array(["p0"]), x=days)(tmp_path / "a.parquet")
    parquet(id=pa.array(["p1"]), x=pa.array([[1]], pa.list_(number)))(tmp_path / "b.parquet")
    with pytest.raises(SchemaError, match="'x': List"):
        check_table(tmp_path, "catalogue")


def test_parquet_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"])] * 4, names=["id", "entity_type", "title", "title"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(DataError, match="stands 2 times"):
        check_table(tmp_path / "c.parquet", "catalogue")


def test_unknown_values_are_named_once_each_with_their_mapping(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    actions = ["view"] * 5 + ["buy", "cart", "click"]
    log.write_text(
        "timestamp,query,entity_type,entity_id,action\n"
        + "".join(f"170000000{n},q,pin,p,{a}\n" for n, a in enumerate(actions))
    )
    result = CliRunner().invoke(group, ["validate", str(log), "--table", "log"])
    assert result.exit_code == 1
    for option in ("view=impression", "buy=checkout", "cart=add_to_cart"):
        assert result.stderr.count(f"--map action.{option}") == 1
    mapped = [f"--map=action.{o}" for o in ("view=impression", "buy=checkout", "cart=add_to_cart")]
    result = CliRunner().invoke(group, ["validate", str(log), "--table", "log", *mapped])
    assert result.exit_code == 0, result.output


def test_validate_names_columns_of_other_systems_and_what_the_towers_read(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("id,entity_type,headline,stock\np0,pin,a,3\n")
    result = CliRunner().invoke(group, ["validate", str(path)])
    assert result.exit_code == 0
    assert "--rename headline=title" in result.stderr
    assert "attributes, for filters and answers: headline, stock" in result.stderr


def test_convert_writes_what_every_command_reads(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("sku;name;my col\np0;a;3,5\n")
    out = tmp_path / "c.parquet"
    flags = ["--rename", "sku=id", "--rename", "name=title", "--rename", "my col=stock"]
    result = CliRunner().invoke(
        group, ["convert", str(path), "--out", str(out), *flags, "--set", "entity_type=product"]
    )
    assert result.exit_code == 0, result.output
    assert check_table(out, "catalogue").frame.to_dicts() == [
        {"id": "p0", "title": "a", "stock": 3.5, "entity_type": "product"}
    ]


@pytest.mark.parametrize(
    "flag", ["--separator=;;", "--separator=none", "--quote=äö", "--rename=x", "--map=a=b"]
)
def test_reading_flags_of_wrong_form_are_refused(flag: str, tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text(rows("a"))
    result = CliRunner().invoke(group, ["validate", str(path), flag])
    assert result.exit_code == 2
    assert flag.split("=")[0] in result.stderr


def test_json_rows_read_in_chunks_have_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": str(n)}) + "\n\n" for n in range(5)))
    chunks = list(read_chunks(TableFile(path), chunk_rows=2))
    assert [row for chunk in chunks for row in chunk["__row"]] == [1, 2, 3, 4, 5]
    assert max(chunk.height for chunk in chunks) == 2


def test_parquet_rename_of_several_names_reads_the_one_there(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pl.DataFrame({"a": ["p0"], "x": [1]}).write_parquet(path)
    options = ReadingOptions(rename={"a": "id", "b": "id"})
    (chunk,) = read_chunks(TableFile(path), options, columns=["id"])
    assert chunk["id"].to_list() == ["p0"]


def test_every_refusal_is_an_error_of_this_project() -> None:
    assert issubclass(DataError, OmniError)
