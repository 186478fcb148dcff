"""Which pairs and random negatives each step sees, over all processes: a few numpy selections, derived from seed and step alone.

Notable: nothing remembers the previous step, so a run resumed at any step sees the same batches to
the bit, on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from encoders.config.train_config import TrainConfig
from encoders.training.data.prepare import PreparedData

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


class BatchPlan:
    """Which pairs and negatives each step sees: a pure function of seed and step, the same on every process.

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
        """Random negatives of a dataset per step: the wanted ratio, at most the pool, a multiple of the processes."""
        pair_set, pairs = self._prepared.pair_sets[dataset], self._prepared.pairs_per_step[dataset]
        loss = self._config.loss
        ratio = (
            loss.random_query_negatives if pair_set.is_related_queries else loss.random_negatives
        )
        wanted = min(round(ratio * pairs), len(pair_set.pool))
        return wanted // self._processes * self._processes

    def step(self, step: int) -> list[DatasetBatch]:
        """The batch of one step, per dataset, of all processes together."""
        return [self._dataset(step, dataset) for dataset in range(len(self._prepared.pair_sets))]

    def _dataset(self, step: int, dataset: int) -> DatasetBatch:
        seed, pair_set = self._config.seed, self._prepared.pair_sets[dataset]
        rng = np.random.default_rng((seed, 2, dataset, step))
        size, wanted = len(pair_set.queries), self._prepared.pairs_per_step[dataset]
        cumulative = self._cumulative[dataset]
        if cumulative is not None:
            pairs = np.minimum(
                np.searchsorted(cumulative, rng.random(wanted) * cumulative[-1], side="right"),
                size - 1,
            )
        else:
            places = np.arange(step * wanted, (step + 1) * wanted)
            epochs = places // size
            pairs = np.empty(wanted, dtype=np.int64)
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                pairs[chosen] = _permutation(seed, dataset, epoch, size)[places[chosen] % size]
        count = self.negatives_per_step(dataset)
        pool = len(pair_set.pool)
        negatives = np.arange(pool) if count == pool else rng.choice(pool, count, replace=False)
        folds = rng.integers(0, len(self._prepared.catalogue_views), count)
        return DatasetBatch(pairs=pairs, negatives=negatives, negative_folds=folds)


@lru_cache(maxsize=32)
def _permutation(seed: int, dataset: int, epoch: int, size: int) -> Int64:
    return np.random.default_rng((seed, 1, dataset, epoch)).permutation(size)


def process_slice(size: int, rank: int, processes: int) -> slice:
    """The part of ``size`` rows that process ``rank`` works on; parts are equal because sizes are multiples."""
    share = size // processes
    return slice(rank * share, (rank + 1) * share)
