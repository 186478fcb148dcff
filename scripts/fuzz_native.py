"""Fuzz the compiled modules: random corpora against exact answers, and arguments of wrong kinds.

    OMNI_SIMD=avx2 python scripts/fuzz_native.py --seconds 60 --seed 1

Searches go through ``EntityIndex`` and ``LexicalIndex``, whose calls of the compiled code are
recorded; each kind of call is then repeated with arguments replaced at random. A wrong answer is
printed and ends the run with status 1. Memory errors end it where the extension was built for that
(``scripts/sanitize.sh``).
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

import index_builder.lexical.scan
import index_builder.search.live_blocks
import index_builder.search.live_segments
import index_builder.search.live_state
from index_builder import native
from index_builder.ann import AnnConfig, reuse
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.lexical.scan import ScanRequest
from index_builder.live_log.records import LiveEntry
from index_builder.search.entity_index import EntityIndex, IndexConfig, SearchResult
from index_builder.search.live_state import LiveBase, LiveState
from index_builder.storage import engine_arrays

DIMENSIONS = [1, 3, 8, 15, 16, 31, 33, 63, 64, 65, 100, 127, 128, 129, 192, 256, 300, 768]
COUNTS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 257, 600]
SPACE = "5a" * 32
TOLERANCE = 3e-5

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Passes calls on to compiled functions and keeps the last one of each name."""

    def __init__(self, target: Any, calls: dict[str, tuple[Any, Call]], prefix: str = "") -> None:
        self._target = target
        self._calls = calls
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found
        shown = f"{self._prefix}{name}"

        def call(*arguments: Any, **named: Any) -> Any:
            self._calls[shown] = (found, (shown, arguments, named))
            return found(*arguments, **named)

        return call


def recorded_class(kind: Any, calls: dict[str, tuple[Any, Call]]) -> Callable[..., Recorder]:
    """Return what makes objects of a compiled class and records that and their methods' calls."""
    name = kind.__name__

    def make(*arguments: Any, **named: Any) -> Recorder:
        calls[name] = (kind, (name, arguments, named))
        return Recorder(kind(*arguments, **named), calls, f"{name}.")

    return make


def record_calls(calls: dict[str, tuple[Any, Call]]) -> None:
    """Put recorders before all compiled code that the searches call."""
    search = index_builder.search
    scans = Recorder(native.live_scan, calls)
    graphs = Recorder(native, calls)
    postings = recorded_class(native.Postings, calls)
    for module, name, real, recorder in (
        (engine_arrays, "Engine", native.Engine, recorded_class(native.Engine, calls)),
        (engine_arrays, "link_records", native.link_records, graphs.link_records),
        (
            engine_arrays,
            "carry_link_records",
            native.carry_link_records,
            graphs.carry_link_records,
        ),
        (reuse, "carry_graph", native.carry_graph, graphs.carry_graph),
        (index_builder.lexical.scan, "CompiledPostings", native.Postings, postings),
        (search.live_blocks, "live_scan", native.live_scan, scans),
        (search.live_segments, "live_scan", native.live_scan, scans),
        (search.live_state, "live_scan", native.live_scan, scans),
    ):
        assert getattr(module, name) is real, f"{module.__name__}.{name} is compiled code"
        setattr(module, name, recorder)


class Corpus(NamedTuple):
    """A random index and what it holds."""

    index: EntityIndex
    vectors: np.ndarray
    prices: np.ndarray


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Divide each row by its norm."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray((vectors / np.where(norms == 0, 1, norms)).astype(np.float32))


def random_corpus(rng: np.random.Generator) -> Corpus:
    """Build an index of a random kind over scattered, clustered, repeated or equal vectors."""
    dimension, count = int(rng.choice(DIMENSIONS)), int(rng.choice(COUNTS))
    vectors = unit_rows(rng.standard_normal((count, dimension)))
    shape = rng.integers(4)
    if shape == 1:
        vectors = np.ascontiguousarray(vectors[rng.integers(0, max(1, count // 3), count)])
    elif shape == 2:
        vectors = unit_rows(vectors * 0.01 + vectors[:1])
    elif shape == 3:
        vectors = np.ascontiguousarray(np.repeat(vectors[:1], count, 0))
    prices = rng.integers(0, 100, count)
    config = IndexConfig(
        kind=str(rng.choice(["hnsw", "int8-graph", "int8-graph"])),
        ann=AnnConfig(m=8, ef_construction=20, sketched_links=bool(rng.integers(2))),
    )
    ids = [f"é{row}" for row in range(count)]
    table = pl.DataFrame({"price": prices})
    index = EntityIndex.build("pin", ids, vectors, table, config)
    if config.kind == "int8-graph" and rng.integers(2):
        vectors = vectors.copy()
        changed = rng.choice(count, count // 8, replace=False)
        vectors[changed] = unit_rows(rng.standard_normal((len(changed), dimension)))
        with tempfile.TemporaryDirectory() as folder:
            index.save(Path(folder))
            again = replace(config, reuse=Path(folder))
            index = EntityIndex.build("pin", ids, vectors, table, again)
    return Corpus(index, vectors, prices)


def random_live(rng: np.random.Generator, corpus: Corpus) -> Corpus:
    """Delete, replace and add some entries; rows of the result that are gone are zeros."""
    index, vectors, prices = corpus
    count, dimension = vectors.shape
    state = LiveState(
        LiveBase(dimension, SPACE, index.row_of, rows=count),
        exact_limit=int(rng.choice([16, 64, 4096])),
        background=False,
    )
    vectors, prices = vectors.copy(), list(prices)
    rows = list(vectors)
    sequence = 0
    for _ in range(int(rng.integers(1, 4))):
        entries = []
        for _ in range(int(rng.integers(1, 120))):
            sequence += 1
            row = int(rng.integers(0, len(rows) + 1))
            if row < len(rows) and rng.random() < 0.3:
                rows[row] = np.zeros(dimension, np.float32)
                entries.append(LiveEntry(id=f"é{row}", sequence=sequence))
                continue
            vector = unit_rows(rng.standard_normal((1, dimension)))[0]
            price = int(rng.integers(0, 100))
            if row == len(rows):
                rows.append(vector)
                prices.append(price)
            else:
                rows[row], prices[row] = vector, price
            entry = LiveEntry(id=f"é{row}", vector=vector, space_id=SPACE, sequence=sequence)
            entries.append(replace(entry, attributes={"price": price}))
        index.set_live(state.apply(entries))
    return Corpus(index, np.stack(rows), np.array(prices))


def wrong_answers(rng: np.random.Generator, corpus: Corpus) -> Iterator[str]:
    """Search in random ways and yield what is wrong."""
    index, vectors, prices = corpus
    count, dimension = vectors.shape
    present = vectors.any(axis=1)
    for _ in range(8):
        query = unit_rows(rng.standard_normal((1, dimension)))[0]
        if rng.random() < 0.3 and present.any():
            query = vectors[rng.choice(np.flatnonzero(present))]
        k = int(rng.choice([1, 2, 10, 100, count + 5]))
        if rng.random() < 0.2:
            queries = np.stack([query, *unit_rows(rng.standard_normal((3, dimension)))])
            for one, found in zip(queries, index.search_batch(queries, k)):
                yield from wrong_answer(found, vectors @ one, present, k)
            continue
        options: dict[str, Any] = {}
        allowed = present.copy()
        if rng.random() < 0.6:
            low, high = sorted(rng.integers(0, 101, 2).tolist())
            options["filter"] = f"price >= {low} and price < {high}"
            allowed &= (prices >= low) & (prices < high)
        if rng.random() < 0.3:
            options["exact"] = True
        elif rng.random() < 0.4:
            options["ef"] = int(rng.choice([1, k, 5 * count]))
        found = index.search(query, k, **options)
        scores = vectors @ query
        for message in wrong_answer(found, scores, allowed, k):
            yield f"{message} {index.kind} {vectors.shape} {options}"
        best = np.sort(scores[allowed])[::-1][: len(found.scores)]
        if options.get("exact") and (np.abs(found.scores - best) > TOLERANCE).any():
            yield f"exact search misses: {index.kind} {vectors.shape} k={k} {options}"


def wrong_answer(
    found: SearchResult, scores: np.ndarray, allowed: np.ndarray, k: int
) -> Iterator[str]:
    """Yield what no answer may be: repeated, forbidden, too few, wrongly scored or unordered."""
    rows = [int(name[1:]) for name in found.ids]
    where = f"k={k} plan {found.plan}:"
    if len(set(rows)) != len(rows):
        yield f"{where} an id twice"
    if not all(allowed[row] for row in rows):
        yield f"{where} a row that must not come back"
    if len(rows) != min(k, int(allowed.sum())):
        yield f"{where} {len(rows)} of {min(k, int(allowed.sum()))} answers"
    if rows and np.abs(found.scores - scores[rows]).max() > TOLERANCE:
        yield f"{where} a wrong score"
    if (np.diff(found.scores) > TOLERANCE).any():
        yield f"{where} not in order"


def wrong_words(rng: np.random.Generator) -> Iterator[str]:
    """Search random texts by their words and yield where compiled code and numpy differ."""
    count = int(rng.choice(COUNTS))
    words = np.array([f"w{number}" for number in range(int(rng.integers(1, 60)))])
    texts = [" ".join(rng.choice(words, int(rng.integers(0, 12)))) for _ in range(count)]
    compiled = LexicalIndex.build({"title": texts}, count)
    plain = LexicalIndex.build({"title": texts}, count, compiled=False)
    for _ in range(8):
        k = int(rng.choice([1, 2, 10, count + 5]))
        request = ScanRequest(
            k=k,
            also=rng.integers(0, count, 3).astype(np.uint32) if rng.random() < 0.5 else None,
            allowed=rng.random(count) < 0.5 if rng.random() < 0.5 else None,
            hidden=rng.random(count) < 0.2 if rng.random() < 0.5 else None,
            budget=int(rng.choice([0, 1, 50, 20_000])),
            complete=k + int(rng.choice([0, 5, 400])),
        )
        query = compiled.query(" ".join(rng.choice(words, int(rng.integers(1, 6)))))
        found: Any = compiled.search(query, request)
        expected: Any = plain.search(query, request)
        pairs = zip(found, expected, strict=True)
        if not all(np.array_equal(one, other) for one, other in pairs):
            yield f"compiled and plain search of words differ: {count} texts, {request}"


def hostile(rng: np.random.Generator, like: Any) -> Any:
    """Return something to put in the place of an argument."""
    size = int(rng.integers(0, 400))
    dtype = rng.choice(["u1", "u4", "u8", "f4", "i8", "?"])
    choices: list[Callable[[], Any]] = [
        lambda: None,
        lambda: int(rng.choice([0, -1, 5, 2**31, 2**62])),
        lambda: 2**64,
        lambda: "x",
        lambda: b"abc",
        lambda: float(rng.choice([0.0, -1.0, np.nan, np.inf, 1e300])),
        lambda: rng.integers(0, 255, size).astype(dtype),
        lambda: rng.standard_normal((3, 40)).astype(np.float32)[:, ::2],
        lambda: [f"l{row}" for row in range(size)],
    ]
    if isinstance(like, np.ndarray) and like.size:
        choices += [
            lambda: np.ascontiguousarray(like.reshape(-1)[: int(rng.integers(like.size))]),
            lambda: np.full_like(like, np.nan if like.dtype.kind == "f" else 1),
            lambda: np.frombuffer(rng.bytes(like.nbytes), like.dtype).reshape(like.shape).copy(),
        ]
    return choices[int(rng.integers(len(choices)))]()


def repeat_with_wrong_arguments(
    rng: np.random.Generator, calls: dict[str, tuple[Any, Call]], outcomes: collections.Counter[str]
) -> None:
    """Call everything that was recorded again, with one or two arguments replaced."""
    for function, (name, arguments, named) in calls.values():
        positional = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        keywords = dict(named)
        places: list[Any] = [*range(len(positional)), *keywords]
        for place in rng.choice(len(places), min(len(places), int(rng.integers(1, 3))), False):
            where = places[int(place)]
            if isinstance(where, int):
                positional[where] = hostile(rng, positional[where])
            else:
                keywords[where] = hostile(rng, keywords[where])
        try:
            function(*positional, **keywords)
            outcomes[f"{name}: answered"] += 1
        except (TypeError, ValueError, OverflowError, BufferError, MemoryError) as error:
            outcomes[f"{name}: {type(error).__name__}"] += 1


def main() -> int:
    """Fuzz for a while; 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    calls: dict[str, tuple[Any, Call]] = {}
    outcomes: collections.Counter[str] = collections.Counter()
    assert None not in (native.Engine, native.Postings, native.live_scan), "build the extensions"
    record_calls(calls)
    print(f"kernels: {native.SIMD}, seed {options.seed}", flush=True)
    end = time.monotonic() + options.seconds
    rounds = wrong = 0
    while time.monotonic() < end:
        rounds += 1
        corpus = random_corpus(rng)
        if rng.random() < 0.3:  # measures every plan, also those that so few rows never need
            queries = unit_rows(rng.standard_normal((20, corpus.index.dimension)))
            corpus.index.calibrate(queries, "perturbed entities")
        if rng.random() < 0.7:
            corpus = random_live(rng, corpus)
        for message in (*wrong_answers(rng, corpus), *wrong_words(rng)):
            wrong += 1
            print(message, flush=True)
        for _ in range(4):
            repeat_with_wrong_arguments(rng, calls, outcomes)
    print(f"{rounds} corpora, {wrong} wrong answers; {sum(outcomes.values())} hostile calls:")
    print("  " + ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
