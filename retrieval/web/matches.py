"""Mark the words of a query in the texts of a hit, split as the lexical leg splits them."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from encoders.text.words import runs_of, words_of
from index_builder.lexical.terms import MAX_QUERY_CHARACTERS

PLAIN, WORD, LETTERS = 0, 1, 2
"""How a part of a text matches: not at all; as a word of the query; by most of its letters."""
Part = tuple[str, int]
"""A part of a text, and how it matches."""

MIN_LETTERS = 4
"""Shorter words are not compared by their letters."""
MIN_SHARED = 0.42
"""Dice coefficient of two words' trigrams from which they are said to share their letters."""
MAX_CHARACTERS = 300
"""Of one field that are looked at; hits are many, and answers must be quick."""
MAX_ITEMS = 10
"""Items of a list that are looked at."""
MAX_FIELDS = 3
"""Fields of a hit, beside its title, that are shown with their matches."""
BEFORE = 40
"""Characters shown before the first match of a field."""
SHOWN = 160
"""Characters of a field that are shown."""


@lru_cache(maxsize=1)
def _piece_pattern() -> re.Pattern[str]:
    """Return what finds words with their marks and signs, and every other visible character."""
    marks = (chr(c) for c in range(0x300, 0x20000) if unicodedata.category(chr(c))[0] == "M")
    return re.compile(rf"\w[\w{''.join(marks)}]*[+#]*|\S")


class QueryWords:
    """The words of a query, ready to be found in texts.

    Args:
        text: The query.
    """

    def __init__(self, text: str) -> None:
        text = text[:MAX_QUERY_CHARACTERS]
        self._words = frozenset(words_of(text))
        self._runs = frozenset(runs_of(text))
        self._trigrams = [_trigrams(run) for run in self._runs if len(run) >= MIN_LETTERS]
        self._known: dict[str, int] = {}

    def parts(self, text: str) -> list[Part]:
        """Cut a text into parts that match and parts that do not; joined they are the text."""
        found: list[Part] = []
        end = 0
        for piece in _piece_pattern().finditer(text):
            found.append((text[end : piece.start()], PLAIN))
            found.extend(self._matched(piece[0]))
            end = piece.end()
        found.append((text[end:], PLAIN))
        return [
            ("".join(part for part, _ in group), kind)
            for kind, group in itertools.groupby((p for p in found if p[0]), key=lambda p: p[1])
        ]

    def _matched(self, piece: str) -> Iterable[Part]:
        kind = self._known.get(piece)
        if kind is None:
            words = words_of(piece)
            if len(words) > 1:
                return self._matched_letters(piece)
            kind = self._known[piece] = self._kind(words)
        return [(piece, kind)]

    def _kind(self, words: Sequence[str]) -> int:
        if not words:
            return PLAIN
        if words[0] in self._words:
            return WORD
        if len(words[0]) < MIN_LETTERS:
            return PLAIN
        mine = _trigrams(words[0])
        shared = (2 * len(mine & other) / (len(mine) + len(other)) for other in self._trigrams)
        return LETTERS if max(shared, default=0.0) >= MIN_SHARED else PLAIN

    def _matched_letters(self, piece: str) -> Iterator[Part]:
        """Match a run that holds letters without spaces between words, two neighbours at a time.

        One letter alone matches where it is a query by itself: most texts share some.
        """
        units = _units(piece)
        pairs = [words_of(a + b) for a, b in itertools.pairwise(units)]
        # Two letters give three words: each of them, and both
        is_shared = [len(pair) == 3 and pair[2] in self._words for pair in pairs]
        for place, unit in enumerate(units):
            matches = any(is_shared[max(0, place - 1) : place + 1])
            for word in words_of(unit):
                may_be_alone = _is_spaced(unit[0]) or word in self._runs
                matches |= may_be_alone and word in self._words
            yield unit, WORD if matches else PLAIN


def _units(piece: str) -> list[str]:
    """Cut a run into letters of scripts without spaces, and runs of other letters."""
    units: list[str] = []
    follows_spaced = False
    for character in piece:
        is_mark = unicodedata.category(character)[0] == "M"
        is_spaced = follows_spaced if is_mark else _is_spaced(character)
        if units and (is_mark or (is_spaced and follows_spaced)):
            units[-1] += character
        else:
            units.append(character)
        follows_spaced = is_spaced
    return units


def _is_spaced(character: str) -> bool:
    """Return whether a letter is of a script with spaces: two of them are one word."""
    return len(words_of(character * 2)) < 2


def _trigrams(word: str) -> frozenset[str]:
    padded = f" {word} "
    return frozenset(padded[start : start + 3] for start in range(len(padded) - 2))


def matches_of(
    words: QueryWords, values: Mapping[str, Any], fields: Iterable[str]
) -> list[tuple[str, list[Part]]]:
    """Return fields of a hit that hold words of the query, those with most of them first.

    Args:
        words: Of the query.
        values: Attributes of the hit.
        fields: Names of those whose words are indexed.
    """
    found: list[tuple[int, str, list[Part]]] = []
    for name in fields:
        parts = words.parts(_text_of(values.get(name)))
        count = len({part.casefold() for part, kind in parts if kind == WORD})
        if any(kind for _, kind in parts):
            found.append((-count, name, _excerpt(parts)))
    found.sort(key=lambda field: field[0])
    return [(name, parts) for _, name, parts in found[:MAX_FIELDS]]


def _text_of(value: object) -> str:
    text = ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, list):
        text = " · ".join(item for item in value[:MAX_ITEMS] if isinstance(item, str))
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"


def _excerpt(parts: list[Part]) -> list[Part]:
    """Cut a text down to what surrounds its first match."""
    text, first = parts[0]
    if first == PLAIN and len(text) > BEFORE:
        end = text[-BEFORE:]
        parts = [("… " + (end.partition(" ")[2] or end), PLAIN), *parts[1:]]
    shown: list[Part] = []
    left = SHOWN
    for text, kind in parts:
        if len(text) > left:
            return [*shown, (text[:left].rstrip() + " …", PLAIN)]
        shown.append((text, kind))
        left -= len(text)
    return shown
