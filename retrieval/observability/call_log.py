"""The log of calls: one line for each, or for the slow ones; never query text."""

from __future__ import annotations

import json
import logging
import re
from typing import Any, NamedTuple

from google.protobuf.message import Message

from retrieval.observability.metric_catalogue import STAGES

log = logging.getLogger("retrieval.calls")

REQUEST_FIELDS = ("entity_type", "k")
RESPONSE_FIELDS = ("release_id", "plan", "cache_hit", "answer_cached")
REQUEST_ID_HEADER = "x-request-id"
PLAIN = re.compile(r"[!#-<>-~]*")
"""Texts that are logged as they are: visible ASCII without quotes and equals signs."""


class FinishedCall(NamedTuple):
    """What is known of a call at its end.

    Attributes:
        method: RPC name.
        code: Name of its gRPC status.
        seconds: That it took inside the server.
        peer: Address of the caller, as gRPC writes it.
        token: Name of the caller's token.
        metadata: Of the request.
        request: None if it was not parsed.
        response: None if there is none.
        service: Full name of the method's service.
    """

    method: str
    code: str
    seconds: float
    peer: str
    token: str
    metadata: Any
    request: Message | None
    response: Message | None
    service: str = ""


class CallLog:
    """Writes lines about calls.

    Args:
        every: Whether each call has a line.
        slow_seconds: Calls that take longer have one in any case; 0: none.
    """

    def __init__(self, *, every: bool, slow_seconds: float) -> None:
        self.every = every
        self._slow_seconds = slow_seconds

    def wants(self, seconds: float) -> bool:
        """Return whether a call that took so long has a line."""
        return self.every or 0 < self._slow_seconds < seconds

    def write(self, call: FinishedCall) -> None:
        """Write the line of a call."""
        is_slow = 0 < self._slow_seconds < call.seconds
        found = fields_of(call)
        text = " ".join(f"{name}={_text(value)}" for name, value in found.items())
        level = logging.WARNING if is_slow else logging.INFO
        log.log(level, "%s %s", "slow call" if is_slow else "call", text, extra=found)


def fields_of(call: FinishedCall) -> dict[str, Any]:
    """Return what a line holds, by name."""
    found: dict[str, Any] = {
        "method": call.method,
        "code": call.code,
        "ms": round(call.seconds * 1e3, 3),
        "peer": call.peer,
        "token": call.token,
    }
    request_id = _request_id(call)
    if request_id:
        found["request_id"] = request_id
    for message, names in ((call.request, REQUEST_FIELDS), (call.response, RESPONSE_FIELDS)):
        for name in names:
            if message is not None and name in message.DESCRIPTOR.fields_by_name:
                found[name] = getattr(message, name)
    timings = getattr(call.response, "timings", None)
    if timings is not None:
        for stage in STAGES:
            found[f"{stage}_ms"] = round(getattr(timings, f"{stage}_ns") / 1e6, 3)
    return found


def _text(value: Any) -> str:
    """Write a value so that no caller's text can pass for another value or another line."""
    text = str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)


def _request_id(call: FinishedCall) -> str:
    """Return the id that the caller gave: in the response, the request or the metadata."""
    for message in (call.response, call.request):
        found = getattr(message, "request_id", "")
        if found:
            return str(found)
    for key, value in call.metadata or ():
        if key == REQUEST_ID_HEADER:
            return str(value)[:256]
    return ""
