"""Parse filter expressions: a typed subset of Milvus's boolean expressions.

    expression := and_part ("or" and_part)*
    and_part   := factor ("and" factor)*
    factor     := "not" factor | "(" expression ")" | contains | comparison
    contains   := "array_contains" "(" field "," literal ")"
    comparison := field op literal | literal op field | field ["not"] "in" list
    list       := "[" [literal ("," literal)*] "]"
    op         := "==" | "!=" | "<" | "<=" | ">" | ">="

``not`` is pushed down to the comparisons, where it turns one into its opposite.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

from index_builder.errors import FilterError

MAX_CHARACTERS = 20_000
MAX_DEPTH = 50
MAX_DIGITS = 400
"""Of an integer: more than attributes can hold, fewer than the 4,300 that Python converts."""

Value = int | float | str | bool

_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])
  | (?P<name>[^\W\d]\w*)
  | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
  | (?P<op>==|!=|<=|>=|<|>|&&|\|\||!|\(|\)|\[|\]|,)
)""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)", re.DOTALL
)
_SYMBOLS = {"&&": "and", "||": "or", "!": "not"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'", "/": "/"}


class Token(NamedTuple):
    """One word of an expression.

    Attributes:
        kind: ``number``, ``string``, ``bool``, ``name``, ``op`` or ``end``.
        value: What it stands for.
        at: Its offset.
    """

    kind: str
    value: Value
    at: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """``field op value``, ``field in values`` or ``array_contains(field, value)``.

    Attributes:
        field: Name of the attribute.
        op: A comparison, ``in``, ``not in``, ``contains`` or ``not contains``.
        values: One, or the list of ``in``.
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
        if code not in _ESCAPES:
            raise FilterError(
                f"unknown escape \\{code}; known are \\n \\t \\r \\\\ \\\" \\' \\uXXXX.",
                expression,
                place,
            )
        return _ESCAPES[code]

    return _ESCAPE.sub(replace, text[1:-1])


def _tokens(expression: str) -> list[Token]:
    """Split an expression into words; the last one is its end."""
    tokens: list[Token] = []
    position = 0
    stripped = len(expression.rstrip())
    while position < stripped:
        match = _TOKEN.match(expression, position)
        if match is None:
            raise _unreadable(expression, position)
        tokens.append(_token(expression, match))
        position = match.end()
    tokens.append(Token("end", "end of the filter", len(expression)))
    return tokens


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
        return Token("number", float(text), at)
    digits = len(text.lstrip("+-"))
    if digits > MAX_DIGITS:
        message = f"an integer of {digits:,} digits, more than {MAX_DIGITS}."
        raise FilterError(message, expression, at)
    return Token("number", int(text), at)


class _Parser:
    """Recursive descent over the words, with a bound on depth.

    ``negated`` is carried down, so that no ``not`` remains in the result.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.tokens = _tokens(expression)
        self.next = 0

    def error(self, message: str, token: Token) -> FilterError:
        """Make an error at a word."""
        return FilterError(message, self.expression, token.at)

    def peek(self) -> Token:
        """Return the next word."""
        return self.tokens[self.next]

    def take(self) -> Token:
        """Return the next word and go on."""
        token = self.tokens[self.next]
        self.next += 1
        return token

    def accept(self, word: str) -> bool:
        """Skip the next word if it is this operator, and return whether it was."""
        token = self.peek()
        if token.kind == "op" and token.value == word:
            self.next += 1
            return True
        return False

    def expect(self, word: str) -> None:
        """Skip this operator, which must come next."""
        if not self.accept(word):
            raise self.error(f"expected {word!r}, but got {self.peek().value!r}.", self.peek())

    def whole(self) -> Node:
        """Parse the whole expression."""
        node = self.either(False, 0)
        if self.peek().kind != "end":
            raise self.error(
                f"expected 'and', 'or' or the end, but got {self.peek().value!r}.", self.peek()
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
        is_contains = token.kind == "name" and str(token.value).lower() == "array_contains"
        if is_contains and self.accept("("):
            return self.contains(negated)
        if token.kind in ("number", "string", "bool"):
            op = self.operator()
            field = self.field()
            return self.leaf(field, _MIRRORED[str(op.value)], token, negated)
        if token.kind != "name":
            raise self.error(
                f"expected an attribute, a value, 'not' or '(', but got {token.value!r}.", token
            )
        if self.accept("in"):
            return self.membership(token, negated)
        if self.accept("not"):
            self.expect("in")
            return self.membership(token, not negated)
        op = self.operator()
        return self.leaf(token, str(op.value), self.literal(), negated)

    def contains(self, negated: bool) -> Leaf:
        """Parse the arguments of ``array_contains``."""
        field = self.field()
        self.expect(",")
        value = self.literal()
        self.expect(")")
        op = "not contains" if negated else "contains"
        return Leaf(str(field.value), op, (value.value,), field.at, value.at)

    def leaf(self, field: Token, op: str, value: Token, negated: bool) -> Leaf:
        """Make a comparison; a negated one is its opposite."""
        op = _OPPOSITE[op] if negated else op
        return Leaf(str(field.value), op, (value.value,), field.at, value.at)

    def membership(self, field: Token, negated: bool) -> Leaf:
        """Parse the list after ``field in``."""
        at = self.peek().at
        self.expect("[")
        values: list[Value] = []
        if not self.accept("]"):
            values.append(self.literal().value)
            while self.accept(","):
                values.append(self.literal().value)
            self.expect("]")
        return Leaf(str(field.value), "not in" if negated else "in", tuple(values), field.at, at)

    def operator(self) -> Token:
        """Parse a comparison operator."""
        token = self.take()
        if token.kind != "op" or token.value not in _OPPOSITE:
            raise self.error(f"expected one of == != < <= > >= in, but got {token.value!r}.", token)
        return token

    def field(self) -> Token:
        """Parse the name of an attribute."""
        token = self.take()
        if token.kind != "name":
            raise self.error(f"expected an attribute name, but got {token.value!r}.", token)
        return token

    def literal(self) -> Token:
        """Parse a number, string or boolean."""
        token = self.take()
        if token.kind not in ("number", "string", "bool"):
            raise self.error(
                f"expected a number, a string in quotes, true or false, but got {token.value!r}.",
                token,
            )
        return token


@functools.lru_cache(maxsize=256)
def parse_filter(expression: str) -> Filter:
    """Parse a filter; no name in it is looked up or called.

    Raises:
        FilterError: It does not parse; holds the position.
    """
    if not expression.strip():
        raise FilterError("the filter is empty; leave it out to search everything.", expression, 0)
    if len(expression) > MAX_CHARACTERS:
        raise FilterError(
            f"the filter has {len(expression):,} characters, more than {MAX_CHARACTERS:,}.",
            expression,
            MAX_CHARACTERS,
        )
    return Filter(expression, _Parser(expression).whole())
