"""Training end to end on a small world: it learns, resumes to the bit, survives kill -9, stops on
NaN and early, and refuses bad input.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from encoders.commands.train import command
from encoders.config.train_config import to_table
from encoders.errors import CheckpointError, ConfigError, TrainingDiverged
from encoders.towers.bundle import load_bundle
from encoders.training.checkpoints import list_checkpoints, load_checkpoint
from encoders.training.data.source_tables import TrainingData
from encoders.training.loop import TrainResult, TrainStart, train
from tests.helpers.training_examples import DIMENSION, small_config, tiny_query_encoder, world


def run(data: TrainingData | None = None, **changes) -> TrainResult:
    options = {name: changes.pop(name) for name in ("output", "resume", "start") if name in changes}
    options.setdefault("start", TrainStart(tiny_query_encoder()))
    return train(small_config(**changes), data or world(), quiet=True, **options)


FAST = {"learning_rate": 0.02, "query_learning_rate": 0.02, "token_embedding_learning_rate": 0.02}


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    towers = {"query": result.query_encoder, **result.entity_encoders}
    return {
        f"{tower}.{name}": value
        for tower, module in towers.items()
        for name, value in module.state_dict().items()
    }


def assert_equal(first: TrainResult, second: TrainResult) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_train_history_all_figures_are_finite() -> None:
    for changes in ({"steps": 3}, {"steps": 100_000, "max_seconds": 0.05}):
        history = run(log_every=1000, **changes).history
        assert all(math.isfinite(value) for entry in history for value in entry.values())


@pytest.mark.slow
def test_train_held_back_queries_find_their_entities() -> None:
    recalls = []
    # A single run finds between none and all of its ten or so held-back related queries.
    for seed in range(3):
        result = run(
            steps=80,
            seed=seed,
            validation={"fraction": 0.15},
            batch={"cross_fit": 2},
            optimiser=FAST,
        )
        assert result.history[0]["loss"] > 1.8 * result.metrics["loss"]
        assert result.pairs_per_second > 0
        assert result.steps == 80
        recalls.append(
            (
                result.metrics["validation/recall@10/pin"],
                result.metrics["validation/recall@10/query"],
            )
        )
    pin, query = np.mean(recalls, axis=0)
    chance = 10 / 48
    assert pin > 3 * chance
    assert query > 2 * 10 / 180  # of 180 queries, none of them met in training on either side
    vectors = result.entity_encoders["pin"].encode(world().catalogue[:3])
    assert vectors.shape == (3, 16)


@pytest.mark.slow
def test_train_resumed_run_equals_uninterrupted_bitwise(tmp_path: Path) -> None:
    options = {
        "batch": {"cross_fit": 2},
        "checkpoint_every": 10,
        "validation": {"fraction": 0.1, "every_steps": 7},
    }
    whole = run(steps=20, **options)
    interrupted = {**options, "output": tmp_path}
    run(steps=20, **interrupted)
    newest = list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in newest] == ["step-00000010", "step-00000020"]
    for file in newest[1].iterdir():
        file.unlink()
    newest[1].rmdir()  # as if the run had been killed after step 10
    resumed = run(steps=20, **interrupted)
    assert_equal(whole, resumed)
    assert [entry["step"] for entry in resumed.history if "loss" in entry] == [20]
    again = run(steps=20, **interrupted)  # a finished run trains no more
    assert_equal(whole, again)


def test_train_temperature_at_its_limit_is_still_learned(tmp_path: Path) -> None:
    run(steps=5, loss={"temperature": 0.001}, checkpoint_every=5, output=tmp_path)
    state, _ = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    log_scales = state["towers"]["log_scales"]
    assert (log_scales < math.log(100.0)).all()


def test_train_gradient_cache_gives_same_towers() -> None:
    plain, cached = (
        run(steps=4, batch={"gradient_cache": on, "query_chunk": 8, "entity_chunk": 20})
        for on in (False, True)
    )
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(cached)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_train_compatibility_task_pulls_queries_to_frozen_vectors() -> None:
    data = world(vectors=True)
    task = {"name": "pin", "candidates": ["entity", "vector:pinsage"]}
    result = run(data, steps=60, datasets=[task], optimiser=FAST)
    pins = data.catalogue.filter((pl.col("entity_type") == "pin") & pl.col("pinsage").is_not_null())
    frozen = torch.nn.functional.normalize(torch.tensor(pins["pinsage"].to_list()), dim=1)
    queries = torch.from_numpy(result.query_encoder.encode(pins["title"].to_list()))
    ranks = (queries @ frozen.T > (queries * frozen).sum(dim=1, keepdim=True)).sum(dim=1)
    assert (ranks < 5).float().mean() > 0.8  # of 40
    assert {"loss/pin/entity", "loss/pin/vector:pinsage"} <= result.history[0].keys()


@pytest.mark.slow
def test_train_narrow_frozen_vectors_pull_a_prefix_of_the_query() -> None:
    """Half as wide as the towers: the query's first half learns them, as in the released model."""
    data = world(vectors=True)
    narrow = data.catalogue.with_columns(pl.col("pinsage").list.head(DIMENSION // 2))
    task = {"name": "pin", "candidates": ["entity", "vector:pinsage"]}
    result = run(
        TrainingData(narrow, data.pairs),
        steps=60,
        datasets=[task],
        optimiser=FAST,
        validation={"fraction": 0.1},
    )
    pins = narrow.filter((pl.col("entity_type") == "pin") & pl.col("pinsage").is_not_null())
    frozen = torch.nn.functional.normalize(torch.tensor(pins["pinsage"].to_list()), dim=1)
    queries = torch.from_numpy(result.query_encoder.encode(pins["title"].to_list()))
    assert queries.shape[1] == DIMENSION
    prefix = torch.nn.functional.normalize(queries[:, : DIMENSION // 2], dim=1)
    ranks = (prefix @ frozen.T > (prefix * frozen).sum(dim=1, keepdim=True)).sum(dim=1)
    assert (ranks < 5).float().mean() > 0.8  # of 40
    assert "validation/recall@10/pin/vector:pinsage" in result.metrics


def test_train_unified_towers_are_one_object_separate_are_not() -> None:
    unified = run(steps=2)
    assert unified.entity_encoders["pin"] is unified.entity_encoders["product"]
    separate = run(steps=2, model={"entity_towers": "separate"})
    assert separate.entity_encoders["pin"] is not separate.entity_encoders["product"]
    assert set(separate.entity_encoders) == {"pin", "product"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimiser", ["adamw", "lamb"])
def test_train_each_precision_and_optimiser_lowers_loss(precision: str, optimiser: str) -> None:
    result = run(steps=20, precision=precision, optimiser={"name": optimiser})
    assert result.metrics["loss"] < result.history[0]["loss"]
    assert all(
        value.dtype == torch.float32
        for value in result.query_encoder.state_dict().values()
        if value.is_floating_point()
    )


def test_train_zero_query_rates_move_only_projection() -> None:
    tower = tiny_query_encoder()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    rates = {"query_learning_rate": 0.0, "token_embedding_learning_rate": 0.0}
    after = run(steps=3, optimiser=rates, start=TrainStart(tower)).query_encoder.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"projection.weight", "projection.bias"}


def test_train_zero_token_rate_moves_only_transformer() -> None:
    tower = tiny_query_encoder()
    before = tower.transformer.embeddings.word_embeddings.weight.detach().clone()
    layer = tower.transformer.transformer.layer[0].ffn.lin1.weight.detach().clone()
    rates = {"token_embedding_learning_rate": 0.0}
    after = run(steps=3, optimiser=rates, start=TrainStart(tower)).query_encoder
    assert torch.equal(after.transformer.embeddings.word_embeddings.weight, before)
    assert not torch.equal(after.transformer.transformer.layer[0].ffn.lin1.weight, layer)


@pytest.mark.slow
def test_train_patience_stops_early_with_best_towers(tmp_path: Path) -> None:
    options = {
        "validation": {"fraction": 0.2, "every_steps": 2, "patience": 2},
        "optimiser": {"learning_rate": 1.0, "clip_norm": 0.0},
    }
    in_memory, on_disk = run(steps=200, **options), run(steps=200, output=tmp_path, **options)
    assert in_memory.steps < 200
    scores = [
        entry["validation/recall@10"]
        for entry in in_memory.history
        if "validation/recall@10" in entry
    ]
    assert in_memory.metrics["validation/recall@10"] == max(scores)
    assert_equal(in_memory, on_disk)
    again = run(steps=200, output=tmp_path, **options)  # a run that stopped early stays stopped
    assert again.steps == on_disk.steps
    assert_equal(again, on_disk)


@pytest.mark.slow
def test_train_start_of_other_run_goes_on_with_its_towers() -> None:
    first = run(steps=30)
    second = run(steps=1, start=first.start)
    assert second.entity_encoders["pin"] is first.entity_encoders["pin"]
    assert second.history[0]["loss"] < first.history[0]["loss"]


def test_train_loss_not_finite_stops_and_saves_batch(tmp_path: Path) -> None:
    run(steps=4, checkpoint_every=2, output=tmp_path)
    before = {
        path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()
    }
    broken = tiny_query_encoder()
    with torch.no_grad():
        broken.projection.bias.fill_(float("nan"))
    with pytest.raises(
        TrainingDiverged,
        match=r"the loss of step 0 is nan.*diverged-step-00000000\.json.*learning_rate",
    ):
        run(steps=4, output=tmp_path / "other", start=TrainStart(broken))
    saved = json.loads((tmp_path / "other" / "diverged-step-00000000.json").read_text())
    assert (
        len(saved["datasets"]["pin"]["queries"]) == len(saved["datasets"]["pin"]["positives"]) > 0
    )
    assert saved["loss"] == "nan"
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()
    }


def test_train_checkpoint_of_other_run_is_refused_and_kept(tmp_path: Path) -> None:
    run(steps=2, output=tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run(steps=2, seed=1, output=tmp_path)
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(steps=2, output=tmp_path, resume=False)
    state = list_checkpoints(tmp_path / "checkpoints")[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        run(steps=2, output=tmp_path)


@pytest.mark.parametrize("changed", ["weights", "tokenizer"])
def test_train_resume_with_another_query_tower_is_refused(tmp_path: Path, changed: str) -> None:
    run(steps=2, checkpoint_every=2, output=tmp_path)
    tower = tiny_query_encoder(seed=1 if changed == "weights" else 0)
    if changed == "tokenizer":
        table = json.loads(tower.tokenizer.backend_tokenizer.to_str())
        vocabulary = table["model"]["vocab"]
        vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
        tower.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(table))
    with pytest.raises(CheckpointError, match="tokenizer"):
        run(steps=2, checkpoint_every=2, output=tmp_path, start=TrainStart(tower))


def test_train_bad_settings_are_refused_before_training() -> None:
    with pytest.raises(
        ConfigError, match=r"the query tower gives 16 numbers, but model.dimension is 24"
    ):
        run(model={"dimension": 24})
    with pytest.raises(ConfigError, match="device must be"):
        run(device="tpu")
    with pytest.raises(ConfigError, match="needs an output folder"):
        run(tensorboard=True)


def test_train_one_word_vocabulary_trains() -> None:
    catalogue = pl.DataFrame({"id": ["a", "b"], "entity_type": ["pin", "pin"], "title": ["x", "x"]})
    pairs = pl.DataFrame(
        {"query": ["red", "blue"], "entity_type": ["pin"] * 2, "entity_id": ["a", "b"]}
    )
    result = run(TrainingData(catalogue, pairs), steps=2, batch={"pairs": 2})
    assert result.steps == 2


def test_train_max_seconds_ends_run() -> None:
    result = run(steps=100_000, max_seconds=0.5)
    assert 0 < result.steps < 100_000


@pytest.mark.slow
def test_train_finished_by_clock_is_not_trained_again(tmp_path: Path) -> None:
    settings = {"steps": 100_000, "max_seconds": 0.5, "output": tmp_path}
    first, again = run(**settings), run(**settings)
    assert again.steps == first.steps > 0
    assert_equal(first, again)
    assert run(**settings | {"max_seconds": 1.0}).steps > first.steps, "more time goes on"


def test_train_tensorboard_writes_events(tmp_path: Path) -> None:
    run(steps=2, output=tmp_path, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A config with tables and a saved query tower beside it."""
    data = world()
    data.catalogue.write_parquet(tmp_path / "catalogue.parquet")
    data.pairs.write_parquet(tmp_path / "pairs.parquet")
    tiny_query_encoder().save(tmp_path / "tower")
    table = to_table(dataclasses.replace(small_config(steps=120, checkpoint_every=5), datasets=()))
    table["data"] = {"catalogue": ["catalogue.parquet"], "pairs": ["pairs.parquet"]}
    table["model"]["query_encoder"] = str(tmp_path / "tower")
    (tmp_path / "run.toml").write_text(
        as_toml({key: value for key, value in table.items() if key != "features"})
    )
    return tmp_path


def as_toml(table: dict) -> str:
    lines = [
        f"{key} = {json.dumps(value)}"
        for key, value in table.items()
        if not isinstance(value, dict)
    ]
    for name, inner in table.items():
        if isinstance(inner, dict):
            flat = [
                f"{key} = {json.dumps(value)}"
                for key, value in inner.items()
                if not isinstance(value, dict)
            ]
            nested = [
                f"{key} = {{ {', '.join(f'{k} = {v}' for k, v in value.items())} }}"
                for key, value in inner.items()
                if isinstance(value, dict)
            ]
            lines += [f"[{name}]", *flat, *nested]
    return "\n".join(lines) + "\n"


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Sums depend on how many threads share them: equal bits need equal thread counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_train_command_kill_9_resumes_to_same_bundle(files: Path, one_torch_thread: None) -> None:
    """A real process is killed in the middle; the same command goes on from its checkpoint and ends
    as if nothing had happened.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    arguments = [
        sys.executable,
        "-m",
        "encoders.commands.train",
        str(files / "run.toml"),
        "--out",
        str(files / "out"),
    ]
    process = subprocess.Popen(
        [*arguments, "--steps", "120"], env=environment, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    while len(list_checkpoints(files / "out" / "checkpoints")) < 2:
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = list_checkpoints(files / "out" / "checkpoints")[-1].name
    resumed = CliRunner().invoke(
        command, [str(files / "run.toml"), "--out", str(files / "out"), "--steps", "120", "--json"]
    )
    assert resumed.exit_code == 0, resumed.output
    assert f"resumed from {reached}" in resumed.stderr
    whole = CliRunner().invoke(
        command,
        [str(files / "run.toml"), "--out", str(files / "whole"), "--steps", "120", "--json"],
    )
    assert (
        json.loads(resumed.stdout)["space_id"]
        == json.loads(whole.stdout)["space_id"]
        == load_bundle(files / "out" / "model").space_id
    )


def test_train_command_mistakes_exit_with_code_2(files: Path) -> None:
    assert CliRunner().invoke(command, []).exit_code == 2
    config = files / "run.toml"
    config.write_text("stepz = 3\n" + config.read_text())
    result = CliRunner().invoke(command, [str(config), "--out", str(files / "out")])
    assert result.exit_code == 2
    assert "did you mean 'steps'?" in result.stderr
    assert not (files / "out").exists()
