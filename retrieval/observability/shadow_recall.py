"""Shadow recall: a sample of live searches is answered again exactly, within a CPU budget."""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from index_builder.fusion.fused_search import FusedIndex
from index_builder.search.entity_index import EntityIndex, SearchOptions
from index_builder.search.live_segments import LiveView
from retrieval.observability.metric_catalogue import Labels
from retrieval.observability.metrics import Metrics

Float32 = npt.NDArray[np.float32]
log = logging.getLogger(__name__)

WINDOW = 2000
"""Samples per label that the estimate looks back on."""
WINDOW_SECONDS = 900.0
MINUTE_SECONDS = 60.0
"""The short window, so that new damage does not hide behind 15 minutes of good answers."""
Z_95 = 1.959964
TIE = 1e-5
"""A returned score this close to the k-th exact score counts as found."""


class FusedQuestion(NamedTuple):
    """What a fused search was asked beside its vector."""

    legs: FusedIndex
    text: str
    weights: tuple[float, float, float] | None
    """None: the release's."""


class Sample(NamedTuple):
    """One answered search, with the live entries that it saw."""

    entity_index: EntityIndex
    live: LiveView | None
    vector: Float32
    k: int
    filter: str
    exclude_ids: Sequence[str]
    min_score: float | None
    ids: Sequence[str]
    scores: Float32
    """By which ``ids`` are ordered: cosines, or fused scores."""
    selectivity: float | None
    language: str
    fused: FusedQuestion | None = None
    """None: by vectors alone."""


class Estimate(NamedTuple):
    """ANN recall@k over a window of live searches with its 95% interval."""

    recall: float
    low: float
    high: float
    samples: int


def recall_of_answer(
    ids: Sequence[str], scores: Float32, exact_ids: Sequence[str], exact_scores: Float32
) -> float:
    """Return the share of the exact top k that was returned; ties with the k-th score count.

    It is 1 if the exact answer is empty.
    """
    if not exact_ids:
        return 1.0
    known = set(exact_ids)
    threshold = float(exact_scores[-1]) - TIE
    found = sum(
        1
        for id, score in zip(ids, scores.tolist(), strict=False)
        if id in known or score >= threshold
    )
    return min(1.0, found / len(exact_ids))


def estimate(recalls: Sequence[float]) -> Estimate:
    """Estimate the mean of per-query recalls with Wilson's 95% interval.

    The interval is widened by the observed variance; 1.0 on few samples is not certain.

    Args:
        recalls: One value in 0..1 per query.
    """
    count = len(recalls)
    if count == 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    values = np.asarray(recalls)
    mean = float(values.mean())
    spread = float(values.var(ddof=1)) if count > 1 else 0.25
    binomial = mean * (1 - mean)
    # A query's k hits are correlated: n queries count as more than n coin flips only as far as
    # their variance says so.
    effective = count * (binomial / spread) if spread > 0 and binomial > 0 else float(count)
    effective = max(1.0, effective)
    z = Z_95
    scale = 1 + z * z / effective
    centre = (mean + z * z / (2 * effective)) / scale
    half = z * math.sqrt(binomial / effective + z * z / (4 * effective * effective)) / scale
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half), count)


def selectivity_bucket(selectivity: float | None) -> str:
    """Return the class of a filter: none, >50%, 10-50%, 1-10%, <1%."""
    if selectivity is None:
        return "none"
    for bound, name in ((0.5, ">50%"), (0.1, "10-50%"), (0.01, "1-10%")):
        if selectivity >= bound:
            return name
    return "<1%"


def _exact_answer(sample: Sample) -> tuple[Sequence[str], Float32]:
    """Answer a sample again, every leg exact; returns ids and the scores that order them."""
    options: SearchOptions = {
        "exact": True,
        "exclude_ids": sample.exclude_ids,
        "min_score": sample.min_score,
        "filter": sample.filter or None,
        "live": sample.live,  # later writes are no fault of the answer
    }
    if sample.fused is None:
        found = sample.entity_index.search(sample.vector, sample.k, **options)
        return found.ids, found.scores
    legs, text, weights = sample.fused
    query = legs.query(text, sample.vector, exact=True)
    found = legs.search(query, sample.k, options, weights)
    assert found.fused is not None
    return found.ids, found.fused.scores


class ShadowRecall:
    """Replays sampled searches exactly in one thread that keeps to its share of a core.

    Args:
        fraction: Share of searches offered that are sampled.
        cpu: Share of one core that replays may use.
        metrics: Where estimates appear.
        max_queue: Sampled searches that may wait; more are skipped.
        languages: At most this many languages get their own label, later ones share ``other`` (a
            caller may send anything).
    """

    def __init__(
        self,
        fraction: float,
        cpu: float,
        metrics: Metrics,
        *,
        max_queue: int = 64,
        languages: int = 40,
        seed: int = 0,
    ) -> None:
        self._fraction = fraction
        self._cpu = max(cpu, 1e-3)
        self._metrics = metrics
        self._random = random.Random(seed).random
        self._queue: queue.Queue[tuple[int, Sample] | None] = queue.Queue(max_queue)
        self._generation = 0  # of the release that is served
        self._languages: set[str] = set()
        self._max_languages = languages
        self._windows: dict[Labels, deque[tuple[float, float]]] = {}
        self._lock = threading.Lock()
        self.skipped = 0
        self.done = 0
        self._thread: threading.Thread | None = None
        if fraction > 0:
            self._thread = threading.Thread(target=self._run, name="shadow-recall", daemon=True)
            self._thread.start()
            metrics.add_source(self._measurements)

    def wants(self) -> bool:
        """Draw whether this search is sampled; takes about 50 ns."""
        return self._random() < self._fraction

    def offer(self, sample: Sample) -> None:
        """Queue a sample; skipped when the queue is full."""
        try:
            self._queue.put_nowait((self._generation, sample))
        except queue.Full:
            self.skipped += 1

    def close(self) -> None:
        """Stop the thread."""
        if self._thread is not None:
            while True:
                try:
                    self._queue.put_nowait(None)
                    break
                except queue.Full:
                    self._queue.get_nowait()
            self._thread.join(timeout=5)

    def forget(self) -> None:
        """Drop all samples: another release is served, and they say nothing about it."""
        with self._lock:
            self._generation += 1
            self._windows.clear()

    def estimates(self, seconds: float = WINDOW_SECONDS) -> dict[Labels, Estimate]:
        """Estimate recall per (entity type, selectivity, language) over the last ``seconds``."""
        now = time.monotonic()
        oldest = now - seconds
        with self._lock:
            gone = [
                labels
                for labels, window in self._windows.items()
                if window[-1][0] < now - WINDOW_SECONDS
            ]
            for labels in gone:
                del self._windows[labels]
            windows = {
                labels: [recall for at, recall in window if at >= oldest]
                for labels, window in self._windows.items()
            }
        return {labels: estimate(recalls) for labels, recalls in windows.items() if recalls}

    def _run(self) -> None:
        from retrieval.process_tuning import lower_thread_priority

        lower_thread_priority()
        while (queued := self._queue.get()) is not None:
            started = time.thread_time()
            try:
                self.replay(queued[1], queued[0])
            except Exception as error:  # of a measurement: serving must not notice
                log.warning("a shadow search failed: %s: %s", type(error).__name__, error)
            # It holds the index, which must not outlive its release while this thread waits
            del queued
            spent = time.thread_time() - started
            time.sleep(min(60.0, spent * (1.0 / self._cpu - 1.0)))

    def replay(self, sample: Sample, generation: int | None = None) -> float | None:
        """Answer one sample exactly and record its recall; None if its release is not served."""
        if generation not in (None, self._generation):
            return None
        recall = recall_of_answer(sample.ids, sample.scores, *_exact_answer(sample))
        labels = (
            sample.entity_index.entity_type,
            selectivity_bucket(sample.selectivity),
            self._language(sample.language),
        )
        now = time.monotonic()
        with self._lock:
            if generation not in (None, self._generation):
                return None
            window = self._windows.setdefault(labels, deque(maxlen=WINDOW))
            while window and window[0][0] < now - WINDOW_SECONDS:
                window.popleft()
            window.append((now, recall))
        self._metrics.count("omni_shadow_samples", labels)
        self.done += 1
        return recall

    def _language(self, language: str) -> str:
        name = language[:12].lower()
        if name in self._languages:
            return name
        if len(self._languages) < self._max_languages and name.replace("-", "").isalnum():
            self._languages.add(name)
            return name
        return "other" if name else "unknown"

    def _measurements(self) -> list[tuple[str, Labels, float]]:
        rows: list[tuple[str, Labels, float]] = [("omni_shadow_skipped", (), float(self.skipped))]
        for labels, found in self.estimates().items():
            rows.append(("omni_shadow_recall", labels, found.recall))
            rows.append(("omni_shadow_recall_low", labels, found.low))
            rows.append(("omni_shadow_recall_high", labels, found.high))
        for labels, found in self.estimates(MINUTE_SECONDS).items():
            rows.append(("omni_shadow_recall_minute", labels, found.recall))
            rows.append(("omni_shadow_recall_minute_high", labels, found.high))
        return rows
