"""Publishing into Milvus never touches what readers are sent to (a client that keeps tables)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

pytest.importorskip("pymilvus")

from pymilvus import MilvusException

from encoders.errors import ConfigError, InvalidVectors
from index_builder.errors import GateFailed, ReleaseError
from index_builder.releases import milvus as adapter
from index_builder.releases import milvus_columns
from index_builder.releases.milvus import MilvusConfig, MilvusReleases, collection_name
from index_builder.releases.release import Release
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import EntityIndex
from tests.helpers.release_makers import unit_vectors


class FakeMilvus:
    """Keeps collections and aliases in dictionaries, as a server would."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, np.ndarray]] = {}
        self.asked: list[np.ndarray] = []
        self.about: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.silent = False

    def describe_alias(self, alias: str) -> dict[str, str]:
        if self.silent:
            raise MilvusException(code=1, message="server unavailable: deadline exceeded")
        if alias not in self.aliases:
            raise MilvusException(code=1600, message=f"alias not found[alias={alias}]")
        return {"collection_name": self.aliases[alias]}

    def describe_collection(self, name: str) -> dict[str, str]:
        return {"description": self.about[name]}

    def has_collection(self, name: str) -> bool:
        return name in self.rows

    def create_schema(self, *, description: str, **_: Any) -> Any:
        return SimpleNamespace(about=description, add_field=lambda *_, **__: None)

    def create_collection(self, name: str, *, schema: Any) -> None:
        self.rows[name], self.about[name] = {}, schema.about

    def prepare_index_params(self) -> Any:
        return SimpleNamespace(add_index=lambda *_, **__: None)

    def create_index(self, *_: Any) -> None: ...

    def load_collection(self, *_: Any) -> None: ...

    def flush(self, *_: Any) -> None: ...

    def _get_connection(self) -> FakeMilvus:
        return self

    def batch_insert(self, name: str, _: list[Any], *, insert_param: Any, **__: Any) -> None:
        ids, vectors, attributes = insert_param.fields_data
        table = np.array(vectors.vectors.float_vector.data, np.float32)
        table = table.reshape(-1, vectors.vectors.dim)
        assert len(attributes.scalars.json_data.data) == insert_param.num_rows
        self.rows[name] |= dict(zip(ids.scalars.string_data.data, table, strict=True))

    def list_collections(self) -> list[str]:
        return list(self.rows)

    def list_indexes(self, name: str) -> list[str]:
        return ["embedding"]

    def list_aliases(self, _: str) -> dict[str, list[str]]:
        if self.silent:
            raise MilvusException(code=1, message="server unavailable: deadline exceeded")
        return {"aliases": list(self.aliases)}

    def get_collection_stats(self, name: str) -> dict[str, int]:
        return {"row_count": len(self.rows[name])}

    def drop_collection(self, name: str) -> None:
        assert name not in self.aliases.values(), "a served collection was dropped"
        del self.rows[name]

    def create_alias(self, name: str, alias: str) -> None:
        self.aliases[alias] = name

    alter_alias = create_alias

    def search(self, name: str, vectors: list[np.ndarray], *, limit: int, **_: Any) -> list[Any]:
        self.asked += vectors
        answers = []
        for query in vectors:
            scores = {id_: float(vector @ query) for id_, vector in self.rows[name].items()}
            best = sorted(scores, key=lambda id_: -scores[id_])[:limit]
            answers.append([{"id": id_, "distance": scores[id_]} for id_ in best])
        return answers


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeMilvus:
    server = FakeMilvus()
    monkeypatch.setattr(adapter, "connect", lambda _: server)
    return server


@pytest.fixture
def active(store: ReleaseStore) -> Release:
    return store.open_current()


def test_publish_active_release_again_checks_it_and_keeps_it(
    server: FakeMilvus, active: Release
) -> None:
    releases = MilvusReleases()
    first = releases.publish(active)
    releases.activate(active.release_id, active.entities)
    before = {name: dict(rows) for name, rows in server.rows.items()}
    assert releases.publish(active) == first
    assert {name: rows.keys() for name, rows in server.rows.items()} == {
        name: rows.keys() for name, rows in before.items()
    }


def test_publish_active_release_that_fails_the_gate_stays_served(
    server: FakeMilvus, active: Release
) -> None:
    releases = MilvusReleases()
    releases.publish(active)
    releases.activate(active.release_id, ["pin"])  # "ad" has a copy that nobody is sent to
    with pytest.raises(GateFailed):
        MilvusReleases(MilvusConfig(min_recall=1.01)).publish(active)
    name = collection_name("omni", "pin", active.release_id)
    del server.rows[name]["pin-0"]
    with pytest.raises(GateFailed, match="199 rows"):
        releases.publish(active)
    assert server.aliases["omni_pin"] in server.rows


def test_search_query_near_unit_norm_is_made_unit(server: FakeMilvus, active: Release) -> None:
    releases = MilvusReleases()
    releases.publish(active)
    index = releases.index("pin", space_id=active.space_id, release_id=active.release_id)
    query = active.entities["pin"].corpus.vectors[3]
    index.search(query * np.float32(1.0008), 5)
    assert abs(float(np.linalg.norm(server.asked[-1])) - 1) < 1e-6
    for wrong in (query * np.float32(2), query * np.float32(0), query * np.float32(np.nan)):
        with pytest.raises(InvalidVectors, match="norm"):
            index.search(wrong, 5)


def test_rows_single_floats_are_copied_as_they_are_written() -> None:
    prices = pl.DataFrame(
        {"price": [0.1, None], "prices": [[0.1, None], None]},
        schema={"price": pl.Float32, "prices": pl.List(pl.Float32)},
    )
    index = EntityIndex.build("pin", ["a", "b"], unit_vectors(2, 0), prices)
    first, second = milvus_columns._attribute_rows(index, np.arange(2))
    assert (first["price"], first["prices"]) == (0.1, [0.1, None])
    assert not {"price", "prices"} & second.keys()


def test_publish_while_milvus_is_silent_drops_nothing(server: FakeMilvus, active: Release) -> None:
    releases = MilvusReleases()
    releases.publish(active)
    releases.activate(active.release_id, active.entities)
    server.silent = True
    with pytest.raises(MilvusException, match="unavailable"):
        releases.publish(active)
    assert len(server.rows) == 2


def test_drop_release_active_for_one_type_drops_nothing(
    server: FakeMilvus, active: Release
) -> None:
    releases = MilvusReleases()
    releases.publish(active)
    releases.activate(active.release_id, ["pin"])
    with pytest.raises(ReleaseError, match="active in Milvus for pin"):
        releases.drop(active.release_id, sorted(active.entities))
    assert len(server.rows) == 2


def test_push_keeps_the_newest_releases_and_the_active_one(
    server: FakeMilvus, store: ReleaseStore
) -> None:
    releases = MilvusReleases()
    for name in ("r0", "r1"):
        with store.open(name) as release:
            assert releases.push(release, keep=1, activate=name == "r0").removed == []
    assert list(releases.held()) == ["r0", "r1"], "the active one stays beyond the count"
    with store.open("r1") as release:
        assert releases.push(release, keep=1).removed == ["r0"]
    names = {kind: collection_name("omni", kind, "r1") for kind in ("ad", "pin")}
    assert server.aliases == {f"omni_{kind}": name for kind, name in names.items()}
    assert sorted(server.rows) == sorted(names.values())


def test_push_spares_other_prefixes(server: FakeMilvus, store: ReleaseStore) -> None:
    with store.open("r0") as first, store.open("r1") as second:
        MilvusReleases(MilvusConfig(prefix="omni_other")).push(first, keep=1)
        MilvusReleases().push(first, keep=1)
        assert MilvusReleases().push(second, keep=1).removed == ["r0"]
    assert collection_name("omni_other", "pin", "r0") in server.rows


def test_push_killed_half_way_goes_on_with_what_is_not_whole(
    server: FakeMilvus, store: ReleaseStore
) -> None:
    pins, ads = (collection_name("omni", kind, "r0") for kind in ("pin", "ad"))
    with store.open("r0") as release:
        releases = MilvusReleases(MilvusConfig(batch_rows=40))
        releases.publish(release)
        whole = dict(server.rows)
        del server.rows[pins]["pin-0"]  # as a killed copy leaves it: without some rows
        releases.push(release)
    assert server.rows[ads] is whole[ads], "a whole copy is not made again"
    assert server.rows[pins] is not whole[pins]
    assert len(server.rows[pins]) == 200


@pytest.mark.parametrize(
    ("uri", "address", "prefix"),
    [
        ("milvus://host:19530", "http://host:19530", "omni"),
        ("milvus://host:19530/shop", "http://host:19530", "shop"),
        ("https://host/shop/", "https://host", "shop"),
    ],
)
def test_uri_names_server_and_prefix(uri: str, address: str, prefix: str) -> None:
    config = MilvusConfig.of_uri(uri)
    assert (config.uri, config.prefix) == (address, prefix)


@pytest.mark.parametrize("uri", ["host:19530", "s3://bucket", "milvus://", "milvus://host/A-b"])
def test_uri_of_something_else_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="Milvus: expected"):
        MilvusConfig.of_uri(uri)
