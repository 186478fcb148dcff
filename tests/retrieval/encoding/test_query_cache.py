"""The query cache, one encode per distinct miss, and the Redis tier behind it."""

import asyncio
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.encoding.cached_encoder import CachedEncoder, Encoded, Priority
from retrieval.encoding.query_cache import QueryCache, entry_bytes, namespace
from retrieval.encoding.redis_tier import RedisSettings, RedisTier
from retrieval.errors import Overloaded
from tests.helpers.waiting import PATIENCE_SECONDS, until_async

DIMENSION = 8


def unit(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowEncoder:
    """Encodes once its gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.calls: list[str] = []
        self.cancelled: list[str] = []
        self.promoted: list[str] = []
        self.error: Exception | None = None

    def promote(self, text: str) -> None:
        self.promoted.append(text)

    async def submit(self, text: str, priority: Priority) -> Encoded:
        self.calls.append(text)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(text)
            raise
        if self.error is not None:
            raise self.error
        return Encoded(unit(len(text)), 1, 2)


def test_cache_long_keys_count_against_byte_bound() -> None:
    cache = QueryCache(100_000, 100.0, Clock())
    for i in range(200):
        cache.put(f"{i} " + "x" * 9_000, unit(i))
        assert cache.size_bytes <= 100_000
    assert len(cache) == 100_000 // entry_bytes("199 " + "x" * 9_000, unit(0).nbytes) == 10


def test_cache_entries_expire_by_age_within_byte_bound() -> None:
    clock = Clock()
    cache = QueryCache(20_000, 100.0, clock)
    for i in range(200):
        cache.put(f"k{i}", unit(i))
        assert cache.size_bytes <= 20_000
    assert 10 < len(cache) < 200
    assert cache.get("k199") is not None
    assert cache.get("k0") is None
    clock.now = 100.5
    assert cache.get("k199") is None
    assert cache.hits == 1 and cache.misses == 2


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["get", "put", "wait"]), st.integers(0, 12)), max_size=60)
)
def test_cache_any_sequence_returns_only_fresh_vector_of_the_key(
    steps: list[tuple[str, int]],
) -> None:
    clock = Clock()
    cache = QueryCache(5_000, 10.0, clock)
    written: dict[str, float] = {}
    for what, number in steps:
        key = f"k{number}"
        if what == "put":
            cache.put(key, unit(number))
            written[key] = clock.now
        elif what == "wait":
            clock.now += number
        else:
            found = cache.get(key)
            if found is not None:
                np.testing.assert_array_equal(found, unit(number))
                assert clock.now - written[key] < 10.0


def test_cache_vector_is_a_read_only_copy() -> None:
    cache = QueryCache(10_000, 10.0)
    vector = unit(1)
    cache.put("a", vector)
    vector[:] = 0
    found = cache.get("a")
    assert found is not None and abs(float(np.linalg.norm(found)) - 1) < 1e-6
    with pytest.raises(ValueError):
        found[0] = 5


def test_cache_frequent_lists_most_used_texts_of_one_encoder() -> None:
    cache = QueryCache(100_000, 100.0)
    old, new = namespace("a" * 64, "torch-fp32"), namespace("a" * 64, "onnx-int8")
    for i in range(5):
        cache.put(old + f"q{i}", unit(i))
        for _ in range(i):
            cache.get(old + f"q{i}")
    cache.put(new + "other", unit(9))
    assert cache.frequent(old, 2) == ["q4", "q3"]
    assert cache.frequent(new, 5) == ["other"]


async def test_cached_encoder_concurrent_misses_are_encoded_once() -> None:
    encoder = SlowEncoder()
    cached = CachedEncoder(QueryCache(10_000, 10.0), encoder, "s/", DIMENSION)
    waiting = [asyncio.ensure_future(cached.lookup("blue")) for _ in range(20)]
    await asyncio.sleep(0)
    encoder.gate.set()
    answers = await asyncio.gather(*waiting)
    assert encoder.calls == ["blue"] and cached.shared == 19
    assert all(not a.cached for a in answers)
    assert (await cached.lookup("blue")).cached


async def test_cached_encoder_all_callers_cancelled_drops_the_encode() -> None:
    encoder = SlowEncoder()
    cached = CachedEncoder(QueryCache(10_000, 10.0), encoder, "s/", DIMENSION)
    first, second = (asyncio.ensure_future(cached.lookup("blue")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0.01)
    assert not encoder.cancelled
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert encoder.cancelled == ["blue"]
    encoder.gate.set()
    assert not (await cached.lookup("blue")).cached, "a later caller starts afresh"


async def test_cached_encoder_failure_reaches_all_callers_and_is_not_cached() -> None:
    encoder = SlowEncoder()
    encoder.error = Overloaded("encoder", 1, 10)
    encoder.gate.set()
    cached = CachedEncoder(QueryCache(10_000, 10.0), encoder, "s/", DIMENSION)
    answers = await asyncio.gather(
        *(cached.lookup("blue") for _ in range(3)), return_exceptions=True
    )
    assert all(isinstance(a, Overloaded) for a in answers)
    encoder.error = None
    assert not (await cached.lookup("blue")).cached


async def test_cached_encoder_lookup_many_keeps_order_and_encodes_repeats_once() -> None:
    encoder = SlowEncoder()
    encoder.gate.set()
    cached = CachedEncoder(QueryCache(10_000, 10.0), encoder, "s/", DIMENSION)
    vectors, flags, _, _ = await cached.lookup_many(["a", "bbb", "a", "cc"])
    np.testing.assert_array_equal(vectors, np.stack([unit(1), unit(3), unit(1), unit(2)]))
    assert flags == [False] * 4 and sorted(encoder.calls) == ["a", "bbb", "cc"]


async def test_cached_encoder_interactive_caller_promotes_the_bulk_encode_that_it_joins() -> None:
    encoder = SlowEncoder()
    cached = CachedEncoder(QueryCache(10_000, 10.0), encoder, "s/", DIMENSION)
    waiting = [asyncio.ensure_future(cached.lookup_many(["blue", "red"]))]
    await until_async(lambda: len(encoder.calls) == 2)
    waiting += [asyncio.ensure_future(cached.lookup_many(["red"]))]
    await asyncio.sleep(0.01)
    assert not encoder.promoted
    waiting += [asyncio.ensure_future(cached.lookup("blue")) for _ in range(2)]
    await asyncio.sleep(0.01)
    encoder.gate.set()
    await asyncio.gather(*waiting)
    assert encoder.promoted == ["blue"] and encoder.calls == ["blue", "red"]


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


def tier_at(url: str, **settings: Any) -> RedisTier:
    return RedisTier(RedisSettings(url=url, ttl_seconds=100.0, **settings), DIMENSION)


async def fake_redis(answer: bytes | None) -> tuple[asyncio.Server, str]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            if answer is None:
                continue
            writer.write(answer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    return server, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


@pytest.mark.parametrize(
    "answer",
    [None, b"garbage\r\n", b"$-5\r\n", bulk(b""), bulk(b"x" * 32), b"*3\r\n:1\r\n"],
    ids=repr,
)
async def test_redis_tier_late_or_malformed_answer_is_a_miss(answer: bytes | None) -> None:
    server, url = await fake_redis(answer)
    tier = tier_at(url, timeout_seconds=0.05)
    encoder = SlowEncoder()
    encoder.gate.set()
    cached = CachedEncoder(QueryCache(10_000, 10.0), encoder, "s/", DIMENSION, tier)
    looked = await asyncio.wait_for(cached.lookup("blue"), PATIENCE_SECONDS)
    np.testing.assert_array_equal(looked.vector, unit(4))
    assert not looked.cached and tier.hits == 0
    await tier.close()
    server.close()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")
async def test_redis_tier_more_keys_than_connections_all_answer(tmp_path: Path) -> None:
    socket_path = tmp_path / "redis.sock"
    command = [
        "redis-server",
        "--port",
        "0",
        "--unixsocket",
        str(socket_path),
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        await until_async(socket_path.exists)
        tier = tier_at(f"unix://{socket_path}", timeout_seconds=PATIENCE_SECONDS)
        assert await asyncio.gather(*(tier.get(f"k{i}") for i in range(300))) == [None] * 300
        assert (tier.misses, tier.failures) == (300, 0) and not tier.suspended
        await tier.close()
    finally:
        process.kill()
        process.wait()


async def test_redis_tier_repeated_failures_suspend_it() -> None:
    clock = Clock()
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{held.getsockname()[1]}/0"
        settings = RedisSettings(url=url, ttl_seconds=100.0, timeout_seconds=0.2, max_failures=3)
        tier = RedisTier(settings, DIMENSION, clock)
        for _ in range(10):
            assert await tier.get("k") is None
    assert tier.failures == 3 and tier.suspended
    clock.now = 5.1
    assert not tier.suspended
    await tier.close()


def test_redis_tier_value_is_valid_only_under_its_key_and_secret() -> None:
    tier = tier_at("redis://127.0.0.1:1/0", secret="s")
    other = tier_at("redis://127.0.0.1:1/0", secret="t")
    value = tier.pack("space/a", unit(1))
    assert len(value) == 16 + 2 * DIMENSION
    found = tier.unpack("space/a", value)
    assert found is not None and float(found @ unit(1)) > 0.9999
    assert tier.unpack("space/b", value) is None
    assert other.unpack("space/a", value) is None
    for position in range(len(value)):
        broken = bytearray(value)
        broken[position] ^= 1
        assert tier.unpack("space/a", bytes(broken)) is None
    assert tier.unpack("k", tier.pack("k", np.full(DIMENSION, np.nan, dtype=np.float32))) is None
    assert tier.unpack("k", tier.pack("k", unit(1) * 3)) is None
