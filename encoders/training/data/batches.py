"""Choose the pairs and random negatives of each step, over all processes, from seed and step alone.

Nothing remembers the previous step, so a run resumed at any step sees the same batches to the bit,
on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from encoders.config.train_config import TrainConfig
from encoders.training.data.prepare import PreparedData
from encoders.training.data.sampling import PairSet

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DatasetBatch:
    """One step's pairs and negatives of one dataset, over all processes."""

    pairs: Int64
    """Pair numbers, ``(G,)``."""
    negatives: Int64
    """Places in the pool, ``(R,)``."""
    negative_folds: Int64
    """Cross-fit view each negative is seen in, ``(R,)``."""


@dataclass(frozen=True)
class ShardedBatch:
    """One dataset's part of a batch, and which rows of it one process works on."""

    pair_set: PairSet
    batch: DatasetBatch
    rank: int
    processes: int

    @property
    def own_pairs(self) -> slice:
        """This process's part of ``batch.pairs``."""
        return process_slice(len(self.batch.pairs), self.rank, self.processes)

    @property
    def own_negatives(self) -> slice:
        """This process's part of ``batch.negatives``."""
        return process_slice(len(self.batch.negatives), self.rank, self.processes)


class BatchPlan:
    """Chooses what each step sees: a pure function of seed and step, the same on every process.

    Args:
        prepared: From ``prepare``.
        config: The run.
        processes: Parts each batch is cut into.
    """

    def __init__(self, prepared: PreparedData, config: TrainConfig, processes: int = 1) -> None:
        self._prepared, self._config, self._processes = prepared, config, processes
        self._cumulative = [
            np.cumsum(s.weights, dtype=np.float64) if s.weighted else None
            for s in prepared.pair_sets
        ]

    def negatives_per_step(self, dataset: int) -> int:
        """Return how many random negatives a dataset has per step, a multiple of the processes."""
        pair_set, loss = self._prepared.pair_sets[dataset], self._config.loss
        ratio = loss.random_negatives
        if pair_set.is_related_queries:
            ratio = loss.random_query_negatives
        wanted = min(round(ratio * self._prepared.pairs_per_step[dataset]), len(pair_set.pool))
        return wanted // self._processes * self._processes

    def step(self, step: int) -> list[DatasetBatch]:
        """Return the batch of one step, per dataset, of all processes together."""
        return [self._dataset(step, dataset) for dataset in range(len(self._prepared.pair_sets))]

    def _dataset(self, step: int, dataset: int) -> DatasetBatch:
        rng = np.random.default_rng((self._config.seed, 2, dataset, step))
        pairs = self._pairs(step, dataset, rng)
        pool, count = len(self._prepared.pair_sets[dataset].pool), self.negatives_per_step(dataset)
        negatives = np.arange(pool) if count == pool else rng.choice(pool, count, replace=False)
        folds = rng.integers(0, len(self._prepared.catalogue_views), count)
        return DatasetBatch(pairs=pairs, negatives=negatives, negative_folds=folds)

    def _pairs(self, step: int, dataset: int, rng: np.random.Generator) -> Int64:
        """Draw pairs by weight, or take the next of this epoch's order."""
        size = len(self._prepared.pair_sets[dataset].queries)
        wanted = self._prepared.pairs_per_step[dataset]
        cumulative = self._cumulative[dataset]
        if cumulative is not None:
            drawn = rng.random(wanted) * cumulative[-1]
            found: Int64 = np.searchsorted(cumulative, drawn, side="right")
            return np.minimum(found, size - 1)
        places = np.arange(step * wanted, (step + 1) * wanted)
        epochs = places // size
        pairs = np.empty(wanted, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            order = _permutation(self._config.seed, dataset, epoch, size)
            pairs[chosen] = order[places[chosen] % size]
        return pairs


@lru_cache(maxsize=32)
def _permutation(seed: int, dataset: int, epoch: int, size: int) -> Int64:
    return np.random.default_rng((seed, 1, dataset, epoch)).permutation(size)


def process_slice(size: int, rank: int, processes: int) -> slice:
    """Return the part of ``size`` rows that a process works on; ``size`` is a multiple of them."""
    share = size // processes
    return slice(rank * share, (rank + 1) * share)
