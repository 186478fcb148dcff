"""Memory of decoded header blocks: bounded, and kept only for blocks that can come again."""

import asyncio
import gc
import tracemalloc
from collections.abc import Callable, Iterator

import hpack
import pytest

from retrieval.http2 import frames, headers
from retrieval.http2.calls import MethodTable
from retrieval.http2.connection import Connection
from retrieval.http2.header_blocks import HeaderReader
from retrieval.http2.server import Http2Server
from tests.helpers.serving.raw_http2 import FIELDS, HELLO, Behaviour, request

KIB = 2**10
CALLS = 200


class Sink:
    """A transport that counts answers."""

    def __init__(self) -> None:
        self.answers = 0

    def write(self, content: bytes) -> None:
        self.answers += content.count(headers.OK_BLOCK)

    def close(self) -> None:
        """The connection has ended."""

    def pause_reading(self) -> None:
        """Frames are left for the loop's next turn."""

    def resume_reading(self) -> None:
        """They are served."""


@pytest.fixture
async def server() -> Http2Server:
    found = Http2Server(max_receive_bytes=KIB, max_send_bytes=KIB, max_streams=10)
    found.add_generic_rpc_handlers((Behaviour().handlers(),))
    return found


def connected(server: Http2Server) -> tuple[Connection, Sink]:
    """One end of a connection without the other."""
    connection = server.make_connection()
    sink = Sink()
    connection.connection_made(sink)  # type: ignore[arg-type]
    connection.data_received(HELLO)
    return connection, sink


async def receive(connection: Connection, content: bytes) -> None:
    """Give a connection bytes, and the turns of the loop that it takes for them."""
    connection.data_received(content)
    while connection._has_turn:
        await asyncio.sleep(0)


def plain(*more: tuple[str, str]) -> bytes:
    """A header block that changes no table, as of a client that never indexes."""
    return b"".join(
        headers.literal(name.encode(), value.encode()) for name, value in [*FIELDS, *more]
    )


def call(stream: int, block: bytes) -> bytes:
    message = b"\x00\x00\x00\x00\x03now"
    return frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block) + frames.frame(
        frames.DATA, frames.END_STREAM, stream, message
    )


def traced(size: int) -> Callable[[int], bytes]:
    return lambda number: plain(("x-trace", str(number).ljust(size, "x")))


UNIQUE: dict[str, Callable[[int], bytes]] = {
    "15 KB": traced(15_000),
    "900 bytes": traced(900),
    "a trace id": traced(32),
    "many short headers": lambda number: plain(*((f"{i:x}", str(number)) for i in range(40))),
    "many indexes": lambda number: plain(("x", str(number))) + bytes((0x80 | 16,)) * 80,
}


@pytest.mark.slow
@pytest.mark.parametrize("block", UNIQUE.values(), ids=UNIQUE.keys())
async def test_header_reader_unique_blocks_take_bounded_memory(
    server: Http2Server, block: Callable[[int], bytes]
) -> None:
    """Blocks of 16 KiB, and what is made of them, count against the connection's memory."""
    connection, sink = connected(server)
    await receive(connection, call(1, block(0)))
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    most = 0
    for number in range(1, CALLS):
        await receive(connection, call(2 * number + 1, block(number)))
        most = max(most, tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    assert sink.answers == CALLS
    assert most < 128 * KIB, f"{most / KIB:.0f} KiB"


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A number for every time that headers were looked at."""
    found: list[int] = []
    read_head = MethodTable.read_head
    monkeypatch.setattr(
        MethodTable,
        "read_head",
        lambda self, headers: (found.append(1), read_head(self, headers))[1],
    )
    yield found


async def test_header_reader_repeated_block_is_understood_once(
    server: Http2Server, understood: list[int]
) -> None:
    connection, sink = connected(server)
    encoder = hpack.Encoder()
    for number in range(50):
        await receive(connection, request(2 * number + 1, b"now", encoder=encoder))
    assert sink.answers == 50 and len(understood) == 2, (
        "the block that fills the table, and the one of its indexes"
    )


async def test_header_reader_several_kinds_of_calls_are_remembered(
    server: Http2Server, understood: list[int]
) -> None:
    connection, sink = connected(server)
    blocks = [plain(("tenant", str(number))) for number in range(20)]
    for number in range(200):
        await receive(connection, call(2 * number + 1, blocks[number % 20]))
    assert sink.answers == 200 and len(understood) == 20


@pytest.mark.parametrize(
    ("size", "times"), [(2 * KIB, 1), (15_000, 5)], ids=["a token", "more than is remembered"]
)
async def test_header_reader_large_block_is_remembered_if_it_fits(
    server: Http2Server, understood: list[int], size: int, times: int
) -> None:
    connection, sink = connected(server)
    for number in range(5):
        await receive(connection, call(2 * number + 1, traced(size)(0)))
    assert sink.answers == 5 and len(understood) == times


async def test_header_reader_table_change_forgets_blocks(
    server: Http2Server,
) -> None:
    seen: list[bytes] = []
    reader = HeaderReader()
    encoder = hpack.Encoder()
    for value in ("a", "a", "b", "b", "b"):
        seen.append(dict(reader.read(encoder.encode([("x", value), ("y", "c")])))[b"x"])
    assert seen == [b"a", b"a", b"b", b"b", b"b"]


async def test_data_frames_of_one_connection_leave_another_its_turn(server: Http2Server) -> None:
    """Tiny frames of DATA come to long work in one read."""
    connection, _ = connected(server)
    neighbour, answered = connected(server)
    flood = frames.frame(frames.DATA, 0, 1, b"x") * 25_000
    opened = frames.frame(frames.HEADERS, frames.END_HEADERS, 1, plain())
    asyncio.get_running_loop().call_soon(neighbour.data_received, call(1, plain()))
    begun = frames.frame(frames.DATA, 0, 1, b"\x00\x00\x00\x03\xff")
    connection.data_received(opened + begun + flood)
    while not answered.answers:
        await asyncio.sleep(0)
    assert connection._rest, "the rest has its turn later"
    connection.close()


async def test_header_reader_fields_are_charged(server: Http2Server) -> None:
    """A block may hold as many as it has bytes: each is an index of one byte."""
    reader = HeaderReader()
    assert reader.read(bytes((0x80 | 16,)) * 100_000) is None and reader.cost == 1000
    assert len(reader.read(plain())) == len(FIELDS) and reader.cost == 0
