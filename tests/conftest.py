"""Keeps gRPC's asyncio engine alive between tests: its last object would stop a poller thread in
the middle of a collection.
"""

import asyncio
from collections.abc import Iterator

import grpc
import pytest


@pytest.fixture(scope="session", autouse=True)
def grpc_asyncio_stays() -> Iterator[None]:
    """One reference for the whole session; joining the poller from a collection can wait for the
    very lock the collection holds.
    """

    async def hold() -> None:
        grpc.aio.init_grpc_aio()

    loop = asyncio.new_event_loop()  # stays open: the engine keeps it
    loop.run_until_complete(hold())
    yield
