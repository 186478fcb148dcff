"""nginx, as deploy/ configures it, and HAProxy in front of a server, each on a Unix socket."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.serving.certificates import Certificates
from tests.helpers.serving.real_server import Running
from tests.helpers.waiting import until

DEPLOY = Path(__file__).parents[3] / "deploy"
# Debian keeps them where the PATH of ordinary users may not look
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin"
NGINX = shutil.which("nginx", path=SBIN)
HAPROXY = shutil.which("haproxy", path=SBIN)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian: apt-get install)")
needs_haproxy = pytest.mark.skipif(
    HAPROXY is None, reason="needs HAProxy (Debian: apt-get install haproxy)"
)
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
HAPROXY_FILE = """
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend grpc
  bind unix@{socket} proto h2
  default_backend grpc
backend grpc
  server omni {address} proto h2
"""


def _replaced(text: str, old: str, new: str) -> str:
    assert old in text, old
    return text.replace(old, new)


def nginx_file(running: Running, certificates: Certificates, folder: Path) -> str:
    """Return the file of deploy/ with the names of this machine in place of its own."""
    text = (DEPLOY / "nginx" / "nginx.conf").read_text()
    text = _replaced(text, "omni:50051", running.address)
    text = _replaced(text, "omni:9464", running.http.removeprefix("http://"))
    text = _replaced(text, "/etc/nginx/certificates", str(certificates.folder))
    text = _replaced(text, "worker_processes auto;", "worker_processes 1;")
    # The form that nginx before 1.25 knows and later ones still read
    listen = f"listen unix:{folder}/nginx.socket ssl http2;"
    text = _replaced(text, "listen 443 ssl;", listen)
    text = _replaced(text, "http2 on;", "")
    paths = [f"{name}_temp_path {folder}/{name};" for name in TEMPORARY]
    text = re.sub(r"^http \{", "\n".join(["http {", "access_log off;", *paths]), text, flags=re.M)
    user = "user root;\n" if os.geteuid() == 0 else ""
    return f"{user}daemon off;\npid {folder}/pid;\nerror_log stderr;\n{text}"


@contextmanager
def nginx(running: Running, certificates: Certificates, folder: Path) -> Iterator[Path]:
    """Run nginx in front of a server; yields its socket."""
    assert NGINX is not None, "needs_nginx"
    (folder / "nginx.conf").write_text(nginx_file(running, certificates, folder))
    command = [NGINX, "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with _running(command, folder / "nginx.socket"):
        yield folder / "nginx.socket"


@contextmanager
def haproxy(running: Running, folder: Path) -> Iterator[Path]:
    """Run HAProxy in front of a server's gRPC port; yields its socket."""
    assert HAPROXY is not None, "needs_haproxy"
    socket = folder / "haproxy.socket"
    file = folder / "haproxy.cfg"
    file.write_text(HAPROXY_FILE.format(socket=socket, address=running.address))
    with _running([HAPROXY, "-db", "-f", str(file)], socket):
        yield socket


@contextmanager
def _running(command: list[str], socket: Path) -> Iterator[None]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: socket.exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)
