"""Filters against a slow evaluator with three-valued logic; errors know their position.

The same random filters are asked of a table, of its cache and of live entries with the same values.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from index_builder.errors import BadAttribute, FilterError
from index_builder.filters.attributes import AttributeTable
from index_builder.filters.cache import SelectionCache
from index_builder.filters.expression import parse_filter
from index_builder.filters.live_columns import LiveColumns
from index_builder.filters.selection import BoundFilter
from index_builder.filters.times import instants_of, period_of

WHENS = [
    "2024-05-01",
    "2024-05-01T00:00:00",
    "2024-05-01T23:59:59.999999Z",
    "2024-05-02T01:30:00+02:00",
    "2024-05-02",
    "2024-04-30 22:00",
    "2024-05-01T12:00:00.5-0530",
]
NAMES = ["red", "red cat", "Red", "a%b", "a_b", "ä\nb", ""]
ROWS: list[dict[str, Any]] = [
    {
        "price": None if i % 7 == 0 else i % 11 - 3,
        "rating": None if i % 5 == 0 else (i % 9) / 4,
        "country": None if i % 6 == 0 else ["us", "de", "fr", "日本"][i % 4],
        "live": None if i % 8 == 0 else i % 3 == 0,
        "tags": None if i % 4 == 0 else [["a"], [], ["a", "b", "a"], ["c"]][i % 4 - 1 + (i % 2)],
        "when": None if i % 9 == 0 else WHENS[i % 7],
        "name": None if i % 10 == 0 else NAMES[i % 7],
        "seen": None if i % 5 == 0 else [WHENS[i % 7], WHENS[i % 3]][: i % 3],
    }
    for i in range(60)
]
TABLE = AttributeTable(
    pl.DataFrame(
        ROWS,
        schema={
            "price": pl.Int64,
            "rating": pl.Float64,
            "country": pl.String,
            "live": pl.Boolean,
            "tags": pl.List(pl.String),
            "when": pl.String,
            "name": pl.String,
            "seen": pl.List(pl.String),
        },
    )
)
TABLE.row_of = {f"p{i}": i for i in range(60)}.get
LIVE = LiveColumns(ROWS, [f"p{i}" for i in range(60)], TABLE)
KNOWN = [{**row, "id": f"p{i}"} for i, row in enumerate(ROWS)]
IDS = ["p0", "p7", "p59", "p60", ""]


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    escaped = value.replace("\\", "\\\\").replace("\n", "\\n")
    return f'"{escaped}"'


_OPS = ["==", "!=", "<", "<=", ">", ">="]
_PERIODS = ["2024-05-01", "2024-05", "2024-05-01T12:00:00+02:00", "2024-05-02T00:00", "1999"]
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "price": st.integers(-5, 9) | st.sampled_from([1.5, -10.0, 1e30]),
    "rating": st.sampled_from([0.0, 0.25, 1.0, 1.3, 2, -1]),
    "country": st.sampled_from(["us", "de", "日本", "zz", ""]),
    "live": st.booleans(),
    "when": st.sampled_from(_PERIODS + WHENS),
    "name": st.sampled_from(NAMES),
    "id": st.sampled_from(IDS),
}
_LISTS = {"tags": st.sampled_from(["a", "b", "zz"]), "seen": st.sampled_from(_PERIODS + WHENS)}
_PATTERNS = ["red%", "%", "", "r_d%", "%cat", "a\\%b", "a\\_b", "a%b", "_", "___", "%e%", "ä_b"]


@st.composite
def _leaf(draw: st.DrawFn) -> tuple[str, Any]:
    form = draw(st.sampled_from(["compare", "compare", "in", "null", "contains", "listed", "like"]))
    if form == "null":
        field = draw(st.sampled_from([*set(_VALUES) - {"id"}, *_LISTS]))
        word = draw(st.sampled_from(["is null", "is not null", "IS NOT NULL"]))
        return f"{field} {word}", (word.lower(), field, None)
    if form == "like":
        pattern = draw(st.sampled_from(_PATTERNS))
        word = draw(st.sampled_from(["like", "not like"]))
        return f"name {word} {_literal(pattern)}", (word, "name", pattern)
    if form == "contains":
        field = draw(st.sampled_from(sorted(_LISTS)))
        value = draw(_LISTS[field])
        return f"array_contains({field}, {_literal(value)})", ("contains", field, value)
    if form == "listed":
        field = draw(st.sampled_from(sorted(_LISTS)))
        values = draw(st.lists(_LISTS[field], max_size=3))
        word = draw(st.sampled_from(["any", "all"]))
        listed = ", ".join(map(_literal, values))
        return f"array_contains_{word}({field}, [{listed}])", (word, field, values)
    field = draw(st.sampled_from(sorted(_VALUES)))
    if form == "in":
        values = draw(st.lists(_VALUES[field], max_size=3))
        word = draw(st.sampled_from(["in", "not in"]))
        return f"{field} {word} [{', '.join(map(_literal, values))}]", (word, field, values)
    op = draw(st.sampled_from(["==", "!="] if field in ("live", "id") else _OPS))
    value = draw(_VALUES[field])
    bare = field == "when" and value == "2024-05-01" and draw(st.booleans())
    return f"{field} {op} {value if bare else _literal(value)}", (op, field, value)


def _combine(children: st.SearchStrategy[tuple[str, Any]]) -> st.SearchStrategy[tuple[str, Any]]:
    two = st.tuples(st.sampled_from(["and", "or", "&&", "OR"]), children, children)
    return two.map(
        lambda t: (
            f"({t[1][0]} {t[0]} {t[2][0]})",
            (t[0].lower().replace("&&", "and"), t[1][1], t[2][1]),
        )
    ) | children.map(lambda c: (f"not ({c[0]})", ("not", c[1])))


def _slow(tree: Any, row: dict[str, Any]) -> bool | None:
    """True, False, or None for unknown, as SQL defines it."""
    op = tree[0]
    if op == "not":
        inner = _slow(tree[1], row)
        return None if inner is None else not inner
    if op in ("and", "or"):
        pair = {_slow(tree[1], row), _slow(tree[2], row)}
        decisive = op == "or"
        if decisive in pair:
            return decisive
        return None if None in pair else not decisive
    value, other = row[tree[1]], tree[2]
    if op in ("is null", "is not null"):
        return (value is None) == (op == "is null")
    if value is None:
        return None
    if op in ("contains", "any", "all"):
        wanted = [other] if op == "contains" else other
        hits = [any(_matches(tree[1], item, one) for item in value) for one in wanted]
        return all(hits) if op == "all" else any(hits)
    if op in ("like", "not like"):
        return (_like(other).fullmatch(value) is not None) == (op == "like")
    if op in ("in", "not in"):
        return any(_matches(tree[1], value, one) for one in other) == (op == "in")
    if tree[1] == "when":
        return _compares_time(op, _instant(value), *_period(other))
    return bool(
        {
            "==": value == other,
            "!=": value != other,
            "<": value < other,
            "<=": value <= other,
            ">": value > other,
            ">=": value >= other,
        }[op]
    )


def _matches(field: str, value: Any, wanted: Any) -> bool:
    if field in ("when", "seen"):
        low, high = _period(wanted)
        return low <= _instant(value) < high
    return bool(value == wanted)


def _compares_time(op: str, value: datetime, low: datetime, high: datetime) -> bool:
    """A date without a time is its whole day."""
    return {
        "==": low <= value < high,
        "!=": not low <= value < high,
        "<": value < low,
        "<=": value < high,
        ">": value >= high,
        ">=": value >= low,
    }[op]


def _instant(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _period(text: str) -> tuple[datetime, datetime]:
    if text == "1999":
        return _instant("1999-01-01"), _instant("2000-01-01")
    if text == "2024-05":
        return _instant("2024-05-01"), _instant("2024-06-01")
    low = _instant(text)
    return low, low + (timedelta(days=1) if len(text) == 10 else timedelta(microseconds=1))


def _like(pattern: str) -> re.Pattern[str]:
    """Translate a pattern letter by letter."""
    result, letters = "", iter(pattern)
    for letter in letters:
        if letter == "\\":
            result += re.escape(next(letters))
        else:
            result += {"%": ".*", "_": "."}.get(letter, re.escape(letter))
    return re.compile(result, re.DOTALL)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.recursive(_leaf(), _combine, max_leaves=6))
def test_selected_rows_follow_three_valued_logic(case: tuple[str, Any]) -> None:
    expression, tree = case
    bound = BoundFilter(parse_filter(expression), TABLE)
    selection = bound.select()
    want = [i for i, row in enumerate(KNOWN) if _slow(tree, row) is True]
    live = BoundFilter(parse_filter(expression), LIVE).select()
    assert sorted(live.as_rows().tolist()) == want
    assert sorted(selection.as_rows().tolist()) == want
    assert np.flatnonzero(selection.as_mask()).tolist() == want
    assert selection.count == len(want)
    assert 0.0 <= bound.estimate() <= 1.0


def test_estimate_of_one_leaf_and_of_a_range_is_exact() -> None:
    for expression in ("price > 2", "price > 0 and price <= 4", 'country == "de"'):
        bound = BoundFilter(parse_filter(expression), TABLE)
        assert bound.estimate() == pytest.approx(bound.select().count / len(ROWS))


@pytest.mark.parametrize(
    ("expression", "position", "words"),
    [
        ("price >", 7, "expected a number"),
        ("price = 3", 6, "unexpected"),
        ("price == 3 country", 11, "expected 'and'"),
        ("(price == 3", 11, "expected ')'"),
        ("cost == 3", 0, "unknown attribute 'cost'"),
        ("price == 'x'", 9, "is a string"),
        ("country == 3", 11, "is a number"),
        ("price == 1 and live > true", 15, "only == and !="),
        ("tags == 'a'", 0, "array_contains"),
        ("array_contains(price, 3)", 15, "needs a list"),
        ("country == 'open", 11, "no closing quote"),
        ("country == '\\q'", 12, "unknown escape"),
        ("", 0, "empty"),
        ("__import__('os')", 0, "unknown function"),
        ("price == null", 9, "name is null"),
        ("price is 3", 9, "expected null"),
        ("price like 'a%'", 0, "like is for strings"),
        ("name like 3", 10, "pattern in quotes"),
        ("name like 'a\\\\'", 10, "escapes nothing"),
        ("when > 3", 7, "is a number"),
        ("when > 'soon'", 7, "holds dates and times"),
        ("when > 2024-02-30", 7, "no date or time"),
        ("name > 2024-02-03", 7, "in quotes"),
        ("array_contains_any(tags, 'a')", 25, "expected '['"),
        ("array_contains_all(price, [1])", 19, "needs a list"),
        ("id == 3", 6, "in quotes"),
        ("id > 'a'", 0, "only == != in"),
        ("id is null", 0, "only == != in"),
        ("(" * 80 + "price == 3" + ")" * 80, 51, "nested"),
        ("price in [1, 2", 14, "expected ']'"),
        ("price == 12abc", 9, "unexpected"),
    ],
)
def test_filter_error_says_what_and_where(expression: str, position: int, words: str) -> None:
    with pytest.raises(FilterError) as caught:
        BoundFilter(parse_filter(expression), TABLE)
    assert words in str(caught.value)
    assert caught.value.position == position


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="price<>=!()[]'\"\\ andornti,0.5e", max_size=60))
def test_parse_filter_of_any_text_parses_or_gives_a_position(text: str) -> None:
    try:
        BoundFilter(parse_filter(text), TABLE)
    except FilterError as error:
        assert 0 <= error.position <= len(text)


def test_live_columns_have_the_types_of_the_base() -> None:
    like = LiveColumns([{"price": 5, "when": "later", "new": 1}, {"price": 1.5}], ["a", "b"], TABLE)
    assert like.schema == TABLE.schema

    def rows(expression: str) -> list[int]:
        return BoundFilter(parse_filter(expression), like).select().as_rows().tolist()

    assert rows("price == 5") == [0] and rows("price < 2") == [1]
    assert rows("country != 'us'") == []
    assert rows("when is null") == [0, 1], "no date, so no value"


def test_attribute_table_refuses_what_cannot_be_a_column() -> None:
    with pytest.raises(BadAttribute, match="nested"):
        AttributeTable(pl.DataFrame({"nested": [{"a": 1}]}))
    with pytest.raises(BadAttribute, match="Rename"):
        AttributeTable(pl.DataFrame({"bad name": [1]}))


def test_dates_compare_as_times() -> None:
    table = AttributeTable(
        pl.DataFrame({"day": ["2024-02-01", "2023-12-31"]}).with_columns(
            pl.col("day").str.to_date()
        )
    )
    assert BoundFilter(parse_filter("day >= '2024-01-01'"), table).select().as_rows().tolist() == [
        0
    ]


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ('utc == "2024-05-01T12:30:00"', ["may"]),
        ('utc <= "2024-05-01T12:30:00"', ["may"]),
        ('utc == "2024-05-01T12:30:00Z"', ["may"]),
        ('utc == "2024-05-01T14:30:00+02:00"', ["may"]),
        ("utc <= 2024-05-01", ["may"]),
        ('ny > "2024-11-03T05:45:00"', ["later"]),
        ("ny == 2024-11-03", ["earlier", "later"]),
        ('ny >= "2024-11-03" and ny < "2024-11-04"', ["earlier", "later"]),
    ],
)
def test_zoned_times_are_instants(expression: str, want: list[str]) -> None:
    """The clock of New York shows 01:30 and then 01:15 on the night it is set back."""
    moments = [
        datetime(2024, 5, 1, 12, 30, tzinfo=UTC),
        datetime(2024, 11, 3, 5, 30, tzinfo=UTC),
        datetime(2024, 11, 3, 6, 15, tzinfo=UTC),
    ]
    frame = pl.DataFrame({"utc": pl.Series(moments, dtype=pl.Datetime("us", "UTC"))}).with_columns(
        ny=pl.col("utc").dt.convert_time_zone("America/New_York")
    )
    rows = BoundFilter(parse_filter(expression), AttributeTable(frame)).select().as_rows()
    assert [["may", "earlier", "later"][row] for row in rows.tolist()] == want


def test_texts_that_are_not_all_dates_stay_texts() -> None:
    table = AttributeTable(pl.DataFrame({"a": ["2024-05-01", "soon"], "b": ["2024-02-30", None]}))
    assert table.schema == {"a": "string", "b": "string"}
    assert BoundFilter(parse_filter('a < "2024-06"'), table).select().as_rows().tolist() == [0]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30)),
    st.timezones() | st.none(),
    st.sampled_from(["auto", "seconds", "milliseconds", "microseconds", "minutes"]),
)
def test_any_time_of_python_is_read_as_the_same_instant(
    naive: datetime, zone: Any, precision: str
) -> None:
    moment = naive.replace(tzinfo=zone)
    assume((moment.utcoffset() or timedelta()).seconds % 60 == 0)  # unlike long ago
    text = moment.isoformat(timespec=precision)
    period = period_of(text)
    (read,) = instants_of(pl.Series([text])).to_list()
    assert period is not None and period.low == read
    whole = _instant(text) - datetime(1970, 1, 1, tzinfo=UTC)
    assert read == whole // timedelta(microseconds=1)


def test_times_compare_in_the_form_of_live_updates() -> None:
    times = [datetime(2024, 5, 1, 12), datetime(2024, 5, 1, 15, 0, 0, 500), datetime(2023, 1, 1)]
    table = AttributeTable(
        pl.DataFrame(
            {
                "made": times,
                "seen": [[time] for time in times],
                "zone": [time.replace(tzinfo=UTC) for time in times],
            }
        )
    )
    assert table.frame["made"].to_list() == [time.isoformat() for time in times]
    assert table.frame["seen"].to_list() == [[time.isoformat()] for time in times]
    assert table.frame["zone"].to_list() == [time.replace(tzinfo=UTC).isoformat() for time in times]
    assert BoundFilter(
        parse_filter("made >= '2024-05-01T12:00:00'"), table
    ).select().as_rows().tolist() == [0, 1]


CACHE = SelectionCache(TABLE)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(_combine(_leaf()) | _leaf())
def test_filters_of_one_shape_share_parsing_only(pair: tuple[str, Any]) -> None:
    text, tree = pair
    expected = [_slow(tree, row) is True for row in KNOWN]
    for expression in (text, f" {text}", text):
        selection = CACHE.get(expression)
        assert selection.as_mask().tolist() == expected and selection.count == sum(expected)
        assert sorted(selection.as_rows().tolist()) == [i for i, hit in enumerate(expected) if hit]


def test_filter_error_in_a_known_shape_has_its_own_position() -> None:
    for text, at in (
        ("price >= 1 and nothing <= 2", 15),
        ("price >= 1111 and nothing <= 2", 18),
        ("price >= 1..2", 9),
    ):
        for _ in range(2):
            with pytest.raises(FilterError) as caught:
                CACHE.get(text)
            assert caught.value.position == at
