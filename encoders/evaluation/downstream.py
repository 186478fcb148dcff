"""Do query vectors carry meaning beyond retrieval? Frozen vectors and a linear head classify queries into a taxonomy (paper section 5.4).

The taxonomy is Iconclass: ten branches, then two digits, then letters (``2`` -> ``25`` -> ``25D``).
A query's labels are the classes of the entities people gave it to. fastText, trained on the same
queries and labels, is the yardstick. Held-out query strings are never trained on; translations of
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
from encoders.evaluation.baselines import words_of
from encoders.evaluation.metrics import Interval, QuerySums, bootstrap_interval

LEVELS = 3

ICONCLASS = re.compile(r"(\d)(?:(\d)([A-Z]{1,2})?)?")


def iconclass_path(entity_id: str) -> tuple[str, ...]:
    """Classes of an Iconclass entity from the root down, at most three: ``ic:25D3k11`` -> ``("2", "25", "25D")``; empty for other ids."""
    match = ICONCLASS.match(entity_id[3:]) if entity_id.startswith("ic:") else None
    if match is None:
        return ()
    first, second, letters = match.groups()
    path = (
        [first]
        + ([first + second] if second else [])
        + ([first + second + letters] if letters else [])
    )
    return tuple(path)


def class_path(leaf: str) -> tuple[str, ...]:
    """The classes above and including ``leaf``: ``25D`` -> ``("2", "25", "25D")``."""
    return iconclass_path(f"ic:{leaf}")


def labelled_queries(
    dataset: Dataset, split: str, *, per_kind: int | None = None, seed: int = 0
) -> pl.DataFrame:
    """Query strings of one split with all their deepest classes.

    Args:
        dataset: With Iconclass entities (ids ``ic:...``).
        split: ``train`` or ``heldout``.
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


def fit_linear_head(
    vectors: np.ndarray,
    leaves: Sequence[Sequence[str]],
    *,
    epochs: int = 30,
    batch: int = 1024,
    learning_rate: float = 0.02,
    validation_share: float = 0.05,
    seed: int = 0,
) -> tuple[torch.nn.Linear, list[str]]:
    """Train multinomial logistic regression on frozen vectors; the target of a query is uniform over its leaves.

    Args:
        vectors: ``(N, D)`` float32, finite.
        leaves: Leaves of each query, at least one.
        epochs: Passes over the data; the weights of the pass with the best validation loss are
            kept.
        batch: Queries per step.
        learning_rate: Of AdamW, falling along a cosine.
        validation_share: Queries kept to choose the pass.
        seed: Order and split.

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
    classes = sorted({leaf for row in leaves for leaf in row})
    number = {leaf: i for i, leaf in enumerate(classes)}
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(vectors))
    held = max(1, int(validation_share * len(vectors)))
    check, train = order[:held], order[held:]
    # Unit rows have entries near 1/sqrt(D): brought to unit scale, one learning rate fits every
    # width.
    inputs = (
        torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)) * vectors.shape[1] ** 0.5
    )
    counts = torch.tensor([len(row) for row in leaves])
    flat = torch.tensor([number[leaf] for row in leaves for leaf in row])
    starts = torch.cumsum(counts, 0) - counts
    torch.manual_seed(seed)
    head = torch.nn.Linear(vectors.shape[1], len(classes))
    torch.nn.init.zeros_(head.weight)
    optimiser = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=1e-3)
    steps = epochs * max(1, -(-len(train) // batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    best, kept = float("inf"), {name: value.clone() for name, value in head.state_dict().items()}
    for _ in range(epochs):
        shuffled = rng.permutation(train)
        for start in range(0, len(shuffled), batch):
            rows = torch.from_numpy(shuffled[start : start + batch])
            loss = _soft_loss(head(inputs[rows]), rows, starts, counts, flat)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            rows = torch.from_numpy(check)
            value = float(_soft_loss(head(inputs[rows]), rows, starts, counts, flat))
        if value < best:
            best, kept = value, {name: weight.clone() for name, weight in head.state_dict().items()}
    head.load_state_dict(kept)
    return head, classes


def _soft_loss(
    logits: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    flat: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy against a target that is uniform over each query's leaves."""
    number = counts[rows]
    owner = torch.repeat_interleave(torch.arange(len(rows)), number)
    offset = torch.arange(len(owner)) - torch.repeat_interleave(
        torch.cumsum(number, 0) - number, number
    )
    leaf = flat[starts[rows][owner] + offset]
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p[owner, leaf] / number[owner]).sum() / len(rows)


def predict_leaves(head: torch.nn.Linear, classes: Sequence[str], vectors: np.ndarray) -> list[str]:
    """The most probable leaf of each vector."""
    with torch.no_grad():
        logits = head(
            torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
            * vectors.shape[1] ** 0.5
        )
    return [classes[i] for i in logits.argmax(dim=1).tolist()]


@dataclass(frozen=True, kw_only=True)
class FastTextConfig:
    """How fastText is trained; the defaults suit short multilingual queries better than its own (words only, 5 passes)."""

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
        raise MissingDependency("fasttext-wheel", "baselines", "The fastText yardstick") from error
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
    """The most probable leaf of each text; empty where fastText knows nothing of the text."""
    # model.predict asks numpy for a copy in a way that numpy 2 refuses; the binding below it does
    # not.
    found = [model.f.predict(" ".join(words_of(text)) + "\n", 1, 0.0, "strict") for text in texts]
    return [row[0][1].removeprefix("__label__") if row else "" for row in found]


@dataclass(frozen=True)
class HierarchicalScores:
    """How well predicted paths meet the true ones."""

    queries: int
    precision: Interval
    """Hierarchical precision: the share of predicted classes (the leaf and those above it) that are true classes of the query."""
    recall: float
    """Hierarchical recall: the share of the true classes that were predicted; one path cannot cover several."""
    level: dict[int, Interval]
    """Level -> share of queries whose class at that level is a true one; queries without one that deep are left out."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
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
    """Score one predicted leaf per query (Kiritchenko et al., 2006; several true paths are merged into one set of classes).

    Args:
        predicted: Leaf of each query; empty: no prediction, which counts as one wrong class.
        leaves: True leaves of each query.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
    """
    right, said, true = (np.zeros(len(predicted)) for _ in range(3))
    hits, known = np.zeros((LEVELS, len(predicted))), np.zeros((LEVELS, len(predicted)))
    for i, (leaf, row) in enumerate(zip(predicted, leaves, strict=True)):
        path = class_path(leaf)
        truth = {node for label in row for node in class_path(label)}
        right[i], said[i], true[i] = len(truth.intersection(path)), max(1, len(path)), len(truth)
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
        QuerySums(right / said, np.ones(len(predicted))), resamples=resamples, seed=seed
    )
    return HierarchicalScores(
        len(predicted),
        precision,
        float((right / true).mean()) if len(predicted) else float("nan"),
        levels,
    )
