"""Translate filters to Milvus' expressions, so that they select the same entities, or refuse them.

Attributes are dynamic fields of a collection; a missing value is a missing key, for which Milvus
answers differently from operator to operator. Every comparison that a missing key could satisfy is
therefore guarded by ``exists``, and no ``not`` stands before a comparison: the parser has pushed it
down. Times are compared by a field of their own that holds microseconds since 1970.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from index_builder.errors import FilterError
from index_builder.filters.expression import Both, Filter, Leaf, Node, parse_filter
from index_builder.filters.field_types import FieldType
from index_builder.filters.patterns import parse_pattern
from index_builder.filters.selection import ID_FIELD, check_types, literal_period

_NOTHING = f"{ID_FIELD} in []"
_OPERATORS = {"==", "!=", "<", "<=", ">", ">="}
_LARGEST_INT = 2**63
_LAST_CHARACTER = chr(0x10FFFF)


def time_field(name: str) -> str:
    """Return the dynamic field that holds the instants of an attribute of dates and times."""
    return f"{name}@us"


def milvus_expression(expression: str, schema: Mapping[str, FieldType]) -> str:
    """Return what Milvus is asked for a filter.

    Args:
        expression: The filter.
        schema: Types of the release's attributes.

    Raises:
        FilterError: The filter does not parse, does not fit the attributes, or Milvus has no
            expression that means the same.
    """
    parsed = parse_filter(expression)
    check_types(parsed, schema)
    return _Translator(parsed, schema).node(parsed.root)


class _Translator:
    def __init__(self, parsed: Filter, schema: Mapping[str, FieldType]) -> None:
        self._expression = parsed.expression
        self._schema = schema

    def node(self, node: Node) -> str:
        """Translate a part of the filter."""
        if isinstance(node, Leaf):
            return self._leaf(node)
        word = " and " if isinstance(node, Both) else " or "
        return word.join(f"({self.node(part)})" for part in node.parts)

    def _leaf(self, leaf: Leaf) -> str:
        op, negated = leaf.op.removeprefix("not "), leaf.op.startswith("not ")
        if leaf.field == ID_FIELD:
            negated = negated or op == "!="
            return f"{ID_FIELD} {'not in' if negated else 'in'} {_listed(leaf.values)}"
        type_ = self._schema[leaf.field]
        field = _field(leaf.field)
        if op == "null":
            return f"exists {field}" if negated else f"not (exists {field})"
        if type_.endswith(("time", "time>")):
            return self._times(leaf, op, negated)
        if op == "like":
            hit = self._like(leaf, field)
        elif op.startswith("contains"):
            hit = _contains(field, op, leaf.values)
        elif op == "in":
            hit = _any(_compared(field, "==", value, type_) for value in leaf.values)
        else:
            hit = _compared(field, op, leaf.values[0], type_)
        return f"(exists {field}) and not ({hit})" if negated else hit

    def _times(self, leaf: Leaf, op: str, negated: bool) -> str:
        """Compare instants."""
        field = _field(time_field(leaf.field))
        periods = [literal_period(value) for value in leaf.values]
        if op.startswith("contains"):
            if any(period.high - period.low > 1 for period in periods):
                raise self._refused(
                    "Milvus cannot look for a whole day in a list of times; name the exact times",
                    leaf,
                )
            hit = _contains(field, op, [period.low for period in periods])
        elif op in ("in", "==", "!="):
            negated = negated or op == "!="
            hit = _any(f"({field} >= {low} and {field} < {high})" for low, high in periods)
        else:
            ((low, high),) = periods
            hit = f"{field} {'<' if op[0] == '<' else '>='} {high if op in ('<=', '>') else low}"
        return f"(exists {field}) and not ({hit})" if negated else hit

    def _like(self, leaf: Leaf, field: str) -> str:
        """Compare with the range of strings that begin with a prefix."""
        pattern = parse_pattern(str(leaf.values[0]))
        assert pattern is not None, "the parser checks patterns"
        if pattern.is_text:
            return _compared(field, "==", pattern.prefix, "string")
        if not pattern.is_prefix:
            raise self._refused(
                "Milvus' like differs between versions but for prefixes; end the pattern with the"
                " only %",
                leaf,
            )
        after = _after_prefix(pattern.prefix)
        hit = f"{field} >= {_literal(pattern.prefix)}"
        return hit if after is None else f"({hit} and {field} < {_literal(after)})"

    def _refused(self, why: str, leaf: Leaf) -> FilterError:
        return FilterError(f"{why}, or search the release itself.", self._expression, leaf.at)


def _field(name: str) -> str:
    """Name a dynamic field so that no word of Milvus' language is taken for something else."""
    return f"$meta[{json.dumps(name, ensure_ascii=False)}]"


def _literal(value: object) -> str:
    """Write a value as Milvus reads it."""
    return json.dumps(value, ensure_ascii=False)


def _listed(values: Sequence[object]) -> str:
    return f"[{', '.join(map(_literal, values))}]"


def _any(parts: object) -> str:
    return " or ".join(parts) or _NOTHING  # type: ignore[arg-type]


def _held(value: int | float, type_: FieldType) -> int | float:
    """Return a number as a column of a type holds it; infinity where it is beyond every value."""
    if -_LARGEST_INT <= value < _LARGEST_INT:
        return value
    if type_ != "float":
        return math.inf if value > 0 else -math.inf
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _compared(field: str, op: str, value: object, type_: FieldType) -> str:
    """Compare with one literal; a number that no column of the type holds is beyond every value."""
    assert op in _OPERATORS
    if isinstance(value, int | float):
        value = _held(value, type_)
    if isinstance(value, float) and math.isinf(value):
        below = value > 0
        always = op == "!=" or ((op[0] == "<") == below and op != "==")
        return f"exists {field}" if always else _NOTHING
    compared = f"{field} {op} {_literal(value)}"
    return f"((exists {field}) and {compared})" if op == "!=" else compared


def _contains(field: str, op: str, values: Sequence[object]) -> str:
    """Look for values in a list; without any, every list holds all of them and none holds one."""
    if not values:
        return f"exists {field}" if op == "contains all" else _NOTHING
    word = " and " if op == "contains all" else " or "
    return f"({word.join(f'json_contains({field}, {_literal(value)})' for value in values)})"


def _after_prefix(prefix: str) -> str | None:
    """Return the first string behind all that begin with ``prefix``; None: there is none."""
    prefix = prefix.rstrip(_LAST_CHARACTER)
    if not prefix:
        return None
    following = ord(prefix[-1]) + 1
    if 0xD800 <= following <= 0xDFFF:
        following = 0xE000
    return prefix[:-1] + chr(following)
