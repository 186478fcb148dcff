"""Split texts into words, for what counts or matches words: BM25, fastText, board titles.

Characters have the classes of the towers' n-grams (`ngrams.character_class`): marks belong to the
word of their letter, an emoji or a sign of currency is a word, plus and number signs belong to the
word that they end ("c++", "c#"), what nobody sees is left out. Scripts
written without spaces (Han, kana, Thai, Lao, Khmer, Burmese) have no words to see: a run of them
becomes its characters, with their marks, and each two neighbours.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator

from encoders.text.ngrams import ALONE, DROPPED, JOINS, SEPARATOR, character_class
from encoders.text.normal_forms import fold

_SYMBOL, _SPACED, _UNSPACED = 1, 2, 3
"""Kinds of a visible character: a word by itself, of a script with spaces, of one without."""

_UNSPACED_RANGES = (  # beside ideographs, which the towers' n-grams read as words
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # ideographic iteration mark, closing mark and zero
    (0x3041, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana extensions
)
_ASCII_WORD = re.compile(r"\$|\w+(?:[+#]+(?![+#\w]))?", re.ASCII)
_SIGNS = re.compile("[+#]+")


def words_of(text: str) -> list[str]:
    """Split a text into folded words; runs of scripts without spaces into uni- and bigrams.

    ``"हिंदी किताब"`` gives its two words, ``"生日"`` gives ``生``, ``日`` and ``生日``.
    """
    if text.isascii():
        return runs_of(text)
    return [word for run in runs_of(text) for word in _words_of_run(run)]


def runs_of(text: str) -> list[str]:
    """Split a text at everything that is no letter, mark, number, connector or symbol, folded.

    Scripts without spaces stay one run.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    visible = "".join(c for c in fold(text) if _kind(c) != -1)
    kinds = [min(_kind(c), _SPACED) for c in visible]
    for signs in _SIGNS.finditer(visible):
        first, end = signs.span()
        ends_word = first > 0 and character_class(visible[first - 1]) == JOINS
        if ends_word and (end == len(visible) or character_class(visible[end]) != JOINS):
            kinds[first:end] = [_SPACED] * (end - first)
    runs: list[str] = []
    start = 0
    for kind, group in itertools.groupby(kinds):
        letters = visible[start : start + len(list(group))]
        start += len(letters)
        if kind == _SYMBOL:
            runs.extend(letters)
        elif kind == _SPACED:
            runs.append(letters)
    return runs


@functools.cache
def _kind(character: str) -> int:
    """Return the kind of a folded character; 0 where it separates, -1 where it is left out."""
    found = character_class(character)
    if found == SEPARATOR:
        return 0
    if found == DROPPED:
        return -1
    if unicodedata.category(character) in ("So", "Sc"):
        return _SYMBOL
    code = ord(character)
    is_unspaced = any(first <= code <= last for first, last in _UNSPACED_RANGES)
    return _UNSPACED if is_unspaced or found == ALONE else _SPACED


def _words_of_run(run: str) -> Iterator[str]:
    for kind, group in itertools.groupby(run, key=_kind_in_run):
        if kind != _UNSPACED:
            yield "".join(group)
            continue
        letters = _with_marks("".join(group))
        yield from letters
        yield from map("".join, itertools.pairwise(letters))


def _kind_in_run(character: str) -> int:
    return _kind(character) or _SPACED  # a sign that ends a word


def _with_marks(text: str) -> list[str]:
    """Cut a text into characters, each with the marks that follow it."""
    letters: list[str] = []
    for character in text:
        if letters and unicodedata.category(character)[0] == "M":
            letters[-1] += character
        else:
            letters.append(character)
    return letters
