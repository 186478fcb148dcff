"""Batches by token budget, delay and length; and lists of texts longer than the queue."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.encoding import batcher as batcher_module
from retrieval.encoding.batcher import LENGTH_BUCKETS, Batcher, bucket_of, estimated_tokens
from retrieval.encoding.cached_encoder import CachedEncoder, Priority
from retrieval.encoding.query_cache import QueryCache
from retrieval.errors import EncoderFailed, Overloaded
from tests.helpers.waiting import PATIENCE_SECONDS, until_async

DIMENSION = 4


class Tower:
    """Encodes in a thread, one batch at a time, as long as the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = 0
        self.batches: list[list[str]] = []
        self.bad: set[str] = set()
        self.nan: set[str] = set()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.entered += 1
        self.gate.wait(PATIENCE_SECONDS)
        self.batches.append(list(texts))
        if self.bad & set(texts):
            raise RuntimeError("cannot encode this")
        out = np.zeros((len(texts), DIMENSION), dtype=np.float32)
        for row, text in enumerate(texts):
            out[row, len(text) % DIMENSION] = np.nan if text in self.nan else 1.0
        return out


@pytest.fixture
def tower() -> Tower:
    return Tower()


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as pool:
        yield pool


async def test_batcher_waiting_texts_are_batched_by_length(tower: Tower, executor) -> None:
    batcher = Batcher(tower, executor, DIMENSION)
    tower.gate.clear()
    first = asyncio.ensure_future(batcher.submit("first"))
    await until_async(lambda: tower.entered == 1)
    long = "long " * 30
    others = [asyncio.ensure_future(batcher.submit(text)) for text in ("a", "b", long, "c")]
    await until_async(lambda: batcher.waiting == 4)
    tower.gate.set()
    answers = await asyncio.gather(first, *others)
    assert tower.batches == [["first"], ["a", "b", "c"], [long]]
    for text, answer in zip(["first", "a", "b", long, "c"], answers, strict=True):
        assert answer.vector[len(text) % DIMENSION] == 1.0
        assert answer.queue_ns >= 0 and answer.encode_ns > 0


async def test_batcher_batch_closes_at_token_budget(tower: Tower, executor) -> None:
    batcher = Batcher(tower, executor, DIMENSION, max_tokens=32)
    tower.gate.clear()
    tasks = [asyncio.ensure_future(batcher.submit("x")) for _ in range(11)]
    await until_async(lambda: batcher.waiting >= 7)
    tower.gate.set()
    await asyncio.gather(*tasks)
    assert max(map(len, tower.batches)) == 32 // LENGTH_BUCKETS[0]
    assert sum(map(len, tower.batches)) == 11


async def test_batcher_max_delay_idle_encoder_waits_for_more_texts(tower: Tower, executor) -> None:
    batcher = Batcher(tower, executor, DIMENSION, max_delay_seconds=0.5)
    tasks = [asyncio.ensure_future(batcher.submit("x"))]
    await asyncio.sleep(0.01)
    tasks.append(asyncio.ensure_future(batcher.submit("y")))
    await asyncio.gather(*tasks)
    assert tower.batches == [["x", "y"]]


async def test_batcher_cancelled_texts_are_not_encoded(tower: Tower, executor) -> None:
    batcher = Batcher(tower, executor, DIMENSION)
    tower.gate.clear()
    first = asyncio.ensure_future(batcher.submit("first"))
    await until_async(lambda: tower.entered == 1)
    gone, stays = (
        asyncio.ensure_future(batcher.submit("gone")),
        asyncio.ensure_future(batcher.submit("stays")),
    )
    await asyncio.sleep(0)
    gone.cancel()
    tower.gate.set()
    await asyncio.gather(first, stays)
    assert ["stays"] in tower.batches and not any("gone" in batch for batch in tower.batches)
    assert batcher.dropped == 1


async def test_batcher_full_queue_refuses_with_hint_and_frees_cancelled_places(
    tower: Tower, executor
) -> None:
    batcher = Batcher(tower, executor, DIMENSION, max_queue=2)
    tower.gate.clear()
    running = asyncio.ensure_future(batcher.submit("running"))
    await until_async(lambda: tower.entered == 1)
    waiting = [asyncio.ensure_future(batcher.submit(text)) for text in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="all 2 places") as refused:
        await batcher.submit("c")
    assert refused.value.retry_after_ms >= 5
    waiting[0].cancel()
    await asyncio.sleep(0)
    late = asyncio.ensure_future(batcher.submit("d"))
    await asyncio.sleep(0)
    tower.gate.set()
    await asyncio.gather(running, waiting[1], late)


async def test_batcher_bad_text_fails_alone(tower: Tower, executor) -> None:
    batcher = Batcher(tower, executor, DIMENSION)
    tower.bad = {"bad"}
    tower.nan = {"nan"}
    tower.gate.clear()
    tasks = [asyncio.ensure_future(batcher.submit(text)) for text in ("a", "bad", "nan", "b")]
    await asyncio.sleep(0.01)
    tower.gate.set()
    a, bad, nan, b = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(bad, EncoderFailed) and isinstance(nan, EncoderFailed)
    assert not isinstance(a, BaseException) and not isinstance(b, BaseException)
    assert not isinstance(await batcher.submit("again"), BaseException), "the runner lives on"


@pytest.fixture
async def busy(tower: Tower, executor) -> AsyncIterator[Batcher]:
    """A batcher whose encoder is inside a first batch, as long as the tower's gate is closed."""
    batcher = Batcher(tower, executor, DIMENSION, max_queue=8)
    tower.gate.clear()
    first = asyncio.ensure_future(batcher.submit("first"))
    await until_async(lambda: tower.entered == 1)
    yield batcher
    tower.gate.set()
    await first


def submit(batcher: Batcher, texts: Sequence[str], priority: Priority) -> list[asyncio.Future]:
    return [asyncio.ensure_future(batcher.submit(text, priority)) for text in texts]


async def test_batcher_interactive_text_goes_before_bulk_texts_that_wait(
    tower: Tower, busy: Batcher
) -> None:
    tasks = submit(busy, [f"bulk text number {i}" for i in range(6)], Priority.BULK)
    await until_async(lambda: busy.waiting == 6)
    tasks += submit(busy, ["asked"], Priority.INTERACTIVE)
    await until_async(lambda: busy.waiting == 7)
    tower.gate.set()
    await asyncio.gather(*tasks)
    assert tower.batches[1] == ["asked"], "of another length than the bulk texts"


async def test_batcher_bulk_texts_fill_what_interactive_ones_leave(tower: Tower, executor) -> None:
    batcher = Batcher(tower, executor, DIMENSION)
    tasks = submit(batcher, ["b1", "b2"], Priority.BULK)
    tasks += submit(batcher, ["asked"], Priority.INTERACTIVE)
    await asyncio.gather(*tasks)
    assert tower.batches == [["asked", "b1", "b2"]]


async def test_batcher_full_bulk_queue_leaves_interactive_places_free(
    tower: Tower, busy: Batcher
) -> None:
    tasks = submit(busy, [f"b{i}" for i in range(8)], Priority.BULK)
    await until_async(lambda: busy.waiting == 8)
    with pytest.raises(Overloaded, match="all 8 places"):
        await busy.submit("one more", Priority.BULK)
    assert busy.full() is None and busy.late(60.0) is None
    tasks += submit(busy, ["asked"], Priority.INTERACTIVE)
    tower.gate.set()
    await asyncio.gather(*tasks)


async def test_batcher_slow_tower_takes_few_bulk_texts_at_a_time(tower: Tower, executor) -> None:
    def slow(texts: Sequence[str]) -> np.ndarray:
        time.sleep(0.004 * len(texts))
        return tower(texts)

    batcher = Batcher(slow, executor, DIMENSION)
    await asyncio.gather(*submit(batcher, ["x"] * 30, Priority.BULK))
    assert len(tower.batches[0]) > 1, "nobody else has asked"
    tower.batches.clear()
    await asyncio.gather(*submit(batcher, ["x"] * 30, Priority.BULK))
    assert max(map(len, tower.batches)) <= 5, "six take longer than QUIET_BULK_SECONDS"
    tower.batches.clear()
    await asyncio.gather(*submit(batcher, ["x"] * 10, Priority.INTERACTIVE))
    assert max(map(len, tower.batches)) == 10, "those who wait share one pass"
    tower.batches.clear()
    await asyncio.gather(*submit(batcher, ["x"] * 5, Priority.BULK))
    assert max(map(len, tower.batches)) == 1, "two take longer than BULK_SECONDS"


async def test_batcher_bulk_text_has_its_turn_beside_endless_interactive_ones(
    tower: Tower, busy: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "BULK_TURN_SECONDS", 0.05)
    bulk = submit(busy, ["b" * 20, "b" * 60, "b" * 150], Priority.BULK)
    ends = asyncio.get_running_loop().time() + PATIENCE_SECONDS

    async def ask() -> None:
        while not all(task.done() for task in bulk):
            assert asyncio.get_running_loop().time() < ends, "a bulk text starves"
            await busy.submit("asked")

    tower.gate.set()
    await asyncio.gather(*(ask() for _ in range(4)))
    assert all(task.exception() is None for task in bulk)


async def test_batcher_promoted_text_goes_with_the_interactive_ones(
    tower: Tower, busy: Batcher
) -> None:
    tasks = submit(busy, ["short", "a bulk text of another length"], Priority.BULK)
    await until_async(lambda: busy.waiting == 2)
    busy.promote("a bulk text of another length")
    busy.promote("not here")
    tower.gate.set()
    await asyncio.gather(*tasks)
    assert tower.batches[1:] == [["a bulk text of another length"], ["short"]]


CALLS = st.lists(
    st.tuples(st.sampled_from(Priority), st.integers(1, 200), st.booleans(), st.booleans()),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=50)
@given(CALLS)
def test_batcher_every_text_is_encoded_once_or_its_caller_has_gone(
    calls: list[tuple[Priority, int, bool, bool]],
) -> None:
    async def run() -> None:
        tower = Tower()
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(tower, executor, DIMENSION, max_tokens=256)
            tasks = []
            for number, (priority, length, leaves, pauses) in enumerate(calls):
                text = f"{number} ".ljust(length, "x")
                task = asyncio.ensure_future(batcher.submit(text, priority))
                tasks.append((task, text, leaves))
                if pauses:
                    await asyncio.sleep(0)
                    for other, _, gone in tasks:
                        if gone:
                            other.cancel()
            await asyncio.wait_for(
                asyncio.gather(*(task for task, _, _ in tasks), return_exceptions=True),
                PATIENCE_SECONDS,
            )
            await until_async(lambda: not batcher.waiting)
        encoded = [text for batch in tower.batches for text in batch]
        assert len(encoded) == len(set(encoded)), "once"
        for task, text, leaves in tasks:
            assert leaves or text in encoded
            if not task.cancelled():
                assert task.result().vector[len(text) % DIMENSION] == 1.0
        for batch in tower.batches:
            assert len({bucket_of(estimated_tokens(text)) for text in batch}) == 1
            assert sum(bucket_of(estimated_tokens(text)) for text in batch) <= 256

    asyncio.run(run())


def cached_encoder(tower: Tower, executor, **settings: int) -> tuple[CachedEncoder, Batcher]:
    batcher = Batcher(tower, executor, DIMENSION, max_queue=8, **settings)
    return CachedEncoder(QueryCache(1_000_000, 1e6), batcher, "s/", DIMENSION, max_queue=8), batcher


async def test_lookup_many_longer_than_queue_leaves_room_for_other_callers(
    tower: Tower, executor
) -> None:
    encoder, batcher = cached_encoder(tower, executor)
    lists = [[f"{name} {i}" for i in range(20)] + ["a 0", "shared"] for name in "abc"]
    tower.gate.clear()
    many = [asyncio.ensure_future(encoder.lookup_many(texts)) for texts in lists]
    await until_async(lambda: tower.entered == 1)
    assert batcher.full() is None
    single = asyncio.ensure_future(encoder.lookup("from another caller"))
    await asyncio.sleep(0.01)
    tower.gate.set()
    for texts, (vectors, cached, _, encode_ns) in zip(
        lists, await asyncio.gather(*many), strict=True
    ):
        assert [int(row.argmax()) for row in vectors] == [len(text) % DIMENSION for text in texts]
        assert not any(cached[1:20]) and encode_ns > 0
    assert not (await single).cached
    encoded = [text for batch in tower.batches for text in batch]
    assert len(encoded) == len(set(encoded)) == 62, "each distinct text once"
    assert all((await encoder.lookup_many(lists[0]))[1])


async def test_lookup_many_refused_by_full_queue_keeps_encoded_part_cached(
    tower: Tower, executor
) -> None:
    encoder, batcher = cached_encoder(tower, executor, max_tokens=8)  # one text at a time
    texts = [f"text {i}" for i in range(20)]
    others: list[asyncio.Future] = []
    tower.gate.clear()
    many = asyncio.ensure_future(encoder.lookup_many(texts))
    await until_async(lambda: tower.entered == 1 and batcher.waiting == 3)
    tower.gate.set()
    while not many.done():  # as soon as there is a place, somebody else takes it
        others += [
            asyncio.ensure_future(batcher.submit("other", Priority.BULK))
            for _ in range(8 - batcher.waiting)
        ]
        await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="all 8 places"):
        await many
    await asyncio.gather(*others, return_exceptions=True)
    assert [text for text in texts if encoder.find(text) is not None] == texts[:4]
    _, cached, _, _ = await encoder.lookup_many(texts)
    assert cached == [True] * 4 + [False] * 16


async def test_lookup_many_cancelled_leaves_other_callers_encodes(tower: Tower, executor) -> None:
    encoder, batcher = cached_encoder(tower, executor)
    tower.gate.clear()
    running = asyncio.ensure_future(encoder.lookup("running"))
    await until_async(lambda: tower.entered == 1)
    stays = asyncio.ensure_future(encoder.lookup("text 1"))
    leaves = asyncio.ensure_future(encoder.lookup_many([f"text {i}" for i in range(20)]))
    await until_async(lambda: batcher.waiting == 4)
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    tower.gate.set()
    await asyncio.gather(running, stays)
    assert tower.batches == [["running"], ["text 1"]]
    assert len((await encoder.lookup_many([f"text {i}" for i in range(20)]))[1]) == 20, (
        "its places are free again"
    )


def test_estimated_tokens_stay_within_tower_limit() -> None:
    assert estimated_tokens("") == 3 and estimated_tokens("x" * 10_000) == 64
    assert [bucket_of(n) for n in (1, 8, 9, 33, 64, 500)] == [8, 8, 16, 64, 64, 64]
