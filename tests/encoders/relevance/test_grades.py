"""Grades are on the disk at once, resume, and belong to one judge at a time."""

from __future__ import annotations

import polars as pl
import pytest

from encoders.errors import ConfigError, DataError
from encoders.relevance.grades import (
    GradeBook,
    annotation_grades,
    blank_sheet,
    grades_of_sheet,
    read_all_grades,
)
from encoders.relevance.sample import Sample
from encoders.tables.files import read_table
from tests.helpers.judged_systems import small_dataset


def test_grade_book_resumes_where_it_stopped(sample: Sample) -> None:
    with GradeBook(sample, "ann", "person") as book:
        book.save({3: 2})
        book.save({1: 0, 2: 3})
        book.save({3: 1, 2: None})
    with GradeBook(sample, "ann", "person") as book:
        assert book.grades == {1: 0, 3: 1}


def test_grade_book_file_is_a_table_of_judgements(sample: Sample) -> None:
    with GradeBook(sample, "ann", "person") as book:
        book.save({1: 3})
    table = read_table(sample.path / "grades" / "ann.jsonl", "judgements")
    first = sample.items.select("query", "entity_id").row(0)
    assert table.select("query", "entity_id", "grade").rows() == [(*first, 3)]


def test_grade_book_all_taken_back_leaves_an_empty_one(sample: Sample) -> None:
    with GradeBook(sample, "ann", "person") as book:
        book.save({1: 3})
        book.save({1: None})
    with GradeBook(sample, "ann", "person") as book:
        assert book.grades == {}


def test_grade_book_second_of_one_judge_is_refused(sample: Sample) -> None:
    with (
        GradeBook(sample, "ann", "person"),
        GradeBook(sample, "bo", "person"),
        pytest.raises(ConfigError, match="another process grades as 'ann'"),
    ):
        GradeBook(sample, "ann", "person")
    GradeBook(sample, "ann", "person").close()


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65])
def test_grade_book_name_that_is_no_file_is_refused(sample: Sample, name: str) -> None:
    with pytest.raises(ConfigError, match="--judge"):
        GradeBook(sample, name, "person")


def test_grade_book_other_kind_of_judge_is_refused(sample: Sample) -> None:
    with GradeBook(sample, "ann", "model") as book:
        book.save({1: 1})
    with pytest.raises(ConfigError, match="kind 'model'"):
        GradeBook(sample, "ann", "person")


@pytest.mark.parametrize(("item", "grade"), [(0, 1), (37, 1), (1, 4), (1, -1)])
def test_save_refuses_unknown_items_and_grades(sample: Sample, item: int, grade: int) -> None:
    with GradeBook(sample, "ann", "person") as book:
        with pytest.raises(DataError):
            book.save({2: 1, item: grade})
        assert book.grades == {}


def test_read_all_grades_without_any_says_how_to_grade(sample: Sample) -> None:
    with pytest.raises(DataError, match="omni judge page"):
        read_all_grades(sample)


def test_sheet_goes_out_and_comes_back(sample: Sample) -> None:
    sheet = blank_sheet(sample)
    assert sheet.height == 36 and "entity_id" not in sheet.columns
    filled = sheet.with_columns(
        grade=pl.when(pl.col("item") < 3).then(pl.lit(" 2 ")).otherwise(pl.lit(""))
    )
    assert grades_of_sheet(filled) == {1: 2, 2: 2}
    with pytest.raises(DataError, match=r"row 1.*'good'"):
        grades_of_sheet(filled.with_columns(grade=pl.lit("good")))
    with pytest.raises(DataError, match="grade"):
        grades_of_sheet(filled.drop("grade"))


def test_annotation_grades_right_things_and_their_near_duplicates(sample: Sample) -> None:
    pairs = small_dataset().pairs
    grades = annotation_grades(sample, pairs, {})
    right = dict(pairs.select("query", "entity_id").iter_rows())
    wanted = [
        3 * (right[query] == entity_id)
        for query, entity_id in sample.items.select("query", "entity_id").iter_rows()
    ]
    assert grades.to_list() == wanted and sum(wanted) == 3 * 12
    everything = {f"p{i}": "one" for i in range(6)}
    assert set(annotation_grades(sample, pairs, everything)) == {3}
