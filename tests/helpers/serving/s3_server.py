"""A real S3-speaking server in a process of its own: moto's, which keeps its objects in memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.helpers.waiting import until

BUCKET = "releases"


@contextmanager
def s3_server() -> Iterator[str]:
    """Start it, make a bucket, and point the environment's S3 clients at it; gives its address."""
    for package in ("moto", "flask", "flask_cors", "s3fs"):
        pytest.importorskip(package)
    import s3fs

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    variables = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def listens() -> bool:
        assert process.poll() is None, "moto's server ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        patch.setenv("NO_PROXY", ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1"))))
        try:
            until(listens)
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
            yield address
        finally:
            process.terminate()
            process.wait()
            s3fs.S3FileSystem.clear_instance_cache()
