"""Log lines as JSON or text."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

PACKAGES = ("retrieval", "index_builder", "encoders", "benchmarks")
"""Loggers whose lines a server writes."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message and the ``extra`` fields."""

    _STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
        "message",
        "asctime",
        "taskName",
    }

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        fields: dict[str, Any] = {
            "time": (
                time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
                + f".{int(record.msecs):03d}Z"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields.update(
            {key: value for key, value in record.__dict__.items() if key not in self._STANDARD}
        )
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def configure_logging(as_json: bool, level: int = logging.INFO) -> None:
    """Send the log lines of our packages to stderr, as text or JSON.

    Call it before ``grpc`` is imported, whose library would write a line of its own for each
    malformed message of a stranger; ``GRPC_VERBOSITY`` in the environment wins.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if as_json
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
