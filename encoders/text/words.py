"""Split texts into words, for what counts or matches words: BM25, fastText, board titles.

Characters have the classes of the towers' n-grams (`ngrams.character_class`): marks belong to the
word of their letter, an emoji is a word, joiners and variation selectors are left out. Scripts
written without spaces (Han, kana, Thai, Lao, Khmer, Burmese) have no words to see: a run of them
becomes its characters, with their marks, and each two neighbours.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator

from encoders.text.ngrams import ALONE, DROPPED, SEPARATOR, character_class
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
_ASCII_WORD = re.compile(r"\w+", re.ASCII)


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
    visible = (c for c in fold(text) if _kind(c) != -1)
    runs: list[str] = []
    for kind, group in itertools.groupby(visible, key=_run_kind):
        if kind == _SYMBOL:
            runs.extend(group)
        elif kind == _SPACED:
            runs.append("".join(group))
    return runs


@functools.cache
def _kind(character: str) -> int:
    """Return the kind of a folded character; 0 where it separates, -1 where it is left out."""
    found = character_class(character)
    if found == SEPARATOR:
        return 0
    if found == DROPPED:
        return -1
    if unicodedata.category(character) == "So":
        return _SYMBOL
    code = ord(character)
    is_unspaced = any(first <= code <= last for first, last in _UNSPACED_RANGES)
    return _UNSPACED if is_unspaced or found == ALONE else _SPACED


def _run_kind(character: str) -> int:
    return min(_kind(character), _SPACED)


def _words_of_run(run: str) -> Iterator[str]:
    for kind, group in itertools.groupby(run, key=_kind):
        if kind != _UNSPACED:
            yield "".join(group)
            continue
        letters = _with_marks("".join(group))
        yield from letters
        yield from map("".join, itertools.pairwise(letters))


def _with_marks(text: str) -> list[str]:
    """Cut a text into characters, each with the marks that follow it."""
    letters: list[str] = []
    for character in text:
        if letters and unicodedata.category(character)[0] == "M":
            letters[-1] += character
        else:
            letters.append(character)
    return letters
