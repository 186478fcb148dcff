"""``omni bench fuzz``: malformed requests and bytes against a real server: typed errors only.

No crash and no hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import string
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import grpc
import hpack
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from benchmarks.record import Measurement, write_record
from benchmarks.serving.peer_servers import Process, omni_server
from encoders.commands.console import (
    fail,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from protos import retrieval_pb2 as pb
from retrieval.http2 import frames

TYPED = frozenset(
    {
        *(
            "OK",
            "INVALID_ARGUMENT",
            "NOT_FOUND",
            "FAILED_PRECONDITION",
            "RESOURCE_EXHAUSTED",
            "PERMISSION_DENIED",
            "UNAUTHENTICATED",
        ),
        *("UNIMPLEMENTED",),
    }
)
"""What a caller may get.

INTERNAL and UNKNOWN would be faults, UNAVAILABLE a crash, DEADLINE_EXCEEDED a hang.
"""
DEADLINE_SECONDS = 20.0
SERVICES = {
    "Retrieval": {
        "Retrieve": pb.RetrieveRequest,
        "RetrieveMulti": pb.RetrieveMultiRequest,
        "RetrieveBatch": pb.RetrieveBatchRequest,
        "Embed": pb.EmbedRequest,
        "Score": pb.ScoreRequest,
        "DescribeRelease": pb.DescribeReleaseRequest,
    },
    "Admin": {
        "Activate": pb.ActivateRequest,
        "Upsert": pb.UpsertRequest,
        "Delete": pb.DeleteRequest,
    },
}
FILTERS = (
    *(
        "price <",
        "((((",
        "price < 20 and",
        "not not not sale",
        "price in []",
        "price in [1,",
        'title == "',
        "array_contains(tags, 'red')",
    ),
    *(
        "price < 1e999",
        "unknown == 1",
        "price == 'x'",
        "sale == 3",
        "1 == 1",
        "price < -9223372036854775809",
        "titl\x00e == 'a'",
        "price<20",
    ),
)
WORDS = (
    "red cat",
    "blue fish",
    "",
    " ",
    "\t\n",
    "\x00",
    "‮",
    "🐋" * 9,
    "ﷺ" * 40,
    "a" * 3000,
    "ß",
    "日本語",
    "\u0301" * 50,
    "' OR 1=1 --",
)


class Generator:
    """Make requests that are wrong in many ways; the same seed makes the same ones.

    Args:
        seed: Of everything.
        space_id: The server's, so that some requests get past the first check.
        dimension: The server's.
    """

    def __init__(self, seed: int, space_id: str, dimension: int) -> None:
        self.rng = random.Random(seed)
        self.space_id, self.dimension = space_id, dimension

    def request(self) -> tuple[str, bytes]:
        """A method's full name and the bytes to send."""
        rng = self.rng
        service = "Admin" if rng.random() < 0.03 else "Retrieval"
        method = rng.choice(list(SERVICES[service]))
        message = SERVICES[service][method]()
        if rng.random() < 0.85:
            self.fill(message)
        content = message.SerializeToString()
        if rng.random() < 0.5:
            content = self.damage(content)
        if rng.random() < 0.005:
            method = rng.choice(["", "Retrieve2", "../../etc/passwd", "retrieve"])
        return f"/omnisearchsage.v1.{service}/{method}", content

    def fill(self, message: Message, depth: int = 0) -> None:
        """Set a random part of the fields to plausible or absurd values."""
        for item in message.DESCRIPTOR.fields:
            if self.rng.random() < 0.35:
                continue
            if item.is_repeated:
                self._fill_repeated(message, item, depth)
            elif item.type == FieldDescriptor.TYPE_MESSAGE:
                if depth < 5:
                    self.fill(getattr(message, item.name), depth + 1)
            else:
                with contextlib.suppress(ValueError, TypeError):
                    setattr(message, item.name, self.value(item))

    def _fill_repeated(self, message: Message, item: FieldDescriptor, depth: int) -> None:
        count = self.rng.choice((0, 1, 1, 2, 3, 17, 70))
        target = getattr(message, item.name)
        if item.type != FieldDescriptor.TYPE_MESSAGE:
            target.extend([self.value(item) for _ in range(count)])
        elif item.message_type.GetOptions().map_entry:
            for _ in range(min(count, 3)):
                self.fill(target[self.text()], depth + 1)
        elif depth < 4:
            for _ in range(min(count, 5)):
                self.fill(target.add(), depth + 1)

    def value(self, item: FieldDescriptor) -> Any:
        """A value for one scalar field."""
        rng = self.rng
        if item.type == FieldDescriptor.TYPE_STRING:
            return self.string(item.name)
        if item.type == FieldDescriptor.TYPE_BYTES:
            return self.vector()
        if item.type == FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        if item.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
            return rng.choice(
                (
                    0.0,
                    0.5,
                    1.0,
                    -1.0,
                    2.0,
                    1e30,
                    -1e30,
                    float("nan"),
                    float("inf"),
                    float("-inf"),
                    rng.uniform(-2, 2),
                )
            )
        return rng.choice((0, 1, 5, 10, 10, 100, 1000, 1001, -1, 2**31 - 1, -(2**31)))

    def string(self, name: str) -> str:
        """A string for the field ``name``."""
        rng = self.rng
        if rng.random() < 0.15:
            return self.text()
        known = {
            "entity_type": ("pin", "pin", "pin", "product", "ad", "video", "PIN"),
            "space_id": (self.space_id, self.space_id, "0" * 64, "x"),
            "filter": FILTERS,
            "release_id": ("", "", "", "nobody", "../x", "."),
            "language": ("de", "xx-YY-zz", ""),
            "attributes": ("*", "title", "nothing"),
        }
        if name == "filter" and rng.random() < 0.2:
            depth = rng.choice((3, 40, 300, 1500))
            return rng.choice(
                (
                    "(" * depth + "price < 1" + ")" * depth,
                    "not " * depth + "sale",
                    " and ".join(["price < 1"] * depth),
                )
            )
        return rng.choice(known.get(name, WORDS))

    def text(self) -> str:
        """Random characters of all planes, surrogates left out (protobuf cannot hold them)."""
        rng = self.rng
        pick: tuple[Callable[[], str], ...] = (
            lambda: rng.choice(string.printable),
            lambda: chr(rng.randrange(0xD800)),
            lambda: chr(rng.randrange(0xE000, 0x110000)),
        )
        return "".join(rng.choice(pick)() for _ in range(rng.choice((1, 5, 30, 300))))

    def vector(self) -> bytes:
        """Bytes for an embedding: right, of a wrong length or norm, NaN, or noise."""
        rng = self.rng
        count = (
            self.dimension
            if rng.random() < 0.7
            else rng.choice((0, 1, self.dimension - 1, self.dimension * 3, 1000))
        )
        values = [rng.gauss(0, 1) for _ in range(count)]
        if rng.random() < 0.6 and values:
            norm = sum(v * v for v in values) ** 0.5
            values = [v / norm for v in values]
        if rng.random() < 0.2 and values:
            values[rng.randrange(count)] = rng.choice((float("nan"), float("inf"), 1e38))
        packed = struct.pack(f"<{count}f", *values)
        return packed if rng.random() < 0.9 else packed[:-1]

    def damage(self, content: bytes) -> bytes:
        """Flip, cut, insert, repeat, or replace by noise."""
        rng = self.rng
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            kind = rng.randrange(6)
            place = rng.randrange(len(data) + 1)
            if kind == 0 and data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[place:]
            elif kind == 2:
                data[place:place] = rng.randbytes(rng.choice((1, 3, 20)))
            elif kind == 3:
                data += data[: 20_000 - len(data)] if len(data) < 20_000 else b""
            elif kind == 4:
                data = bytearray(rng.randbytes(rng.choice((0, 1, 10, 200))))
            else:
                data[place:place] = b"\x0b" * rng.choice(
                    (1, 40, 400)
                )  # start-group tags: nesting without an end
        return bytes(data)

    def raw(self) -> bytes:
        """Make bytes for the TCP port: random, other protocols, HTTP/2 that breaks off or lies."""
        rng = self.rng
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

        def frame() -> bytes:
            body = rng.randbytes(rng.choice((0, 4, 5, 8, 50)))
            length = len(body) if rng.random() < 0.7 else rng.randrange(2**24)
            return (
                length.to_bytes(3, "big")
                + bytes([rng.randrange(12), rng.randrange(256)])
                + rng.randbytes(4)
                + body
            )

        kinds: tuple[Callable[[], bytes], ...] = (
            lambda: rng.randbytes(rng.choice((1, 100, 5000))),
            lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            lambda: b"\x16\x03\x01" + rng.randbytes(200),
            lambda: preface[: rng.randrange(len(preface))],
            lambda: preface + b"".join(frame() for _ in range(rng.randrange(1, 20))),
            lambda: self.damage(preface + self.calls()),
            lambda: preface + self.calls() + b"".join(frame() for _ in range(rng.randrange(4))),
        )
        return rng.choice(kinds)()

    def calls(self) -> bytes:
        """Make whole calls on a fresh connection, header and data frames sometimes shuffled."""
        rng, encoder = self.rng, hpack.Encoder()
        sent: list[bytes] = []
        for number in range(rng.randrange(1, 6)):
            path, content = self.request()
            fields = [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
            ]
            if rng.random() < 0.3:
                fields.append(("grpc-timeout", rng.choice(("1n", "0S", "99999999H", "x", "10m"))))
            body = bytes((rng.random() < 0.1,)) + len(content).to_bytes(4, "big") + content
            sent.append(
                frames.frame(
                    frames.HEADERS, frames.END_HEADERS, 2 * number + 1, encoder.encode(fields)
                )
            )
            sent += [
                frames.frame(
                    frames.DATA,
                    frames.END_STREAM if at + 16_384 >= len(body) else 0,
                    2 * number + 1,
                    body[at : at + 16_384],
                )
                for at in range(0, len(body), 16_384)
            ]
        if rng.random() < 0.3:
            rng.shuffle(sent)
        return b"".join(sent)


@dataclass(slots=True)
class Tally:
    """What came back."""

    codes: Counter[str] = field(default_factory=Counter)
    by_method: dict[str, Counter[str]] = field(default_factory=dict)
    raw_connections: int = 0
    canaries: int = 0
    faults: list[dict[str, str]] = field(default_factory=list)
    slowest_seconds: float = 0.0

    def count(self, method: str, code: str, content: bytes, details: str, seconds: float) -> None:
        """Note one answer; anything not in ``TYPED`` is a fault and keeps its bytes."""
        self.codes[code] += 1
        self.by_method.setdefault(method.rsplit("/", 1)[-1], Counter())[code] += 1
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        if code not in TYPED and len(self.faults) < 20:
            self.faults.append(
                {
                    "method": method,
                    "code": code,
                    "details": details[:500],
                    "hex": content[:4000].hex(),
                }
            )


async def fuzz(
    process: Process, generator: Generator, count: int, *, raw_share: float, concurrency: int
) -> Tally:
    """Send ``count`` requests, ``raw_share`` of them as bytes on bare connections.

    A valid call every 500 must get the same answer as at the start.
    """
    tally = Tally()
    left = count
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(process.address, options=options) as channel:
        canary = pb.RetrieveRequest(query="red cat", entity_type="pin", k=5).SerializeToString()
        ask = channel.unary_unary(
            "/omnisearchsage.v1.Retrieval/Retrieve",
            response_deserializer=pb.RetrieveResponse.FromString,
        )
        expected = [hit.id for hit in (await ask(canary, timeout=DEADLINE_SECONDS)).hits]
        host, port = process.address.rsplit(":", 1)

        async def lane() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                number = left
                if generator.rng.random() < raw_share:
                    await _raw(host, int(port), generator.raw())
                    tally.raw_connections += 1
                    continue
                method, content = generator.request()
                started = time.perf_counter()
                try:
                    await channel.unary_unary(method)(content, timeout=DEADLINE_SECONDS)
                    code, details = "OK", ""
                except grpc.aio.AioRpcError as error:
                    code, details = error.code().name, error.details() or ""
                tally.count(method, code, content, details, time.perf_counter() - started)
                if number % 500 == 0:
                    answer = [hit.id for hit in (await ask(canary, timeout=DEADLINE_SECONDS)).hits]
                    tally.canaries += 1
                    if answer != expected:
                        tally.faults.append(
                            {
                                "method": "canary",
                                "code": "WRONG",
                                "details": f"{answer} instead of {expected}",
                                "hex": "",
                            }
                        )

        await asyncio.gather(*(lane() for _ in range(concurrency)))
    return tally


async def _raw(host: str, port: int, content: bytes) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(host, port), DEADLINE_SECONDS
        )
        writer.write(content)
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(writer.drain(), 1)
            await asyncio.wait_for(reader.read(1000), 0.05)
        writer.close()


def run(
    count: int, seed: int, raw_share: float, concurrency: int, folder: Path
) -> tuple[Tally, dict[str, float]]:
    """Build a small release in ``folder``, serve it and fuzz it; returns tally and memory."""
    from benchmarks.small_releases import small_release, write_small_bundle
    from index_builder.releases.store import ReleaseStore

    encoder = write_small_bundle(folder / "bundle", seed=1)
    store = ReleaseStore(folder / "store")
    small_release(store, folder / "bundle", encoder)
    with store.open_current() as release:
        generator = Generator(seed, release.space_id, release.dimension)
    with omni_server(store.root, ["--encoder-form", "torch"]) as process:
        warm = asyncio.run(
            fuzz(
                process,
                Generator(seed + 1, generator.space_id, generator.dimension),
                min(count, 1000),
                raw_share=0.0,
                concurrency=8,
            )
        )
        before = process.memory_mib()
        tally = asyncio.run(
            fuzz(process, generator, count, raw_share=raw_share, concurrency=concurrency)
        )
        tally.faults = warm.faults + tally.faults
        return tally, {"before": round(before, 1), "after": round(process.memory_mib(), 1)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--count", default=100_000, show_default=True, help="Requests to send.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Same seed, same requests (their order varies with timing).",
)
@click.option(
    "--raw-share",
    default=0.1,
    show_default=True,
    help="Share sent as raw bytes on bare connections.",
)
@click.option("--concurrency", default=32, show_default=True, help="Requests in flight.")
@json_option
@handle_errors
def command(count: int, seed: int, raw_share: float, concurrency: int, as_json: bool) -> None:
    """Send malformed requests to a real server: no crash, no hang, typed errors only.

    Fields filled with absurd values, valid messages with flipped, cut and inserted bytes, and raw
    bytes on the port; a valid query in between must keep its answer. Exit code 1 if anything else
    than a typed error came back; the offending bytes are in the record.

    Example: omni bench fuzz --count 5000
    """
    with tempfile.TemporaryDirectory() as folder, stage(f"fuzz with {count:,} requests"):
        started = time.perf_counter()
        tally, memory = run(count, seed, raw_share, concurrency, Path(folder))
        seconds = time.perf_counter() - started
    metrics = {
        "codes": dict(tally.codes.most_common()),
        "by_method": {name: dict(counter) for name, counter in tally.by_method.items()},
        "raw_connections": tally.raw_connections,
        "canaries": tally.canaries,
        "slowest_seconds": round(tally.slowest_seconds, 3),
        "server_memory_mib": memory,
        "faults": tally.faults,
        "seconds": round(seconds, 1),
    }
    path = write_record(
        "fuzz",
        Measurement(
            dataset={"name": "small release of a random tower", "real": False},
            config={
                "count": count,
                "seed": seed,
                "raw_share": raw_share,
                "concurrency": concurrency,
            },
            protocol={"deadline_seconds": DEADLINE_SECONDS, "typed": sorted(TYPED)},
            metrics=metrics,
            libraries=("grpcio", "protobuf"),
        ),
    )
    if as_json:
        print_json(metrics)
    else:
        print_table(
            f"Answers to {count:,} malformed requests",
            ["status", "count"],
            list(tally.codes.most_common()),
        )
        say(
            f"{tally.raw_connections:,} raw connections, {tally.canaries} canaries, slowest"
            f" {tally.slowest_seconds:.2f} s, memory {memory}"
        )
        say(f"record: {path.name}")
    if tally.faults:
        first = tally.faults[0]
        fail(
            f"{len(tally.faults)} faults, the first: {first['method']} {first['code']}"
            f" {first['details'][:200]}"
        )
