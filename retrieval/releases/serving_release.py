"""One release in memory, proven against its golden queries before it serves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.release import Release
from retrieval.config import ServeConfig
from retrieval.encoding.batcher import Batcher
from retrieval.encoding.cached_encoder import CachedEncoder
from retrieval.encoding.query_cache import QueryCache, namespace
from retrieval.encoding.query_encoder import QueryEncoding
from retrieval.encoding.redis_tier import RedisTier
from retrieval.errors import ReleaseRefused

MIN_PARITY_COSINE = 0.95
"""Lowest mean cosine between golden queries as this server encodes them and as the trainer did."""


class ServingRelease:
    """A release and what is needed to answer from it: indexes, encoder, cache, live entries.

    As a context manager it counts a call in ``in_flight``: it is not closed before that is 0.
    """

    def __init__(
        self,
        release: Release,
        encoding: QueryEncoding,
        follower: LiveFollower,
        cache: QueryCache,
        config: ServeConfig,
        redis: RedisTier | None,
    ) -> None:
        self.release = release
        self.release_id = release.release_id
        self.space_id = release.space_id
        self.query_space_id = (
            "" if release.query_space_id == release.space_id else release.query_space_id
        )
        """Empty: the query tower is of the vectors' own space."""
        self.dimension = release.dimension
        self.entities = release.entities
        self.form_id = encoding.form_id
        self.encoding = encoding
        self.follower = follower
        self.in_flight = 0
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self.batcher = Batcher(
            encoding.encode,
            self.executor,
            release.dimension,
            max_tokens=config.batch_tokens,
            max_delay_seconds=config.batch_delay_ms / 1e3,
            max_queue=config.max_encode_queue,
        )
        self.prefix = namespace(release.query_vectors_id, encoding.form_id)
        self.encoder = CachedEncoder(
            cache,
            self.batcher,
            self.prefix,
            release.dimension,
            redis,
            max_queue=config.max_encode_queue,
        )

    def __enter__(self) -> Self:
        self.in_flight += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.in_flight -= 1

    def close(self) -> None:
        """Stop following the log and the encoder's thread; nobody may use this release any more."""
        self.follower.stop()
        self.executor.shutdown(wait=False)
        self.release.close()


def prove(release: Release, encoding: QueryEncoding, min_recall: float = 0.0) -> dict[str, float]:
    """Replay the golden queries: the indexes must answer as recorded, and this server's encoder must agree with the trainer's vectors.

    Args:
        release: Opened, without live entries.
        encoding: The runtime form that will serve.
        min_recall: Lowest ANN recall per entity type; 0: the release's own figures decide
            (``Release.replay_golden``).

    Returns:
        Mean cosine of encoded golden queries with the stored vectors, by entity type that has
        golden texts.

    Raises:
        ReleaseRefused: Recall or parity is too low.
        ReleaseCorrupt: An index answers worse than its manifest says.
    """
    if encoding.dimension != release.dimension:
        raise ReleaseRefused(
            f"{release.release_id}: the indexes hold vectors of {release.dimension} dimensions, but"
            f" its query encoder makes {encoding.dimension}. Its parts do not belong together:"
            " rebuild it."
        )
    for entity_type, result in release.replay_golden().items():
        if result.recall < min_recall:
            raise ReleaseRefused(
                f"{release.release_id}/{entity_type}: expected golden recall of at least"
                f" {min_recall:.3f}, but got {result.recall:.3f}."
            )
    parity: dict[str, float] = {}
    for entity_type in release.entities:
        golden = release.golden(entity_type)
        rows = [i for i, text in enumerate(golden.texts) if text][:64]
        if not rows:
            continue
        made = encoding.encode([golden.texts[i] for i in rows])
        parity[entity_type] = float(np.mean(np.sum(made * golden.vectors[rows], axis=1)))
        if not parity[entity_type] >= MIN_PARITY_COSINE:
            raise ReleaseRefused(
                f"{release.release_id}/{entity_type}: expected golden queries encoded as"
                f" {encoding.form_id} to agree with the trainer's vectors (mean cosine"
                f" {MIN_PARITY_COSINE} or more), but got {parity[entity_type]:.4f}. Its encoder and"
                " indexes do not belong together: rebuild it."
            )
    return parity
