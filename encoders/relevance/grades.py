"""Keep each judge's grades in a file that is whole after every save."""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import polars as pl

from encoders.errors import ConfigError, DataError
from encoders.relevance.sample import MAX_GRADE, Sample

JudgeKind = Literal["person", "model", "oracle"]
"""Who grades: a person, a language model, or the annotations of the data set."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@+-]{0,63}")
_COLUMNS = {
    "item": pl.Int64,
    "query": pl.String,
    "entity_id": pl.String,
    "grade": pl.Int64,
    "judge": pl.String,
    "kind": pl.String,
}


class GradeBook:
    """The grades of one judge: ``grades/JUDGE.jsonl`` of a sample, one open at a time.

    The file is also a table ``judgements`` for `omni evaluate`.
    """

    def __init__(self, sample: Sample, judge: str, kind: JudgeKind) -> None:
        """Open a judge's grades, and go on with those that are there.

        Args:
            sample: What is graded.
            judge: Name of the judge, of the file too.
            kind: Who grades.

        Raises:
            ConfigError: The name cannot be a file's, another process grades under it, or another
                kind of judge has it.
        """
        if not _NAME.fullmatch(judge):
            raise ConfigError(
                f"--judge {judge!r}: expected up to 64 letters a-z, digits, spaces and . _ @ + -,"
                " beginning with a letter or digit."
            )
        self.judge = judge
        self.kind = kind
        self._sample = sample
        self._path = sample.path / "grades" / f"{judge}.jsonl"
        self._lock = threading.Lock()
        self._held = _hold(self._path.with_name(f".{judge}.lock"), judge)
        rows = _read(self._path) if self._path.exists() else pl.DataFrame(schema=_COLUMNS)
        other = rows.filter(pl.col("kind") != kind)
        if other.height:
            self.close()
            raise ConfigError(
                f"the grades of {judge!r} are those of a judge of kind {other['kind'][0]!r}, not"
                f" {kind!r}. Choose another --judge."
            )
        self.grades: dict[int, int] = dict(rows.select("item", "grade").iter_rows())

    def __enter__(self) -> GradeBook:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let others grade under this name."""
        self.close()

    def close(self) -> None:
        """Let others grade under this name."""
        os.close(self._held)

    def save(self, changes: Mapping[int, int | None]) -> None:
        """Put grades on the disk; None takes a grade back.

        Args:
            changes: Grade by item.

        Raises:
            DataError: There is no such item or grade.
        """
        for item, grade in changes.items():
            if not 1 <= item <= self._sample.items.height:
                raise DataError(
                    f"there is no item {item}: items are 1 to {self._sample.items.height}."
                )
            if grade is not None and not 0 <= grade <= MAX_GRADE:
                raise DataError(f"item {item}: grades are 0 to {MAX_GRADE}, got {grade}.")
        with self._lock:
            after: dict[int, int | None] = {**self.grades, **changes}
            kept = {item: grade for item, grade in sorted(after.items()) if grade is not None}
            self._write(kept)
            self.grades = kept

    def _write(self, grades: Mapping[int, int]) -> None:
        queries = self._sample.items["query"]
        ids = self._sample.items["entity_id"]
        lines = [
            json.dumps(
                {
                    "item": item,
                    "query": queries[item - 1],
                    "entity_id": ids[item - 1],
                    "grade": grade,
                    "judge": self.judge,
                    "kind": self.kind,
                },
                ensure_ascii=False,
            )
            for item, grade in grades.items()
        ]
        partial = self._path.with_name(f".{self.judge}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)


def _hold(path: Path, judge: str) -> int:
    """Take a lock that ends with the process; return its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"another process grades as {judge!r} just now. End it, or choose another --judge."
        ) from error
    return descriptor


def _read(path: Path) -> pl.DataFrame:
    if not path.stat().st_size:
        return pl.DataFrame(schema=_COLUMNS)
    try:
        return pl.read_ndjson(path, schema=_COLUMNS)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{path}: expected grades that `omni judge` wrote, but they cannot be read ({error})."
        ) from error


def read_all_grades(sample: Sample) -> pl.DataFrame:
    """Read the grades of all judges; ``item, query, entity_id, grade, judge, kind``.

    Raises:
        DataError: There are none.
    """
    paths = sorted((sample.path / "grades").glob("*.jsonl"))
    grades = pl.concat([pl.DataFrame(schema=_COLUMNS), *map(_read, paths)])
    if grades.is_empty():
        raise DataError(
            f"{sample.path} holds no grades yet. Grade with: omni judge page {sample.path} --judge"
            " YOUR_NAME"
        )
    return grades


def blank_sheet(sample: Sample) -> pl.DataFrame:
    """Make a table for a spreadsheet: what judges see, and an empty column ``grade``."""
    shown = ["item", "query", "language", "entity_type", "title", "text", "image"]
    return sample.items.select(*shown, grade=pl.lit(""))


def grades_of_sheet(sheet: pl.DataFrame) -> dict[int, int | None]:
    """Read the grades of a filled-in sheet; rows without a grade are left out.

    Raises:
        DataError: A column is missing, or a grade or item is no whole number.
    """
    missing = [name for name in ("item", "grade") if name not in sheet.columns]
    if missing:
        raise DataError(
            f"the sheet lacks the column(s) {', '.join(missing)}: give the sheet that `omni judge"
            " sheet` wrote, with grades filled in."
        )
    grades: dict[int, int | None] = {}
    for number, (item, grade) in enumerate(sheet.select("item", "grade").iter_rows(), start=1):
        text = str("" if grade is None else grade).strip()
        if not text:
            continue
        try:
            grades[int(str(item))] = int(text)
        except ValueError as error:
            raise DataError(
                f"row {number} of the sheet: expected a grade from 0 to {MAX_GRADE} for item"
                f" {item!r}, got {text!r}."
            ) from error
    return grades


def annotation_grades(sample: Sample, pairs: pl.DataFrame, groups: Mapping[str, str]) -> pl.Series:
    """Grade items by the annotations: the highest grade for an annotated pair, else 0.

    Args:
        sample: What is graded.
        pairs: Every annotated ``query, entity_id``.
        groups: Entity id -> name of its near-duplicates, any of which is a right answer.

    Returns:
        Grades in the order of the items.
    """
    same = [groups.get(id, id) for id in pairs["entity_id"].to_list()]
    right = set(zip(pairs["query"].to_list(), same, strict=True))
    asked = sample.items.select("query", "entity_id").iter_rows()
    is_right = [(query, groups.get(id, id)) in right for query, id in asked]
    return pl.Series("grade", is_right).cast(pl.Int64) * MAX_GRADE
