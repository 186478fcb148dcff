"""A streamed catalogue is the same wherever its chunks and files end."""

import json

import numpy as np
import polars as pl
import pytest
import torch

from encoders.errors import RowError, SchemaError
from encoders.inference.batch_embedding import EmbedConfig, embed_catalogue
from encoders.inference.signal_store import SignalStore
from encoders.tables.files import read_table
from encoders.tables.stream import _hash_words, _row_hashes, _RowsSeen, stream_catalogue
from encoders.towers.bundle import ModelBundle
from encoders.towers.entity_features import EntityFeatureConfig, EntityFeaturizer
from encoders.towers.entity_tower import create_entity_encoder
from tests.helpers.training_examples import tiny_query_encoder

VECTOR = [0.1, -0.2, 0.3]
SEEN = pl.DataFrame({"id": ["a"], "entity_type": ["pin"], "title": ["x y red"], "visual": [VECTOR]})


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    torch.manual_seed(0)
    featurizer = EntityFeaturizer.fit(
        SEEN, EntityFeatureConfig(text_fields=("title",), continuous={"visual": 3})
    )
    tower = create_entity_encoder(
        featurizer, table_rows=64, token_dimension=8, hidden=(8,), dimension=16
    )
    return ModelBundle("model", "a" * 64, 16, {}, tiny_query_encoder(), {"pin": tower})


def pin(id: str, **cells) -> dict:
    return {"id": id, "entity_type": "pin", "title": "red", **cells}


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def streamed(*paths, chunk_rows: int, columns=None) -> pl.DataFrame:
    return pl.concat(
        stream_catalogue(paths, columns=columns, chunk_rows=chunk_rows), how="diagonal_relaxed"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 100])
def test_stream_exact_repeats_are_left_out_as_read_table_does(tmp_path, suffix, chunk_rows):
    from encoders.tables.files import write_table

    rows = pl.DataFrame([pin(f"e{i % 10}", title=f"red {i % 10}", price=i % 10) for i in range(23)])
    path = write_table(rows, tmp_path / f"c.{suffix}")
    assert streamed(path, chunk_rows=chunk_rows).equals(read_table(path, "catalogue"))


def test_stream_attributes_are_typed_by_all_files_except_tower_fields(tmp_path):
    (tmp_path / "1.csv").write_text(
        "id,entity_type,title,price,stock,code\na,pin,red,3,true,007\nb,pin,red,,FALSE,8\n"
    )
    (tmp_path / "2.csv").write_text(
        "id,entity_type,title,price,stock,code\nc,pin,red,2.50,true,9\n"
    )
    rows = streamed(tmp_path, chunk_rows=1)
    assert rows.select("price", "stock", "code").rows() == [
        (3.0, True, "007"),
        (None, False, "8"),
        (2.5, True, "9"),
    ]
    assert streamed(tmp_path, chunk_rows=1, columns=["title", "price"])["price"].to_list() == [
        "3",
        None,
        "2.5",
    ]


def test_stream_repeats_across_files_are_left_out(bundle, tmp_path):
    first = write(
        tmp_path / "1.jsonl",
        [pin("a"), pin("b", price=2, tags=[1, 2], more={"x": 1, "y": None}), pin("c")],
    )
    second = write(
        tmp_path / "2.jsonl",
        [
            pin("b", price=2.0, tags=[1, 2.0], more={"x": 1}, brand=None),
            pin("d", price=0.5, tags=[0.5]),
        ],
    )
    store = SignalStore(tmp_path / "s")
    assert (
        embed_catalogue(bundle, stream_catalogue([first, second]), store).entity_types["pin"].rows
        == 4
    )
    assert store.read("pin").ids == ["a", "b", "c", "d"]


@pytest.mark.parametrize("chunk_rows", [1, 2, 7])
def test_stream_repeat_with_other_content_names_id_file_and_row(tmp_path, chunk_rows):
    path = write(tmp_path / "c.jsonl", [pin(f"e{i}") for i in range(6)] + [pin("e1", price=3)])
    with pytest.raises(
        RowError,
        match=r"c\.jsonl: row 7, column 'id': id repeats .*with different content, got 'e1'",
    ):
        streamed(path, chunk_rows=chunk_rows)
    other = write(tmp_path / "d.jsonl", [pin("new"), pin("e2", title="blue")])
    path = write(tmp_path / "c.jsonl", [pin(f"e{i}") for i in range(6)])
    with pytest.raises(RowError, match=r"d\.jsonl: row 2, column 'id': .*got 'e2'"):
        streamed(path, other, chunk_rows=chunk_rows)


def test_stream_one_id_of_two_entity_types_is_no_repeat(tmp_path):
    path = write(tmp_path / "c.jsonl", [pin("a"), pin("a") | {"entity_type": "product"}])
    assert streamed(path, chunk_rows=1).height == 2


def test_rows_seen_finds_rows_in_every_run_despite_collisions():
    seen = _RowsSeen()
    words = np.random.default_rng(0).integers(0, 2**63, (4, 1_000), dtype=np.uint64)
    words[0, ::10] = 7  # one first word, different second words
    for start in range(0, 1_000, 50):
        repeated, clashing = seen.add(words[:2, start : start + 50], words[2:, start : start + 50])
        assert not repeated.any() and not clashing.any()
    changed = words.copy()
    changed[3, 5::50] += 1
    repeated, clashing = seen.add(changed[:2], changed[2:])
    assert (
        clashing.nonzero()[0].tolist() == list(range(5, 1_000, 50)) and (repeated ^ clashing).all()
    )
    assert sum(run.nbytes for run in seen._runs) == 32 * 1_000 and len(seen._runs) < 12


def test_row_hashes_do_not_depend_on_types_of_other_rows():
    base = pl.DataFrame(
        {"id": ["a"], "entity_type": ["pin"], "n": [1], "v": [[1, 2]], "e": [[]], "t": ["x"]}
    )
    alike = [
        base.with_columns(
            n=pl.lit(1.0), v=pl.lit([1.0, 2.0]), e=pl.lit(pl.Series([[]], dtype=pl.List(pl.String)))
        ),
        base.with_columns(n=pl.lit("1"), extra=pl.lit(None)),
        base.with_columns(v=pl.Series([[1, 2]], dtype=pl.Array(pl.Int64, 2))).select(
            reversed(base.columns)
        ),
    ]
    unlike = [
        base.with_columns(n=pl.lit(2)),
        base.drop("n"),
        base.with_columns(t=pl.lit("")),
        base.with_columns(v=pl.lit([1, 2, 0])),
    ]
    word = _row_hashes(base)[1].tolist()
    assert [_row_hashes(frame)[1].tolist() == word for frame in alike + unlike] == [True] * 3 + [
        False
    ] * 4
    several = [base.with_columns(v=pl.Series([[[1, 2], inner]])) for inner in ([3.5], [3.5], [3.0])]
    words = [_row_hashes(frame)[1].tolist() for frame in several]
    assert words[0] == words[1] != words[2]
    odd = base.with_columns(
        b=pl.lit(b"\xff"),
        d=pl.lit("2026-01-01").str.to_date(),
        s=pl.struct(x=pl.lit(1)),
        u=pl.duration(days=1),
        ok=pl.lit(True),
    )
    assert _row_hashes(odd)[1].shape == (2, 1) and _hash_words(["a"]).shape == (2, 1)


SIZES = [38, 38.5, 39.0, None, "M", True, 38, 1e30, 40]


@pytest.mark.parametrize("chunk_rows", [1, 2, 4, 100])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:4], SIZES[:1] * 9])
def test_stream_json_text_columns_are_text_beside_any_numbers(tmp_path, chunk_rows, sizes):
    records = [
        pin(f"e{i}", size=size, shade=size, board_titles=[size, "x"][: 1 + i % 2])
        for i, size in enumerate(sizes)
    ]
    rows = streamed(
        write(tmp_path / "c.jsonl", records),
        chunk_rows=chunk_rows,
        columns=("title", "size", "shade", "board_titles"),
    )
    texts = {
        38: "38",
        38.5: "38.5",
        39.0: "39",
        None: None,
        "M": "M",
        True: "true",
        1e30: "1" + "0" * 30,
        40: "40",
    }
    assert rows["size"].to_list() == rows["shade"].to_list() == [texts[size] for size in sizes]
    assert rows["board_titles"].list.first().to_list() == [texts[size] for size in sizes]


def test_stream_json_text_is_equal_without_fast_reader(tmp_path):
    """Vectors of two shapes in one chunk are read line by line."""
    records = [
        pin("a", size=38, visual=VECTOR),
        pin("b", size=38.5, visual=[VECTOR]),
        pin("c", size=1e30, board_titles=[2, 2.5]),
    ]
    rows = streamed(write(tmp_path / "c.jsonl", records), chunk_rows=9)
    assert rows["size"].to_list() == ["38", "38.5", "1" + "0" * 30] and rows[
        "board_titles"
    ].to_list()[2] == ["2", "2.5"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_stream_one_vector_a_row_may_meet_several(bundle, tmp_path, order, suffix):
    from encoders.tables.files import write_table

    shapes = [[VECTOR, None, [-0.0, 0.5, 1.0]], [[VECTOR], None, [VECTOR, VECTOR]]]
    paths, alone = [], {}
    for file in order:
        rows = pl.DataFrame([pin(f"{file}-{i}", visual=v) for i, v in enumerate(shapes[file])])
        paths.append(write_table(rows, tmp_path / f"{file}.{suffix}"))
        embed_catalogue(
            bundle,
            stream_catalogue(paths[-1:]),
            SignalStore(tmp_path / f"alone{file}"),
            EmbedConfig(threads=1),
        )
        signals = SignalStore(tmp_path / f"alone{file}").read("pin")
        alone |= {
            id: (hash, vector)
            for id, hash, vector in zip(signals.ids, signals.content_hashes, signals.vectors)
        }
    store = SignalStore(tmp_path / "s")
    embed_catalogue(bundle, stream_catalogue(paths), store, EmbedConfig(threads=1))
    signals = store.read("pin")
    assert signals.ids == list(alone) and signals.content_hashes == [
        alone[id][0] for id in signals.ids
    ]
    np.testing.assert_allclose(signals.vectors, [alone[id][1] for id in signals.ids], atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_stream_json_vector_shapes_may_change_inside_a_file(bundle, tmp_path, chunk_rows):
    path = write(
        tmp_path / "c.jsonl",
        [pin("a", visual=VECTOR), pin("b", visual=[VECTOR, VECTOR]), pin("c"), pin("d", visual=[])],
    )
    store = SignalStore(tmp_path / "s")
    embed_catalogue(
        bundle, stream_catalogue([path], chunk_rows=chunk_rows), store, EmbedConfig(threads=1)
    )
    one, mean_of_two, absent, empty = store.read("pin").content_hashes
    assert one == mean_of_two != absent == empty


def test_stream_lists_in_one_file_texts_in_another_names_both(bundle, tmp_path):
    first = write(tmp_path / "1.jsonl", [pin("a", shade="red")])
    second = write(tmp_path / "2.jsonl", [pin("b", shade=["red"])])
    with pytest.raises(
        SchemaError,
        match=r"'shade' holds single values in 1\.jsonl .*, but lists in 2\.jsonl .*Export",
    ):
        list(stream_catalogue([first, second]))
    frames = [pl.DataFrame([pin("a", visual=VECTOR)]), pl.DataFrame([pin("b", visual={"x": 1})])]
    with pytest.raises(SchemaError, match="changes its type"):
        embed_catalogue(bundle, frames, SignalStore(tmp_path / "s"))
