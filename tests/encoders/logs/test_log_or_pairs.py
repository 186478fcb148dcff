"""A file that may be a log or pairs is refused, and near names of columns are noted."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from encoders.commands.data import group
from encoders.tables.schemas import PAIRS, guess_table, lookalikes, schema

LOG = "ts,query,entity_type,entity_id,event,uid,dwell\n1735689600,red barn,pin,p1,click,u1,3\n"


def put(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


def test_validate_log_of_other_column_names_is_not_called_pairs(tmp_path: Path) -> None:
    path = put(tmp_path, "log.csv", LOG)
    result = run("validate", path)
    assert result.exit_code == 1 and result.stdout == ""
    assert "log.csv" in result.stderr and "log or pairs" in result.stderr
    assert "'ts' to 'timestamp'" in result.stderr and "'event' to 'action'" in result.stderr
    assert "--table log" in result.stderr and "--table pairs" in result.stderr


@pytest.mark.parametrize(
    ("more", "table"),
    [
        (["event"], None),
        (["Event_Time"], None),
        (["action"], None),
        (["timestamp"], None),
        (["country"], "pairs"),
        (["action", "split"], "pairs"),
        (["timestamp", "count"], "pairs"),
        (["timestamp", "action"], "log"),
    ],
)
def test_guess_table_pairs_only_where_it_cannot_be_a_log(
    more: list[str], table: str | None
) -> None:
    assert guess_table(["query", "entity_type", "entity_id", *more]) == table


def test_validate_columns_close_to_known_names_are_noted(tmp_path: Path) -> None:
    path = put(tmp_path, "log.csv", LOG.replace("ts,", "timestamp,").replace("event", "action"))
    result = run("validate", path)
    assert result.exit_code == 0, result.stderr
    notes = [line for line in result.stderr.splitlines() if line.startswith("note:")]
    assert any("'uid'" in note and "'user_id'" in note for note in notes)
    assert any("'dwell'" in note and "'dwell_seconds'" in note for note in notes)
    result = run("validate", put(tmp_path, "raw.csv", LOG), "--table", "log")
    assert result.exit_code == 1 and "'ts' to 'timestamp'" in result.stderr


def test_lookalikes_only_absent_names_are_suggested() -> None:
    assert lookalikes(["uid", "user_id", "querry", "query"], schema("log")) == {}
    assert lookalikes(["ts", "date"], schema("log")) == {"ts": "timestamp"}
    assert lookalikes(["UID", "querry", "colour"], schema("log")) == {
        "UID": "user_id",
        "querry": "query",
    }
    assert lookalikes(["colour", "price", "board_title"], schema("catalogue")) == {
        "colour": "color",
        "board_title": "board_titles",
    }
    assert lookalikes([c.name for c in PAIRS.columns] + ["kind", "source"], PAIRS) == {}
