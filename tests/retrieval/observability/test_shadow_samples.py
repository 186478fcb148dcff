"""Shadow samples: of the served release only, and released once replayed."""

import gc
import time
import weakref
from types import SimpleNamespace

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from retrieval.observability.metrics import Metrics
from retrieval.observability.shadow_recall import WINDOW_SECONDS, Sample, ShadowRecall
from tests.helpers.serving.real_server import SmallStore, serving
from tests.helpers.waiting import until


class Index:
    entity_type = "pin"

    def search(self, vector: np.ndarray, k: int, **options: object) -> SimpleNamespace:
        return SimpleNamespace(ids=["a"], scores=np.ones(1, np.float32))


def sample(index: Index) -> Sample:
    return Sample(
        entity_index=index,  # type: ignore[arg-type]
        live=None,
        vector=np.ones(4, np.float32),
        k=1,
        filter="",
        exclude_ids=(),
        min_score=None,
        ids=["a"],
        scores=np.ones(1, np.float32),
        selectivity=None,
        language="en",
    )


def test_shadow_queued_sample_of_former_release_is_dropped() -> None:
    shadow = ShadowRecall(0.0, 1.0, Metrics())
    shadow.offer(sample(Index()))
    shadow.forget()
    queued = shadow._queue.get_nowait()
    assert queued is not None
    assert shadow.replay(queued[1], queued[0]) is None and not shadow.estimates()
    assert shadow.replay(sample(Index())) == 1.0 and len(shadow.estimates()) == 1


def test_shadow_replayed_sample_is_released_before_the_next() -> None:
    shadow = ShadowRecall(1.0, 1.0, Metrics())
    index = Index()
    gone = weakref.ref(index)
    shadow.offer(sample(index))
    until(lambda: shadow.done == 1)
    del index
    until(lambda: gone() is None or gc.collect() < 0)
    shadow.close()


def test_shadow_samples_older_than_window_are_dropped(monkeypatch) -> None:
    shadow = ShadowRecall(0.0, 1.0, Metrics())
    now = time.monotonic()
    for age in (3 * WINDOW_SECONDS, 2 * WINDOW_SECONDS, 1.0):
        monkeypatch.setattr(
            "retrieval.observability.shadow_recall.time.monotonic", lambda age=age: now - age
        )
        shadow.replay(sample(Index()))
    (window,) = shadow._windows.values()
    assert len(window) == 1
    monkeypatch.setattr(
        "retrieval.observability.shadow_recall.time.monotonic", lambda: now + 2 * WINDOW_SECONDS
    )
    assert not shadow.estimates() and not shadow._windows


def test_server_blas_has_one_thread(small_store: SmallStore) -> None:
    with threadpool_limits(2, user_api="blas"):
        pass  # a limit set earlier is lifted again
    # Exact scans of shadow recall must stay within their share of a core
    with serving(small_store):
        threads = [
            pool["num_threads"]
            for pool in threadpool_info()
            if pool["user_api"] == "blas" and "numpy" in pool["filepath"]
        ]
        assert threads == [1]
