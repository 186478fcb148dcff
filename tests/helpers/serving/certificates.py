"""Certificates of two authorities, made by openssl."""

import shutil
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HTTP1_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs the openssl program"
)


@dataclass(frozen=True)
class Certificates:
    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def enters(self, context: ssl.SSLContext, port: int) -> bool:
        """Whether a TLS connection to this machine is admitted by both sides."""
        try:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as secured,
            ):
                # With TLS 1.3 a client learns only from its first read that it is not admitted
                is_old = secured.selected_alpn_protocol() == "http/1.1"
                secured.sendall(HTTP1_REQUEST if is_old else HTTP2_PREFACE)
                return secured.recv(1) != b""
        except OSError:
            return False


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def make_certificates(folder: Path) -> Certificates:
    """``server`` and ``client`` are signed by ``ca``, ``stranger`` by ``other``."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    for name in ("ca", "other"):
        files = ("-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem")
        openssl("req", "-x509", *key, *files, "-subj", f"/CN={name}")
    (folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        files = ("-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.csr")
        openssl("req", *key[:-2], *files, "-subj", f"/CN={name}")
        signing = ("-CA", f"{folder}/{authority}.pem", "-CAkey", f"{folder}/{authority}.key")
        request = ("-in", f"{folder}/{name}.csr", "-out", f"{folder}/{name}.pem")
        options = ("-CAcreateserial", "-days", "2", "-extfile", f"{folder}/san")
        openssl("x509", "-req", *request, *signing, *options)
    return Certificates(folder)
