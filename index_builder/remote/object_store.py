"""Objects below a URL, through fsspec: whole or not there, errors typed, waits bounded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from encoders.errors import MissingDependency
from index_builder.errors import RemoteUnreachable
from index_builder.storage.durable_files import make_folder, write_durably

_BOUNDED_S3 = {
    "use_listings_cache": False,
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2}},
}


def is_url(store: str) -> bool:
    """Return whether a store is named by a URL and not by a folder."""
    return "://" in store


def default_cache_folder(purpose: str, url: str) -> Path:
    """Return the folder for what is pulled from a URL, when none is named."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return Path(base) / "omnisearchsage" / purpose / name


class ObjectStore:
    """The objects below a URL (``s3://bucket/prefix``, ``gs://...``, ``file:///...``).

    Safe to use from many threads. An object is written whole: readers see the old one or the new.

    Args:
        url: Where; what it needs besides (endpoint, credentials) comes from the environment, as
            the library for that kind of URL reads it.

    Raises:
        MissingDependency: The library for this kind of URL is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme = url.split("://", 1)[0]
        try:
            import fsspec

            options: dict[str, Any] = _BOUNDED_S3 if scheme in ("s3", "s3a") else {}
            self._files, self._root = fsspec.core.url_to_fs(self.url, **options)
        except ModuleNotFoundError as error:
            raise MissingDependency("fsspec", "remote", f"A store at {scheme}://") from error
        except ImportError as error:
            if scheme in ("s3", "s3a"):
                raise MissingDependency("s3fs", "remote", f"A store at {scheme}://") from error
            raise RemoteUnreachable(f"{url}: {error}") from error  # fsspec names the package
        except ValueError as error:
            raise RemoteUnreachable(
                f"{url}: expected a URL such as s3://bucket/prefix, but got an unknown kind:"
                f" {error}"
            ) from error
        self._is_local = scheme in ("file", "local")

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Read an object, or the bytes of it from ``start`` to ``end``.

        Raises:
            FileNotFoundError: There is none.
            RemoteUnreachable: The store does not answer, or refuses.
        """
        with self._typed(f"reading {name}", may_lack=True):
            return bytes(self._files.cat_file(self._path(name), start=start, end=end))

    def put(self, name: str, content: bytes) -> None:
        """Write an object.

        Raises:
            RemoteUnreachable: The store does not answer, or refuses.
        """
        with self._typed(f"writing {name}"):
            if self._is_local:
                path = Path(self._path(name))
                make_folder(path.parent)
                write_durably(path, content)
            else:
                self._files.pipe_file(self._path(name), content)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return name within ``folder`` -> bytes of each object there.

        Raises:
            RemoteUnreachable: The store does not answer, or refuses.
        """
        with self._typed(f"listing {folder}"):
            try:
                entries = self._files.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            names = ((entry["name"].rsplit("/", 1)[-1], entry) for entry in entries)
            return {
                name: int(entry["size"])
                for name, entry in names
                if entry["type"] == "file" and name and not name.startswith(".")
            }

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are gone already are fine.

        Raises:
            RemoteUnreachable: The store does not answer, or refuses.
        """
        for name in names:
            with self._typed(f"removing {name}"):
                try:
                    self._files.rm_file(self._path(name))
                except FileNotFoundError:
                    continue

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _typed(self, what: str, *, may_lack: bool = False) -> Iterator[None]:
        """Turn what a library raises into ``RemoteUnreachable``; an object may be missing."""
        try:
            yield
        except Exception as error:  # each library has errors of its own
            if may_lack and isinstance(error, FileNotFoundError):
                raise
            raise RemoteUnreachable(
                f"{self.url}: {what} failed ({type(error).__name__}: {error}). What is active stays"
                " so; check the address, the network and the credentials, and run it again."
            ) from error
