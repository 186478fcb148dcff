"""Read text files in blocks of UTF-8, plain or packed, from any encoding that was named."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from encoders.errors import DataError, RowError

BLOCK_BYTES = 8 << 20
_UNPACK = "Unpack it first; of packed files gzip and Zstandard are read."
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_NO_TEXT = {
    b"PK\x03\x04": ("a ZIP archive, as Excel's .xlsx is", "Save the sheet as CSV, or unpack it."),
    b"BZh": ("packed with bzip2", _UNPACK),
    b"\xfd7zXZ": ("packed with xz", _UNPACK),
    b"PAR1": ("a Parquet file", "Call it {stem}.parquet."),
    b"ARROW1": ("an Arrow file", "Call it {stem}.arrow."),
}
"""First bytes of files that are no text -> what they are, and what to do."""


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked where its first bytes are those of gzip or Zstandard."""
    with open(path, "rb") as file:
        first = file.read(4)
    if first.startswith(_GZIP):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if first == _ZSTD:
        return cast(IO[bytes], pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return open(path, "rb")


def text_blocks(path: Path, encoding: str, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Yield a file's text as UTF-8 bytes, without a byte order mark.

    Raises:
        RowError: Bytes are not of the encoding, or the text holds a NUL byte; names the line.
        DataError: The encoding is unknown or lacks its byte order, or the file cannot be read or is
            no text.
    """
    name = path.name
    try:
        with open_bytes(path) as file:
            yield from _decoded(file, name, encoding, size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read ({error}). Is the file complete?") from error


def _decoded(file: IO[bytes], name: str, encoding: str, size: int) -> Iterator[bytes]:
    block = file.read(size)
    for first, (found, fix) in _NO_TEXT.items():
        if block.startswith(first) and not block.isascii():
            stem = name.partition(".")[0]
            raise DataError(f"{name}: expected text, got {found}. {fix.format(stem=stem)}")
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and encoding == "utf-8":
        encoding = "utf-16"
    block = block.removeprefix(codecs.BOM_UTF8)
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError as error:
        raise DataError(
            f"unknown encoding {encoding!r}. Try utf-8, latin-1, cp1252, shift_jis, ..."
        ) from error
    line = 1
    while True:
        following = file.read(size) if block else b""
        try:
            text = decoder.decode(block, final=not following)
        except UnicodeDecodeError as error:
            raise _not_of_encoding(error, name, encoding, line) from error
        except UnicodeError as error:  # of UTF-16 and UTF-32 without a byte order mark
            raise DataError(
                f"{name}: expected {encoding} with a byte order mark, got none. Name the byte"
                f" order: --encoding {encoding}-le or {encoding}-be."
            ) from error
        utf8 = text.encode("utf-8", "surrogatepass")
        if b"\0" in utf8:
            at = line + utf8.count(b"\n", 0, utf8.index(b"\0"))
            raise RowError(
                f"{name}: line {at}: text holds a NUL byte. Remove the NUL bytes; was the file"
                " exported as UTF-16?"
            )
        line += utf8.count(b"\n")
        if utf8:
            yield utf8
        if not following:
            return
        block = following


def _not_of_encoding(error: UnicodeDecodeError, name: str, encoding: str, line: int) -> RowError:
    raw = error.object
    at = line + raw.count(b"\n", 0, error.start)
    around = raw[max(0, error.start - 15) : error.end + 15]
    return RowError(
        f"{name}: line {at}: byte 0x{raw[error.start]:02x} is not {encoding}, got {around!r}. Name"
        " the real encoding with --encoding (latin-1, cp1252, shift_jis, ...), or repair the line"
        " if the file mixes encodings."
    )
