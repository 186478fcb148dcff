"""The enrichment benchmark's own arithmetic: hiding titles, spoiling captions, intervals, the noise
threshold, resuming.
"""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from benchmarks.paper_tables.enrichment import (
    TABLE_3,
    TABLE_4,
    Setting,
    apply_setting,
    load_pins,
    noise_threshold,
    summarise,
    train_and_evaluate,
)

CATALOGUE = pl.DataFrame(
    {"id": [str(i) for i in range(100)], "title": [f"title {i}" for i in range(100)]}
)


def setting_of(noise: float) -> Setting:
    return Setting(table="3", name="x", features=("titles", "captions"), caption_noise=noise)


def test_apply_setting_hidden_titles_become_captions() -> None:
    rows = apply_setting(CATALOGUE, setting_of(0.0), seed=1)
    hidden = rows.filter(pl.col("title_hidden"))
    assert hidden.height == 50
    assert (hidden["title"] == "").all()
    assert hidden["caption"].to_list() == [f"title {i}" for i in hidden["id"].to_list()]
    kept = rows.filter(~pl.col("title_hidden"))
    assert kept["title"].to_list() == [f"title {i}" for i in kept["id"].to_list()]
    assert (kept["caption"] == "").all()
    assert rows.filter("new").height == 25
    assert rows.filter("new")["title_hidden"].all()


def test_apply_setting_more_noise_spoils_more_captions() -> None:
    clean, some, half = (apply_setting(CATALOGUE, setting_of(n), seed=1) for n in (0.0, 0.3, 0.5))
    spoiled = [set(rows.filter(rows["caption"] != clean["caption"])["id"]) for rows in (some, half)]
    assert 0 < len(spoiled[0]) < len(spoiled[1])
    assert spoiled[0] < spoiled[1]
    assert set(half["caption"]) <= {*CATALOGUE["title"], ""}
    assert clean["title_hidden"].equals(half["title_hidden"])


@pytest.mark.parametrize(
    ("means", "expected"),
    [([0.6, 0.55, 0.45, 0.4], 0.2), ([0.6, 0.59, 0.58, 0.57], None), ([0.4, 0.3, 0.2, 0.1], 0.0)],
)
def test_noise_threshold_is_where_gain_ends(means: list[float], expected: float | None) -> None:
    rows: list[dict[str, object]] = [
        {"table": "3", "caption_noise": None, "mean": 0.5},
        {"table": "4", "caption_noise": 0.0, "mean": 0.1},
    ]
    noises = (0.0, 0.1, 0.3, 0.5)
    rows += [
        {"table": "3", "caption_noise": n, "mean": m, "gain": m - 0.5, "gain_interval": 0.01}
        for n, m in zip(noises, means, strict=True)
    ]
    assert noise_threshold(rows, "3") == (pytest.approx(expected) if expected is not None else None)
    assert noise_threshold([row | {"gain_interval": 0.3} for row in rows], "3") is None


def test_summarise_missing_results_are_none(tmp_path: Path) -> None:
    sizes = {"steps": 1, "batch_pairs": 2}
    for seed, value in ((0, 0.4), (2, 0.6)):
        result = {"recall@10": value, "language": {"en": value}, "kind": {"name": value}}
        hidden = result | {"recall@10": 0.1}
        (tmp_path / f"{TABLE_4[0].key}-1-2-seed{seed}.json").write_text(
            json.dumps({"all": result, "hidden": hidden})
        )
    rows = summarise(TABLE_4, tmp_path, 3, sizes)
    assert (rows[0]["seeds"], rows[0]["mean"], rows[0]["languages"]["en"]["mean"]) == (2, 0.5, 0.5)
    assert all(
        row["mean"] is None and row["seeds"] == 0
        for row in rows[1:]
        if row["setting"] != "continuous alone"
    )


def test_summarise_gains_are_per_seed_against_row_before(tmp_path: Path) -> None:
    sizes = {"steps": 1}
    for n, setting in enumerate(TABLE_4[:2]):
        for seed, value in enumerate((0.1, 0.4)):
            result = {"recall@10": value + 0.2 * n, "language": {}, "kind": {}}
            (tmp_path / f"{setting.key}-1-seed{seed}.json").write_text(
                json.dumps({"all": result, "hidden": result})
            )
    first, second = summarise(TABLE_4[:2], tmp_path, 2, sizes)
    assert (first["against"], first["gain"]) == ("continuous", 0)
    assert (second["against"], second["gain"], second["gain_interval"]) == (
        "continuous",
        pytest.approx(0.2),
        pytest.approx(0),
    )


def test_settings_equal_keys_are_equal_settings() -> None:
    same: dict[str, set[tuple]] = {}
    for s in (*TABLE_4, *TABLE_3):
        noise = s.caption_noise if "captions" in s.features else None
        same.setdefault(s.key, set()).add((frozenset(s.features), noise, s.new_pins))
    assert all(len(settings) == 1 for settings in same.values())
    assert len(same) == 28


@pytest.mark.slow
@pytest.mark.parametrize("setting", [TABLE_4[0], TABLE_4[4], TABLE_3[-1]], ids=lambda s: s.name)
def test_train_and_evaluate_reports_all_hidden_and_new_pins(
    setting: Setting,
) -> None:
    result = train_and_evaluate(
        load_pins(),
        setting,
        0,
        {"steps": 1, "batch_pairs": 32, "train_pairs": 500, "max_queries": 50},
    )
    assert 0 < result["new"]["pairs"] < result["hidden"]["pairs"] < result["all"]["pairs"]
    assert 0 <= result["all"]["recall@10"] <= 1
    assert "en" in result["all"]["language"]
