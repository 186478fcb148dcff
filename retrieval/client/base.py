"""What the synchronous and the asyncio client share: the connection's stubs, requests, and what happens after a failure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import grpc
import numpy.typing as npt
from grpc_health.v1 import health_pb2, health_pb2_grpc

from encoders.errors import ConfigError
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as pb_grpc
from retrieval.client import results as results
from retrieval.client.config import ClientConfig, is_this_machine
from retrieval.client.errors import CallError, InvalidRequest, Overloaded, Unavailable, error_from
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
"""Words of gRPC and of our server about a message beyond a limit -> what was too large, and what to do."""


def retrieve_request(
    query: str,
    entity_type: str,
    k: int,
    filter: str,
    exclude_ids: Sequence[str],
    min_score: float | None,
    min_recall: float | None,
    language: str,
    country: str,
    release_id: str,
    embedding: npt.ArrayLike | None,
    space_id: str,
    diversity: float | None,
    collapse_above: float | None,
    exact: bool,
    attributes: Sequence[str],
    request_id: str,
) -> pb.RetrieveRequest:
    """Pack the arguments of ``retrieve``."""
    return pb.RetrieveRequest(
        query=query,
        entity_type=entity_type,
        k=k,
        filter=filter,
        exclude_ids=exclude_ids,
        min_score=min_score,
        min_recall=min_recall,
        language=language,
        country=country,
        release_id=release_id,
        embedding=packed(embedding, 1),
        space_id=space_id,
        diversity=diversity,
        collapse_above=collapse_above,
        exact=exact,
        attributes=attributes,
        request_id=request_id,
    )


def packed(embedding: npt.ArrayLike | None, axes: int) -> bytes | None:
    """Pack an embedding if there is one; see ``vector_bytes``."""
    return None if embedding is None else results.vector_bytes(embedding, axes)


class ClientBase:
    """What both clients share: configuration, metadata, and the requests behind each method."""

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

    def _bind(self, channel: Any) -> None:
        questions, admin, health = (
            pb_grpc.RetrievalStub(channel),
            pb_grpc.AdminStub(channel),
            health_pb2_grpc.HealthStub(channel),
        )
        self._retrieve, self._multi, self._batch = (
            questions.Retrieve,
            questions.RetrieveMulti,
            questions.RetrieveBatch,
        )
        self._embed, self._score, self._describe = (
            questions.Embed,
            questions.Score,
            questions.DescribeRelease,
        )
        self._activate, self._rollback, self._upsert, self._delete = (
            admin.Activate,
            admin.Rollback,
            admin.Upsert,
            admin.Delete,
        )
        self._health = health.Check

    def _failed(
        self, error: grpc.RpcError, method: str, attempt: int, seconds_left: float, retry: bool
    ) -> float:
        """Return the wait before the next try, or raise the typed error."""
        wait = (
            wait_before_retry(
                error, attempt, seconds_left, self.config.retry, self._budget, self._rng
            )
            if retry
            else None
        )
        if wait is None:
            raise failure(error, method, self.target, attempt) from error
        return wait


def failure(error: grpc.RpcError, method: str, target: str, attempts: int) -> CallError:
    """The typed error of a call that is not repeated; without a hint, RESOURCE_EXHAUSTED does not mean that the server is full."""
    made = error_from(error, method=method, target=target, attempts=attempts)
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


def serving(response: health_pb2.HealthCheckResponse) -> bool:
    """True if a health answer says SERVING."""
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def never_ready(target: str, timeout_seconds: float) -> Unavailable:
    """The error of ``wait_until_ready``."""
    details = (
        f"not ready within {timeout_seconds:g} s. Is the server running there, and does `omni"
        " release list` show an active release?"
    )
    return Unavailable(
        grpc.StatusCode.UNAVAILABLE, details, method="Health.Check", target=target, attempts=1
    )
