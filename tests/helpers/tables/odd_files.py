"""Files that Spark, pandas, MySQL, Postgres, Excel and BigQuery write, with a verdict each."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from encoders.tables.reading_options import ReadingOptions
from tests.helpers.tables.odd_exports import exports
from tests.helpers.tables.odd_makers import (
    HEADER,
    INTEGERS,
    PIN,
    Odd,
    arrow,
    encoded,
    gz,
    hive,
    in_two,
    packed_parquet,
    parquet,
    rows,
    tsv,
    zoned,
    zst,
)

_ID = re.compile(r"(?<!\w)p(?=\d)")
GERMAN = "id;entity_type;title;price\r\np0;pin;Käse;3,50\r\np1;pin;Öl, fein;1.234,50\r\n"
NOON = [dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)]
DEEP = '{"id":"p0","entity_type":"pin","x":' + "[" * 3000 + "]" * 3000 + "}\n"
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
        Odd("utf16.csv", rows("Käse"), "title", ["Käse"], pack=encoded("utf-16")),
        Odd("utf16.jsonl", PIN + '"Käse"}\n', "title", ["Käse"],
            pack=encoded("utf-16")),
        Odd("latin.csv", rows("Käse").encode("latin-1"), "title", "line 2: byte 0xe4"),
        Odd("told_latin.csv", rows("Käse"), "title", ["Käse"],
            text(encoding="cp1252"), pack=encoded("cp1252")),
        Odd("utf16_bare.csv", rows("a").encode("utf-16-le"), "title", "NUL"),
        Odd("told_utf16_bare.csv", rows("a").encode("utf-16-le"), "title", "utf-16-le",
            text(encoding="utf-16")),
        Odd("packed.csv.gz", rows("a"), "title", ["a"], pack=gz),
        Odd("packed.csv", rows("a"), "title", ["a"], pack=gz),
        Odd("plain.csv.gz", rows("a"), "title", ["a"]),
        Odd("two.csv.gz", rows("a") + "p9,pin,z,9\n", "title", ["a", "z"], pack=in_two(gz)),
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
        Odd("dates.parquet", parquet(days=pa.array([[dt.date(2024, 1, 1)]])), "id", ["p0"]),
        Odd("row.parquet", parquet(__row=pa.array([1])), "id", "__row"),
        Odd("my col.parquet", parquet(**{"my col": pa.array([1])}), "id", "--rename"),
        Odd("bad_text.parquet", parquet(x=pa.array([b"k\xe4se"]).view(pa.string())), "x", "x"),
        Odd("cut.parquet", b"PAR1abc", "id", "complete"),
        Odd("zone.arrow", arrow(seen=pa.array(NOON, pa.timestamp("ms", "Z"))), "seen", NOON),
        Odd("a[1].parquet", parquet(title=pa.array(["right"])), "title", ["right"]),
        Odd("a*b?.csv", rows("right"), "title", ["right"]),
        Odd("{x}.arrow", arrow(title=pa.array(["right"])), "title", ["right"]),
        # the exports that people have: Excel, MySQL, Spark, pandas, BigQuery
        Odd("excel_1252.csv", GERMAN, "title", ["Käse", "Öl, fein"],
            text(encoding="cp1252"), noted="decimal comma", pack=encoded("cp1252")),
        Odd("excel_unicode.tsv", tsv("p0\tpin\tKäse", "p1\tpin\tÖl"), "title",
            ["Käse", "Öl"], pack=encoded("utf-16")),
        Odd("mysql_dump.tsv", tsv(r"p0 pin a\tb", r"p1 pin \N").replace(" ", "\t"), "title",
            ["a\tb", None]),
        Odd("spark_parts", hive, "country", ["AT", "DE"]),
        Odd("packed.csv.zst", rows("a", "b"), "title", ["a", "b"], pack=zst),
        Odd("packed.jsonl.zst", PIN + '"a"}\n', "title", ["a"], pack=zst),
        Odd("two.csv.zst", rows("a") + "p9,pin,z,9\n", "title", ["a", "z"],
            pack=in_two(zst)),
        Odd("cut.csv.zst", zst(rows("a" * 500, "b"))[:-9], "title", "complete"),
        Odd("ints.parquet", parquet(**{n: pa.array([1, 2], k) for n, k in INTEGERS.items()}), "u8",
            [1, 2]),
        Odd("decimal.parquet", parquet(x=pa.array([decimal.Decimal("9.95")])), "x", [9.95]),
        Odd("large.parquet", parquet(title=pa.array(["a"], pa.large_string()),
            board_titles=pa.array([["b"]], pa.large_list(pa.large_string()))), "title", ["a"]),
        Odd("zstd.parquet", packed_parquet, "title", ["a"]),
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


CASES = {case.name: case for case in (*cases(), *exports())}


def put(case: Odd, folder: Path, ids: str = "p") -> Path:
    """Write a file of a case; its ids begin with ``ids``."""
    path = folder / case.name
    if callable(case.content):
        case.content(path, ids)
    elif isinstance(case.content, bytes):
        path.write_bytes(case.content)
    else:
        path.write_bytes(case.pack(_ID.sub(ids, case.content)))
    return path
