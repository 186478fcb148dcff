"""Vectors of two runtime forms (fp32, bf16) never end up in one store."""

import json

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from encoders.commands.embed import command
from encoders.inference.batch_embedding import EmbedConfig, TypeReport, embed_catalogue
from encoders.inference.signal_store import SignalStore
from encoders.towers.bundle import ModelBundle, save_bundle
from encoders.towers.entity_features import EntityFeatureConfig, EntityFeaturizer
from encoders.towers.entity_tower import create_entity_encoder
from tests.helpers.training_examples import tiny_query_encoder

CATALOGUE = pl.DataFrame(
    {
        "id": [f"e{i}" for i in range(24)],
        "entity_type": "pin",
        "title": [f"red {i} blue {i % 5}" for i in range(24)],
    }
)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> ModelBundle:
    torch.manual_seed(0)
    featurizer = EntityFeaturizer.fit(CATALOGUE, EntityFeatureConfig(text_fields=("title",)))
    tower = create_entity_encoder(
        featurizer, table_rows=64, token_dimension=32, hidden=(48,), dimension=16
    )
    query_tower = tiny_query_encoder()
    query_tower.projection = torch.nn.Linear(query_tower.projection.in_features, 16)
    return save_bundle(tmp_path_factory.mktemp("bundle") / "model", query_tower, {"pin": tower})


def embed(
    bundle: ModelBundle, store: SignalStore, precision: str, chunks=(CATALOGUE,)
) -> TypeReport:
    config = EmbedConfig(device="cpu", precision=precision, part_rows=8, threads=1)
    return embed_catalogue(bundle, chunks, store, config).entity_types["pin"]


def interrupt(bundle: ModelBundle, store: SignalStore, precision: str, rows: int = 16) -> None:
    def stream():
        yield CATALOGUE[:rows]
        raise Interrupted

    with pytest.raises(Interrupted):
        embed(bundle, store, precision, stream())


def unmark(store: SignalStore, folder: str) -> None:
    """Strip the mark of the form, as in parts of an older writer."""
    for path in (store.root / folder).glob("*.parquet"):
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def assert_all_fp32(bundle: ModelBundle, store: SignalStore) -> None:
    assert store.describe("pin")["form_id"] == "torch-fp32"
    np.testing.assert_allclose(
        store.read("pin").vectors, bundle.embed_entities(CATALOGUE), atol=1e-5
    )


def test_embed_catalogue_staged_parts_of_another_form_are_embedded_again(bundle, tmp_path):
    store = SignalStore(tmp_path)
    interrupt(bundle, store, "bf16")
    report = embed(bundle, store, "fp32")
    assert_all_fp32(bundle, store)
    assert (report.resumed, report.embedded, report.other_form) == (0, 24, 16)


def test_embed_catalogue_published_rows_of_another_form_are_embedded_again(bundle, tmp_path):
    store = SignalStore(tmp_path)
    embed(bundle, store, "bf16")
    report = embed(bundle, store, "fp32")
    assert_all_fp32(bundle, store)
    assert (report.unchanged, report.embedded, report.other_form) == (0, 24, 24)
    again = embed(bundle, store, "fp32")
    assert (again.unchanged, again.embedded, again.other_form) == (24, 0, 0)


def test_embed_catalogue_form_changed_twice_mixes_nothing(bundle, tmp_path):
    store = SignalStore(tmp_path)
    embed(bundle, store, "fp32")
    interrupt(bundle, store, "bf16")
    report = embed(bundle, store, "fp32")
    assert_all_fp32(bundle, store)
    assert (report.unchanged, report.embedded, report.other_form) == (24, 0, 0)


def test_embed_catalogue_unmarked_published_parts_have_stated_form(bundle, tmp_path):
    store = SignalStore(tmp_path)
    embed(bundle, store, "fp32")
    unmark(store, "pin")
    assert embed(bundle, store, "fp32").unchanged == 24
    unmark(store, "pin")
    assert embed(bundle, store, "bf16").other_form == 24
    unmark(store, "pin")
    described = json.loads((tmp_path / "pin" / "signals.json").read_text())
    (tmp_path / "pin" / "signals.json").write_text(
        json.dumps({k: v for k, v in described.items() if k != "form_id"})
    )
    assert embed(bundle, store, "bf16").embedded == 24  # nothing states a form


def test_embed_catalogue_unmarked_staged_parts_are_embedded_again(bundle, tmp_path):
    """signals.json speaks of the published parts; nothing says how an older run made its staged
    ones.
    """
    store = SignalStore(tmp_path)
    interrupt(bundle, store, "bf16")
    unmark(store, "pin/_staging")
    assert embed(bundle, store, "fp32").resumed == 0
    assert_all_fp32(bundle, store)


def test_embed_catalogue_marks_each_part_with_its_form(bundle, tmp_path):
    store = SignalStore(tmp_path)
    embed(bundle, store, "bf16")
    assert [pq.read_schema(path).metadata for path in store.part_paths("pin")] == [
        {b"form_id": b"torch-bf16"}
    ] * 3


def test_embed_command_counts_rows_of_another_form(bundle, tmp_path):
    CATALOGUE.write_parquet(tmp_path / "c.parquet")
    arguments = [
        str(bundle.path),
        "--catalogue",
        str(tmp_path / "c.parquet"),
        "--out",
        str(tmp_path / "s"),
        "--json",
        "--device",
        "cpu",
    ]
    CliRunner().invoke(command, [*arguments, "--precision", "bf16"])
    result = CliRunner().invoke(command, [*arguments, "--precision", "fp32"])
    assert (
        result.exit_code == 0
        and "24 pin rows were embedded again, because the store held them in another form"
        in result.stderr
    )
    assert json.loads(result.stdout)["entity_types"]["pin"]["other_form"] == 24
