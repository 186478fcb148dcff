"""Files as the programs themselves write them: types, names, numbers and folders of exports."""

from __future__ import annotations

import bz2
import datetime as dt
import decimal
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from encoders.tables.reading_options import ReadingOptions
from tests.helpers.tables.odd_makers import HEADER, PIN, Odd, Write, arrow, gz, parquet, rows

_NOON = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
_NAIVE = _NOON.replace(tzinfo=None)
_NAN = float("nan")
_ODD_IDS = ["a b/c", "x,y", "ü/ä?=&%", "😀", "../../etc", "a\nb", " padded ", "007", "1.0", "null"]
_PIN1 = PIN.replace("p0", "p1")


def written(write: Callable[[pl.DataFrame, Path], object], **columns: Any) -> Write:
    """A file that polars writes."""

    def put(path: Path, ids: str) -> None:
        count = len(next(iter(columns.values())))
        names = pl.Series("id", [f"{ids}{n}" for n in range(count)])
        write(pl.DataFrame({"id": names, "entity_type": ["pin"] * count, **columns}), path)

    return put


def framed(write: Callable[[pd.DataFrame, Path], object], **columns: Any) -> Write:
    """A file that pandas writes."""

    def put(path: Path, ids: str) -> None:
        count = len(next(iter(columns.values())))
        frame = {"id": [f"{ids}{n}" for n in range(count)], "entity_type": "pin", **columns}
        write(pd.DataFrame(frame), path)

    return put


def folder(parts: Mapping[str, str | bytes | Write]) -> Write:
    """A folder of part files; ``p0`` in their texts is the first id."""

    def put(path: Path, ids: str) -> None:
        for name, content in parts.items():
            part = path / name
            part.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(part, f"{ids}{name[0]}")
            elif isinstance(content, str):
                part.write_text(content.replace("p0", f"{ids}{name[0]}0"))
            else:
                part.write_bytes(content)

    return put


def listed(*values: Any, of: pa.DataType) -> Write:
    return parquet(xs=pa.array(values, pa.list_(of)))


def zipped(text: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", text)
    return packed.getvalue()


def table_bytes() -> bytes:
    packed = io.BytesIO()
    pq.write_table(pa.table({"id": ["p0"], "entity_type": ["pin"]}), packed)
    return packed.getvalue()


def feather_stream(path: Path, ids: str) -> None:
    table = pa.table({"id": [f"{ids}0"], "entity_type": ["pin"], "title": ["a"]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def int96(path: Path, ids: str) -> None:
    table = pa.table({"id": [f"{ids}0"], "entity_type": ["pin"], "seen": pa.array([_NAIVE])})
    pq.write_table(table, path, use_deprecated_int96_timestamps=True, compression="snappy")


def polars_types(frame: pl.DataFrame, path: Path) -> None:
    kinds = [pl.col("shop").cast(pl.Categorical), pl.col("kind").cast(pl.Enum(["a", "b"]))]
    typed = frame.with_columns(*kinds, pl.col("pair").cast(pl.Array(pl.Int8, 2)))
    typed.write_parquet(path) if path.suffix == ".parquet" else typed.write_ipc(path)


def exports() -> list[Odd]:
    text = ReadingOptions
    pin = text(constants={"entity_type": "pin"})
    decimals = [decimal.Decimal("9.95"), None]
    return [
        # Excel and its like
        Odd("excel_utf8.csv", "\ufeffid;entity_type;title\r\np0;pin;Käse\r\n", "title", ["Käse"]),
        Odd("excel_empty_columns.csv", "id;entity_type;title;;\np0;pin;a;;\n", "title", ["a"],
            noted="without a name"),
        Odd("excel_empty_rows.csv", "id;entity_type;title\np0;pin;a\n;;\n", "id", "row 2"),
        Odd("excel_formula.csv", 'id,entity_type,code\np0,pin,"=""007"""\n', "code", ['="007"']),
        Odd("excel_errors.csv", "id,entity_type,n\np0,pin,#N/A\np1,pin,2\np2,pin,3\n", "n",
            ["#N/A", "2", "3"], noted="stays text"),
        Odd("excel_truth.csv", "id,entity_type,x\np0,pin,TRUE\np1,pin,FALSE\n", "x", [True, False]),
        Odd("sheet_as.csv", zipped("<x/>"), "id", "ZIP.*Save the sheet as CSV"),
        Odd("bz2_as.csv", bz2.compress(rows("a").encode()), "id", "bzip2.*Unpack"),
        Odd("parquet_as.csv", table_bytes(), "id", "Parquet.*parquet_as.parquet"),
        Odd("csv_as.parquet", rows("a"), "id", "not a parquet file"),
        Odd("packed.csv.bz2", bz2.compress(rows("a").encode()), "id", "Unpack it first"),
        Odd("page.csv", "<html><body>Sign in</body></html>\n", "id", "column.*html"),
        # one column, no rows, a wide or long cell
        Odd("one_column.csv", "id\np0\n\np1\n", "id", ["p0", "p1"], pin),
        Odd("one_column_alone.csv", "id\np0\n", "id", "column.*entity_type"),
        Odd("header_only.csv", HEADER, "id", "no rows"),
        Odd("no_rows.parquet", parquet(id=pa.array([], pa.string())), "id", "no rows"),
        Odd("no_header.csv", "p0,pin,a\np1,pin,b\n", "id", "column.*p0"),
        Odd("wide.csv", "id,entity_type," + ",".join(f"c{n}" for n in range(300)) + "\np0,pin"
            + ",1" * 300 + "\n", "c299", [1]),
        Odd("long_cell.csv", f'id,entity_type,notes\np0,pin,"{"x, " * 40_000}"\n', "notes",
            ["x, " * 40_000]),
        Odd("long_title.csv", rows("x" * 100_001), "id", "longer than 100,000"),
        Odd("long_id.csv", f"id,entity_type\n{'x' * 1025},pin\n", "id", "longer than 1,024"),
        # names and ids
        Odd("upper.csv", rows("a").replace("id,entity_type", "ID,ENTITY_TYPE"), "id", "column.*ID"),
        Odd("two_cases.csv", "id,entity_type,Title,title\np0,pin,a,b\n", "title", ["b"]),
        Odd("accented.csv", "id,entity_type,größe\np0,pin,1\n", "größe", [1]),
        Odd("words.csv", "id,entity_type,and,score,in\np0,pin,1,2,3\n", "score", [2]),
        Odd("point.csv", "id,entity_type,a.b\np0,pin,1\n", "id", "--rename a.b=a_b"),
        Odd("ids.jsonl", "".join(json.dumps({"id": i, "entity_type": "pin"}) + "\n"
            for i in _ODD_IDS), "id", _ODD_IDS),
        Odd("decomposed.csv", "id,entity_type\ncafe\u0301,pin\n", "id", ["café"], noted="NFC"),
        Odd("both_forms.csv", "id,entity_type,title\ncafe\u0301,pin,a\ncafé,pin,b\n", "id",
            "repeats with different content"),
        Odd("int_ids.parquet", parquet(id=pa.array([41, 42], pa.int32())), "id", ["41", "42"]),
        Odd("float_ids.parquet", parquet(id=pa.array([43.0, 44.0])), "id", ["43", "44"]),
        Odd("dict_ids.parquet", parquet(id=pa.array(["d0", "d1"]).dictionary_encode()), "id",
            ["d0", "d1"]),
        Odd("null_ids.parquet", parquet(id=pa.array(["p0", None])), "id", "row 2.*required"),
        Odd("binary_ids.parquet", parquet(id=pa.array([b"p0"])), "id", "should hold text"),
        # numbers
        Odd("nan.csv", "id,entity_type,x\np0,pin,NaN\np1,pin,1.5\np2,pin,2\n", "x",
            ["NaN", "1.5", "2"], noted="stays text"),
        Odd("nan.parquet", parquet(x=pa.array([_NAN, float("inf"), 1.5])), "id",
            ["p0", "p1", "p2"]),
        Odd("nan32.parquet", parquet(x=pa.array([_NAN, 1.5], pa.float32())), "id", ["p0", "p1"]),
        Odd("nan.jsonl", f'{PIN}"a","x":NaN}}\n{_PIN1}"b","x":1.5}}\n', "title", ["a", "b"]),
        Odd("large.jsonl", PIN + '"a","x":18446744073709551615}\n', "x", "64 bits"),
        Odd("u64_small.parquet", parquet(x=pa.array([5], pa.uint64())), "x", [5]),
        Odd("u64_list.parquet", listed([2**64 - 1], of=pa.uint64()), "xs", "64 bits"),
        Odd("int_list.parquet", listed([1, None], [], None, of=pa.int8()), "xs",
            [[1, None], [], None]),
        Odd("half_list.parquet", listed(np.array([1.5], "float16"), of=pa.float16()), "xs",
            [[1.5]]),
        Odd("dec32.parquet", parquet(x=pa.array(decimals, pa.decimal32(5, 2))), "x", [9.95, None]),
        Odd("dec128.parquet", parquet(x=pa.array(decimals, pa.decimal128(38, 10))), "x",
            [9.95, None]),
        Odd("dec_negative.arrow", arrow(x=pa.array([decimal.Decimal(1200)],
            pa.decimal128(5, -2))), "x", [1200]),
        Odd("dec_huge.parquet", parquet(x=pa.array([decimal.Decimal(10**30)])), "x",
            [str(10**30)]),
        Odd("mixed_numbers.jsonl", f'{PIN}"a","x":1}}\n{_PIN1}"b","x":1.5}}\n', "x", [1.0, 1.5]),
        Odd("mixed_texts.jsonl", f'{PIN}"a","x":1}}\n{_PIN1}"b","x":"XL"}}\n', "x", ["1", "XL"]),
        Odd("mixed_lists.jsonl", f'{PIN}"a","x":1}}\n{_PIN1}"b","x":[1]}}\n', "x", "list"),
        # dictionaries, lists and other types
        Odd("dict_ints.parquet", parquet(x=pa.array([1, 2]).dictionary_encode()), "x", [1, 2]),
        Odd("dict_nulls.parquet", parquet(x=pa.array(["a", None]).dictionary_encode()), "x",
            ["a", None]),
        Odd("dict_large.arrow", arrow(x=pa.array(["a"], pa.large_string()).dictionary_encode()),
            "x", ["a"]),
        Odd("list_view.parquet", parquet(xs=pa.array([["a"], None, ["b", "c"], []],
            pa.list_view(pa.string()))), "xs", [["a"], None, ["b", "c"], []]),
        Odd("fixed_list.parquet", parquet(xs=pa.array([[1.5, 2.5]], pa.list_(pa.float32(), 2))),
            "xs", [[1.5, 2.5]]),
        Odd("large_list.arrow", arrow(xs=pa.array([["a", None]], pa.large_list(pa.string()))),
            "xs", [["a", None]]),
        Odd("nested_list.parquet", listed([["a"]], of=pa.list_(pa.string())), "id", ["p0"],
            noted="left out"),
        Odd("records.parquet", listed([{"a": 1}], of=pa.struct({"a": pa.int64()})), "id", ["p0"],
            noted="left out"),
        Odd("empty_lists.jsonl", PIN + '"a","xs":[]}\n', "xs", [[]]),
        Odd("nulls.parquet", parquet(x=pa.nulls(2)), "x", [None, None]),
        Odd("truth.parquet", parquet(truth=pa.array([True, None])), "truth", [True, None]),
        Odd("days.parquet", parquet(day=pa.array([dt.date(2024, 5, 1)])), "day",
            [dt.date(2024, 5, 1)]),
        Odd("clock.parquet", parquet(time_of_day=pa.array([dt.time(12)])), "time_of_day",
            [dt.time(12)]),
        Odd("duration.parquet", parquet(lasts=pa.array([dt.timedelta(1)])), "lasts",
            [dt.timedelta(1)]),
        Odd("naive_ms.arrow", arrow(naive=pa.array([_NAIVE], pa.timestamp("ms"))), "naive",
            [_NAIVE]),
        Odd("zoned_ns.parquet", parquet(seen=pa.array([_NOON], pa.timestamp("ns", "Asia/Tokyo"))),
            "seen", [_NOON]),
        Odd("run_ends.arrow", arrow(x=pa.RunEndEncodedArray.from_arrays([1], ["a"])), "x",
            "cannot be read"),
        Odd("uuid.parquet", parquet(x=pa.array([b"0123456789abcdef"], pa.uuid())), "id", ["p0"],
            noted="left out"),
        # writers
        Odd("spark_int96.parquet", int96, "seen", [_NAIVE]),
        Odd("stream.arrow", feather_stream, "title", ["a"]),
        Odd("lz4.feather", arrow(title=pa.array(["a"])), "title", ["a"]),
        Odd("pandas.parquet", framed(lambda frame, path: frame.to_parquet(path),
            title=pd.Categorical(["a", "b"]), n=pd.array([1, None], "Int32")), "n", [1, None]),
        Odd("pandas_index.parquet", framed(
            lambda frame, path: frame.set_index("id").to_parquet(path), title=["a", "b"]),
            "title", ["a", "b"]),
        Odd("pandas_index3.csv", framed(lambda frame, path: frame.to_csv(path), title=["a"]),
            "title", ["a"], noted="without a name"),
        Odd("pandas_records.json", framed(
            lambda frame, path: frame.to_json(path, orient="records"), title=["a"]), "id", "jq"),
        Odd("polars.csv", written(pl.DataFrame.write_csv, title=['a "b", c'], x=[1e-7]), "x",
            [1e-7]),
        Odd("polars.ndjson", written(pl.DataFrame.write_ndjson, labels=[["a"]], seen=[_NOON]),
            "labels", [["a"]]),
        Odd("polars.parquet", written(polars_types, shop=["s"], kind=["b"], pair=[[1, 2]]),
            "kind", ["b"]),
        Odd("polars.arrow", written(polars_types, shop=["s"], kind=["b"], pair=[[1, 2]]),
            "shop", ["s"]),
        Odd("duckdb.csv", 'id,entity_type,tags,n\np0,pin,"[red, blue]",\np1,pin,[],5\n', "n",
            [None, 5]),
        Odd("bigquery.json", PIN + '"a","n":"12","seen":"2024-05-01 12:00:00 UTC"}\n', "n", ["12"]),
        # JSON Lines
        Odd("bom_crlf.jsonl", f'\ufeff{PIN}"a"}}\r\n{_PIN1}"b"}}\r\n', "title", ["a", "b"]),
        Odd("pretty.json", json.dumps({"id": "p0"}, indent=1), "id", "row 1: not valid JSON"),
        Odd("late_column.jsonl", f'{PIN}"a"}}\n{_PIN1}"b","x":"late"}}\n', "x", [None, "late"]),
        Odd("number_title.jsonl", PIN + "1984}\n", "title", ["1984"]),
        Odd("null_in_list.jsonl", PIN + '"a","board_titles":["x",null,"y"]}\n', "title", ["a"]),
        # folders
        Odd("run[2]", folder({"_SUCCESS": "", ".0.crc": b"x", "0.parquet":
            parquet(title=pa.array(["a"])), "1.parquet": parquet(title=pa.array(["b"]))}),
            "title", ["a", "b"]),
        Odd("formats", folder({"a.csv": rows("a"), "b.jsonl": PIN + '"b","price":2.5}\n',
            "c.parquet": parquet(price=pa.array([3], pa.int8()))}), "price", [0, 2.5, 3]),
        Odd("widths", folder({"a.parquet": parquet(x=pa.array([1], pa.int8())),
            "b.parquet": parquet(x=pa.array([2], pa.int64()))}), "x", [1, 2]),
        Odd("kinds", folder({"a.parquet": parquet(x=pa.array([1])),
            "b.parquet": parquet(x=pa.array(["XL"]))}), "x", ["1", "XL"]),
        Odd("list_and_text", folder({"a.parquet": listed([1], of=pa.int64()),
            "b.parquet": parquet(xs=pa.array(["XL"]))}), "xs", "'xs' holds lists.*b.parquet"),
        Odd("zoned_and_naive", folder({"a.parquet": parquet(seen=pa.array([_NOON])),
            "b.parquet": parquet(seen=pa.array([_NAIVE]))}), "seen", [_NOON, _NOON]),
        Odd("some_empty", folder({"a.csv": "", "b.csv": HEADER, "c.csv": rows("a")}), "title",
            ["a"], noted="empty"),
        Odd("packed_parts", folder({"a.csv.gz": gz(rows("a")), "b.csv.gz":
            gz(rows("b").replace("p0", "q0"))}), "title", ["a", "b"]),
        Odd("part_without_header", folder({"a.csv": rows("a"), "b.csv": "p0,pin,b,1\n"}), "id",
            "b.csv.*column"),
    ]  # fmt: skip
