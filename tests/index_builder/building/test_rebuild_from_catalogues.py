"""Rebuilding from catalogue files: all that are named count, and what the tower cannot read is
noted.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result

from benchmarks.small_releases import tiny_query_encoder
from encoders.commands import embed as embed_command
from encoders.inference.signal_store import SignalStore
from encoders.towers.bundle import ModelBundle, save_bundle
from encoders.towers.entity_features import EntityFeatureConfig, EntityFeaturizer
from encoders.towers.entity_tower import create_entity_encoder
from index_builder.building.update import read_changes
from index_builder.commands import rebuild as rebuild_command
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore

ROWS = [f"p{i},pin,red barn number {i},{i}.50" for i in range(40)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    rows = pl.DataFrame({"id": ["a"], "entity_type": ["pin"], "title": ["red barn number 1 2 3"]})
    featurizer = EntityFeaturizer.fit(
        rows, EntityFeatureConfig(text_fields=("title", "description"))
    )
    tower = create_entity_encoder(
        featurizer, table_rows=64, token_dimension=32, hidden=(48,), dimension=16
    )
    return save_bundle(
        tmp_path_factory.mktemp("bundle") / "model",
        tiny_query_encoder(0, dimension=16),
        {"pin": tower},
    )


def write(path: Path, rows: list[str], header: str = "id,entity_type,title,price") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def rebuild(folder: Path, bundle: ModelBundle, *catalogues: Path) -> Result:
    arguments = [
        "--store",
        folder / "store",
        "--bundle",
        bundle.path,
        "--index",
        "hnsw",
        "--threads",
        1,
        "--min-recall",
        0.5,
        "--json",
    ]
    for catalogue in catalogues:
        arguments += ["--catalogue", catalogue]
    return CliRunner().invoke(rebuild_command.command, [str(a) for a in arguments])


def test_rebuild_several_catalogues_builds_all_with_numbers(
    tmp_path: Path, bundle: ModelBundle
) -> None:
    done = rebuild(
        tmp_path, bundle, write(tmp_path / "a.csv", ROWS[:25]), write(tmp_path / "b.csv", ROWS[25:])
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["entities"]["pin"]["count"] == 40
    store = ReleaseStore(tmp_path / "store")
    manifest = read_manifest(store.path_of(str(store.current())))
    assert manifest.entities["pin"].index["attributes"]["price"] == "float"


def test_rebuild_id_in_two_catalogues_is_refused(tmp_path: Path, bundle: ModelBundle) -> None:
    done = rebuild(
        tmp_path,
        bundle,
        write(tmp_path / "a.csv", ROWS),
        write(tmp_path / "b.csv", ["p3,pin,another,1"]),
    )
    assert done.exit_code == 1
    assert "a.csv, b.csv" in done.stderr and "'p3'" in done.stderr


def test_rebuild_word_in_number_column_is_named(tmp_path: Path, bundle: ModelBundle) -> None:
    done = rebuild(tmp_path, bundle, write(tmp_path / "a.csv", [*ROWS, "p99,pin,red,n/a"]))
    assert done.exit_code == 0, done.output
    assert (
        "note: column 'price' stays text: 40 of 41 cells are numbers, but not a.csv, row 41: 'n/a'"
        in done.stderr
    )


def test_rebuild_unreadable_text_is_noted_as_by_embed(tmp_path: Path, bundle: ModelBundle) -> None:
    catalogue = write(tmp_path / "a.csv", ROWS, "id,entity_type,name,price")
    arguments = [
        str(bundle.path),
        "--catalogue",
        str(catalogue),
        "--out",
        str(tmp_path / "signals"),
    ]
    embedded = CliRunner().invoke(embed_command.command, arguments)
    notes = [
        line for line in embedded.stderr.splitlines() if line.startswith(("note: ", "warning: "))
    ]
    assert ["lacks title, description" in notes[0], "40 pin rows" in notes[1]] == [True, True]
    done = rebuild(tmp_path, bundle, catalogue)
    assert [line for line in done.stderr.splitlines() if line in notes] == notes


WEIGHTS = [38, 38.5, 39.0, 1e30, 0.0000002, None, 40]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_rebuild_number_as_text_reads_as_embed(tmp_path: Path, suffix: str) -> None:
    """`omni embed` read 38 as "38", `omni rebuild` as "38.0" where another row held 38.5: one row,
    two vectors of one space.
    """
    records = [
        {"id": f"p{i}", "entity_type": "pin", "title": f"red barn {i}", "weight": w, "size": w}
        for i, w in enumerate(WEIGHTS * 6)
    ]
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        cells = ["38", "38.50", "39.0", "1.0e+30", "2.0e-7", "", "40"] * 6
        rows = [f"p{i},pin,red barn {i},{cell},{cell}" for i, cell in enumerate(cells)]
        write(path, rows, "id,entity_type,title,weight,size")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pl.DataFrame(records, infer_schema_length=None).write_parquet(path)
    featurizer = EntityFeaturizer.fit(
        pl.DataFrame(records, infer_schema_length=None),
        EntityFeatureConfig(text_fields=("title", "weight", "size")),
    )
    tower = create_entity_encoder(
        featurizer, table_rows=64, token_dimension=32, hidden=(48,), dimension=16
    )
    bundle = save_bundle(tmp_path / "model", tiny_query_encoder(0, dimension=16), {"pin": tower})
    arguments = [str(bundle.path), "--catalogue", str(path), "--out", str(tmp_path / "signals")]
    assert CliRunner().invoke(embed_command.command, arguments).exit_code == 0
    done = rebuild(tmp_path, bundle, path)
    assert done.exit_code == 0, done.output
    embedded = SignalStore(tmp_path / "signals").read("pin")
    (rebuilt_folder,) = (tmp_path / "store" / "signals").iterdir()
    rebuilt = SignalStore(rebuilt_folder).read("pin")
    assert (rebuilt.ids, rebuilt.content_hashes) == (embedded.ids, embedded.content_hashes)
    np.testing.assert_allclose(rebuilt.vectors, embedded.vectors, atol=1e-6)


@pytest.mark.parametrize("ids", [[1, 2], [1.0, 2.0], ["1", "2"]])
def test_update_numeric_id_upserts_and_deletes_one_entity(
    tmp_path: Path, bundle: ModelBundle, ids: list[object]
) -> None:
    assert rebuild(tmp_path, bundle, write(tmp_path / "a.csv", ROWS)).exit_code == 0
    store = ReleaseStore(tmp_path / "store")
    rows = pl.DataFrame(
        {
            "id": ids,
            "entity_type": ["pin", "pin"],
            "title": ["red", "blue"],
            "op": ["upsert", "delete"],
        }
    )
    rows.write_parquet(tmp_path / "changes.parquet")
    changes = read_changes(
        tmp_path / "changes.parquet", read_manifest(store.path_of(str(store.current())))
    )
    assert (changes.upserts["id"].to_list(), changes.deletes) == (["1"], {"pin": ["2"]})
