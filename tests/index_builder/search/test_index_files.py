"""An index on disk: the same bytes, the same answers, and typed errors for what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from encoders.errors import ConfigError
from index_builder.ann import missing_features
from index_builder.errors import (
    IndexFormatError,
)
from index_builder.native import Engine
from index_builder.search.entity_index import EntityIndex, IndexConfig
from tests.helpers.real_vectors import text_vectors
from tests.helpers.text_entities import CONFIG, FRAME, IDS, entity_vectors


def test_load_damaged_files_raises_typed_error(tmp_path: Path) -> None:
    corpus, _ = entity_vectors()
    index = EntityIndex.build("pin", IDS[:50], corpus[:50], FRAME[:50])
    for name in ("index.json", "ids.offsets.npy", "vectors.npy", "attributes.parquet"):
        folder = tmp_path / name.replace(".", "_")
        index.save(folder)
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(IndexFormatError):
            EntityIndex.load(folder)


@pytest.mark.slow
def test_build_deterministic_twice_gives_same_bytes(tmp_path: Path) -> None:
    corpus, queries = entity_vectors()
    for name in ("a", "b"):
        config = IndexConfig(ann=CONFIG, deterministic=True)
        EntityIndex.build("pin", IDS, corpus, FRAME, config, calibration_queries=queries[:50]).save(
            tmp_path / name
        )
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert [
        n for n in names if (tmp_path / "a" / n).read_bytes() != (tmp_path / "b" / n).read_bytes()
    ] == []


@pytest.mark.slow
def test_build_auto_keeps_faster_search_of_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rabitqlib")
    if Engine is None or missing_features("symqg"):
        pytest.skip("only one of them can run here")
    vectors = text_vectors(3_000)
    ids, queries = [str(i) for i in range(2_900)], vectors[2_900:]
    for winner, loser in (("int8-graph", "symqg"), ("symqg", "int8-graph")):
        times = iter((20.0, 10.0) if winner == "int8-graph" else (10.0, None))
        monkeypatch.setattr(
            "index_builder.search.construction.latency_at_recall", lambda *_, left=times: next(left)
        )
        index = EntityIndex.build(
            "pin", ids, vectors[:2_900], None, IndexConfig(ann=CONFIG), calibration_queries=queries
        )
        index.save(tmp_path / winner)
        loaded = EntityIndex.load(tmp_path / winner)
        assert loaded.kind == index.kind == winner and loaded.describe()["kind"] == winner
        assert f"{winner} 10 us" in loaded.describe()["why"] and loser in loaded.describe()["why"]
        assert loaded.search(queries[0], 10).ids == index.search(queries[0], 10).ids
    assert not list((tmp_path / "symqg").glob("index.links.npy"))


@pytest.mark.parametrize(("old_kind", "sketched"), [("swift", True), ("lean", False)])
def test_load_renamed_kind_gives_same_answers(
    old_kind: str, sketched: bool, tmp_path: Path
) -> None:
    if Engine is None:
        pytest.skip("the extension was not compiled")
    corpus, queries = entity_vectors()
    built = EntityIndex.build("pin", IDS, corpus, None, IndexConfig(kind=old_kind, ann=CONFIG))
    built.save(tmp_path)
    meta = json.loads((tmp_path / "index.json").read_text())
    assert (meta["facts"]["kind"], meta["facts"]["parameters"]["sketched_links"]) == (
        "int8-graph",
        sketched,
    )
    meta["facts"]["kind"] = old_kind  # as version 0.1.0 wrote it
    del meta["facts"]["parameters"]["sketched_links"]
    (tmp_path / "index.json").write_text(json.dumps(meta))
    loaded = EntityIndex.load(tmp_path)
    assert loaded.kind == loaded.describe()["kind"] == "int8-graph"
    assert EntityIndex.load_graph(tmp_path).kind == "int8-graph"
    assert [loaded.search(q, 10).ids for q in queries[:20]] == [
        built.search(q, 10).ids for q in queries[:20]
    ]


@pytest.mark.parametrize("kind", ["rabitq", "faiss-ivf"])
def test_load_retired_kind_is_refused_with_alternative(kind: str, tmp_path: Path) -> None:
    corpus, _ = entity_vectors()
    EntityIndex.build("pin", IDS, corpus, None, IndexConfig(kind="exact")).save(tmp_path)
    meta = json.loads((tmp_path / "index.json").read_text())
    meta["facts"]["kind"] = kind
    (tmp_path / "index.json").write_text(json.dumps(meta))
    with pytest.raises(IndexFormatError, match=f"{kind}.*Rebuild this release.*--index"):
        EntityIndex.load(tmp_path)
    with pytest.raises(ConfigError, match="retired"):
        IndexConfig(kind=kind)
