"""Unknown columns of CSV and TSV become numbers, booleans and lists where nothing is lost."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from encoders.commands.data import group
from encoders.tables.files import check_table, read_table, write_table


def catalogue(folder: Path, cells: list[str], name: str = "c.csv", *, first: int = 0) -> Path:
    """A catalogue whose column ``x`` holds these cells."""
    quoted = ['"' + cell.replace('"', '""') + '"' if cell else "" for cell in cells]
    rows = [f"p{first + number},pin,{cell}" for number, cell in enumerate(quoted)]
    path = folder / name
    path.write_text("\n".join(["id,entity_type,x", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("cells", "dtype", "values"),
    [
        (["349", "", "-7", " 20 "], pl.Int64, [349, None, -7, 20]),
        (["9223372036854775807", "0"], pl.Int64, [2**63 - 1, 0]),
        (
            ["349", "3.50", "", "-.5", "1e-07", "1.5E10"],
            pl.Float64,
            [349.0, 3.5, None, -0.5, 1e-7, 1.5e10],
        ),
        (["0.30000000000000004"], pl.Float64, [0.1 + 0.2]),
        (["true", "FALSE", "", "True"], pl.Boolean, [True, False, None, True]),
        (['["DE","US"]', "", "[]"], pl.List(pl.String), [["DE", "US"], None, []]),
        ([r'["\u00e9", "\ud83d\ude00"]'], pl.List(pl.String), [["é", "😀"]]),
        (["[1, 2]", "[]"], pl.List(pl.Int64), [[1, 2], []]),
        (["[1, 2.5]", "[]"], pl.List(pl.Float64), [[1.0, 2.5], []]),
    ],
)
def test_attributes_all_cells_of_one_type_become_it(
    tmp_path: Path, cells: list[str], dtype: pl.DataType, values: list
) -> None:
    found = check_table(catalogue(tmp_path, cells), "catalogue")
    assert found.frame["x"].dtype == dtype
    assert found.frame["x"].to_list() == values
    assert found.report.notes == []


@pytest.mark.parametrize(
    "cell",
    [
        *(
            "00123",
            "-0",
            "+4912345",
            "007.5",
            "9223372036854775808",
            "0.1234567890123456789",
            "1E5",
            "1e400",
            "1.5e400",
            "1.0e-400",
        ),
        *(
            "5.",
            "1,5",
            "1_000",
            "0x1f",
            "١٢",
            "nan",
            "inf",
            "yes",
            "TRUE!",
            "[1, [2]]",
            '["a", 1]',
            '["a", null]',
            "[NaN]",
            "[1",
            "[01]",
        ),
        *(
            "[9223372036854775808]",
            "[1.5, 9007199254740993]",
            "[0.1234567890123456789]",
            "[1e400]",
            r'["\ud800"]',
        ),
    ],
)
def test_attributes_cell_that_would_lose_digits_stays_text(tmp_path: Path, cell: str) -> None:
    found = read_table(catalogue(tmp_path, [cell, cell]), "catalogue")
    assert found["x"].to_list() == [cell, cell]


@pytest.mark.slow
@example([9_007_199_254_740_993])
@example([9_007_199_254_740_993, 0.5])
@given(
    st.lists(
        st.one_of(
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.from_regex(r"[0-9.eE+-]{1,12}", fullmatch=True),
        ),
        min_size=1,
    )
)
def test_attributes_numbers_are_never_changed(
    tmp_path_factory: pytest.TempPathFactory, values: list
) -> None:
    cells = [str(value) for value in values]
    frame = read_table(catalogue(tmp_path_factory.mktemp("n"), cells), "catalogue")
    if not cells:
        return
    if frame["x"].dtype == pl.String:
        assert frame["x"].to_list() == cells
    else:
        assert [Decimal(cell) for cell in cells] == [
            Decimal(repr(value)) for value in frame["x"].to_list()
        ]


def test_attributes_mostly_numbers_stay_text_and_misfit_is_named(tmp_path: Path) -> None:
    path = catalogue(tmp_path, ["3.5", "", "n/a", "12", "7"])
    found = check_table(path, "catalogue")
    assert found.frame["x"].to_list() == ["3.5", None, "n/a", "12", "7"]
    (note,) = found.report.notes
    assert "'x' stays text: 3 of 4 cells are numbers, but not c.csv, row 3: 'n/a'" in note
    shown = CliRunner().invoke(group, ["validate", str(path)])
    assert shown.exit_code == 0
    assert "stays text" in shown.stderr
    assert check_table(catalogue(tmp_path, ["red", "12", "blue"]), "catalogue").report.notes == []


def test_attributes_of_a_folder_have_one_type_in_all_files(tmp_path: Path) -> None:
    for name, parts, dtype in (
        ("wider", (["1", "2"], ["3.5"]), pl.Float64),
        ("empty", (["", ""], ["3"]), pl.Int64),
        ("codes", (["10115", "80331"], ["01067"]), pl.String),
        ("other", (["true"], ["1"]), pl.String),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for number, cells in enumerate(parts):
            catalogue(folder, cells, f"part-{number}.csv", first=10 * number)
        checked = check_table(folder, "catalogue")
        assert checked.frame["x"].dtype == dtype, name
        assert any("part-1.csv, row 1: '01067'" in note for note in checked.report.notes) == (
            name == "codes"
        )


@pytest.mark.parametrize(
    ("typed", "dtype"),
    [
        ([2.5], pl.Float64),
        ([4], pl.Int64),
        (["4"], pl.String),
        ([True], pl.String),
        ([None], pl.Int64),
    ],
)
def test_attributes_typed_file_beside_text_file_counts_too(
    tmp_path: Path, typed: list, dtype: pl.DataType
) -> None:
    catalogue(tmp_path, ["1", "2"])
    write_table(
        pl.DataFrame({"id": ["q"], "entity_type": ["pin"], "x": typed}), tmp_path / "d.parquet"
    )
    assert read_table(tmp_path, "catalogue")["x"].dtype == dtype


def test_attributes_large_integers_of_another_file_are_not_rounded(tmp_path: Path) -> None:
    catalogue(tmp_path, ["0.5"])
    write_table(
        pl.DataFrame({"id": ["q"], "entity_type": ["pin"], "x": [2**53 + 1]}),
        tmp_path / "d.parquet",
    )
    assert read_table(tmp_path, "catalogue")["x"].to_list() == ["0.5", "9007199254740993"]


def test_check_table_several_paths_are_one_table(tmp_path: Path) -> None:
    first, second = (
        catalogue(tmp_path, ["1"], "a.csv"),
        catalogue(tmp_path, ["2.5"], "b.csv", first=1),
    )
    both = check_table([first, second], "catalogue")
    assert both.frame["x"].to_list() == [1.0, 2.5]
    assert both.report.source == "a.csv, b.csv"


def test_check_table_rejected_rows_are_as_they_were_read(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("id,entity_type,x\na,pin,3.50\nb,Shoe,4.50\n")
    checked = check_table(path, "catalogue", on_bad_rows="drop")
    assert checked.frame["x"].to_list() == [3.5]
    assert checked.rejected["x"].to_list() == ["4.50"]
