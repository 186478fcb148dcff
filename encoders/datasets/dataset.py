"""Load data sets of pairs: the sample in the package, the larger folder, or your own tables.

The pairs of the first two are human annotations and translations, standing in for engagement. They
are not clicks, and nothing is simulated. A query string is held out as a whole, so held-out text
never reaches training through any function here.
"""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import polars as pl

from encoders.datasets.beir import is_beir, read_beir
from encoders.datasets.halves import rows_of_split
from encoders.errors import ConfigError, SchemaError
from encoders.tables.files import read_table
from encoders.text.hashing import hash_texts, seeded_hash
from encoders.text.normal_forms import fold_query, folded_queries

DEFAULT_ENGAGED_QUERIES = 20
"""Engaged queries kept per entity (paper: top ones by weighted engagement; the number is ours)."""

ANNOTATIONS = "real: human annotations and translations standing in for engagement, not clicks"

LARGE_FILES = ("entities.jsonl.gz", "pairs_train.jsonl.gz", "pairs_dev.jsonl.gz")


@dataclass(frozen=True)
class Dataset:
    """A catalogue and the pairs that train and test retrieval over it."""

    catalogue: pl.DataFrame
    """Pins, products and ads in the catalogue table's columns.

    ``board_titles`` and ``engaged_queries`` are lists of strings.
    """
    pairs: pl.DataFrame
    """The pairs table's columns and ``kind``; ``split`` is ``train`` or ``heldout``.

    ``split("dev")`` and ``split("test")`` are the halves of the latter.
    """
    images: dict[str, str] = field(default_factory=dict)
    """Entity id -> a whole SVG document."""
    groups: dict[str, str] = field(default_factory=dict)
    """Entity id -> name of its set of near-duplicates, any of which counts as a correct answer.

    An id that is not there has no near-duplicate.
    """
    name: str = "sample"
    label: str = ""
    """What the pairs are, for every table that shows them."""

    def of_type(self, entity_type: str) -> pl.DataFrame:
        """Return the catalogue rows of one entity type, in order."""
        return self.catalogue.filter(pl.col("entity_type") == entity_type)

    def split(self, split: str) -> pl.DataFrame:
        """Return the pairs of a split: ``train``, ``heldout``, or its half ``dev`` or ``test``."""
        return rows_of_split(self.pairs, split)

    @property
    def entity_types(self) -> list[str]:
        """Return the catalogue's entity types, in order of first appearance."""
        return self.catalogue["entity_type"].unique(maintain_order=True).to_list()


def load_sample(*, engaged_queries: int = DEFAULT_ENGAGED_QUERIES, images: bool = True) -> Dataset:
    """Load the data set in the package: 6,827 entities and 217,198 pairs in 17 languages.

    It has 1,594 pins, 4,855 products and 378 ads.

    Args:
        engaged_queries: At most this many train-split queries per entity in the column
            ``engaged_queries``; 0: empty lists.
        images: Also read the SVG images.

    Returns:
        The data set; ``character`` holds the emoji of a pin.
    """
    folder = resources.files("encoders.sample_data")
    entities = _read_json_lines(folder.joinpath("entities.jsonl.gz").read_bytes())
    pairs = _read_json_lines(folder.joinpath("pairs.jsonl.gz").read_bytes())
    svg = _read_svg(folder.joinpath("pictures.jsonl.gz").read_bytes()) if images else {}
    return _assemble("sample", entities, pairs, svg, {}, engaged_queries)


def load_large(
    folder: Path,
    *,
    engaged_queries: int = DEFAULT_ENGAGED_QUERIES,
    sources: Iterable[str] | None = None,
) -> Dataset:
    """Load the larger data set: 75,439 entities, 1.86 million pairs, more than 190 languages.

    Images of one emoji by several artists form one group, so any of them counts as a correct
    answer.

    Args:
        folder: Holds ``entities.jsonl.gz``, ``pairs_train.jsonl.gz`` and ``pairs_dev.jsonl.gz``, or
            a sub-folder ``large`` that does.
        engaged_queries: As in ``load_sample``.
        sources: Keep only entities whose ``source`` starts with one of these, e.g. ``("emoji",
            "icons")``.

    Raises:
        ConfigError: The folder or its files are not there.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder. Point --data (or OMNI_DATA) at a folder with your tables"
            " catalogue and pairs, or with large/."
        )
    folder = folder / "large" if (folder / "large").is_dir() else folder
    missing = [name for name in LARGE_FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"expected {', '.join(missing)} in {folder}, but they are not there. Point --data (or"
            " OMNI_DATA) at the folder with large/, or at one with your tables catalogue and pairs"
            " (`omni pairs` writes both)."
        )
    entities = _read_json_lines((folder / "entities.jsonl.gz").read_bytes())
    entities = entities.unique("id", keep="first", maintain_order=True)  # one row is there twice
    if sources is not None:
        entities = entities.filter(
            pl.any_horizontal([pl.col("source").str.starts_with(source) for source in sources])
        )
    pairs = pl.concat(
        [
            _read_array_lines(folder / "pairs_train.jsonl.gz").with_columns(split=pl.lit("train")),
            _read_array_lines(folder / "pairs_dev.jsonl.gz").with_columns(split=pl.lit("heldout")),
        ]
    )
    if "advertiser" in entities.columns:
        entities = entities.with_columns(
            pl.col("advertiser").map_elements(_one_name, return_dtype=pl.String)
        )
    ids = entities["id"].to_list()
    groups = {id: "emoji:" + id.rsplit(":", 1)[1] for id in ids if id.startswith("emoji:")}
    characters = [_character(groups[id]) if id in groups else None for id in ids]
    entities = entities.with_columns(character=pl.Series(characters, dtype=pl.String))
    return _assemble("large", entities, pairs, {}, groups, engaged_queries)


def load_tables(folder: Path, *, engaged_queries: int = DEFAULT_ENGAGED_QUERIES) -> Dataset:
    """Load your own tables ``catalogue`` and ``pairs`` from a folder.

    Each is a file, or a folder of part files, of any format that ``read_table`` reads. A catalogue
    without ``engaged_queries`` gets them from the train-split pairs.

    Raises:
        ConfigError: A table is missing.
        SchemaError: A column is missing or of the wrong type.
        RowError: A row breaks a rule of its table.
    """
    tables = {}
    for table in ("catalogue", "pairs"):
        found = sorted(
            path
            for path in folder.glob(f"{table}*")
            if path.is_dir() or path.name.split(".")[0] == table
        )
        if not found:
            raise ConfigError(
                f"expected a table {table!r} in {folder} (e.g. {table}.parquet), but found none."
                " `omni pairs` makes it."
            )
        tables[table] = read_table(found[0], table)
    catalogue, pairs = tables["catalogue"], tables["pairs"]
    if "kind" not in pairs.columns:
        pairs = pairs.with_columns(kind=pl.col("action"))
    if "engaged_queries" not in catalogue.columns:
        catalogue = with_engaged_queries(catalogue, pairs, engaged_queries)
    return Dataset(catalogue, pairs, name=folder.name, label="your data")


def load_beir(folder: Path, *, engaged_queries: int = DEFAULT_ENGAGED_QUERIES) -> Dataset:
    """Load a folder in the form of BEIR; its test set is the split ``public-test``.

    Raises:
        DataError: A file is unreadable.
    """
    tables = read_beir(folder)
    pairs = tables["pairs"].with_columns(kind=pl.col("action"))
    catalogue = with_engaged_queries(tables["catalogue"], pairs, engaged_queries)
    return Dataset(catalogue, pairs, name=folder.name, label="relevance judged by people")


def load_dataset(
    data_dir: Path | None, *, engaged_queries: int = DEFAULT_ENGAGED_QUERIES
) -> Dataset:
    """Load the sample if ``data_dir`` is None, else what it holds: BEIR, the larger set, tables."""
    if data_dir is None:
        return load_sample(engaged_queries=engaged_queries, images=False)
    if is_beir(data_dir):
        return load_beir(data_dir, engaged_queries=engaged_queries)
    large = data_dir / "large" if (data_dir / "large").is_dir() else data_dir
    if not (large / LARGE_FILES[0]).is_file() and any(data_dir.glob("catalogue*")):
        return load_tables(data_dir, engaged_queries=engaged_queries)
    return load_large(data_dir, engaged_queries=engaged_queries)


def _one_name(name: str) -> str:
    """Return an advertiser's name, given as such or as the text of a dict from locale to name.

    Of a dict: the untranslated name (``C``), else the English one, else any.
    """
    if not name.startswith("{"):
        return name
    try:
        names = ast.literal_eval(name)
    except (ValueError, SyntaxError):
        return name
    preferred = (names.get(locale) for locale in ("C", "en", "en_GB", "en-GB"))
    return str(next(filter(None, preferred), None) or next(iter(names.values()), ""))


def _assemble(
    name: str,
    entities: pl.DataFrame,
    pairs: pl.DataFrame,
    images: dict[str, str],
    groups: dict[str, str],
    cap: int,
) -> Dataset:
    """Bring annotated images and their pairs to the columns of the tables."""
    if "boards" in entities.columns:
        entities = entities.rename({"boards": "board_titles"})
    if "board_titles" in entities.columns:
        entities = entities.with_columns(pl.col("board_titles").fill_null([]))
    types = entities.select(pl.col("id").alias("entity_id"), "entity_type")
    pairs = pairs.join(types, on="entity_id", how="inner", maintain_order="left").select(
        "query",
        "language",
        pl.lit("").alias("country"),
        "entity_type",
        "entity_id",
        pl.col("kind").alias("action"),
        "kind",
        pl.lit(1, dtype=pl.Int64).alias("count"),
        pl.lit(None, dtype=pl.Datetime("us", "UTC")).alias("timestamp"),
        "split",
    )
    pairs = _without_trained_queries(pairs)
    catalogue = with_engaged_queries(entities, pairs, cap)
    return Dataset(catalogue, pairs, images, groups, name, ANNOTATIONS)


def _without_trained_queries(pairs: pl.DataFrame) -> pl.DataFrame:
    """Drop held-out pairs whose query, folded, is a train query: the files were split by another.

    That is "İslam" in the sample.
    """
    forms = pairs.select("query", "split").unique().with_columns(form=fold_query(pl.col("query")))
    is_train = pl.col("split") == "train"
    trained = forms.filter(is_train).select("form").unique()
    leaking = forms.filter(~is_train).join(trained, on="form", how="semi")["query"]
    return pairs.filter(is_train | ~pl.col("query").is_in(leaking.implode()))


def with_engaged_queries(
    catalogue: pl.DataFrame, pairs: pl.DataFrame, cap: int = DEFAULT_ENGAGED_QUERIES
) -> pl.DataFrame:
    """Add ``engaged_queries``: up to ``cap`` distinct train-split queries of each entity.

    Languages take turns, English first, the others by code; within one language a query that few
    entities share comes before one that many share (then alphabetical). Held-out pairs are never
    looked at.

    Args:
        catalogue: Rows with ``id``.
        pairs: With ``query, language, entity_id, split``.
        cap: At most this many per entity.

    Raises:
        ConfigError: ``cap`` is negative.
    """
    if cap < 0:
        raise ConfigError(f"engaged_queries must be 0 or more, but got {cap}.")
    train = pairs.lazy().filter(pl.col("split") == "train").select("query", "language", "entity_id")
    ranked = (
        train.with_columns(english=(pl.col("language") == "en"))
        .sort("english", "language", descending=[True, False])
        .unique(["query", "entity_id"], keep="first", maintain_order=True)
        .with_columns(shared=pl.len().over("query"))
        .sort("entity_id", "language", "shared", "query")
        .with_columns(turn=pl.int_range(pl.len()).over("entity_id", "language"))
        .sort(["entity_id", "turn", "english", "language"], descending=[False, False, True, False])
        .group_by("entity_id", maintain_order=True)
        .agg(pl.col("query").head(cap).alias("engaged_queries"))
        .rename({"entity_id": "id"})
    )
    kept = catalogue.drop("engaged_queries", strict=False)
    joined = kept.join(ranked.collect(), on="id", how="left", maintain_order="left")
    return joined.with_columns(pl.col("engaged_queries").fill_null([]))


def split_by_query(
    queries: Iterable[str], *, heldout_share: float = 0.1, seed: int = 0
) -> list[str]:
    """Put each query in ``train`` or ``heldout`` by a hash of its folded string.

    Queries whose folded strings are equal get the same split.

    Args:
        queries: Query strings.
        heldout_share: Expected share of distinct strings held out, in [0, 1].
        seed: Another seed, another split.

    Raises:
        ConfigError: The share is not in [0, 1].
    """
    if not 0 <= heldout_share <= 1:
        raise ConfigError(f"heldout_share must lie in [0, 1], but got {heldout_share}.")
    keys = hash_texts(folded_queries(list(queries)))
    positions = seeded_hash(keys, seed).astype(np.float64) / 2.0**64
    return ["heldout" if position < heldout_share else "train" for position in positions.tolist()]


def _read_json_lines(packed: bytes) -> pl.DataFrame:
    return pl.read_ndjson(gzip.decompress(packed), infer_schema_length=None)


def _read_array_lines(path: Path) -> pl.DataFrame:
    """Read gzipped lines of JSON arrays ``[language, query, entity_id, kind]``."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").rstrip("\n").split("\n")
    rows = pl.Series("row", lines).str.json_decode(pl.List(pl.String))
    frame = rows.to_frame().select(
        pl.col("row").list.get(i).alias(name)
        for i, name in enumerate(("language", "query", "entity_id", "kind"))
    )
    if frame["kind"].null_count():
        raise SchemaError(
            f"{path}: expected rows [language, query, entity_id, kind], but a row is shorter."
            " Unpack the file again."
        )
    return frame


def _read_svg(packed: bytes) -> dict[str, str]:
    rows = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    return {row["id"]: _svg(row["viewbox"], row["svg"]) for row in rows}


def _svg(viewbox: list[float], body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {viewbox[0]}'
        f' {viewbox[1]}">{body}</svg>'
    )


def _character(group: str) -> str:
    """Return the emoji of a group ``emoji:1F600-...``."""
    return "".join(chr(int(code, 16)) for code in group.removeprefix("emoji:").split("-"))
