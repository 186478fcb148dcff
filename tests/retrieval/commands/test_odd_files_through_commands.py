"""What ``omni data validate`` accepts passes every later command: pairs, train, rebuild, serve."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest
from click.testing import CliRunner

from encoders.tables.files import check_table
from index_builder.releases.store import ReleaseStore
from retrieval.cli import main
from retrieval.client import RetrievalClient
from retrieval.start.recognition import as_flags
from tests.helpers.serving.real_server import SmallBundle, SmallStore, serving
from tests.helpers.tables.odd_files import CASES, Odd, put

ACCEPTED = [case for case in CASES.values() if not isinstance(case.wanted, str)]
CONFIG = """
steps = 5
precision = "fp32"
checkpoint_every = 0
[data]
catalogue = [{catalogues}]
pairs = [{pairs}]
[model]
query_encoder = "tiny-multilingual"
[batch]
pairs = 16
[entity_tower]
table_rows = 100
hidden = [8]
[validation]
fraction = 0.0
"""


class File(NamedTuple):
    """A file that validate accepted, and its rows."""

    case: Odd
    path: Path
    rows: pl.DataFrame

    @property
    def flags(self) -> list[str]:
        return as_flags(self.case.options)


def omni(*arguments: object) -> None:
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, f"omni {arguments}: {result.output}"


def validated(folder: Path) -> list[File]:
    """Write all accepted files, each with ids of its own, and validate each."""
    files = []
    for number, case in enumerate(ACCEPTED):
        place = folder / str(number)
        place.mkdir()
        path = put(case, place, f"c{number}_")
        omni("data", "validate", path, "--table", "catalogue", *as_flags(case.options))
        rows = check_table(path, "catalogue", reading=case.options).frame
        files.append(File(case, path, rows))
    return files


def tables(files: list[File]) -> list[list[File]]:
    """Join files into tables: those of a table are read alike and have columns of one type each."""
    joined: list[list[File]] = []
    for file in files:
        fitting = (one for one in joined if fits(one, file))
        table = next(fitting, None)
        if table is None:
            joined.append([file])
        else:
            table.append(file)
    return joined


def fits(table: list[File], file: File) -> bool:
    return all(
        other.flags == file.flags
        and not set(other.rows["id"]) & set(file.rows["id"])
        and all(
            name not in file.rows.schema or kind(file.rows.schema[name]) == kind(dtype)
            for name, dtype in other.rows.schema.items()
        )
        for other in table
    )


def kind(dtype: pl.DataType) -> object:
    return "number" if dtype.is_numeric() else dtype


def pairs_of(table: list[File], folder: Path) -> Path:
    """Run ``omni pairs`` on a log in which each entity was saved for two queries."""
    log = pl.concat(
        file.rows.select("entity_type", entity_id="id", action=pl.lit("save"), user_id=pl.lit("u"))
        for file in table
    )
    asked = [log.with_columns(query=pl.lit(query)) for query in ("red barn", "blue boat")]
    times = {"timestamp": pl.lit("2026-01-01T00:00:00Z")}
    pl.concat(asked).with_columns(**times).write_parquet(folder / "log.parquet")
    data = folder / "data"
    omni(
        *("pairs", "--log", folder / "log.parquet", *catalogues(table), "--out", data),
        *("--heldout-days", 0, "--min-users", 1),
    )
    pairs = pl.read_parquet(data / "pairs" / "*.parquet")
    assert set(pairs["entity_id"]) == set(log["entity_id"])
    return data


def catalogues(table: list[File]) -> list[object]:
    return [*(part for file in table for part in ("--catalogue", file.path)), *table[0].flags]


def listed(paths: list[Path]) -> str:
    return ", ".join(f'"{path}"' for path in paths)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_accepted_files_pass_pairs_train_rebuild_and_serve(
    small_bundle: SmallBundle, tmp_path: Path
) -> None:
    """Files that fit together are read as one table, so that each command runs a few times."""
    files = validated(tmp_path)
    assert len(files) >= 60
    trained_on: list[Path] = []
    pairs = []
    joined = tables(files)
    for number, table in enumerate(joined):
        folder = tmp_path / f"table{number}"
        folder.mkdir()
        data = pairs_of(table, folder)
        pairs.append(data / "pairs")
        # Where options say how a file is written, training reads what `omni pairs` wrote
        flags = table[0].flags
        trained_on += [data / "catalogue.parquet"] if flags else [file.path for file in table]
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(catalogues=listed(trained_on), pairs=listed(pairs)))
    omni("train", config, "--out", tmp_path / "run", "--quiet")
    for number, table in enumerate(joined):
        store = tmp_path / f"store{number}"
        bundle = ("--bundle", tmp_path / "run" / "model")
        omni("rebuild", "--store", store, *bundle, *catalogues(table), "--quiet")
        check_served(
            store, small_bundle, pl.concat([f.rows.select("id", "entity_type") for f in table])
        )


def check_served(folder: Path, bundle: SmallBundle, rows: pl.DataFrame) -> None:
    """Serve a store; all of its entities must be found."""
    releases = ReleaseStore(folder)
    made = SmallStore(releases, bundle, releases.current() or "")
    with serving(made) as running, RetrievalClient(running.address) as client:
        for (kind,), own in rows.group_by("entity_type"):
            hits = client.retrieve("red barn", kind, 1000, attributes=["*"], fusion=False).hits
            assert {hit.id for hit in hits} == set(own["id"])
