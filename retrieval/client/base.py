"""The part of a client that needs no waiting: stubs, metadata, and what follows a failure."""

from __future__ import annotations

import random
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from encoders.errors import ConfigError
from protos import retrieval_pb2_grpc as pb_grpc
from retrieval.client.config import ClientConfig, is_this_machine, proxy_of
from retrieval.client.errors import CallError, InvalidRequest, Overloaded, Unavailable, error_from
from retrieval.client.requests import Call
from retrieval.client.retries import RetryBudget, wait_before_retry

_REQUEST = "The request is larger than the server takes. Split it."
_ANSWER = (
    "The answer is larger than the server sends. Ask for fewer queries, results or attributes at a"
    " time."
)
TOO_LARGE = {
    "CLIENT: Sent message larger": (
        "The request is larger than ClientConfig.max_message_bytes. Split it, or raise that."
    ),
    "CLIENT: Received message larger": (
        "The answer is larger than ClientConfig.max_message_bytes. "
        "Ask for fewer queries, results or attributes at a time, or raise that."
    ),
    "SERVER: Received message larger": _REQUEST,
    "a message may have": _REQUEST,
    "SERVER: Sent message larger": _ANSWER,
    "the answer has": _ANSWER,
}
"""Words of gRPC and of our server about a message beyond a limit -> which one, and what to do."""


class ClientBase:
    """Holds what both clients share: configuration, metadata, stubs and the retry budget."""

    def __init__(self, target: str, config: ClientConfig | None) -> None:
        self.target = target
        self.config = config or ClientConfig()
        if (
            self.config.token
            and not self.config.tls
            and not self.config.allow_plaintext_token
            and not is_this_machine(target)
        ):
            raise ConfigError(
                f"A token would travel to {target} unencrypted. Give ClientConfig a TlsConfig, or"
                " set allow_plaintext_token if the network is trusted."
            )
        self._metadata = (
            (("authorization", f"Bearer {self.config.token}"),) if self.config.token else None
        )
        self._budget = RetryBudget(self.config.retry)
        self._rng = random.Random()
        self._stubs: dict[str, Any] = {}

    def _bind(self, channel: Any) -> None:
        """Make the stub of every method."""
        self._stubs |= vars(pb_grpc.RetrievalStub(channel))
        self._stubs |= vars(pb_grpc.AdminStub(channel))
        self._stubs["Health.Check"] = health_pb2_grpc.HealthStub(channel).Check

    def _deadline(self, call: Call[Any]) -> float:
        """Return the seconds that a call may take, retries included."""
        seconds = call.deadline_seconds
        return self.config.deadline_seconds if seconds is None else seconds

    def _wait_after(
        self, error: grpc.RpcError, call: Call[Any], attempt: int, seconds_left: float
    ) -> float:
        """Return the wait before the next try of a failed call, or raise the typed error."""
        wait = None
        if call.retry:
            wait = wait_before_retry(
                error, attempt, seconds_left, self.config.retry, self._budget, self._rng
            )
        if wait is None:
            raise failure(error, call.method, self.target, attempt) from error
        return wait


def failure(error: grpc.RpcError, method: str, target: str, attempts: int) -> CallError:
    """Make the typed error of a call that is not repeated.

    RESOURCE_EXHAUSTED without a retry hint does not mean that the server is full: a message is
    beyond a limit of one side, or a resource such as the disk is.
    """
    made = error_from(error, method=method, target=target, attempts=attempts)
    proxy = proxy_of(target) if isinstance(made, Unavailable) else None
    if proxy is not None:
        return Unavailable(
            made.code,
            f"{made.details.rstrip('.')}. The call went through the proxy that the variable"
            f" {proxy} names; if {target} needs none, add its host to no_proxy.",
            method=method,
            target=target,
            attempts=attempts,
            retry_after_seconds=made.retry_after_seconds,
        )
    if not isinstance(made, Overloaded) or made.retry_after_seconds is not None:
        return made
    for words, advice in TOO_LARGE.items():
        if words in made.details:
            return InvalidRequest(
                made.code,
                f"{made.details.rstrip('.')}. {advice}",
                method=method,
                target=target,
                attempts=attempts,
            )
    return CallError(made.code, made.details, method=method, target=target, attempts=attempts)


def means_not_ready(error: CallError) -> bool:
    """Return whether a failed health check says that the server is not serving (yet)."""
    not_ready = (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
    return error.code in not_ready


def never_ready(target: str, timeout_seconds: float) -> Unavailable:
    """Make the error of ``wait_until_ready``."""
    details = (
        f"not ready within {timeout_seconds:g} s. Is the server running there, and does `omni"
        " release list` show an active release?"
    )
    return Unavailable(
        grpc.StatusCode.UNAVAILABLE, details, method="Health.Check", target=target, attempts=1
    )
