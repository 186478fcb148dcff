"""``omni features``: score given (query, entity) pairs, for a ranker that comes after retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import click
import polars as pl

from encoders.commands.console import handle_errors, json_option, print_json, say
from encoders.commands.reading_flags import reading_flags
from encoders.commands.table_output import TableOutput
from encoders.errors import ConfigError, SchemaError
from encoders.tables.files import raise_malformed
from encoders.tables.parts import table_files
from encoders.tables.reading import read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import ENTITY_TYPES, MALFORMED, ROW
from encoders.text.normal_forms import normalized_query
from index_builder.commands.store_option import full_release_id, open_store, store_option
from index_builder.fusion.pair_features import FEATURES, PairScorer
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.release import Release

CHUNK_ROWS = 20_000
_KEY = ("query", "entity_type", "entity_id")


class Scores(Protocol):
    """What scores the pairs of a chunk."""

    def score(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """Score ``query``, ``entity_type``, ``entity_id``; one row a pair, in their order."""
        ...


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("pairs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Table to write (.parquet, .jsonl or .csv).",
)
@store_option
@click.option("--release", "release_id", help="Default: the active release.")
@click.option(
    "--also",
    multiple=True,
    metavar="NAME=STORE",
    help="Further store, of another space: adds the column cosine_NAME. Repeatable.",
)
@click.option(
    "--server",
    metavar="HOST:PORT",
    help="Ask a running server instead of opening a store: the cosine alone.",
)
@click.option(
    "--entity-type",
    type=click.Choice(ENTITY_TYPES),
    help="Type of every pair where the files have no column entity_type.",
)
@json_option
@handle_errors
@reading_flags
def command(
    pairs: tuple[Path, ...],
    out: Path,
    store_path: Path,
    release_id: str | None,
    also: tuple[str, ...],
    server: str | None,
    entity_type: str | None,
    as_json: bool,
    reading: ReadingOptions,
) -> None:
    """Write the scores of each pair of PAIRS (query, entity_type, entity_id) beside its columns.

    Columns: cosine; lexical (BM25 as a share of the highest it could be); votes (of known queries
    near this one); fused (by the release's weights); known_queries (how many known queries led to
    the entity). Live writes count. They are null where the entity is not in the release. Files are
    read and written in chunks.

    Example: omni features pairs.parquet --store store --out features.parquet
    """
    if server is not None and (release_id or also):
        raise ConfigError("--server answers from its own release: leave --release and --also out.")
    scorers: dict[str, Scores] = {}
    if server is not None:
        scorers[""] = _ServerScorer(server)
    else:
        scorers[""] = _open_scorer(store_path, release_id)
        scorers |= {name: _open_scorer(Path(store), None) for name, store in _named(also).items()}
    missing = 0
    with TableOutput(out) as output:
        for chunk in _chunks(pairs, entity_type, reading):
            scored = _score(chunk, scorers)
            missing += scored["cosine"].null_count()
            output.write(scored)
    if as_json:
        print_json({"pairs": output.rows, "not_in_release": missing, "out": str(out)})
        return
    say(f"wrote {out}: {output.rows:,} pairs, {missing:,} of entities that are not in the release")


def _named(also: tuple[str, ...]) -> dict[str, str]:
    """Read ``NAME=STORE`` options."""
    stores: dict[str, str] = {}
    for given in also:
        name, separator, store = given.partition("=")
        if not (name.isidentifier() and separator and store) or name in stores:
            raise ConfigError(
                f"--also {given!r}: expected NAME=STORE, each NAME once, of letters, digits and _."
            )
        stores[name] = store
    return stores


def _open_scorer(store_path: Path, release_id: str | None) -> PairScorer:
    from encoders.towers.query_tower import QueryEncoder

    store = open_store(store_path)
    release: Release = (
        store.open(full_release_id(store, release_id)) if release_id else store.open_current()
    )
    LiveFollower(store, release).catch_up()
    tower = QueryEncoder.load(release.query_encoder_path)
    return PairScorer(release.fused, tower.encode)


class _ServerScorer:
    """The cosines of a running server, all of the release that it serves at the start."""

    def __init__(self, address: str) -> None:
        from retrieval.client import RetrievalClient

        self._client = RetrievalClient(address)
        release = self._client.describe_release()
        self._release_id = release.release_id
        self._most = release.limits.max_score_ids

    def score(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """Ask once per query and entity type, or more often where there are very many ids."""
        parts = [pl.DataFrame(schema={"cosine": pl.Float32, "row": pl.UInt32})]
        numbered = pairs.with_row_index("row")
        grouped = numbered.group_by("entity_type", "query", maintain_order=True)
        for (entity_type, text), group in grouped:
            for part in group.iter_slices(self._most):
                ids = part["entity_id"].to_list()
                found = self._client.score(
                    str(text), ids, str(entity_type), release_id=self._release_id
                )
                parts.append(part.select(pl.Series("cosine", found.scores), "row"))
        scored = pl.concat(parts).sort("row")
        return scored.select(pl.col("cosine").fill_nan(None))


def _chunks(
    paths: tuple[Path, ...], entity_type: str | None, reading: ReadingOptions
) -> Iterator[pl.DataFrame]:
    """Yield pairs with their key columns as texts.

    Raises:
        SchemaError: A column is missing, is one that is written, or holds nothing.
    """
    for file in table_files(paths):
        for raw in read_chunks(file, reading, chunk_rows=CHUNK_ROWS):
            raise_malformed(raw, file.name)
            rows = raw.drop(ROW, MALFORMED, strict=False)
            if "entity_type" not in rows.columns and entity_type is not None:
                rows = rows.with_columns(entity_type=pl.lit(entity_type))
            absent = [name for name in _KEY if name not in rows.columns]
            if absent:
                raise SchemaError(
                    f"{file.name}: missing column(s) {', '.join(absent)}; it has"
                    f" {', '.join(rows.columns)}. Name them with --rename, or give --entity-type."
                )
            taken = [name for name in rows.columns if name in FEATURES]
            if taken:
                raise SchemaError(
                    f"{file.name}: the column(s) {', '.join(taken)} would be written twice. Rename"
                    " them with --rename."
                )
            rows = rows.with_columns(pl.col(_KEY).cast(pl.String))
            blank = rows.filter(
                pl.any_horizontal(pl.col(_KEY).fill_null("").str.strip_chars() == "")
            )
            if blank.height:
                raise SchemaError(
                    f"{file.name}: {blank.height:,} rows lack one of {', '.join(_KEY)}. Drop them."
                )
            yield rows


def _score(chunk: pl.DataFrame, scorers: dict[str, Scores]) -> pl.DataFrame:
    """Add the features of the first release, and the cosine of each further one."""
    key = chunk.select(normalized_query(pl.col("query")), "entity_type", "entity_id")
    features = []
    for name, scorer in scorers.items():
        found = scorer.score(key)
        features.append(found.select(pl.col("cosine").alias(f"cosine_{name}")) if name else found)
    return pl.concat([chunk, *features], how="horizontal")
