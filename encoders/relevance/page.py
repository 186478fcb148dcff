"""Serve one small page on which a person grades a sample, to this machine only."""

from __future__ import annotations

import json
import mimetypes
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from encoders.errors import ConfigError, DataError
from encoders.relevance.grades import GradeBook
from encoders.relevance.sample import GRADES, Sample

LOOPBACK = "127.0.0.1"
_LOCAL_NAMES = ("127.0.0.1", "localhost")
"""Names under which a browser may call: another one is a page elsewhere that was given ours."""
_MAX_BODY = 1 << 12
_READ_SECONDS = 30.0
_REMOTE_PICTURES = ("https://", "http://", "data:image/")
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self';"
    " img-src 'self' data: https: http:; base-uri 'none'; frame-ancestors 'none'"
)
_PICTURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"


class JudgeServer(ThreadingHTTPServer):
    """The page of one judge; every grade is on the disk before its request is answered."""

    daemon_threads = True

    def __init__(
        self, sample: Sample, book: GradeBook, *, port: int = 0, images: Path | None = None
    ) -> None:
        """Listen on the loopback address.

        Args:
            sample: What is graded.
            book: Where grades go.
            port: 0: any free one; ``server_port`` says which.
            images: Folder that paths in the items' ``image`` start from.

        Raises:
            ConfigError: The port is taken.
        """
        self.book = book
        self.pictures = _pictures(sample, images)
        self.items = [
            item | {"picture": self._picture_address(item["item"])}
            for item in sample.items.drop("image").to_dicts()
        ]
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"--port {port}: cannot listen there ({error.strerror}). Choose another, or 0."
            ) from error

    @property
    def address(self) -> str:
        """Return the address of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def _picture_address(self, item: int) -> str:
        picture = self.pictures.get(item)
        if picture is None or isinstance(picture, str):
            return picture or ""
        return f"/picture/{item}"


def _pictures(sample: Sample, images: Path | None) -> dict[int, Path | str]:
    """Find each item's picture: a file, or an address that the browser loads itself."""
    found: dict[int, Path | str] = {}
    root = images.resolve() if images is not None else None
    for item, image in sample.items.select("item", "image").iter_rows():
        drawn = sample.path / "pictures" / f"{item}.svg"
        if drawn.is_file():
            found[item] = drawn
        elif image.startswith(_REMOTE_PICTURES):
            found[item] = image
        elif root is not None and image:
            path = (root / image).resolve()
            if path.is_relative_to(root) and path.is_file():
                found[item] = path
    return found


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"
    timeout = _READ_SECONDS

    def do_GET(self) -> None:
        """Answer with the page, its script, the items or a picture."""
        if not self._is_local():
            return
        path = urlsplit(self.path).path
        if path == "/":
            self._send_file("judge_page.html", "text/html; charset=utf-8")
        elif path == "/judge_page.js":
            self._send_file("judge_page.js", "text/javascript; charset=utf-8")
        elif path == "/api/items":
            book = self.server.book
            self._send_json(
                HTTPStatus.OK,
                {
                    "judge": book.judge,
                    "scale": GRADES,
                    "items": self.server.items,
                    "grades": book.grades,
                },
            )
        elif path.startswith("/picture/"):
            self._send_picture(path.removeprefix("/picture/"))
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})

    def do_POST(self) -> None:
        """Save one grade."""
        if not self._is_local():
            return
        # A page of another origin cannot send JSON without asking first, which is not answered
        is_json = self.headers.get_content_type() == "application/json"
        length = self.headers.get("Content-Length", "")
        if self.path != "/api/grade" or not is_json or not length.isdecimal():
            self._refuse("expected JSON for /api/grade")
            return
        if int(length) > _MAX_BODY:
            self._refuse(f"expected at most {_MAX_BODY} bytes")
            return
        try:
            change = json.loads(self.rfile.read(int(length)))
            item, grade = change["item"], change["grade"]
            if not (type(item) is int and (grade is None or type(grade) is int)):
                raise DataError("item and grade are whole numbers")
            self.server.book.save({item: grade})
        except (ValueError, KeyError, TypeError, DataError, OSError) as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            return
        self._send_json(HTTPStatus.OK, {"graded": len(self.server.book.grades)})

    def _is_local(self) -> bool:
        """Refuse callers that know this machine by another name."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host in _LOCAL_NAMES:
            return True
        self.close_connection = True
        self._send_json(HTTPStatus.FORBIDDEN, {"error": "this page is for this machine only"})
        return False

    def _refuse(self, reason: str) -> None:
        """Answer without having read the body."""
        self.close_connection = True
        self._send_json(HTTPStatus.BAD_REQUEST, {"error": reason})

    def _send_picture(self, name: str) -> None:
        picture = self.server.pictures.get(int(name)) if name.isdecimal() else None
        if not isinstance(picture, Path) or not picture.is_file():
            self._send_json(HTTPStatus.NOT_FOUND, {"error": "there is no such picture"})
            return
        kind = mimetypes.guess_type(picture.name)[0] or ""
        kind = kind if kind.startswith("image/") else "application/octet-stream"
        self._send(HTTPStatus.OK, picture.read_bytes(), kind, _PICTURE_POLICY)

    def _send_file(self, name: str, kind: str) -> None:
        content = resources.files("encoders.relevance").joinpath(name).read_bytes()
        self._send(HTTPStatus.OK, content, kind, _PAGE_POLICY)

    def _send_json(self, status: HTTPStatus, value: Any) -> None:
        content = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        self._send(status, content, "application/json", _PAGE_POLICY)

    def _send(self, status: HTTPStatus, content: bytes, kind: str, policy: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: grades are saved, requests are no news."""
