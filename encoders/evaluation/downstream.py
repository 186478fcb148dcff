"""Classify queries into a taxonomy by a linear head on frozen vectors (paper section 5.4).

The question is whether query vectors carry meaning beyond retrieval.

The taxonomy is Iconclass: ten branches, then two digits, then letters (``2`` -> ``25`` -> ``25D``).
A query's labels are the classes of the entities people gave it to. fastText, trained on the same
queries and labels, is the baseline. Held-out query strings are never trained on; translations of
one title can stand on both sides of the split, so titles say nothing about transfer between
languages.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F

from encoders.datasets.dataset import Dataset
from encoders.errors import ConfigError, InvalidVectors, MissingDependency
from encoders.evaluation.metrics import Interval, QuerySums, bootstrap_interval
from encoders.text.words import words_of

LEVELS = 3

ICONCLASS = re.compile(r"(\d)(?:(\d)([A-Z]{1,2})?)?")


def iconclass_path(entity_id: str) -> tuple[str, ...]:
    """List the classes of an Iconclass entity from the root down, at most three.

    ``ic:25D3k11`` -> ``("2", "25", "25D")``; empty for other ids.
    """
    match = ICONCLASS.match(entity_id[3:]) if entity_id.startswith("ic:") else None
    if match is None:
        return ()
    first, second, letters = match.groups()
    path = [first]
    if second:
        path.append(first + second)
    if letters:
        path.append(first + second + letters)
    return tuple(path)


def class_path(leaf: str) -> tuple[str, ...]:
    """List the classes down to ``leaf``: ``25D`` -> ``("2", "25", "25D")``."""
    return iconclass_path(f"ic:{leaf}")


def labelled_queries(
    dataset: Dataset, split: str, *, per_kind: int | None = None, seed: int = 0
) -> pl.DataFrame:
    """Collect the query strings of one split with all their deepest classes.

    Args:
        dataset: With Iconclass entities (ids ``ic:...``).
        split: ``train``, or ``dev``.
        per_kind: At most this many random queries of each kind (keyword, title); None: all.
        seed: Chooses them.

    Returns:
        ``query, language, kind, leaves`` (list of str, sorted), in order of first appearance.

    Raises:
        ConfigError: The data set has no Iconclass pairs in this split.
    """
    rows = dataset.split(split).filter(pl.col("entity_id").str.starts_with("ic:"))
    if rows.is_empty():
        raise ConfigError(
            f"data set {dataset.name!r} has no {split} pairs of Iconclass entities. Use the larger"
            " one."
        )
    codes = rows["entity_id"].unique(maintain_order=True)
    leaf = pl.Series("leaf", [(iconclass_path(code) or ("",))[-1] for code in codes.to_list()])
    rows = rows.join(
        pl.DataFrame({"entity_id": codes, "leaf": leaf}), on="entity_id", maintain_order="left"
    ).filter(pl.col("leaf") != "")
    queries = rows.group_by("query", maintain_order=True).agg(
        pl.col("language").first(),
        pl.col("kind").first(),
        pl.col("leaf").unique().sort().alias("leaves"),
    )
    if per_kind is None:
        return queries
    rng = np.random.default_rng(seed)
    place = np.empty(queries.height, dtype=np.int64)
    place[rng.permutation(queries.height)] = np.arange(queries.height)
    ranked = queries.with_columns(pl.Series("place", place).alias("place")).filter(
        pl.col("place").rank("ordinal").over("kind") <= per_kind
    )
    return ranked.drop("place")


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the linear head is trained."""

    epochs: int = 30
    """Passes over the data; the weights of the pass with the best validation loss are kept."""
    batch: int = 1024
    """Queries per step."""
    learning_rate: float = 0.02
    """Of AdamW, falling along a cosine."""
    validation_share: float = 0.05
    """Part of the queries that is held back to choose the pass."""
    seed: int = 0
    """Order and split."""


def fit_linear_head(
    vectors: np.ndarray, leaves: Sequence[Sequence[str]], settings: HeadSettings | None = None
) -> tuple[torch.nn.Linear, list[str]]:
    """Train multinomial logistic regression on frozen vectors.

    The target of a query is uniform over its leaves.

    Args:
        vectors: ``(N, D)`` float32, finite.
        leaves: Leaves of each query, at least one.
        settings: Length and pace of the training; None: the defaults.

    Returns:
        The head and the class of each of its outputs.

    Raises:
        InvalidVectors: A value is not finite, or there are not as many vectors as label lists.
    """
    if len(vectors) != len(leaves) or not np.isfinite(vectors).all():
        bad = int((~np.isfinite(vectors)).sum())
        raise InvalidVectors(
            f"expected {len(leaves)} finite vectors, but got shape {vectors.shape} with {bad}"
            " values NaN or infinite."
        )
    settings = settings or HeadSettings()
    classes = sorted({leaf for row in leaves for leaf in row})
    targets = _SoftTargets.of(leaves, classes)
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(len(vectors))
    held = max(1, int(settings.validation_share * len(vectors)))
    check = torch.from_numpy(order[:held])
    train = order[held:]
    inputs = _head_inputs(vectors)
    torch.manual_seed(settings.seed)
    head = torch.nn.Linear(vectors.shape[1], len(classes))
    torch.nn.init.zeros_(head.weight)
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=1e-3)
    steps = settings.epochs * max(1, -(-len(train) // settings.batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    best_loss = float("inf")
    best = _weights(head)
    for _ in range(settings.epochs):
        shuffled = rng.permutation(train)
        for start in range(0, len(shuffled), settings.batch):
            rows = torch.from_numpy(shuffled[start : start + settings.batch])
            loss = targets.cross_entropy(head(inputs[rows]), rows)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            validation_loss = float(targets.cross_entropy(head(inputs[check]), check))
        if validation_loss < best_loss:
            best_loss = validation_loss
            best = _weights(head)
    head.load_state_dict(best)
    return head, classes


def _head_inputs(vectors: np.ndarray) -> torch.Tensor:
    """Bring unit rows to entries of unit scale, so that one learning rate fits every width."""
    rows = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    return rows * float(np.sqrt(vectors.shape[1]))


def _weights(head: torch.nn.Linear) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


@dataclass(frozen=True)
class _SoftTargets:
    """The leaves of N queries as class numbers, one list after the other."""

    counts: torch.Tensor
    """int64 ``(N,)``: leaves of each query."""
    starts: torch.Tensor
    """int64 ``(N,)``: where a query's leaves begin in ``leaves``."""
    leaves: torch.Tensor
    """int64: the class numbers."""

    @classmethod
    def of(cls, leaves: Sequence[Sequence[str]], classes: Sequence[str]) -> _SoftTargets:
        """Number the leaves by their place in ``classes``."""
        number = {leaf: i for i, leaf in enumerate(classes)}
        counts = torch.tensor([len(row) for row in leaves])
        flat = torch.tensor([number[leaf] for row in leaves for leaf in row])
        return cls(counts, torch.cumsum(counts, 0) - counts, flat)

    def cross_entropy(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Compute the mean loss of ``logits`` (B, classes) for the queries ``rows`` (B,)."""
        count = self.counts[rows]
        owner = torch.repeat_interleave(torch.arange(len(rows)), count)
        first = torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
        offset = torch.arange(len(owner)) - first
        leaf = self.leaves[self.starts[rows][owner] + offset]
        log_p = F.log_softmax(logits, dim=1)
        return -(log_p[owner, leaf] / count[owner]).sum() / len(rows)


def predict_leaves(head: torch.nn.Linear, classes: Sequence[str], vectors: np.ndarray) -> list[str]:
    """Predict the most probable leaf of each vector."""
    with torch.no_grad():
        logits = head(_head_inputs(vectors))
    return [classes[i] for i in logits.argmax(dim=1).tolist()]


@dataclass(frozen=True, kw_only=True)
class FastTextConfig:
    """How fastText is trained.

    The defaults suit short multilingual queries better than its own (words only, 5 passes).
    """

    dimension: int = 100
    epochs: int = 25
    learning_rate: float = 0.5
    word_ngrams: int = 2
    shortest_subword: int = 2
    longest_subword: int = 5
    """0: words only."""
    buckets: int = 500_000
    threads: int = 1


def train_fasttext(
    texts: Sequence[str], leaves: Sequence[Sequence[str]], config: FastTextConfig | None = None
) -> Any:
    """Train fastText's supervised classifier on the same queries and labels as the head.

    Raises:
        MissingDependency: fastText is not installed.
    """
    try:
        import fasttext
    except ImportError as error:
        raise MissingDependency("fasttext-wheel", "baselines", "The fastText baseline") from error
    config = config or FastTextConfig()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        with path.open("w", encoding="utf-8") as file:
            for text, row in zip(texts, leaves, strict=True):
                file.write(
                    " ".join([*(f"__label__{leaf}" for leaf in row), *words_of(text)]) + "\n"
                )
        return fasttext.train_supervised(
            str(path),
            dim=config.dimension,
            epoch=config.epochs,
            lr=config.learning_rate,
            wordNgrams=config.word_ngrams,
            minn=config.shortest_subword if config.longest_subword else 0,
            maxn=config.longest_subword,
            bucket=config.buckets,
            thread=config.threads,
            verbose=0,
        )


def predict_fasttext(model: Any, texts: Sequence[str]) -> list[str]:
    """Predict the most probable leaf of each text; empty where fastText knows none of its words."""
    # numpy 2 refuses the copy that model.predict makes; the binding below it makes none.
    found = [model.f.predict(" ".join(words_of(text)) + "\n", 1, 0.0, "strict") for text in texts]
    return [row[0][1].removeprefix("__label__") if row else "" for row in found]


@dataclass(frozen=True)
class HierarchicalScores:
    """How well predicted paths meet the true ones."""

    queries: int
    precision: Interval
    """Hierarchical precision: the share of predicted classes that are true classes of the query.

    Predicted are the leaf and the classes above it.
    """
    recall: float
    """Hierarchical recall: the share of the true classes that were predicted.

    One path cannot cover several.
    """
    level: dict[int, Interval]
    """Level -> share of queries whose class at that level is a true one.

    Queries without a true class that deep are left out.
    """

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        levels = {f"level {k}": v._asdict() for k, v in self.level.items()}
        return {
            "queries": self.queries,
            "hierarchical precision": self.precision._asdict(),
            "hierarchical recall": self.recall,
            **levels,
        }


def hierarchical_scores(
    predicted: Sequence[str],
    leaves: Sequence[Sequence[str]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> HierarchicalScores:
    """Score one predicted leaf per query (Kiritchenko et al., 2006).

    Several true paths are merged into one set of classes.

    Args:
        predicted: Leaf of each query; empty: no prediction, which counts as one wrong class.
        leaves: True leaves of each query.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
    """
    count = len(predicted)
    correct, guessed, true = np.zeros(count), np.zeros(count), np.zeros(count)
    hits, known = np.zeros((LEVELS, count)), np.zeros((LEVELS, count))
    for i, (leaf, row) in enumerate(zip(predicted, leaves, strict=True)):
        path = class_path(leaf)
        truth = {node for label in row for node in class_path(label)}
        correct[i] = len(truth.intersection(path))
        guessed[i] = max(1, len(path))
        true[i] = len(truth)
        for level in range(LEVELS):
            if any(len(node) > level and len(class_path(node)) == level + 1 for node in truth):
                known[level, i] = 1
                hits[level, i] = level < len(path) and path[level] in truth
    levels = {
        level + 1: bootstrap_interval(
            QuerySums(hits[level], known[level]), resamples=resamples, seed=seed
        )
        for level in range(LEVELS)
    }
    precision = bootstrap_interval(
        QuerySums(correct / guessed, np.ones(count)), resamples=resamples, seed=seed
    )
    recall = float((correct / true).mean()) if count else float("nan")
    return HierarchicalScores(count, precision, recall, levels)
