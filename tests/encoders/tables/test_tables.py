"""Reading tables: every kind of bad input has a stated outcome; no change goes unreported."""

from __future__ import annotations

import gzip
import json
import unicodedata
from datetime import UTC, datetime
from pathlib import Path

import click
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.commands import enrich as enrich_commands
from encoders.commands import pairs as pairs_command
from encoders.commands.data import group
from encoders.errors import ConfigError, DataError, RowError, SchemaError
from encoders.tables.checks import check_frame
from encoders.tables.files import check_table, read_table, write_table
from encoders.tables.profile import describe_table, spread
from encoders.tables.schemas import CATALOGUE, LOG, SCHEMAS, guess_table, schema

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LOG_HEADER = "timestamp,query,entity_type,entity_id,action,dwell_seconds,user_id\n"


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "suffix", ["csv", "tsv", "jsonl", "jsonl.gz", "csv.gz", "parquet", "arrow"]
)
def test_write_table_read_back_is_equal(tmp_path: Path, suffix: str) -> None:
    frame = pl.DataFrame(
        {
            "id": ["a", "b"],
            "entity_type": ["pin", "product"],
            "title": ['say "hi", all', None],
            "board_titles": [["x y", "z|w"], []],
            "pinsage": [[0.5, 1.0], [0.25, -1.0]],
        },
        schema_overrides={"pinsage": pl.List(pl.Float32)},
    )
    write_table(frame, tmp_path / f"t.{suffix}")
    assert read_table(tmp_path / f"t.{suffix}", "catalogue").equals(frame)


@pytest.mark.parametrize(
    ("rows", "column", "parts"),
    [
        (
            "a,My shoes,x\n",
            "entity_type",
            ["row 1", "must be a name of lower-case", "'My shoes'", "=my_shoes'"],
        ),
        ("a,pin,x\n,pin,y\n", "id", ["row 2", "a value is required"]),
        ("a,pin,x\na,pin,y\n", "id", ["row 1", "repeats with different content", "'a'"]),
        (
            f"a,pin,{'x' * 1_000_000}\n",
            "title",
            ["row 1", "longer than 100,000 characters", "1,000,000"],
        ),
    ],
)
def test_read_table_bad_catalogue_row_names_file_row_column_value(
    tmp_path: Path, rows: str, column: str, parts: list[str]
) -> None:
    with pytest.raises(RowError) as caught:
        read_table(put(tmp_path, "c.csv", "id,entity_type,title\n" + rows), "catalogue")
    for part in ["c.csv", repr(column), *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("1700000000,q,pin,a,click,-3,u", "must be at least 0"),
        ("1700000000,q,pin,a,click,x,u", "must be a number"),
        ("1700000000,q,pin,a,purchase,1,u", "must be one of"),
        ("1900000000,q,pin,a,click,1,u", "timestamp in the future"),
        ("17,q,pin,a,click,1,u", "timestamp before 1995"),
        ("1700000000,  ,pin,a,click,1,u", "a value is required"),
        (",q,pin,a,click,1,u", "a value is required"),
        ('" ",q,pin,a,click,1,u', "a value is required"),
        ("1e40,q,pin,a,click,1,u", "timestamp is not in s"),
        ("nan,q,pin,a,click,1,u", "timestamp"),
    ],
)
def test_check_table_bad_log_rows_are_refused_or_counted(
    tmp_path: Path, row: str, rule: str
) -> None:
    path = put(
        tmp_path,
        "log.csv",
        f"{LOG_HEADER}1700000000,ok,pin,a,save,,u\n1700000001,ok,pin,a,save,,u\n{row}\n",
    )
    with pytest.raises(RowError, match="row 3"):
        read_table(path, "log", now=NOW)
    checked = check_table(path, "log", on_bad_rows="drop", now=NOW)
    assert checked.frame["query"].to_list() == ["ok", "ok"]
    assert checked.rejected["row"].to_list() == [3]
    assert any(rule in broken for broken in checked.report.rules_broken)


@pytest.mark.parametrize(
    "stamps",
    [
        ["1700000000", "1700000100"],
        ["1700000000000", "1700000100000"],
        ["2023-11-14T22:13:20Z", "2023-11-14T22:15:00Z"],
        ["2023-11-14 22:13:20", "2023-11-15T00:15:00+02:00"],
        ["1700000000000000", "1700000100000000"],
        ["1700000000000000000", "1700000100000000000"],
    ],
)
def test_timestamps_of_every_unit_mean_the_same_moment(tmp_path: Path, stamps: list[str]) -> None:
    rows = "".join(f"{stamp},q,pin,a,save,,u\n" for stamp in stamps)
    frame = read_table(put(tmp_path, "log.csv", LOG_HEADER + rows), "log", now=NOW)
    assert frame["timestamp"].to_list() == [
        datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC),
        datetime(2023, 11, 14, 22, 15, tzinfo=UTC),
    ]


def test_timestamps_mixed_units_are_refused(tmp_path: Path) -> None:
    rows = "1700000000,q,pin,a,save,,u\n1700000000,q,pin,a,save,,u\n1700000000000,q,pin,a,save,,u\n"
    with pytest.raises(RowError, match=r"row 3.*not in s as most of the column"):
        read_table(put(tmp_path, "log.csv", LOG_HEADER + rows), "log", now=NOW)


def test_timestamps_without_zone_are_utc() -> None:
    base = {"query": ["q"], "entity_type": ["pin"], "entity_id": ["a"], "action": ["save"]}
    for stamp in ([1_700_000_000], [datetime(2023, 11, 14, 22, 13, 20)]):
        checked = check_frame(pl.DataFrame({"timestamp": stamp, **base}), LOG, "x", now=NOW)
        assert checked.frame["timestamp"].to_list() == [
            datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
        ]
        assert len(checked.report.notes) == 1


def test_read_table_empty_log_has_no_rows(tmp_path: Path) -> None:
    frame = read_table(put(tmp_path, "log.csv", LOG_HEADER), "log")
    assert frame.height == 0
    assert frame.schema["timestamp"] == pl.Datetime("us", "UTC")
    with pytest.raises(SchemaError, match="needs the column"):
        read_table(put(tmp_path, "nothing.csv", ""), "log")


def test_ids_of_other_unicode_forms_are_one_id(tmp_path: Path) -> None:
    nfd, nfc = unicodedata.normalize("NFD", "café"), unicodedata.normalize("NFC", "café")
    path = put(
        tmp_path,
        "c.jsonl",
        "\n".join(json.dumps({"id": i, "entity_type": "pin", "title": "x"}) for i in (nfd, nfc)),
    )
    checked = check_table(path, "catalogue")
    assert checked.frame["id"].to_list() == [nfc]
    assert any("NFC" in note for note in checked.report.notes)
    assert any("repeat an earlier row exactly" in note for note in checked.report.notes)


def test_read_table_wrong_encoding_is_found_and_named_one_is_read(tmp_path: Path) -> None:
    text = "id,entity_type,title\na,pin,café\n"
    path = put(tmp_path, "c.csv", text.encode("latin-1"))
    with pytest.raises(RowError, match=r"line 2: byte 0xe9 is not utf-8"):
        read_table(path, "catalogue")
    assert read_table(path, "catalogue", encoding="latin-1")["title"].to_list() == ["café"]
    mixed = put(tmp_path, "m.csv", text.encode("utf-8") + "b,pin,olé\n".encode("latin-1"))
    with pytest.raises(RowError, match="line 3"):
        read_table(mixed, "catalogue")
    with_mark = put(tmp_path, "bom.csv", "\ufeff".encode() + text.encode())
    assert read_table(with_mark, "catalogue")["id"].to_list() == ["a"]
    assert read_table(put(tmp_path, "16.csv", text.encode("utf-16")), "catalogue")[
        "title"
    ].to_list() == ["café"]
    with pytest.raises(DataError, match="unknown encoding"):
        read_table(path, "catalogue", encoding="klingon")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_read_table_nul_bytes_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    pl.DataFrame({"id": ["a"], "entity_type": ["pin"], "title": ["x\0y"]}).pipe(write_table, path)
    with pytest.raises(RowError, match="NUL"):
        read_table(path, "catalogue")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a", "entity_type": "pin"}\n{"id": ', "row 2: not valid JSON"),
        ('{"id": "a", "entity_type": "pin"}\n[1]\n', "row 2: expected a JSON object"),
        (
            (
                '{"id": "a", "entity_type": "pin", "x": [1]}\n{"id": "b", "entity_type": "pin",'
                ' "x": 1}\n'
            ),
            "row 2, column 'x'",
        ),
    ],
)
def test_read_table_bad_json_line_names_row(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("[", r"\[")):
        read_table(put(tmp_path, "t.jsonl", content), "catalogue")


def test_read_table_row_with_too_many_cells_is_named(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"row 2: expected 3 cells, got 4"):
        read_table(
            put(tmp_path, "t.csv", "id,entity_type,title\na,pin,x\nb,pin,x,y\n"), "catalogue"
        )


def test_read_table_truncated_and_unknown_files_are_refused(tmp_path: Path) -> None:
    write_table(pl.DataFrame({"id": ["a"], "entity_type": ["pin"]}), tmp_path / "t.parquet")
    put(tmp_path, "cut.parquet", (tmp_path / "t.parquet").read_bytes()[:60])
    put(tmp_path, "cut.jsonl.gz", gzip.compress(b'{"id": "a"}' * 100)[:30])
    for name, message in [
        ("cut.parquet", "complete"),
        ("cut.jsonl.gz", "complete"),
        ("x.xls", "unknown format"),
        ("gone.csv", "no such file"),
    ]:
        if name == "x.xls":
            put(tmp_path, name, "x")
        with pytest.raises(DataError, match=message):
            read_table(tmp_path / name, "catalogue")


def test_read_table_numeric_ids_and_mixed_types_become_text(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        "t.jsonl",
        '{"id": 1, "entity_type": "pin"}\n{"id": "b", "entity_type": "pin", "new": true}\n',
    )
    assert read_table(path, "catalogue")["id"].to_list() == ["1", "b"]


def test_read_table_folder_is_one_table_whose_ids_must_not_clash(tmp_path: Path) -> None:
    for n, title in enumerate(["x", "y"]):
        write_table(
            pl.DataFrame({"id": [f"a{n}", "same"], "entity_type": "pin", "title": ["t", title]}),
            tmp_path / f"p{n}.parquet",
        )
    with pytest.raises(RowError, match="'same'"):
        read_table(tmp_path, "catalogue")
    checked = check_table(tmp_path, "catalogue", on_bad_rows="drop")
    assert checked.frame["id"].to_list() == ["a0", "a1"]
    assert (checked.report.rows_read, checked.rejected.height) == (4, 2)


def test_counts_negative_or_fractional_are_refused_large_ones_exact() -> None:
    base = {"query": ["q"], "entity_type": ["pin"], "entity_id": ["a"]}
    for count in (-1, 1.5):
        assert (
            check_frame(
                pl.DataFrame({**base, "count": [count]}), SCHEMAS["pairs"], "x"
            ).frame.height
            == 0
        )
    big = 2**60 + 1
    assert check_frame(pl.DataFrame({**base, "count": [big]}), SCHEMAS["pairs"], "x").frame[
        "count"
    ].to_list() == [big]


def test_vectors_with_nan_or_another_width_are_refused() -> None:
    frame = pl.DataFrame(
        {
            "id": list("abc"),
            "entity_type": "pin",
            "pinsage": [[1.0, 2.0], [1.0, float("nan")], [1.0, 2.0]],
        }
    )
    assert check_frame(frame, CATALOGUE, "x").frame["id"].to_list() == ["a", "c"]
    frame = frame.with_columns(pl.Series("pinsage", [[1.0, 2.0], [1.0], [1.0, 2.0]]))
    assert check_frame(frame, CATALOGUE, "x").frame["id"].to_list() == ["a", "c"]


@pytest.mark.parametrize("count", [2.0**70, "99999999999999999999", float("inf")])
def test_counts_beyond_64_bits_are_refused(count: float | str) -> None:
    frame = pl.DataFrame({"query": ["q"], "entity_id": ["a"], "grade": [count]})
    checked = check_frame(frame, SCHEMAS["judgements"], "x")
    assert (checked.frame.height, checked.rejected.height) == (0, 1)


@pytest.mark.parametrize("cell", ["[1,2", '[1,"a"]', "[[1],[2]]", "1 2", "{}"])
def test_vector_cells_not_lists_of_numbers_are_refused(cell: str) -> None:
    frame = pl.DataFrame({"id": list("abc"), "entity_type": "pin", "pinsage": ["[1,2]", cell, ""]})
    checked = check_frame(frame, CATALOGUE, "x")
    assert checked.frame.select("id", "pinsage").rows() == [("a", [1.0, 2.0]), ("c", None)]
    assert "row 2, column 'pinsage'" in checked.report.problems[0].describe("x")


def test_vector_cells_may_hold_vectors_of_several_images() -> None:
    frame = pl.DataFrame({"id": ["a", "b"], "entity_type": "pin", "visual": ["[[1,2],[3,4]]", ""]})
    assert check_frame(frame, CATALOGUE, "x").frame["visual"].to_list() == [
        [[1.0, 2.0], [3.0, 4.0]],
        None,
    ]


def test_lists_in_text_columns_and_null_required_lists_are_refused() -> None:
    with pytest.raises(SchemaError, match="board_titles"):
        check_frame(
            pl.DataFrame({"id": ["a"], "entity_type": "pin", "board_titles": [[["x"]]]}),
            CATALOGUE,
            "x",
        )
    assert (
        check_frame(
            pl.DataFrame({"query": ["q"], "path": [None]}), SCHEMAS["labels"], "x"
        ).frame.height
        == 0
    )


def test_timestamps_at_the_end_of_the_calendar_are_refused() -> None:
    for stamp in ("9999-12-31T23:59:59-10:00", "0001-01-01T00:00:00+05:00"):
        frame = pl.DataFrame(
            {
                "timestamp": [stamp],
                "query": "q",
                "entity_type": "pin",
                "entity_id": "a",
                "action": "save",
            }
        )
        assert check_frame(frame, LOG, "x", now=NOW).rejected.height == 1


def test_check_frame_clashing_ids_are_rejected_beside_other_bad_rows() -> None:
    frame = pl.DataFrame(
        {
            "id": ["a", "a", "b"],
            "entity_type": ["pin", "pin", "Shoe"],
            "board_titles": ["x|y", "z", "w"],
        }
    )
    checked = check_frame(frame, CATALOGUE, "x")
    assert checked.frame.height == 0
    assert sorted(checked.rejected.select("row", "id", "board_titles").rows()) == [
        (1, "a", "x|y"),
        (2, "a", "z"),
        (3, "b", "w"),
    ]


texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
).filter(lambda t: t.strip())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(texts, st.sampled_from(["pin", "product", "shoe"]), st.none() | texts),
        max_size=12,
    )
)
def test_check_frame_every_row_is_kept_merged_or_rejected(
    rows: list[tuple[str, str, str | None]],
) -> None:
    frame = pl.DataFrame(
        rows, schema={"id": pl.String, "entity_type": pl.String, "title": pl.String}, orient="row"
    )
    checked = check_frame(frame, CATALOGUE, "x")
    merged = sum(int(n.split()[0].replace(",", "")) for n in checked.report.notes if "merged" in n)
    assert checked.frame.height + checked.rejected.height + merged == frame.height
    assert checked.frame.select(pl.struct("entity_type", "id").is_unique().all()).item()
    again = check_frame(checked.frame, CATALOGUE, "x")
    assert again.frame.equals(checked.frame)
    assert not again.report.rules_broken


ODD_NUMBERS = (
    "nan",
    "-inf",
    "1e30",
    "1e400",
    "99999999999999999999",
    "-1",
    "1.5",
    "1735689600",
    "1735689600000",
    "1735689600e9",
)
ODD_TEXTS = (
    "",
    " ",
    "\0",
    "{}",
    "a|b",
    "e\u0301",
    "x" * 2001,
    "pin",
    "2025-01-01",
    "9999-12-31T23:59:59-10:00",
)
ODD_LISTS = ("[1,2", '[1,"a"]', "[[1],[2]]", "[null]")
odd_cells = st.sampled_from([*ODD_NUMBERS, *ODD_TEXTS, *ODD_LISTS, None])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SCHEMAS)), st.data())
def test_check_frame_any_cells_are_good_or_rejected(name: str, data: st.DataObject) -> None:
    """No cell crashes the checks, and no required value is missing in what they let through."""
    wanted = SCHEMAS[name]
    usual = {
        "choice": "pin",
        "integer": "1",
        "number": "1.5",
        "timestamp (UTC)": "1735689600",
        "vector": "[1,2]",
    }
    n = data.draw(st.integers(1, 4))
    cells = {
        c.name: data.draw(
            st.lists(st.just(usual.get(c.kind, "a")) | odd_cells, min_size=n, max_size=n)
        )
        for c in wanted.columns
    }
    checked = check_frame(
        pl.DataFrame(cells, schema=dict.fromkeys(cells, pl.String)), wanted, "x", now=NOW
    )
    merged = sum(int(note.split()[0]) for note in checked.report.notes if "merged" in note)
    assert checked.frame.height + checked.rejected.height + merged == n
    assert sum(checked.frame[c.name].null_count() for c in wanted.columns if c.required) == 0
    assert {c.name for c in wanted.columns} <= set(checked.frame.columns)


def test_guess_table_columns_of_each_schema_name_it() -> None:
    assert guess_table(["id", "entity_type", "title"]) == "catalogue"
    assert guess_table([c.name for c in LOG.columns]) == "log"
    assert guess_table([c.name for c in SCHEMAS["pairs"].columns]) == "pairs"
    assert guess_table(["something"]) is None
    with pytest.raises(ConfigError, match="unknown table"):
        schema("logs")
    for table in SCHEMAS.values():
        assert all(column.doc for column in table.columns)


def test_spread_tells_head_from_tail() -> None:
    found = spread(pl.Series(["a"] * 90 + [str(i) for i in range(10)]))
    assert found["distinct"] == 11
    assert found["top_1_percent_share"] == pytest.approx(0.9)
    assert found["seen_once_share"] == pytest.approx(10 / 11)
    assert spread(pl.Series([], dtype=pl.String))["distinct"] == 0


def test_describe_table_counts_missing_and_repeated() -> None:
    frame = pl.DataFrame(
        {
            "id": list("abcd"),
            "entity_type": "pin",
            "title": ["Cat", "cat", None, " "],
            "board_titles": [[], ["x"], None, ["y"]],
        }
    )
    found = describe_table(frame, CATALOGUE)
    missing = {c["column"]: c["missing_share"] for c in found["columns"]}
    assert (missing["title"], missing["board_titles"]) == (0.5, 0.5)
    assert found["duplicates"]["entities whose title another entity has, too"] == 2
    assert found["scripts"] == {"Latin": pytest.approx(2 / 3)}


def test_data_commands_exit_code_is_honest(tmp_path: Path) -> None:
    good = put(tmp_path, "good.csv", "id,entity_type,title\na,pin,x\n")
    bad = put(tmp_path, "bad.csv", "id,entity_type,title\na,Shoe,x\nb,pin,y\n")
    run = CliRunner().invoke
    assert run(group, ["validate", str(good)]).exit_code == 0
    result = run(group, ["validate", str(bad), "--json", "--rejects", str(tmp_path / "r.jsonl")])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["rows_kept"] == 1
    assert json.loads((tmp_path / "r.jsonl").read_text())["problem"].startswith("entity_type")
    assert run(group, ["validate", str(put(tmp_path, "odd.csv", "a,b\n1,2\n"))]).exit_code == 1
    assert "is empty" in run(group, ["validate", str(put(tmp_path, "nothing.csv", ""))]).stderr
    result = run(group, ["describe", str(good), "--json", "--plots", str(tmp_path / "plots")])
    assert result.exit_code == 0
    assert all(Path(p).stat().st_size > 1000 for p in json.loads(result.stdout)["plots"])
    assert (
        run(group, ["import", "nonsense", str(tmp_path), "--out", str(tmp_path / "o")]).exit_code
        == 2
    )


def test_commands_name_drop_bad_rows_only_where_it_exists(tmp_path: Path) -> None:
    """Every command named --drop-bad-rows, also those that refuse the option."""
    catalogue = put(
        tmp_path, "c.csv", "id,entity_type\n" + "".join(f"{n},Shoe\n" for n in range(6))
    )
    log = put(
        tmp_path,
        "log.csv",
        LOG_HEADER + "".join(f"1700000000,q,Shoe,{n},save,1,u\n" for n in range(6)),
    )
    boards = put(tmp_path, "b.csv", "board_id,title,entity_id\n" + ",t,p\n" * 6)
    good = put(tmp_path, "good.csv", LOG_HEADER + "1700000000,q,pin,p,save,1,u\n")
    new = str(tmp_path / "new")
    with_option: list[tuple[click.Command, list[object]]] = [
        (group, ["describe", catalogue]),
        (pairs_command.command, ["--log", log, "--out", new]),
        (pairs_command.command, ["--log", good, "--boards", boards, "--out", new]),
        (enrich_commands.group, ["queries", "--state", new, "--create", "--log", log]),
    ]
    without: list[tuple[click.Command, list[object]]] = [
        (pairs_command.command, ["--log", good, "--catalogue", catalogue, "--out", new]),
        (
            enrich_commands.group,
            ["boards", "--catalogue", catalogue, "--boards", boards, "--out", new],
        ),
    ]
    for command, arguments in (*with_option, *without):
        result = CliRunner().invoke(command, [str(argument) for argument in arguments])
        assert (
            result.exit_code == 1
            and "(6 values break a rule; see omni data validate" in result.stderr
        ), result.output
        assert ("--drop-bad-rows" in result.stderr) == ((command, arguments) in with_option), (
            arguments
        )
