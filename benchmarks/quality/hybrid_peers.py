"""Hybrid search as others offer it: LanceDB, Milvus Lite, and bm25s beside hnswlib.

Each indexes the same texts and vectors, and takes the ``DEPTH`` best of either leg into its own
ranker. A text is split by the peer's own tokeniser, or handed over split by ours (``ours-...``).
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from encoders.evaluation.baselines import Bm25

DEPTH = 100
"""Candidates of each leg."""
K = 10
EF = 200
"""Of hnswlib's and Milvus Lite's graph; LanceDB scans all vectors."""
OUR_SPLITS = {
    "ours-words": Bm25(),
    "ours-words-trigrams": Bm25((3,)),
    "ours-words-ngrams": Bm25((2, 3, 4)),
}
"""Ways of splitting a text beside the peers' own: the evaluation baseline's terms."""


class Ranker(NamedTuple):
    """How the two legs become one list."""

    kind: str
    """``rrf``, or ``weighted``: a sum of scores, each brought to a scale as the peer does."""
    value: float
    """The constant of reciprocal ranks, or the dense leg's share of the sum."""

    def __str__(self) -> str:
        """Say it in a word, e.g. ``rrf 60``."""
        return f"{self.kind} {self.value:g}"


RANKERS = (
    *(Ranker("rrf", k) for k in (10, 1, 3, 60)),
    *(Ranker("weighted", share) for share in (0.3, 0.5, 0.7, 0.9)),
)


class Corpus(NamedTuple):
    """What is indexed."""

    texts: list[str]
    """One a row."""
    vectors: np.ndarray
    """float32 ``(N, D)``, unit rows."""


class Hybrid(Protocol):
    """An index that answers by both legs."""

    def search(self, text: str, vector: np.ndarray, ranker: Ranker) -> list[int]:
        """Return the rows of the ``K`` best, best first.

        Args:
            text: The query.
            vector: float32 ``(D,)``, unit norm.
            ranker: One of ``RANKERS``.
        """
        ...

    def close(self) -> None:
        """Stop what it started, and remove its files."""
        ...


@dataclass(frozen=True)
class Peer:
    """A system that somebody would take instead."""

    name: str
    tokenisers: tuple[str, ...]
    build: Callable[[Corpus, str], Hybrid]
    """From a corpus and one of ``tokenisers``."""
    packages: tuple[str, ...]
    """Distributions that it needs; their modules have the same names, with ``_``."""

    @property
    def is_installed(self) -> bool:
        """Whether every package is there."""
        return all(find_spec(name.replace("-", "_")) is not None for name in self.packages)


def spelt_out(text: str, tokeniser: str) -> str:
    """Return a text as a peer gets it: of ``ours-...``, its terms with spaces between."""
    if tokeniser not in OUR_SPLITS:
        return text
    terms = OUR_SPLITS[tokeniser].terms(text)
    return " ".join(term.replace("\0", "g_").replace(" ", "_") for term in terms)


def reciprocal_rank_fusion(lists: Iterable[Sequence[int]], constant: float) -> list[int]:
    """Order rows by the sum of ``1 / (constant + rank)`` over lists; ranks count from 1.

    Of equal sums the row with the smaller number is first.
    """
    sums: dict[int, float] = defaultdict(float)
    for rows in lists:
        for rank, row in enumerate(rows, 1):
            sums[row] += 1 / (constant + rank)
    return sorted(sums, key=lambda row: (-sums[row], row))


class Bm25sHnswlib:
    """bm25s and hnswlib, fused by ten lines of one's own."""

    def __init__(self, corpus: Corpus, tokeniser: str) -> None:
        import bm25s
        import hnswlib

        self._terms = OUR_SPLITS[tokeniser].terms
        self._vocabulary: dict[str, int] = {}
        documents = [
            [self._vocabulary.setdefault(term, len(self._vocabulary)) for term in self._terms(text)]
            for text in corpus.texts
        ]
        self._words = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self._words.index(
            (documents, self._vocabulary), show_progress=False, create_empty_token=False
        )
        self._graph = hnswlib.Index("ip", corpus.vectors.shape[1])
        self._graph.init_index(len(corpus.vectors), M=16, ef_construction=200)
        self._graph.add_items(corpus.vectors, num_threads=1)
        self._graph.set_ef(EF)
        self._depth = min(DEPTH, len(corpus.vectors))

    def search(self, text: str, vector: np.ndarray, ranker: Ranker) -> list[int]:
        """Search both, and add ranks, or cosines and BM25 as a share of the best."""
        labels, distances = self._graph.knn_query(vector[None], self._depth, num_threads=1)
        dense = labels[0].astype(np.int64)
        known = [self._vocabulary[term] for term in self._terms(text) if term in self._vocabulary]
        if not known:
            nearest: list[int] = dense[:K].tolist()
            return nearest
        scores = self._words.get_scores_from_ids(known)
        words = np.argpartition(-scores, self._depth - 1)[: self._depth]
        words = words[scores[words] > 0]
        words = words[np.lexsort((words, -scores[words]))]
        if ranker.kind == "rrf":
            return reciprocal_rank_fusion([dense.tolist(), words.tolist()], ranker.value)[:K]
        sums: dict[int, float] = defaultdict(float)
        for row, cosine in zip(dense.tolist(), (1 - distances[0]).tolist(), strict=True):
            sums[row] += ranker.value * cosine
        for row in words.tolist():
            sums[row] += (1 - ranker.value) * float(scores[row] / scores[words[0]])
        return sorted(sums, key=lambda row: (-sums[row], row))[:K]

    def close(self) -> None:
        """Do nothing: all is in memory."""


class LanceDb:
    """LanceDB: its own full-text index, all vectors scanned, its own rerankers."""

    def __init__(self, corpus: Corpus, tokeniser: str) -> None:
        os.environ.setdefault("LANCE_LOG", "error")  # a warning for every query otherwise
        import lancedb
        import pyarrow as pa
        from lancedb.index import FTS

        self._tokeniser = tokeniser
        self._folder = tempfile.TemporaryDirectory(prefix="omni-lancedb-")
        numbers = pa.array(corpus.vectors.ravel())
        table = pa.table(
            {
                "row": np.arange(len(corpus.texts)),
                "text": [spelt_out(text, tokeniser) for text in corpus.texts],
                "vector": pa.FixedSizeListArray.from_arrays(numbers, corpus.vectors.shape[1]),
            }
        )
        self._table = lancedb.connect(self._folder.name).create_table("entities", table)
        base = "whitespace" if tokeniser in OUR_SPLITS else tokeniser
        words = FTS(base_tokenizer=base, stem=False, remove_stop_words=False)
        self._table.create_index("text", config=words)
        self._rerankers = {ranker: _lance_reranker(ranker) for ranker in RANKERS}

    def search(self, text: str, vector: np.ndarray, ranker: Ranker) -> list[int]:
        """Ask for ``DEPTH`` of the two legs together, and keep the best."""
        spelt = spelt_out(text, self._tokeniser)
        query = self._table.search(
            query_type="hybrid", vector_column_name="vector", fts_columns="text"
        )
        query = query.vector(vector).text(spelt).distance_type("cosine")
        answer = query.rerank(self._rerankers[ranker]).limit(DEPTH).to_arrow()
        rows: list[int] = answer["row"].to_pylist()[:K]
        return rows

    def close(self) -> None:
        """Remove its files."""
        self._folder.cleanup()


def _lance_reranker(ranker: Ranker) -> Any:
    from lancedb.rerankers import LinearCombinationReranker, RRFReranker

    if ranker.kind == "rrf":
        return RRFReranker(int(ranker.value))
    return LinearCombinationReranker(ranker.value)


class MilvusLite:
    """Milvus Lite: its BM25 function, HNSW, its own rankers.

    It ranks as Milvus does with the standard analyser; its Python engine is not Milvus's speed.
    """

    def __init__(self, corpus: Corpus, tokeniser: str) -> None:
        from pymilvus import DataType, Function, FunctionType, MilvusClient

        self._tokeniser = tokeniser
        self._folder = tempfile.TemporaryDirectory(prefix="omni-milvus-")
        self._client = client = MilvusClient(str(Path(self._folder.name) / "entities.db"))
        schema = client.create_schema(auto_id=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("text", DataType.VARCHAR, max_length=65_535, enable_analyzer=True)
        schema.add_field("words", DataType.SPARSE_FLOAT_VECTOR)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=corpus.vectors.shape[1])
        bm25 = Function(
            name="bm25",
            function_type=FunctionType.BM25,
            input_field_names=["text"],
            output_field_names=["words"],
        )
        schema.add_function(bm25)
        client.create_collection("entities", schema=schema)
        for start in range(0, len(corpus.texts), 1000):
            block = range(start, min(start + 1000, len(corpus.texts)))
            texts = [spelt_out(corpus.texts[row], tokeniser)[:60_000] for row in block]
            rows = [
                {"row": row, "text": text, "vector": corpus.vectors[row]}
                for row, text in zip(block, texts, strict=True)
            ]
            client.insert("entities", rows)
        client.flush("entities")
        params = client.prepare_index_params()
        params.add_index("words", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
        graph = {"M": 16, "efConstruction": 200}
        params.add_index("vector", index_type="HNSW", metric_type="COSINE", params=graph)
        client.create_index("entities", params)
        client.load_collection("entities")

    def search(self, text: str, vector: np.ndarray, ranker: Ranker) -> list[int]:
        """Ask for ``DEPTH`` of each leg, and the ranker's best."""
        from pymilvus import AnnSearchRequest, RRFRanker, WeightedRanker

        near = {"metric_type": "COSINE", "params": {"ef": EF}}
        legs = [
            AnnSearchRequest([vector], "vector", near, limit=DEPTH),
            AnnSearchRequest(
                [spelt_out(text, self._tokeniser)], "words", {"metric_type": "BM25"}, limit=DEPTH
            ),
        ]
        how: Any = WeightedRanker(ranker.value, 1 - ranker.value)
        if ranker.kind == "rrf":
            how = RRFRanker(int(ranker.value))
        hits = self._client.hybrid_search("entities", legs, how, limit=K)[0]
        return [int(hit["row"]) for hit in hits]

    def close(self) -> None:
        """Leave the server, which ends with the process, and remove the files."""
        self._client.drop_collection("entities")
        self._client.close()
        self._folder.cleanup()


PEERS = {
    peer.name: peer
    for peer in (
        Peer("bm25s + hnswlib", tuple(OUR_SPLITS), Bm25sHnswlib, ("bm25s", "hnswlib")),
        Peer("LanceDB", ("simple", "icu", "ngram", "ours-words-trigrams"), LanceDb, ("lancedb",)),
        Peer(
            "Milvus Lite",
            ("standard", "ours-words-trigrams"),
            MilvusLite,
            ("milvus-lite", "pymilvus"),
        ),
    )
}
