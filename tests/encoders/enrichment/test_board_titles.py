"""Board titles: order, noise, repetition, and that partitions give what the whole gives."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.commands.enrich import group
from encoders.enrichment.board_titles import (
    BoardTitlesConfig,
    add_prevalence,
    board_titles,
    word_prevalence,
)
from encoders.errors import ConfigError
from encoders.tables.files import write_table

LENIENT = BoardTitlesConfig(max_word_prevalence=1.0)


def boards_of(*rows: tuple[str, str, int]) -> pl.DataFrame:
    """Boards from (entity, title, how many boards); every board has an id of its own."""
    expanded = [
        (f"{entity}-{title}-{n}", title, entity)
        for entity, title, times in rows
        for n in range(times)
    ]
    return pl.DataFrame(
        expanded,
        schema={"board_id": pl.String, "title": pl.String, "entity_id": pl.String},
        orient="row",
    )


def titles_of(frame: pl.DataFrame, entity: str, config: BoardTitlesConfig = LENIENT) -> list[str]:
    return board_titles(frame, config).filter(entity_id=entity)["title"].to_list()


def test_board_titles_frequent_of_rare_words_come_first() -> None:
    others = [(f"e{i}", "home", 2) for i in range(30)]
    assert titles_of(
        boards_of(("x", "kitchen shelves", 5), ("x", "home", 5), ("x", "oak", 1), *others), "x"
    ) == [
        "kitchen shelves",
        "oak",
        "home",
    ]


def test_board_titles_ties_go_to_more_words_then_letters() -> None:
    rows = boards_of(("x", "aa", 1), ("x", "bbbb", 1), ("x", "cc dd", 1))
    assert titles_of(rows, "x") == ["cc dd", "bbbb", "aa"]


@pytest.mark.parametrize(
    "noise",
    ["!!!", "123", "x", " ", "www.example.com", "https://a.b", "me@example.com", "long " * 40],
)
def test_board_titles_noise_is_dropped(noise: str) -> None:
    assert titles_of(boards_of(("x", noise, 9), ("x", "red shoes", 1)), "x") == ["red shoes"]


def test_board_titles_of_prevalent_words_are_dropped() -> None:
    rows = boards_of(
        ("x", "my ideas", 9), ("x", "red shoes", 1), *((f"e{i}", "my ideas", 1) for i in range(20))
    )
    assert titles_of(rows, "x", BoardTitlesConfig(max_word_prevalence=0.5)) == ["red shoes"]


def test_board_titles_without_a_new_word_are_redundant() -> None:
    rows = boards_of(
        ("x", "Red Shoes", 1),
        ("x", "shoes, red!", 3),
        ("x", "RED  SHOES", 1),
        ("x", "red", 1),
        ("x", "blue", 1),
    )
    found = board_titles(rows, LENIENT)
    assert found["title"].to_list() == ["shoes, red!", "blue"]
    assert found["boards"].to_list() == [5, 1]


def test_board_titles_devanagari_marks_do_not_split_words() -> None:
    assert titles_of(boards_of(("x", "हिन्दी कविता", 1)), "x") == ["हिन्दी कविता"]
    words = word_prevalence(boards_of(("x", "हिन्दी कविता", 1)), LENIENT).words["word"].to_list()
    assert len(words) == 2


def test_board_titles_repeated_board_counts_once() -> None:
    rows = boards_of(("x", "red", 2))
    assert board_titles(pl.concat([rows, rows, rows]), LENIENT)["boards"].to_list() == [2]


def test_board_titles_at_most_ten_and_none_of_empty_table() -> None:
    rows = boards_of(*(("x", f"word{chr(97 + i)}", 1) for i in range(15)))
    assert len(titles_of(rows, "x", BoardTitlesConfig(max_word_prevalence=1.0))) == 10
    assert board_titles(rows.clear(), LENIENT).height == 0
    with pytest.raises(ConfigError, match="BoardTitlesConfig"):
        BoardTitlesConfig(top=0)


board_rows = st.lists(
    st.tuples(
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from(["red cat", "Cat red", "dog", "дом", "!!", "cat"]),
        st.integers(1, 3),
    ),
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(board_rows, st.randoms(use_true_random=False))
def test_board_titles_do_not_depend_on_partitions_and_order(rows: list, random: object) -> None:
    frame = boards_of(*rows)
    whole = board_titles(frame, LENIENT)
    parts = frame.partition_by("entity_id")
    random.shuffle(parts)  # type: ignore[attr-defined]
    if parts:
        everywhere = add_prevalence([word_prevalence(p, LENIENT) for p in parts])
        apart = pl.concat(
            [
                board_titles(p.sample(fraction=1.0, shuffle=True, seed=1), LENIENT, everywhere)
                for p in parts
            ]
        )
        assert apart.sort("entity_id", "rank").equals(whole)
    ranks = whole.group_by("entity_id").agg(pl.col("rank"), pl.col("score"))
    for _, places, scores in ranks.iter_rows():
        assert places == list(range(1, len(places) + 1))
        assert scores == sorted(scores)


def test_command_enriches_catalogue_and_counts_unknown_entities(tmp_path: Path) -> None:
    write_table(boards_of(("p", "red shoes", 2), ("gone", "x y", 1)), tmp_path / "b.csv")
    write_table(pl.DataFrame({"id": ["p", "lonely"], "entity_type": "pin"}), tmp_path / "c.jsonl")
    arguments = [
        "boards",
        "--catalogue",
        str(tmp_path / "c.jsonl"),
        "--boards",
        str(tmp_path / "b.csv"),
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    result = CliRunner().invoke(group, [*arguments, "--max-word-prevalence", "1.0", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["entities on boards but not in the catalogue"] == 1
    assert pl.read_ndjson(tmp_path / "o.jsonl")["board_titles"].to_list() == [["red shoes"], []]


def test_command_reads_every_named_table(tmp_path: Path) -> None:
    """--catalogue and --boards may each be given several times."""
    arguments = [
        "boards",
        "--out",
        str(tmp_path / "o.jsonl"),
        "--max-word-prevalence",
        "1.0",
        "--json",
    ]
    for name in ("p", "q"):
        write_table(boards_of((name, f"{name} shoes", 2)), tmp_path / f"{name}.csv")
        write_table(pl.DataFrame({"id": [name], "entity_type": "pin"}), tmp_path / f"{name}.jsonl")
        arguments += [
            "--catalogue",
            str(tmp_path / f"{name}.jsonl"),
            "--boards",
            str(tmp_path / f"{name}.csv"),
        ]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    assert pl.read_ndjson(tmp_path / "o.jsonl")["board_titles"].to_list() == [
        ["p shoes"],
        ["q shoes"],
    ]
