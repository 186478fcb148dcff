"""The file ``CURRENT``: which release is active, and which were active before it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

from index_builder.errors import ReleaseCorrupt, ReleaseError

CURRENT_NAME = "CURRENT"
HISTORY_LENGTH = 50
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """What ``CURRENT`` says.

    Attributes:
        release_id: The active release.
        manifest_sha256: Of its ``manifest.json``.
        activated: UTC time, ISO 8601.
        history: Releases active before, the most recent first; ``rollback`` goes to the first.
    """

    release_id: str
    manifest_sha256: str
    activated: str
    history: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Return one JSON line with a checksum of the rest."""
        values = asdict(self)
        body = json.dumps(values, sort_keys=True).encode()
        line = {**values, "checksum": hashlib.sha256(body).hexdigest()}
        return json.dumps(line, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Current:
        """Parse what ``to_bytes`` wrote; refuse any changed byte.

        Raises:
            ReleaseCorrupt: The content is not what was written.
        """
        try:
            values = json.loads(content)
            del values["checksum"]
            current = cls(**{**values, "history": tuple(values["history"])})
            if current.to_bytes() == content and is_release_id(current.release_id):
                return current
        except (ValueError, KeyError, TypeError):
            pass
        raise ReleaseCorrupt(
            f"{where}: CURRENT was changed or cut ({len(content)} bytes). Name the release to serve"
            " again: omni release activate RELEASE_ID"
        )


def is_release_id(name: str) -> bool:
    """Return whether ``name`` can be the folder of a release."""
    return _ID.fullmatch(name) is not None


def check_release_id(release_id: str) -> str:
    """Return ``release_id`` if it can be a folder name.

    Raises:
        ReleaseError: It holds other characters than letters, digits, ``.``, ``_`` and ``-``, or
            starts with a dot.
    """
    if not is_release_id(release_id):
        raise ReleaseError(
            "a release id has 1 to 128 letters, digits, '.', '_' or '-' and starts with a letter"
            f" or digit, but got {release_id[:140]!r}"
        )
    return release_id
