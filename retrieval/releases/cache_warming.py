"""The query cache across changes: warm for another space, handed to the next workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from retrieval.encoding.query_cache import Entry, QueryCache, most_frequent
from retrieval.observability.metrics import Metrics
from retrieval.releases.serving_release import ServingRelease

log = logging.getLogger(__name__)

CHUNK_TEXTS = 8
"""Texts encoded at a time: a request to the same encoder waits behind one chunk at most."""


class CacheWarmer:
    """Fills the query cache for a release before it serves, so that the hit rate does not collapse.

    Args:
        cache: Shared by all releases.
        metrics: Where texts encoded for it are counted.
        max_queries: Most frequent queries that are kept warm.
        loader: Chooses them.
    """

    def __init__(
        self, cache: QueryCache, metrics: Metrics, max_queries: int, loader: Executor
    ) -> None:
        self._cache = cache
        self._metrics = metrics
        self._max_queries = max_queries
        self._loader = loader

    async def write(self, path: Path, serving: ServingRelease | None) -> None:
        """Write the most frequent queries of a release with their vectors.

        Runs in a thread, as a full cache takes a while.

        Args:
            path: New file.
            serving: Whose; None: an empty file.
        """
        prefix = serving.prefix if serving is not None else ""
        items = self._cache.items() if prefix else []
        await asyncio.to_thread(_write_frequent, path, prefix, items, self._max_queries)

    async def read(
        self, paths: Sequence[Path], serving: ServingRelease, executor: Executor
    ) -> None:
        """Take over what other workers wrote; texts of another space are encoded.

        Args:
            paths: Files of ``write``; one that cannot be read is left out.
            serving: Whose part of the cache is filled.
            executor: As in ``encode``.
        """
        to_encode: dict[str, None] = {}
        for path in paths:
            try:
                with np.load(path, allow_pickle=False) as content:
                    prefix = str(content["prefix"])
                    texts = content["texts"].tolist()
                    vectors = content["vectors"]
            except (OSError, ValueError, KeyError) as error:
                log.warning("the cache of the former workers could not be taken over: %s", error)
                continue
            if prefix == serving.prefix and vectors.shape[1:] == (serving.dimension,):
                for text, vector in zip(texts, vectors, strict=True):
                    self._cache.put(prefix + text, vector)
            else:
                to_encode.update(dict.fromkeys(texts))
        await self.encode(list(to_encode)[: self._max_queries], serving, executor)

    async def carry_over(
        self, old: ServingRelease, new: ServingRelease, executor: Executor
    ) -> None:
        """Encode the most frequent cached queries of ``old`` for ``new``.

        Args:
            old: Served until now.
            new: Of another space or form.
            executor: As in ``encode``.
        """
        frequent = await asyncio.get_running_loop().run_in_executor(
            self._loader, most_frequent, self._cache.items(), old.prefix, self._max_queries
        )
        await self.encode([text for text, _ in frequent], new, executor)

    async def encode(
        self, texts: Sequence[str], serving: ServingRelease, executor: Executor
    ) -> None:
        """Encode those texts that are not cached yet.

        Args:
            texts: Normalised.
            serving: Whose encoder.
            executor: The one thread that may use it now.
        """
        loop = asyncio.get_running_loop()
        texts = [text for text in texts if self._cache.find(serving.prefix + text) is None]
        done = 0
        for start in range(0, len(texts), CHUNK_TEXTS):
            chunk = texts[start : start + CHUNK_TEXTS]
            try:
                vectors = await loop.run_in_executor(executor, serving.encoding.encode, chunk)
            except Exception as error:  # a cold cache must never stop a swap
                log.warning("prewarming stopped after %d queries: %s", done, error)
                break
            # The most frequent last: it leaves the LRU after the others of its chunk
            for text, vector in zip(reversed(chunk), vectors[::-1], strict=True):
                self._cache.put(serving.prefix + text, vector)
            done += len(chunk)
        self._metrics.count("omni_prewarmed_queries", (), done)
        if done:
            log.info("prewarmed %d queries for space %s", done, serving.space_id[:16])


def _write_frequent(
    path: Path, prefix: str, items: Sequence[tuple[str, Entry]], count: int
) -> None:
    held = most_frequent(items, prefix, count)
    vectors = np.zeros((0, 1), dtype=np.float32)
    if held:
        vectors = np.stack([entry.vector for _, entry in held])
    texts = np.array([text for text, _ in held], dtype=np.str_)
    np.savez(path, prefix=prefix, texts=texts, vectors=vectors)
