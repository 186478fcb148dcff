"""Query vectors of requests: ready ones checked, texts normalised, cached or encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protos import retrieval_pb2 as pb
from retrieval.config import Limits
from retrieval.encoding.query_cache import Entry
from retrieval.errors import EmptyQuery, InvalidRequest
from retrieval.releases.serving_release import ServingRelease
from retrieval.service.admission import check_deadline
from retrieval.service.calls import CallContext
from retrieval.service.validation import (
    NORM_TOLERANCE,
    checked_embedding,
    checked_embeddings,
    checked_query,
    require_count,
)

Float32 = npt.NDArray[np.float32]

MIN_SQUARED_NORM = (1 - NORM_TOLERANCE) ** 2
MAX_SQUARED_NORM = (1 + NORM_TOLERANCE) ** 2

QueryMessage = pb.RetrieveRequest | pb.RetrieveMultiRequest | pb.ScoreRequest
"""Messages with ``query``, ``embedding`` and ``space_id``."""


class Query(NamedTuple):
    """A query on its way to the index.

    Attributes:
        vector: float32 ``(D,)``.
        text: Normalised; empty for a ready vector.
        is_cached: The vector came from the cache.
        queue_ns: Waiting for a batch of the encoder.
        encode_ns: Forward pass of that batch.
    """

    vector: Float32
    text: str = ""
    is_cached: bool = False
    queue_ns: int = 0
    encode_ns: int = 0


class QueryBatch(NamedTuple):
    """Queries of one call, in its order.

    Attributes:
        vectors: float32 ``(B, D)``.
        texts: Normalised; empty for ready vectors.
        cached: By query, whether its vector came from the cache.
        queue_ns: The longest of all.
        encode_ns: The longest of all.
    """

    vectors: Float32
    texts: list[str]
    cached: list[bool]
    queue_ns: int = 0
    encode_ns: int = 0


class QueryVectors:
    """Makes the vectors of a request's queries, as the release that answers encodes them.

    Args:
        limits: Of texts and batches.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    # ---- without waiting: the fast path ----------------------------------------------------------

    def find_cached(self, text: str, serving: ServingRelease) -> tuple[Entry | None, str]:
        """Return the cache entry of a text, if there is one, and the normalised text.

        Nothing is counted. Keys of the cache are normalised texts, so that a text which is a key
        needs no normalising. Raises as ``checked_query``.
        """
        entry = serving.encoder.find(text)
        if entry is not None:
            return entry, text
        normal = checked_query(text, self._limits)
        return (serving.encoder.find(normal) if normal != text else None), normal

    @staticmethod
    def quick_embedding(message: pb.RetrieveRequest, serving: ServingRelease) -> Float32 | None:
        """Return the request's ready vector, float32 ``(D,)``; None if it holds a text.

        Raises:
            ValueError: The full path has to say what is wrong with it.
        """
        embedding = message.embedding
        if not embedding:
            return None
        if (
            message.query
            or message.space_id != serving.space_id
            or len(embedding) != 4 * serving.dimension
        ):
            raise ValueError("not one vector of this space")
        vector: Float32 = np.frombuffer(embedding, dtype="<f4")
        if not MIN_SQUARED_NORM <= vector.dot(vector) <= MAX_SQUARED_NORM:
            raise ValueError("not of unit length")
        return vector

    # ---- the full path ---------------------------------------------------------------------------

    async def of_message(
        self, message: QueryMessage, serving: ServingRelease, context: CallContext
    ) -> Query:
        """Return the one query of a message.

        Raises:
            InvalidRequest: No query, two, or one that cannot be used; the kind says which.
            SpaceMismatch: A ready vector of another space.
            Overloaded: It would not be encoded in time.
            EncoderFailed: The query tower failed.
        """
        if message.embedding:
            if message.query:
                raise InvalidRequest("query: expected either text or an embedding, but got both.")
            return Query(
                checked_embedding(
                    message.embedding, message.space_id, serving.dimension, serving.space_id
                )
            )
        text = checked_query(message.query, self._limits)
        vector = serving.encoder.peek(text)
        if vector is not None:
            return Query(vector, text, is_cached=True)
        self._check_time(serving, context, must_encode=not serving.encoder.joins(text))
        looked = await serving.encoder.load(text)
        return Query(
            looked.vector,
            text,
            is_cached=looked.cached,
            queue_ns=looked.queue_ns,
            encode_ns=looked.encode_ns,
        )

    async def of_batch(
        self, message: pb.RetrieveBatchRequest, serving: ServingRelease, context: CallContext
    ) -> QueryBatch:
        """Return the queries of a batch, texts or ready vectors. Raises as ``of_message``."""
        if not message.embeddings:
            return await self.of_texts(message.queries, serving, context)
        if message.queries:
            raise InvalidRequest("queries: expected either texts or embeddings, but got both.")
        vectors = checked_embeddings(
            message.embeddings,
            message.space_id,
            serving.dimension,
            serving.space_id,
            self._limits.max_batch,
        )
        return QueryBatch(vectors, [""] * len(vectors), [False] * len(vectors))

    async def of_texts(
        self, queries: Sequence[str], serving: ServingRelease, context: CallContext
    ) -> QueryBatch:
        """Return the queries of a list of texts. Raises as ``of_message``."""
        if not queries:
            raise EmptyQuery("queries")
        require_count("queries", len(queries), self._limits.max_batch)
        encoder = serving.encoder
        texts = list(queries)
        vectors: Float32 = np.empty((len(texts), serving.dimension), dtype=np.float32)
        missing = []
        for row, text in enumerate(texts):
            entry = encoder.find(text)
            if entry is None:
                normal = texts[row] = checked_query(text, self._limits, f"queries[{row}]")
                entry = encoder.find(normal) if normal != text else None
            if entry is None:
                missing.append(row)
            else:
                encoder.cache.used(entry)
                vectors[row] = entry.vector
        self._check_time(serving, context, must_encode=False)
        cached = [True] * len(texts)
        if not missing:
            return QueryBatch(vectors, texts, cached)
        found = await encoder.lookup_many([texts[row] for row in missing])
        vectors[missing] = found.vectors
        for row, hit in zip(missing, found.cached, strict=True):
            cached[row] = hit
        return QueryBatch(vectors, texts, cached, found.queue_ns, found.encode_ns)

    @staticmethod
    def _check_time(serving: ServingRelease, context: CallContext, *, must_encode: bool) -> None:
        """Refuse at once what cannot be answered in time, instead of encoding for nobody."""
        remaining = context.time_remaining()
        check_deadline(remaining)
        if must_encode:
            late = serving.batcher.late(remaining)
            if late is not None:
                raise late
