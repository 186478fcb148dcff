"""Patterns of ``like``: ``%`` is any run of characters, ``_`` any one, a backslash escapes."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl


class Pattern(NamedTuple):
    """A pattern of ``like``, taken apart.

    Attributes:
        prefix: Characters before the first wildcard.
        rest: What follows them: characters, or None for ``_`` and an empty string for ``%``.
    """

    prefix: str
    rest: tuple[str | None, ...]

    @property
    def is_text(self) -> bool:
        """Return whether there is no wildcard."""
        return not self.rest

    @property
    def is_prefix(self) -> bool:
        """Return whether every text that begins with the prefix matches."""
        return self.rest == (ANY,)

    def regex(self) -> str:
        """Return a regular expression (of Rust's syntax) for whole texts."""
        parts = [pl.escape_regex(self.prefix)]
        for part in self.rest:
            if part is None:
                parts.append(".")
            else:
                parts.append(pl.escape_regex(part) if part else ".*")
        return f"^(?s:{''.join(parts)})$"


ANY = ""
"""A part of a pattern that any run of characters matches."""


def parse_pattern(text: str) -> Pattern | None:
    """Take a pattern apart; None where it ends in a backslash that escapes nothing."""
    parts: list[str | None] = []
    letters: list[str] = []
    characters = iter(text)
    for character in characters:
        if character not in ("%", "_"):
            escaped = next(characters, None) if character == "\\" else character
            if escaped is None:
                return None
            letters.append(escaped)
            continue
        if letters:
            parts.append("".join(letters))
            letters = []
        if character == "_":
            parts.append(None)
        elif not parts or parts[-1] != ANY:
            parts.append(ANY)
    if letters:
        parts.append("".join(letters))
    if parts and parts[0]:
        return Pattern(parts[0], tuple(parts[1:]))
    return Pattern("", tuple(parts))
