"""Events and pairs: what counts, what is dropped and why, caps, the split in time, leaks."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.commands.pairs import command
from encoders.errors import ConfigError, RowError
from encoders.logs.events import (
    EVENT_SCHEMA,
    EngagementRules,
    engaged_events,
    merge_duplicates,
    read_events,
)
from encoders.logs.pairs import (
    LeakError,
    PairsConfig,
    TimeSplit,
    build_pairs,
    find_leaks,
    pairs_table,
    parse_day,
    refuse_leaks,
)
from encoders.tables.files import write_table
from tests.helpers.log_examples import START, event_rows, events_of

DAY = timedelta(days=1)
SPLIT = TimeSplit(START, START + 20 * DAY, START + 25 * DAY, START + 40 * DAY)


def log_of(*rows: tuple[str, str, float | None]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "timestamp": START,
                "query": q,
                "entity_type": "pin",
                "entity_id": "a",
                "action": a,
                "dwell_seconds": d,
                "user_id": "u",
            }
            for q, a, d in rows
        ],
        schema_overrides={"dwell_seconds": pl.Float64},
    )


def test_engaged_events_dwell_decides_click_or_long_click() -> None:
    log = log_of(
        ("q1", "click", 10),
        ("q2", "click", 9.9),
        ("q3", "long_click", 3),
        ("q4", "long_click", None),
        ("q5", "click", None),
    )
    found = engaged_events(log, EngagementRules(min_dwell_seconds=10)).frame
    assert found["action"].to_list() == ["long_click", "click", "click", "long_click", "click"]


def test_engaged_events_normalise_queries_and_report_bad_rows() -> None:
    log = log_of(
        ("  red\u00a0 cat ", "save", None),
        ("cafe\u0301", "save", None),
        ("x", "impression", None),
        ("x", "purchase", None),
    )
    found = engaged_events(log, EngagementRules())
    assert found.frame["query"].to_list() == ["red cat", "café"]
    assert list(found.report.rules_broken.values()) == [1]


def test_engaged_events_suggested_queries_are_normalised() -> None:
    log = log_of(("q", "query_click", None)).with_columns(
        entity_type=pl.lit("query"), entity_id=pl.lit(" a  b ")
    )
    assert engaged_events(log, EngagementRules()).frame["entity_id"].to_list() == ["a b"]


def test_read_events_parquet_batches_name_rows_of_the_file(tmp_path: Path) -> None:
    log = log_of(*[("q", "impression", None)] * 5, ("q", "save", None), ("q", "save", -1.0))
    write_table(log, tmp_path / "log.parquet")
    frames = [
        e.frame.height
        for e in read_events(tmp_path, EngagementRules(), on_bad_rows="drop", batch_rows=3)
    ]
    assert sum(frames) == 1
    with pytest.raises(RowError, match="row 7, column 'dwell_seconds'"):
        list(read_events(tmp_path, EngagementRules(), batch_rows=3))


def test_build_pairs_only_paper_actions_count() -> None:
    events = events_of(
        (1, "q", "u", "pin", "p", "save"),
        (1, "q", "u", "pin", "p", "add_to_cart"),
        (1, "q", "u", "pin", "p", "click"),
        (1, "q", "u", "product", "r", "checkout"),
        (1, "q", "u", "query", "other", "query_click"),
        (1, "q", "u", "query", "q", "query_click"),
    )
    pairs = build_pairs(events, PairsConfig(), SPLIT)
    assert pairs.frame.select("entity_id", "action").rows() == [
        ("p", "save"),
        ("r", "checkout"),
        ("other", "query_click"),
    ]
    assert pairs.counts["dropped: events whose action makes no pair"] == 2
    assert pairs.counts["dropped: clicks on a suggestion equal to the query"] == 1


def test_build_pairs_equal_events_count_once() -> None:
    one = (1.0, "q", "u", "pin", "p", "save")
    pairs = build_pairs(
        events_of(one, one, (2, "q", "u", "pin", "p", "save"), (2, "q", "v", "pin", "p", "save")),
        PairsConfig(),
        SPLIT,
    )
    assert pairs.frame.select("count", "timestamp").rows() == [(3, START + 2 * DAY)]
    assert pairs.counts["dropped: duplicate events"] == 1


def test_build_pairs_split_in_time_has_gap_and_half_open_windows() -> None:
    days = {
        "before": -0.1,
        "first": 0.0,
        "last": 19.9,
        "gap": 20.0,
        "gap2": 24.9,
        "held": 25.0,
        "after": 40.0,
    }
    pairs = build_pairs(
        events_of(*((d, q, "u", "pin", "p", "save") for q, d in days.items())), PairsConfig(), SPLIT
    )
    assert dict(pairs.frame.select("query", "split").iter_rows()) == {
        "first": "train",
        "last": "train",
        "held": "heldout",
    }
    assert (
        pairs.counts["dropped: events in the gap"],
        pairs.counts["dropped: events outside the windows"],
    ) == (2, 2)


def test_split_at_default_windows_end_with_the_log() -> None:
    last = datetime(2026, 1, 1, tzinfo=UTC) - timedelta(microseconds=1)
    split = PairsConfig(gap_days=15, heldout_days=30, train_days=365).split_at(last)
    assert split.heldout_end == datetime(2026, 1, 1, tzinfo=UTC)
    assert (split.heldout_start - split.train_end, split.train_end - split.train_start) == (
        15 * DAY,
        365 * DAY,
    )
    everything = PairsConfig(heldout_days=0).split_at(last)
    assert everything.train_end == everything.heldout_end == datetime(2026, 1, 1, tzinfo=UTC)


def test_build_pairs_heldout_seen_in_training_is_dropped() -> None:
    events = events_of(
        (1, "Red Cat", "u", "pin", "p", "save"),
        (30, "red cat", "u", "pin", "p", "long_click"),
        (30, "red cat", "u", "pin", "other", "save"),
    )
    dropped = build_pairs(events, PairsConfig(), SPLIT)
    assert dropped.frame.filter(split="heldout")["entity_id"].to_list() == ["other"]
    assert dropped.counts["dropped: heldout pairs seen in training"] == 1
    kept = build_pairs(events, PairsConfig(keep_seen=True), SPLIT)
    leaks = find_leaks(kept.frame)
    assert leaks.through_pairs.height == 1
    with pytest.raises(LeakError, match=r"1 of 2 evaluation pairs.*training pair.*'red cat' -> p"):
        refuse_leaks(leaks, 2)


def test_build_pairs_heldout_visible_in_features_is_dropped() -> None:
    events = events_of(
        (30, "red cat", "u", "pin", "p", "save"), (31, "blue", "u", "pin", "p", "save")
    )
    features = pl.DataFrame({"entity_type": ["pin"], "entity_id": ["p"], "query": ["RED cat"]})
    leaky = build_pairs(events, PairsConfig(), SPLIT).frame
    with pytest.raises(LeakError, match="engaged-query feature"):
        refuse_leaks(find_leaks(leaky, features), leaky.height)
    clean = build_pairs(events, PairsConfig(), SPLIT, features=features)
    assert clean.frame["query"].to_list() == ["blue"]
    refuse_leaks(find_leaks(clean.frame, features), 1)


def test_build_pairs_cap_keeps_whole_queries_fair_and_seeded() -> None:
    events = events_of(
        *((day % 19, f"q{day % 40}", f"u{day}", "pin", "giant", "save") for day in range(400)),
        (1, "x", "u", "pin", "small", "save"),
    )
    survived: Counter[str] = Counter()
    for seed in range(60):
        pairs = build_pairs(
            events,
            PairsConfig(caps={"pin": 10, "product": 1, "ad": 1, "query": 1}, seed=seed),
            SPLIT,
        ).frame
        giant = pairs.filter(entity_id="giant")
        assert giant["query"].n_unique() == 10
        assert pairs.filter(entity_id="small").height == 1
        survived.update(giant["query"].to_list())
    # 60 draws of 10 of 40: each query survives 15 times, give or take; 4 standard deviations of the
    # binomial are 13.4.
    assert set(survived) == {f"q{i}" for i in range(40)}
    assert max(abs(n - 15) for n in survived.values()) <= 13
    again = [
        build_pairs(
            events.sample(fraction=1.0, shuffle=True, seed=s), PairsConfig(seed=3), SPLIT
        ).frame
        for s in (1, 2)
    ]
    assert again[0].equals(again[1])


def test_build_pairs_one_giant_entity_leaves_others_alone() -> None:
    events = events_of(
        *((1, f"q{i}", f"u{i}", "pin", "giant", "save") for i in range(5000)),
        (1, "x", "u", "pin", "small", "save"),
    )
    pairs = build_pairs(events, PairsConfig(), SPLIT)
    assert pairs.frame.group_by("entity_id").len().sort("entity_id").rows() == [
        ("giant", 50),
        ("small", 1),
    ]
    assert pairs.counts["dropped: pairs above the popularity cap"] == 4950


def test_build_pairs_unknown_entities_are_left_out_and_counted() -> None:
    events = events_of(
        (1, "q", "u", "pin", "known", "save"),
        (1, "q", "u", "pin", "gone", "save"),
        (1, "q", "u", "query", "free", "query_click"),
    )
    known = pl.DataFrame({"entity_type": ["pin", "pin"], "entity_id": ["known", "never clicked"]})
    pairs = build_pairs(events, PairsConfig(), SPLIT, known=known)
    assert pairs.frame["entity_id"].to_list() == ["known", "free"]
    assert pairs.counts["dropped: events of entities that are not in the catalogue"] == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(event_rows, max_size=40))
def test_build_pairs_every_event_is_a_pair_or_has_a_reason(rows: list) -> None:
    pairs = build_pairs(events_of(*rows), PairsConfig(keep_seen=True), SPLIT)
    dropped = sum(
        n
        for name, n in pairs.counts.items()
        if name.startswith("dropped: ") and "pairs" not in name
    )
    assert pairs.counts["events"] == len(rows) == dropped + pairs.frame["count"].sum()
    apart = [
        build_pairs(part, PairsConfig(), SPLIT)
        for part in events_of(*rows).partition_by("entity_id")
    ]
    whole = build_pairs(events_of(*rows), PairsConfig(), SPLIT)
    if apart:
        together = pl.concat([p.frame for p in apart])
        assert together.sort(together.columns).equals(whole.frame.sort(together.columns))
        assert sum((p.counts for p in apart), Counter()) == +whole.counts


def test_build_pairs_own_entity_type_is_paired_and_capped_as_products_are() -> None:
    actions = ["save", "checkout", "click", "query_click"]
    rows = [(1.0, f"q{n}", "u", "listing", "a", action) for n in range(300) for action in actions]
    pairs = build_pairs(events_of(*rows), PairsConfig(), SPLIT).frame
    assert set(pairs["action"]) == {"save", "checkout"}
    assert pairs["query"].n_unique() == 200


def test_build_pairs_empty_log_gives_none() -> None:
    pairs = build_pairs(pl.DataFrame(schema=EVENT_SCHEMA), PairsConfig(), SPLIT)
    assert pairs.frame.height == 0
    assert pairs_table(pairs.frame).height == 0
    assert merge_duplicates(pl.DataFrame(schema=EVENT_SCHEMA)).height == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"caps": {"pin": 0}},
        {"caps": {"a shoe": 5}},
        {"actions": {"pin": ("impression",)}},
        {"train_days": 0},
        {"gap_days": -1},
        {"train_end": datetime(2026, 1, 1)},
    ],
)
def test_config_impossible_settings_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError, match="PairsConfig"):
        PairsConfig(**arguments)
    with pytest.raises(ConfigError, match="2026-01-31"):
        parse_day("yesterday")


@pytest.fixture()
def log_file(tmp_path: Path) -> Path:
    events = events_of(
        *((d, f"q{d % 7}", f"u{d}", "pin", f"p{d % 5}", "save") for d in range(100)),
        (99, "q0", "x", "pin", "p9", "save"),
    )
    write_table(
        events.select("timestamp", "query", "user_id", "entity_type", "entity_id", "action"),
        tmp_path / "log.parquet",
    )
    return tmp_path / "log.parquet"


def test_command_writes_pairs_features_and_summary(log_file: Path, tmp_path: Path) -> None:
    write_table(
        pl.DataFrame({"id": ["p1", "lonely"], "entity_type": "pin", "title": ["x", "y"]}),
        tmp_path / "c.jsonl",
    )
    arguments = [
        "--log",
        str(log_file),
        "--out",
        str(tmp_path / "o"),
        "--catalogue",
        str(tmp_path / "c.jsonl"),
        "--min-users",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["counts"]["catalogue entities without any pair"] == 1
    assert json.loads((tmp_path / "o" / "summary.json").read_text()) == summary
    enriched = pl.read_parquet(tmp_path / "o" / "catalogue.parquet")
    assert enriched["engaged_queries"].list.len().to_list()[1] == 0
    assert enriched["engaged_queries"].list.len().to_list()[0] > 0
    again = CliRunner().invoke(command, arguments)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert CliRunner().invoke(command, [*arguments, "--overwrite"]).exit_code == 0


def test_command_reads_every_named_table(log_file: Path, tmp_path: Path) -> None:
    """--catalogue, --boards and --engaged may each be given several times."""
    boards = pl.DataFrame(
        {"board_id": ["b1", "b2"], "title": ["red shoes", "blue hats"], "entity_id": ["p1", "p2"]}
    )
    seen = pl.DataFrame(
        {"entity_type": "pin", "entity_id": ["p9", "p1"], "query": ["Q0", "nobody asked"]}
    )
    arguments = ["--log", str(log_file), "--out", str(tmp_path / "o"), "--drop-leaks", "--json"]
    for row, name in enumerate(["p1", "p2", "p9"]):
        write_table(
            pl.DataFrame({"id": [name], "entity_type": "pin", "title": [name]}),
            tmp_path / f"c{row}.csv",
        )
        arguments += ["--catalogue", str(tmp_path / f"c{row}.csv")]
    for row in (0, 1):
        write_table(boards[row : row + 1], tmp_path / f"b{row}.csv")
        write_table(seen[row : row + 1], tmp_path / f"e{row}.csv")
        arguments += [
            "--boards",
            str(tmp_path / f"b{row}.csv"),
            "--engaged",
            str(tmp_path / f"e{row}.csv"),
        ]
    result = CliRunner().invoke(command, [*arguments, "--min-users", "1"])
    assert result.exit_code == 0, result.output
    catalogue = pl.read_parquet(tmp_path / "o" / "catalogue.parquet").sort("id")
    assert catalogue["id"].to_list() == ["p1", "p2", "p9"]
    assert set(pl.read_parquet(tmp_path / "o" / "board_titles" / "*.parquet")["entity_id"]) == {
        "p1",
        "p2",
    }
    assert set(pl.read_parquet(tmp_path / "o" / "pairs" / "*.parquet")["entity_id"]) == {"p1", "p2"}
    through = f"{tmp_path / 'e0.csv'}, {tmp_path / 'e1.csv'}"
    assert (
        json.loads(result.stdout)["counts"][f"dropped: heldout pairs visible through {through}"]
        == 1
    )


def test_command_on_a_leak_fails_and_leaves_nothing(log_file: Path, tmp_path: Path) -> None:
    features = pl.DataFrame({"entity_type": ["pin"], "entity_id": ["p9"], "query": ["Q0"]})
    write_table(features, tmp_path / "f.parquet")
    arguments = [
        "--log",
        str(log_file),
        "--out",
        str(tmp_path / "o"),
        "--engaged",
        str(tmp_path / "f.parquet"),
    ]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 1
    assert "visible through an engaged-query feature" in result.stderr
    assert not (tmp_path / "o").exists()
    assert CliRunner().invoke(command, [*arguments, "--drop-leaks"]).exit_code == 0
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert (
        summary["counts"][f"dropped: heldout pairs visible through {tmp_path / 'f.parquet'}"] == 1
    )
    pairs = pl.read_parquet(tmp_path / "o" / "pairs" / "*.parquet")
    assert (
        pairs.height
        == summary["counts"]["pairs"]
        == sum(row["pairs"] for row in summary["table_1"])
    )


def test_command_on_a_leak_leaves_the_old_folder(log_file: Path, tmp_path: Path) -> None:
    features = pl.DataFrame({"entity_type": ["pin"], "entity_id": ["p9"], "query": ["Q0"]})
    write_table(features, tmp_path / "f.parquet")
    out = tmp_path / "o"
    arguments = ["--log", str(log_file), "--out", str(out)]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = [*arguments, "--overwrite", "--engaged", str(tmp_path / "f.parquet")]
    assert CliRunner().invoke(command, again).exit_code == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(tmp_path.glob(".*")) == []
    assert CliRunner().invoke(command, [*again, "--drop-leaks"]).exit_code == 0
    own = [
        *arguments,
        "--overwrite",
        "--engaged",
        str(out / "engaged_queries" / "part-00000.parquet"),
    ]
    assert CliRunner().invoke(command, own).exit_code == 0


def test_command_bad_rows_of_boards_are_counted(log_file: Path, tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("board_id,title,entity_id\n1,red shoes,p1\n,blue hats,p2\n")
    arguments = [
        "--log",
        str(log_file),
        "--boards",
        str(tmp_path / "b.csv"),
        "--out",
        str(tmp_path / "o"),
        "--drop-bad-rows",
        "--json",
    ]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bad_rows_dropped"] == {"boards: a value is required": 1}


def test_command_says_how_many_bad_rows_it_left_out(tmp_path: Path) -> None:
    rows = ("1700000000,q,pin,a,save", "1700000001,q,Shoe,a,save")
    header = "timestamp,query,entity_type,entity_id,action"
    (tmp_path / "log.csv").write_text("\n".join((header, *rows)) + "\n")
    arguments = [
        "--log",
        str(tmp_path / "log.csv"),
        "--out",
        str(tmp_path / "o"),
        "--heldout-days",
        "0",
    ]
    assert CliRunner().invoke(command, arguments).exit_code == 1
    result = CliRunner().invoke(command, [*arguments, "--drop-bad-rows"])
    assert result.exit_code == 0, result.output
    assert "bad rows left out" in result.stdout
