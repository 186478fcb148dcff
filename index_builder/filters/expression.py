"""Parse filter expressions: a typed subset of Milvus's boolean expressions.

    expression := and_part ("or" and_part)*
    and_part   := factor ("and" factor)*
    factor     := "not" factor | "(" expression ")" | contains | comparison
    contains   := "array_contains" "(" field "," literal ")"
                | ("array_contains_any" | "array_contains_all") "(" field "," list ")"
    comparison := field op literal | literal op field | field ["not"] "in" list
                | field ["not"] "like" string | field "is" ["not"] "null"
    list       := "[" [literal ("," literal)*] "]"
    op         := "==" | "!=" | "<" | "<=" | ">" | ">="
    literal    := number | string | date | "true" | "false"

``not`` is pushed down to the comparisons, where it turns one into its opposite. Work is bounded by
comparisons and listed values, each word being read when its turn comes.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

from index_builder.errors import FilterError
from index_builder.filters.patterns import parse_pattern
from index_builder.filters.times import period_of

MAX_COMPARISONS = 256
"""Of a filter; a pattern that is no prefix counts as ``PATTERN_COST`` of them."""
MAX_VALUES = 10_000
"""Of all lists of a filter together."""
PATTERN_COST = 16
MAX_PATTERN = 1_000
"""Characters of a pattern: the regular expression made of it has a bound, too."""
MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 50
MAX_DIGITS = 400
"""Of an integer: more than attributes can hold, fewer than the 4,300 that Python converts."""
_MAX_NUMBER = 20_000
"""Characters of a number: reading one takes time that grows with their square."""
_KEPT_CHARACTERS = 4_000
"""Longer expressions are parsed each time they come, so that the kept ones stay small."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A date or time without quotes, which is compared with dates and times only."""

    text: str


Value = int | float | str | bool | Moment

_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<date>\d{4}-\d{2}-\d{2}(?:[Tt][\d:.]+(?:[Zz]|[-+]\d{2}:?\d{2}|[-+]\d{2})?)?)(?![\w.:+-])
  | (?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])
  | (?P<name>[^\W\d]\w*)
  | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
  | (?P<op>==|!=|<=|>=|<|>|&&|\|\||!|\(|\)|\[|\]|,)
)""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)", re.DOTALL
)
_LITERALS = ("number", "string", "date", "bool")
_SYMBOLS = {"&&": "and", "||": "or", "!": "not"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'", "/": "/"}
_PATTERN_ESCAPES = {"%": "\\%", "_": "\\_"}
"""Escapes of patterns, which are theirs to resolve, and stay in the string."""
_LISTED = {"array_contains_any": "contains any", "array_contains_all": "contains all"}


class Token(NamedTuple):
    """One word of an expression.

    Attributes:
        kind: ``number``, ``string``, ``bool``, ``date``, ``name``, ``op`` or ``end``.
        value: What it stands for.
        at: Its offset.
    """

    kind: str
    value: Value
    at: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """One comparison.

    Attributes:
        field: Name of the attribute.
        op: ``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``; or one of ``in``, ``like``, ``null``,
            ``contains``, ``contains any`` and ``contains all``, with ``not`` before it or without.
        values: One, those of a list, or none for ``null``.
        at: Offset of the field.
        value_at: Offset of the values.
    """

    field: str
    op: str
    values: tuple[Value, ...]
    at: int
    value_at: int


@dataclass(frozen=True, slots=True)
class Both:
    """Every part holds."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """At least one part holds."""

    parts: tuple[Node, ...]


Node = Leaf | Both | Either


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed expression in negation normal form."""

    expression: str
    root: Node


def _unquote(text: str, expression: str, at: int) -> str:
    """Resolve the escapes of a quoted string that begins at offset ``at``."""

    def replace(match: re.Match[str]) -> str:
        code, place = match.group(1), at + match.start() + 1
        if len(code) > 5:  # a surrogate pair, as JSON writes a character beyond U+FFFF
            return chr(0x10000 + ((int(code[1:5], 16) & 0x3FF) << 10) + (int(code[7:], 16) & 0x3FF))
        if len(code) == 5:
            number = int(code[1:], 16)
            if 0xD800 <= number <= 0xDFFF:
                raise FilterError(
                    f"\\{code} is half of a surrogate pair; write both halves, or the character.",
                    expression,
                    place,
                )
            return chr(number)
        if code == "u":
            raise FilterError("\\u needs four hexadecimal digits.", expression, place)
        if code in _PATTERN_ESCAPES:
            return _PATTERN_ESCAPES[code]
        if code not in _ESCAPES:
            raise FilterError(
                f"unknown escape \\{code}; known are \\n \\t \\r \\\\ \\\" \\' \\uXXXX.",
                expression,
                place,
            )
        return _ESCAPES[code]

    return _ESCAPE.sub(replace, text[1:-1])


def _unreadable(expression: str, position: int) -> FilterError:
    """Say what stands after ``position``, where no word begins."""
    rest = expression[position:].lstrip()
    at = len(expression) - len(rest)
    if rest[0] in "\"'":
        return FilterError("this string has no closing quote.", expression, at)
    return FilterError(f"unexpected {rest[:10].split()[0]!r}.", expression, at)


def _token(expression: str, match: re.Match[str]) -> Token:
    """Make the word that ``_TOKEN`` matched."""
    kind = str(match.lastgroup)
    text, at = match.group(kind), match.start(kind)
    if kind == "number":
        return _number(expression, text, at)
    if kind == "string":
        return Token("string", _unquote(text, expression, at), at)
    if kind == "date":
        if period_of(text) is None:
            raise FilterError(
                f"{text} is no date or time; write 2024-05-01 or 2024-05-01T12:30:00+02:00.",
                expression,
                at,
            )
        return Token("date", Moment(text), at)
    if kind == "op":
        return Token("op", _SYMBOLS.get(text, text), at)
    word = text.lower()
    if word in ("true", "false"):
        return Token("bool", word == "true", at)
    if word in ("and", "or", "not", "in"):
        return Token("op", word, at)
    return Token("name", text, at)


def _number(expression: str, text: str, at: int) -> Token:
    """Make a number: an integer where there is no fraction and no exponent."""
    if re.fullmatch(r"[-+]?\d+", text) is None:
        if len(text) > _MAX_NUMBER:
            message = f"a number of {len(text):,} characters, more than {_MAX_NUMBER:,}."
            raise FilterError(message, expression, at)
        return Token("number", float(text), at)
    digits = len(text.lstrip("+-"))
    if digits > MAX_DIGITS:
        message = f"an integer of {digits:,} digits, more than {MAX_DIGITS}."
        raise FilterError(message, expression, at)
    return Token("number", int(text), at)


class _Parser:
    """Recursive descent over the words, with bounds on depth and work.

    ``negated`` is carried down, so that no ``not`` remains in the result.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.end = len(expression.rstrip())
        self.position = 0
        self.comparisons = 0
        self.values = 0
        self.next = self.read()

    def error(self, message: str, token: Token) -> FilterError:
        """Make an error at a word."""
        return FilterError(message, self.expression, token.at)

    def read(self) -> Token:
        """Read the word at the position; the last one is the end."""
        if self.position >= self.end:
            return Token("end", "end of the filter", len(self.expression))
        match = _TOKEN.match(self.expression, self.position)
        if match is None:
            raise _unreadable(self.expression, self.position)
        token = _token(self.expression, match)
        self.position = match.end()
        return token

    def peek(self) -> Token:
        """Return the next word."""
        return self.next

    def take(self) -> Token:
        """Return the next word and go on."""
        token = self.next
        self.next = self.read()
        return token

    def accept(self, word: str) -> bool:
        """Skip the next word if it is this operator, and return whether it was."""
        token = self.next
        if token.kind == "op" and token.value == word:
            self.take()
            return True
        return False

    def accept_name(self, *words: str) -> Token | None:
        """Skip the next word if it is one of these, in any case, and return it."""
        token = self.next
        if token.kind == "name" and str(token.value).lower() in words:
            return self.take()
        return None

    def count(self, token: Token, comparisons: int = 1) -> None:
        """Count comparisons towards the bound on work."""
        self.comparisons += comparisons
        if self.comparisons > MAX_COMPARISONS:
            raise self.error(
                f"more than {MAX_COMPARISONS} comparisons (a pattern that is no prefix counts as"
                f" {PATTERN_COST}); write many values of one attribute as a list: name in [..].",
                token,
            )

    def expect(self, word: str) -> None:
        """Skip this operator, which must come next."""
        if not self.accept(word):
            raise self.error(f"expected {word!r}, but got {_shown(self.peek())}.", self.peek())

    def whole(self) -> Node:
        """Parse the whole expression."""
        node = self.either(False, 0)
        if self.peek().kind != "end":
            raise self.error(
                f"expected 'and', 'or' or the end, but got {_shown(self.peek())}.", self.peek()
            )
        return node

    def either(self, negated: bool, depth: int) -> Node:
        """Parse parts joined by ``or``."""
        if depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} nested parentheses or negations.", self.peek())
        parts = [self.both(negated, depth)]
        while self.accept("or"):
            parts.append(self.both(negated, depth))
        if len(parts) == 1:
            return parts[0]
        return Both(tuple(parts)) if negated else Either(tuple(parts))

    def both(self, negated: bool, depth: int) -> Node:
        """Parse parts joined by ``and``."""
        parts = [self.factor(negated, depth)]
        while self.accept("and"):
            parts.append(self.factor(negated, depth))
        if len(parts) == 1:
            return parts[0]
        return Either(tuple(parts)) if negated else Both(tuple(parts))

    def factor(self, negated: bool, depth: int) -> Node:
        """Parse a negation, parentheses or a comparison."""
        if depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} nested parentheses or negations.", self.peek())
        if self.accept("not"):
            return self.factor(not negated, depth + 1)
        if self.accept("("):
            node = self.either(negated, depth + 1)
            self.expect(")")
            return node
        return self.comparison(negated)

    def comparison(self, negated: bool) -> Node:
        """Parse one comparison."""
        token = self.take()
        self.count(token)
        if token.kind == "name" and self.accept("("):
            return self.contains(token, negated)
        if token.kind in _LITERALS:
            op = self.operator()
            field = self.field()
            return self.leaf(field, _MIRRORED[str(op.value)], token, negated)
        if token.kind != "name":
            raise self.error(
                f"expected an attribute, a value, 'not' or '(', but got {_shown(token)}.", token
            )
        if self.accept_name("is"):
            return self.null(token, negated)
        if self.accept("not"):
            negated = not negated
            if self.accept_name("like"):
                return self.like(token, negated)
            self.expect("in")
            return self.membership(token, negated)
        if self.accept_name("like"):
            return self.like(token, negated)
        if self.accept("in"):
            return self.membership(token, negated)
        op = self.operator()
        return self.leaf(token, str(op.value), self.literal(), negated)

    def contains(self, function: Token, negated: bool) -> Leaf:
        """Parse the arguments of ``array_contains`` and its kin."""
        name = str(function.value).lower()
        if name != "array_contains" and name not in _LISTED:
            known = ", ".join(["array_contains", *_LISTED])
            message = f"unknown function {function.value!r}; known are {known}."
            raise self.error(message, function)
        field = self.field()
        self.expect(",")
        at = self.peek().at
        op = _LISTED.get(name, "contains")
        values = self.listed() if name in _LISTED else (self.literal().value,)
        self.expect(")")
        return Leaf(str(field.value), f"not {op}" if negated else op, values, field.at, at)

    def leaf(self, field: Token, op: str, value: Token, negated: bool) -> Leaf:
        """Make a comparison; a negated one is its opposite."""
        op = _OPPOSITE[op] if negated else op
        return Leaf(str(field.value), op, (value.value,), field.at, value.at)

    def null(self, field: Token, negated: bool) -> Leaf:
        """Parse what follows ``field is``."""
        at = self.peek().at
        if self.accept("not"):
            negated = not negated
        if not self.accept_name("null"):
            raise self.error(f"expected null, but got {_shown(self.peek())}.", self.peek())
        return Leaf(str(field.value), "not null" if negated else "null", (), field.at, at)

    def like(self, field: Token, negated: bool) -> Leaf:
        """Parse the pattern after ``field like``."""
        token = self.take()
        pattern = parse_pattern(str(token.value)) if token.kind == "string" else None
        if token.kind != "string":
            raise self.error(f"expected a pattern in quotes, but got {_shown(token)}.", token)
        if len(str(token.value)) > MAX_PATTERN:
            message = (
                f"a pattern of {len(str(token.value)):,} characters, more than {MAX_PATTERN:,}."
            )
            raise self.error(message, token)
        if pattern is None:
            raise self.error("the backslash at the end of this pattern escapes nothing.", token)
        if not (pattern.is_text or pattern.is_prefix):
            self.count(token, PATTERN_COST - 1)
        op = "not like" if negated else "like"
        return Leaf(str(field.value), op, (token.value,), field.at, token.at)

    def membership(self, field: Token, negated: bool) -> Leaf:
        """Parse the list after ``field in``."""
        at = self.peek().at
        op = "not in" if negated else "in"
        return Leaf(str(field.value), op, self.listed(), field.at, at)

    def listed(self) -> tuple[Value, ...]:
        """Parse a list of values."""
        self.expect("[")
        values: list[Value] = []
        while not self.accept("]"):
            if values:
                if self.peek().value != ",":
                    self.expect("]")
                self.expect(",")
            self.values += 1
            if self.values > MAX_VALUES:
                raise self.error(f"more than {MAX_VALUES:,} values in lists.", self.peek())
            values.append(self.literal().value)
        return tuple(values)

    def operator(self) -> Token:
        """Parse a comparison operator."""
        token = self.take()
        if token.kind != "op" or token.value not in _OPPOSITE:
            raise self.error(
                f"expected one of == != < <= > >= in like is, but got {_shown(token)}.", token
            )
        return token

    def field(self) -> Token:
        """Parse the name of an attribute."""
        token = self.take()
        if token.kind != "name":
            raise self.error(f"expected an attribute name, but got {_shown(token)}.", token)
        return token

    def literal(self) -> Token:
        """Parse a number, string, date or boolean."""
        token = self.take()
        if token.kind not in _LITERALS:
            null = token.kind == "name" and str(token.value).lower() in ("null", "none")
            hint = " Missing values: name is null, name is not null." if null else ""
            raise self.error(
                "expected a number, a string in quotes, a date, true or false, but got"
                f" {_shown(token)}.{hint}",
                token,
            )
        return token


def _shown(token: Token) -> str:
    """Show a word in a message."""
    return token.value.text if isinstance(token.value, Moment) else repr(token.value)


def parse_filter(expression: str) -> Filter:
    """Parse a filter; no name in it is looked up or called.

    Raises:
        FilterError: It does not parse, or asks for too much work; holds the position.
    """
    if len(expression) <= _KEPT_CHARACTERS:
        return _parse_and_keep(expression)
    if len(expression) > MAX_CHARACTERS:
        raise FilterError(
            f"the filter has {len(expression):,} characters, more than {MAX_CHARACTERS:,}.",
            expression,
            MAX_CHARACTERS,
        )
    return _parse(expression)


def _parse(expression: str) -> Filter:
    if not expression.strip():
        raise FilterError("the filter is empty; leave it out to search everything.", expression, 0)
    return Filter(expression, _Parser(expression).whole())


_parse_and_keep = functools.lru_cache(maxsize=256)(_parse)
forget_parsed = _parse_and_keep.cache_clear
"""Drops what was parsed (benchmarks measure each filter afresh)."""
