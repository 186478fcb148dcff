"""Decide whether and when a failed call is tried again.

Backoff with full jitter on top of the server's hint, within the deadline and a retry budget.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

import grpc

from encoders.errors import ConfigError
from retrieval.client.errors import retry_after_seconds

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often and how patiently a failed call is repeated.

    Repeated are calls that ended with UNAVAILABLE, or with RESOURCE_EXHAUSTED and the hint of a
    full server.
    """

    max_attempts: int = 4
    """Tries in all, the first one included. 1: never retry."""
    first_backoff_seconds: float = 0.05
    """Upper bound of the first wait; it doubles each time.

    The wait is uniform between 0 and the bound (full jitter).
    """
    max_backoff_seconds: float = 2.0
    """The bound stops growing here.

    A server's ``retry-after-ms`` is a lower bound on top of which the jitter is added.
    """
    budget: float = 20.0
    """Retry tokens of a client: a failure takes one, a success gives back ``budget_refill``.

    No retry while half or fewer are left, so that clients do not multiply the load of a server
    that is down.
    """
    budget_refill: float = 0.1
    """Tokens given back per success."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ConfigError(
                f"RetryPolicy.max_attempts must be 1 or more, but got {self.max_attempts}. Use 1"
                " for no retries."
            )
        if not 0 < self.first_backoff_seconds <= self.max_backoff_seconds:
            raise ConfigError(
                "RetryPolicy needs 0 < first_backoff_seconds <= max_backoff_seconds, but got "
                f"{self.first_backoff_seconds} and {self.max_backoff_seconds}."
            )
        if self.budget <= 0 or self.budget_refill < 0:
            raise ConfigError(
                f"RetryPolicy needs budget > 0 and budget_refill >= 0, but got {self.budget} and"
                f" {self.budget_refill}."
            )


@dataclass(slots=True)
class RetryBudget:
    """Tokens shared by all calls of one client (thread-safe)."""

    policy: RetryPolicy
    tokens: float = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.tokens = self.policy.budget

    def success(self) -> None:
        """Give back a part of a token; takes no lock while the budget is full."""
        if self.tokens < self.policy.budget:
            with self._lock:
                self.tokens = min(self.policy.budget, self.tokens + self.policy.budget_refill)

    def failure(self) -> bool:
        """Take a token; True if a retry may follow."""
        with self._lock:
            self.tokens = max(0.0, self.tokens - 1)
            return self.tokens > self.policy.budget / 2


def wait_before_retry(
    error: grpc.RpcError,
    attempt: int,
    seconds_left: float,
    policy: RetryPolicy,
    budget: RetryBudget,
    rng: random.Random,
) -> float | None:
    """Decide whether the failed try number ``attempt`` (from 1) is repeated.

    Returns:
        Seconds to wait (at least the server's hint), or None: the call would fail again, the tries
        or the budget are used up, or the deadline would pass during the wait. A full server always
        sends a hint; RESOURCE_EXHAUSTED without one is, for example, a message beyond a limit.
    """
    hint = retry_after_seconds(error.trailing_metadata())
    if error.code() is not UNAVAILABLE and (error.code() is not FULL or hint is None):
        return None
    if not budget.failure() or attempt >= policy.max_attempts:
        return None
    bound = min(policy.max_backoff_seconds, policy.first_backoff_seconds * 2 ** (attempt - 1))
    wait = (hint or 0.0) + rng.uniform(0, bound)
    return wait if wait < seconds_left else None
