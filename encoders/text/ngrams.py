"""Find the words, word bigrams and character trigrams of many texts at once.

Notable: texts are one array of code points, so that every step is a few passes over numpy arrays;
n-grams are 64-bit keys (a word is a polynomial hash of its characters, a trigram packs its three
code points without loss). ``vocabulary.py`` counts and numbers them.

What is a token, on folded text (`encoders.text.normal_forms.fold`):

* a **word** is a longest run of letters, marks, numbers and connector punctuation, with the plus
  and number signs at its end ("c++", "c#"); an ideograph, and a symbol such as an emoji or a sign
  of currency, is a word of its own; everything else separates;
* a **bigram** is two neighbouring words of one line (a line break, and so the border of two list
  items, breaks the pair);
* a **trigram** is a character with its left and right neighbour, where a separator counts as a
  space (``" re" "red" "ed "``); a separator is never in the middle;
* what nobody sees (`encoders.text.normal_forms.INVISIBLE`) is dropped first, so it neither splits
  nor distinguishes words.

These rules have a number, ``TEXT_RULES``: a vocabulary keeps reading by those it was counted with.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from encoders.text.hashing import UInt64, splitmix64_finalise
from encoders.text.normal_forms import INVISIBLE, fold

UInt32 = npt.NDArray[np.uint32]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

KINDS = ("unigram", "bigram", "trigram")
TEXT_RULES = 2
"""Version of the rules above.

1, of version 0.1: signs of currency and at the end of words separated, and fewer invisible
characters were dropped.
"""
SIGNS = (0x2B, 0x23)
"""Plus and number sign: part of the word that they end."""
TEXT_END, LINE_END = "\x00", "\n"
SEPARATOR, JOINS, ALONE, DROPPED = 0, 1, 2, 3
"""Character classes: separates words, belongs to a word, is a word by itself, is left out."""
_BASE = 0x9E3779B97F4A7C15
"""Base of the polynomial hash; odd, so it has an inverse modulo 2**64."""
_INVERSE = pow(_BASE, -1, 1 << 64)
_SALTS = np.array([0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0], dtype=np.uint64)
"""One per kind."""
_BATCH_CHARACTERS = 1 << 19
_IS_INVISIBLE = re.compile(f"[{INVISIBLE}]").match


def character_class(character: str, rules: int = TEXT_RULES) -> int:
    """Return ``SEPARATOR``, ``JOINS``, ``ALONE`` or ``DROPPED`` for one folded character.

    Signs (``SIGNS``) separate by themselves; ``signs_of_words`` finds those that do not.
    """
    category, code = unicodedata.category(character), ord(character)
    is_selector = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
    if (category == "Cf" and code != 0x200B) or is_selector:
        return DROPPED
    if rules > 1 and _IS_INVISIBLE(character):
        return DROPPED
    if category == "So" or (rules > 1 and category == "Sc") or _is_ideograph(code):
        return ALONE
    return JOINS if category[0] in "LMN" or category == "Pc" else SEPARATOR


def _is_ideograph(code: int) -> bool:
    return (
        0x3400 <= code <= 0x4DBF
        or 0x4E00 <= code <= 0x9FFF
        or 0xF900 <= code <= 0xFAFF
        or 0x20000 <= code <= 0x3FFFD
    )


_FEW_CODES = 4096
"""So few characters are classified one by one: the table of all takes a second to make."""


def _classes(codes: UInt32, rules: int) -> npt.NDArray[np.uint8]:
    if len(codes) > _FEW_CODES:
        table: npt.NDArray[np.uint8] = _class_table(rules)[codes]
        return table
    found = (_class_of(code, rules) for code in codes.tolist())
    return np.fromiter(found, dtype=np.uint8, count=len(codes))


@functools.lru_cache(maxsize=1 << 16)
def _class_of(code: int, rules: int) -> int:
    return character_class(chr(code), rules)


@functools.cache
def _class_table(rules: int) -> npt.NDArray[np.uint8]:
    """Tabulate ``character_class`` of every code point."""
    classes = (character_class(chr(code), rules) for code in range(0x110000))
    return np.fromiter(classes, dtype=np.uint8, count=0x110000)


def visible_codes(
    texts: Sequence[str], rules: int = TEXT_RULES
) -> tuple[UInt32, npt.NDArray[np.uint8]]:
    """Fold texts; return their visible code points and classes, each text closed by one 0.

    Returns:
        uint32 (L,) and uint8 (L,): ``SEPARATOR``, ``JOINS`` or ``ALONE``.
    """
    codes = _code_points(texts)
    classes = _classes(codes, rules)
    dropped = classes == DROPPED
    if dropped.any():
        codes, classes = codes[~dropped], classes[~dropped]
    if rules > 1:
        signs = signs_of_words(codes, classes)
        if len(signs):
            classes[signs] = JOINS
    return codes, classes


def signs_of_words(codes: UInt32, classes: npt.NDArray[np.uint8]) -> Int64:
    """Find the signs that belong to a word: runs behind its last character, ``"c++"``, ``"c#"``.

    A run with a word on both sides separates: ``"a+b"`` is two words.

    Args:
        codes: uint32 (L,), closed by a separator.
        classes: uint8 (L,).

    Returns:
        int64 positions.
    """
    is_sign = (codes == SIGNS[0]) | (codes == SIGNS[1])
    if not is_sign.any():
        return np.empty(0, np.int64)
    edges = np.flatnonzero(np.diff(is_sign, prepend=False))
    starts, ends = edges[::2], edges[1::2]
    kept = (classes[starts - 1] == JOINS) & (classes[ends] != JOINS)
    lengths = (ends - starts)[kept]
    first = np.repeat(starts[kept] - np.cumsum(lengths) + lengths, lengths)
    found: Int64 = first + np.arange(len(first))
    return found


@functools.cache
def _powers(length: int) -> tuple[UInt64, UInt64]:
    """Return (length,) powers of the base and of its inverse modulo 2**64, from exponent 0."""
    return _geometric(_BASE, length), _geometric(_INVERSE, length)


def _geometric(ratio: int, length: int) -> UInt64:
    factors = np.full(length, ratio, dtype=np.uint64)
    factors[0] = 1
    with np.errstate(over="ignore"):
        return np.cumprod(factors, dtype=np.uint64)


class NgramOccurrences(NamedTuple):
    """Every n-gram of one kind in a batch of texts, in reading order; ``M`` occurrences."""

    keys: UInt64
    """(M,) 64-bit keys, distinct between kinds; 0 never occurs."""
    starts: Int64
    """(M,) position of the first character (of the middle one for trigrams)."""
    ends: Int64
    """(M,) one past the last character (meaningless for trigrams)."""


class Analysis(NamedTuple):
    """A batch of texts as code points and the n-grams in it."""

    codes: UInt32
    """(L,) folded code points, each text closed by one 0."""
    text_ends: Int64
    """(texts,) position of each text's closing 0."""
    classes: npt.NDArray[np.uint8]
    """(L,) character classes, 0, 1 or 2."""
    kinds: tuple[NgramOccurrences, NgramOccurrences, NgramOccurrences]
    """In the order of ``KINDS``."""


def _code_points(texts: Sequence[str]) -> UInt32:
    """Fold texts and join their code points, each text closed by one 0: (L,)."""
    joined = TEXT_END.join(texts) + TEXT_END
    if joined.count(TEXT_END) != len(texts):
        joined = TEXT_END.join([text.replace(TEXT_END, " ") for text in texts]) + TEXT_END
    folded = fold(joined)
    if folded.isascii():
        return np.frombuffer(folded.encode("ascii"), dtype=np.uint8).astype(np.uint32)
    return np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def analyse(texts: Sequence[str], rules: int = TEXT_RULES) -> Analysis:
    """Find every n-gram of every text.

    Args:
        texts: Any strings, empty ones included; line breaks separate list items.
        rules: ``TEXT_RULES``, or those of an older vocabulary.

    Returns:
        Code points, borders and occurrences; see ``Analysis``.
    """
    if not texts:
        none = NgramOccurrences(
            np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)
        )
        return Analysis(
            np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.uint8), (none, none, none)
        )
    codes, classes = visible_codes(texts, rules)
    text_ends = np.flatnonzero(codes == 0)
    words = find_words(codes, classes)
    starts, ends, visible = words.starts, words.ends, classes != SEPARATOR

    # Bigrams: neighbours with no end of line or text between them.
    line = np.cumsum((codes == 0) | (codes == 10), dtype=np.int32)[starts]
    pairs = np.flatnonzero(line[1:] == line[:-1])
    with np.errstate(over="ignore"):
        raw = words.keys[pairs] * np.uint64(_BASE) + words.keys[pairs + 1]
    bigrams = NgramOccurrences(_finish(raw, 1), starts[pairs], ends[pairs + 1])

    # Trigrams: code points need 21 bits, so three of them fit a key without loss.
    middles = np.flatnonzero(visible)
    spaced = np.where(visible, codes, np.uint32(32)).astype(np.uint64)
    left = spaced[middles - 1]  # of the first character [-1], the closing 0: a space
    raw = (left << np.uint64(42)) | (spaced[middles] << np.uint64(21)) | spaced[middles + 1]
    trigrams = NgramOccurrences(_finish(raw, 2), middles, middles)
    return Analysis(codes, text_ends, classes, (words, bigrams, trigrams))


def find_words(codes: UInt32, classes: npt.NDArray[np.uint8]) -> NgramOccurrences:
    """Find the words among visible code points that end with a separator."""
    joins, visible = classes == JOINS, classes != SEPARATOR
    # The last one separates: every word has an end, and comparing with the shifted array is safe.
    follows = np.empty_like(joins)  # (L,) the previous character belongs to the same word
    follows[0] = False
    np.logical_and(joins[1:], joins[:-1], out=follows[1:])
    starts = np.flatnonzero(visible & ~follows)
    ends = np.flatnonzero(visible[:-1] & ~follows[1:]) + 1
    return NgramOccurrences(_word_keys(codes, starts, ends), starts, ends)


def _word_keys(codes: UInt32, starts: Int64, ends: Int64) -> UInt64:
    """Hash each word, whatever its place, uint64 (W,): the sum of mixed(c[j]) * base**(j - start).

    Taken from prefix sums modulo 2**64, so the cost does not depend on the words' lengths.
    """
    forward, backward = _powers(_round_up(len(codes)))
    with np.errstate(over="ignore"):
        terms = (
            splitmix64_finalise(codes.astype(np.uint64) + np.uint64(_BASE)) * forward[: len(codes)]
        )
        sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)))
        raw = (sums[ends] - sums[starts]) * backward[starts]
    return _finish(raw, 0)


def _round_up(length: int) -> int:
    """Return the power of two at or above ``length``, so that few lengths are cached."""
    return 1 << max(length - 1, 1).bit_length()


def _finish(raw: UInt64, kind: int) -> UInt64:
    """Mix raw hashes into keys, distinct between kinds and never 0 (an empty table slot)."""
    with np.errstate(over="ignore"):
        keys = splitmix64_finalise(raw + _SALTS[kind])
    keys[keys == 0] = 1
    return keys


def ngram_text(analysis: Analysis, kind: int, rows: Int64) -> list[str]:
    """Spell the n-grams of the given occurrences: ``"word"``, ``"two words"``, ``" tr"``.

    Args:
        analysis: What ``analyse`` returned.
        kind: 0 unigram, 1 bigram, 2 trigram.
        rows: (R,) occurrence numbers within the kind.

    Returns:
        R strings.
    """
    found = analysis.kinds[kind]
    starts, ends = found.starts[rows], found.ends[rows]
    if kind == 2:
        spaced = np.where(analysis.classes != SEPARATOR, analysis.codes, np.uint32(32))
        # (R, 3); before the first character comes [-1], the closing 0: a space
        around = np.stack((spaced[starts - 1], spaced[starts], spaced[starts + 1]), axis=1)
        text = around.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        return [text[i : i + 3] for i in range(0, len(text), 3)]
    text = analysis.codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    if kind == 0:
        return [text[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    words = analysis.kinds[0]
    first = np.searchsorted(words.starts, starts)
    first_ends, second_starts = words.ends[first], words.starts[first + 1]
    spans = (starts, first_ends, second_starts, ends)
    return [
        f"{text[a:b]} {text[c:d]}"
        for a, b, c, d in zip(*(span.tolist() for span in spans), strict=True)
    ]


def batches_by_size(texts: Iterable[str], characters: int | None = None) -> Iterator[list[str]]:
    """Cut a stream of texts into lists of about ``characters`` characters, to bound memory."""
    characters = characters or _BATCH_CHARACTERS
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text) + 1
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
