"""TLS of a server from PEM files that may be replaced while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import grpc

from encoders.errors import ConfigError


class TlsFiles(NamedTuple):
    """PEM files of a server.

    Attributes:
        cert: Certificate chain.
        key: Its private key.
        client_ca: Authority of clients: those without a certificate of it are refused. None: all
            are admitted.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None


class ServerTls:
    """What a server's listeners need; ``reload`` changes what new connections meet.

    Args:
        files: Read at once.

    Raises:
        ConfigError: A file cannot be read, is not PEM, or key and certificate do not belong
            together.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._current: dict[tuple[str, ...], ssl.SSLContext] = {}
        self._certificates = _grpc_certificates(files)
        _context(files, ("h2",))  # only to check that key and certificate belong together

    def context(self, *protocols: str) -> ssl.SSLContext:
        """Return a context for a listener.

        Args:
            protocols: What it speaks (ALPN), the best first.
        """
        self._current[protocols] = _context(self.files, protocols)
        listening = _context(self.files, protocols)

        def choose(connection: ssl.SSLObject, name: str | None, asked: ssl.SSLContext) -> None:
            connection.context = self._current[protocols]

        listening.sni_callback = choose
        return listening

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return credentials for grpcio's server."""
        return grpc.dynamic_ssl_server_credentials(
            self._certificates,
            lambda: self._certificates,
            require_client_authentication=self.files.client_ca is not None,
        )

    def reload(self) -> None:
        """Read the files again. Raises ``ConfigError``: the former stay in use then."""
        contexts = {protocols: _context(self.files, protocols) for protocols in self._current}
        self._certificates = _grpc_certificates(self.files)
        self._current.update(contexts)


def _context(files: TlsFiles, protocols: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(list(protocols))
    try:
        context.load_cert_chain(files.cert, files.key)
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            # A resumed session would not meet a client authority that was changed meanwhile
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--tls-cert, --tls-key, --tls-client-ca: these files cannot be used together: {error}"
        ) from error
    return context


def _grpc_certificates(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    key, cert = _pem("tls-key", files.key), _pem("tls-cert", files.cert)
    ca = None if files.client_ca is None else _pem("tls-client-ca", files.client_ca)
    return grpc.ssl_server_certificate_configuration([(key, cert)], ca)


def _pem(name: str, path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--{name}: cannot read {path}: {error}") from error
    if b"-----BEGIN" not in content:
        raise ConfigError(f"--{name}: {path} is not a PEM file.")
    return content
