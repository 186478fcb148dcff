"""The three normal forms of text: ids (NFC), queries (one space between words) and folded text (for n-grams and for comparing)."""

from __future__ import annotations

import unicodedata

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
    """Trim and collapse white space (paper 4.1 form): the text the query tower reads and the cache keys.

    White space is Unicode's (``str.split``), so no-break and ideographic spaces count. Case and
    accents stay. A text of only white space becomes ``""``.
    """
    return " ".join(text.split())


def fold(text: str) -> str:
    """Fold case and compatibility forms: NFKC, full case folding, NFKC again.

    Idempotent on every single code point.

    ``fold("Straße ＡＢＣ ﬁ")`` is ``"strasse abc fi"``. Length may change; no character ever crosses a
    starter, so a joined batch of texts folds exactly as its parts do when they are joined by a
    control character.
    """
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def fold_query(texts: pl.Expr) -> pl.Expr:
    """The form under which two query strings are one: NFKC, lower case, white space trimmed and collapsed."""
    return (
        texts.str.normalize("NFKC")
        .str.to_lowercase()
        .str.replace_all(r"\s+", " ")
        .str.strip_chars()
    )
