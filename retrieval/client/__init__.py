"""The typed Python client, synchronous and asyncio.

``RetrievalClient("host:50051").retrieve("blue whale", "pin", k=10)``

Both clients take the same arguments and return the same results. Every call has a deadline that
includes its retries; calls that the server refused because it is full or not ready are repeated
after a jittered wait that honours the server's hint; failures are the exceptions of
``retrieval/client/errors.py``. Importing this package loads no torch.
"""

from retrieval.client.async_client import AsyncRetrievalClient
from retrieval.client.config import ClientConfig, TlsConfig
from retrieval.client.errors import CallError
from retrieval.client.requests import EntityWrite, Target
from retrieval.client.results import Hit
from retrieval.client.retries import RetryPolicy
from retrieval.client.sync_client import RetrievalClient

__all__ = [
    "AsyncRetrievalClient",
    "CallError",
    "ClientConfig",
    "EntityWrite",
    "Hit",
    "RetrievalClient",
    "RetryPolicy",
    "Target",
    "TlsConfig",
]
