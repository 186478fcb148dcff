"""Releases in a real Milvus standalone server (the PyPI package ``milvus``), started here; skipped
where it is not installed.
"""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from benchmarks.serving.peer_servers import milvus_is_installed, milvus_server
from benchmarks.small_releases import small_release, write_small_bundle
from encoders.errors import InvalidVectors, SpaceMismatch
from index_builder.building.build import build_release
from index_builder.commands.release import group as release_group
from index_builder.errors import FilterError, GateFailed, ReleaseError, ReleaseNotFound
from index_builder.filters.attributes import AttributeTable
from index_builder.releases.milvus import MilvusConfig, MilvusReleases, collection_name
from index_builder.releases.milvus_filters import milvus_expression
from index_builder.releases.release import Release
from index_builder.releases.store import ReleaseStore
from tests.helpers.release_makers import SPACE, make_bundle, make_input, quick, unit_vectors
from tests.helpers.run_command import run


def test_collection_name_similar_ids_differ_and_are_allowed() -> None:
    names = {
        collection_name("omni", "pin", release)
        for release in ("2026-01-01T00", "2026_01_01T00", "é" * 300)
    }
    assert len(names) == 3
    assert all(
        name.isascii() and name.replace("_", "").isalnum() and len(name) < 256 for name in names
    )


@pytest.fixture(scope="module")
def milvus() -> Iterator[str]:
    if not milvus_is_installed():
        pytest.skip(
            "the packages milvus and pymilvus are not installed (pip install milvus pymilvus)"
        )
    with milvus_server() as process:
        yield process.address


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_milvus_release_publishes_activates_and_switches(milvus: str, tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path / "store")
    encoder = write_small_bundle(tmp_path / "bundle", seed=3)
    first = small_release(
        store,
        tmp_path / "bundle",
        encoder,
        release_id="first",
        id_prefix="a-",
        counts={"pin": 200},
    )
    second = small_release(
        store,
        tmp_path / "bundle",
        encoder,
        release_id="second",
        id_prefix="b-",
        counts={"pin": 200},
        activate=False,
    )
    releases = MilvusReleases(MilvusConfig(uri=f"http://{milvus}"))
    stored = ("--store", store.root, "--json")
    with Release.open(store.path_of(first)) as one, Release.open(store.path_of(second)) as two:
        space = one.space_id
        with pytest.raises(ReleaseNotFound):
            releases.index("pin", space_id=space)
        pushed = run(release_group, "push", "--milvus", f"milvus://{milvus}", *stored)
        assert pushed.exit_code == 0, pushed.output
        found = json.loads(pushed.stdout)
        assert (found["release_id"], found["active"], found["removed"]) == ("first", True, [])
        assert found["recall"]["pin"] >= 0.95
        assert releases.active("pin") == "first"

        query: Any = encoder.encode(["red cat"])[0]
        index = releases.index("pin", space_id=space)
        ours = one.entities["pin"].search(query, 10, exact=True)
        theirs = index.search(query, 10)
        assert len(set(ours.ids) & set(theirs.ids)) >= 9
        np.testing.assert_allclose(theirs.scores[0], ours.scores[0], atol=1e-4)

        kept = index.search(query, 5, exclude_ids=theirs.ids[:2], min_score=-1.0)
        assert not set(theirs.ids[:2]) & set(kept.ids)
        with pytest.raises(InvalidVectors):
            index.search(query[:-1])
        with pytest.raises(SpaceMismatch):
            releases.index("pin", space_id="f" * 64)
        with pytest.raises(ReleaseNotFound):
            releases.activate(second, two.entities)
        with pytest.raises(ReleaseError, match="active"):
            releases.drop(first, one.entities)

        releases.publish(two)
        assert releases.active("pin") == "first", "publishing shows nothing to readers"
        releases.activate(second, two.entities)
        assert all(
            id_.startswith("b-")
            for id_ in releases.index("pin", space_id=space).search(query, 5).ids
        )
        assert index.search(query, 5).ids[0].startswith("a-"), (
            "who holds the old release finishes on it"
        )
        releases.activate(first, one.entities)
        assert releases.active("pin") == "first"
        releases.drop(second, two.entities)

        impossible = MilvusReleases(MilvusConfig(uri=f"http://{milvus}", min_recall=1.01))
        with pytest.raises(GateFailed, match="golden"):
            impossible.publish(two)
        assert not impossible.client.has_collection(collection_name("omni", "pin", second)), (
            "a refused copy is removed"
        )
    releases.close()


COLOURS = ["red", "blue", "grün", 'q"uote', "back\\slash", "re", "red\nline", "50%"]
WHENS = ["2024-05-01", "2024-05-01T23:30:00Z", "2024-05-02T01:00:00+02:00", "2024-05-03T00:00"]
ATTRIBUTES = pl.DataFrame(
    [
        {
            "price": None if i % 7 == 0 else i / 10,
            "stock": None if i % 5 == 0 else i % 4,
            "color": None if i % 3 == 0 else COLOURS[i % 8],
            "sale": None if i % 11 == 0 else i % 2 == 0,
            "tags": None if i % 6 == 0 else [["a", "b"], ["c"], [], ["a"]][i % 4],
            "sizes": None if i % 4 == 0 else [[1, 2], [3], []][i % 3],
            "größe": i,
            "exists": i % 2,
            "added": None if i % 8 == 0 else WHENS[i % 4],
            "seen": None if i % 9 == 0 else [WHENS[i % 4], WHENS[i % 3]],
            "huge": 2**62 + i,
            "mass": None if i % 10 == 0 else (i - 150) * 1e18,
            "tenth": None if i % 7 == 3 else i / 10,
            "tenths": None if i % 5 == 3 else [i / 10, 0.3],
        }
        for i in range(300)
    ],
    infer_schema_length=None,
).with_columns(pl.col("tenth").cast(pl.Float32), pl.col("tenths").cast(pl.List(pl.Float32)))
FILTERS = [
    *(f"{not_}(price {op} 10.5)" for not_ in ("", "not ") for op in ("==", "!=", "<", "<=", ">")),
    *(f"{not_}(stock {op} 2)" for not_ in ("", "not ") for op in ("==", "!=", "<=", ">=")),
    "stock in [1, 2]",
    "stock not in [1, 2]",
    "not (stock in [1, 2])",
    "stock in []",
    "stock not in []",
    "stock == 1.0",
    "stock < 1.5",
    "stock == 010",
    "price == 2",
    "price in [2, 3, 3.5]",
    "not price < 10 And stock == 1",
    "!(stock == 1) || price < 3",
    "price < 1e400",
    "price > -1e400 and stock != 1",
    "stock < 99999999999999999999",
    "stock == 99999999999999999999",
    "stock != 99999999999999999999",
    "not (stock < -99999999999999999999)",
    "huge > 4611686018427387954",
    "huge == 4611686018427387954",
    *(f"mass {op} 1e19" for op in ("==", "!=", "<", "<=", ">", ">=")),
    *(f"not (mass {op} -10000000000000000000)" for op in ("==", "<", ">=")),
    "mass in [20000000000000000000, 3e19]",
    f"mass < {10**350} and mass > -{10**350}",
    f"mass == {10**350} or mass > 1e400",
    "tenth == 0.1",
    "tenth != 0.7",
    "tenth <= 0.3",
    "tenth in [0.1, 29.3]",
    "array_contains(tenths, 0.3)",
    "array_contains(tenths, 29.3)",
    *(f"color == {json.dumps(colour)}" for colour in COLOURS),
    *(f"color != {json.dumps(colour)}" for colour in COLOURS),
    'color < "q" and color >= "blue"',
    'color in ["red", "grün"]',
    'color not in ["red", "grün"]',
    'color like "re%"',
    'color not like "re%"',
    'color like "red"',
    'color like "50\\\\%"',
    'color like "%"',
    "sale == true",
    "sale != true",
    "not (sale == True)",
    "sale in [true, false]",
    'array_contains(tags, "a")',
    'not array_contains(tags, "a")',
    'ARRAY_CONTAINS_ANY(tags, ["b", "c"])',
    'not array_contains_any(tags, ["b", "c"])',
    'array_contains_all(tags, ["a", "b"])',
    'not array_contains_all(tags, ["a", "b"])',
    "array_contains_any(tags, [])",
    "array_contains_all(tags, [])",
    "array_contains(sizes, 2)",
    "array_contains_any(sizes, [3, 2.0])",
    "tags is null",
    "tags is not null",
    "stock is null or price is null",
    "not (color is null)",
    "größe < 20",
    "5 > größe",
    "exists == 1 and exists is not null",
    *(f"added {op} 2024-05-01" for op in ("==", "!=", "<", "<=", ">", ">=")),
    'added == "2024-05-01T23:00:00Z"',
    'added != "2024-05-01T23:00:00Z"',
    'added in ["2024-05", 2024-05-03]',
    "added not in [2024-05-01]",
    "added is null",
    'array_contains(seen, "2024-05-02T01:00:00+02:00")',
    'not array_contains(seen, "2024-05-02T00:00:00+01:00")',
    'id == "p7"',
    'id != "p7" and größe < 9',
    'id in ["p7", "p8", "zz"]',
    'id not in ["p7"] and größe < 9',
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_milvus_filters_select_what_the_release_selects(milvus: str, tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path / "store")
    entities = make_input("pin", 300, attributes=ATTRIBUTES, ids=[f"p{i}" for i in range(300)])
    config = quick("exact", release_id="filters")
    build_release({"pin": entities}, make_bundle(tmp_path / "bundle"), store, config)
    releases = MilvusReleases(MilvusConfig(uri=f"http://{milvus}", prefix="filters"))
    query = unit_vectors(1, 9)[0]
    with Release.open(store.path_of("filters")) as release:
        ours = release.entities["pin"]
        releases.publish(release)
        index = releases.index("pin", space_id=SPACE, release_id="filters")
        wrong = []
        for expression in FILTERS:
            wanted = set(ours.search(query, 300, filter=expression, exact=True).ids)
            try:
                found = set(index.search(query, 300, filter=expression).ids)
            except Exception as error:
                wrong.append(f"{expression}: {error}")
                continue
            if found != wanted:
                asked = milvus_expression(expression, ours.attribute_table.schema)
                few = sorted(found ^ wanted)[:3]
                wrong.append(f"{expression} as {asked}: {len(found)}, not {len(wanted)}; {few}")
        assert not wrong, "\n".join(wrong)
        with pytest.raises(FilterError, match="unknown attribute"):
            index.search(query, 5, filter="nothing == 1")
        releases.drop("filters", release.entities)
    releases.close()


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ('color like "%d"', "prefixes"),
        ('color like "r_d"', "prefixes"),
        ("array_contains(seen, 2024-05-01)", "whole day"),
        ("stock == 'x'", "is a string"),
        ("nothing == 1", "unknown attribute"),
    ],
)
def test_milvus_expression_what_has_no_equal_is_refused(expression: str, why: str) -> None:
    with pytest.raises(FilterError, match=why):
        milvus_expression(expression, AttributeTable(ATTRIBUTES).schema)


@pytest.mark.parametrize(
    ("expression", "asked"),
    [
        ("stock == 1", '$meta["stock"] == 1'),
        ("not (stock == 1)", '((exists $meta["stock"]) and $meta["stock"] != 1)'),
        ("stock not in [1]", '(exists $meta["stock"]) and not ($meta["stock"] == 1)'),
        ("stock in []", "id in []"),
        ("stock is null", 'not (exists $meta["stock"])'),
        ('id == "a"', 'id in ["a"]'),
        (
            "added <= 2024-05-01 and stock < 010",
            '($meta["added@us"] < 1714608000000000) and ($meta["stock"] < 10)',
        ),
        ('color like "re%"', '($meta["color"] >= "re" and $meta["color"] < "rf")'),
        ("mass > 1e19", '$meta["mass"] > 1e+19'),
        ("mass > 10000000000000000000", '$meta["mass"] > 1e+19'),
        (f"mass > {10**350}", "id in []"),
        (f"mass < {10**350}", 'exists $meta["mass"]'),
        ("stock < 10000000000000000000", 'exists $meta["stock"]'),
        ("stock > 1e19", "id in []"),
    ],
)
def test_milvus_expression_is_translated(expression: str, asked: str) -> None:
    assert milvus_expression(expression, AttributeTable(ATTRIBUTES).schema) == asked


def test_push_to_nobody_says_so_and_that_nothing_was_given_twice(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path / "store")
    bundle = make_bundle(tmp_path / "bundle")
    build_release({"pin": make_input("pin", 40)}, bundle, store, quick("exact", release_id="r"))
    with socket.socket() as silent:  # bound, and nobody listens
        silent.bind(("127.0.0.1", 0))
        uri = f"milvus://127.0.0.1:{silent.getsockname()[1]}"
        asked = ("push", "--store", store.root, "--milvus", uri)
        nobody = run(release_group, *asked)
    assert nobody.exit_code == 1 and "does not answer" in nobody.output
    both = run(release_group, *asked, "s3://bucket/releases")
    assert both.exit_code != 0 and "either a URL or --milvus" in both.output
