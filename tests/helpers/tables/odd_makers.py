"""Make odd files: what a case is, and how text, Parquet and Arrow files of one are written."""

from __future__ import annotations

import datetime as dt
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from encoders.tables.reading_options import ReadingOptions

HEADER = "id,entity_type,title,price\n"
PIN = '{"id":"p0","entity_type":"pin","title":'
Write = Callable[[Path, str], None]
"""Writes a file or folder; its ids begin with the text."""


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
    pack: Callable[[str], bytes] = str.encode
    """Makes the bytes of a text."""


def rows(*titles: str, end: str = "\n") -> str:
    """A CSV whose titles are written as they stand here."""
    lines = [HEADER.strip(), *(f"p{n},pin,{title},{n}" for n, title in enumerate(titles))]
    return end.join(lines) + end


def tsv(*lines: str) -> str:
    return "\n".join(["id\tentity_type\ttitle", *lines]) + "\n"


def parquet(**columns: pa.Array) -> Write:
    def write(path: Path, ids: str = "p") -> None:
        count = len(next(iter(columns.values())))
        base = {"id": pa.array([f"{ids}{n}" for n in range(count)]), "entity_type": ["pin"] * count}
        pq.write_table(pa.table({**base, **columns}), path)

    return write


def arrow(**columns: pa.Array) -> Write:
    def write(path: Path, ids: str = "p") -> None:
        table = pa.table({"id": [f"{ids}0"], "entity_type": ["pin"], **columns})
        pyarrow.feather.write_feather(table, path)

    return write


INTEGERS = {
    "i8": pa.int8(),
    "i16": pa.int16(),
    "i32": pa.int32(),
    "i64": pa.int64(),
    "u8": pa.uint8(),
    "u16": pa.uint16(),
    "u32": pa.uint32(),
    "u64": pa.uint64(),
}


def packed_parquet(path: Path, ids: str) -> None:
    table = pa.table({"id": [f"{ids}0"], "entity_type": ["pin"], "title": ["a"]})
    pq.write_table(table, path, compression="zstd")


def hive(path: Path, ids: str) -> None:
    for n, country in enumerate(("AT", "DE")):
        folder = path / f"country={country}" / "day=2026-01-31"
        folder.mkdir(parents=True)
        parquet(id=pa.array([f"{ids}{n}"]), title=pa.array([f"red barn {n}"]))(
            folder / "part.parquet"
        )


def encoded(encoding: str) -> Callable[[str], bytes]:
    return lambda text: text.encode(encoding)


def gz(text: str) -> bytes:
    return gzip.compress(text.encode())


def zst(text: str) -> bytes:
    return bytes(pa.compress(text.encode(), "zstd", asbytes=True))


def in_two(pack: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """Packs the last line apart, as a second member."""

    def packed(text: str) -> bytes:
        *first, last = text.splitlines(keepends=True)
        return pack("".join(first)) + pack(last)

    return packed


def zoned(zone: str) -> Write:
    moment = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
    return parquet(seen=pa.array([moment], pa.timestamp("us", zone)))
