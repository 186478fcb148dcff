r"""Bring texts to a normal form: ids, the queries that towers read, and folded text for comparing.

| form | functions | Unicode | white space | used for |
|---|---|---|---|---|
| id | `normalize_id` | NFC | kept | ids of tables, indexes and calls |
| query | `normalize_query`, `normalize_queries` | kept | `str.split` | query tower, cache keys |
| folded | `fold` | NFKC, full case folding, NFKC | kept | n-grams, words, text buckets |
| folded query | `fold_query`, `folded_queries` | NFKC, lower case | `str.split` | equal queries |

The two folded forms differ: full case folding makes "ss" of "ß" and one letter of both small
sigmas, lower-casing keeps them apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection

import polars as pl

from encoders.errors import DataError


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
    """Trim and collapse white space (paper 4.1): the text the query tower reads and the cache keys.

    White space is Unicode's (``str.split``), so no-break and ideographic spaces count. Case and
    accents stay. A text of only white space becomes ``""``.
    """
    return " ".join(text.split())


def normalize_queries(queries: pl.Series) -> pl.Series:
    """Apply ``normalize_query`` to a column; each distinct text that needs it is changed once."""
    suspects = queries.filter(queries.str.contains(r"^\s|\s$|\s\s|[^\S ]|[\x1c-\x1f]")).unique()
    if not len(suspects):
        return queries
    return queries.replace(
        suspects, pl.Series([normalize_query(q) for q in suspects.to_list()], dtype=pl.String)
    )


def fold(text: str) -> str:
    """Fold case and compatibility forms: NFKC, full case folding, NFKC again.

    Idempotent on every single code point. ``fold("Straße ＡＢＣ ﬁ")`` is ``"strasse abc fi"``.
    Length may change; no character ever crosses a starter, so a joined batch of texts folds exactly
    as its parts do when they are joined by a control character.
    """
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def collapse_white_space(texts: pl.Expr) -> pl.Expr:
    """Apply ``normalize_query`` as an expression, with the white space of ``str.split``."""
    return texts.str.replace_all(r"[\s\x1c-\x1f]+", " ").str.strip_chars(" ")


def fold_query(texts: pl.Expr) -> pl.Expr:
    """Return the form in which equal query strings count as one query.

    NFKC, lower case, white space trimmed and collapsed.
    """
    return collapse_white_space(texts.str.normalize("NFKC").str.to_lowercase())


def folded_queries(queries: Collection[str]) -> list[str]:
    """Apply ``fold_query`` to plain strings, in order."""
    texts = pl.Series("query", list(queries), dtype=pl.String)
    return texts.to_frame().select(fold_query(pl.col("query")))["query"].to_list()
