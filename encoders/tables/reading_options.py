"""What a command may be told about the files it reads; what is not told is found out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from encoders.errors import ConfigError

NONE = "none"
"""Given for a quotation mark or an escape character: there is none."""
_NAMED = {"comma": ",", "semicolon": ";", "tab": "\t", r"\t": "\t", "pipe": "|", "space": " "}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingOptions:
    """How text files are written, and which names and values of any file are others here."""

    encoding: str = "utf-8"
    """Encoding of text files; never guessed."""
    separator: str | None = None
    """Between the cells of CSV and TSV; None: found out from the header."""
    quote: str | None = None
    """Around cells that hold a separator; ``none``: there is none; None: found out."""
    escape: str | None = None
    """Before a quotation mark inside a quoted cell; ``none``: it is doubled; None: found out."""
    decimal_comma: bool | None = None
    """Whether 3,50 is a number; None: found out."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Column of the file -> column of the table."""
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Column of the table -> value in the file -> value of the table."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Column -> its value in all rows, where a file lacks the column."""

    def __post_init__(self) -> None:
        for name in ("separator", "quote", "escape"):
            value = getattr(self, name)
            none = value == NONE and name != "separator"
            if value is not None and not none and len(value.encode()) != 1:
                raise ConfigError(
                    f"--{name} expects one ASCII character"
                    f"{'' if name == 'separator' else ' or none'}, got {value!r}."
                )

    @classmethod
    def of_flags(
        cls,
        *,
        separator: str | None = None,
        rename: Sequence[str] = (),
        values: Sequence[str] = (),
        constants: Sequence[str] = (),
        **flags: str | bool | None,
    ) -> Self:
        """Read the options as they are written on a command line.

        Raises:
            ConfigError: One is not of its form.
        """
        columns = _assignments(rename, "--rename expects OLD=NEW, for example sku=id")
        fixed = _assignments(constants, "--set expects COLUMN=VALUE, for example entity_type=pin")
        mapped: dict[str, dict[str, str]] = {}
        for text in values:
            place, equals, new = text.partition("=")
            column, point, old = place.partition(".")
            if not (equals and point and column and new):
                raise ConfigError(
                    "--map expects COLUMN.VALUE=NEW, for example action.view=impression, got"
                    f" {text!r}."
                )
            mapped.setdefault(column, {})[old] = new
        if separator is not None:
            separator = _NAMED.get(separator.lower(), separator)
        return cls(
            separator=separator,
            rename=columns,
            values=mapped,
            constants=fixed,
            **flags,  # type: ignore[arg-type]
        )


def _assignments(texts: Sequence[str], expected: str) -> dict[str, str]:
    """Read ``("a=b",)`` as ``{"a": "b"}``."""
    found = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not (equals and name and value):
            raise ConfigError(f"{expected}, got {text!r}.")
        found[name] = value
    return found
