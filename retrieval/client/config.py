"""Configuration of a client: connection, credentials, deadlines and retries."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc

from encoders.errors import ConfigError
from retrieval.client.retries import RetryPolicy

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""What gRPC takes a proxy from, the first that is set."""
_HOST = re.compile(r"\[([^][]+)\](?::\w+)?|([^:]+)(?::\w+)?")
"""``[host]`` or ``host``, with or without a port."""


_HOST_PORT = re.compile(r"(?:\[[^][]+\]|[^][:\s]+):([0-9]{1,5})")
_SCHEME = re.compile(r"(unix|unix-abstract|dns|ipv4|ipv6|vsock|xds|passthrough):")
"""Schemes of gRPC names."""


def require_target(target: str) -> None:
    """Refuse an address without a port, which gRPC would take for 443, or with one above 65535.

    Raises:
        ConfigError: It is neither ``HOST:PORT`` nor a gRPC name such as ``unix:/run/omni.sock``.
    """
    if _SCHEME.match(target):
        return
    match = _HOST_PORT.fullmatch(target)
    if match is None or not 1 <= int(match[1]) <= 65_535:
        raise ConfigError(
            f"expected the server as HOST:PORT with a port from 1 to 65535, for example"
            f" localhost:50051, got {target!r}."
        )


def is_this_machine(target: str) -> bool:
    """Whether a gRPC address is a Unix socket, ``localhost`` or a loopback address."""
    if target.startswith("unix:"):
        return True
    match = _HOST.fullmatch(target)
    host = target if match is None else match[1] or match[2]
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_of(target: str) -> str | None:
    """Return the variable with the proxy that calls to a target go through; None: they need none.

    Calls to this machine go through none (``ClientConfig.channel_options``).
    """
    if is_this_machine(target):
        return None
    return next((name for name in PROXY_VARIABLES if os.environ.get(name)), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """Encrypt the connection; with a client certificate and key, both sides prove who they are."""

    root_certificates: Path | None = None
    """PEM file with the authorities to trust. None: the system's."""
    client_certificate: Path | None = None
    """PEM certificate chain for mutual TLS; needs ``client_key``."""
    client_key: Path | None = None
    server_name: str | None = None
    """Name to expect in the server's certificate when it is not the host of the address."""

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise ConfigError(
                "TlsConfig: client_certificate and client_key come together, but only one was"
                " given. Give both for mutual TLS."
            )

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            ConfigError: A file cannot be read.
        """
        try:
            root, key, chain = (
                path.read_bytes() if path else None
                for path in (self.root_certificates, self.client_key, self.client_certificate)
            )
        except OSError as error:
            raise ConfigError(
                f"TlsConfig: cannot read {error.filename}: {error.strerror}. Check the path and its"
                " permissions."
            ) from error
        return grpc.ssl_channel_credentials(root, key, chain)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig:
    """Configuration of one client."""

    deadline_seconds: float = 2.0
    """Time for one call with its retries; ``deadline_seconds`` of a method overrides it."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    token: str | None = field(default=None, repr=False)
    """Sent as ``authorization: Bearer ...``.

    Refused without TLS unless the address is this machine's (``localhost``, loopback,
    ``unix:``) or ``allow_plaintext_token``.
    """
    allow_plaintext_token: bool = False
    tls: TlsConfig | None = None
    """None: no encryption."""
    keepalive_seconds: float = 60.0
    """A silent connection with calls in flight is probed this often.

    So a dead server is noticed before the deadline of a long call.
    """
    keepalive_timeout_seconds: float = 10.0
    max_message_bytes: int = 64 * 2**20
    """Largest answer accepted."""
    round_robin: bool = True
    """Spread calls over all addresses that the name resolves to (replicas behind one DNS name)."""

    def __post_init__(self) -> None:
        for name in (
            "deadline_seconds",
            "keepalive_seconds",
            "keepalive_timeout_seconds",
            "max_message_bytes",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"ClientConfig.{name} must be above 0, but got {getattr(self, name)}."
                )

    def channel_options(self, target: str) -> list[tuple[str, Any]]:
        """The gRPC channel arguments for this configuration and server."""
        options: list[tuple[str, Any]] = [
            ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            # retries.py alone decides about retries
            ("grpc.enable_retries", 0),
            # Two clients of one process are two connections
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # How long one attempt may take: a slow handshake is no dead server
            ("grpc.min_reconnect_backoff_ms", 2000),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if is_this_machine(target):  # no proxy of the environment can reach it
            options.append(("grpc.enable_http_proxy", 0))
        if self.round_robin:
            options.append(("grpc.lb_policy_name", "round_robin"))
        if self.tls and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options
