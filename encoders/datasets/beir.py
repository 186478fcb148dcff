"""Read a folder in the form of BEIR: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``.

Documents become pins. ``qrels/test.tsv`` is the public test set: its split is ``public-test``,
since ``test`` is the half of held-out queries that a release's record reads.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from encoders.errors import DataError, SchemaError

PUBLIC_TEST = "public-test"
_SPLITS = {"test": PUBLIC_TEST}
"""Name of a qrels file -> split; the others are splits of their own name."""
_QRELS = ("query-id", "corpus-id", "score")


def is_beir(folder: Path) -> bool:
    """Tell whether a folder is in the form of BEIR."""
    names = ("corpus.jsonl", "queries.jsonl")
    return all((folder / name).is_file() for name in names) and (folder / "qrels").is_dir()


def read_beir(folder: Path) -> dict[str, pl.DataFrame]:
    """Read documents, and the judged pairs of all splits.

    Returns:
        ``catalogue`` and ``pairs`` with ``grade``; pairs that are judged 0 are left out, and so are
        those of queries or documents that are not in the files.

    Raises:
        DataError: A file is unreadable, or there are no qrels.
        SchemaError: A file lacks a column.
    """
    corpus = _json_lines(folder / "corpus.jsonl")
    title = pl.col("title").fill_null("") if "title" in corpus.columns else pl.lit("")
    catalogue = corpus.select(
        pl.col("_id").alias("id"),
        pl.lit("pin").alias("entity_type"),
        title.alias("title"),
        pl.col("text").fill_null("").alias("description"),
    )
    queries = _json_lines(folder / "queries.jsonl").select("_id", pl.col("text").alias("query"))
    paths = sorted((folder / "qrels").glob("*.tsv"))
    if not paths:
        raise DataError(f"{folder}: expected qrels/*.tsv, found none. Unpack the whole data set.")
    judged = pl.concat(
        [
            _qrels(path).with_columns(split=pl.lit(_SPLITS.get(path.stem, path.stem)))
            for path in paths
        ]
    )
    pairs = (
        judged.filter(pl.col("score") > 0)
        .join(queries, left_on="query-id", right_on="_id", maintain_order="left")
        .join(catalogue.select("id"), left_on="corpus-id", right_on="id", maintain_order="left")
        .select(
            "query",
            pl.lit("").alias("language"),
            pl.lit("").alias("country"),
            pl.lit("pin").alias("entity_type"),
            pl.col("corpus-id").alias("entity_id"),
            pl.format("grade {}", "score").alias("action"),
            pl.lit(1, pl.Int64).alias("count"),
            "split",
            pl.col("score").alias("grade"),
        )
    )
    return {"catalogue": catalogue, "pairs": pairs}


def _json_lines(path: Path) -> pl.DataFrame:
    try:
        frame = pl.read_ndjson(path, infer_schema_length=1000, ignore_errors=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{path}: not readable as JSON Lines ({str(error).splitlines()[0]})."
        ) from error
    missing = [name for name in ("_id", "text") if name not in frame.columns]
    if missing:
        raise SchemaError(f"{path}: expected the keys _id and text; {', '.join(missing)} missing.")
    texts = [name for name in ("_id", "title", "text") if name in frame.columns]
    return frame.select(pl.col(texts).cast(pl.String)).filter(pl.col("_id").is_not_null())


def _qrels(path: Path) -> pl.DataFrame:
    try:
        frame = pl.read_csv(path, separator="\t", infer_schema=False, glob=False, quote_char=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{path}: not readable as tab-separated UTF-8 ({str(error).splitlines()[0]})."
        ) from error
    missing = [name for name in _QRELS if name not in frame.columns]
    if missing:
        raise SchemaError(
            f"{path}: expected the header {' '.join(_QRELS)}; {', '.join(missing)} missing."
        )
    score = pl.col("score").cast(pl.Int64, strict=False)
    bad = frame.filter(score.is_null())
    if bad.height:
        raise DataError(f"{path}: score {bad['score'][0]!r} is no whole number.")
    return frame.select("query-id", "corpus-id", score)
