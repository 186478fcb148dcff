"""The page's JSON on a fused release: legs, weights, reasons, releases, and who may see what."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.helpers.serving.real_server import Running, serving


def fetch(running: Running, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    asked = urllib.request.Request(running.http + path, headers=headers or {})
    try:
        with urllib.request.urlopen(asked, timeout=20) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def search(running: Running, **given: Any) -> dict[str, Any]:
    status, page = fetch(running, "/api/search?" + urlencode({"type": "pin", **given}))
    assert status == 200, page
    found: dict[str, Any] = page
    return found


def test_search_fused_answer_has_scores_and_weights(showcase: Running) -> None:
    page = search(showcase, q="blue whale", k=5)
    assert page["legs"] == ["dense", "lexical", "votes"]
    assert page["weights"] == {"dense": 1.0, "lexical": 2.0, "votes": 3.0}
    first = page["hits"][0]
    assert first["id"] == "p0"
    total = sum(weight * first["scores"][leg] for leg, weight in page["weights"].items())
    assert first["scores"]["fused"] == pytest.approx(total, abs=2e-3)
    assert first["scores"]["dense"] == first["score"]
    assert 0 < first["scores"]["probability"] < 1


def test_search_reasons_mark_words_and_name_voters(showcase: Running) -> None:
    first = search(showcase, q="blue whale", k=5)["hits"][0]
    assert first["why"]["title"][:3] == [["Blue", 1], [" ", 0], ["whale", 1]]
    (field,) = first["why"]["fields"]
    assert field["name"] == "description" and ["whale", 1] in field["parts"]
    voter = first["why"]["voters"][0]
    assert voter["query"] == "blue whale" and voter["cosine"] == pytest.approx(1.0, abs=1e-3)
    assert voter["share"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("legs", "used", "weights"),
    [
        ("dense", [], None),
        ("lexical", ["lexical"], [0.0, 2.0, 0.0]),
        ("votes", ["votes"], [0.0, 0.0, 3.0]),
        ("dense,votes", ["dense", "votes"], [1.0, 0.0, 3.0]),
        ("votes,lexical,dense", ["dense", "lexical", "votes"], [1.0, 2.0, 3.0]),
    ],
)
def test_search_legs_are_switched_on_and_off(
    showcase: Running, legs: str, used: list[str], weights: list[float] | None
) -> None:
    page = search(showcase, q="golden lamp", legs=legs, k=5)
    assert page["legs"] == used
    assert weights == (page["weights"] and list(page["weights"].values()))
    calibrated = [hit["scores"]["probability"] for hit in page["hits"] if "scores" in hit]
    assert all(calibrated) if len(used) == 3 else calibrated == [None] * len(calibrated)


def test_search_legs_without_weights_count_alike(showcase: Running) -> None:
    page = search(showcase, q="golden lamp", type="product", legs="dense,lexical", k=3)
    assert page["weights"] == {"dense": 1.0, "lexical": 1.0, "votes": 0.0}
    words = search(showcase, q="silver 33", type="product", legs="lexical", k=3)
    assert "number 33" in words["hits"][0]["title"]
    assert search(showcase, q="golden lamp", type="product", k=3)["legs"] == []


def test_search_unknown_leg_is_refused(showcase: Running) -> None:
    status, page = fetch(showcase, "/api/search?q=x&legs=dense,sparse")
    assert status == 400 and "'sparse'" in page["error"]


def test_search_min_probability_is_a_bound_and_checked(showcase: Running) -> None:
    least = search(showcase, q="blue whale", k=20, min_probability=0.25)["hits"]
    assert least and all(hit["scores"]["probability"] >= 0.25 for hit in least)
    assert len(least) < len(search(showcase, q="blue whale", k=20)["hits"])
    for bad in ("much", "2", "nan"):
        status, page = fetch(showcase, f"/api/search?q=x&min_probability={bad}")
        assert status == 400 and "min_probability" in page["error"]


def test_search_release_is_pinned(showcase: Running) -> None:
    old = search(showcase, q="number 75", release="first", legs="lexical", k=3)
    assert old["release_id"] == "first" and old["hits"][0]["id"] == "p75"
    new = search(showcase, q="number 75", legs="lexical", k=3)
    assert new["release_id"] == "second" and "p75" not in [hit["id"] for hit in new["hits"]]
    assert fetch(showcase, "/api/search?q=x&release=third")[0] == 400


def test_search_exact_fused_compares_with_fused(showcase: Running) -> None:
    page = search(showcase, q="blue whale", exact=1, k=5)
    assert page["legs"] == ["dense", "lexical", "votes"]
    assert page["graph"]["of"] == 5


def test_search_pictures_are_addressed_only_where_they_are(showcase: Running) -> None:
    assert search(showcase, q="lamp", k=1)["hits"][0]["picture"].startswith("api/picture/pin/")
    assert search(showcase, q="lamp", type="product", k=1)["hits"][0]["picture"] == ""


def test_describe_names_legs_attributes_and_releases(showcase: Running) -> None:
    page = fetch(showcase, "/api/describe")[1]
    assert sorted(page["loaded_release_ids"]) == ["first", "second"]
    by_type = {entity["entity_type"]: entity for entity in page["entities"]}
    assert by_type["pin"]["legs"] == ["dense", "lexical", "votes"] and by_type["pin"]["fused"]
    assert by_type["product"]["legs"] == ["dense", "lexical"] and not by_type["product"]["fused"]
    assert by_type["query"]["legs"] == ["dense"]
    assert by_type["pin"]["attributes"]["price"] == "float"
    assert by_type["pin"]["attributes"]["tags"] == "list<string>"
    known = ["blue whale", "golden lamp", "red garden chair", "حوت أزرق", "青い鯨"]
    assert sorted(page["samples"]) == sorted(known)
    assert fetch(showcase, "/api/describe?release=first")[1]["release_id"] == "first"
    assert fetch(showcase, "/api/describe?release=third")[0] == 400


def test_search_known_queries_are_named_only_to_those_who_may_see_them(
    showcase: Running, tmp_path: Path
) -> None:
    secret = sha256(b"pins alone").hexdigest()
    (tmp_path / "tokens.toml").write_text(
        f'[[token]]\nname = "web"\nsha256 = "{secret}"\nentity_types = ["pin"]\n'
    )
    with serving(showcase.made, tokens=tmp_path / "tokens.toml") as running:
        headers = {"Authorization": "Bearer pins alone"}
        status, page = fetch(running, "/api/search?q=blue+whale&type=pin&k=5", headers)
        assert status == 200 and page["hits"][0]["scores"]["votes"] > 0
        assert all(hit["why"]["voters"] == [] for hit in page["hits"])
        samples = fetch(running, "/api/describe", headers)[1]["samples"]
        assert "blue whale" not in samples and samples
        assert fetch(running, "/api/describe")[0] == 401
