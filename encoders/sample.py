"""Load data sets of real pairs (the sample in the package, the larger folder) and derive from them queries as entities and related queries.

The pairs are human annotations and translations, standing in for engagement: people chose these words for these pictures. They are not
clicks, and nothing is simulated. A query string is held out as a whole, so held-out text never reaches training through any function here.
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
from scipy.sparse import csr_matrix

from encoders.count_min_sketch import hash_texts, mix64
from encoders.errors import ConfigError, SchemaError
from encoders.tables import read_table

DEFAULT_ENGAGED_QUERIES = 20
"""Engaged queries kept per entity (paper: top ones by weighted engagement; the number is ours)."""

TEXT_COLUMNS = ("title", "description", "caption", "board_titles", "engaged_queries", "category", "brand", "color", "material", "pattern")
"""Catalogue columns that hold text to search."""

RELATED_BLOCK = 4096
"""Queries whose partners are found at once; bounds the memory of the product."""

ANNOTATIONS = "real: human annotations and translations standing in for engagement, not clicks"

LARGE_FILES = ("entities.jsonl.gz", "pairs_train.jsonl.gz", "pairs_dev.jsonl.gz")


@dataclass(frozen=True)
class Dataset:
    """A catalogue and the pairs that train and test retrieval over it."""

    catalogue: pl.DataFrame
    """Pins, products and ads in the catalogue table's columns; ``board_titles`` and ``engaged_queries`` are lists of strings."""
    pairs: pl.DataFrame
    """``query, language, country, entity_type, entity_id, action, kind, count, timestamp, split``; split is ``train`` or ``heldout``."""
    pictures: dict[str, str] = field(default_factory=dict)
    """Entity id -> a whole SVG document."""
    groups: dict[str, str] = field(default_factory=dict)
    """Entity id -> name of its set of near-duplicates; any member counts as a correct answer. An id without a line stands alone."""
    name: str = "sample"
    label: str = ""
    """What the pairs are, for every table that shows them."""

    def of_type(self, entity_type: str) -> pl.DataFrame:
        """The catalogue rows of one entity type, in order."""
        return self.catalogue.filter(pl.col("entity_type") == entity_type)

    def split(self, split: str) -> pl.DataFrame:
        """The pairs of one split, ``train`` or ``heldout``."""
        return self.pairs.filter(pl.col("split") == split)

    @property
    def entity_types(self) -> list[str]:
        """Entity types of the catalogue, in order of first appearance."""
        return self.catalogue["entity_type"].unique(maintain_order=True).to_list()


def fold_query(texts: pl.Expr) -> pl.Expr:
    """The form under which two query strings are one: NFKC, lower case, white space trimmed and collapsed."""
    return texts.str.normalize("NFKC").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()


def load_sample(*, engaged_queries: int = DEFAULT_ENGAGED_QUERIES, pictures: bool = True) -> Dataset:
    """The data set in the package: 1,594 pins, 4,855 products, 378 ads, 217,198 pairs in 17 languages.

    Args:
        engaged_queries: At most this many train-split queries per entity in the column ``engaged_queries``; 0: empty lists.
        pictures: Also read the SVG pictures.

    Returns:
        The data set; ``character`` holds the emoji of a pin.
    """
    folder = resources.files("encoders.sample_data")
    entities = _read_json_lines(folder.joinpath("entities.jsonl.gz").read_bytes())
    pairs = _read_json_lines(folder.joinpath("pairs.jsonl.gz").read_bytes())
    svg = _read_svg(folder.joinpath("pictures.jsonl.gz").read_bytes()) if pictures else {}
    return _assemble("sample", entities, pairs, svg, {}, engaged_queries)


def load_large(folder: Path, *, engaged_queries: int = DEFAULT_ENGAGED_QUERIES, sources: Iterable[str] | None = None) -> Dataset:
    """The larger data set: 75,439 entities and 1.86 million pairs in more than 190 languages, for training and evaluation runs.

    Pictures of one emoji by several artists form one group, so any of them counts as a correct answer.

    Args:
        folder: Holds ``entities.jsonl.gz``, ``pairs_train.jsonl.gz`` and ``pairs_dev.jsonl.gz``, or a sub-folder ``large`` that does.
        engaged_queries: As in ``load_sample``.
        sources: Keep only entities whose ``source`` starts with one of these, e.g. ``("emoji", "icons")``.

    Raises:
        ConfigError: The folder or its files are not there.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder. Point --data (or OMNI_DATA) at a folder with your tables catalogue and pairs, or with large/."
        )
    folder = folder / "large" if (folder / "large").is_dir() else folder
    missing = [name for name in LARGE_FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"expected {', '.join(missing)} in {folder}, but they are not there. Point --data (or OMNI_DATA) at the folder with large/, "
            "or at one with your tables catalogue and pairs (`omni pairs` writes both)."
        )
    entities = _read_json_lines((folder / "entities.jsonl.gz").read_bytes()).unique(
        "id", keep="first", maintain_order=True
    )  # one row is there twice
    if sources is not None:
        entities = entities.filter(pl.any_horizontal([pl.col("source").str.starts_with(source) for source in sources]))
    pairs = pl.concat(
        [
            _read_array_lines(folder / "pairs_train.jsonl.gz").with_columns(split=pl.lit("train")),
            _read_array_lines(folder / "pairs_dev.jsonl.gz").with_columns(split=pl.lit("heldout")),
        ]
    )
    if "advertiser" in entities.columns:
        entities = entities.with_columns(pl.col("advertiser").map_elements(_one_name, return_dtype=pl.String))
    groups = {id: "emoji:" + id.rsplit(":", 1)[1] for id in entities["id"].to_list() if id.startswith("emoji:")}
    entities = entities.with_columns(
        character=pl.Series([_character(groups[id]) if id in groups else None for id in entities["id"].to_list()], dtype=pl.String)
    )
    return _assemble("large", entities, pairs, {}, groups, engaged_queries)


def load_tables(folder: Path, *, engaged_queries: int = DEFAULT_ENGAGED_QUERIES) -> Dataset:
    """Your own data: the tables ``catalogue`` and ``pairs`` of a folder, each a file or a folder of part files in any format we read.

    A catalogue without ``engaged_queries`` gets them from the train-split pairs.

    Raises:
        ConfigError: A table is missing.
        SchemaError: A column is missing or of the wrong type.
        RowError: A row breaks a rule of its table.
    """
    tables = {}
    for table in ("catalogue", "pairs"):
        found = sorted(path for path in folder.glob(f"{table}*") if path.is_dir() or path.name.split(".")[0] == table)
        if not found:
            raise ConfigError(f"expected a table {table!r} in {folder} (e.g. {table}.parquet), but found none. `omni pairs` makes it.")
        tables[table] = read_table(found[0], table)
    catalogue, pairs = tables["catalogue"], tables["pairs"]
    pairs = pairs.with_columns(kind=pl.col("action")) if "kind" not in pairs.columns else pairs
    if "engaged_queries" not in catalogue.columns:
        catalogue = with_engaged_queries(catalogue, pairs, engaged_queries)
    return Dataset(catalogue, pairs, name=folder.name, label="your data")


def load_dataset(data_dir: Path | None, *, engaged_queries: int = DEFAULT_ENGAGED_QUERIES) -> Dataset:
    """The sample in the package when ``data_dir`` is None; else the larger data set or your own tables, whichever the folder holds."""
    if data_dir is None:
        return load_sample(engaged_queries=engaged_queries, pictures=False)
    large = data_dir / "large" if (data_dir / "large").is_dir() else data_dir
    if not (large / LARGE_FILES[0]).is_file() and any(data_dir.glob("catalogue*")):
        return load_tables(data_dir, engaged_queries=engaged_queries)
    return load_large(data_dir, engaged_queries=engaged_queries)


def _one_name(name: str) -> str:
    """An advertiser's name; some come as the text of a dict from locale to name: the untranslated one (``C``), else English, else any."""
    if not name.startswith("{"):
        return name
    try:
        names = ast.literal_eval(name)
    except (ValueError, SyntaxError):
        return name
    return str(names.get("C") or names.get("en") or names.get("en_GB") or names.get("en-GB") or next(iter(names.values()), ""))


def _assemble(
    name: str, entities: pl.DataFrame, pairs: pl.DataFrame, pictures: dict[str, str], groups: dict[str, str], cap: int
) -> Dataset:
    entities = entities.rename({"boards": "board_titles"}) if "boards" in entities.columns else entities
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
    return Dataset(with_engaged_queries(entities, pairs, cap), pairs, pictures, groups, name, ANNOTATIONS)


def with_engaged_queries(catalogue: pl.DataFrame, pairs: pl.DataFrame, cap: int = DEFAULT_ENGAGED_QUERIES) -> pl.DataFrame:
    """Add ``engaged_queries``: up to ``cap`` distinct train-split queries of each entity, languages taken in turn, specific ones first.

    Within one language a query that few entities share comes before one that many share (then alphabetical); English goes first in each
    turn, the others by code. Held-out pairs are never looked at.

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
    unique = train.with_columns(english=(pl.col("language") == "en")).sort("english", "language", descending=[True, False])
    unique = unique.unique(["query", "entity_id"], keep="first", maintain_order=True)
    ranked = (
        unique.with_columns(shared=pl.len().over("query"))
        .sort("entity_id", "language", "shared", "query")
        .with_columns(turn=pl.int_range(pl.len()).over("entity_id", "language"))
        .sort(["entity_id", "turn", "english", "language"], descending=[False, False, True, False])
        .group_by("entity_id", maintain_order=True)
        .agg(pl.col("query").head(cap).alias("engaged_queries"))
        .rename({"entity_id": "id"})
    )
    kept = catalogue.drop("engaged_queries", strict=False)
    return kept.join(ranked.collect(), on="id", how="left", maintain_order="left").with_columns(pl.col("engaged_queries").fill_null([]))


def query_entities(pairs: pl.DataFrame, split: str | None = None) -> pl.DataFrame:
    """The fourth entity type: distinct query strings as catalogue rows.

    Args:
        pairs: With ``query, language, split`` and ``count``.
        split: Keep only queries of this split.

    Returns:
        ``id`` (the string itself), ``entity_type`` = ``query``, ``title`` (the same string), ``language`` (the most frequent, ties
        alphabetical), ``count`` (sum over its pairs), ``split``; most frequent first, then alphabetical.
    """
    kept = pairs if split is None else pairs.filter(pl.col("split") == split)
    by_language = (
        kept.group_by("query", "language", "split").agg(pl.col("count").sum()).sort(["count", "language"], descending=[True, False])
    )
    by_query = by_language.group_by("query", "split", maintain_order=True).agg(pl.col("language").first(), pl.col("count").sum())
    return by_query.sort(["count", "query"], descending=[True, False]).select(
        pl.col("query").alias("id"), pl.lit("query").alias("entity_type"), pl.col("query").alias("title"), "language", "count", "split"
    )


def related_query_pairs(
    pairs: pl.DataFrame, *, per_query: int = 5, max_entities: int = 40, partners_per_entity: int = 200, seed: int = 0
) -> pl.DataFrame:
    """Derive related-query pairs: names of one entity in two languages, and queries that share rare entities. Derived, not logged.

    The weight of two queries is the sum over the entities they share of ``1 / log2(1 + n)``, n being the entity's number of queries
    (an Adamic-Adar score), divided by ``sqrt(d1 * d2)``, d being a query's number of entities; translations of a name (``kind`` ``name``
    or ``title`` on both sides) get 1 on top. The right-hand side is always a train-split query. A pair is ``train`` when its left query
    is, else ``heldout``: no held-out string stands in a train pair on either side.

    Args:
        pairs: Query-entity pairs with ``query, language, entity_id, kind, split``.
        per_query: Keep this many of the best partners of each query.
        max_entities: Ignore queries with more entities than this: they are related to everything.
        partners_per_entity: An entity with more train queries than this lends only so many, drawn by ``seed``, as partners.
        seed: Chooses those, and the order of partners with equal weight.

    Returns:
        The pairs table with ``entity_type`` = ``query``, ``entity_id`` = the related query, ``kind`` ``derived_translation`` or
        ``derived_shared``, and ``weight`` (float32); queries alphabetical, best partner first.
    """
    edges = pairs.select("query", "language", "entity_id", "kind", "split").unique(
        ["query", "entity_id"], keep="first", maintain_order=True
    )
    edges = edges.with_columns(
        degree=pl.len().over("query"),
        queries=pl.len().over("entity_id"),
        name=pl.col("kind").is_in(["name", "title"]),
        luck=pl.Series(mix64(hash_texts(edges["query"].to_list()), seed)),
    ).filter(pl.col("degree") <= max_entities)
    if edges.is_empty():
        return _related_table(pairs.head(0).select("query", "language", "split"), [], np.zeros(0, np.float32), np.zeros(0, bool))
    nodes = edges.group_by("query", maintain_order=True).agg(pl.col("language").first(), pl.col("split").first()).sort("query")
    nodes = nodes.with_columns(same=fold_query(pl.col("query")).rank("dense"))
    rows = edges["query"].cast(pl.Enum(nodes["query"])).to_physical().to_numpy().astype(np.int64)
    columns = edges["entity_id"].rank("dense").to_numpy().astype(np.int64) - 1
    lent = (pl.col("split") == "train") & (pl.col("luck").rank("ordinal").over("entity_id", "split") <= partners_per_entity)
    right = edges.select(lent.alias("lent"))["lent"].to_numpy()
    shape = (nodes.height, int(columns.max()) + 1)
    value = (1.0 / np.sqrt(edges["degree"].to_numpy())).astype(np.float32)
    rarity = (1.0 / np.log2(1.0 + edges["queries"].to_numpy())).astype(np.float32)
    named = edges["name"].to_numpy()
    left_side = csr_matrix((value * rarity, (rows, columns)), shape)
    right_side = csr_matrix((value[right], (columns[right], rows[right])), shape[::-1])
    left_names = csr_matrix((np.ones(named.sum(), np.float32), (rows[named], columns[named])), shape)
    both = named & right
    right_names = csr_matrix((np.ones(both.sum(), np.float32), (columns[both], rows[both])), shape[::-1])
    same = nodes["same"].to_numpy()
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, nodes.height, RELATED_BLOCK):
        block = slice(start, start + RELATED_BLOCK)
        names = left_names[block] @ right_names
        names.data[:] = 1.0
        found.append(_best_partners(left_side[block] @ right_side, names, start, same, per_query, seed))
    from_row, to_row, weight, translated = (np.concatenate(parts) for parts in zip(*found, strict=True))
    queries = nodes["query"]
    return _related_table(nodes[from_row].select("query", "language", "split"), queries.gather(to_row).to_list(), weight, translated)


def _best_partners(
    shared: csr_matrix, names: csr_matrix, start: int, same: np.ndarray, per_query: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The best partners of a block of queries: (query rows, partner rows, weights, whether a translation), best first per query."""
    total = (shared + names).tocoo()
    rows, columns, weights = total.row.astype(np.int64) + start, total.col.astype(np.int64), total.data
    different = same[rows] != same[columns]
    rows, columns, weights = rows[different], columns[different], weights[different]
    luck = mix64(rows.astype(np.uint64) * np.uint64(len(same)) + columns.astype(np.uint64), seed)
    order = np.lexsort((luck, -weights, rows))
    rows, columns, weights = rows[order], columns[order], weights[order]
    first = np.searchsorted(rows, rows, side="left")
    kept = np.arange(len(rows)) - first < per_query
    # A shared-entity weight never exceeds 1 (degrees and rarities are at most 1 each), so above 1 there is a translation in it.
    return rows[kept], columns[kept], weights[kept], weights[kept] > 1.0


def _related_table(left: pl.DataFrame, right: list[str], weight: np.ndarray, translated: np.ndarray) -> pl.DataFrame:
    kind = pl.Series("kind", np.where(translated, "derived_translation", "derived_shared").tolist(), dtype=pl.String)
    return left.select(
        "query",
        "language",
        pl.lit("").alias("country"),
        pl.lit("query").alias("entity_type"),
        pl.Series("entity_id", right, dtype=pl.String),
        kind.alias("action"),
        kind,
        pl.lit(1, dtype=pl.Int64).alias("count"),
        pl.lit(None, dtype=pl.Datetime("us", "UTC")).alias("timestamp"),
        "split",
        pl.Series("weight", weight, dtype=pl.Float32),
    )


def split_by_query(queries: Iterable[str], *, heldout_share: float = 0.1, seed: int = 0) -> list[str]:
    """``train`` or ``heldout`` for each query, decided by a hash of its folded string: equal strings always fall on one side.

    Args:
        queries: Query strings.
        heldout_share: Expected share of distinct strings held out, in [0, 1].
        seed: Another seed, another split.

    Raises:
        ConfigError: The share is not in [0, 1].
    """
    if not 0 <= heldout_share <= 1:
        raise ConfigError(f"heldout_share must lie in [0, 1], but got {heldout_share}.")
    folded = pl.DataFrame({"query": list(queries)}, schema={"query": pl.String}).select(fold_query(pl.col("query")))["query"].to_list()
    if not folded:
        return []
    positions = mix64(hash_texts(folded), seed).astype(np.float64) / 2.0**64
    return ["heldout" if position < heldout_share else "train" for position in positions.tolist()]


def _read_json_lines(packed: bytes) -> pl.DataFrame:
    return pl.read_ndjson(gzip.decompress(packed), infer_schema_length=None)


def _read_array_lines(path: Path) -> pl.DataFrame:
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").rstrip("\n").split("\n")
    rows = pl.Series("row", lines).str.json_decode(pl.List(pl.String))
    frame = rows.to_frame().select(
        pl.col("row").list.get(i).alias(name) for i, name in enumerate(("language", "query", "entity_id", "kind"))
    )
    if frame["kind"].null_count():
        raise SchemaError(f"{path}: expected rows [language, query, entity_id, kind], but a row is shorter. Unpack the file again.")
    return frame


def _read_svg(packed: bytes) -> dict[str, str]:
    rows = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    return {row["id"]: _svg(row["viewbox"], row["svg"]) for row in rows}


def _svg(viewbox: list[float], body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {viewbox[0]} {viewbox[1]}">{body}</svg>'


def _character(group: str) -> str:
    return "".join(chr(int(code, 16)) for code in group.removeprefix("emoji:").split("-"))
