"""Messages beyond a limit of one side: tried once, named, never taken for a full server."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from retrieval.client import AsyncRetrievalClient, ClientConfig, RetrievalClient
from retrieval.client.errors import CallError, InvalidRequest
from tests.helpers.serving.real_server import Running, SmallStore, serving

TEXTS = [f"text {i}" for i in range(200)]
"""Their vectors are 25,600 bytes."""


@pytest.fixture(scope="module", params=["http2", "grpcio"])
def running(request: pytest.FixtureRequest, small_store: SmallStore) -> Iterator[Running]:
    with serving(small_store, transport=request.param) as it:
        yield it


def fails(
    running: Running, config: ClientConfig, asynchronous: bool, method: str, *arguments: Any
) -> tuple[CallError, float]:
    """The error of a call, and the retry tokens that it left."""

    async def ask() -> tuple[CallError, float]:
        async with AsyncRetrievalClient(running.address, config) as client:
            with pytest.raises(CallError) as caught:
                await getattr(client, method)(*arguments)
            return caught.value, client._budget.tokens

    if asynchronous:
        return asyncio.run(ask())
    with RetrievalClient(running.address, config) as client:
        with pytest.raises(CallError) as caught:
            getattr(client, method)(*arguments)
        return caught.value, client._budget.tokens


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_request_too_large_for_server_is_sent_once(running: Running, asynchronous: bool) -> None:
    config = ClientConfig(deadline_seconds=20)
    error, tokens = fails(running, config, asynchronous, "retrieve", "x" * (17 * 2**20))
    assert isinstance(error, InvalidRequest)
    assert (error.attempts, error.retry_after_seconds, tokens) == (1, None, config.retry.budget)
    assert "17825804" in str(error) and "The request is larger than the server takes" in str(error)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_answer_too_large_for_client_is_computed_once(running: Running, asynchronous: bool) -> None:
    config = ClientConfig(deadline_seconds=20, max_message_bytes=20_000)
    before = running.server.metrics.value("omni_requests", ("Embed", "OK"))
    error, tokens = fails(running, config, asynchronous, "embed", TEXTS)
    assert isinstance(error, InvalidRequest)
    assert (error.attempts, tokens) == (1, config.retry.budget)
    assert "20000" in str(
        error
    ) and "The answer is larger than ClientConfig.max_message_bytes" in str(error)
    assert running.server.metrics.value("omni_requests", ("Embed", "OK")) == before + 1


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_request_too_large_for_client_names_the_setting(
    running: Running, asynchronous: bool
) -> None:
    config = ClientConfig(deadline_seconds=20, max_message_bytes=1_000)
    error, tokens = fails(running, config, asynchronous, "retrieve", "x" * 2_000)
    assert isinstance(error, InvalidRequest)
    assert (error.attempts, tokens) == (1, config.retry.budget)
    assert "1000" in str(
        error
    ) and "The request is larger than ClientConfig.max_message_bytes" in str(error)
