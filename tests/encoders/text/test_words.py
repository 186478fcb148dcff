"""Words of scripts with marks and without spaces; what the towers read as one word stays one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.text.ngrams import JOINS, character_class
from encoders.text.normal_forms import fold
from encoders.text.words import runs_of, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ｃａｔ, straße & 2 DOGS", ["cat", "strasse", "2", "dogs"]),
        ("हिंदी किताब", ["हिंदी", "किताब"]),
        ("مُحَمَّد", ["مُحَمَّد"]),
        ("生日蛋糕", ["生", "日", "蛋", "糕", "生日", "日蛋", "蛋糕"]),
        ("カレー", ["カ", "レ", "ー", "カレ", "レー"]),
        ("ที่นี่", ["ที่", "นี่", "ที่นี่"]),
        ("iPhone用ケース x", ["iphone", "用", "ケ", "ー", "ス", "用ケ", "ケー", "ース", "x"]),
        ("猫", ["猫"]),
        ("birthday🎂 red\u200dish", ["birthday", "🎂", "redish"]),
        ("한국 음식", ["한국", "음식"]),
        ("C++ and C# or c", ["c++", "and", "c#", "or", "c"]),
        ("C++, a+b #tag ++ F#é", ["c++", "a", "b", "tag", "f", "é"]),
        ("€5 $5 5€", ["€", "5", "$", "5", "5", "€"]),
        ("İSTANBUL", ["istanbul"]),
        (" ·!", []),
        ("", []),
    ],
)
def test_words_of_scripts_equal_words_by_hand(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_runs_of_unspaced_script_stay_whole() -> None:
    assert runs_of("生日蛋糕 कि 🎂x") == ["生日蛋糕", "कि", "🎂", "x"]


@given(st.text())
def test_runs_of_any_text_keep_every_letter_mark_and_number(text: str) -> None:
    expected = [c for c in fold(text) if character_class(c) == JOINS]
    assert [c for run in runs_of(text) for c in run if character_class(c) == JOINS] == expected


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_equal_general_path(text: str) -> None:
    marked = words_of(text + " é")
    assert words_of(text) == marked[:-1]
