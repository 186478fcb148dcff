"""Answers as HTML tables, dictionaries and frames."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from encoders.errors import MissingDependency
from retrieval.client import RetrievalClient, Target
from retrieval.client.results import Answer, Answers, FusedScore, Hit, RetrieveResult, Timings
from tests.helpers.serving.real_server import Running

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
NASTY = '<script>alert("x")</script>\'"&'


class Seen(HTMLParser):
    """Tags with their attributes, and the text, of a piece of HTML; every tag must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def result(*attributes: dict[str, Any], fused: list[FusedScore] | None = None) -> RetrieveResult:
    hits = [Hit(f"pin:{n}", 1.0 - n / 8, values) for n, values in enumerate(attributes)]
    timings = Timings(total_ns=1_500_000, queue_ns=0, encode_ns=0, search_ns=0, rerank_ns=0)
    return RetrieveResult(
        hits=hits,
        release_id="r1",
        space_id="s",
        cache_hit=False,
        plan="graph",
        ef=10,
        estimated_recall=None,
        selectivity=None,
        timings=timings,
        request_id="",
        fused=fused,
    )


def test_html_texts_are_escaped_and_nothing_runs() -> None:
    seen = Seen(result({"title": NASTY, NASTY: [NASTY, 1]}, {"picture": SVG})._repr_html_())
    assert {tag for tag, _ in seen.tags} <= {
        "table", "caption", "thead", "tbody", "tr", "th", "td", "img",
    }  # fmt: skip
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    assert NASTY in seen.text and f"{NASTY}, 1" in seen.text


def test_html_picture_attributes_become_images() -> None:
    address = 'https://images.example/a.jpg?x="&y=<'
    answer = result(
        {"image": address, "title": 'a "lamp"'},
        {"image": "javascript:alert(1)", "title": "b"},
        {"picture": SVG},
        {"image": "file:///etc/passwd"},
    )
    images = Seen(answer._repr_html_()).images()
    assert images[0]["src"] == address
    assert images[0]["alt"] == 'a "lamp"'
    assert [str(image["src"])[:26] for image in images[1:]] == ["data:image/svg+xml;base64,"]


def test_html_no_picture_has_no_column_for_it() -> None:
    seen = Seen(result({"title": "a", "price": 12.5}, {"brand": "Acme"})._repr_html_())
    heads = seen.text[1 : 1 + sum(tag == "th" for tag, _ in seen.tags)]
    assert heads == ["rank", "title", "id", "score", "price", "brand"]
    assert (
        "12.5" in seen.text and "2 hits, release r1, plan graph, 1.5 ms in the server" in seen.text
    )


def test_html_long_values_are_cut() -> None:
    assert max(map(len, Seen(result({"text": "x" * 5000})._repr_html_()).text)) < 200


def test_answer_without_hits_is_an_empty_table_and_empty_frames() -> None:
    answer = result()
    assert Seen(answer._repr_html_()).text[0].startswith("0 hits")
    assert answer.to_dicts() == []
    assert answer.to_polars().columns == ["rank", "id", "score"] == list(answer.to_pandas().columns)
    assert answer.to_polars().height == 0 == len(answer.to_pandas())


def test_frames_hold_every_hit_and_attribute() -> None:
    fused = [FusedScore(0.9, 0.8, 0.5, 0.1, None), FusedScore(0.4, 0.3, 0.0, 0.0, 0.25)]
    attributes = ({"tags": ["a", "b"], "price": 1, "id": "own"}, {"price": 2.5})
    answer = result(*attributes, fused=fused)
    assert answer.to_dicts()[0] == {
        "rank": 1, "id": "pin:0", "score": 1.0, "fused": 0.9, "lexical": 0.5, "votes": 0.1,
        "probability": None, "tags": ["a", "b"], "price": 1, "attribute_id": "own",
    }  # fmt: skip
    frame = answer.to_polars()
    assert frame["price"].to_list() == [1.0, 2.5] and frame["tags"].to_list() == [["a", "b"], None]
    assert frame["probability"].to_list() == [None, 0.25]
    assert answer.to_pandas()["attribute_id"].tolist()[0] == "own"


@pytest.mark.parametrize("package", ["polars", "pandas"])
def test_frame_without_its_package_names_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf"{package}.*omnisearchsage\[notebook\]"):
        getattr(result({}), f"to_{package}")()


def test_answers_of_a_server_show_themselves(running_server: Running) -> None:
    with RetrievalClient(running_server.address) as client:
        one = client.retrieve("red cat", "pin", 3, attributes=["*"], deadline_seconds=30)
        targets = [Target(entity_type="pin", k=2), Target(entity_type="ad", k=1)]
        many = client.retrieve_multi("red cat", targets, deadline_seconds=30)
    assert one.to_polars()["id"].to_list() == one.ids
    assert set(one.ids) <= set(Seen(one._repr_html_()).text)
    assert isinstance(many, Answers) and isinstance(many.answers[0], Answer)
    seen = Seen(many._repr_html_())
    assert [tag for tag, _ in seen.tags].count("table") == 2
    assert set(many.answers[1].ids) <= set(seen.text)
