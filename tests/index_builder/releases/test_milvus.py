"""Releases in a real Milvus standalone server (the PyPI package ``milvus``), started here; skipped
where it is not installed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving.peer_servers import milvus_is_installed, milvus_server
from benchmarks.small_releases import small_release, write_small_bundle
from encoders.errors import InvalidVectors, SpaceMismatch
from index_builder.errors import GateFailed, ReleaseError, ReleaseNotFound
from index_builder.releases.milvus import MilvusConfig, MilvusReleases, collection_name
from index_builder.releases.store import ReleaseStore


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
        counts={"pin": 200, "ad": 60},
    )
    second = small_release(
        store,
        tmp_path / "bundle",
        encoder,
        release_id="second",
        id_prefix="b-",
        counts={"pin": 200, "ad": 60},
        activate=False,
    )
    releases = MilvusReleases(MilvusConfig(uri=f"http://{milvus}"))
    from index_builder.releases.release import Release

    with Release.open(store.path_of(first)) as one, Release.open(store.path_of(second)) as two:
        space = one.space_id
        with pytest.raises(ReleaseNotFound):
            releases.index("pin", space_id=space)
        assert min(releases.publish(one).values()) >= 0.95
        releases.activate(first, one.entities)
        assert releases.active("pin") == "first"

        query: Any = encoder.encode(["red cat"])[0]
        index = releases.index("pin", space_id=space)
        ours = one.entities["pin"].search(query, 10, exact=True)
        theirs = index.search(query, 10)
        assert len(set(ours.ids) & set(theirs.ids)) >= 9
        np.testing.assert_allclose(theirs.scores[0], ours.scores[0], atol=1e-4)

        for expression in (
            "price < 10",
            "sale == true and stock in [1, 2]",
            'array_contains(tags, "cat")',
        ):
            wanted = one.entities["pin"].search(query, 5, filter=expression, exact=True)
            got = index.search(query, 5, filter=expression)
            np.testing.assert_allclose(
                got.scores,
                wanted.scores,
                atol=1e-4,
                err_msg=f"the same filter on either engine: {expression}",
            )
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
        assert releases.active("ad") == "first"
        releases.drop(second, two.entities)

        impossible = MilvusReleases(MilvusConfig(uri=f"http://{milvus}", min_recall=1.01))
        with pytest.raises(GateFailed, match="golden"):
            impossible.publish(two)
        assert not impossible.client.has_collection(collection_name("omni", "pin", second)), (
            "a refused copy is removed"
        )
    releases.close()
