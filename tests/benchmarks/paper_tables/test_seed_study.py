"""Resuming a study of many trainings, and its intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper_tables.seed_study import Job, interval, read_results, result_path, run_missing

SIZES = {"steps": 3, "batch_pairs": 8}


def job(work: Path, key: str, seed: int, done: list[str], value: float = 0.5) -> Job:
    def run() -> dict[str, Any]:
        done.append(f"{key} {seed}")
        return {"value": value}

    return Job(result_path(work, key, SIZES, seed), key, run)


def test_seed_study_existing_result_is_not_trained_again(tmp_path: Path) -> None:
    done: list[str] = []
    run_missing([job(tmp_path, "a", 0, done), job(tmp_path, "b", 0, done)])
    run_missing([job(tmp_path, "a", 0, done, 0.9), job(tmp_path, "a", 1, done)])
    assert done == ["a 0", "b 0", "a 1"]
    assert read_results(tmp_path, "a", SIZES, 3) == {0: {"value": 0.5}, 1: {"value": 0.5}}


def test_seed_study_failed_training_leaves_no_file(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_missing(
            [job(tmp_path, "a", 0, []), Job(result_path(tmp_path, "b", SIZES, 0), "b", fails)]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a-3-8-seed0.json"]


def test_seed_study_result_not_json_leaves_no_file(tmp_path: Path) -> None:
    path = result_path(tmp_path, "a", SIZES, 0)
    with pytest.raises(TypeError):
        run_missing([Job(path, "a", lambda: {"value": object()})])
    assert not path.exists()


def test_seed_study_time_over_starts_no_training(tmp_path: Path) -> None:
    done: list[str] = []
    run_missing([job(tmp_path, "a", 0, done)], max_minutes=1e-9)
    assert not done


def test_result_path_other_sizes_are_other_files(tmp_path: Path) -> None:
    run_missing([job(tmp_path, "a", 0, [])])
    assert read_results(tmp_path, "a", SIZES | {"steps": 4}, 1) == {}


def test_interval_equals_student_t() -> None:
    assert interval([0.5]) is None
    assert interval([0.4, 0.5, 0.6]) == pytest.approx(4.303 * 0.1 / 3**0.5)
