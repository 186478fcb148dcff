"""The configuration file of ``omni serve``: every setting, under the names of ``ServeConfig``."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from encoders.errors import ConfigError
from index_builder.remote.object_store import default_cache_folder, is_url
from retrieval.config import Limits, ServeConfig

LIMITS_TABLE = "limits"
PATHS = ("releases", "impression_log", "tls_cert", "tls_key", "tls_client_ca", "tokens")
OPTIONAL = (
    "metrics_port",
    "probe_port",
    "remote_store",
    "redis_url",
    "otlp_endpoint",
    *PATHS[1:],
)
"""Settings that may be None; in a file they are left out, or ``false`` switches them off."""


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file.

    Raises:
        ConfigError: It cannot be read, or holds a name or a kind of value that is not known.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: cannot read {path}: {error}") from error
    limits = content.pop(LIMITS_TABLE, {})
    if not isinstance(limits, dict):
        raise ConfigError(f"{path}: limits: expected a table, but got {limits!r}.")
    if is_url(str(content.get("releases"))):
        content.setdefault("remote_store", content.pop("releases"))
    settings = _checked(content, ServeConfig, path, "")
    if limits:
        settings[LIMITS_TABLE] = _checked(limits, Limits, path, f"{LIMITS_TABLE}.")
    return settings


def merged(
    settings: Mapping[str, Any], file: Mapping[str, Any], given: Collection[str]
) -> ServeConfig:
    """Return the configuration of flags, environment, defaults and a file.

    Args:
        settings: Of flags, environment and defaults; those of limits under ``limits``.
        file: As ``read_config_file`` returns it.
        given: Names of the settings that flags or environment set: they win over the file.

    Raises:
        ConfigError: A value is out of range, or the store is not named.
    """
    limits = {
        **settings[LIMITS_TABLE],
        **{name: value for name, value in file.get(LIMITS_TABLE, {}).items() if name not in given},
    }
    chosen = {
        **settings,
        **{name: value for name, value in file.items() if name not in given},
        LIMITS_TABLE: Limits(**limits),
    }
    if chosen["releases"] is None and chosen.get("remote_store") is not None:
        chosen["releases"] = default_cache_folder("stores", chosen["remote_store"])
    if chosen["releases"] is None:
        raise ConfigError(
            "--store: expected the store that `omni rebuild` publishes to. Give --store, or"
            " `releases` in the file of --config."
        )
    return ServeConfig(**chosen)


def config_as_toml(config: ServeConfig) -> str:
    """Write a configuration as a file that ``read_config_file`` reads; secrets are left out."""
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == LIMITS_TABLE or field.name == "redis_secret":
            continue
        if field.name == "redis_url" and "@" in (value or ""):
            lines.append("# redis_url is left out: it holds a password")
        elif value is None and field.default is not None and field.default is not MISSING:
            lines.append(f"{field.name} = false")
        elif value is None:
            lines.append(f"# {field.name} is not set")
        else:
            lines.append(f"{field.name} = {_toml(value)}")
    lines.append(f"\n[{LIMITS_TABLE}]")
    for field in fields(config.limits):
        lines.append(f"{field.name} = {_toml(getattr(config.limits, field.name))}")
    return "\n".join(lines) + "\n"


def _checked(
    content: Mapping[str, Any], kind: type[ServeConfig] | type[Limits], path: Path, prefix: str
) -> dict[str, Any]:
    """Return settings as ``kind`` takes them."""
    kinds = {field.name: str(field.type) for field in fields(kind) if field.name != LIMITS_TABLE}
    unknown = sorted(set(content) - set(kinds))
    if unknown:
        raise ConfigError(
            f"{path}: {prefix}{unknown[0]}: no such setting; `omni serve --print-config` shows all."
        )
    return {
        name: _value(f"{path}: {prefix}{name}", name, value, kinds[name])
        for name, value in content.items()
    }


def _value(where: str, name: str, value: object, kind: str) -> object:
    if value is False and name in OPTIONAL:
        return None
    if "tuple" in kind:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigError(f"{where}: expected a list of texts, but got {value!r}.")
    expected = kind.partition(" ")[0]
    if expected == "float" and type(value) is int:
        return float(value)
    if expected == "Path" and isinstance(value, str):
        return Path(value)
    if type(value).__name__ == expected:
        return value
    words = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    raise ConfigError(f"{where}: expected {words.get(expected, 'a text')}, but got {value!r}.")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
