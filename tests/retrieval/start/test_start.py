"""``omni start``: recognises files of other systems, chooses a config, and ends in a store."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from encoders.config.train_config import load_train_config
from encoders.tables.files import check_table
from encoders.tables.reading_options import ReadingOptions
from index_builder.releases.store import ReleaseStore
from retrieval.start.recipe import Prepared, hold_out, pairs_of_titles, shares, write_config
from retrieval.start.recognition import as_shell, recognised_flags

SHOP = "sku;name;summary;price\n" + "".join(
    f"s{n};oak {thing} {n};made of wood;{n},50\n"
    for n, thing in enumerate(["table", "chair", "lamp", "bench"] * 15)
)
CLICKS = "ts,search_term,sku,event,uid\n" + "".join(
    f"17000{n:05d},oak {thing},s{n % 60},{event},u{n}\n"
    for n, (thing, event) in enumerate(
        [("table", "purchase"), ("chair", "cart"), ("lamp", "view"), ("bench", "save")] * 50
    )
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    shop, clicks = tmp_path / "shop.csv", tmp_path / "clicks.csv"
    shop.write_text(SHOP)
    clicks.write_text(CLICKS)
    return shop, clicks


def test_recognised_flags_make_files_of_other_systems_readable(files: tuple[Path, Path]) -> None:
    shop, clicks = files
    flags = recognised_flags(shop, "catalogue", ReadingOptions(), "product")
    assert set(flags) == {
        "--rename=sku=id",
        "--rename=name=title",
        "--rename=summary=description",
        "--set=entity_type=product",
    }
    flags = recognised_flags(clicks, "log", ReadingOptions(), "product")
    assert {
        "--rename=ts=timestamp",
        "--rename=search_term=query",
        "--rename=sku=entity_id",
        "--rename=event=action",
        "--rename=uid=user_id",
        "--map=action.purchase=checkout",
        "--map=action.cart=add_to_cart",
        "--map=action.view=impression",
    } <= set(flags)


def test_recognised_flags_leave_what_was_given(files: tuple[Path, Path]) -> None:
    given = ReadingOptions(rename={"sku": "id"}, constants={"entity_type": "pin"})
    flags = recognised_flags(files[0], "catalogue", given, "product")
    assert not any("sku" in flag or "entity_type" in flag for flag in flags)


def test_recognised_flags_type_column_of_other_values_is_no_entity_type(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("id,type,title\na,book,x\nb,film,y\n")
    assert recognised_flags(path, "catalogue", ReadingOptions(), "pin") == ["--set=entity_type=pin"]


@pytest.mark.parametrize("zero_shot", [False, True])
@pytest.mark.parametrize("pairs", [{"product": 1}, {"pin": 90_000, "product": 100}])
def test_write_config_is_one_that_training_reads(
    pairs: dict[str, int], zero_shot: bool, tmp_path: Path
) -> None:
    prepared = Prepared(tmp_path / "data" / "pairs", pairs, True)
    write_config(tmp_path / "run.toml", prepared, 60, zero_shot=zero_shot)
    config = load_train_config(tmp_path / "run.toml")
    assert [dataset.name for dataset in config.datasets] == list(pairs)
    assert (config.steps == 1) == zero_shot
    assert config.data.pairs == (tmp_path / "data" / "pairs",)


def test_shares_small_types_get_some_of_each_batch() -> None:
    assert shares({"pin": 1_000_000, "ad": 10, "product": 0}) == {"pin": 16, "ad": 1}


def test_hold_out_takes_a_tenth_of_queries_unless_some_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pairs = pl.DataFrame({"query": [f"q{n // 2}" for n in range(2000)], "split": "train"})
    pairs.write_parquet(path)
    hold_out(path)
    first = pl.read_parquet(path)
    assert 140 < (first["split"] == "heldout").sum() < 260
    assert first.group_by("query").agg(pl.col("split").n_unique())["split"].max() == 1
    hold_out(path)
    assert pl.read_parquet(path).equals(first)


def test_pairs_of_titles_are_pairs(tmp_path: Path) -> None:
    catalogue = pl.DataFrame({"id": ["a", "b"], "entity_type": "pin", "title": ["x", " "]})
    catalogue.write_parquet(tmp_path / "c.parquet")
    pairs_of_titles(tmp_path / "c.parquet", tmp_path / "p.parquet")
    read = check_table(tmp_path / "p.parquet", "pairs").frame
    assert read.select("query", "entity_id", "split").rows() == [
        ("x", "a", "train"),
        ("x", "a", "validation"),
    ]


def test_as_shell_can_be_typed() -> None:
    assert as_shell(["data", "convert", "my file.csv"]) == "omni data convert 'my file.csv'"


@pytest.mark.slow
@pytest.mark.parametrize("with_log", [False, True])
def test_start_ends_in_a_store_that_answers(
    with_log: bool, files: tuple[Path, Path], tmp_path: Path
) -> None:
    shop, clicks = files
    log = ["--log", str(clicks)] if with_log else []
    omni = [sys.executable, "-m", "retrieval", "start", "--catalogue", str(shop), *log]
    out = tmp_path / "out"
    done = subprocess.run(
        [*omni, "--out", str(out), "--no-serve", "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["zero_shot"]
    metrics = json.loads((out / "zero_shot" / "model" / "metrics.json").read_text())
    assert (metrics["residual_weight/product"], metrics["query_interpolation"]) == (0, 0)
    assert any(line.startswith("omni rebuild") for line in summary["commands"])
    store = ReleaseStore(out / "store")
    with store.open_current() as release:
        index = release.entity("product")
        assert index.count == 60
        assert index.search(index.vector("s3"), 1, filter="price == 3.5").ids == ["s3"]
