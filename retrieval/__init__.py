"""Releases to answers: the gRPC service, query cache, batching, clients, web page, ``omni``.

``from retrieval import RetrievalClient`` is the way in for callers of a server. The name is looked
up when it is first used, so that ``import retrieval`` loads neither gRPC nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval.client import AsyncRetrievalClient, RetrievalClient

__all__ = ["AsyncRetrievalClient", "RetrievalClient"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from retrieval import client

    return getattr(client, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
