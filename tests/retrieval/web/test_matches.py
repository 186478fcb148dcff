"""Words of a query marked in texts: what is marked, in which scripts, and that no text is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.web.matches import LETTERS, SHOWN, WORD, QueryWords, matches_of


def marked(query: str, text: str) -> list[str]:
    return [part for part, kind in QueryWords(query).parts(text) if kind == WORD]


@pytest.mark.parametrize(
    ("query", "text", "expected"),
    [
        ("blue whale", "A Blue, WHALE-shaped lamp", ["Blue", "WHALE"]),
        ("strasse", "Die STRAẞE, die Straße", ["STRAẞE", "Straße"]),
        ("c++ book", "c++ and c books", ["c++"]),
        ("हिंदी किताब", "यह हिंदी की किताब है", ["हिंदी", "किताब"]),
        ("حوت أزرق", "ملصق حوت كبير", ["حوت"]),
        ("青い鯨", "夜の海を泳ぐ青い鯨", ["青い鯨"]),
        ("鳥", "白鳥の湖", ["鳥"]),
        ("iphone 手机", "旧iPhone手机壳", ["iPhone手机"]),
        ("🎂 cake", "🎂🎈 party", ["🎂"]),
        ("of", "offer", []),
        ("", "anything", []),
        ("blue", "", []),
    ],
)
def test_parts_words_of_the_query_are_marked(query: str, text: str, expected: list[str]) -> None:
    assert marked(query, text) == expected


def test_parts_one_shared_ideograph_is_no_match() -> None:
    assert marked("青い鯨", "青森の海") == []


def test_parts_misspelt_word_matches_by_its_letters() -> None:
    for query, text, expected in (
        ("elefant", "an elephant, a relevant plant", ["elephant"]),
        ("bicylce", "a bicycle bell", ["bicycle"]),
    ):
        parts = QueryWords(query).parts(text)
        assert [part for part, kind in parts if kind == LETTERS] == expected


@given(st.text(max_size=40), st.text(max_size=200))
def test_parts_joined_are_the_text(query: str, text: str) -> None:
    parts = QueryWords(query).parts(text)
    assert "".join(part for part, _ in parts) == text
    assert all(part for part, _ in parts)


def test_matches_of_fields_are_excerpts_with_the_best_first() -> None:
    words = QueryWords("blue whale")
    values = {
        "brand": "Blue Sea",
        "description": "word " * 40 + "a blue whale " + "more " * 80,
        "board_titles": ["animals", "whale watching"],
        "price": 3.0,
        "size": "none of it",
    }
    found = matches_of(words, values, ["brand", "description", "board_titles", "price", "size"])
    assert [name for name, _ in found] == ["description", "brand", "board_titles"]
    text = "".join(part for part, _ in found[0][1])
    assert text.startswith("… word") and text.endswith("…") and "blue whale" in text
    assert len(text) <= SHOWN + 4
