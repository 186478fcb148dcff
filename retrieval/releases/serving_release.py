"""One release in memory, proven against its golden queries before it serves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

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
PARITY_TEXTS = 64
"""Golden texts per entity type that are encoded to measure it."""


class EncoderWork(NamedTuple):
    """What the encoder of a release has done so far."""

    batches: int = 0
    texts: int = 0
    dropped: int = 0
    """Texts whose callers had gone."""
    shared: int = 0
    """Misses that joined an encode under way."""

    def plus(self, other: EncoderWork) -> EncoderWork:
        """Add the work of another release."""
        return EncoderWork(
            batches=self.batches + other.batches,
            texts=self.texts + other.texts,
            dropped=self.dropped + other.dropped,
            shared=self.shared + other.shared,
        )


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
        self.fused_by_default = frozenset(
            name
            for name, fused in release.fused.items()
            if fused.fusion is not None and fused.fusion.enabled
        )
        """Entity types whose answers are fused when a call does not say."""
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

    def unknown_share(self, text: str) -> float:
        """Return the share of a text's characters that the query tower does not know."""
        return self.encoding.unknown_share(text) if text else 0.0

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

    def work(self) -> EncoderWork:
        """Return what the encoder has done so far."""
        return EncoderWork(
            batches=self.batcher.batches,
            texts=self.batcher.texts,
            dropped=self.batcher.dropped,
            shared=self.encoder.shared,
        )

    def close(self) -> None:
        """Stop following the log and the encoder's thread. The release is unusable afterwards."""
        self.follower.stop()
        self.executor.shutdown(wait=False)
        self.release.close()


def prove(release: Release, encoding: QueryEncoding, min_recall: float = 0.0) -> dict[str, float]:
    """Replay the golden queries of a release: its indexes and its encoder must answer as recorded.

    Args:
        release: Opened, without live entries.
        encoding: The runtime form that will serve.
        min_recall: Lowest ANN recall per entity type; 0: the release's own figures decide
            (``Release.replay_golden``).

    Returns:
        Mean cosine of golden queries as encoded here with the trainer's vectors, by entity type
        that has golden texts.

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
        cosine = _encoder_parity(release, encoding, entity_type)
        if cosine is None:
            continue
        parity[entity_type] = cosine
        if not cosine >= MIN_PARITY_COSINE:  # true for NaN, too
            raise ReleaseRefused(
                f"{release.release_id}/{entity_type}: expected golden queries encoded as"
                f" {encoding.form_id} to agree with the trainer's vectors (mean cosine"
                f" {MIN_PARITY_COSINE} or more), but got {cosine:.4f}. Its encoder and indexes do"
                " not belong together: rebuild it."
            )
    return parity


def _encoder_parity(release: Release, encoding: QueryEncoding, entity_type: str) -> float | None:
    """Return the mean cosine of encoded golden texts with their vectors; None without texts."""
    golden = release.golden(entity_type)
    rows = [row for row, text in enumerate(golden.texts) if text][:PARITY_TEXTS]
    if not rows:
        return None
    encoded = encoding.encode([golden.texts[row] for row in rows])
    return float(np.mean(np.sum(encoded * golden.vectors[rows], axis=1)))
