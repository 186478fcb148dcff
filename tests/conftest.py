"""Fixtures of the whole session: a small bundle, a small store and a server on it, to be read only.

A test that writes to a store takes a copy: ``small_store.copy(tmp_path / "store")``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.helpers.serving.real_server import Running, SmallBundle, SmallStore

# Properties are about values; how long an example takes says how busy the machine is.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session", autouse=True)
def grpc_asyncio_stays() -> Iterator[None]:
    """Keep gRPC's asyncio engine alive between tests.

    Its last object would stop a poller thread; joining that from a garbage collection can wait for
    the very lock that the collection holds.
    """

    async def hold() -> None:
        grpc.aio.init_grpc_aio()

    loop = asyncio.new_event_loop()  # stays open: the engine keeps it
    loop.run_until_complete(hold())
    yield


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> SmallBundle:
    """A bundle with a tiny query tower."""
    from tests.helpers.serving.real_server import make_small_bundle

    return make_small_bundle(tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture(scope="session")
def small_store(small_bundle: SmallBundle, tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    """A store with one release of 300 pins, 120 products, 80 queries and 60 ads."""
    from tests.helpers.serving.real_server import make_small_store

    return make_small_store(tmp_path_factory.mktemp("small") / "store", small_bundle)


@pytest.fixture(scope="session")
def running_server(small_store: SmallStore) -> Iterator[Running]:
    """A server on the small store with the default settings; nothing is written through it."""
    from tests.helpers.serving.real_server import serving

    with serving(small_store) as running:
        yield running
