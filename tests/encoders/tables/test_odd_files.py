"""Files that Spark, pandas, MySQL, Postgres, Excel, BigQuery and DuckDB write: each has a verdict.

A file is read whole, to the last row, or it is refused with the row and a fix; whoever reads in
chunks (embed, rebuild, update) reads what whoever reads whole (validate, pairs, train) does.
"""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from encoders.commands.data import group
from encoders.errors import DataError, OmniError
from encoders.tables import delimited
from encoders.tables.files import check_table
from encoders.tables.parts import TableFile
from encoders.tables.reading import read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.stream import stream_catalogue

HEADER = "id,entity_type,title,price\n"
Write = Callable[[Path], None]


class Odd(NamedTuple):
    """A file and what reading it must give."""

    name: str
    """Its suffix is the file's."""
    content: bytes | str | Write
    column: str
    """What is looked at in the rows."""
    wanted: list[Any] | str
    """Its values, or a part of the message that refuses the file."""
    options: ReadingOptions = ReadingOptions()
    noted: str = ""
    """A part of a note."""


def rows(*titles: str, end: str = "\n") -> str:
    """A CSV whose titles are written as they stand here."""
    lines = [HEADER.strip(), *(f"p{n},pin,{title},{n}" for n, title in enumerate(titles))]
    return end.join(lines) + end


def tsv(*lines: str) -> str:
    return "\n".join(["id\tentity_type\ttitle", *lines]) + "\n"


def parquet(**columns: pa.Array) -> Write:
    def write(path: Path) -> None:
        count = len(next(iter(columns.values())))
        base = {"id": pa.array([f"p{n}" for n in range(count)]), "entity_type": ["pin"] * count}
        pq.write_table(pa.table({**base, **columns}), path)

    return write


def arrow(**columns: pa.Array) -> Write:
    def write(path: Path) -> None:
        table = pa.table({"id": ["p0"], "entity_type": ["pin"], **columns})
        pyarrow.feather.write_feather(table, path)

    return write


def zoned(zone: str) -> Write:
    moment = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
    return parquet(seen=pa.array([moment], pa.timestamp("us", zone)))


NOON = [dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)]
DEEP = '{"id":"p0","entity_type":"pin","x":' + "[" * 3000 + "]" * 3000 + "}\n"
PIN = '{"id":"p0","entity_type":"pin","title":'
MULTILINE = 'id,entity_type,title\np0,pin,"two\nlines, one, cell"\np1,pin,b\n'
SWALLOWING = 'id,entity_type,title\np0,pin,a\np1,pin,"5 inch\np2,pin,c\np3,pin,27"\np4,pin,d\n'
POSTGRES = r"id,entity_type,tags".replace(",", "\t") + "\np0\tpin\tred\\tcar\np1\tpin\t\\N\n"


def cases() -> list[Odd]:
    text = ReadingOptions
    return [
        # quotation marks and escapes
        Odd("spark.csv", rows(r'"5\" pipe"', "ok"), "title", ['5" pipe', "ok"], noted="--escape"),
        Odd("mysql.csv", rows(r'"a \"b, c\" d"', "x"), "title", ['a "b, c" d', "x"]),
        Odd("mysql_null.csv", rows(r'"a \"b\""', r"\N"), "title", ['a "b"', None]),
        Odd("mysql_newline.csv", rows('"a \\"b\\\nc"', "x"), "title", ['a "b\nc', "x"]),
        Odd("double_backslash.csv", rows(r'"a \"b\\"', "x"), "title", ['a "b\\', "x"]),
        Odd("path.csv", rows(r"C:\new", "x"), "title", [r"C:\new", "x"]),
        Odd("path_quoted.csv", rows(r'"C:\"', "x"), "title", ["C:\\", "x"]),
        Odd("unquoted_escape.csv", rows(r"tv 27\, wide", "x"), "title", ["tv 27, wide", "x"]),
        Odd("doubled.csv", rows('"5"" pipe"', '""""'), "title", ['5" pipe', '"']),
        Odd("inch.csv", rows('tv 27"', "x", '5" pipe'), "title", ['tv 27"', "x", '5" pipe']),
        Odd("one_inch.csv", rows('tv 27"', "x"), "title", ['tv 27"', "x"]),
        Odd("inch_first.csv", rows('"5 inch', "x"), "title", ['"5 inch', "x"], noted="--quote"),
        Odd("inch_in_quotes.csv", rows('"5" pipe"', '"a, b"'), "title", "row 1"),
        Odd("unclosed.csv", rows('"a, b"', '"5 inch', "x"), "title", "row 2"),
        Odd("swallowing.csv", SWALLOWING, "title", ["a", '"5 inch', "c", '27"', "d"]),
        Odd("apostrophes.csv", rows("'a, b'", "'c'"), "title", ["a, b", "c"], noted="--quote"),
        Odd("apostrophe_cell.csv", rows("'a, b'", "x"), "title", ["a, b", "x"], noted="--quote"),
        Odd("single_apostrophe.csv", rows("it's", "'tis"), "title", ["it's", "'tis"]),
        Odd("quoted_all.csv", rows('"a"', '"b"').replace("pin", '"pin"'), "title", ["a", "b"]),
        Odd("multiline.csv", MULTILINE, "title", ["two\nlines, one, cell", "b"]),
        Odd("quoted_crlf.csv", rows('"a\r\nb"', "c"), "title", ["a\r\nb", "c"]),
        Odd("triple.csv", rows('"""a"""', "b"), "title", ['"a"', "b"]),
        Odd("header_quote.csv", 'id,entity_type,ti"tle\np0,pin,a\np1,pin,b"\n', "id", "filter"),
        Odd("header_open.csv", 'id,entity_type,"title\np0,pin,a\n', "id", "header"),
        Odd("told_none.csv", rows('"5', "x"), "title", ['"5', "x"], text(quote="none")),
        Odd("told_escape.csv", rows(r'"^"a^""'), "title", ['"a"'], text(escape="^")),
        # line ends and blank lines
        Odd("cr.csv", rows("a", "b", end="\r"), "title", ["a", "b"]),
        Odd("crlf.csv", rows("a", "b", end="\r\n"), "title", ["a", "b"]),
        Odd("crcrlf.csv", rows("a", "b", end="\r\r\n"), "title", ["a", "b"]),
        Odd("mixed_ends.csv", rows("a", "b") + "p9,pin,z,9\r", "title", ["a", "b", "z"]),
        Odd("blank_last.csv", rows("a", "b") + "\n\n", "title", ["a", "b"]),
        Odd("blank_between.csv", rows("a") + "\n  \np9,pin,z,9\n", "title", ["a", "z"]),
        Odd("no_end.csv", rows("a", "b").rstrip(), "title", ["a", "b"]),
        Odd("ctrl_z.csv", rows("a") + "\x1a", "title", ["a"]),
        Odd("u2028.csv", rows("a\u2028b\x0bc\x85"), "title", ["a\u2028b\x0bc\x85"]),
        Odd("blank_first.csv", "\n\n" + rows("a"), "title", ["a"]),
        # the number of cells
        Odd("short.csv", rows("a") + "p1,pin\n", "title", "row 2: expected 4 cells, got 2"),
        Odd("long.csv", rows("a", "b,c"), "title", "row 2: expected 4 cells, got 5"),
        Odd("cut.csv", rows("a") + "p1,pi", "title", "row 2: expected 4 cells"),
        Odd("twice.csv", "id,entity_type,title,title\np0,pin,a,b\n", "title", "stands 2 times"),
        Odd("header_again.csv", rows("a") + HEADER, "title", "row 2"),
        # separators, comments, decimal commas
        Odd("semicolon.csv", rows("a", "b").replace(",", ";"), "price", [0, 1], noted="';'"),
        Odd("pipe.csv", rows("a").replace(",", "|"), "title", ["a"]),
        Odd("hive.csv", rows("a").replace(",", "\x01"), "title", ["a"]),
        Odd("tabs.csv", rows("a, b").replace("a, b", "ab").replace(",", "\t"), "title", ["ab"]),
        Odd("excel_sep.csv", "sep=;\n" + rows("a,b").replace(",", ";", 0).replace(
            "id,entity_type,title,price", "id;entity_type;title;price").replace(
            "p0,pin,a,b,0", "p0;pin;a,b;0"), "title", ["a,b"]),
        Odd("excel_sep2.csv", "sep=,\r\n" + rows("a", end="\r\n"), "title", ["a"]),
        Odd("told_sep.csv", rows("a").replace(",", "~"), "title", ["a"], text(separator="~")),
        Odd("german.csv", "id;entity_type;price\np0;pin;3,50\np1;pin;1.234,5\n", "price",
            [3.5, 1234.5], noted="decimal comma"),
        Odd("german_thousands.csv", "id;entity_type;price\np0;pin;3,50\np1;pin;1.234\n", "price",
            [3.5, 1234], noted="decimal comma"),
        Odd("point_and_comma.csv", "id;entity_type;price\np0;pin;3,50\np1;pin;0.234\n", "price",
            ["3,50", "0.234"]),
        Odd("german_text.csv", "id;entity_type;price\np0;pin;3,50\n", "price", ["3,50"],
            text(decimal_comma=False)),
        Odd("comma_quoted.csv", 'id,entity_type,price\np0,pin,"3,5"\n', "price", ["3,5"],
            noted="--decimal-comma"),
        Odd("told_comma.csv", 'id,entity_type,price\np0,pin,"3,5"\n', "price", [3.5],
            text(decimal_comma=True)),
        Odd("thousands.csv", 'id,entity_type,price\np0,pin,"1,500"\n', "price", ["1,500"]),
        Odd("comment.csv", "# exported 2026\n#by me\n" + rows("a"), "title", ["a"], noted="2 comm"),
        Odd("hash_header.csv", "#" + rows("a"), "id", ["p0"]),
        Odd("spaces.csv", 'id, entity_type, title\np0, pin, "a, b"\n', "title", ["a, b"]),
        Odd("spaces_quoted.csv", 'id, entity_type, title\np0, pin, "Oh, ""hi"""\np1, pin, "a, "\n',
            "title", ['Oh, "hi"', "a, "]),
        Odd("spaces_escape.csv", 'id, entity_type, title\np0, pin, "Oh, \\"hi\\""\np1, pin, x\n',
            "title", ['Oh, "hi"', "x"]),
        Odd("spaces_inch.csv", 'id, entity_type, title\np0, pin, "5 inch\np1, pin, "a, b"\n',
            "title", "row 1"),
        Odd("wide_header.csv", "id,entity_type," + "x" * 140_000 + "\np0,pin,a\n", "id", "header"),
        Odd("renamed_twice.csv", "a,b,entity_type\np0,p1,pin\n", "id", "both columns",
            text(rename={"a": "id", "b": "id"})),
        Odd("pandas_index.csv", ",id,entity_type\n0,p0,pin\n", "id", ["p0"], noted="without"),
        Odd("pandas_index2.csv", "Unnamed: 0,id,entity_type\n0,p0,pin\n", "id", ["p0"]),
        Odd("odd_name.csv", "id,entity_type,my col\np0,pin,1\n", "id", "--rename"),
        Odd("renamed.csv", "id,entity_type,my col\np0,pin,1\n", "mine", [1],
            text(rename={"my col": "mine"})),
        Odd("mapped.csv", "sku,name\np0,a\n", "entity_type", ["product"],
            text(rename={"sku": "id", "name": "title"}, constants={"entity_type": "product"})),
        Odd("postgres.tsv", POSTGRES, "tags", ["red\tcar", None], noted="escapes"),
        Odd("inch.tsv", tsv('p0\tpin\ttv 27"', 'p1\tpin\t"5 inch'), "title", ['tv 27"', '"5 inch']),
        Odd("null.csv", rows(r"\N", "a"), "title", [None, "a"]),
        # encodings
        Odd("bom.csv", "\ufeff" + rows("Käse"), "title", ["Käse"]),
        Odd("utf16.csv", rows("Käse").encode("utf-16"), "title", ["Käse"]),
        Odd("utf16.jsonl", (PIN + '"Käse"}\n').encode("utf-16"), "title", ["Käse"]),
        Odd("latin.csv", rows("Käse").encode("latin-1"), "title", "line 2: byte 0xe4"),
        Odd("told_latin.csv", rows("Käse").encode("cp1252"), "title", ["Käse"],
            text(encoding="cp1252")),
        Odd("utf16_bare.csv", rows("a").encode("utf-16-le"), "title", "NUL"),
        Odd("told_utf16_bare.csv", rows("a").encode("utf-16-le"), "title", "utf-16-le",
            text(encoding="utf-16")),
        Odd("packed.csv.gz", gzip.compress(rows("a").encode()), "title", ["a"]),
        Odd("packed.csv", gzip.compress(rows("a").encode()), "title", ["a"]),
        Odd("plain.csv.gz", rows("a"), "title", ["a"]),
        Odd("two.csv.gz", gzip.compress(rows("a").encode()) + gzip.compress(b"p9,pin,z,9\n"),
            "title", ["a", "z"]),
        Odd("cut.csv.gz", gzip.compress(rows("a").encode())[:-9], "title", "complete"),
        Odd("empty.csv", "", "title", "needs the column|no rows"),
        Odd("white.csv", "  \n \n", "title", "needs the column|no rows"),
        Odd("sheet.xlsx", b"PK\x03\x04", "title", "unknown format.*CSV"),
        # JSON Lines
        Odd("half.jsonl", PIN + r'"x\ud83d"}' + "\n", "title", "row 1.*surrogate"),
        Odd("half_id.jsonl", r'{"id":"x\udc00y","entity_type":"pin"}' + "\n", "id", "surrogate"),
        Odd("pair.jsonl", PIN + r'"\ud83d\ude00"}' + "\n", "title", ["😀"]),
        Odd("deep.jsonl", PIN + '"a"}\n' + DEEP, "title", "row 2.*levels"),
        Odd("array.jsonl", '[{"id":"p0","entity_type":"pin"}]\n', "id", "jq"),
        Odd("spark.json", PIN + '"a"}\n', "title", ["a"]),
        Odd("blank.jsonl", PIN + '"a"}\n\n  \n', "title", ["a"]),
        Odd("cut.jsonl", PIN + '"a"}\n' + PIN, "title", "row 2: not valid JSON"),
        Odd("nul.jsonl", PIN + r'"a\u0000"}' + "\n", "title", "NUL"),
        Odd("object.jsonl", PIN + '"a","meta":{"x":1}}\n', "title", ["a"], noted="meta"),
        # typed files
        Odd("z.parquet", zoned("Z"), "seen", NOON),
        Odd("offset.parquet", zoned("+05:30"), "seen", NOON),
        Odd("utc2.parquet", zoned("UTC+2"), "seen", NOON),
        Odd("berlin.parquet", zoned("Europe/Berlin"), "seen", NOON),
        Odd("dec256.parquet", parquet(x=pa.array([decimal.Decimal("1.5")], pa.decimal256(50, 2))),
            "x", [1.5]),
        Odd("dec_id.parquet", parquet(id=pa.array([decimal.Decimal(2**60)], pa.decimal128(38, 0))),
            "id", [str(2**60)]),
        Odd("half.parquet", parquet(x=pa.array(np.array([1.5], "float16"))), "x", [1.5]),
        Odd("dict.parquet", parquet(x=pa.array(["a"]).dictionary_encode()), "x", ["a"]),
        Odd("view.parquet", parquet(x=pa.array(["a"], pa.string_view())), "x", ["a"]),
        Odd("u64.parquet", parquet(x=pa.array([2**64 - 1], pa.uint64())), "x", "64 bits"),
        Odd("struct.parquet", parquet(x=pa.array([{"a": 1}])), "id", ["p0"], noted="left out"),
        Odd("map.parquet", parquet(x=pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32()))),
            "id", ["p0"], noted="left out"),
        Odd("binary.parquet", parquet(x=pa.array([b"\xff"])), "id", ["p0"], noted="left out"),
        Odd("flags.parquet", parquet(x=pa.array([[True]])), "id", ["p0"], noted="left out"),
        Odd("dates.parquet", parquet(x=pa.array([[dt.date(2024, 1, 1)]])), "id", ["p0"]),
        Odd("row.parquet", parquet(__row=pa.array([1])), "id", "__row"),
        Odd("my col.parquet", parquet(**{"my col": pa.array([1])}), "id", "--rename"),
        Odd("bad_text.parquet", parquet(x=pa.array([b"k\xe4se"]).view(pa.string())), "x", "x"),
        Odd("cut.parquet", b"PAR1abc", "id", "complete"),
        Odd("zone.arrow", arrow(seen=pa.array(NOON, pa.timestamp("ms", "Z"))), "seen", NOON),
        Odd("a[1].parquet", parquet(title=pa.array(["right"])), "title", ["right"]),
        Odd("a*b?.csv", rows("right"), "title", ["right"]),
        Odd("{x}.arrow", arrow(title=pa.array(["right"])), "title", ["right"]),
        # lists
        Odd("python_list.jsonl", PIN + '''"a","board_titles":"['red', 'sea']"}\n''',
            "board_titles", [["red", "sea"]]),
        Odd("postgres_list.jsonl", PIN + r'''"a","board_titles":"{red,\"blue sea\"}"}''' + "\n",
            "board_titles", [["red", "blue sea"]]),
        Odd("numpy_list.jsonl", PIN + '''"a","board_titles":"['red' 'sea']"}\n''',
            "board_titles", "JSON list"),
        Odd("broken_list.jsonl", PIN + '"a","board_titles":"[red, sea"}\n', "id", "JSON list"),
        Odd("lines_in_list.jsonl", PIN + r'"a","board_titles":"{red\nsea}"}' + "\n", "id",
            "JSON list"),
        Odd("long_list.jsonl", PIN + '"a","board_titles":"{' + "x" * 140_000 + '}"}\n', "id",
            "JSON list"),
    ]  # fmt: skip


CASES = {case.name: case for case in cases()}


def put(case: Odd, folder: Path) -> Path:
    path = folder / case.name
    if callable(case.content):
        case.content(path)
    else:
        content = case.content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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
    streamed = pl.concat(stream_catalogue([path], reading=case.options, chunk_rows=1))
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
