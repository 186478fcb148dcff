"""Filters against a slow evaluator with three-valued logic; errors know their position."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.errors import BadAttribute, FilterError
from index_builder.filters.attributes import AttributeTable
from index_builder.filters.cache import SelectionCache
from index_builder.filters.expression import parse_filter
from index_builder.filters.selection import BoundFilter

ROWS: list[dict[str, Any]] = [
    {
        "price": None if i % 7 == 0 else i % 11 - 3,
        "rating": None if i % 5 == 0 else (i % 9) / 4,
        "country": None if i % 6 == 0 else ["us", "de", "fr", "日本"][i % 4],
        "live": None if i % 8 == 0 else i % 3 == 0,
        "tags": None if i % 4 == 0 else [["a"], [], ["a", "b", "a"], ["c"]][i % 4 - 1 + (i % 2)],
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
        },
    )
)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else repr(value)


_OPS = ["==", "!=", "<", "<=", ">", ">="]
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "price": st.integers(-5, 9) | st.sampled_from([1.5, -10.0, 1e30]),
    "rating": st.sampled_from([0.0, 0.25, 1.0, 1.3, 2, -1]),
    "country": st.sampled_from(["us", "de", "日本", "zz", ""]),
    "live": st.booleans(),
}


@st.composite
def _leaf(draw: st.DrawFn) -> tuple[str, Any]:
    field = draw(st.sampled_from([*_VALUES, "tags"]))
    if field == "tags":
        value = draw(st.sampled_from(["a", "b", "zz"]))
        return f'array_contains(tags, "{value}")', ("contains", field, value)
    if draw(st.booleans()):
        values = draw(st.lists(_VALUES[field], max_size=3))
        negated = draw(st.booleans())
        word = "not in" if negated else "in"
        return f"{field} {word} [{', '.join(map(_literal, values))}]", (word, field, values)
    op = draw(st.sampled_from(["==", "!="] if field == "live" else _OPS))
    value = draw(_VALUES[field])
    return f"{field} {op} {_literal(value)}", (op, field, value)


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
    value = row[tree[1]]
    if value is None:
        return None
    if op == "contains":
        return tree[2] in value
    if op in ("in", "not in"):
        return (value in tree[2]) == (op == "in")
    other = tree[2]
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


@settings(max_examples=150, deadline=None)
@given(st.recursive(_leaf(), _combine, max_leaves=6))
def test_selected_rows_follow_three_valued_logic(case: tuple[str, Any]) -> None:
    expression, tree = case
    bound = BoundFilter(parse_filter(expression), TABLE)
    selection = bound.select()
    want = [i for i, row in enumerate(ROWS) if _slow(tree, row) is True]
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
        ("__import__('os')", 10, "expected one of"),
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


def test_attribute_table_aligns_columns_and_refuses_what_cannot_be_one() -> None:
    like = AttributeTable.aligned(pl.DataFrame({"price": [5]}), TABLE, 1)
    assert like.schema == TABLE.schema
    assert BoundFilter(parse_filter("price == 5"), like).select().count == 1
    assert BoundFilter(parse_filter("country != 'us'"), like).select().count == 0
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


@settings(max_examples=300, deadline=None)
@given(_combine(_leaf()) | _leaf())
def test_filters_of_one_shape_share_parsing_only(pair: tuple[str, Any]) -> None:
    text, tree = pair
    expected = [_slow(tree, row) is True for row in ROWS]
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
