r"""Bring texts to a normal form: ids, the queries that towers read, and folded text for comparing.

| form | functions | Unicode | white space | used for |
|---|---|---|---|---|
| id | `normalize_id` | NFC | kept | ids of tables, indexes and calls |
| query | `normalize_query`, `normalized_query` | visible, NFC | `str.split` | query tower, cache |
| folded | `fold` | NFKC, full case folding, NFKC | kept | n-grams, words |
| folded query | `fold_query` | both of the above | `str.split` | equal queries, text buckets |

A query has one normal form wherever it is read: pairs, training, embedding, cache keys and calls.
What nobody sees (directional marks, joiners, byte order marks, soft hyphens, variation selectors)
is left out, as the entity tower's n-grams leave it out; NFC, so that two spellings of one letter
are one; case and compatibility forms stay, for they may mean something to a tower's tokenizer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

import polars as pl

from encoders.errors import DataError

INVISIBLE = (
    "\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Format characters and default-ignorable code points, as the inside of a character class.

Without the zero width space, which separates words.
"""
_WHITE_SPACE = r"\s\x00-\x1f\x7f-\x9f\u200b"
_INVISIBLE_RUN = re.compile(f"[{INVISIBLE}]+")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200b]+")
_DOTTED_I = re.compile("i\u0307+")


def normalize_id(value: str) -> str:
    """Return an id in NFC, the form in which ids are stored and compared.

    Raises:
        DataError: The id is empty or only white space.
    """
    if not value or value.isspace():
        raise DataError(
            f"an id must hold at least one visible character, but got {value!r}; give every row"
            " an id"
        )
    return unicodedata.normalize("NFC", value)


def normalize_query(text: str) -> str:
    """Return the text that the query tower reads and the cache keys (paper 4.1).

    Invisible characters (``INVISIBLE``) are left out, then NFC; white space is trimmed and
    collapsed: Unicode's (``str.split``), control characters and zero width spaces. Case and
    accents stay. A text of nothing visible becomes ``""``. Idempotent.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", _INVISIBLE_RUN.sub("", text))
    normal = " ".join(text.split())
    if normal.isprintable():
        return normal
    return " ".join(_CONTROLS.sub(" ", normal).split())


def normalize_queries(queries: pl.Series) -> pl.Series:
    """Apply ``normalize_query`` to a column."""
    name = queries.name
    return queries.to_frame("query").select(normalized_query(pl.col("query")))["query"].alias(name)


def normalized_query(texts: pl.Expr) -> pl.Expr:
    """Apply ``normalize_query`` as an expression."""
    visible = texts.str.replace_all(f"[{INVISIBLE}]+", "").str.normalize("NFC")
    return visible.str.replace_all(f"[{_WHITE_SPACE}]+", " ").str.strip_chars(" ")


def fold(text: str) -> str:
    """Fold case and compatibility forms: NFKC, full case folding, NFKC again.

    The dot that full case folding leaves over the i of "İ" goes, so that İSTANBUL and istanbul are
    equal. Idempotent on every single code point. ``fold("Straße ＡＢＣ ﬁ")`` is
    ``"strasse abc fi"``. Length may change; no character ever crosses a starter, so a joined batch
    of texts folds exactly as its parts do when they are joined by a control character.
    """
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", _DOTTED_I.sub("i", folded))


def fold_query(texts: pl.Expr) -> pl.Expr:
    """Return the form in which equal query strings count as one query.

    ``fold(normalize_query(text))``, trimmed and collapsed once more: folding may make spaces.
    """
    return texts.map_batches(_fold_column, return_dtype=pl.String, is_elementwise=True)


def folded_queries(queries: Collection[str]) -> list[str]:
    """Apply ``fold_query`` to plain strings, in order."""
    return [_fold_text(text) for text in queries]


def _fold_text(text: str) -> str:
    return " ".join(fold(normalize_query(text)).split())


def _fold_column(texts: pl.Series) -> pl.Series:
    """Fold a column; only distinct texts with letters beyond ASCII take a call each."""
    folded = normalize_queries(texts).str.to_lowercase()
    distinct = texts.filter(texts.str.contains(r"[^\x00-\x7f]")).unique()
    if not len(distinct):
        return folded
    forms = pl.Series(folded_queries(distinct.to_list()), dtype=pl.String)
    own = texts.replace_strict(distinct, forms, default=None, return_dtype=pl.String)
    return own.fill_null(folded).alias(texts.name)
