"""Measure caption quality: automatic signs, sheets for judges, and how far the judges agree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from encoders.agreement import coincidence_matrix, identical_share, krippendorff_alpha
from encoders.errors import DataError
from encoders.text.words import words_of

GRADES = {"good": 2, "usable": 1, "wrong": 0}
"""What a judge may write: it fits; it fits partly; it says something that is not there."""

ENGLISH_SIGNS = ("a", "an", "the", "of", "with", "on", "in", "and", "is")
SHEET_COLUMNS = ("item", "judge", "id", "image", "title", "caption", "grade", "comment")


def quality_report(catalogue: pl.DataFrame) -> dict[str, Any]:
    """Count automatic signs of caption quality.

    Args:
        catalogue: With ``caption`` and perhaps ``title``.

    Returns:
        ``entities``, ``captioned``; ``words`` (mean, shortest, longest); shares of captions that
        ``repeat`` a word three times or the same word twice in a row, are ``shorter_than_3_words``,
        ``look_english`` (hold an English article or preposition), hold letters that are not Latin;
        ``shared_captions`` (share of captions another entity has, too); ``agreement_with_title``:
        mean share of the title's words that are in the caption, and the share of captions without
        any.
    """
    rows = catalogue.filter(pl.col("caption").fill_null("").str.strip_chars() != "")
    report: dict[str, Any] = {"entities": catalogue.height, "captioned": rows.height}
    if not rows.height:
        return report
    words = _words(rows["caption"])
    counts = words.list.len()
    sizes: list[int] = counts.to_list()
    frame = pl.DataFrame({"words": words, "caption": rows["caption"]}).with_row_index("row")
    most = (
        frame.explode("words")
        .group_by("row", "words")
        .len()
        .group_by("row")
        .agg(pl.col("len").max())
    )
    twice = pl.Series([any(a == b for a, b in itertools.pairwise(ws)) for ws in words.to_list()])
    thrice = frame.join(most, on="row", how="left", maintain_order="left")["len"] >= 3
    not_latin = rows["caption"].str.replace_all(r"\p{Latin}", "").str.contains(r"\p{L}")
    report |= {
        "words": {"mean": _mean(counts), "shortest": min(sizes), "longest": max(sizes)},
        "repeat": _mean(twice | thrice),
        "shorter_than_3_words": _mean(counts < 3),
        "look_english": _mean(words.list.set_intersection(list(ENGLISH_SIGNS)).list.len() > 0),
        "letters_not_latin": _mean(not_latin),
        "shared_captions": _mean(rows["caption"].is_duplicated()),
    }
    if "title" in rows.columns:
        titles = _words(rows["title"].fill_null(""))
        named = titles.list.len() > 0
        in_caption = titles.list.set_intersection(words).list.len()
        shared = in_caption.filter(named) / titles.list.unique().list.len().filter(named)
        report["agreement_with_title"] = {
            "titles": len(shared),
            "mean_share": _mean(shared),
            "none": _mean(shared == 0),
        }
    return report


def _words(texts: pl.Series) -> pl.Series:
    split = [words_of(text) for text in texts.to_list()]
    return pl.Series(texts.name, split, dtype=pl.List(pl.String))


def _mean(values: pl.Series) -> float:
    mean = values.mean()
    return round(float(mean), 4) if isinstance(mean, int | float) else 0.0


def judgement_sheet(
    catalogue: pl.DataFrame, *, items: int, judges: Sequence[str], seed: int = 0
) -> pl.DataFrame:
    """Draw captions to judge: the same for each judge, in an order of their own.

    Judges fill in ``grade``.

    Args:
        catalogue: With ``id``, ``caption`` and perhaps ``image`` and ``title``.
        items: How many captions to judge.
        judges: Names; each gets every item.
        seed: Draws and orders the items.

    Raises:
        DataError: The catalogue has no captions.
    """
    rows = catalogue.filter(pl.col("caption").fill_null("").str.strip_chars() != "")
    if not rows.height:
        raise DataError("there are no captions to judge: run omni enrich captions first")
    drawn = rows.sample(min(items, rows.height), seed=seed, shuffle=True).with_row_index(
        "item", offset=1
    )
    for name in ("image", "title"):
        if name not in drawn.columns:
            drawn = drawn.with_columns(pl.lit(None, pl.String).alias(name))
    blank = drawn.with_columns(pl.lit("").alias("grade"), pl.lit("").alias("comment"))
    sheets = [
        blank.sample(fraction=1.0, seed=seed + 1 + n, shuffle=True)
        .with_columns(pl.lit(judge).alias("judge"))
        .select(SHEET_COLUMNS)
        for n, judge in enumerate(judges)
    ]
    return pl.concat(sheets)


def read_grades(sheet: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Read grades by judge and item from filled-in sheets; items without a grade are left out.

    Raises:
        DataError: A column is missing or a grade is none of ``GRADES``.
    """
    missing = [c for c in ("item", "judge", "grade") if c not in sheet.columns]
    if missing:
        raise DataError(
            f"the sheet lacks the column(s) {', '.join(missing)}: give the sheet that was written,"
            " with grades filled in"
        )
    grades: dict[str, dict[str, int]] = {}
    for number, row in enumerate(sheet.iter_rows(named=True), start=1):
        text = str(row["grade"] or "").strip().lower()
        if not text:
            continue
        if text not in GRADES:
            raise DataError(
                f"row {number}, judge {row['judge']!r}: grade must be one of {', '.join(GRADES)},"
                f" got {text!r}"
            )
        grades.setdefault(str(row["judge"]), {})[str(row["item"])] = GRADES[text]
    return grades


def agreement(grades: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Measure how far judges agree.

    Args:
        grades: Grade by item, by judge; judges may miss items.

    Returns:
        ``judges``, ``items`` (graded by at least two), ``identical`` (share of pairs of judges and
        items with equal grades), Krippendorff's ``alpha_nominal`` and ``alpha_interval`` (1:
        perfect, 0: chance; None where all grades are equal), and the share of each grade.

    Raises:
        DataError: No item was graded by two judges.
    """
    items = sorted({item for by_item in grades.values() for item in by_item})
    rows = [[by_item.get(item, -1) for item in items] for by_item in grades.values()]
    table = np.array(rows, dtype=np.int64).reshape(len(grades), len(items))
    several = (table >= 0).sum(axis=0) >= 2
    if not several.any():
        raise DataError("agreement needs items that at least two judges graded, but there is none")
    pairs = coincidence_matrix(table, len(GRADES))
    given = table[table >= 0]
    shares = {name: float(np.mean(given == value)) for name, value in GRADES.items()}
    return {
        "judges": len(grades),
        "items": int(several.sum()),
        "identical": identical_share(pairs),
        "alpha_nominal": krippendorff_alpha(pairs, "nominal"),
        "alpha_interval": krippendorff_alpha(pairs, "interval"),
        "grades": shares,
    }
