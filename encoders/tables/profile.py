"""Describe a table in numbers and plots: sizes, missing values, languages, duplicates."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import polars as pl

from encoders.tables.schemas import TableSchema
from encoders.text.normal_forms import fold_query

SCRIPTS = (
    "Latin",
    "Cyrillic",
    "Arabic",
    "Devanagari",
    "Han",
    "Hiragana",
    "Katakana",
    "Hangul",
    "Greek",
    "Hebrew",
    "Thai",
)
CATEGORIES = ("entity_type", "action", "split", "language", "country", "kind", "source", "grade")
HEAD_COLUMNS = ("query", "entity_id", "user_id", "board_id")


def describe_table(frame: pl.DataFrame, schema: TableSchema) -> dict[str, Any]:
    """Describe a checked table.

    Args:
        frame: The table.
        schema: Its schema.

    Returns:
        ``rows``; ``columns``: per column its dtype, share missing (null, blank or empty list),
        distinct values and mean length; ``values``: the ten most frequent values of categories;
        ``scripts``: share of texts per script; ``duplicates``; ``head``: how unevenly queries,
        entities and users are spread; ``time``: first and last timestamp.
    """
    return {
        "table": schema.name,
        "rows": frame.height,
        "columns": [_describe_column(frame[name]) for name in frame.columns],
        "values": {name: _frequent(frame[name]) for name in CATEGORIES if name in frame.columns},
        "scripts": _scripts(frame),
        "duplicates": _duplicates(frame),
        "head": {name: spread(frame[name]) for name in HEAD_COLUMNS if name in frame.columns},
        "time": _time(frame),
    }


def filled_shares(frame: pl.DataFrame, columns: Collection[str]) -> dict[str, float]:
    """Return the share of rows in which each of some columns has a value; 0 where it is absent."""
    return {
        name: round(1 - _describe_column(frame[name])["missing_share"], 4)
        if name in frame.columns and frame.height
        else 0.0
        for name in sorted(columns)
    }


def _describe_column(values: pl.Series) -> dict[str, Any]:
    """Describe one column: type, share missing, distinct values, mean length."""
    if isinstance(values.dtype, pl.List | pl.Array):
        sizes = values.list.len() if isinstance(values.dtype, pl.List) else values.arr.len()
        missing = int((sizes.fill_null(0) == 0).sum())
        distinct = None
        length = sizes.mean()
    elif values.dtype == pl.String:
        missing = int((values.fill_null("").str.strip_chars() == "").sum())
        distinct = values.n_unique()
        length = values.str.len_chars().mean()
    else:
        missing = values.null_count()
        length = None
        distinct = None if values.dtype.is_nested() else values.n_unique()
    return {
        "column": values.name,
        "type": str(values.dtype),
        "missing_share": missing / len(values) if len(values) else 0.0,
        "distinct": distinct,
        "mean_length": float(length) if isinstance(length, int | float) else None,
    }


def _frequent(values: pl.Series, n: int = 10) -> dict[str, int]:
    """Count the most frequent values of a column."""
    counts = (
        values.cast(pl.String)
        .fill_null("")
        .value_counts()
        .sort(["count", values.name], descending=[True, False])
        .head(n)
    )
    return {value or "(empty)": count for value, count in counts.iter_rows()}


def _scripts(frame: pl.DataFrame) -> dict[str, float]:
    """Return the share of texts (queries, else titles) that hold a letter of each script."""
    name = next((n for n in ("query", "title") if n in frame.columns), None)
    if name is None or not frame.height:
        return {}
    texts = frame[name].drop_nulls()
    shares = {script: texts.str.contains(rf"\p{{{script}}}").mean() for script in SCRIPTS}
    return {
        script: float(share)
        for script, share in shares.items()
        if isinstance(share, float) and share > 0
    }


def _duplicates(frame: pl.DataFrame) -> dict[str, int]:
    """Count repeated rows, titles and spellings of queries."""
    found: dict[str, int] = {}
    plain = [n for n, t in frame.schema.items() if not t.is_nested()]
    if plain and frame.height:
        found["rows that repeat an earlier row"] = frame.height - frame.select(plain).n_unique()
    if "title" in frame.columns and "id" in frame.columns:
        titled = frame.filter(pl.col("title").fill_null("") != "")
        titles = titled.select(fold_query(pl.col("title")))["title"]
        found["entities whose title another entity has, too"] = int(titles.is_duplicated().sum())
    if "query" in frame.columns:
        queries = frame.select("query", fold_query(pl.col("query")).alias("folded")).unique()
        found["query forms that differ only in case, width or spaces"] = (
            queries["query"].n_unique() - queries["folded"].n_unique()
        )
    return found


def spread(values: pl.Series) -> dict[str, float]:
    """Measure how unevenly rows are spread over the values of a column.

    Returns:
        ``distinct`` values; the share of rows of the most frequent 1% and 10% of values; the share
        of values seen once.
    """
    counts = values.value_counts()["count"].sort(descending=True).cast(pl.Int64)
    total = len(values)
    if not total:
        return {
            "distinct": 0,
            "top_1_percent_share": 0.0,
            "top_10_percent_share": 0.0,
            "seen_once_share": 0.0,
        }
    return {
        "distinct": len(counts),
        "top_1_percent_share": int(counts.head(max(1, len(counts) // 100)).sum()) / total,
        "top_10_percent_share": int(counts.head(max(1, len(counts) // 10)).sum()) / total,
        "seen_once_share": int((counts == 1).sum()) / len(counts),
    }


def _time(frame: pl.DataFrame) -> dict[str, str]:
    if "timestamp" not in frame.columns or not frame["timestamp"].count():
        return {}
    return {"first": str(frame["timestamp"].min()), "last": str(frame["timestamp"].max())}


def plot_table(frame: pl.DataFrame, description: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the description as PNG files: missing shares, languages, head to tail, rows per day.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def save(name: str, title: str) -> None:
        pyplot.title(title)
        pyplot.tight_layout()
        written.append(folder / f"{name}.png")
        pyplot.savefig(written[-1], dpi=110)
        pyplot.close()

    names = [c["column"] for c in description["columns"]]
    pyplot.figure(figsize=(7, 0.3 * len(names) + 1.2))
    pyplot.barh(names, [100 * c["missing_share"] for c in description["columns"]])
    pyplot.xlabel("missing, % of rows")
    save("missing", f"{description['table']}: missing values")
    if len(description["values"].get("language", {})) > 1:
        languages = description["values"]["language"]
        pyplot.figure(figsize=(7, 3))
        pyplot.bar(list(languages), list(languages.values()))
        pyplot.ylabel("rows")
        save("languages", f"{description['table']}: most frequent languages")
    heads = [n for n in HEAD_COLUMNS if n in frame.columns and frame.height]
    if heads:
        pyplot.figure(figsize=(6, 4))
        for name in heads:
            counts = frame[name].value_counts()["count"].sort(descending=True)
            pyplot.loglog(range(1, len(counts) + 1), counts.to_list(), label=name)
        pyplot.xlabel("rank")
        pyplot.ylabel("rows")
        pyplot.legend()
        save("head_and_tail", f"{description['table']}: from head to tail")
    if description["time"]:
        days = (
            frame.filter(pl.col("timestamp").is_not_null())
            .group_by(pl.col("timestamp").dt.date().alias("day"))
            .len()
            .sort("day")
        )
        pyplot.figure(figsize=(7, 3))
        pyplot.plot(days["day"].to_list(), days["len"].to_list())
        pyplot.ylabel("rows per day")
        pyplot.xticks(rotation=30)
        save("days", f"{description['table']}: rows per day")
    return written
