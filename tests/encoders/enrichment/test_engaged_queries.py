"""Engaged queries: what counts, and that merged slices equal the whole window."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.commands.enrich import group
from encoders.enrichment.engaged_queries import EngagedQueriesConfig, attach_lists, engaged_queries
from encoders.enrichment.engaged_state import EngagedQueriesState, StateError
from encoders.errors import ConfigError
from encoders.logs.events import EVENT_SCHEMA
from encoders.tables.files import write_table
from tests.helpers.log_examples import START, event_rows, events_of

DAY = timedelta(days=1)
END = START + 50 * DAY


def config_of(**settings_: Any) -> EngagedQueriesConfig:
    return EngagedQueriesConfig(**{"min_users": 1, "window_days": 20, "top": 3, **settings_})


def slow_reference(
    rows: list[tuple], config: EngagedQueriesConfig, until: datetime
) -> list[tuple[str, str, str, int, int, int]]:
    """Engaged queries by plain loops over distinct events."""
    totals: dict[tuple[str, str], dict[str, tuple[int, set[str]]]] = {}
    for day, query, user, entity_type, entity, action in set(rows):
        when = START + timedelta(days=day)
        if until - timedelta(days=config.window_days) <= when < until and entity_type != "query":
            score, users = totals.setdefault((entity_type, entity), {}).get(query, (0, set()))
            totals[(entity_type, entity)][query] = (score + config.weights[action], users | {user})
    result = []
    for (entity_type, entity), queries in sorted(totals.items()):
        eligible = [(-s, -len(u), q) for q, (s, u) in queries.items() if len(u) >= config.min_users]
        eligible.sort(key=lambda item: (item[0], item[1], item[2].encode()))
        for rank, (score, users, query) in enumerate(eligible[: config.top], start=1):
            result.append((entity_type, entity, query, rank, -score, -users))
    return result


@settings(max_examples=40, deadline=None)
@given(st.lists(event_rows, max_size=60), st.integers(1, 3), st.integers(1, 45))
def test_engaged_queries_equal_a_slow_loop(rows: list, min_users: int, until_day: int) -> None:
    config, until = config_of(min_users=min_users), START + until_day * DAY
    assert engaged_queries(events_of(*rows), config, until).rows() == slow_reference(
        rows, config, until
    )


def test_engaged_queries_need_enough_different_users() -> None:
    events = events_of(
        *((d, "private", "u1", "pin", "p", "save") for d in range(9)),
        *((1, "shared", u, "pin", "p", "click") for u in ("a", "b", "c")),
    )
    assert engaged_queries(events, config_of(min_users=3), END - 30 * DAY)["query"].to_list() == [
        "shared"
    ]
    nameless = events.with_columns(user_id=pl.lit(""))
    assert engaged_queries(nameless, config_of(min_users=2), END - 30 * DAY).height == 0


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(event_rows, max_size=15), max_size=8), st.data())
def test_state_slices_in_any_order_equal_the_whole_window(
    slices: list[list], data: st.DataObject
) -> None:
    """Slices hold late events, repeats and events older than the window; users and queries are
    deleted midway.
    """
    config = config_of(min_users=2)
    everything = events_of(*(row for part in slices for row in part))
    gone_users: list[str] = []
    gone_queries: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        EngagedQueriesState.create(Path(folder) / "s", config) as state,
    ):
        served = state.features()
        for part in slices:
            merges = [state.merge(events_of(*part))]
            if data.draw(st.integers(0, 4)) == 0:
                gone_users.append("u1")
                merges.append(state.delete_users(["u1"]))
            if data.draw(st.integers(0, 4)) == 0:
                gone_queries.append("cat")
                merges.append(state.delete_queries(["cat"]))
            for merge in (
                merges
            ):  # what a consumer has that replaces the touched entities by the changed rows
                served = pl.concat(
                    [
                        served.join(merge.touched, on=["entity_type", "entity_id"], how="anti"),
                        merge.changed,
                    ]
                )
            assert served.sort("entity_type", "entity_id", "rank").rows() == state.features().rows()
        until = state.until
        if until is None:
            assert everything.height == 0
            return
        expected = engaged_queries(
            everything, config, until, deleted_users=gone_users, deleted_queries=gone_queries
        )
        assert state.features().rows() == expected.rows()
    if everything.height:
        assert until > everything["timestamp"].max()


def test_merge_returns_features_of_touched_entities(tmp_path: Path) -> None:
    with EngagedQueriesState.create(tmp_path / "s", config_of()) as state:
        state.merge(events_of((1, "a", "u", "pin", "p", "save"), (1, "b", "u", "pin", "q", "save")))
        merge = state.merge(events_of((2, "c", "u", "pin", "q", "checkout")))
        assert merge.touched.rows() == [("pin", "q")]
        assert merge.changed["query"].to_list() == ["c", "b"]
        assert merge.counts == {
            "given": 1,
            "too_old": 0,
            "deleted": 0,
            "repeated": 0,
            "added": 1,
            "expired": 0,
        }
        gone = state.merge(pl.DataFrame(schema=EVENT_SCHEMA), until=START + 22 * DAY)
        assert gone.counts["expired"] == 2
        assert gone.touched["entity_id"].to_list() == ["p", "q"]
        assert gone.changed["query"].to_list() == ["c"]
        assert [v["version"] for v in state.versions()] == [1, 2, 3]


def test_merge_below_user_threshold_touches_no_features(
    tmp_path: Path,
) -> None:
    with EngagedQueriesState.create(tmp_path / "s", config_of(min_users=2)) as state:
        assert state.merge(events_of((1, "a", "u1", "pin", "p", "save"))).touched.height == 0
        assert state.merge(events_of((2, "a", "u2", "pin", "p", "save"))).changed[
            "query"
        ].to_list() == ["a"]
        gone = state.merge(pl.DataFrame(schema=EVENT_SCHEMA), until=START + 22 * DAY)
        assert (gone.touched.rows(), gone.changed.height) == ([("pin", "p")], 0)


def test_state_with_another_min_users_shows_other_features(
    tmp_path: Path,
) -> None:
    with EngagedQueriesState.create(tmp_path / "s", config_of(min_users=1)) as state:
        state.merge(
            events_of(
                *((1, q, u, "pin", "p", "save") for q, u in (("a", "u1"), ("a", "u2"), ("b", "u1")))
            )
        )
        assert state.features()["query"].to_list() == ["a", "b"]
    for min_users, expected in ((2, ["a"]), (1, ["a", "b"])):
        with EngagedQueriesState(tmp_path / "s", config_of(min_users=min_users)) as state:
            assert state.features()["query"].to_list() == expected


def test_merge_counts_repeated_late_and_expired_events_apart(tmp_path: Path) -> None:
    day30 = events_of((30, "a", "u", "pin", "p", "save"))
    with EngagedQueriesState.create(tmp_path / "s", config_of()) as state:
        state.merge(day30)
        assert state.merge(day30).counts["repeated"] == 1
        assert state.merge(events_of((15, "late", "u", "pin", "p", "save"))).counts["added"] == 1
        assert (
            state.merge(events_of((5, "expired", "u", "pin", "p", "save"))).counts["too_old"] == 1
        )
        assert set(state.features()["query"]) == {"a", "late"}


def test_deleted_users_leave_no_trace_and_stay_deleted(tmp_path: Path) -> None:
    events = events_of(
        (1, "visible", "u1", "pin", "p", "save"), (1, "secret words", "u2", "pin", "p", "save")
    )
    with EngagedQueriesState.create(tmp_path / "s", config_of()) as state:
        state.merge(events)
        assert state.delete_users(["u2"]).counts["removed"] == 1
        assert state.features()["query"].to_list() == ["visible"]
        assert state.merge(events).counts["deleted"] == 1
    content = b"".join(p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file())
    assert b"secret words" not in content
    assert b"visible" in content
    assert b"u1" not in content


def test_deleted_queries_match_other_spellings(tmp_path: Path) -> None:
    events = events_of(
        (1, "Ann  Smith", "u1", "pin", "p", "save"), (1, "cat", "ve\u0301ra", "pin", "p", "save")
    )
    events = events.with_columns(pl.col("user_id").str.normalize("NFC"))  # as logs are read
    with EngagedQueriesState.create(tmp_path / "s", config_of()) as state:
        state.merge(events)
        assert state.delete_queries([" ann smith"]).counts["removed"] == 1
        assert state.delete_users(["ve\u0301ra"]).counts["removed"] == 1
        assert state.features().height == 0
        assert state.merge(events).counts["deleted"] == 2
    assert engaged_queries(events, config_of(), END - 30 * DAY, deleted_queries=["ANN SMITH"])[
        "query"
    ].to_list() == ["cat"]


def test_crash_between_files_and_commit_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    first, second = (
        events_of((1, "a", "u", "pin", "p", "save")),
        events_of((2, "b", "u", "pin", "p", "save")),
    )
    with EngagedQueriesState.create(tmp_path / "s", config) as state:
        state.merge(first)
        monkeypatch.setattr(
            EngagedQueriesState, "_apply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            state.merge(second)
        monkeypatch.undo()
        assert state.version == 1
    assert len(list((tmp_path / "s" / "events").iterdir())) == 2
    with EngagedQueriesState(tmp_path / "s", config) as state:
        assert len(list((tmp_path / "s" / "events").iterdir())) == 1
        state.merge(second)
        assert set(state.features()["query"]) == {"a", "b"}


def test_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    EngagedQueriesState.create(tmp_path / "s", config_of()).close()
    with pytest.raises(StateError, match="already holds"):
        EngagedQueriesState.create(tmp_path / "s", config_of())
    with pytest.raises(StateError, match="re-weighted"):
        EngagedQueriesState(tmp_path / "s", config_of(weights={"save": 9}))
    EngagedQueriesState(tmp_path / "s", config_of(top=9, min_users=7)).close()
    with pytest.raises(StateError, match="--create"):
        EngagedQueriesState(tmp_path / "nothing", config_of())
    with sqlite3.connect(tmp_path / "s" / "state.db") as db:
        db.execute("UPDATE meta SET value = '99' WHERE name = 'format_version'")
    with pytest.raises(StateError, match="format version 99"):
        EngagedQueriesState(tmp_path / "s", config_of())
    (tmp_path / "s" / "state.db").write_bytes(b"rubbish" * 1000)
    with pytest.raises(StateError, match="not a readable state"):
        EngagedQueriesState(tmp_path / "s", config_of())


def test_missing_event_file_is_named(tmp_path: Path) -> None:
    with EngagedQueriesState.create(tmp_path / "s", config_of()) as state:
        state.merge(events_of((1, "a", "u", "pin", "p", "save")))
        next((tmp_path / "s" / "events").iterdir()).unlink()
        with pytest.raises(StateError, match="2024-01-02"):
            state.merge(events_of((1, "b", "u", "pin", "p", "save")))


def test_merge_windows_end_at_midnight(tmp_path: Path) -> None:
    with EngagedQueriesState.create(tmp_path / "s", config_of()) as state:
        assert state.merge(pl.DataFrame(schema=EVENT_SCHEMA)).counts["added"] == 0
        with pytest.raises(ConfigError, match="midnight"):
            state.merge(
                pl.DataFrame(schema=EVENT_SCHEMA), until=datetime(2024, 1, 1, 5, tzinfo=UTC)
            )


@pytest.mark.parametrize(
    "bad",
    [
        {"weights": {"impression": 1}},
        {"weights": {"save": -1}},
        {"top": 0},
        {"window_days": 0},
        {"min_users": 0},
    ],
)
def test_config_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="EngagedQueriesConfig"):
        EngagedQueriesConfig(**bad)


def test_attach_lists_are_in_rank_order() -> None:
    catalogue = pl.DataFrame(
        {"id": ["b", "a"], "entity_type": "pin", "engaged_queries": [["old"], ["old"]]}
    )
    features = pl.DataFrame(
        {
            "entity_type": "pin",
            "entity_id": ["a", "a", "gone"],
            "rank": [2, 1, 1],
            "query": ["second", "first", "x"],
        }
    )
    assert attach_lists(catalogue, features, "engaged_queries", "query")[
        "engaged_queries"
    ].to_list() == [[], ["first", "second"]]


def test_command_merges_days_and_deletes(tmp_path: Path) -> None:
    for day in (1, 2):
        events = events_of(
            *((day, "red cat", f"u{n}", "pin", "p", "save") for n in range(3)),
            (day, "rare", "u9", "pin", "p", "save"),
        )
        write_table(events.drop("language", "country"), tmp_path / f"{day}.parquet")
    write_table(pl.DataFrame({"id": ["p"], "entity_type": "pin"}), tmp_path / "c.jsonl")
    state = ["queries", "--state", str(tmp_path / "s"), "--json"]
    run = CliRunner().invoke
    first = run(group, [*state, "--create", "--log", str(tmp_path / "1.parquet")])
    assert first.exit_code == 0, first.output
    out = tmp_path / "o.jsonl"
    second = run(
        group,
        [
            *state,
            "--log",
            str(tmp_path / "2.parquet"),
            "--catalogue",
            str(tmp_path / "c.jsonl"),
            "--out",
            str(out),
        ],
    )
    assert json.loads(second.stdout)["events added"] == 4
    assert json.loads(out.read_text())["engaged_queries"] == ["red cat"]
    (tmp_path / "delete.txt").write_text("red cat\n")
    third = run(
        group,
        [
            *state,
            "--delete-queries",
            str(tmp_path / "delete.txt"),
            "--out",
            str(tmp_path / "changed.parquet"),
        ],
    )
    assert json.loads(third.stdout)["events removed"] == 6
    # The row without a query tells readers of the changes to drop the entity's features, too.
    changed = pl.read_parquet(tmp_path / "changed.parquet")
    assert changed.rows() == [("pin", "p", None, None, None, None)]
    assert run(group, [*state, "--catalogue", str(tmp_path / "c.jsonl")]).exit_code == 2


def test_command_reads_every_named_file(tmp_path: Path) -> None:
    """--log, --catalogue, --delete-users and --delete-queries may each be given several times."""
    for day in (1, 2):
        events = events_of(
            *((day, f"red cat {day}", f"u{n}", "pin", f"p{day}", "save") for n in range(5))
        )
        write_table(events.drop("language", "country"), tmp_path / f"{day}.parquet")
        write_table(
            pl.DataFrame({"id": [f"p{day}"], "entity_type": "pin"}), tmp_path / f"c{day}.jsonl"
        )
        (tmp_path / f"user{day}.txt").write_text(f"u{day}\n")
        (tmp_path / f"query{day}.txt").write_text(f"Red Cat {day}\n")

    def run(*arguments: str, **repeated: str) -> dict:
        each = [
            part
            for option, name in repeated.items()
            for n in (1, 2)
            for part in (option_name(option), str(tmp_path / name.format(n)))
        ]
        result = CliRunner().invoke(
            group, ["queries", "--state", str(tmp_path / "s"), "--json", *arguments, *each]
        )
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def option_name(parameter: str) -> str:
        return "--" + parameter.replace("_", "-")

    out = tmp_path / "o.jsonl"
    assert (
        run("--create", "--out", str(out), log="{}.parquet", catalogue="c{}.jsonl")["events added"]
        == 10
    )
    assert pl.read_ndjson(out)["engaged_queries"].to_list() == [["red cat 1"], ["red cat 2"]]
    with EngagedQueriesState(tmp_path / "s", config_of(window_days=730)) as state:
        assert [line["what"] for line in state.versions()][-2:] == ["1.parquet", "2.parquet"]
    assert run(delete_users="user{}.txt")["events removed"] == 4
    assert run(delete_queries="query{}.txt")["events removed"] == 6


def test_command_counts_the_bad_rows_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "timestamp,query,entity_type,entity_id,action\n"
        "1700000000,q,pin,a,save\n1700000001,q,a shoe,a,save\n"
    )
    arguments = [
        "queries",
        "--state",
        str(tmp_path / "s"),
        "--create",
        "--log",
        str(tmp_path / "log.csv"),
        "--drop-bad-rows",
        "--json",
    ]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)
    assert counts["events added"] == 1
    assert sum(n for name, n in counts.items() if "must be a name" in name) == 1
