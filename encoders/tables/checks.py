"""Check a table against its schema: repair what is safe, and list every value that is not."""

from __future__ import annotations

import ast
import csv
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Any, NamedTuple

import polars as pl

from encoders.errors import SchemaError
from encoders.tables.cells import cell_texts
from encoders.tables.parts import leaf_type
from encoders.tables.schemas import (
    EARLIEST_YEAR,
    MALFORMED,
    ROW,
    Column,
    Kind,
    TableSchema,
    is_entity_type,
    lookalikes,
    plain_entity_type,
    renames,
)

FUTURE_TOLERANCE = timedelta(days=1)
"""Clocks and time zones differ; an event further ahead than this is wrong."""

EPOCH_UNITS: tuple[tuple[str, float, int], ...] = (
    ("s", 1e11, 1_000_000),
    ("ms", 1e14, 1_000),
    ("us", 1e17, 1),
)
"""Unit of an epoch timestamp, the magnitude it stays below, and microseconds per unit.

Above all of them: nanoseconds.
"""

_MOST_VALUES = 8
"""Examples of values that are no choice, each named once."""
_WIDE = (pl.UInt64, pl.Int128, pl.UInt128)
_ATTRIBUTE_NAME = re.compile(r"[^\W\d]\w*", re.UNICODE)
"""Names that filters can write."""


class Rule(NamedTuple):
    """What a value must keep to, as messages say it, and how to mend a value that does not."""

    text: str
    fix: str


KEEP_ONE = "Keep one version of each id (which one is right cannot be guessed)."
_CORRECT = "Correct it, or drop the row."
_REQUIRED = Rule("a value is required", "Fill it in, or drop the row.")
_NO_NUL = Rule("text holds a NUL byte", "Remove the NUL bytes.")
_NO_NUL_IN_TEXT = Rule(
    _NO_NUL.text, "Remove the NUL bytes; the file was probably exported with a wrong encoding."
)
_NUMBER = Rule("must be a number", "Write it as digits with a point.")
_FINITE = Rule("must be finite", "Leave it empty where it is unknown.")
_WHOLE = Rule("must be a whole number", "Round it, or drop the row.")
_64_BITS = Rule("must fit into 64 bits", _CORRECT)
_FINITE_VECTOR = Rule("vector holds NaN or Inf", "Compute it again, or leave it out.")
_VECTOR_CELL = Rule(
    "vector must be a JSON list of numbers",
    "For example [0.1, 0.2]; leave it empty where there is none.",
)
_ISO_OR_EPOCH = Rule(
    "must be an ISO 8601 time or an epoch number", "For example 2026-01-31T23:59:59Z."
)
_ONE_CONTENT = Rule("id repeats with different content", KEEP_ONE)
_LIST_CELL = Rule(
    "must be a JSON list, or parts separated by '|'", 'For example ["red", "blue"] or red|blue.'
)
_NAME = Rule("must be a name of lower-case letters, digits and '_', such as product", "")
_ONE_UNIT = "Bring all rows to one unit; which one a row has cannot be guessed."


def _short_enough(column: Column) -> Rule:
    """Return the rule that a column's texts keep its length."""
    return Rule(
        f"text longer than {column.max_characters:,} characters", "Shorten it, or drop the row."
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """One value that breaks a rule: where it is, what it is, and how to mend it."""

    row: int
    column: str
    value: str
    rule: str
    fix: str

    def describe(self, source: str) -> str:
        """Return one line that names file, row, column, value and fix."""
        if not self.column:
            return f"{source}: row {self.row}: {self.rule}: {self.value}. {self.fix}"
        return (
            f"{source}: row {self.row}, column {self.column!r}: {self.rule}, got {self.value}."
            f" {self.fix}"
        )


@dataclass(slots=True)
class TableReport:
    """What reading a table found; nothing is changed or dropped without a line here."""

    source: str
    table: str
    rows_read: int = 0
    rows_kept: int = 0
    notes: list[str] = field(default_factory=list)
    """Changes that lose nothing: id forms unified, identical rows merged, time units recognised."""
    rules_broken: dict[str, int] = field(default_factory=dict)
    """Rows by broken rule."""
    problems: list[Problem] = field(default_factory=list)
    """The first problems of each rule."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "source": self.source,
            "table": self.table,
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "notes": self.notes,
            "rules_broken": self.rules_broken,
            "problems": [p.describe(self.source) for p in self.problems],
        }


class Checked(NamedTuple):
    """A table after its checks."""

    frame: pl.DataFrame
    """The rows that keep every rule, in order, with ``ROW`` removed."""
    rejected: pl.DataFrame
    """The other rows as they were read, with the columns ``row`` (from 1) and ``problem``."""
    report: TableReport


class _Checker:
    """Collect broken rules while columns are converted one by one."""

    def __init__(self, frame: pl.DataFrame, report: TableReport, examples: int) -> None:
        self.report = report
        self.examples = examples
        self.bad: dict[int, str] = {}
        self.rows = frame[ROW]

    def set_aside(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Record the malformed rows, and return the others."""
        problems = malformed_rows(frame)
        counts = self.report.rules_broken
        for problem in problems:
            self.bad[problem.row] = problem.rule
            counts[problem.rule] = counts.get(problem.rule, 0) + 1
            if counts[problem.rule] <= self.examples:
                self.report.problems.append(problem)
        if MALFORMED in frame.columns:
            frame = frame.filter(pl.col(MALFORMED).is_null()).drop(MALFORMED)
        self.rows = frame[ROW]
        return frame

    def flag(
        self,
        broken: pl.Series,
        values: pl.Series,
        column: str,
        rule: Rule,
        *,
        meant: Callable[[str], str | None] | None = None,
    ) -> None:
        """Record every row where ``broken`` is true; messages show ``values``.

        ``meant`` says what a value may be mapped to: each is named once, up to eight of them.
        """
        hits = broken.fill_null(False).arg_true()
        if not len(hits):
            return
        counts = self.report.rules_broken
        counts[rule.text] = counts.get(rule.text, 0) + len(hits)
        row_numbers = self.rows.gather(hits).to_list()
        for row in row_numbers:
            self.bad.setdefault(row, f"{column}: {rule.text}")
        shown = hits.head(self.examples)
        if meant:
            shown = hits.filter(values.gather(hits).is_first_distinct()).head(_MOST_VALUES)
        for index in shown.to_list():
            fix = _mapped_fix(values[index], column, meant) if meant else rule.fix
            self.report.problems.append(
                Problem(self.rows[index], column, _shown(values[index]), rule.text, fix)
            )


def _mapped_fix(value: str, column: str, meant: Callable[[str], str | None]) -> str:
    """Word how to map a value that is not allowed, by what it may mean."""
    option = shlex.quote(f"{column}.{value}={meant(value) or 'NEW'}")
    return f"Map it (--map {option}), or drop the row."


def _names(text: pl.Series, column: Column, checker: _Checker) -> None:
    """Flag what cannot name an entity type, and note what is nearly one of the usual types."""
    names = [n for n in text.drop_nulls().unique(maintain_order=True).to_list() if n.strip()]
    wrong = [name for name in names if not is_entity_type(name)]
    checker.flag(text.is_in(wrong), text, column.name, _NAME, meant=plain_entity_type)
    for name in names:
        near = get_close_matches(name, column.choices, n=1, cutoff=0.8)
        if near and name != near[0] and name not in wrong:
            checker.report.notes.append(
                f"{name!r} is an entity type of its own; if {near[0]!r} is meant:"
                f" --map {column.name}.{name}={near[0]}"
            )


def malformed_rows(frame: pl.DataFrame) -> list[Problem]:
    """List the rows of a frame that could not be read, as its column ``MALFORMED`` says."""
    if MALFORMED not in frame.columns:
        return []
    flaws = frame.filter(pl.col(MALFORMED).is_not_null()).select(ROW, MALFORMED)
    return [
        Problem(row, "", _shown(flaw["value"]), flaw["rule"], flaw["fix"])
        for row, flaw in flaws.iter_rows()
    ]


def check_frame(
    frame: pl.DataFrame,
    schema: TableSchema,
    source: str,
    *,
    now: datetime | None = None,
    examples: int = 3,
) -> Checked:
    """Check and convert a table as it was read to what its schema says.

    Args:
        frame: Rows as read: texts, numbers, lists; any dtype a reader may give. A column ``__row``
            gives their numbers in the file.
        schema: The table's schema.
        source: File name for messages.
        now: Time that "in the future" is measured from; None: the clock.
        examples: How many rows to name per broken rule.

    Returns:
        Typed rows (ids and queries in Unicode form NFC; nulls filled by the schema's defaults), the
        rejected rows and the report.

    Raises:
        SchemaError: A required column is missing, or a column cannot be of its type at all.
    """
    report = TableReport(source, schema.name, rows_read=frame.height)
    near = lookalikes(frame.columns, schema)
    missing = [c.name for c in schema.columns if c.required and c.name not in frame.columns]
    if missing:
        found = ", ".join(_own_names(frame)) or "none"
        raise SchemaError(
            f"{source}: table {schema.name!r} needs the column(s) {', '.join(missing)}; found:"
            f" {found}. Rename or add them{renames(near, missing)};"
            f" all columns: {', '.join(c.name for c in schema.columns)}. Options say it: --rename"
            " OLD=NEW, --set COLUMN=VALUE (omni data convert has them for all commands)."
        )
    report.notes += [
        f"column {name!r} is not read as {known!r}; if it is meant to be: --rename {name}={known}"
        for name, known in near.items()
    ]
    if ROW not in frame.columns:
        frame = frame.with_row_index(ROW, offset=1)
    checker = _Checker(frame, report, examples)
    original = frame.drop(MALFORMED, strict=False)
    frame = checker.set_aside(frame)
    now = now or datetime.now(UTC)
    for column in schema.columns:
        name = column.name
        if name in frame.columns:
            frame = frame.with_columns(_convert(frame[name], column, checker, now).alias(name))
        elif column.default is not None:
            frame = frame.with_columns(pl.lit(column.default, dtype=column.dtype).alias(name))
    if schema.open:
        frame = _check_attributes(frame, schema, checker)
    if checker.bad:
        frame = frame.filter(~pl.col(ROW).is_in(list(checker.bad)))
    frame, clashing = _merge_identical(frame, schema, checker)
    report.rows_kept = frame.height
    # Ids that clash are found last; they come after the rows that break a rule by themselves.
    problems = {row: checker.bad[row] for row in sorted(checker.bad)} | clashing
    return Checked(frame.drop(ROW), _rejected_rows(original, problems), report)


def _own_names(frame: pl.DataFrame) -> list[str]:
    """List the columns that the file has."""
    return [name for name in frame.columns if name not in (ROW, MALFORMED)]


def _check_attributes(frame: pl.DataFrame, schema: TableSchema, checker: _Checker) -> pl.DataFrame:
    """Check the columns that an open schema does not know, as filters and answers need them.

    Flags NUL bytes and integers of more than 64 bits; columns of records, bytes or the like are
    left out with a note.

    Raises:
        SchemaError: A filter cannot write a column's name.
    """
    left_out = []
    for name in _own_names(frame):
        if schema.column(name) is not None:
            continue
        dtype = frame.schema[name]
        if name == "" or re.fullmatch(r"Unnamed: \d+", name):
            left_out.append(name)
            checker.report.notes.append(
                f"column {name!r} was left out (pandas writes its index so; index=False leaves it"
                " out)"
            )
        elif not can_be_attribute(dtype):
            left_out.append(name)
            checker.report.notes.append(
                f"column {name!r} of type {dtype} was left out: filters and answers have numbers,"
                " texts, booleans, times and flat lists of numbers or texts"
            )
        elif not _ATTRIBUTE_NAME.fullmatch(name):
            raise SchemaError(
                f"{checker.report.source}: column {name!r} cannot be named in a filter: a name"
                " starts with a letter or _ and holds letters, digits and _. Rename it, for example"
                f" --rename {shlex.quote(f'{name}={_plain_name(name)}')} (for commands without"
                " --rename, once with omni data convert)."
            )
        elif dtype == pl.String:
            nul = frame[name].str.contains("\0", literal=True)
            checker.flag(nul, frame[name], name, _NO_NUL)
        elif leaf_type(dtype)[0] in _WIDE:
            checker.flag(_beyond_64_bits(frame[name]), frame[name], name, _64_BITS)
            if dtype != pl.UInt64:
                narrow = pl.List(pl.Int64) if dtype.is_nested() else pl.Int64
                frame = frame.with_columns(frame[name].cast(narrow, strict=False))
    return frame.drop(left_out)


def _beyond_64_bits(values: pl.Series) -> pl.Series:
    """Tell which integers, or lists of them, hold one that needs more than 64 bits."""
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    nested = isinstance(values.dtype, pl.List)
    beyond = (values.list.max() if nested else values) > 2**63 - 1
    if leaf_type(values.dtype)[0] == pl.Int128:
        beyond |= (values.list.min() if nested else values) < -(2**63)
    return beyond


def _plain_name(name: str) -> str:
    """Suggest a name that filters can write."""
    plain = re.sub(r"\W+", "_", name).strip("_") or "column"
    return plain if _ATTRIBUTE_NAME.fullmatch(plain) else f"_{plain}"


def can_be_attribute(dtype: pl.DataType) -> bool:
    """Tell whether a column is one that filters, answers or towers read.

    Lists of lists are, where they hold numbers: several vectors.
    """
    if isinstance(dtype, pl.List | pl.Array):
        inner = dtype.inner
        if isinstance(inner, pl.List | pl.Array):
            return bool(inner.inner.is_numeric())  # type: ignore[union-attr]
        return (
            inner.is_numeric()  # type: ignore[union-attr]
            or inner in (pl.String, pl.Null)
            or inner.is_temporal()  # type: ignore[union-attr]
        )
    return not dtype.is_nested() and dtype not in (pl.Binary, pl.Object)


def _rejected_rows(original: pl.DataFrame, problems: dict[int, str]) -> pl.DataFrame:
    """Return the rows of ``problems`` (row number -> problem) as they were read, in its order."""
    reasons = pl.DataFrame(
        {ROW: list(problems), "problem": list(problems.values())},
        schema={ROW: original[ROW].dtype, "problem": pl.String},
    )
    rejected = reasons.join(original, on=ROW, how="left", maintain_order="left")
    return rejected.select(
        *(n for n in original.columns if n != ROW),
        pl.col(ROW).cast(pl.Int64).alias("row"),
        "problem",
    )


def _convert(values: pl.Series, column: Column, checker: _Checker, now: datetime) -> pl.Series:
    """Convert a column's values to its kind, flagging those that break a rule."""
    match column.kind:
        case Kind.TIMESTAMP:
            return _timestamps(values, column, checker, now)
        case Kind.INTEGER | Kind.NUMBER:
            return _numbers(values, column, checker)
        case Kind.TEXT_LIST:
            return _text_lists(values, column, checker)
        case Kind.VECTOR:
            return _vectors(values, column, checker)
        case _:
            return _texts(values, column, checker)


def _texts(values: pl.Series, column: Column, checker: _Checker) -> pl.Series:
    """Convert to text, ids and queries in NFC; flag what is too long, blank or no choice."""
    if values.dtype.is_nested() or values.dtype == pl.Binary:
        raise SchemaError(
            f"{checker.report.source}: column {column.name!r} should hold text, but holds"
            f" {values.dtype}. Export it as one text per row."
        )
    text = cell_texts(values)
    checker.flag(text.str.contains("\0", literal=True), text, column.name, _NO_NUL_IN_TEXT)
    # len_bytes is free; only rows that may be too long are counted in characters.
    if (text.str.len_bytes().max() or 0) > column.max_characters:  # type: ignore[operator]
        too_long = text.str.len_chars() > column.max_characters
        checker.flag(too_long, text, column.name, _short_enough(column))
    if column.kind is Kind.ID or column.name == "query":
        unified = text.str.normalize("NFC")
        changed = int((unified != text).sum())
        if changed:
            checker.report.notes.append(
                f"{changed:,} value(s) of {column.name!r} were brought to Unicode form NFC"
            )
        text = unified
    if column.default is not None:
        text = text.fill_null(str(column.default))
    if column.required:
        blank = text.is_null() | (text.str.strip_chars() == "")
        checker.flag(blank, text, column.name, _REQUIRED)
    if column.kind is Kind.CHOICE:
        rule = Rule(f"must be one of {', '.join(column.choices)}", "")
        unknown = text.is_not_null() & ~text.is_in(list(column.choices))
        checker.flag(unknown, text, column.name, rule, meant=column.other_value)
    elif column.kind is Kind.NAME:
        _names(text, column, checker)
    return text


def _numbers(values: pl.Series, column: Column, checker: _Checker) -> pl.Series:
    """Convert to integers or floats; flag what is no number or breaks the column's limits."""
    present = values.is_not_null()
    if values.dtype == pl.String:
        present = present & (values.str.strip_chars() != "")
        values = values.str.strip_chars()
    elif values.dtype.is_nested() or values.dtype.is_temporal():
        raise SchemaError(
            f"{checker.report.source}: column {column.name!r} should hold numbers, but holds"
            f" {values.dtype}."
        )
    numbers = values.cast(pl.Float64, strict=False)
    checker.flag(present & numbers.is_null(), values, column.name, _NUMBER)
    checker.flag(present & ~numbers.is_finite(), values, column.name, _FINITE)
    if column.required:
        checker.flag(~present, values, column.name, _REQUIRED)
    if column.minimum is not None:
        rule = Rule(f"must be at least {column.minimum:g}", _CORRECT)
        checker.flag(numbers < column.minimum, values, column.name, rule)
    if column.kind is not Kind.INTEGER:
        return numbers
    checker.flag(numbers != numbers.round(0), values, column.name, _WHOLE)
    # A float does not hold 64-bit counts above 2**53: integers are cast as they are.
    exact = values if values.dtype.is_integer() else numbers.round(0)
    whole = exact.cast(pl.Int64, strict=False)
    checker.flag(numbers.is_finite() & whole.is_null(), values, column.name, _64_BITS)
    return whole.fill_null(int(column.default)) if column.default is not None else whole


def _text_lists(values: pl.Series, column: Column, checker: _Checker) -> pl.Series:
    """Convert to lists of text, from cells of JSON or of parts separated by ``|``, too."""
    if values.dtype == pl.Null:
        values = values.cast(column.dtype)
    if values.dtype == pl.String:
        lists = [_split_cell(cell) for cell in values.to_list()]
        broken = pl.Series([items is _NO_LIST for items in lists], dtype=pl.Boolean)
        checker.flag(broken, values, column.name, _LIST_CELL)
        read = [None if items is _NO_LIST else items for items in lists]
        values = pl.Series(values.name, read, dtype=pl.List(pl.String))
    if not isinstance(values.dtype, pl.List) or values.dtype.inner.is_nested():
        raise SchemaError(
            f"{checker.report.source}: column {column.name!r} should hold lists of text (in CSV:"
            f" JSON, or parts separated by '|'), but holds {values.dtype}."
        )
    texts = cell_texts(values)
    nul = texts.list.eval(pl.element().str.contains("\0", literal=True)).list.any()
    checker.flag(nul, texts, column.name, _NO_NUL)
    longest = texts.list.eval(pl.element().str.len_chars()).list.max()
    checker.flag(longest > column.max_characters, texts, column.name, _short_enough(column))
    if column.required:
        empty = texts.is_null() | (texts.list.len() == 0)
        checker.flag(empty, texts, column.name, _REQUIRED)
    return texts


_NO_LIST: list[str] = []
"""Stands, as this very object, for a cell that is no list."""


def _split_cell(cell: str | None) -> list[str] | None:
    """Split a cell: a list as JSON, pandas or Postgres write it, or parts separated by ``|``.

    None: it is blank; ``_NO_LIST``: it begins as a list and is none.
    """
    text = (cell or "").strip()
    if not text:
        return None
    if text.startswith("["):
        return _bracketed(text)
    if text.startswith("{") and text.endswith("}"):
        return _braced(text)
    return [part.strip() for part in text.split("|") if part.strip()]


def list_cell(cell: str | None) -> list[str] | None:
    """Split a cell as ``_split_cell`` does; None: it is blank, or no list."""
    items = _split_cell(cell)
    return None if items is _NO_LIST else items


def _bracketed(text: str) -> list[str]:
    """Read ``["red", "blue"]`` or, as Python prints it, ``['red', 'blue']``."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        try:
            items = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return _NO_LIST
        # numpy prints no commas, and Python reads 'red' 'blue' as one text.
        if re.search(r"""['"]\s+['"]""", text):
            return _NO_LIST
    if not isinstance(items, list) or any(isinstance(item, list | dict) for item in items):
        return _NO_LIST
    return [str(item) for item in items if item is not None]


def _braced(text: str) -> list[str]:
    """Read ``{red,"light blue"}``, as Postgres writes arrays."""
    if text == "{}":
        return []
    try:
        (items,) = csv.reader([text[1:-1]], escapechar="\\", doublequote=False)
    except csv.Error:
        return _NO_LIST
    return [item for item in items if item and item != "NULL"]


def _vectors(values: pl.Series, column: Column, checker: _Checker) -> pl.Series:
    """Convert to float32 vectors of one width; several images have lists of vectors."""
    if values.dtype == pl.String:
        values = _vector_cells(values, column, checker)
    if values.dtype == pl.Null:
        return values.cast(column.dtype)
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    if not isinstance(values.dtype, pl.List):
        raise SchemaError(
            f"{checker.report.source}: column {column.name!r} should hold lists of numbers, but"
            f" holds {values.dtype}."
        )
    if isinstance(values.dtype.inner, pl.List | pl.Array):  # several images: a list of vectors
        return values.cast(pl.List(pl.List(pl.Float32)))
    vectors = values.cast(pl.List(pl.Float32))
    finite = vectors.list.eval(pl.element().is_finite()).list.all()
    checker.flag(~finite, vectors, column.name, _FINITE_VECTOR)
    widths = vectors.list.len().drop_nulls()
    if widths.n_unique() > 1:
        common = int(widths.mode().sort()[0])
        rule = Rule(f"vector must have {common} numbers", "Use one model for all rows.")
        checker.flag(vectors.list.len() != common, vectors, column.name, rule)
    return vectors


def _vector_cells(cells: pl.Series, column: Column, checker: _Checker) -> pl.Series:
    """Parse vectors: JSON lists of numbers, or in all rows lists of such lists (several images)."""
    texts = cells.to_list()
    parsed = [_json_or_none(text) for text in texts]
    several = [isinstance(v, list) and bool(v) and all(map(_is_vector, v)) for v in parsed]
    nested = any(several) and not any(map(_is_vector, parsed))
    good = several if nested else [_is_vector(v) for v in parsed]
    broken = [not ok and bool(text and text.strip()) for ok, text in zip(good, texts, strict=True)]
    checker.flag(pl.Series(broken, dtype=pl.Boolean), cells, column.name, _VECTOR_CELL)
    vectors = [v if ok else None for v, ok in zip(parsed, good, strict=True)]
    dtype = pl.List(pl.List(pl.Float32)) if nested else pl.List(pl.Float32)
    return pl.Series(cells.name, vectors, dtype=dtype, strict=False)


def _json_or_none(cell: str | None) -> Any:
    try:
        return json.loads(cell or "null")
    except (ValueError, RecursionError):
        return None


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in value
    )


def _timestamps(values: pl.Series, column: Column, checker: _Checker, now: datetime) -> pl.Series:
    """Read datetimes, dates, ISO 8601 texts, or seconds, ms, us or ns since 1970.

    Times without a zone are UTC. One unit per column: a column that mixes seconds with milliseconds
    is an error that names the rows of the rarer unit.

    Returns:
        ``Datetime("us", "UTC")``; null where the value was null or flagged.
    """
    parsed = _parse_any_timestamp(values, column, checker)
    fix = "Check the unit and the time zone."
    early = datetime(EARLIEST_YEAR, 1, 1, tzinfo=UTC)
    not_early = Rule(f"timestamp before {EARLIEST_YEAR}", fix)
    checker.flag(parsed < early, values, column.name, not_early)
    not_future = Rule(f"timestamp in the future (it is {now:%Y-%m-%d})", fix)
    checker.flag(parsed > now + FUTURE_TOLERANCE, values, column.name, not_future)
    if column.required:
        blank = values.is_null()
        if values.dtype == pl.String:
            blank = blank | (values.str.strip_chars() == "")
        checker.flag(blank, values, column.name, _REQUIRED)
    return parsed


def _parse_any_timestamp(values: pl.Series, column: Column, checker: _Checker) -> pl.Series:
    """Bring times of any form to UTC; what cannot be read is flagged and null."""
    target = pl.Datetime("us", "UTC")
    if values.dtype == pl.Null:
        return values.cast(target)
    if isinstance(values.dtype, pl.Datetime) and values.dtype.time_zone is not None:
        return values.dt.convert_time_zone("UTC").cast(target)
    if isinstance(values.dtype, pl.Datetime) or values.dtype == pl.Date:
        checker.report.notes.append(f"{column.name!r} has no time zone: read as UTC")
        return values.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if values.dtype.is_numeric():
        return _from_epoch(values.cast(pl.Float64), values, column, checker)
    if values.dtype != pl.String:
        raise SchemaError(
            f"{checker.report.source}: column {column.name!r} should hold timestamps, but holds"
            f" {values.dtype}."
        )
    text = values.str.strip_chars()
    numbers = text.cast(pl.Float64, strict=False)
    is_number = numbers.is_not_null()
    if is_number.any() and (is_number | text.is_null() | (text == "")).all():
        return _from_epoch(numbers, values, column, checker)
    uniques = text.drop_nulls().unique()
    moments = [_from_iso(t) for t in uniques.to_list()]
    lookup = pl.DataFrame({"t": uniques, "m": pl.Series(moments, dtype=target)})
    parsed = pl.DataFrame({"t": text}).join(lookup, on="t", how="left", maintain_order="left")["m"]
    checker.flag((text != "") & parsed.is_null(), values, column.name, _ISO_OR_EPOCH)
    return parsed


def _from_iso(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text.replace(" UTC", "+00:00"))
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):  # overflow: the calendar's first or last day, another zone
        return None


def _from_epoch(
    numbers: pl.Series, values: pl.Series, column: Column, checker: _Checker
) -> pl.Series:
    """Read numbers since 1970 in the unit that most of them have; flag those of other units."""
    size = numbers.abs()
    unit = pl.Series([0] * len(size), dtype=pl.Int8)  # place in EPOCH_UNITS; behind them: ns
    for _, limit, _ in EPOCH_UNITS:
        unit = unit + (size >= limit).fill_null(False).cast(pl.Int8)
    known = unit.filter(numbers.is_not_null())
    if not len(known):
        return numbers.cast(pl.Int64).cast(pl.Datetime("us", "UTC"))
    counts = known.alias("unit").value_counts()
    main = int(counts.sort("count", "unit", descending=[True, False])["unit"][0])
    name = [*(name for name, _, _ in EPOCH_UNITS), "ns"][main]
    mixed = numbers.is_not_null() & (unit != main)
    same_unit = Rule(f"timestamp is not in {name} as most of the column is", _ONE_UNIT)
    checker.flag(mixed, values, column.name, same_unit)
    scale = 0.001 if name == "ns" else float(EPOCH_UNITS[main][2])
    microseconds = (numbers * scale).round(0).cast(pl.Int64, strict=False)
    lost = numbers.is_not_null() & microseconds.is_null() & ~mixed
    checker.flag(lost, values, column.name, Rule("timestamp is out of range", _ONE_UNIT))
    checker.report.notes.append(f"{column.name!r} read as {name} since 1970-01-01 UTC")
    return microseconds.set(mixed, None).cast(pl.Datetime("us", "UTC"))


def _merge_identical(
    frame: pl.DataFrame, schema: TableSchema, checker: _Checker
) -> tuple[pl.DataFrame, dict[int, str]]:
    """Merge rows that repeat a key with the same content; remove those with different content.

    Returns:
        The other rows, and the removed ones: row number -> problem.
    """
    if not schema.key or frame.height == 0:
        return frame, {}
    repeated = frame.select(pl.struct(schema.key).is_duplicated()).to_series()
    if not repeated.any():
        return frame, {}
    groups = frame.filter(repeated)
    content = pl.struct(c for c in frame.columns if c != ROW)
    groups = groups.with_columns(
        content.map_elements(lambda row: repr(row), return_dtype=pl.String).alias("__content")
    )
    versions = pl.col("__content").n_unique().over(schema.key)
    clash = groups.filter(versions > 1)
    same = groups.filter((versions == 1) & ~pl.struct(schema.key).is_first_distinct())
    if same.height:
        checker.report.notes.append(
            f"{same.height:,} row(s) repeat an earlier row exactly and were merged into it"
        )
    if clash.height:
        checker.report.rules_broken[_ONE_CONTENT.text] = clash.height
        for row in clash.head(2 * checker.examples).iter_rows(named=True):
            checker.report.problems.append(
                Problem(row[ROW], schema.key[-1], _shown(row[schema.key[-1]]), *_ONE_CONTENT)
            )
    dropped = pl.concat([same[ROW], clash[ROW]])
    problem = f"{schema.key[-1]}: {_ONE_CONTENT.text}"
    kept = frame.filter(~pl.col(ROW).is_in(dropped.implode()))
    return kept, dict.fromkeys(clash[ROW].to_list(), problem)


def _shown(value: Any) -> str:
    """Print a value, shortened, for a message."""
    if isinstance(value, pl.Series):
        value = value.to_list()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(str(value)):,} characters)"
