"""The simulator, and the pipeline: one result for any partitions, here and on Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from encoders.commands import pairs as pairs_command
from encoders.commands.data import group
from encoders.errors import ConfigError, DataError, RowError
from encoders.file_modes import replace_folder
from encoders.logs.pairs import PairsConfig, find_leaks
from encoders.logs.pipeline import PipelineConfig, PipelineInputs, run_pipeline
from encoders.logs.simulator import SimulatorConfig, simulate_boards, simulate_log, write_simulation
from encoders.tables.checks import check_frame
from encoders.tables.files import write_table
from encoders.tables.schemas import BOARDS, LOG

CONFIG = SimulatorConfig(
    rows=12_000, days=120, rows_per_file=4_000, users=300, duplicates=0.05, late=0.05, seed=4
)
NAMES = ("pairs", "engaged_queries", "board_titles")


@pytest.fixture(scope="module")
def annotations() -> pl.DataFrame:
    words = ["red", "green", "blue", "cat", "dog", "tree", "house", "café", "дом"]
    rows = [
        {
            "language": "ru" if b == "дом" else "en",
            "query": f"{a} {b}",
            "entity_type": kind,
            "entity_id": f"{kind}:{(i * j) % 23}",
        }
        for i, a in enumerate(words)
        for j, b in enumerate(words)
        for kind in ("pin", "product")
    ]
    return pl.DataFrame(rows)


@pytest.fixture(scope="module")
def simulation(annotations: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulation")
    write_simulation(annotations, folder, CONFIG)
    return folder


def read(folder: Path, name: str) -> pl.DataFrame:
    frame = pl.read_parquet(folder / name / "*.parquet")
    return frame.sort(frame.columns)


def test_simulate_log_is_a_valid_labelled_log(simulation: Path) -> None:
    log = pl.concat([pl.read_parquet(p) for p in sorted((simulation / "log").iterdir())])
    assert not check_frame(log, LOG, "log").report.rules_broken
    assert not check_frame(
        pl.read_parquet(simulation / "boards.parquet"), BOARDS, "boards"
    ).report.rules_broken
    assert json.loads((simulation / "simulation.json").read_text())["simulated"] is True
    assert set(log["action"]) == {
        "impression",
        "click",
        "long_click",
        "save",
        "add_to_cart",
        "checkout",
        "query_click",
    }
    assert abs(log.height - CONFIG.rows * (1 + CONFIG.duplicates)) < 0.02 * CONFIG.rows
    clicks = (
        log.filter(pl.col("action").is_in(["click", "long_click"]))["position"]
        .value_counts()
        .sort("position")["count"]
        .to_list()
    )
    assert clicks[0] > 1.3 * clicks[-1]
    span = log["timestamp"].max() - log["timestamp"].min()  # type: ignore[operator]
    assert timedelta(days=115) < span < timedelta(days=120)  # type: ignore[operator]
    files = [pl.read_parquet(p)["timestamp"] for p in sorted((simulation / "log").iterdir())]
    assert files[1].min() < files[0].max()  # late events


def test_simulate_log_depends_on_seed_alone(
    annotations: pl.DataFrame,
) -> None:
    small = replace(CONFIG, rows=2_000)
    first, again = (pl.concat(simulate_log(annotations, small)) for _ in range(2))
    assert first.equals(again)
    assert not first.equals(pl.concat(simulate_log(annotations, replace(small, seed=5))))
    assert simulate_boards(annotations, small).equals(simulate_boards(annotations, small))


def test_simulator_config_impossible_settings_are_refused(annotations: pl.DataFrame) -> None:
    for bad in ({"rows": 0}, {"noise": 1.5}, {"searches_per_session": 0.5}):
        with pytest.raises(ConfigError, match="SimulatorConfig"):
            SimulatorConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs pairs"):
        next(simulate_log(annotations.clear(), CONFIG))


def inputs_of(simulation: Path) -> PipelineInputs:
    """The log and boards of a simulation."""
    return PipelineInputs(log=simulation / "log", boards=simulation / "boards.parquet")


@pytest.fixture(scope="module")
def local(simulation: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("local") / "out"
    return out, run_pipeline(inputs_of(simulation), out, PipelineConfig())


def test_pipeline_number_of_partitions_changes_nothing(
    local: tuple[Path, dict], simulation: Path, tmp_path: Path
) -> None:
    out, summary = local
    cut = run_pipeline(inputs_of(simulation), tmp_path / "out", PipelineConfig(partitions=5))
    for name in NAMES:
        assert read(out, name).equals(read(tmp_path / "out", name)), name
        assert read(out, name).height > 0
    assert cut["counts"] == summary["counts"]
    assert not list(tmp_path.glob(".out*"))


def test_pipeline_heldout_pairs_are_not_visible_to_training(local: tuple[Path, dict]) -> None:
    out, summary = local
    leaks = find_leaks(read(out, "pairs"), read(out, "engaged_queries"))
    assert leaks.through_pairs.height == leaks.through_features.height == 0
    assert summary["counts"]["dropped: heldout pairs seen in training"] > 0
    assert read(out, "pairs")["split"].n_unique() == 2


def test_pipeline_every_event_is_accounted_for(simulation: Path, tmp_path: Path) -> None:
    config = PipelineConfig(pairs=PairsConfig(keep_seen=True))
    summary = run_pipeline(PipelineInputs(log=simulation / "log"), tmp_path / "out", config)
    counts = summary["counts"]
    events_dropped = sum(
        n for name, n in counts.items() if name.startswith("dropped: ") and "pairs" not in name
    )
    assert counts["events"] == events_dropped + read(tmp_path / "out", "pairs")["count"].sum()


def test_pipeline_empty_log_gives_empty_tables(tmp_path: Path) -> None:
    write_table(LOG.empty(), tmp_path / "log.parquet")
    for partitions in (1, 3):
        summary = run_pipeline(
            PipelineInputs(log=tmp_path / "log.parquet"),
            tmp_path / f"out{partitions}",
            PipelineConfig(partitions=partitions),
        )
        assert summary["counts"]["pairs"] == 0
        assert read(tmp_path / f"out{partitions}", "pairs").height == 0


def test_pipeline_failed_run_leaves_the_old_result(
    local: tuple[Path, dict], simulation: Path, tmp_path: Path
) -> None:
    write_table(LOG.empty(), tmp_path / "log.parquet")
    out, config = tmp_path / "out", PipelineConfig()
    run_pipeline(PipelineInputs(log=tmp_path / "log.parquet"), out, config)
    bad = pl.read_parquet(simulation / "log" / "part-00000.parquet").with_columns(
        pl.lit("x\0").alias("query")
    )
    write_table(bad, tmp_path / "bad.parquet")
    with pytest.raises(RowError, match="NUL"):
        run_pipeline(PipelineInputs(log=tmp_path / "bad.parquet"), out, config, overwrite=True)
    assert json.loads((out / "summary.json").read_text())["counts"]["pairs"] == 0


def test_pipeline_interrupted_in_its_check_leaves_the_old_result(tmp_path: Path) -> None:
    write_table(LOG.empty(), tmp_path / "log.parquet")
    inputs, out = PipelineInputs(log=tmp_path / "log.parquet"), tmp_path / "out"
    run_pipeline(inputs, out, PipelineConfig())
    before = (out / "summary.json").stat()

    def interrupted(work: Path, summary: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(inputs, out, PipelineConfig(), overwrite=True, check=interrupted)
    assert (out / "summary.json").stat() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "out"]


@pytest.mark.parametrize("interrupted", ["first", "second"])
def test_replace_folder_interrupted_keeps_the_old_folder(
    interrupted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "out", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    renames = []
    rename = os.rename

    def interrupting(source: Path, target: Path) -> None:
        renames.append(source)
        if len(renames) == {"first": 1, "second": 2}[interrupted]:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupting)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(new, old)
    assert (old / "name").read_text() == "out"
    assert (new / "name").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]
    replace_folder(new, old)
    assert (old / "name").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_simulate_command_labels_its_log(tmp_path: Path) -> None:
    arguments = [
        "simulate-logs",
        "--out",
        str(tmp_path / "sim"),
        "--rows",
        "500",
        "--days",
        "30",
        "--users",
        "50",
        "--json",
    ]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["simulated"] is True
    assert CliRunner().invoke(group, [*arguments, "--noise", "7"]).exit_code == 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes of one core each, as Ray's own tests start them."""
    pytest.importorskip("ray")
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20}
    )
    nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_pipeline_two_nodes_equal_the_local_result(
    cluster: str, local: tuple[Path, dict], simulation: Path, tmp_path: Path
) -> None:
    from encoders.logs.ray_pipeline import run_ray_pipeline

    out, summary = local
    config = PipelineConfig(batch_rows=2_500)
    remote = run_ray_pipeline(inputs_of(simulation), tmp_path / "out", config, address=cluster)
    import ray

    assert len(ray.nodes()) == 2
    for name in NAMES:
        assert read(out, name).equals(read(tmp_path / "out", name)), name
    assert remote["counts"] == summary["counts"]
    assert remote["windows"] == summary["windows"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_pipeline_log_without_columns_is_refused(cluster: str, tmp_path: Path) -> None:
    from encoders.logs.ray_pipeline import run_ray_pipeline

    (tmp_path / "log.csv").touch()
    inputs = PipelineInputs(log=tmp_path / "log.csv")
    for run in (run_pipeline, partial(run_ray_pipeline, address=cluster)):
        with pytest.raises(DataError, match=r"log\.csv: the log is empty"):
            run(inputs, tmp_path / "out", PipelineConfig(partitions=2))


def test_pipeline_reads_every_named_log(
    local: tuple[Path, dict], simulation: Path, tmp_path: Path
) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--boards", str(simulation / "boards.parquet")]
    for part in sorted((simulation / "log").iterdir()):
        arguments += ["--log", str(part)]
    assert arguments.count("--log") > 1
    result = CliRunner().invoke(pairs_command.command, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    for name in NAMES:
        assert read(tmp_path / "out", name).equals(read(local[0], name)), name
