"""Lifts equal a slow loop, intervals cover, the detectable effect is one."""

from __future__ import annotations

import json
import math

import numpy as np
import polars as pl
import pytest

from encoders.errors import DataError
from encoders.evaluation.metrics import (
    QuerySums,
    minimum_detectable_effect,
    paired_difference,
    relative_difference,
)
from encoders.relevance.grades import GradeBook, annotation_grades, read_all_grades
from encoders.relevance.report import grades_to_report, merged_judgements, relevance_report
from encoders.relevance.sample import Sample
from tests.helpers.judged_systems import small_dataset


def grade(sample: Sample, judge: str, grades: dict[int, int]) -> None:
    kind = "oracle" if judge == "annotations" else "person"
    with GradeBook(sample, judge, kind) as book:
        book.save(grades)


def test_report_equals_a_slow_loop(sample: Sample) -> None:
    rng = np.random.default_rng(0)
    given = {
        judge: {item: int(rng.integers(0, 4)) for item in range(1, 37)} for judge in ("a", "b")
    }
    for judge, grades in given.items():
        grade(sample, judge, grades)
    report = relevance_report(sample, read_all_grades(sample))
    item_of = {
        (query, entity): item
        for item, query, entity in sample.items.select("item", "query", "entity_id").iter_rows()
    }
    weights = dict(sample.queries.select("query", "weight").iter_rows())
    for system in ("good", "bad"):
        relevant = ndcg = 0.0
        for query, weight in weights.items():
            items = [item for (q, _), item in item_of.items() if q == query]
            gains = {item: (given["a"][item] + given["b"][item]) / 2 for item in items}
            rows = sample.results.filter(system=system, query=query).sort("rank")
            shown = [item_of[query, entity] for entity in rows["entity_id"].to_list()]
            shares = [sum(given[j][item] >= 2 for j in given) / 2 for item in shown]
            best = sorted(gains.values(), reverse=True)[:2]
            reached = sum(gains[item] / math.log2(2 + i) for i, item in enumerate(shown))
            ideal = sum(gain / math.log2(2 + i) for i, gain in enumerate(best))
            relevant += weight * sum(shares) / 2
            ndcg += weight * (reached / ideal if ideal else 0.0)
        total = sum(weights.values())
        assert report.value("relevant", system).value == pytest.approx(relevant / total)
        assert report.value("ndcg", system).value == pytest.approx(ndcg / total)
    json.dumps(report.as_dict())


def test_report_by_annotations_prefers_the_system_that_puts_them_first(sample: Sample) -> None:
    grades = annotation_grades(sample, small_dataset().pairs, {}).to_list()
    grade(sample, "annotations", dict(enumerate(grades, start=1)))
    report = relevance_report(sample, read_all_grades(sample))
    assert report.value("relevant", "good").value == report.value("relevant", "bad").value == 0.5
    assert report.value("ndcg", "good").value == 1.0
    assert report.value("ndcg", "bad").value == pytest.approx(1 / math.log2(3))
    lift = report.lift("ndcg", "good", "bad")
    assert lift.relative.value == pytest.approx(math.log2(3) - 1)
    assert lift.difference.wins == 12
    assert report.agreement["alpha_ordinal"] is None


def test_report_leaves_incomplete_queries_out(sample: Sample) -> None:
    grade(sample, "a", {item: 3 for item in range(1, 36)})
    report = relevance_report(sample, read_all_grades(sample))
    assert report.incomplete == 1
    assert sample.items["query"][-1] not in report.queries["query"].to_list()
    assert report.value("relevant", "good").value == 1.0


def test_report_without_a_complete_query_is_refused(sample: Sample) -> None:
    grade(sample, "a", {1: 3})
    with pytest.raises(DataError, match="Go on grading"):
        relevance_report(sample, read_all_grades(sample))


def test_report_alpha_of_equal_judges_is_one(sample: Sample) -> None:
    for judge in ("a", "b"):
        grade(sample, judge, {item: item % 4 for item in range(1, 37)})
    agreement = relevance_report(sample, read_all_grades(sample)).agreement
    assert agreement["items"] == 36
    assert agreement["alpha_nominal"] == agreement["alpha_ordinal"] == 1.0


def test_grades_to_report_leaves_the_oracle_out_beside_others(sample: Sample) -> None:
    grade(sample, "annotations", {1: 3})
    assert grades_to_report(read_all_grades(sample), ())["judge"].to_list() == ["annotations"]
    grade(sample, "a", {2: 1})
    grades = read_all_grades(sample)
    assert grades_to_report(grades, ())["judge"].to_list() == ["a"]
    assert grades_to_report(grades, ["annotations"])["judge"].to_list() == ["annotations"]
    with pytest.raises(DataError, match=r"'nobody'.*a, annotations"):
        grades_to_report(grades, ["nobody"])


def test_merged_judgements_round_the_mean_grade(sample: Sample) -> None:
    for judge, value in (("a", 3), ("b", 2), ("c", 2)):
        grade(sample, judge, {1: value, 2: 0})
    merged = merged_judgements(sample, read_all_grades(sample))
    assert merged["grade"].to_list() == [2, 0]
    assert merged["entity_id"].to_list() == sample.items["entity_id"][:2].to_list()


def sums(values: np.ndarray) -> QuerySums:
    return QuerySums(values, np.ones(len(values)))


def test_relative_difference_interval_covers_the_truth() -> None:
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        base = rng.random(80)
        other = base * 1.2 + rng.normal(0, 0.1, 80)
        found = relative_difference(sums(other), sums(base), resamples=300, seed=seed)
        covered += found.low <= 0.2 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_relative_difference_of_nothing_is_unknown() -> None:
    found = relative_difference(sums(np.ones(5)), sums(np.zeros(5)))
    assert all(math.isnan(value) for value in found)


@pytest.mark.slow
def test_minimum_detectable_effect_is_found_in_80_of_100_samples() -> None:
    """A true difference of that size is significant about as often as promised."""
    rng = np.random.default_rng(1)
    first, second = rng.random(400), rng.random(400)
    effect = minimum_detectable_effect(sums(first), sums(second))
    noise = first - second - (first - second).mean()
    found = 0
    for seed in range(200):
        drawn = np.random.default_rng(seed).choice(noise, 400) + effect
        result = paired_difference(sums(drawn), sums(np.zeros(400)), resamples=400, seed=seed)
        found += result.difference.low > 0
    assert 0.72 <= found / 200 <= 0.88


def test_minimum_detectable_effect_halves_with_four_times_the_queries() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.random(500), rng.random(500)
    one = minimum_detectable_effect(sums(first), sums(second))
    four = minimum_detectable_effect(sums(np.tile(first, 4)), sums(np.tile(second, 4)))
    assert four == pytest.approx(one / 2, rel=0.01)
    assert math.isnan(minimum_detectable_effect(sums(first[:1]), sums(second[:1])))


def test_weights_change_what_a_query_counts(sample: Sample) -> None:
    heavy = sample.queries["query"][0]
    weighted = sample.queries.with_columns(
        weight=pl.when(pl.col("query") == heavy).then(1000.0).otherwise(1.0)
    )
    changed = Sample(sample.path, sample.about, weighted, sample.items, sample.results)
    is_heavy = (sample.items["query"] == heavy).to_list()
    grade(sample, "a", {item: 3 * is_heavy[item - 1] for item in range(1, 37)})
    grades = read_all_grades(sample)
    assert relevance_report(changed, grades).value("relevant", "good").value > 0.98
