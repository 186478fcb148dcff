"""Plans of size: every figure is in its record, and more of anything never needs less."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.errors import ConfigError
from retrieval.commands.plan import command
from retrieval.sizing.figures import (
    KINDS,
    LARGE_ENTITIES,
    SEARCHED,
    SYMQG,
    Figure,
    all_figures,
)
from retrieval.sizing.model import GIB, Wanted, figures_table, plan_for, scale_table
from tests.helpers.doc_snippets import REPOSITORY
from tests.helpers.run_command import run

RESULTS = REPOSITORY / "benchmarks" / "results"
SIZES = st.integers(1, 10**10)
RATES = st.floats(0.1, 1e6)


def recorded(figure: Figure) -> Any:
    found = json.loads((RESULTS / f"{figure.record}.json").read_text())["metrics"]
    for key in figure.place:
        if isinstance(found, list):
            (found,) = (entry for entry in found if entry["engine"] == key)
        else:
            found = found[key]
    return found


@pytest.mark.parametrize("figure", all_figures(), ids=lambda figure: figure.what)
def test_figure_is_what_its_record_says(figure: Figure) -> None:
    assert figure.value == recorded(figure)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_of_a_measured_size_gives_back_what_was_measured(kind: str) -> None:
    plan = plan_for(Wanted(entities=LARGE_ENTITIES, rps=1, kind=kind, cores=1))
    figures = KINDS[kind]
    assert plan.build_cpu_hours * 3600 == pytest.approx(figures.build_large.value)
    index = 2 * (figures.private.value + figures.mapped.value) * 1e6 / GIB
    assert plan.server_memory_gib == pytest.approx(index + 670 / 1024)
    small = plan_for(Wanted(entities=100_000, rps=1, kind="symqg", cached_texts=1))
    assert small.call_cpu_us == pytest.approx(1e6 / SEARCHED.value), "that call was measured"
    assert plan.new_text_ms - small.new_text_ms == pytest.approx(
        (figures.search_large.value - SYMQG.search_small.value) / 1000
    )


@given(SIZES, SIZES, RATES, RATES)
def test_plan_of_more_needs_no_less(one: int, other: int, rate: float, other_rate: float) -> None:
    fewer, more = sorted((one, other))
    slow, fast = sorted((rate, other_rate))
    for kind in KINDS:
        small = plan_for(Wanted(entities=fewer, rps=slow, kind=kind))
        large = plan_for(Wanted(entities=more, rps=fast, kind=kind))
        for name in ("servers", "server_memory_gib", "server_cores", "call_cpu_us", "release_gib"):
            assert getattr(small, name) <= getattr(large, name), name
        assert small.build_cpu_hours <= large.build_cpu_hours


@given(SIZES, st.floats(0, 1), st.floats(0, 1))
def test_plan_caches_never_cost(entities: int, texts: float, answers: float) -> None:
    plain = Wanted(entities=entities, rps=1000)
    cached = replace(plain, cached_texts=texts, cached_answers=answers)
    assert plan_for(cached).call_cpu_us <= plan_for(plain).call_cpu_us + 1e-9


def test_plan_auto_takes_what_fits_and_says_what_does_not() -> None:
    assert plan_for(Wanted(entities=10**6, rps=1)).kind == "symqg"
    held = plan_for(Wanted(entities=40_000_000, rps=1))
    assert (held.kind, held.fits) == ("int8-graph", True)
    huge = plan_for(Wanted(entities=10**9, rps=1, latency_ms=0.1))
    assert not huge.fits and any("Milvus" in part for part in huge.parts)
    text = " ".join(huge.notes)
    assert "does not fit: a server needs 2,654 GiB" in text and "extrapolated" in text
    assert "not met: a new text takes" in text


def test_plan_within_what_was_measured_is_not_called_extrapolated() -> None:
    plan = plan_for(Wanted(entities=500_000, rps=1, cores=2))
    assert not any("extrapolated" in note for note in plan.notes)
    notes = " ".join(plan_for(Wanted(entities=500_000, rps=1, cores=2, dimension=768)).notes)
    assert "768 dimensions, measured at 256" in notes


@pytest.mark.parametrize(
    "wrong",
    [{"entities": 0}, {"rps": 0.0}, {"kind": "swift"}, {"cached_texts": 1.1}, {"cores": 0}],
    ids=str,
)
def test_wanted_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Wanted(**{"entities": 1, "rps": 1.0, **wrong})


def test_page_holds_the_tables_of_the_model() -> None:
    page = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    for table in (scale_table(), figures_table()):
        assert "\n".join(table) in page, "docs/scale.md differs from retrieval/sizing: " + table[2]


def test_plan_command_prints_a_table_and_json() -> None:
    given_flags = ("--entities", 2_000_000, "--rps", 500)
    shown = run(command, *given_flags)
    assert shown.exit_code == 0, shown.output
    assert "2,000,000 entities, 500 calls/s" in shown.stdout and "omni serve" in shown.stdout
    found = json.loads(run(command, *given_flags, "--json").stdout)
    assert found["plan"]["servers"] == 2 and found["wanted"]["dimension"] == 256
    assert {figure["record"] for figure in found["figures"]} >= {"2026-11-28-serve"}
    assert run(command, "--entities", 0, "--rps", 1).exit_code == 2
