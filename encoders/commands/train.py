"""`omni train`: a TOML config and tables to a model bundle."""

from __future__ import annotations

import dataclasses
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
)
from encoders.config.train_config import DataConfig, TrainConfig
from encoders.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from encoders.towers.bundle import ModelBundle
    from encoders.training.loop import TrainResult

_START = """\
# A training run. Tables and keys that are left out have their defaults: docs/reference/training.md
steps = 2000
precision = "bf16"

[data]                     # empty: the sample data in the package
catalogue = []             # e.g. ["catalogue.parquet"]; relative to this file
pairs = []                 # e.g. ["pairs.parquet"]

[model]
query_encoder = "tiny-multilingual"
entity_towers = "unified"

[[datasets]]               # one table per source of pairs
name = "pin"
share = 8                  # its part of a batch, relative to the others
optional = true            # left out, with a note, when there are no such pairs; else an error
# candidates = ["entity", "vector:pinsage"]    # a second task whose candidate is the frozen vector

[[datasets]]
name = "product"
share = 4
optional = true

[[datasets]]
name = "ad"
share = 2
optional = true

[[datasets]]
name = "query"             # related queries: entity_id is the candidate query's text
share = 2
optional = true

[batch]
pairs = 1024
cross_fit = 4

[optimiser]
learning_rate = 2e-3
query_learning_rate = 5e-4
token_embedding_learning_rate = 5e-4
warmup_steps = 100

[validation]
every_steps = 200
patience = 5
"""


@click.command(name="train")
@click.argument(
    "config_path",
    metavar="CONFIG.toml",
    required=False,
    type=click.Path(path_type=Path, dir_okay=False),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run: checkpoints, TensorBoard events, the bundle in OUT/model.",
)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps instead of the config's.")
@click.option("--seed", type=int, help="Seed instead of the config's.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Device instead of the config's."
)
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events to OUT/tensorboard.")
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on from the last checkpoint in OUT, or refuse a folder that holds one.",
)
@click.option(
    "--print-config", is_flag=True, help="Print a config to start from, and do nothing else."
)
@data_option
@json_option
@handle_errors
def command(
    config_path: Path | None,
    out: Path | None,
    steps: int | None,
    seed: int | None,
    device: str | None,
    tensorboard: bool,
    resume: bool,
    print_config: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Train the query and entity towers, and save them as one bundle in OUT/model.

    A run killed at any moment goes on from its last checkpoint when the same command is given
    again. Config or data changed meanwhile: refused, nothing overwritten. On many GPUs: torchrun
    --nproc-per-node 8 -m encoders.commands.train CONFIG.toml --out OUT

    Example: omni train --print-config > run.toml && omni train run.toml --out runs/first
    """
    if print_config:
        click.echo(_START, nl=False)
        return
    if config_path is None or out is None:
        raise ConfigError(
            "expected CONFIG.toml and --out. `omni train --print-config > run.toml` writes a config"
            " to start from."
        )
    from encoders.config.train_config import load_train_config

    config = load_train_config(config_path)
    given = {"steps": steps, "seed": seed, "device": device, "tensorboard": tensorboard or None}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    config = dataclasses.replace(config, **changes)
    from encoders.tables.profile import filled_shares
    from encoders.training.data.prepare import require_entity_tower
    from encoders.training.data.source_tables import load_training_data
    from encoders.training.distributed import process_rank
    from encoders.training.loop import Trainer

    if out.is_file():
        raise ConfigError(f"--out {out} is a file; give a folder.")
    if os.environ.get("RANK", "0") == "0":  # under torchrun others would remove its probe's folder
        _require_writable(out)
    with _process_group(config.device):
        data = load_training_data(config, data_dir)
        trainer = Trainer(config, data, output=out)
        require_entity_tower(trainer.prepared)
        result = trainer.run(resume=resume)
        if process_rank() != 0:
            return
        columns = result.featurizer.config.text_columns | result.featurizer.config.continuous.keys()
        bundle = _save(out / "model", result, filled_shares(data.catalogue, columns))
    if as_json:
        rate = result.pairs_per_second
        facts = {
            "bundle": str(bundle.path),
            "space_id": bundle.space_id,
            "steps": result.steps,
            "pairs_per_second": round(rate, 1) if rate else None,
            "metrics": result.metrics,
        }
        print_json(facts)
        return
    title = f"{bundle.path}  space {bundle.space_id[:16]}"
    print_table(title, ["metric", "value"], sorted(result.metrics.items()))
    speed = "all of them in earlier runs"
    if result.pairs_per_second:
        speed = f"{result.pairs_per_second:,.0f} pairs/s"
    say(
        f"{result.steps:,} steps, {speed}. Next:"
        f" {evaluate_command_for(bundle.path, config, data_dir)}"
    )


def _require_writable(out: Path) -> None:
    """Make the folder of the run and write to it, before hours of work; then leave it as it was."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"x")
    finally:
        for folder in made:
            folder.rmdir()


def _save(path: Path, result: TrainResult, filled: dict[str, float]) -> ModelBundle:
    """Write the run's bundle.

    A bundle of the same space that is there already stays, with its exports and declarations.
    """
    from encoders.config.train_config import to_table
    from encoders.towers.bundle import load_bundle, save_bundle

    def write(folder: Path) -> ModelBundle:
        return save_bundle(
            folder,
            result.query_encoder,
            result.entity_encoders,
            training=to_table(result.config),
            metrics=result.metrics,
            filled=filled,
        )

    try:
        known = load_bundle(path)
    except BundleError:  # none, or one that is not whole
        return write(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-again-", dir=path.parent) as folder:
        same = write(Path(folder) / path.name).space_id == known.space_id
    if same:
        say(f"{path} holds this run's bundle already; left as it is")
    return known if same else write(path)


@contextmanager
def _process_group(device: str) -> Iterator[None]:
    """Under torchrun, join its process group, NCCL on CUDA and gloo on CPU, and leave it together.

    A process that ends inside its group leaves gloo's threads to the interpreter's end, which now
    and then aborts on them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    uses_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if uses_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if uses_cuda else "gloo")
    yield
    dist.barrier()
    dist.destroy_process_group()


def evaluate_command_for(bundle: Path, config: TrainConfig, data_dir: Path | None) -> str:
    """Write the `omni evaluate` that measures a bundle on the data of its own run."""
    evaluate = f"omni evaluate {shlex.quote(str(bundle))}"
    if not config.data.catalogue:
        return evaluate if data_dir is None else f"{evaluate} --data {shlex.quote(str(data_dir))}"
    folder = _folder_of(config.data)
    if folder is None:
        return (
            f"{evaluate} --data FOLDER, a folder that holds your tables as catalogue.* and pairs.*"
        )
    return f"{evaluate} --data {shlex.quote(str(folder))}"


def _folder_of(files: DataConfig) -> Path | None:
    """Find the folder whose ``catalogue.*`` and ``pairs.*`` are all that a run read; None: none.

    Each may also be a folder of part files.
    """
    if len(files.catalogue) != 1 or len(files.pairs) != 1:
        return None
    catalogue, pairs = files.catalogue[0], files.pairs[0]
    folder = catalogue.parent
    found = tuple(_table_in(folder, name) for name in ("catalogue", "pairs"))
    return folder if found == (catalogue, pairs) else None


def _table_in(folder: Path, table: str) -> Path | None:
    """Find the file or folder that ``encoders.datasets.dataset.load_tables`` reads as a table."""
    named = (
        path
        for path in folder.glob(f"{table}*")
        if path.is_dir() or path.name.split(".")[0] == table
    )
    return min(named, default=None)


if __name__ == "__main__":
    command()
