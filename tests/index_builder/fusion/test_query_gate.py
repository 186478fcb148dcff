"""The query gate: fitted within its bound of lost hits, and measured on what it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.fusion.nonsense import nonsense_queries
from index_builder.fusion.query_gate import (
    MOST_HITS_LOST,
    GateCases,
    QueryGate,
    fit_gate,
)


def drawn(real: tuple[float, float], seed: int, count: int = 400) -> GateCases:
    """Real queries with signals around ``real``, and nonsense around (0.4, 0.2)."""
    rng = np.random.default_rng(seed)
    asked = rng.normal(real, 0.08, (count, 2)).clip(0, 1)
    nonsense = rng.normal((0.4, 0.2), 0.08, (count, 2)).clip(0, 1)
    return GateCases(asked, rng.integers(0, 4, count).astype(float), nonsense)


def lost_share(gate: QueryGate, cases: GateCases) -> float:
    return cases.counts(gate)[1] / float(cases.hits.sum())


def test_fit_nonsense_apart_from_queries_is_emptied() -> None:
    gate = fit_gate(drawn((0.8, 0.7), 0))
    assert gate is not None
    assert gate.measure.nonsense_emptied > 0.95 and gate.measure.hits_lost < 0.02
    fresh = drawn((0.8, 0.7), 1)
    assert fresh.counts(gate)[0] > 380 and lost_share(gate, fresh) < 0.02


def test_fit_query_that_has_one_of_both_signals_is_kept() -> None:
    """Half of the real queries are near a known one, half share words: neither alone tells."""
    near, worded = drawn((0.8, 0.2), 2), drawn((0.4, 0.7), 3)
    both = GateCases(
        np.concatenate([near.asked, worded.asked]),
        np.concatenate([near.hits, worded.hits]),
        near.nonsense,
    )
    gate = fit_gate(both)
    assert gate is not None
    assert gate.measure.nonsense_emptied > 0.9 and gate.measure.hits_lost < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_fit_nonsense_like_queries_loses_no_more_than_the_bound(seed: int) -> None:
    cases = drawn((0.45, 0.25), seed)
    gate = fit_gate(cases)
    assert gate is not None
    assert lost_share(gate, cases) <= MOST_HITS_LOST
    assert 0 < gate.measure.nonsense_emptied < 0.5


def test_fit_few_queries_or_no_hits_give_no_gate() -> None:
    cases = drawn((0.8, 0.7), 0)
    assert fit_gate(cases._replace(asked=cases.asked[:99], hits=cases.hits[:99])) is None
    assert fit_gate(cases._replace(nonsense=cases.nonsense[:0])) is None
    assert fit_gate(cases._replace(hits=np.zeros(400))) is None


@pytest.mark.slow
@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_fit_bound_holds_whatever_the_signals(seed: int, cosine: float, share: float) -> None:
    cases = drawn((cosine, share), seed, count=120)
    gate = fit_gate(cases)
    assert gate is not None
    assert lost_share(gate, cases) <= MOST_HITS_LOST
    assert np.isfinite(gate[:2]).all()


def test_nonsense_queries_are_distinct_and_the_same_each_time() -> None:
    first = nonsense_queries(500)
    assert len(set(first)) == 500 and first == nonsense_queries(500)
    assert len(set(first) & set(nonsense_queries(500, seed=7))) < 200
