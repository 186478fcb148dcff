"""What training reads before its first step: n-gram counts and the fingerprint of a run."""

from pathlib import Path

import polars as pl
import pytest
import torch

from encoders.towers.text_embedding import TextEmbedding
from encoders.training.data.source_tables import TrainingData
from encoders.training.inputs import build_inputs, run_fingerprint
from tests.helpers.training_examples import small_config, tiny_query_encoder, world


def vocabulary_counts(data: TrainingData, **changes: object) -> dict[str, int]:
    config = small_config(features={"ngrams": {"min_count": 2}}, **changes)
    inputs = build_inputs(data, config, tiny_query_encoder(), torch.device("cpu"))
    return dict(inputs.featurizer.vocabulary.table.select("text", "count").iter_rows())


def test_build_inputs_cross_fit_counts_every_text_once() -> None:
    """Not once per view, or ``min_count`` would drop nothing."""
    titles = ["lonely chair", *("chair", "lamp") * 6]
    catalogue = pl.DataFrame(
        {
            "id": [str(n) for n in range(13)],
            "entity_type": "pin",
            "title": titles,
            "engaged_queries": [["seldom seen"], *[[f"often {n}"] for n in range(12)]],
        }
    )
    pairs = pl.DataFrame(
        {
            "query": [f"often {n}" for n in range(12)],
            "entity_type": "pin",
            "entity_id": [str(n + 1) for n in range(12)],
        }
    )
    data = TrainingData(catalogue, pairs)
    crossed = vocabulary_counts(data, batch={"pairs": 12, "cross_fit": 3})
    assert crossed == vocabulary_counts(data, batch={"pairs": 12})
    assert (crossed["chair"], crossed["lamp"], crossed["often"]) == (7, 6, 12)
    assert not {"lonely", "seldom"} & crossed.keys()
    held_back = vocabulary_counts(
        data, batch={"pairs": 2, "cross_fit": 3}, validation={"fraction": 0.5}
    )
    assert 0 < held_back["often"] < 12, "held-back queries are not counted"


def fingerprint(data: TrainingData | None = None, **changes: object) -> str:
    inputs = build_inputs(
        data or world(), small_config(**changes), tiny_query_encoder(), torch.device("cpu")
    )
    return run_fingerprint(inputs)


def test_run_fingerprint_changed_input_is_another_run() -> None:
    data = world()
    assert fingerprint() == fingerprint(log_every=7)
    moved = data.catalogue.with_columns(description=pl.col("title"), title=pl.lit(""))
    other_type = data.catalogue.with_columns(
        entity_type=pl.col("entity_type").str.replace("product", "ad")
    )
    for catalogue in (moved, other_type):
        pairs = (
            data.pairs.with_columns(entity_type=pl.col("entity_type").str.replace("product", "ad"))
            if catalogue is other_type
            else data.pairs
        )
        assert fingerprint(TrainingData(catalogue, pairs)) != fingerprint()
    held = {"validation": {"fraction": 0.2}}
    split = data.pairs.with_columns(
        split=pl.when(pl.int_range(pl.len()) % 5 == 0)
        .then(pl.lit("validation"))
        .otherwise(pl.lit("train"))
    )
    is_held = (pl.col("split") == "validation") & (pl.col("entity_type") == "pin")
    pin = data.catalogue.filter(pl.col("entity_type") == "pin")["id"][0]
    relabelled = split.with_columns(
        entity_id=pl.when(is_held).then(pl.lit(pin)).otherwise(pl.col("entity_id"))
    )
    assert fingerprint(TrainingData(data.catalogue, split), **held) != fingerprint(
        TrainingData(data.catalogue, relabelled), **held
    )


def test_run_fingerprint_last_bits_of_text_embedding_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They depend on the number of threads."""
    tiny_query_encoder(1).save(tmp_path / "frozen")
    settings = {"features": {"text_embedding": str(tmp_path / "frozen")}}
    before = fingerprint(**settings)
    embed = TextEmbedding.__call__
    monkeypatch.setattr(TextEmbedding, "__call__", lambda *arguments: embed(*arguments) + 1e-7)
    assert fingerprint(**settings) == before
