"""The enrichment benchmark's own arithmetic: hiding titles, spoiling captions, intervals, the noise threshold, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from benchmarks.enrichment import TABLE_3, TABLE_4, Setting, apply_setting, interval, noise_threshold, summarise

CATALOGUE = pl.DataFrame({"id": [str(i) for i in range(100)], "title": [f"title {i}" for i in range(100)]})


def setting_of(noise: float | None, hidden: float = 0.5) -> Setting:
    return Setting(table="3", name="x", features=("text", "caption"), hidden_titles=hidden, caption_noise=noise)


def test_hidden_titles_come_back_as_captions() -> None:
    rows = apply_setting(CATALOGUE, setting_of(0.0), seed=1)
    hidden = rows.filter(pl.col("title_hidden"))
    assert hidden.height == 50
    assert (hidden["title"] == "").all()
    assert hidden["caption"].to_list() == [f"title {i}" for i in hidden["id"].to_list()]
    assert (rows.filter(~pl.col("title_hidden"))["caption"] == "").all()


def test_noise_gives_captions_of_other_pins_and_hides_the_same_titles() -> None:
    clean, noisy = (apply_setting(CATALOGUE, setting_of(n, hidden=1.0), seed=1) for n in (0.0, 0.3))
    assert (clean["caption"] != noisy["caption"]).sum() == 30
    assert set(noisy["caption"]) <= set(CATALOGUE["title"])
    assert clean["title_hidden"].equals(noisy["title_hidden"])


def test_without_captions_and_without_hiding_nothing_changes() -> None:
    rows = apply_setting(CATALOGUE, TABLE_4[3], seed=1)
    assert rows["title"].equals(CATALOGUE["title"])
    assert (rows["caption"] == "").all()
    assert (apply_setting(CATALOGUE, TABLE_3[0], seed=1)["caption"] == "").all()


def test_intervals_are_student_s() -> None:
    assert interval([0.5]) is None
    assert interval([0.4, 0.5, 0.6]) == pytest.approx(4.303 * 0.1 / 3**0.5)


@pytest.mark.parametrize(
    ("means", "expected"), [([0.6, 0.55, 0.45, 0.4], 0.2), ([0.6, 0.59, 0.58, 0.57], None), ([0.4, 0.3, 0.2, 0.1], 0.0)]
)
def test_the_threshold_is_where_recall_falls_to_that_without_captions(means: list[float], expected: float | None) -> None:
    rows = [{"table": "3", "caption_noise": None, "mean": 0.5}]
    rows += [{"table": "3", "caption_noise": n, "mean": m} for n, m in zip((0.0, 0.1, 0.3, 0.5), means, strict=True)]
    found = noise_threshold(rows)
    assert found == (pytest.approx(expected) if expected is not None else None)


def test_what_is_missing_is_shown_as_missing(tmp_path: Path) -> None:
    sizes = {"steps": 1, "batch_pairs": 2}
    for seed, value in ((0, 0.4), (2, 0.6)):
        result = {"recall@10": value, "recall@10_hidden": None, "languages": {"en": value}}
        (tmp_path / f"{TABLE_4[0].key}-1-2-seed{seed}.json").write_text(json.dumps(result))
    rows = summarise(TABLE_4, tmp_path, 3, sizes)
    assert (rows[0]["seeds"], rows[0]["mean"], rows[0]["languages"]) == (2, 0.5, {"en": 0.5})
    assert all(row["mean"] is None and row["seeds"] == 0 for row in rows[1:])


def test_tables_share_no_key_by_accident() -> None:
    keys = [s.key for s in TABLE_3]
    assert len(set(keys)) == len(keys)
    assert len({s.key for s in TABLE_4}) == 10
