"""Access control: TLS, mutual TLS, and bearer tokens with entity types and the admin right."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoders.errors import ConfigError
from retrieval.errors import PermissionDenied, Unauthenticated
from retrieval.rates import Rate

TOKEN_KEYS = ("name", "sha256", "entity_types", "admin", "rate", "burst")


@dataclass(frozen=True, slots=True)
class Caller:
    """The rights of one token.

    Attributes:
        name: For logs; never the token itself.
        entity_types: What it may retrieve; None means all.
        admin: May activate, roll back, upsert and delete.
        rate: How often it may ask; None: as often as the server can answer.
    """

    name: str
    entity_types: frozenset[str] | None = None
    admin: bool = False
    rate: Rate | None = field(default=None, compare=False)

    def may_retrieve(self, entity_type: str) -> bool:
        """Return whether the token holds an entity type."""
        return self.entity_types is None or entity_type in self.entity_types

    def require_entity_types(self, entity_types: Iterable[str]) -> None:
        """Raise ``PermissionDenied`` unless every type is allowed."""
        if self.entity_types is not None:
            refused = sorted(set(entity_types) - self.entity_types)
            if refused:
                allowed = ", ".join(sorted(self.entity_types))
                raise PermissionDenied(
                    f"token {self.name!r} may retrieve {allowed}, but the request wants"
                    f" {', '.join(refused)}."
                )

    def require_admin(self) -> None:
        """Raise ``PermissionDenied`` unless the token holds the admin right."""
        if self is VISITOR:
            raise PermissionDenied(
                "this call needs a token with the admin right, as other machines can reach this"
                " server. Start it with --tokens, or listen on 127.0.0.1 alone."
            )
        if not self.admin:
            raise PermissionDenied(
                f"token {self.name!r} does not hold the admin right, which this call needs."
            )


EVERYONE = Caller("anonymous", None, True)
"""The caller where no tokens are configured and only this machine can call."""
VISITOR = Caller("anonymous", None, False)
"""The caller where no tokens are configured and other machines can call."""


class Tokens:
    """Known tokens, as SHA-256 digests only.

    The file (TOML)::

        [[token]]
        name = "web"
        sha256 = "<hex digest of the token>"     # printf %s "$TOKEN" | sha256sum
        entity_types = ["pin", "product"]        # left out: all
        admin = false
        rate = 100                               # searches a second; left out: no bound
        burst = 200                              # at once, after a rest; left out: the rate

    Args:
        path: Of the file; None: ``by_digest`` is all.
        by_digest: Callers by the digest of their token.
    """

    def __init__(self, path: Path | None, by_digest: dict[bytes, Caller]) -> None:
        self.path = path
        self._by_digest = by_digest

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read the token file.

        Raises:
            ConfigError: The file is missing, not TOML, or an entry is wrong; the message names it.
        """
        return cls(path, _read_tokens(path))

    def reload(self) -> None:
        """Read the file again: removed tokens are refused from now on. Raises as ``load``."""
        if self.path is not None:
            self._by_digest = _read_tokens(self.path)

    def caller(self, metadata: Sequence[tuple[str, str | bytes]] | None) -> Caller:
        """Find the caller of a request from its metadata.

        Raises:
            Unauthenticated: No ``authorization: Bearer`` entry, or an unknown token.
        """
        for key, value in metadata or ():
            if key == "authorization":
                text = value.decode("latin-1") if isinstance(value, bytes) else value
                scheme, _, token = text.partition(" ")
                if scheme.lower() != "bearer":
                    break
                digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
                for known, caller in self._by_digest.items():
                    if hmac.compare_digest(known, digest):
                        return caller
                break
        raise Unauthenticated()


def _read_tokens(path: Path) -> dict[bytes, Caller]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"tokens: cannot read {path}: {error}") from error
    by_digest: dict[bytes, Caller] = {}
    entries = content.get("token", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(
            f"tokens: {path.name}: token: expected tables, but got {str(entries)[:80]}. Write each"
            " token's lines under [[token]]."
        )
    for i, entry in enumerate(entries):
        where = f"tokens: {path.name}: token {i + 1}"
        unknown = set(entry) - set(TOKEN_KEYS)
        if unknown:
            raise ConfigError(
                f"{where}: unknown keys {sorted(unknown)}; known: {', '.join(TOKEN_KEYS)}."
            )
        try:
            digest = bytes.fromhex(entry["sha256"])
            name = str(entry["name"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: expected name and sha256 (64 hexadecimal digits): {error}"
            ) from error
        if len(digest) != 32:
            raise ConfigError(
                f"{where}: sha256 should have 64 hexadecimal digits, but has {2 * len(digest)}."
            )
        by_digest[digest] = _caller(f"{where} ({name!r})", name, entry)
    if not by_digest:
        raise ConfigError(
            f"tokens: {path.name} holds no [[token]]; with an empty file nobody could call. Add"
            " one, or leave --tokens out."
        )
    return by_digest


def _caller(where: str, name: str, entry: Mapping[str, Any]) -> Caller:
    """Read the rights of one entry of the token file.

    Raises:
        ConfigError: A value is of the wrong kind; it must not grant anything.
    """
    types = entry.get("entity_types")
    admin = entry.get("admin", False)
    if not isinstance(admin, bool):
        raise ConfigError(
            f"{where}: admin: expected true or false, but got {admin!r}. Write admin = true or"
            " admin = false, without quotes."
        )
    if types is not None and not (
        isinstance(types, list) and all(isinstance(item, str) for item in types)
    ):
        raise ConfigError(
            f"{where}: entity_types: expected a list of strings, but got {types!r}. "
            'Write entity_types = ["pin", "product"], or leave it out for all.'
        )
    return Caller(
        name, None if types is None else frozenset(types), admin, _rate(where, name, entry)
    )


def _rate(where: str, name: str, entry: Mapping[str, Any]) -> Rate | None:
    """Read how often a token may ask. Raises ``ConfigError``."""
    numbers = {key: entry[key] for key in ("rate", "burst") if key in entry}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{where}: {key}: expected a number above 0, but got {value!r}.")
    if "rate" not in numbers:
        if numbers:
            raise ConfigError(f"{where}: burst: expected a rate beside it. Write rate = 100.")
        return None
    rate = float(numbers["rate"])
    return Rate(name, rate, max(1.0, float(numbers.get("burst", rate))))
