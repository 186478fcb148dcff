"""Publishing into Milvus never touches what readers are sent to (a client that keeps tables)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

pytest.importorskip("pymilvus")

from pymilvus import MilvusException

from encoders.errors import InvalidVectors
from index_builder.errors import GateFailed, ReleaseError
from index_builder.releases import milvus as adapter
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

    def insert(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.rows[name] |= {row["id"]: row["embedding"] for row in rows}

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
        scores = {id_: float(vector @ vectors[0]) for id_, vector in self.rows[name].items()}
        best = sorted(scores, key=lambda id_: -scores[id_])[:limit]
        return [[{"id": id_, "distance": scores[id_]} for id_ in best]]


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
    first, second = adapter._rows(index, np.arange(2))
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
