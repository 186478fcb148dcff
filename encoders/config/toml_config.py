"""Read TOML tables into frozen dataclasses.

All unknown keys, wrong types and impossible values are reported at once, each with the nearest
known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from encoders.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Suggest the known name most like ``name``: ``" (did you mean 'x'?)"``, or ``""``."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: The file is missing or not TOML; the message holds line and column.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: expected a TOML file, but there is none. `omni train --print-config` prints"
            " one to start from."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def build_config(cls: type[T], table: Mapping[str, Any], where: str = "config") -> T:
    """Make a frozen dataclass, nested ones included, from a table.

    Args:
        cls: A dataclass whose fields are numbers, strings, booleans, tuples of these, mappings,
            dataclasses or tuples of dataclasses. Its ``FORMER_NAMES``, if it has some, map names
            that older files hold to those of its fields.
        table: What TOML gave.
        where: Name of the source, for messages.

    Raises:
        ConfigError: Any number of mistakes, one per line: unknown keys, wrong types, values a
            dataclass refuses.
    """
    problems: list[str] = []
    value = _build(cls, table, "", problems)
    if problems:
        plural = "mistake" if len(problems) == 1 else "mistakes"
        raise ConfigError(
            f"{where}: {len(problems)} {plural}\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    assert value is not None, "no problem was reported, so the config was built"
    return value


def _build(cls: type[T], table: Mapping[str, Any], prefix: str, problems: list[str]) -> T | None:
    """Make a dataclass from a table; mistakes are added to ``problems``, and there is no result."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    before = len(problems)
    values: dict[str, Any] = {}
    table = _current_names(cls, table, prefix, problems)
    for key, raw in table.items():
        name = f"{prefix}{key}"
        if key not in fields:
            problems.append(
                f"unknown key {name!r}{nearest(key, fields)}; known here: {', '.join(fields)}"
            )
            continue
        seen = len(problems)
        value = _convert(hints[key], raw, name, problems)
        if len(problems) == seen:
            values[key] = value
    absent = dataclasses.MISSING
    required = [f.name for f in fields.values() if f.default is f.default_factory is absent]
    problems.extend(f"missing key '{prefix}{name}'" for name in required if name not in table)
    if not set(required) <= values.keys():
        return None
    # Also when a key was wrong: the other values may break rules of their own, and all mistakes are
    # reported at once.
    try:
        built = cls(**values)
    except ConfigError as error:
        problems.extend(f"{prefix}{line}" if prefix else line for line in str(error).splitlines())
        return None
    return built if len(problems) == before else None


def _current_names(
    cls: type[T], table: Mapping[str, Any], prefix: str, problems: list[str]
) -> Mapping[str, Any]:
    """Rename the keys of ``table`` that have another name today, with a warning for each."""
    renamed: dict[str, Any] = dict(table)
    for former, name in getattr(cls, "FORMER_NAMES", {}).items():
        if former not in table:
            continue
        value = renamed.pop(former)
        if name in table:
            problems.append(
                f"'{prefix}{former}' and '{prefix}{name}' are one setting; give the latter"
            )
        else:
            log.warning(
                "%s%s is now called %s%s; the former name is read", prefix, former, prefix, name
            )
            renamed[name] = value
    return renamed


def _convert(hint: Any, raw: Any, name: str, problems: list[str]) -> Any:
    """Convert a raw value to the type ``hint``; a mistake is added to ``problems``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        hint = next(a for a in arguments if a is not type(None))
        return None if raw is None else _convert(hint, raw, name, problems)
    if dataclasses.is_dataclass(hint):
        if isinstance(raw, Mapping):
            return _build(hint, raw, f"{name}.", problems)  # type: ignore[arg-type]
        problems.append(f"{name!r} must be a table, but got {raw!r}")
    elif origin is tuple:
        if isinstance(raw, list | tuple):
            return tuple(
                _convert(arguments[0], item, f"{name}[{i}]", problems) for i, item in enumerate(raw)
            )
        problems.append(f"{name!r} must be a list, but got {raw!r}")
    elif origin in (dict, Mapping) or (origin is not None and issubclass(origin, Mapping)):
        if isinstance(raw, Mapping):
            return _mapping(arguments, raw, name, problems)
        problems.append(f"{name!r} must be a table, but got {raw!r}")
    elif origin is typing.Literal:
        if raw in arguments:
            return raw
        problems.append(
            f"{name!r} must be one of {', '.join(map(repr, arguments))}, but got"
            f" {raw!r}{nearest(str(raw), map(str, arguments))}"
        )
    elif hint is Path:
        if isinstance(raw, str | Path):
            return Path(raw)
        problems.append(f"{name!r} must be a path, but got {raw!r}")
    elif hint is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    elif (hint in (int, str, bool) and type(raw) is hint) or hint is Any:
        return raw
    else:
        problems.append(
            f"{name!r} must be {getattr(hint, '__name__', hint)}, but got {type(raw).__name__}"
            f" {raw!r}"
        )
    return None


def _mapping(
    arguments: tuple[Any, ...], raw: Mapping[str, Any], name: str, problems: list[str]
) -> dict[Any, Any]:
    key_type, value_type = arguments
    result: dict[Any, Any] = {}
    for key, value in raw.items():
        try:
            converted = key_type(key)
        except ValueError:
            problems.append(f"key {key!r} of {name!r} must be {key_type.__name__}")
            continue
        result[converted] = _convert(value_type, value, f"{name}.{key}", problems)
    return result


def to_table(config: Any) -> dict[str, Any]:
    """Turn a dataclass into plain tables, lists and values, as JSON and TOML hold them.

    ``build_config`` reads them.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {
                f.name: plain(getattr(value, f.name))
                for f in dataclasses.fields(value)
                if getattr(value, f.name) is not None
            }
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    table: dict[str, Any] = plain(config)
    return table
