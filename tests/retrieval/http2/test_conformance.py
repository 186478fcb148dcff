"""RFC 9113, sections 3 to 8, and RFC 7541: what a client must not send, and what answers it.

Each case is one MUST that a peer can break, as bytes. Every case looks at the neighbour, too:
another connection is served as before, and so is the same one where only a stream was at fault.
"""

import socket
import struct
from collections.abc import Iterator

import hpack
import pytest

from retrieval.http2 import frames
from retrieval.http2.headers import literal
from tests.helpers.serving.raw_http2 import (
    FIELDS,
    HELLO,
    Running,
    body,
    ended,
    fields_of,
    goaway_code,
    message,
    opening,
    read_frames,
    read_until_pong,
    request,
    statuses,
)

frame = frames.frame
END = frames.END_STREAM
WHOLE = frames.END_HEADERS
NOW = message(b"now")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running(max_streams=20)
    yield found
    found.stop(1.0)


@pytest.fixture
def neighbour(running: Running) -> Iterator[socket.socket]:
    """Another connection, which is served after whatever a test does."""
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now before"))
        assert body(read_frames(connection, ended(1)), 1) == b"now before"
        yield connection
        connection.sendall(request(3, b"now after"))
        assert body(read_frames(connection, ended(3)), 3) == b"now after"


def plain(fields: list[tuple[str, str]]) -> bytes:
    """A header block of literals, in this order, whatever they are."""
    return b"".join(literal(name.encode(), value.encode("latin-1")) for name, value in fields)


def open_with(stream: int, fields: list[tuple[str, str]], flags: int = 0) -> bytes:
    return frame(frames.HEADERS, WHOLE | flags, stream, plain(fields))


def data(stream: int, content: bytes = NOW, flags: int = END) -> bytes:
    return frame(frames.DATA, flags, stream, content)


def without(name: str) -> list[tuple[str, str]]:
    return [field for field in FIELDS if field[0] != name]


def setting(key: int, value: int) -> bytes:
    return frame(frames.SETTINGS, 0, 0, struct.pack(">HL", key, value))


SLOW = fields_of("Slow")
OPEN = opening(1, SLOW)
"""A call whose message is not here yet."""
HALF_CLOSED = opening(1, SLOW) + data(1, message(b"30"))
CLOSED = request(1, b"now")
RESET = OPEN + frame(frames.RST_STREAM, 0, 1, bytes(4))

# --- errors of the connection: GOAWAY with a code, and the end ---

CONNECTION_ERRORS: dict[str, tuple[bytes, int]] = {
    "3.4 no preface": (b"EHLO x\r\n" + b" " * 40, frames.PROTOCOL_ERROR),
    "3.4 the first frame is PING": (
        frames.PREFACE + frame(frames.PING, 0, 0, bytes(8)),
        frames.PROTOCOL_ERROR,
    ),
    "3.4 the first frame is HEADERS": (frames.PREFACE + opening(1), frames.PROTOCOL_ERROR),
    "3.4 the first frame is an acknowledgement": (
        frames.PREFACE + frame(frames.SETTINGS, frames.ACK, 0),
        frames.PROTOCOL_ERROR,
    ),
    "4.2 a frame larger than allowed": (
        HELLO + data(1, bytes(16_385))[:9] + bytes(16_385),
        frames.FRAME_SIZE_ERROR,
    ),
    "4.3 a block that cannot be decoded": (
        HELLO + frame(frames.HEADERS, WHOLE | END, 1, b"\xff\xff\xff\xff\xff\xff"),
        frames.COMPRESSION_ERROR,
    ),
    "4.3 a block of a closed stream that cannot be decoded": (
        HELLO + CLOSED + frame(frames.HEADERS, WHOLE | END, 1, b"\xff" * 6),
        frames.COMPRESSION_ERROR,
    ),
    "5.1 idle: DATA": (HELLO + data(1), frames.PROTOCOL_ERROR),
    "5.1 idle: RST_STREAM": (
        HELLO + frame(frames.RST_STREAM, 0, 1, bytes(4)),
        frames.PROTOCOL_ERROR,
    ),
    "5.1 idle: WINDOW_UPDATE": (HELLO + frames.window_update(1, 1), frames.PROTOCOL_ERROR),
    "5.1 closed by END_STREAM: HEADERS": (HELLO + CLOSED + opening(1), frames.STREAM_CLOSED),
    "5.1 closed by RST_STREAM: HEADERS": (HELLO + RESET + opening(1), frames.STREAM_CLOSED),
    "5.1.1 an even stream": (HELLO + opening(2), frames.PROTOCOL_ERROR),
    "5.1.1 a stream below the last": (
        HELLO + request(5, b"now") + opening(3),
        frames.PROTOCOL_ERROR,
    ),
    "6.1 DATA of the connection": (HELLO + data(0), frames.PROTOCOL_ERROR),
    "6.1 DATA, all padding": (
        HELLO + OPEN + frame(frames.DATA, frames.PADDED, 1, b"\x05abc"),
        frames.PROTOCOL_ERROR,
    ),
    "6.2 HEADERS of the connection": (HELLO + opening(0), frames.PROTOCOL_ERROR),
    "6.2 HEADERS, all padding": (
        HELLO + frame(frames.HEADERS, WHOLE | frames.PADDED, 1, b"\x05abc"),
        frames.PROTOCOL_ERROR,
    ),
    "6.2 HEADERS without the priority it announces": (
        HELLO + frame(frames.HEADERS, WHOLE | frames.PRIORITISED, 1, b"\x00\x00"),
        frames.FRAME_SIZE_ERROR,
    ),
    "6.2 a block interrupted by DATA": (
        HELLO + OPEN + frame(frames.HEADERS, 0, 3, b"\x83") + data(1),
        frames.PROTOCOL_ERROR,
    ),
    "6.2 a block interrupted by HEADERS": (
        HELLO + frame(frames.HEADERS, 0, 1, b"\x83") + opening(3),
        frames.PROTOCOL_ERROR,
    ),
    "6.2 a block interrupted by an unknown type": (
        HELLO + frame(frames.HEADERS, 0, 1, b"\x83") + frame(0xAA, 0, 0),
        frames.PROTOCOL_ERROR,
    ),
    "6.3 PRIORITY of the connection": (
        HELLO + frame(frames.PRIORITY, 0, 0, bytes(5)),
        frames.PROTOCOL_ERROR,
    ),
    "6.4 RST_STREAM of the connection": (
        HELLO + frame(frames.RST_STREAM, 0, 0, bytes(4)),
        frames.PROTOCOL_ERROR,
    ),
    "6.4 RST_STREAM of three bytes": (
        HELLO + OPEN + frame(frames.RST_STREAM, 0, 1, bytes(3)),
        frames.FRAME_SIZE_ERROR,
    ),
    "6.5 SETTINGS of a stream": (HELLO + frame(frames.SETTINGS, 0, 1), frames.PROTOCOL_ERROR),
    "6.5 SETTINGS of five bytes": (
        HELLO + frame(frames.SETTINGS, 0, 0, bytes(5)),
        frames.FRAME_SIZE_ERROR,
    ),
    "6.5 an acknowledgement with settings": (
        HELLO + frame(frames.SETTINGS, frames.ACK, 0, bytes(6)),
        frames.FRAME_SIZE_ERROR,
    ),
    "6.5.2 ENABLE_PUSH of 2": (HELLO + setting(frames.ENABLE_PUSH, 2), frames.PROTOCOL_ERROR),
    "6.5.2 INITIAL_WINDOW_SIZE of 2^31": (
        HELLO + setting(frames.INITIAL_WINDOW_SIZE, 2**31),
        frames.FLOW_CONTROL_ERROR,
    ),
    "6.5.2 MAX_FRAME_SIZE below the first": (
        HELLO + setting(frames.MAX_FRAME_SIZE, 16_383),
        frames.PROTOCOL_ERROR,
    ),
    "6.5.2 MAX_FRAME_SIZE of 2^24": (
        HELLO + setting(frames.MAX_FRAME_SIZE, 2**24),
        frames.PROTOCOL_ERROR,
    ),
    "6.6 PUSH_PROMISE": (
        HELLO + OPEN + frame(frames.PUSH_PROMISE, WHOLE, 1, bytes(4)),
        frames.PROTOCOL_ERROR,
    ),
    "6.7 PING of a stream": (HELLO + frame(frames.PING, 0, 1, bytes(8)), frames.PROTOCOL_ERROR),
    "6.7 PING of seven bytes": (
        HELLO + frame(frames.PING, 0, 0, bytes(7)),
        frames.FRAME_SIZE_ERROR,
    ),
    "6.8 GOAWAY of a stream": (HELLO + frame(frames.GOAWAY, 0, 1, bytes(8)), frames.PROTOCOL_ERROR),
    "6.8 GOAWAY of seven bytes": (
        HELLO + frame(frames.GOAWAY, 0, 0, bytes(7)),
        frames.FRAME_SIZE_ERROR,
    ),
    "6.9 WINDOW_UPDATE of three bytes": (
        HELLO + frame(frames.WINDOW_UPDATE, 0, 0, bytes(3)),
        frames.FRAME_SIZE_ERROR,
    ),
    "6.9 WINDOW_UPDATE of nothing": (HELLO + frames.window_update(0, 0), frames.PROTOCOL_ERROR),
    "6.9.1 the connection's window beyond 2^31-1": (
        HELLO + frames.window_update(0, 2**31 - 1),
        frames.FLOW_CONTROL_ERROR,
    ),
    "6.9.2 a stream's window beyond 2^31-1 by SETTINGS": (
        HELLO
        + OPEN
        + frames.window_update(1, 2**31 - 1 - 65_535)
        + setting(frames.INITIAL_WINDOW_SIZE, 65_536),
        frames.FLOW_CONTROL_ERROR,
    ),
    "6.10 CONTINUATION after a whole block": (
        HELLO + OPEN + frame(frames.CONTINUATION, WHOLE, 1),
        frames.PROTOCOL_ERROR,
    ),
    "6.10 CONTINUATION of another stream": (
        HELLO + frame(frames.HEADERS, 0, 1, b"\x83") + frame(frames.CONTINUATION, WHOLE, 3),
        frames.PROTOCOL_ERROR,
    ),
    "6.10 CONTINUATION of the connection": (
        HELLO + frame(frames.CONTINUATION, WHOLE, 0),
        frames.PROTOCOL_ERROR,
    ),
}


@pytest.mark.parametrize("case", CONNECTION_ERRORS)
def test_connection_error_ends_it_with_its_code(
    running: Running, neighbour: socket.socket, case: str
) -> None:
    sent, code = CONNECTION_ERRORS[case]
    with running.connect() as connection:
        connection.sendall(sent)
        assert goaway_code(read_frames(connection, lambda found: False)) == code


# --- RFC 7541: blocks that cannot be decoded ---


def integer_of(first: int, count: int) -> bytes:
    return bytes([first]) + b"\xff" * count + b"\x00"


BAD_BLOCKS: dict[str, bytes] = {
    "2.3.3 the index 0": b"\x80",
    "2.3.3 an index beyond the table": b"\xbe",
    "5.1 an integer without an end": b"\x7f\xff\xff",
    "5.1 an integer of ten bytes": integer_of(0xFF, 9),
    "5.2 a name longer than the block": b"\x00\x05ab",
    "5.2 a value longer than the block": b"\x00\x01a\x05b",
    "5.2 Huffman padding of eight bits": b"\x00\x01a\x82\x1f\xff",
    "5.2 Huffman padding of zeros": b"\x00\x01a\x81\x18",
    "5.2 the Huffman code for the end": b"\x00\x01a\x84\xff\xff\xff\xff",
    "6.2 a name at an index beyond the table": b"\x7e\x01a",
    "6.3 a table larger than announced": b"\x3f\xe2\x1f",
    "4.2 a size of the table after a field": b"\x83\x20",
}


@pytest.mark.parametrize("case", BAD_BLOCKS)
def test_hpack_block_that_breaks_a_rule_is_a_compression_error(
    running: Running, neighbour: socket.socket, case: str
) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + frame(frames.HEADERS, WHOLE | END, 1, BAD_BLOCKS[case]))
        assert goaway_code(read_frames(connection, lambda found: False)) == frames.COMPRESSION_ERROR


def test_hpack_blocks_that_change_the_table_are_read(
    running: Running, neighbour: socket.socket
) -> None:
    """Indexed, evicted, larger than the table, shrunk and grown: names keep their meaning."""
    encoder = hpack.Encoder()
    blocks = []
    for number in range(40):
        if number % 10 == 9:
            encoder.header_table_size = 0
            encoder.header_table_size = (200, 4096)[number // 10 % 2]
        fields = [*FIELDS, ("x-count", str(number)), ("x-long", "v" * (97 * number))]
        blocks.append(encoder.encode(fields))
    running.behaviour.seen.clear()
    with running.connect() as connection:
        connection.sendall(HELLO)
        for number, block in enumerate(blocks):
            stream = 2 * number + 1
            sent = frame(frames.HEADERS, WHOLE, stream, block)
            connection.sendall(sent + data(stream, message(b"later")))
            assert body(read_frames(connection, ended(stream)), stream) == b"later"
    counts = [dict(metadata)["x-count"] for metadata in running.behaviour.seen]
    longs = [len(dict(metadata)["x-long"]) for metadata in running.behaviour.seen]
    assert counts == list(map(str, range(40))) and longs == [97 * number for number in range(40)]


# --- errors of one stream: RST_STREAM with a code, and the connection goes on ---

LONG = ("content-length", "9")
STREAM_ERRORS: dict[str, tuple[bytes, int]] = {
    "5.1 half-closed: DATA": (HALF_CLOSED + data(1), frames.STREAM_CLOSED),
    "5.1 half-closed: HEADERS": (
        HALF_CLOSED + frame(frames.HEADERS, WHOLE | END, 1, b""),
        frames.STREAM_CLOSED,
    ),
    "5.1 closed by END_STREAM: DATA": (CLOSED + data(1), frames.STREAM_CLOSED),
    "5.1 closed by RST_STREAM: DATA": (RESET + data(1), frames.STREAM_CLOSED),
    "6.3 PRIORITY of four bytes": (
        OPEN + frame(frames.PRIORITY, 0, 1, bytes(4)),
        frames.FRAME_SIZE_ERROR,
    ),
    "6.9 WINDOW_UPDATE of nothing": (OPEN + frames.window_update(1, 0), frames.PROTOCOL_ERROR),
    "6.9.1 a window beyond 2^31-1": (
        OPEN + frames.window_update(1, 2**31 - 1),
        frames.FLOW_CONTROL_ERROR,
    ),
    "8.1 trailers that do not end the stream": (
        OPEN + frame(frames.HEADERS, WHOLE, 1, literal(b"x-t", b"1")),
        frames.PROTOCOL_ERROR,
    ),
    "8.1 trailers with a pseudo-header": (
        OPEN + frame(frames.HEADERS, WHOLE | END, 1, literal(b":path", b"/")),
        frames.PROTOCOL_ERROR,
    ),
    "8.1 trailers with an uppercase name": (
        OPEN + frame(frames.HEADERS, WHOLE | END, 1, literal(b"X-T", b"1")),
        frames.PROTOCOL_ERROR,
    ),
    "8.1.1 more content than announced": (
        open_with(1, [*SLOW, ("content-length", "3")]) + data(1),
        frames.PROTOCOL_ERROR,
    ),
    "8.1.1 less content than announced": (
        open_with(1, [*SLOW, ("content-length", "900")]) + data(1),
        frames.PROTOCOL_ERROR,
    ),
    "8.1.1 no content where some is announced": (
        open_with(1, [*SLOW, ("content-length", "1")], END),
        frames.PROTOCOL_ERROR,
    ),
}
MALFORMED: dict[str, list[tuple[str, str]]] = {
    "8.1.1 content-length that is no number": [*FIELDS, ("content-length", "+9")],
    "8.1.1 content-length twice": [*FIELDS, LONG, ("content-length", "8")],
    "8.2.1 an uppercase name": [*FIELDS, ("X-Upper", "1")],
    "8.2.1 an empty name": [*FIELDS, ("", "1")],
    "8.2.1 a name with a space": [*FIELDS, ("x y", "1")],
    "8.2.1 a name with a colon": [*FIELDS, ("x:y", "1")],
    "8.2.1 a name with a control character": [*FIELDS, ("x\x01", "1")],
    "8.2.1 a name beyond ASCII": [*FIELDS, ("x\xe9", "1")],
    "8.2.1 NUL in a value": [*FIELDS, ("x", "a\x00b")],
    "8.2.1 CR in a value": [*FIELDS, ("x", "a\rb")],
    "8.2.1 LF in a value": [*FIELDS, ("x", "a\nb")],
    "8.2.1 a value that begins with a space": [*FIELDS, ("x", " a")],
    "8.2.1 a value that ends with a tab": [*FIELDS, ("x", "a\t")],
    "8.2.2 connection": [*FIELDS, ("connection", "close")],
    "8.2.2 keep-alive": [*FIELDS, ("keep-alive", "5")],
    "8.2.2 proxy-connection": [*FIELDS, ("proxy-connection", "close")],
    "8.2.2 transfer-encoding": [*FIELDS, ("transfer-encoding", "chunked")],
    "8.2.2 upgrade": [*FIELDS, ("upgrade", "h2c")],
    "8.2.2 te beyond trailers": [*without("te"), ("te", "gzip")],
    "8.3 a pseudo-header after a field": [*without(":path"), (":path", "/t.T/Echo")],
    "8.3 an unknown pseudo-header": [(":x", "1"), *FIELDS],
    "8.3 a response's pseudo-header": [(":status", "200"), *FIELDS],
    "8.3.1 :method twice": [(":method", "POST"), *FIELDS],
    "8.3.1 :path twice": [(":path", "/t.T/Fail"), *FIELDS],
    "8.3.1 :authority twice": [(":authority", "a"), (":authority", "b"), *FIELDS],
    "8.3.1 no :method": without(":method"),
    "8.3.1 no :scheme": without(":scheme"),
    "8.3.1 no :path": without(":path"),
    "8.3.1 an empty :path": [(":path", ""), *without(":path")],
    "8.3 no pseudo-header at all": [field for field in FIELDS if field[0][0] != ":"],
    "8.5 CONNECT with a path": [(":method", "CONNECT"), *without(":method")],
}
STREAM_ERRORS |= {
    case: (open_with(1, fields) + data(1), frames.PROTOCOL_ERROR)
    for case, fields in MALFORMED.items()
}


@pytest.mark.parametrize("case", STREAM_ERRORS)
def test_stream_error_ends_the_stream_alone(
    running: Running, neighbour: socket.socket, case: str
) -> None:
    sent, code = STREAM_ERRORS[case]
    with running.connect() as connection:
        connection.sendall(HELLO + sent)
        found = read_until_pong(connection)
        resets = [payload for kind, _, s, payload in found if (kind, s) == (frames.RST_STREAM, 1)]
        assert [int.from_bytes(payload, "big") for payload in resets] == [code]
        connection.sendall(request(7, b"now"))
        assert body(read_frames(connection, ended(7)), 7) == b"now"
        (inside,) = [c for c in running.server.connections if c.streams.last == 7]
        assert not inside.streams.calls and not inside.streams.buffers.held


def test_streams_beyond_the_limit_are_refused_alone(
    running: Running, neighbour: socket.socket
) -> None:
    """5.1.2: a client that opens more than it was allowed."""
    with running.connect() as connection:
        streams = range(1, 51, 2)
        connection.sendall(HELLO + b"".join(opening(stream, SLOW) for stream in streams))
        found = read_until_pong(connection)
        refused = [
            stream
            for kind, _, stream, payload in found
            if kind == frames.RST_STREAM and payload[3] == frames.REFUSED_STREAM
        ]
        assert refused == list(range(41, 51, 2))


# --- what has to be accepted ---

ACCEPTED: dict[str, bytes] = {
    "4.1 unknown types and flags": (
        frame(0xAA, 0xFF, 0, b"x") + frame(frames.PING, 0xF0, 0, bytes(8)) + request(1, b"now")
    ),
    "4.1 the reserved bit of a stream": (
        frame(frames.HEADERS, WHOLE, 2**31 + 1, plain(FIELDS)) + data(2**31 + 1)
    ),
    "5.1 PRIORITY of an idle stream": frame(frames.PRIORITY, 0, 9, bytes(5)) + request(1, b"now"),
    "5.1 PRIORITY of a closed stream": (
        request(1, b"now") + frame(frames.PRIORITY, 0, 1, bytes(5)) + request(3, b"now")
    ),
    "5.1 late WINDOW_UPDATE and RST_STREAM of a closed stream": (
        request(1, b"now")
        + frames.window_update(1, 5)
        + frame(frames.RST_STREAM, 0, 1, bytes(4))
        + request(3, b"now")
    ),
    "6.5.2 an unknown setting": setting(0x99, 7) + request(1, b"now"),
    "6.9 the reserved bit of an increment": (
        frame(frames.WINDOW_UPDATE, 0, 0, struct.pack(">L", 2**31 + 5)) + request(1, b"now")
    ),
    "7 an unknown error code": (
        opening(1, SLOW)
        + frame(frames.RST_STREAM, 0, 1, struct.pack(">L", 0xFFFF))
        + request(3, b"now")
    ),
    "8.1 trailers": opening(1)
    + data(1, NOW, 0)
    + frame(frames.HEADERS, WHOLE | END, 1, literal(b"x-t", b"1")),
    "8.1.1 content-length that is right": open_with(1, [*FIELDS, ("content-length", "8")])
    + data(1),
    "8.2.3 several cookies": open_with(1, [*FIELDS, ("cookie", "a=b"), ("cookie", "c=d")])
    + data(1),
    "empty DATA before the content": opening(1) + data(1, b"", 0) + data(1),
    "skipped streams": request(1, b"now") + request(9, b"now"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_connection_accepts_what_the_rfc_allows(
    running: Running, neighbour: socket.socket, case: str
) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + ACCEPTED[case] + request(99, b"now last"))
        found = read_frames(connection, ended(99))
        assert body(found, 99) == b"now last" and goaway_code(found) is None
        assert set(statuses(found).values()) == {0}
        codes = [payload for kind, _, _, payload in found if kind == frames.RST_STREAM]
        assert codes in ([], [bytes(4)])


def test_ping_and_settings_are_acknowledged_in_order(
    running: Running, neighbour: socket.socket
) -> None:
    """6.5.3, 6.7: an acknowledgement with the same bytes; none of an acknowledgement."""
    with running.connect() as connection:
        sent = frame(frames.PING, frames.ACK, 0, b"not mine") + setting(4, 70_000)
        connection.sendall(HELLO + sent + frame(frames.PING, 0, 0, b"12345678"))
        found = read_frames(
            connection, lambda found: any(kind == frames.PING for kind, *_ in found)
        )
    acknowledged = [(kind, payload) for kind, flags, _, payload in found if flags & frames.ACK]
    assert acknowledged == [
        (frames.SETTINGS, b""),
        (frames.SETTINGS, b""),
        (frames.PING, b"12345678"),
    ]


def test_frames_on_a_stream_that_the_server_reset_are_ignored(
    running: Running, neighbour: socket.socket
) -> None:
    """5.1, closed: they may have been on their way."""
    with running.connect() as connection:
        late = data(1, bytes(100), 0) + frame(frames.HEADERS, WHOLE | END, 1, literal(b"x", b"y"))
        malformed = open_with(1, [*FIELDS, ("X", "1")])
        connection.sendall(HELLO + malformed + late + request(3, b"now"))
        found = read_frames(connection, ended(3))
    assert [stream for kind, _, stream, _ in found if kind == frames.RST_STREAM] == [1]
    assert goaway_code(found) is None and body(found, 3) == b"now"
