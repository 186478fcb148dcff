"""A channel to the server that a module's fixture ``running`` starts."""

from collections.abc import Iterator

import grpc
import pytest

from protos import retrieval_pb2_grpc as rpc
from tests.helpers.serving.real_server import Running


@pytest.fixture(scope="module")
def channel(running: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.address) as found:
        yield found


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> rpc.RetrievalStub:
    return rpc.RetrievalStub(channel)
