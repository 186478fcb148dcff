"""`omni features` scores pairs by a release as the server does, in chunks, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from index_builder.releases.store import ReleaseStore
from retrieval.commands import features
from retrieval.commands.features import command
from tests.helpers.run_command import run
from tests.helpers.serving.real_server import Running, SmallStore


def write_pairs(store: ReleaseStore, path: Path) -> pl.DataFrame:
    with store.open_current() as release:
        ids = release.entities["pin"].ids.take(np.arange(40))
        products = release.entities["product"].ids.take(np.arange(20))
    pairs = pl.DataFrame(
        {
            "query": [f"word{i % 7}" for i in range(60)],
            "entity_type": ["pin"] * 40 + ["product"] * 20,
            "entity_id": [*ids, *products],
            "label": [i % 2 for i in range(60)],
        }
    )
    pairs = pairs.with_columns(
        entity_id=pl.when(pl.col("label").cum_sum() == 3)
        .then(pl.lit("nowhere"))
        .otherwise("entity_id")
    )
    pairs.write_parquet(path)
    return pairs


def test_features_equal_the_towers_cosine(
    small_store: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK_ROWS", 7)
    pairs = write_pairs(small_store.store, tmp_path / "pairs.parquet")
    out = tmp_path / "out.parquet"
    arguments = (tmp_path / "pairs.parquet", "--store", small_store.store.root, "--out", out)
    found = run(command, *arguments, "--json")
    assert found.exit_code == 0, found.output
    scored = pl.read_parquet(out)
    unknown = pairs.filter(entity_id="nowhere").height
    assert json.loads(found.stdout) == {"pairs": 60, "not_in_release": unknown, "out": str(out)}
    assert scored.select(pairs.columns).equals(pairs)
    vectors = small_store.bundle.encoder.encode(pairs["query"].to_list())
    with small_store.store.open_current() as release:
        for vector, row in zip(vectors, scored.iter_rows(named=True), strict=True):
            entity = release.entities[row["entity_type"]].vector(row["entity_id"])
            if entity is None:
                assert row["cosine"] is row["lexical"] is row["known_queries"] is None
            else:
                assert row["cosine"] == pytest.approx(float(vector @ entity), abs=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_features_of_texts_are_alike(
    small_store: SmallStore, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_pairs(small_store.store, tmp_path / "pairs.parquet")
    for name in ("parquet", suffix[1:]):
        monkeypatch.setattr(features, "CHUNK_ROWS", 60 if name == "parquet" else 11)
        out = tmp_path / f"out.{name}"
        arguments = (tmp_path / "pairs.parquet", "--store", small_store.store.root, "--out", out)
        assert run(command, *arguments).exit_code == 0
    read = pl.read_csv if suffix == ".csv" else pl.read_ndjson
    texts = read(tmp_path / f"out{suffix}", infer_schema_length=None)
    assert texts.height == pairs.height
    wanted = pl.read_parquet(tmp_path / "out.parquet")["cosine"].cast(pl.Float64)
    np.testing.assert_allclose(texts["cosine"].to_numpy(), wanted.to_numpy(), atol=1e-6)


@pytest.mark.slow
def test_features_of_a_server_are_its_cosines(running_server: Running, tmp_path: Path) -> None:
    write_pairs(running_server.store, tmp_path / "pairs.parquet")
    pairs = tmp_path / "pairs.parquet"
    by_store, by_server = tmp_path / "a.parquet", tmp_path / "b.parquet"
    opened = run(command, pairs, "--store", running_server.store.root, "--out", by_store)
    asked = run(command, pairs, "--server", running_server.address, "--out", by_server)
    assert opened.exit_code == asked.exit_code == 0, asked.output
    found = pl.read_parquet(by_server)
    assert "lexical" not in found.columns
    wanted = pl.read_parquet(by_store)["cosine"]
    np.testing.assert_allclose(found["cosine"].to_numpy(), wanted.to_numpy(), atol=1e-4)


def test_features_of_a_second_space_are_a_column(small_store: SmallStore, tmp_path: Path) -> None:
    write_pairs(small_store.store, tmp_path / "pairs.parquet")
    root, out = small_store.store.root, tmp_path / "out.parquet"
    arguments = (tmp_path / "pairs.parquet", "--store", root, "--out", out)
    assert run(command, *arguments, "--also", f"old={root}").exit_code == 0
    found = pl.read_parquet(out)
    assert found["cosine_old"].equals(found["cosine"].alias("cosine_old"))
    assert run(command, *arguments, "--also", "no-store").exit_code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.col("label").alias("cosine"), "written twice"),
        (pl.lit(None, pl.String).alias("entity_id"), "60 rows lack"),
        (pl.lit("ad").alias("entity_type"), "not_in_release"),
    ],
)
def test_features_bad_pairs_are_named_and_nothing_is_written(
    small_store: SmallStore, tmp_path: Path, change: pl.Expr, message: str
) -> None:
    pairs = write_pairs(small_store.store, tmp_path / "pairs.parquet")
    pairs.with_columns(change).write_parquet(tmp_path / "pairs.parquet")
    out = tmp_path / "out.parquet"
    arguments = (tmp_path / "pairs.parquet", "--store", small_store.store.root, "--out", out)
    found = run(command, *arguments, "--json")
    assert message in found.output
    if found.exit_code:
        assert not list(tmp_path.glob("*out*"))


def test_features_without_entity_type_say_what_to_give(
    small_store: SmallStore, tmp_path: Path
) -> None:
    pairs = write_pairs(small_store.store, tmp_path / "pairs.parquet").filter(entity_type="pin")
    pairs.drop("entity_type").write_parquet(tmp_path / "pairs.parquet")
    out = tmp_path / "out.parquet"
    arguments = (tmp_path / "pairs.parquet", "--store", small_store.store.root, "--out", out)
    assert "--entity-type" in run(command, *arguments).output
    assert run(command, *arguments, "--entity-type", "pin").exit_code == 0
