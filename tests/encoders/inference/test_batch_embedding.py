"""Batch embedding with real towers, a real store and, for the kill, a real process."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from encoders.commands.embed import command
from encoders.errors import ConfigError, DataError, RowError, SchemaError
from encoders.inference.batch_embedding import (
    EmbedConfig,
    EntityEmbedder,
    content_hashes,
    embed_catalogue,
    query_hashes,
)
from encoders.inference.signal_store import SignalStore
from encoders.tables.stream import count_rows, stream_catalogue
from encoders.towers.bundle import ModelBundle, load_bundle, save_bundle
from encoders.towers.entity_features import EntityFeatureConfig, EntityFeaturizer
from encoders.towers.entity_tower import create_entity_encoder
from tests.helpers.training_examples import tiny_query_encoder

WORDS = ["red", "blue", "shoes", "lake", "sky", "赤い", "靴", "rote", "Schuhe", "ad"]


def make_catalogue(rows: int = 60, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "id": [f"e{i}" for i in range(rows)],
            "entity_type": [("pin", "product")[i % 2] for i in range(rows)],
            "title": [" ".join(rng.choice(WORDS, 4)) for _ in range(rows)],
            "board_titles": [rng.choice(WORDS, 2).tolist() for _ in range(rows)],
            "visual": pl.Series(
                [rng.standard_normal(3).tolist() if i % 3 else None for i in range(rows)],
                dtype=pl.List(pl.Float32),
            ),
            "price": list(range(rows)),
        }
    )


CATALOGUE = make_catalogue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> ModelBundle:
    torch.manual_seed(0)
    config = EntityFeatureConfig(text_fields=("title", "board_titles"), continuous={"visual": 3})
    tower = create_entity_encoder(
        EntityFeaturizer.fit(CATALOGUE, config),
        table_rows=64,
        token_dimension=32,
        hidden=(48,),
        dimension=16,
    )
    query_tower = tiny_query_encoder()
    query_tower.projection = torch.nn.Linear(query_tower.projection.in_features, 16)
    return save_bundle(
        tmp_path_factory.mktemp("bundle") / "model", query_tower, {"pin": tower, "product": tower}
    )


def chunks(frame: pl.DataFrame, rows: int = 7):
    return (frame[start : start + rows] for start in range(0, frame.height, rows))


SMALL_PARTS = EmbedConfig(part_rows=8, batch_rows=4, threads=2)


def test_embed_catalogue_store_equals_tower(bundle, tmp_path):
    store = SignalStore(tmp_path)
    report = embed_catalogue(bundle, chunks(CATALOGUE), store, SMALL_PARTS)
    assert store.entity_types() == ["pin", "product"] == sorted(report.entity_types)
    for entity_type in store.entity_types():
        rows = CATALOGUE.filter(pl.col("entity_type") == entity_type)
        signals = store.read(entity_type)
        assert signals.ids == rows["id"].to_list() and signals.space_id == bundle.space_id
        np.testing.assert_allclose(signals.vectors, bundle.embed_entities(rows), atol=1e-5)
        assert dataclasses.asdict(report.entity_types[entity_type])["embedded"] == 30
        assert (
            len(store.part_paths(entity_type)) == 4
            and store.describe(entity_type)["form_id"] == "torch-fp32"
        )


def test_embed_catalogue_other_parts_batches_threads_same_vectors(bundle, tmp_path):
    vectors = []
    for number, config in enumerate(
        [SMALL_PARTS, EmbedConfig(threads=1), EmbedConfig(part_rows=9, batch_rows=1)]
    ):
        store = SignalStore(tmp_path / str(number))
        embed_catalogue(bundle, chunks(CATALOGUE, 1 + 10 * number), store, config)
        vectors.append(store.read("pin").vectors)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)


def test_embed_catalogue_restores_pytorch_threads(bundle):
    before = torch.get_num_threads()
    EntityEmbedder(bundle.entity_encoders["pin"], SMALL_PARTS)(CATALOGUE)
    assert torch.get_num_threads() == before


def test_embed_catalogue_again_embeds_changed_rows_only(bundle, tmp_path):
    store = SignalStore(tmp_path)
    embed_catalogue(bundle, [CATALOGUE], store, SMALL_PARTS)
    before = store.read("pin")
    title = pl.when(pl.col("id") == "e4").then(pl.lit("blue lake")).otherwise(pl.col("title"))
    changed = CATALOGUE.with_columns(title.alias("title"), price=pl.col("price") + 1).filter(
        pl.col("id") != "e2"
    )
    added = CATALOGUE.head(1).with_columns(id=pl.lit("new"))
    report = embed_catalogue(bundle, [changed, added], store, SMALL_PARTS).entity_types["pin"]
    assert (report.rows, report.embedded, report.unchanged) == (30, 2, 28)
    after = store.read("pin")
    assert "e2" not in after.ids and after.ids[-1] == "new"
    assert not np.allclose(
        after.vectors[after.ids.index("e4")], before.vectors[before.ids.index("e4")]
    )
    for kept in ("e0", "e58"):
        np.testing.assert_array_equal(
            after.vectors[after.ids.index(kept)], before.vectors[before.ids.index(kept)]
        )
        assert after.updated_at[after.ids.index(kept)] == before.updated_at[before.ids.index(kept)]


def test_embed_catalogue_another_space_embeds_everything(bundle, tmp_path):
    store = SignalStore(tmp_path)
    embed_catalogue(dataclasses.replace(bundle, space_id="f" * 64), [CATALOGUE], store, SMALL_PARTS)
    report = embed_catalogue(bundle, [CATALOGUE], store, SMALL_PARTS)
    assert (
        report.entity_types["pin"].unchanged == 0 and store.read("pin").space_id == bundle.space_id
    )


class Interrupted(Exception):
    pass


def test_embed_catalogue_interrupted_resumes_and_readers_see_old_store(bundle, tmp_path):
    store = SignalStore(tmp_path)
    old = CATALOGUE.with_columns(title=pl.lit("red"))
    embed_catalogue(bundle, [old], store, SMALL_PARTS)
    before = store.read("pin")

    def stream():
        yield CATALOGUE[:40]
        raise Interrupted

    with pytest.raises(Interrupted):
        embed_catalogue(bundle, stream(), store, SMALL_PARTS)
    np.testing.assert_array_equal(store.read("pin").vectors, before.vectors)
    report = embed_catalogue(bundle, [CATALOGUE], store, SMALL_PARTS).entity_types["pin"]
    assert (report.resumed, report.embedded) == (16, 14)
    np.testing.assert_allclose(
        store.read("pin").vectors,
        bundle.embed_entities(CATALOGUE.filter(pl.col("entity_type") == "pin")),
        atol=1e-5,
    )


def test_embed_catalogue_staged_part_of_other_rows_is_dropped(bundle, tmp_path):
    store = SignalStore(tmp_path)

    def stream():
        yield CATALOGUE.with_columns(title=pl.lit("red"))
        raise Interrupted

    with pytest.raises(Interrupted):
        embed_catalogue(bundle, stream(), store, SMALL_PARTS)
    assert embed_catalogue(bundle, [CATALOGUE], store, SMALL_PARTS).entity_types["pin"].resumed == 0
    np.testing.assert_allclose(
        store.read("pin").vectors,
        bundle.embed_entities(CATALOGUE.filter(pl.col("entity_type") == "pin")),
        atol=1e-5,
    )


def test_embed_catalogue_query_entities_use_query_tower_once(bundle, tmp_path):
    (tmp_path / "queries.csv").write_text(
        "query,country,count\nred  shoes,US,5\nblue lake,US,1\nred shoes,DE,2\n"
    )
    store = SignalStore(tmp_path / "store")
    report = embed_catalogue(bundle, stream_catalogue([tmp_path / "queries.csv"]), store)
    signals = store.read("query")
    assert signals.ids == ["red shoes", "blue lake"] and report.entity_types["query"].rows == 2
    np.testing.assert_allclose(
        signals.vectors, bundle.embed_queries(["red shoes", "blue lake"]), atol=1e-5
    )
    assert signals.content_hashes == query_hashes(["red shoes", "blue lake"])
    again = embed_catalogue(bundle, stream_catalogue([tmp_path / "queries.csv"]), store)
    assert again.entity_types["query"].unchanged == 2


def test_embed_catalogue_bf16_is_close_to_fp32(bundle):
    tower = bundle.entity_encoders["pin"]
    low, full = (
        EntityEmbedder(tower, EmbedConfig(precision=precision))(CATALOGUE)
        for precision in ("bf16", "fp32")
    )
    assert (low * full).sum(1).min() > 0.999 and low.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(low, axis=1), 1, atol=1e-5)


def test_embed_catalogue_rows_without_feature_are_counted(bundle, tmp_path):
    blank = pl.DataFrame(
        {
            "id": ["a", "b"],
            "entity_type": ["pin", "pin"],
            "title": [" ", "unknownword"],
            "board_titles": [[], ["sky"]],
        }
    )
    report = embed_catalogue(bundle, [blank], SignalStore(tmp_path)).entity_types["pin"]
    assert report.without_features == 1 and report.missing_columns == ["visual"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"entity_type": pl.lit("ad")},
            DataError,
            "no tower for entity type 'ad'; this bundle embeds pin, product, query",
        ),
        ({"id": pl.lit("same")}, DataError, "id 'same' occurs twice"),
        ({"visual": pl.lit([1.0, float("nan"), 0.0])}, RowError, "visual holds NaN"),
        ({"visual": pl.lit([1.0])}, RowError, "visual must hold 3 numbers, but holds 1"),
    ],
)
def test_embed_catalogue_bad_catalogue_leaves_store(bundle, tmp_path, change, error, message):
    store = SignalStore(tmp_path)
    embed_catalogue(bundle, [CATALOGUE], store, SMALL_PARTS)
    before = store.read("pin")
    with pytest.raises(error, match=message):
        embed_catalogue(bundle, [CATALOGUE.with_columns(**change)], store, SMALL_PARTS)
    np.testing.assert_array_equal(store.read("pin").vectors, before.vectors)


CONFIG = EntityFeatureConfig(text_fields=("title", "board_titles"), continuous={"visual": 2})


def hashes_of(**columns) -> list[str]:
    return content_hashes(
        pl.DataFrame({"id": ["x"], **{name: [value] for name, value in columns.items()}}), CONFIG
    )


def test_content_hashes_equal_pinned_values():
    """Stores keep these hashes: another value means that everything is embedded again."""
    assert hashes_of(title="red", board_titles=["a", "b"], visual=[1.0, 2.0]) == GOLDEN_HASH


GOLDEN_HASH = ["83b6d8fa427bd799d9685f24ecacfa90"]


def test_content_hashes_change_only_with_what_the_tower_reads():
    base = hashes_of(title="red", board_titles=["a", "b"], visual=[1.0, 2.0], price=1)
    assert base == hashes_of(title="red", board_titles=["a", "b"], visual=[1.0, 2.0], price=2)
    others = [
        hashes_of(title="Red", board_titles=["a", "b"], visual=[1.0, 2.0]),
        hashes_of(title="red", board_titles=["ab"], visual=[1.0, 2.0]),
        hashes_of(title="red", board_titles=["b", "a"], visual=[1.0, 2.0]),
        hashes_of(title="red", board_titles=["a", "b"], visual=[1.0, 2.5]),
        hashes_of(title="red", board_titles=["a", "b"]),
        hashes_of(title="", board_titles=["red", "a", "b"], visual=[1.0, 2.0]),
    ]
    assert len({tuple(h) for h in [base, *others]}) == 7
    assert hashes_of(title="red") == hashes_of(title="red", board_titles=[], visual=None)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz", "csv"])
def test_stream_catalogue_every_format_gives_same_rows(tmp_path, suffix):
    from encoders.tables.files import write_table

    path = write_table(
        CATALOGUE.select("id", "entity_type", "title", "board_titles", "price"),
        tmp_path / f"catalogue.{suffix}",
    )
    parts = list(stream_catalogue([path], columns={"title", "board_titles"}, chunk_rows=25))
    assert [part.height for part in parts] == [25, 25, 10] and parts[0].columns == [
        "id",
        "entity_type",
        "title",
        "board_titles",
    ]
    assert pl.concat(parts).equals(CATALOGUE.select("id", "entity_type", "title", "board_titles"))
    assert count_rows([path]) == (60 if suffix == "parquet" else None)


def test_stream_catalogue_bad_row_names_file_and_row_across_chunks(tmp_path):
    lines = [
        json.dumps({"id": f"e{i}", "entity_type": "pin" if i != 33 else "a pine", "title": "x"})
        for i in range(40)
    ]
    path = tmp_path / "catalogue.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(RowError, match=r"catalogue\.jsonl.*34.*a pine"):
        list(stream_catalogue([path], chunk_rows=10))
    path.write_text("\n".join(lines[:12]) + "\n{broken\n")
    with pytest.raises(RowError, match=r"catalogue\.jsonl: row 13: not valid JSON"):
        list(stream_catalogue([path], chunk_rows=10))


def test_stream_catalogue_damaged_or_incomplete_is_refused(tmp_path):
    path = tmp_path / "catalogue.parquet"
    CATALOGUE.write_parquet(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        list(stream_catalogue([path]))
    with pytest.raises(DataError, match="no such file"):
        list(stream_catalogue([tmp_path / "none.parquet"]))
    CATALOGUE.drop("entity_type").write_parquet(path)
    with pytest.raises(SchemaError, match="--entity-type pin"):
        list(stream_catalogue([path]))
    assert next(stream_catalogue([path], entity_type="pin"))["entity_type"].unique().to_list() == [
        "pin"
    ]


@pytest.mark.parametrize("settings", [{"precision": "int8"}, {"part_rows": 0}, {"threads": -1}])
def test_embed_config_bad_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        EmbedConfig(**settings)


def test_embed_config_bad_device_is_refused():
    with pytest.raises(ConfigError, match="unknown to PyTorch"):
        EmbedConfig(device="abacus").resolved_device()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="finds no GPU"):
            EmbedConfig(device="cuda").resolved_device()


def test_embed_command_prints_one_json_object(bundle, tmp_path):
    CATALOGUE.write_parquet(tmp_path / "c.parquet")
    result = CliRunner().invoke(
        command,
        [
            str(bundle.path),
            "--catalogue",
            str(tmp_path / "c.parquet"),
            "--out",
            str(tmp_path / "s"),
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (
        printed["entity_types"]["pin"]["embedded"] == 30 and printed["space_id"] == bundle.space_id
    )
    failed = CliRunner().invoke(
        command,
        [
            str(bundle.path),
            "--catalogue",
            str(tmp_path / "no.parquet"),
            "--out",
            str(tmp_path / "s"),
        ],
    )
    assert failed.exit_code == 1 and "no such file" in failed.stderr
    assert (
        CliRunner().invoke(command, [str(bundle.path), "--out", str(tmp_path / "s")]).exit_code == 2
    )


@pytest.mark.slow
def test_embed_command_kill_9_changes_nothing_and_resumes(bundle, tmp_path):
    """kill -9 of the real command while it runs: the store is unpublished, finished parts are taken
    over by the same command.
    """
    path = tmp_path / "catalogue.jsonl"
    rows = make_catalogue(6_000).drop("visual").with_columns(entity_type=pl.lit("pin"))
    rows.write_ndjson(path)
    arguments = [
        sys.executable,
        "-m",
        "retrieval.cli",
        "embed",
        str(bundle.path),
        "--catalogue",
        str(path),
    ]
    arguments += [
        "--out",
        str(tmp_path / "store"),
        "--part-rows",
        "100",
        "--threads",
        "1",
        "--json",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    staging = tmp_path / "store" / "pin" / "_staging"
    deadline = time.monotonic() + 120
    while (
        len(list(staging.glob("*.parquet"))) < 3
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    staged = len(list(staging.glob("*.parquet")))
    assert 3 <= staged < 60 and SignalStore(tmp_path / "store").entity_types() == []
    loaded = load_bundle(bundle.path)
    store = SignalStore(tmp_path / "store")
    config = EmbedConfig(part_rows=100, threads=1)
    report = embed_catalogue(
        loaded, stream_catalogue([path], chunk_rows=100), store, config
    ).entity_types["pin"]
    assert report.resumed == staged * 100 and report.embedded == 6_000 - staged * 100
    assert store.read("pin").ids == rows["id"].to_list() and not staging.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_embed_catalogue_on_gpu_in_bf16_is_close_to_cpu(bundle):
    tower = bundle.entity_encoders["pin"]
    on_gpu, on_cpu = (
        EntityEmbedder(tower, EmbedConfig(device=device))(CATALOGUE) for device in ("cuda", "cpu")
    )
    assert (on_gpu * on_cpu).sum(1).min() > 0.999
