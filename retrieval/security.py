"""Access control: TLS, mutual TLS, and bearer tokens with entity types and the admin right."""

from __future__ import annotations

import hashlib
import hmac
import ssl
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from encoders.errors import ConfigError
from retrieval.errors import PermissionDenied, Unauthenticated


@dataclass(frozen=True, slots=True)
class Caller:
    """The rights of one token.

    Attributes:
        name: For logs; never the token itself.
        entity_types: What it may retrieve; None means all.
        admin: May activate, roll back, upsert and delete.
    """

    name: str
    entity_types: frozenset[str] | None = None
    admin: bool = False

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
        if not self.admin:
            raise PermissionDenied(
                f"token {self.name!r} does not hold the admin right, which this call needs."
            )


EVERYONE = Caller("anonymous", None, True)
"""The caller when no tokens are configured."""


class Tokens:
    """Known tokens, as SHA-256 digests only.

    The file (TOML)::

        [[token]]
        name = "web"
        sha256 = "<hex digest of the token>"     # printf %s "$TOKEN" | sha256sum
        entity_types = ["pin", "product"]        # left out: all
        admin = false
    """

    def __init__(self, by_digest: dict[bytes, Caller]) -> None:
        self._by_digest = by_digest

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read the token file.

        Raises:
            ConfigError: The file is missing, not TOML, or an entry is wrong; the message names it.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"tokens: cannot read {path}: {error}") from error
        by_digest: dict[bytes, Caller] = {}
        for i, entry in enumerate(content.get("token", [])):
            where = f"tokens: {path.name}: token {i + 1}"
            unknown = set(entry) - {"name", "sha256", "entity_types", "admin"}
            if unknown:
                raise ConfigError(
                    f"{where}: unknown keys {sorted(unknown)}; known: name, sha256, entity_types,"
                    " admin."
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
        return cls(by_digest)

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
    return Caller(name, None if types is None else frozenset(types), admin)


def tls_context(cert: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    """Make the TLS context of our own transport from PEM files.

    With ``client_ca`` only clients with a certificate of that authority are admitted.

    Raises:
        ConfigError: A file cannot be read, is not PEM, or key and certificate do not belong
            together.
    """
    server_credentials(cert, key, client_ca)  # checks the files with the same messages
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(cert, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--tls-cert, --tls-key, --tls-client-ca: these files cannot be used together: {error}"
        ) from error
    return context


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Make the TLS credentials of grpcio from PEM files.

    With ``client_ca`` only clients with a certificate of that authority are admitted.

    Raises:
        ConfigError: A file cannot be read or is not PEM.
    """
    content: dict[str, bytes] = {}
    for name, path in (("tls-cert", cert), ("tls-key", key), ("tls-client-ca", client_ca)):
        if path is not None:
            try:
                content[name] = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"--{name}: cannot read {path}: {error}") from error
            if b"-----BEGIN" not in content[name]:
                raise ConfigError(f"--{name}: {path} is not a PEM file.")
    ca = content.get("tls-client-ca")
    return grpc.ssl_server_credentials(
        [(content["tls-key"], content["tls-cert"])], ca, ca is not None
    )
