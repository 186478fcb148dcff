import json
import os

import numpy as np
import polars as pl
import pytest

from encoders.errors import DataError, InvalidVectors, SpaceMismatch
from encoders.inference.signal_reuse import KnownSignals
from encoders.inference.signal_store import SignalStore, SignalWriter, check_vectors

SPACE, OTHER_SPACE = "a" * 64, "b" * 64


def unit_rows(rows: int, dimension: int = 4, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


IDS = ["p0", "p1", "ü", "日本", "p4"]
VECTORS = unit_rows(5)
HASHES = [f"{i:032x}" for i in range(5)]


def test_signal_store_read_keeps_order_across_parts(tmp_path):
    store = SignalStore(tmp_path)
    store.write("pin", IDS, VECTORS, SPACE, HASHES, part_rows=2)
    signals = store.read("pin")
    assert (signals.ids, signals.space_id, signals.content_hashes, len(signals)) == (
        IDS,
        SPACE,
        HASHES,
        5,
    )
    np.testing.assert_array_equal(signals.vectors, VECTORS)
    assert signals.vectors.dtype == np.float32 and signals.vectors.flags.c_contiguous
    assert len(store.part_paths("pin")) == 3 and store.entity_types() == ["pin"]
    assert (np.abs(signals.updated_at - np.datetime64("now")) < np.timedelta64(60, "s")).all()


def test_signal_store_parts_open_in_polars(tmp_path):
    SignalStore(tmp_path).write("pin", IDS, VECTORS, SPACE, part_rows=2)
    table = pl.read_parquet(tmp_path / "pin" / "part-*.parquet")
    assert table.columns == ["id", "embedding", "space_id", "content_hash", "updated_at"]
    assert table.schema["embedding"] == pl.Array(pl.Float32, 4) and table["id"].to_list() == IDS


def test_signal_store_write_again_replaces_everything(tmp_path):
    store = SignalStore(tmp_path)
    store.write("pin", IDS, VECTORS, SPACE, part_rows=1)
    store.write("pin", IDS[:2], unit_rows(2, 8), OTHER_SPACE)
    assert store.read("pin").ids == IDS[:2] and store.describe("pin")["dimension"] == 8
    assert (
        len(list((tmp_path / "pin").glob("*.parquet"))) == 1
        and not (tmp_path / "pin" / "_staging").exists()
    )


def test_signal_store_write_no_rows_reads_empty(tmp_path):
    store = SignalStore(tmp_path)
    store.write("pin", [], unit_rows(0), SPACE)
    assert store.read("pin").vectors.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.__setitem__((3, 0), np.nan),
            "1 of 5 vectors are not unit vectors; the first is id '日本'",
        ),
        (lambda v: v.__setitem__((1, 0), np.inf), "the first is id 'p1'"),
        (lambda v: v.__setitem__(2, 0), "the first is id 'ü' with norm 0"),
        (lambda v: v.__imul__(2), "5 of 5 vectors"),
    ],
)
def test_signal_store_write_not_unit_vectors_are_refused(tmp_path, change, message):
    vectors = VECTORS.copy()
    change(vectors)
    with pytest.raises(InvalidVectors, match=message):
        SignalStore(tmp_path).write("pin", IDS, vectors, SPACE)
    assert SignalStore(tmp_path).entity_types() == []


@pytest.mark.parametrize("vectors", [VECTORS[:4], VECTORS.astype(np.float64), VECTORS[0]])
def test_check_vectors_wrong_shape_or_type_is_refused(vectors):
    with pytest.raises(InvalidVectors, match=r"expected vectors of \(5, 4\) float32"):
        check_vectors(vectors, IDS, 4)


def test_signal_store_write_repeated_id_publishes_nothing(tmp_path):
    store = SignalStore(tmp_path)
    store.write("pin", IDS, VECTORS, SPACE)
    with pytest.raises(DataError, match="id 'x' occurs twice"):
        store.write("pin", ["y", "x", "z", "x"], unit_rows(4), SPACE, part_rows=2)
    assert store.read("pin").ids == IDS


def test_signal_writer_unpublished_parts_are_invisible(tmp_path):
    store = SignalStore(tmp_path)
    store.write("pin", IDS, VECTORS, SPACE)
    with SignalWriter(store, "pin", SPACE, 4) as writer:
        writer.add(["new"], unit_rows(1), ["h"])
    assert store.read("pin").ids == IDS
    assert writer.staged(0).exists()


def test_signal_writer_second_at_once_is_refused(tmp_path):
    store = SignalStore(tmp_path)
    with (
        SignalWriter(store, "pin", SPACE, 4),
        pytest.raises(DataError, match="another run is writing"),
    ):
        SignalWriter(store, "pin", SPACE, 4)
    SignalWriter(store, "pin", SPACE, 4).close()


def test_signal_store_read_missing_or_damaged_names_next_step(tmp_path):
    store = SignalStore(tmp_path)
    with pytest.raises(
        DataError, match=r"holds no signals of 'pin'; it holds \[\]\. Run: omni embed"
    ):
        store.read("pin")
    store.write("pin", IDS, VECTORS, SPACE, part_rows=3)
    described = json.loads((tmp_path / "pin" / "signals.json").read_text())
    first, second = store.part_paths("pin")
    kept = first.read_bytes()
    first.write_bytes(kept[:-20])
    with pytest.raises(DataError, match="not a readable part"):
        store.read("pin")
    os.replace(second, first)
    with pytest.raises(DataError, match="other rows than"):
        store.read("pin")
    (tmp_path / "pin" / "signals.json").write_text(json.dumps(described | {"format_version": 3}))
    with pytest.raises(DataError, match="format 3, but this code reads 1"):
        store.read("pin")


def test_signal_store_read_part_of_another_space_is_refused(tmp_path):
    store = SignalStore(tmp_path)
    store.write("pin", IDS, VECTORS, SPACE)
    described = json.loads((tmp_path / "pin" / "signals.json").read_text())
    (tmp_path / "pin" / "signals.json").write_text(
        json.dumps(described | {"space_id": OTHER_SPACE})
    )
    with pytest.raises(SpaceMismatch, match=r"expected space id bbbb.*but got aaaa"):
        store.read("pin")


def test_known_signals_are_found_by_id_and_content(tmp_path):
    store = SignalStore(tmp_path)
    store.write("pin", IDS, VECTORS, SPACE, HASHES, part_rows=2)
    known = KnownSignals.open(store, "pin", SPACE)
    vectors, stamps, found = known.find(
        ["日本", "p0", "p0", "new"], [HASHES[3], HASHES[0], "changed", HASHES[1]], 4
    )
    assert found.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(vectors[:2], VECTORS[[3, 0]])
    assert (vectors[2:] == 0).all() and stamps.dtype == np.dtype("datetime64[us]")


def test_known_signals_of_another_space_or_without_hash_are_none(tmp_path):
    store = SignalStore(tmp_path)
    assert not KnownSignals.open(store, "pin", SPACE).find(IDS, HASHES, 4)[2].any()
    store.write("pin", IDS, VECTORS, SPACE, HASHES)
    assert not KnownSignals.open(store, "pin", OTHER_SPACE).find(IDS, HASHES, 4)[2].any()
    store.write("ad", IDS, VECTORS, SPACE)
    assert not KnownSignals.open(store, "ad", SPACE).find(IDS, [""] * 5, 4)[2].any()
