"""What a hostile peer can send, and a fuzzer: bytes of HTTP/2 that no client would make.

Each attack is what one connection sends, without end; who runs it connects again whenever the
server hangs up. Nothing here knows the server's code.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import hpack
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from protos import retrieval_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, GOAWAY, UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
RETRIEVAL = "/omnisearchsage.v1.Retrieval/"
ADMIN = "/omnisearchsage.v1.Admin/"
LARGEST = 2**31 - 1
FRAME_BYTES = 16_384

Pieces = Iterator[bytes]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Encode one frame, right or wrong."""
    size = len(payload)
    return struct.pack(">BHBBL", size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """Encode SETTINGS."""
    pairs = [struct.pack(">HL", key, value) for key, value in values.items()]
    return frame(SETTINGS, 0, 0, b"".join(pairs))


def update(stream: int, increment: int) -> bytes:
    """Encode WINDOW_UPDATE."""
    return frame(UPDATE, 0, stream, struct.pack(">L", increment))


def literal(name: bytes, value: bytes, first: int = 0) -> bytes:
    """Encode one field without Huffman code; ``first`` 0x40 puts it into the table."""
    return bytes([first]) + _integer(len(name)) + name + _integer(len(value)) + value


def _integer(value: int, first: int = 0) -> bytes:
    if value < 127:
        return bytes([first | value])
    out = bytearray([first | 127])
    value -= 127
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes(out) + bytes([value])


def fields(path: str, *more: tuple[str, str]) -> bytes:
    """Encode the headers of a call, without touching the table."""
    known = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *more,
    )
    return b"".join(literal(name.encode(), value.encode()) for name, value in known)


def message(content: bytes, is_compressed: bool = False) -> bytes:
    """Encode one gRPC message."""
    return bytes([is_compressed]) + struct.pack(">L", len(content)) + content


def upload(stream: int, content: bytes, flags: int = END_STREAM) -> bytes:
    """Encode content as DATA frames."""
    parts = [content[at : at + FRAME_BYTES] for at in range(0, len(content), FRAME_BYTES)]
    last = len(parts) - 1
    return b"".join(
        frame(DATA, flags if number == last else 0, stream, part)
        for number, part in enumerate(parts)
    )


def call(stream: int, method: str, content: bytes, *more: tuple[str, str]) -> bytes:
    """Encode a whole call of ``Retrieval``."""
    opened = frame(HEADERS, END_HEADERS, stream, fields(RETRIEVAL + method, *more))
    return opened + upload(stream, message(content))


QUESTION = pb.RetrieveRequest(query="lamp", entity_type="pin", k=3).SerializeToString()
HEAD = fields(RETRIEVAL + "Retrieve")
ONE = call(1, "Retrieve", QUESTION)
"""A call that is answered, so that its stream is closed."""
OPEN = frame(HEADERS, END_HEADERS, 1, HEAD)


class Attack(NamedTuple):
    """One attack.

    Attributes:
        name: For the table.
        pieces: Makes what a new connection sends after its preface.
        first: Settings of the connection.
        reads: Whether it reads what the server sends.
        connections: How many do it at the same time.
        greets: Whether it begins with HTTP/2's preface and ``first``.
    """

    name: str
    pieces: Callable[[], Pieces]
    first: bytes = settings({})
    reads: bool = True
    connections: int = 1
    greets: bool = True


def repeated(piece: bytes, opened: bytes = b"") -> Callable[[], Pieces]:
    """Send ``opened`` once and ``piece`` for ever."""
    return lambda: itertools.chain([opened], itertools.repeat(piece))


def streams(
    one: Callable[[int], bytes], each: int = 100, opened: bytes = b""
) -> Callable[[], Pieces]:
    """Send what ``one`` makes of ever new streams, so many in one piece."""

    def pieces() -> Pieces:
        yield opened
        numbers = itertools.count(1 if not opened else 3, 2)
        while True:
            yield b"".join(one(next(numbers)) for _ in range(each))

    return pieces


def opening(block: bytes, flags: int = END_HEADERS | END_STREAM) -> Callable[[int], bytes]:
    """Make HEADERS with this block."""
    return lambda stream: frame(HEADERS, flags, stream, block)


def split_opening(block: bytes) -> Callable[[int], bytes]:
    """Make HEADERS and CONTINUATION with a block of more than one frame."""
    parts = [block[at : at + FRAME_BYTES] for at in range(0, len(block), FRAME_BYTES)]
    kinds = [HEADERS, *[CONTINUATION] * (len(parts) - 1)]

    def opened(stream: int) -> bytes:
        frames = []
        for number, (kind, part) in enumerate(zip(kinds, parts, strict=True)):
            flags = END_HEADERS if number == len(parts) - 1 else 0
            frames.append(frame(kind, flags | (END_STREAM if kind == HEADERS else 0), stream, part))
        return b"".join(frames)

    return opened


def huffman_block(size: int, seed: int) -> bytes:
    """Encode one field of so many characters that take the decoder long."""
    rng = random.Random(seed)
    coder = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
    coded = coder.encode(bytes(rng.choice(b'!"#$%&<>') for _ in range(size)))
    return b"\x00\x01a" + _integer(len(coded), 0x80) + coded


def bomb(method: str, unit: bytes, *, compressed: bool, size: int) -> Callable[[], Pieces]:
    """Make calls whose message is one small field over and over."""
    path = method if method.startswith("/") else RETRIEVAL + method
    plain = unit * (size // len(unit))
    content = gzip.compress(plain, 9) if compressed else plain
    more = (("grpc-encoding", "gzip"),) if compressed else ()
    block = fields(path, *more)
    body = message(content, compressed)
    return streams(
        lambda stream: frame(HEADERS, END_HEADERS, stream, block) + upload(stream, body), each=1
    )


def json_bomb(size: int) -> Callable[[], Pieces]:
    """Make calls of the Connect protocol whose body is one empty list item over and over."""
    content = gzip.compress(b'{"attributes": [' + b'"",' * (size // 3) + b'""]}', 9)
    known = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", RETRIEVAL + "Retrieve"),
        (":authority", "localhost"),
        ("content-type", "application/json"),
        ("content-encoding", "gzip"),
    )
    block = b"".join(literal(name.encode(), value.encode()) for name, value in known)
    return streams(
        lambda stream: frame(HEADERS, END_HEADERS, stream, block) + upload(stream, content), each=1
    )


def large_answers(count: int) -> Callable[[int], bytes]:
    """Make calls whose answers are large, and cached after the first."""
    target = pb.Target(entity_type="pin", k=1000)
    request = pb.RetrieveBatchRequest(queries=["lamp"] * count, target=target)
    content = request.SerializeToString()
    return lambda stream: call(stream, "RetrieveBatch", content)


def slowly(pieces: Callable[[], Pieces], seconds: float) -> Callable[[], Pieces]:
    """Pause after each piece."""

    def paused() -> Pieces:
        for piece in pieces():
            yield piece
            time.sleep(seconds)

    return paused


def abandoned_batches() -> Pieces:
    """Batches of long work, given up as soon as they have begun."""
    target = pb.Target(entity_type="pin", k=1000, exact=True)
    for stream in itertools.count(1, 2):
        queries = [f"lamp {stream} {number}" for number in range(128)]
        content = pb.RetrieveBatchRequest(queries=queries, target=target).SerializeToString()
        yield call(stream, "RetrieveBatch", content)
        time.sleep(0.2)
        yield frame(RESET, 0, stream, struct.pack(">L", 8))


def dear_batches() -> Pieces:
    """Batches within all limits whose answers hold as much as they may."""
    target = pb.Target(entity_type="pin", k=1000, attributes=["*"])
    for stream in itertools.count(1, 2):
        queries = [f"lamp {stream} {number}" for number in range(170)]
        content = pb.RetrieveBatchRequest(queries=queries, target=target).SerializeToString()
        yield call(stream, "RetrieveBatch", content)
        time.sleep(0.2)


def dear_searches(each: int = 20) -> Pieces:
    """Single searches that nobody has asked before: exact, filtered by 60 KB, of long texts."""
    for stream in itertools.count(1, 2 * each):
        pieces = []
        for at in range(stream, stream + 2 * each, 2):
            values = ",".join(f"'{at} {number}'" for number in range(5000))
            request = pb.RetrieveRequest(
                query=f"lamp {at} " * 100, entity_type="pin", k=1000, exact=True
            )
            if at % 4 == 1:
                request.filter = f"title in [{values}]"[:60_000].rpartition(",")[0] + "]"
            pieces.append(call(at, "Retrieve", request.SerializeToString()))
        yield b"".join(pieces)
        time.sleep(0.05)


def watches(stream: int) -> bytes:
    """Make a call that lasts as long as its connection."""
    path = "/grpc.health.v1.Health/Watch"
    return frame(HEADERS, END_HEADERS, stream, fields(path)) + upload(stream, message(b""))


def reflected() -> Pieces:
    """Ask for the contract on one stream, over and over."""
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    symbol = b"omnisearchsage.v1.Retrieval"
    question = message(b"\x22" + bytes([len(symbol)]) + symbol)
    yield frame(HEADERS, END_HEADERS, 1, fields(path))
    while True:
        yield frame(DATA, 0, 1, question * 100)


def fresh_batches() -> Pieces:
    """Batches of texts that nobody has sent before."""
    target = pb.Target(entity_type="pin", k=10)
    for stream in itertools.count(1, 2):
        queries = [f"lamp {random.random()} {number}" for number in range(128)]
        content = pb.RetrieveBatchRequest(queries=queries, target=target).SerializeToString()
        yield call(stream, "RetrieveBatch", content)
        time.sleep(0.2)


def half_sent() -> Pieces:
    """Uploads that stop before their end."""
    for stream in (1, 3, 5, 7):
        opened = frame(HEADERS, END_HEADERS, stream, fields(RETRIEVAL + "RetrieveBatch"))
        yield opened + upload(stream, message(bytes(8 * 2**20))[: 7 * 2**20], 0)
    while True:
        yield b""
        time.sleep(0.1)


def random_frames(seed: int) -> Pieces:
    """Frames of random types, flags, streams and payloads, most of them nearly right."""
    rng = random.Random(seed)
    encoder = hpack.Encoder()
    last = 1
    while True:
        out = []
        for _ in range(50):
            stream = rng.choice((0, last, last, last + 2, rng.randrange(1, last + 9)))
            kind = rng.choice((*range(10), DATA, HEADERS, HEADERS, 0xAA))
            flags = rng.choice((0, END_STREAM, END_HEADERS, 5, 5, rng.randrange(256)))
            payload = rng.randbytes(rng.choice((0, 4, 5, 6, 8, 40, 400)))
            if kind == HEADERS and rng.random() < 0.8:
                last += 2
                stream = last
                payload = encoder.encode([(":method", "POST"), (":path", RETRIEVAL + "Retrieve")])
                payload += rng.choice((b"", HEAD, huffman_block(50, seed)))
            elif kind == DATA and rng.random() < 0.8:
                payload = message(rng.choice((QUESTION, payload)))
            out.append(frame(kind, flags, stream, payload))
        yield b"".join(out)


def random_bytes(seed: int) -> Pieces:
    """One connection's bytes: noise, another protocol, or HTTP/2 that breaks off or lies."""
    rng = random.Random(seed)
    kind = rng.randrange(5)
    if kind == 0:
        yield rng.randbytes(rng.choice((1, 100, 5000)))
    elif kind == 1:
        yield b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * rng.choice((1, 100))
    elif kind == 2:
        yield b"\x16\x03\x01" + rng.randbytes(200)
    elif kind == 3:
        yield PREFACE[: rng.randrange(len(PREFACE))]
    else:
        size = rng.randrange(2**24).to_bytes(3, "big")
        yield PREFACE + settings({}) + ONE + size + rng.randbytes(rng.choice((6, 50, 5000)))
    yield b""


def fuzzing(seed: int) -> Attack:
    """Return the fuzzer as an attack; every connection sends something else."""
    seeds = itertools.count(seed * 1_000_000)
    return Attack("random frames", lambda: random_frames(next(seeds)))


def noise(seed: int) -> Attack:
    """Return the fuzzer of connections as an attack; every one sends something else."""
    seeds = itertools.count(seed * 1_000_000)
    return Attack("random bytes", lambda: random_bytes(next(seeds)), connections=8, greets=False)


def attacks(seed: int = 0) -> list[Attack]:
    """Return all attacks; ``seed`` is the fuzzer's."""
    huffman = [huffman_block(9_000, number) for number in range(8)]
    wide = settings({4: LARGEST}) + update(0, LARGEST - 65_535)
    labels = pb.RetrieveRequest(
        query="lamp", entity_type="pin", k=3, request_id="x" * 2**20
    ).SerializeToString()
    return [
        Attack("none, for comparison", repeated(b"")),
        Attack("PING", repeated(frame(PING, 0, 0, bytes(8)) * 500)),
        Attack("SETTINGS", repeated(settings({4: 65_535}) * 500)),
        Attack("SETTINGS of 16 KB", repeated(frame(SETTINGS, 0, 0, bytes(16_380)) * 10)),
        Attack("PRIORITY", repeated(frame(PRIORITY, 0, 3, bytes(5)) * 500)),
        Attack("WINDOW_UPDATE of the connection", repeated(update(0, 1) * 500)),
        Attack("WINDOW_UPDATE of a closed stream", repeated(update(1, 1) * 500, ONE)),
        Attack("RST_STREAM of a closed stream", repeated(frame(RESET, 0, 1, bytes(4)) * 500, ONE)),
        Attack(
            "rapid reset",
            streams(lambda s: call(s, "Retrieve", QUESTION) + frame(RESET, 0, s, bytes(4))),
        ),
        Attack(
            "MadeYouReset, update of 0",
            streams(lambda s: frame(HEADERS, END_HEADERS, s, HEAD) + update(s, 0)),
        ),
        Attack(
            "MadeYouReset, overflow",
            streams(lambda s: frame(HEADERS, END_HEADERS, s, HEAD) + update(s, LARGEST)),
        ),
        Attack("unknown frame types", repeated(frame(0xAA, 0, 0) * 2000)),
        Attack("empty DATA, closed stream", repeated(frame(DATA, 0, 1) * 2000, ONE)),
        Attack("empty DATA, open stream", repeated(frame(DATA, 0, 1) * 500, OPEN)),
        Attack("DATA of padding", repeated(frame(DATA, PADDED, 1, b"\x03\0\0\0") * 500, OPEN)),
        Attack("trailers on a closed stream", repeated(frame(HEADERS, 4, 1, b"\x82") * 2000, ONE)),
        Attack(
            "CONTINUATION, empty",
            repeated(frame(CONTINUATION, 0, 1) * 500, frame(HEADERS, 0, 1, b"\x82")),
        ),
        Attack(
            "CONTINUATION, a byte each",
            repeated(frame(CONTINUATION, 0, 1, b"\x82") * 500, frame(HEADERS, 0, 1, b"\x82")),
        ),
        Attack(
            "CONTINUATION, 16 KB each",
            repeated(frame(CONTINUATION, 0, 1, huffman[0]), frame(HEADERS, 0, 1, b"\x82")),
        ),
        Attack("330 indexed fields", streams(opening(b"\x82\x84\x86\x88" * 83), each=50)),
        Attack("90 fields", streams(opening(HEAD + literal(b"x", b"y") * 84), each=50)),
        Attack("9 KB of Huffman code", streams(lambda s: opening(huffman[s // 2 % 8])(s), each=10)),
        Attack(
            "a table that changes",
            streams(lambda s: opening(HEAD + literal(b"x", b"%d" % s, 0x40) * 20)(s)),
        ),
        Attack("a table that shrinks", streams(opening(b"\x20\x3f\xe1\x1f" * 200 + HEAD))),
        Attack(
            "15 KB of metadata", streams(opening(HEAD + literal(b"x", bytes(15_000)), 5), each=9)
        ),
        Attack("40 KB of metadata", streams(split_opening(HEAD + literal(b"x", bytes(40_000))), 5)),
        Attack("malformed requests", streams(opening(HEAD + literal(b"X", b"y")))),
        Attack("requests that are no calls", streams(opening(fields("/nothing")))),
        Attack(
            "HEADERS beyond MAX_CONCURRENT_STREAMS",
            streams(opening(fields(RETRIEVAL + "RetrieveMulti"), END_HEADERS)),
        ),
        Attack("streams skipped", lambda: (opening(HEAD)(s) for s in itertools.count(1, 4))),
        Attack("a preface and no more", repeated(b""), connections=300),
        Attack("not even a preface", repeated(b""), connections=300, greets=False),
        Attack("headers without end", repeated(b"", frame(HEADERS, 0, 1, HEAD)), connections=300),
        Attack("connections that close at once", lambda: iter(()), connections=8),
        *(
            Attack(f"{how} of {name}", bomb(method, unit, compressed=packed, size=size))
            for how, packed, size in (("gzip bomb", True, 16_000_000), ("bomb", False, 1_000_000))
            for name, method, unit in (
                ("targets", "RetrieveMulti", b"\x22\x00"),
                ("ids in targets", "RetrieveMulti", b"\x22\x02\x2a\x00"),
                ("queries", "RetrieveBatch", b"\x0a\x00"),
                ("attributes", "Retrieve", b"\x82\x01\x00"),
                ("scored ids", "Score", b"\x2a\x00"),
                ("texts", "Embed", b"\x0a\x00"),
                ("entities", ADMIN + "Upsert", b"\x1a\x00"),
                ("attributes of entities", ADMIN + "Upsert", b"\x1a\x02\x1a\x00"),
                ("deleted ids", ADMIN + "Delete", b"\x12\x00"),
            )
        ),
        Attack(
            "answers for a window of 0",
            slowly(streams(large_answers(60), each=1), 0.01),
            settings({4: 0}),
            connections=8,
        ),
        Attack(
            "answers that nobody reads",
            streams(large_answers(8), each=20),
            wide,
            reads=False,
            connections=8,
        ),
        Attack("half-sent uploads", half_sent, connections=8),
        Attack("batches given up", abandoned_batches, connections=2),
        Attack("batches of fresh texts", fresh_batches, connections=2),
        Attack("gzip bomb of JSON", json_bomb(16_000_000)),
        Attack("labels of 1 MB", streams(lambda s: call(s, "Retrieve", labels), each=1)),
        Attack("batches of all attributes", dear_batches, connections=2),
        Attack("dear searches", dear_searches, connections=2),
        Attack("watches", streams(watches), connections=8),
        Attack("reflection that nobody reads", reflected, wide, reads=False, connections=8),
        noise(seed),
        fuzzing(seed),
    ]


class Damage(NamedTuple):
    """What an attack has sent.

    Attributes:
        sent_bytes: To the server.
        connections: How many it took.
    """

    sent_bytes: int
    connections: int


def run_numbered(number: int, seed: int, port: int, seconds: float) -> None:
    """Run one attack of the list: what a spawned process is told."""
    run_attack(attacks(seed)[number], port, seconds)


def run_attack(attack: Attack, port: int, seconds: float) -> Damage:
    """Run one attack for so long; connects again whenever the server hangs up."""
    until = time.monotonic() + seconds
    found: list[Damage] = []
    lanes = [
        threading.Thread(target=lambda: found.append(_lane(attack, port, until)), daemon=True)
        for _ in range(attack.connections)
    ]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join(seconds + 5)
    if not any(one.sent_bytes or not attack.greets for one in found):
        raise RuntimeError(f"{attack.name}: nothing was sent")
    return Damage(sum(one.sent_bytes for one in found), sum(one.connections for one in found))


def _lane(attack: Attack, port: int, until: float) -> Damage:
    sent = 0
    connections = 0
    while time.monotonic() < until:
        connections += 1
        with contextlib.suppress(OSError), _connected(port, attack.reads) as connection:
            if attack.greets:
                connection.sendall(PREFACE + attack.first)
                sent += len(PREFACE + attack.first)
            for piece in attack.pieces():
                if time.monotonic() > until:
                    break
                if piece:
                    connection.sendall(piece)
                else:
                    time.sleep(0.05)
                sent += len(piece)
        time.sleep(0.005)
    return Damage(sent, connections)


@contextlib.contextmanager
def _connected(port: int, reads: bool) -> Iterator[socket.socket]:
    """Connect; what the server sends is read and dropped by a thread, or never read."""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        if reads:
            threading.Thread(target=_drain, args=(connection,), daemon=True).start()
        yield connection


def _drain(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(2**18):
            pass
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
