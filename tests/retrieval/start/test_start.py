"""``omni start``: recognises files of other systems, chooses a config, and ends in answers."""

import json
import re
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from encoders.config.train_config import load_train_config
from encoders.errors import ConfigError
from encoders.tables.files import check_table
from encoders.tables.reading_options import ReadingOptions
from index_builder.releases.store import ReleaseStore
from retrieval.start.command import Plan, Ports
from retrieval.start.recipe import shares, write_config
from retrieval.start.recognition import (
    Recognised,
    Source,
    as_shell,
    lacking,
    recognise,
    refuse_unused,
)
from retrieval.start.tables import (
    Prepared,
    hold_out,
    known_queries,
    log_flags,
    pairs_of_titles,
    questions,
)

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


def found(path: Path, table: str, reading: ReadingOptions, entity_type: str) -> Recognised:
    return recognise(Source.of(path, table, reading), reading, entity_type)


def test_recognise_makes_files_of_other_systems_readable(files: tuple[Path, Path]) -> None:
    shop, clicks = files
    catalogue = found(shop, "catalogue", ReadingOptions(), "product")
    assert set(catalogue.found) == {
        "--rename=sku=id",
        "--rename=name=title",
        "--rename=summary=description",
        "--set=entity_type=product",
    }
    log = found(clicks, "log", ReadingOptions(), "product")
    assert {
        "--rename=ts=timestamp",
        "--rename=search_term=query",
        "--rename=sku=entity_id",
        "--rename=event=action",
        "--rename=uid=user_id",
        "--map=action.purchase=checkout",
        "--map=action.cart=add_to_cart",
        "--map=action.view=impression",
    } <= set(log.found)
    assert not catalogue.missing and not log.missing


def test_recognise_leaves_what_was_given(files: tuple[Path, Path]) -> None:
    given = ReadingOptions(rename={"sku": "id"}, constants={"entity_type": "pin"})
    recognised = found(files[0], "catalogue", given, "product")
    assert not any("sku" in flag or "entity_type" in flag for flag in recognised.found)
    assert recognised.given == ["--rename=sku=id", "--set=entity_type=pin"]


def test_recognise_rename_for_the_catalogue_means_nothing_in_the_log(
    files: tuple[Path, Path],
) -> None:
    given = ReadingOptions(rename={"sku": "id"}, values={"action": {"save": "click"}})
    recognised = found(files[1], "log", given, "product")
    assert recognised.given == ["--map=action.save=click"]
    assert "--rename=sku=entity_id" in recognised.found


def test_recognise_type_column_of_other_values_is_no_entity_type(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("id,type,title\na,book,x\nb,film,y\n")
    assert found(path, "catalogue", ReadingOptions(), "pin").found == ["--set=entity_type=pin"]


def test_recognise_entity_types_of_the_users_own_stay(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("id,entity_type,title\na,listing,x\nb,package,y\nc,Real estate,z\n")
    assert found(path, "catalogue", ReadingOptions(), "pin").found == [
        "--map=entity_type.Real estate=real_estate"
    ]


def test_recognise_names_what_nothing_stands_for(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("code,words,price\na,x,1\n")
    source = Source.of(path, "catalogue", ReadingOptions())
    recognised = recognise(source, ReadingOptions(), "pin")
    assert recognised.missing == ("id", "title")
    message = lacking(source, recognised.missing, recognised.free)
    assert "code, words, price" in message and "--rename COLUMN=id" in message


def test_refuse_unused_rename_of_no_column(files: tuple[Path, Path]) -> None:
    sources = [Source.of(files[0], "catalogue", ReadingOptions())]
    with pytest.raises(ConfigError, match="no file has a column 'skuu'"):
        refuse_unused(sources, ReadingOptions(rename={"skuu": "id"}))


@pytest.mark.parametrize("zero_shot", [False, True])
@pytest.mark.parametrize("pairs", [{"product": 1}, {"listing": 90_000, "product": 100}])
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


def events(path: Path, days: int, action: str, **more: Any) -> Path:
    first = datetime(2026, 1, 1, tzinfo=UTC)
    times = [first + timedelta(days=days) * n / 99 for n in range(100)]
    pl.DataFrame({"timestamp": times, "action": action, **more}).write_parquet(path)
    return path


@pytest.mark.parametrize(("days", "held_out"), [(0, 10), (1, 10), (9, 10), (119, 10)])
def test_log_flags_last_tenth_of_a_short_log_is_held_out(
    days: int, held_out: int, tmp_path: Path
) -> None:
    path = events(tmp_path / "log.parquet", days, "save")
    end, gap, length = (flag.split("=")[1] for flag in log_flags(path))
    times = pl.read_parquet(path)["timestamp"]
    until = datetime.fromisoformat(end)
    assert gap == "0"
    assert (times >= until).sum() == (held_out if days else len(times))
    assert until + timedelta(days=int(length)) > times.max()


def test_log_flags_long_log_has_the_usual_windows(tmp_path: Path) -> None:
    assert log_flags(events(tmp_path / "log.parquet", 400, "save")) == []


def test_log_flags_clicks_count_where_nothing_else_is_known(tmp_path: Path) -> None:
    counted = "--map=action.click=long_click"
    assert counted in log_flags(events(tmp_path / "a.parquet", 400, "click"))
    assert log_flags(events(tmp_path / "b.parquet", 400, "click", dwell_seconds=1.0)) == []


def test_known_queries_of_a_log_are_those_of_several_users(tmp_path: Path) -> None:
    pairs = pl.DataFrame({"query": ["a", "b"], "language": "", "split": "train", "count": 1})
    pairs.write_parquet(tmp_path / "pairs.parquet")
    catalogue = pl.DataFrame({"id": ["x"], "entity_type": "pin"})
    catalogue.write_parquet(tmp_path / "catalogue.parquet")
    out = tmp_path / "queries.parquet"
    assert known_queries(tmp_path / "pairs.parquet", tmp_path, out)
    assert pl.read_parquet(out)["id"].to_list() == ["a", "b"]
    (tmp_path / "engaged_queries").mkdir()
    pl.DataFrame({"query": ["b"]}).write_parquet(tmp_path / "engaged_queries" / "part-0.parquet")
    assert known_queries(tmp_path / "pairs.parquet", tmp_path, out)
    assert pl.read_parquet(out)["id"].to_list() == ["b"]


def test_questions_are_titles_where_there_are_no_pairs(tmp_path: Path) -> None:
    catalogue = pl.DataFrame({"id": ["x", "y"], "entity_type": "pin", "title": ["red", None]})
    catalogue.write_parquet(tmp_path / "catalogue.parquet")
    assert questions(tmp_path, Prepared(None, {}, False), "pin") == ["red"]


def test_plan_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.csv").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        Plan(tmp_path, 1.0, False).claim()
    own = Plan(tmp_path / "new", 1.0, False)
    own.claim()
    own.claim()


def test_plan_training_on_other_data_is_set_aside(tmp_path: Path) -> None:
    plan, config = Plan(tmp_path, 1.0, False), tmp_path / "run.toml"
    config.write_text("steps = 1\n")
    run = tmp_path / "run"
    plan.set_aside_other_run(run, config)
    (run / "checkpoint").touch()
    plan.set_aside_other_run(run, config)
    assert (run / "checkpoint").is_file()
    config.write_text("steps = 2\n")
    plan.set_aside_other_run(run, config)
    assert not (run / "checkpoint").is_file()
    assert (tmp_path / "run_before" / "checkpoint").is_file()


def test_ports_taken_one_is_named_before_any_work() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--metrics-port {port}"):
            Ports(0, port).require_free()
    assert Ports(50051, 9464).flags() == []
    assert Ports(7, 8).flags() == ["--port=7", "--metrics-port=8"]


def test_as_shell_can_be_typed() -> None:
    assert as_shell(["data", "convert", "my file.csv"]) == "omni data convert 'my file.csv'"


def check_log(text: str) -> None:
    """Logged lines must be meant for people: none of libraries, no digits that say nothing."""
    assert len(text.splitlines()) > 10
    for line in text.splitlines():
        assert not re.search(r"\b(DEBUG|INFO|WARNING)\b:", line), line
        assert not re.search(r"\d\.\d{8}|\d{12}", re.sub(r"\S*/\S*", "", line)), line


def start(out: Path, *arguments: object, check: bool = True) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "retrieval", "start", "--out", str(out)),
            *("--no-serve", "--json", *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if not check:
        return {"code": done.returncode, "error": done.stderr}
    assert done.returncode == 0, done.stderr[-3000:]
    if "--quiet" not in arguments:
        check_log(done.stderr)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


@pytest.mark.slow
@pytest.mark.parametrize("with_log", [False, True])
def test_start_zero_shot_fuses_own_entity_type_and_answers(
    with_log: bool, files: tuple[Path, Path], tmp_path: Path
) -> None:
    shop, clicks = files
    log = ["--log", clicks, "--quiet"] if with_log else []
    out = tmp_path / "out"
    summary = start(out, "--catalogue", shop, "--entity-type", "listing", *log)
    assert summary["zero_shot"]
    assert summary["fusion"]["listing"]["on"]
    assert summary["entities"]["listing"] == 60
    assert summary["latency_ms"]["p50"] > 0
    assert list((out / "text_vectors").rglob("*.npy"))
    assert summary["commands"][0] == f"export OMNI_TEXT_VECTORS={out / 'text_vectors'}"
    metrics = json.loads((out / "zero_shot" / "model" / "metrics.json").read_text())
    assert (metrics["residual_weight/listing"], metrics["query_interpolation"]) == (0, 0)
    with ReleaseStore(out / "store").open_current() as release:
        index = release.entity("listing")
        assert index.search(index.vector("s3"), 1, filter="price == 3.5").ids == ["s3"]


@pytest.mark.slow
def test_start_trains_on_ready_pairs_of_two_types_and_its_commands_can_be_repeated(
    tmp_path: Path,
) -> None:
    things = [f"{wood} {thing}" for wood in ("oak", "ash", "elm") for thing in ("bed", "desk")]
    rows = [(f"e{n}", "seller" if n % 3 else "listing", things[n % 6]) for n in range(300)]
    frame = pl.DataFrame(rows, schema=["id", "entity_type", "title"], orient="row")
    frame.write_csv(tmp_path / "c.csv")
    pairs = [
        (f"{title} {n} no {m}", kind, id_)
        for n, (id_, kind, title) in enumerate(rows)
        for m in range(9)
    ]
    frame = pl.DataFrame(pairs, schema=["query", "entity_type", "entity_id"], orient="row")
    frame.write_csv(tmp_path / "p.csv")
    out = tmp_path / "out"
    arguments = ("--catalogue", tmp_path / "c.csv", "--pairs", tmp_path / "p.csv")
    summary = start(out, *arguments, "--minutes", "0.1", "--quiet")
    assert not summary["zero_shot"]
    assert set(summary["recall@10"]) == {"listing", "seller"}
    assert all(r["queries"] and r["bm25"] >= 0 for r in summary["recall@10"].values())
    assert {"listing", "seller", "query"} == set(summary["entities"])
    evaluate = next(line for line in summary["commands"] if line.startswith("omni evaluate"))
    assert evaluate.endswith(" --engaged-queries 0 --json"), "the release has none either"
    rebuild = next(line for line in summary["commands"] if line.startswith("omni rebuild"))
    words = [sys.executable, "-m", "retrieval", *shlex.split(rebuild)[1:], "--quiet"]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_start_names_what_is_missing_before_it_makes_anything(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("code,words\na,x\n")
    out = tmp_path / "out"
    ended = start(out, "--catalogue", path, check=False)
    assert ended["code"] == 2
    assert "--rename COLUMN=id" in ended["error"]
    assert not out.exists()
