"""What ``omni data validate`` accepts passes every later command: pairs, train, rebuild, serve."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from encoders.tables.files import check_table
from index_builder.releases.store import ReleaseStore
from retrieval.cli import main
from retrieval.client import RetrievalClient
from retrieval.start.recognition import as_flags
from tests.helpers.odd_files import CASES, Odd, put
from tests.helpers.real_server import SmallBundle, SmallStore, serving

KINDS = (
    *("spark.csv", "hive.csv", "mapped.csv", "mysql_null.csv", "postgres.tsv", "mysql_dump.tsv"),
    *("excel_1252.csv", "excel_unicode.tsv", "packed.csv.gz", "packed.csv.zst", "packed.jsonl.zst"),
    *("two.csv.zst", "spark_parts", "ints.parquet", "decimal.parquet", "large.parquet"),
    *("dict.parquet", "z.parquet", "zstd.parquet"),
)
"""One of each way in which a file differs: dialect, encoding, packing, folders, types."""
CONFIG = """
steps = 5
precision = "fp32"
checkpoint_every = 0
[data]
catalogue = ["{catalogue}"]
pairs = ["{pairs}"]
[model]
query_encoder = "tiny-multilingual"
[batch]
pairs = 4
[entity_tower]
table_rows = 100
hidden = [8]
[validation]
fraction = 0.0
"""


def omni(*arguments: object) -> None:
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, f"omni {arguments}: {result.output}"


def train(catalogue: Path, pairs: Path, folder: Path) -> Path:
    config = folder / "run.toml"
    config.write_text(CONFIG.format(catalogue=catalogue, pairs=pairs))
    omni("train", config, "--out", folder / "run", "--quiet")
    return folder / "run" / "model"


def pairs_log(case: Odd, file: Path, folder: Path) -> tuple[Path, pl.DataFrame]:
    """A log in which each entity of a file was saved for two queries."""
    rows = check_table(file, "catalogue", reading=case.options).frame
    log = rows.select("entity_type", entity_id="id", action=pl.lit("save"), user_id=pl.lit("u"))
    asked = [log.with_columns(query=pl.lit(query)) for query in ("red barn", "blue boat")]
    path = folder / "log.parquet"
    pl.concat(asked).with_columns(timestamp=pl.lit("2026-01-01T00:00:00Z")).write_parquet(path)
    return path, rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for pins and products."""
    folder = tmp_path_factory.mktemp("trained")
    things = [
        (f"{kind}{n}", kind, f"red thing {n}") for kind in ("pin", "product") for n in range(9)
    ]
    entities = pl.DataFrame(things, schema=["id", "entity_type", "title"], orient="row")
    entities.write_parquet(folder / "catalogue.parquet")
    pairs = entities.select("entity_type", query="title", entity_id="id", split=pl.lit("train"))
    pairs.write_parquet(folder / "pairs.parquet")
    return train(folder / "catalogue.parquet", folder / "pairs.parquet", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_accepted_file_passes_pairs_train_rebuild_and_serve(
    name: str, trained: Path, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    case = CASES[name]
    file = put(case, tmp_path)
    flags = as_flags(case.options)
    omni("data", "validate", file, "--table", "catalogue", *flags)
    log, rows = pairs_log(case, file, tmp_path)
    data = tmp_path / "data"
    omni(
        *("pairs", "--log", log, "--catalogue", file, "--out", data, "--heldout-days", 0),
        *(*flags, "--min-users", 1),
    )
    pairs = pl.read_parquet(data / "pairs" / "*.parquet")
    assert set(pairs["entity_id"]) == set(rows["id"])
    # Where options say how it is written, or queries are its only texts, training reads the table
    # that `omni pairs` wrote
    direct = not flags and bool({"title", "board_titles"} & set(rows.columns))
    train(file if direct else data / "catalogue.parquet", data / "pairs", tmp_path)
    store = tmp_path / "store"
    omni("rebuild", "--store", store, "--bundle", trained, "--catalogue", file, *flags, "--quiet")
    releases = ReleaseStore(store)
    made = SmallStore(releases, small_bundle, releases.current() or "")
    kinds = rows["entity_type"].unique().to_list()
    with serving(made) as running, RetrievalClient(running.address) as client:
        for kind in kinds:
            hits = client.retrieve("red barn", kind, 10, attributes=["*"], fusion=False).hits
            assert {hit.id for hit in hits} == set(rows.filter(entity_type=kind)["id"])
