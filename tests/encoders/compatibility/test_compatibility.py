"""A newer query tower searches an older index only where it was declared, through an adapter that
is whole, and the recall is measured.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from encoders.commands.evaluate import command
from encoders.compatibility.adapter import SpaceAdapter, fit_adapter
from encoders.compatibility.declaration import (
    FOLDER,
    declare,
    load_adapter,
    read_declarations,
    require_declaration,
    write_upgraded_bundle,
)
from encoders.compatibility.report import ADAPTED, OLD, PLAIN, REEMBEDDED, compare_spaces
from encoders.datasets.dataset import Dataset
from encoders.errors import BundleError, ConfigError, InvalidVectors, SpaceMismatch
from encoders.evaluation.report import EvaluationSettings
from encoders.towers.bundle import ModelBundle, load_bundle, read_space, read_space_id, save_bundle
from encoders.towers.query_tower import QueryEncoder
from encoders.training.loop import TrainStart, train
from tests.helpers.training_examples import DIMENSION, small_config, tiny_query_encoder, world


def rotation(width: int = DIMENSION, seed: int = 3) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0].astype(
        np.float32
    )


def rotated(tower: QueryEncoder, turn: np.ndarray) -> QueryEncoder:
    return SpaceAdapter(turn).fold(tower)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An old bundle, and a new one whose space is the old one turned: a perfect adapter exists."""
    folder = tmp_path_factory.mktemp("bundles")
    result = train(
        small_config(steps=40), world(), start=TrainStart(tiny_query_encoder()), quiet=True
    )
    save_bundle(folder / "old", result.query_encoder, result.entity_encoders)
    save_bundle(folder / "new", rotated(result.query_encoder, rotation()), result.entity_encoders)
    return folder / "old", folder / "new"


@pytest.fixture
def pair(bundles: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    import shutil

    old, new = (Path(shutil.copytree(bundle, tmp_path / bundle.name)) for bundle in bundles)
    return old, new


def dataset() -> Dataset:
    """The world's pairs; every third query held out."""
    data = world()
    pairs = data.pairs.filter(pl.col("entity_type") != "query").with_row_index()
    pairs = pairs.with_columns(
        split=pl.when(pl.col("index") % 3 == 2).then(pl.lit("dev")).otherwise(pl.lit("train"))
    ).drop("index")
    filled = pairs.with_columns(language=pl.lit("en"), country=pl.lit(""), kind=pl.lit(""))
    return Dataset(data.catalogue, filled, name="world")


def queries() -> list[str]:
    return world().pairs["query"].unique(maintain_order=True).to_list()


# --- the adapter ----------------------------------------------------------------------------------


def unit(rows: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_fit_adapter_linear_relation_is_found() -> None:
    source, turn = unit(400, 12), rotation(12)
    fitted = fit_adapter(source, source @ turn.T, ridge=1e-6)
    np.testing.assert_allclose(fitted.matrix, turn, atol=1e-4)
    np.testing.assert_allclose(fitted.apply(source), source @ turn.T, atol=1e-4)


def test_fit_adapter_low_rank_is_best_of_its_rank() -> None:
    source = unit(500, 12)
    relation = np.random.default_rng(1).normal(size=(8, 12)).astype(np.float32)
    target = source @ relation.T
    errors = []
    for rank in (1, 3, 5, 8):
        fitted = fit_adapter(source, target, rank=rank, ridge=1e-6)
        assert np.linalg.matrix_rank(fitted.matrix, tol=1e-3) == rank == fitted.rank
        errors.append(float(((source @ fitted.matrix.T - target) ** 2).sum()))
        values = np.linalg.svd(target, compute_uv=False)
        np.testing.assert_allclose(errors[-1], (values[rank:] ** 2).sum(), rtol=1e-2, atol=1e-3)
    assert errors == sorted(errors, reverse=True)


def test_adapter_fold_equals_apply(tmp_path: Path) -> None:
    tower = tiny_query_encoder().eval()
    adapter = SpaceAdapter(np.random.default_rng(0).normal(size=(5, DIMENSION)).astype(np.float32))
    folded = adapter.fold(tower)
    np.testing.assert_allclose(
        folded.encode(queries()), adapter.apply(tower.encode(queries())), atol=1e-5
    )
    assert tower.dimension == DIMENSION  # the tower it came from is untouched
    folded.save(tmp_path)
    np.testing.assert_allclose(
        QueryEncoder.load(tmp_path).encode(queries()), folded.encode(queries()), atol=1e-6
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_adapter_saved_and_loaded_is_equal(tmp_path: Path, rank: int) -> None:
    fitted = fit_adapter(unit(60, 12), unit(60, 8, 1), rank=rank)
    fitted.save(tmp_path / "adapter.safetensors")
    loaded = SpaceAdapter.load(tmp_path / "adapter.safetensors", (8, 12))
    np.testing.assert_array_equal(loaded.matrix, fitted.matrix)
    with pytest.raises(BundleError, match="should map 12 numbers to 9"):
        SpaceAdapter.load(tmp_path / "adapter.safetensors", (9, 12))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"matrix": np.full((8, 12), np.nan, np.float32)}, "NaN or infinity"),
        ({"matrix": np.zeros((8, 12), np.float64)}, "float32"),
        ({"matrix": np.zeros(12, np.float32)}, "two dimensions"),
        ({"left": np.zeros((8, 3), np.float32)}, "'left' and 'right'"),
        (
            {"left": np.zeros((8, 3), np.float32), "right": np.zeros((4, 12), np.float32)},
            "should map",
        ),
        ({"other": np.zeros((8, 12), np.float32)}, "expected float32"),
    ],
)
def test_adapter_load_other_file_is_refused(
    tmp_path: Path, parts: dict[str, np.ndarray], message: str
) -> None:
    save_file(parts, tmp_path / "adapter.safetensors")
    with pytest.raises(BundleError, match=message):
        SpaceAdapter.load(tmp_path / "adapter.safetensors", (8, 12))


def test_fit_adapter_impossible_input_is_named() -> None:
    with pytest.raises(ConfigError, match="there are none"):
        fit_adapter(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))
    with pytest.raises(ConfigError, match="rank"):
        fit_adapter(unit(9, 4), unit(9, 4), rank=5)
    with pytest.raises(ConfigError, match="ridge"):
        fit_adapter(unit(9, 4), unit(9, 4), ridge=0.0)
    with pytest.raises(InvalidVectors, match="NaN"):
        fit_adapter(np.full((9, 4), np.nan, np.float32), unit(9, 4))
    with pytest.raises(InvalidVectors, match="pairs of rows"):
        fit_adapter(unit(9, 4), unit(8, 4))


# --- measuring ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compare_spaces_turned_space_adapter_restores_recall(
    bundles: tuple[Path, Path],
) -> None:
    old, new = map(load_bundle, bundles)
    spaces = compare_spaces(
        new, old, dataset(), EvaluationSettings(entity_types=["pin"], resamples=100)
    )
    found = spaces.measured["pin"]
    assert found[PLAIN]["recall@10"] < found[OLD]["recall@10"] - 0.2
    assert found[ADAPTED]["recall@10"] > found[OLD]["recall@10"] - 0.1
    assert found[ADAPTED]["overlap@10_with_old"] > found[PLAIN]["overlap@10_with_old"] + 0.3
    assert found[OLD]["overlap@10_with_old"] == 1.0
    assert found[ADAPTED]["low"] <= found[ADAPTED]["recall@10"] <= found[ADAPTED]["high"]
    assert REEMBEDDED in found and set(spaces.learned) >= {
        "train_queries",
        "ridge",
        "held_back_recall@10",
    }


@pytest.mark.slow
def test_compare_spaces_adapter_without_gain_is_not_used(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    old = load_bundle(bundles[0])
    twin = ModelBundle(tmp_path, "c" * 64, DIMENSION, {}, old.query_encoder, old.entity_encoders)
    settings = EvaluationSettings(entity_types=["pin"], resamples=100)
    auto = compare_spaces(twin, old, dataset(), settings, rank=1)  # too narrow to be of use
    assert auto.learned["held_back_recall@10"] <= auto.learned["held_back_recall@10_without"]
    assert auto.adapter is None and auto.way == PLAIN and auto.worst_loss()[1] == 0.0
    assert ADAPTED in auto.measured["pin"]  # shown all the same
    always = compare_spaces(twin, old, dataset(), settings, adapter="always", rank=1)
    assert always.way == ADAPTED


def test_learn_adapter_held_out_pairs_do_not_count(bundles: tuple[Path, Path]) -> None:
    old, new = map(load_bundle, bundles)
    data = dataset()
    without = Dataset(data.catalogue, data.pairs.filter(pl.col("split") == "train"), name="world")
    from encoders.compatibility.report import learn_adapter

    first, second = learn_adapter(new, old, data)[0], learn_adapter(new, old, without)[0]
    np.testing.assert_array_equal(first.matrix, second.matrix)


def test_compare_spaces_one_space_or_unequal_widths_is_refused(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    old = load_bundle(bundles[0])
    with pytest.raises(ConfigError, match="both bundles have space"):
        compare_spaces(old, old, dataset())
    narrow = SpaceAdapter(rotation()[:8]).fold(old.query_encoder)
    other = ModelBundle(tmp_path, "c" * 64, 8, {}, narrow, old.entity_encoders)
    with pytest.raises(ConfigError, match="leave --adapter none out"):
        compare_spaces(other, old, dataset(), adapter="never")


# --- declaring ------------------------------------------------------------------------------------


def test_declare_leaves_space_and_towers(pair: tuple[Path, Path]) -> None:
    old, new = pair
    before = load_bundle(new).space_id
    declare(
        new,
        read_space_id(old),
        DIMENSION,
        SpaceAdapter(rotation().T.copy()),
        {"pin": {}},
        {"ridge": 0.1},
    )
    assert load_bundle(new).space_id == before
    declaration = require_declaration(new, read_space_id(old), "index")
    adapter = load_adapter(new, declaration)
    assert (
        adapter is not None
        and declaration.adapter is not None
        and declaration.adapter["ridge"] == 0.1
    )
    texts = queries()
    np.testing.assert_allclose(
        adapter.apply(load_bundle(new).embed_queries(texts)),
        load_bundle(old).embed_queries(texts),
        atol=1e-5,
    )


def test_declare_again_replaces_declaration_and_file(pair: tuple[Path, Path]) -> None:
    old, new = pair
    space = read_space_id(old)
    declare(new, space, DIMENSION, SpaceAdapter(rotation()), {})
    declare(new, "c" * 64, DIMENSION, None, {})
    declare(new, space, DIMENSION, SpaceAdapter(rotation(seed=9)), {})
    assert [d.space_id for d in read_declarations(new)] == ["c" * 64, space]
    assert len(list((new / FOLDER).iterdir())) == 1
    declare(new, space, DIMENSION, None, {})
    assert not list((new / FOLDER).iterdir())
    assert load_adapter(new, require_declaration(new, space, "index")) is None


def test_upgraded_bundle_without_declaration_is_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = pair
    with pytest.raises(SpaceMismatch, match="declares no compatibility"):
        write_upgraded_bundle(old, new, tmp_path / "upgraded")
    assert not (tmp_path / "upgraded").exists()
    with pytest.raises(BundleError, match="own"):
        declare(new, read_space_id(new), DIMENSION, None, {})


def test_upgraded_bundle_holds_new_queries_in_old_space(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = pair
    declare(
        new,
        read_space_id(old),
        DIMENSION,
        SpaceAdapter(rotation().T.copy()),
        {"pin": {OLD: {"recall@10": 0.5}}},
    )
    target = tmp_path / "upgraded"
    target.mkdir()
    write_upgraded_bundle(old, new, target)
    upgraded, before = load_bundle(target), load_bundle(old)
    assert upgraded.space_id == before.space_id
    upgrade = read_space(target)["query_upgrade"]
    assert upgrade["space_id"] == read_space_id(new) and upgrade["files_id"] not in (
        before.space_id,
        read_space_id(new),
    )
    np.testing.assert_allclose(
        upgraded.embed_queries(queries()), before.embed_queries(queries()), atol=1e-5
    )
    np.testing.assert_array_equal(
        upgraded.embed_entities(world().catalogue), before.embed_entities(world().catalogue)
    )
    weights = target / "query_encoder" / "2_Dense" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="space id"):
        load_bundle(target)


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_flip_last_byte, "SHA-256"), (_truncate, "SHA-256"), (Path.unlink, "cannot be read")],
    ids=["flip", "cut", "gone"],
)
def test_upgraded_bundle_damaged_adapter_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, damage: object, message: str
) -> None:
    old, new = pair
    declare(new, read_space_id(old), DIMENSION, SpaceAdapter(rotation()), {})
    damage(next((new / FOLDER).iterdir()))  # type: ignore[operator]
    with pytest.raises(BundleError, match=message):
        write_upgraded_bundle(old, new, tmp_path / "upgraded")


@pytest.mark.parametrize(
    "change",
    [
        {"space_id": "not hexadecimal"},
        {"dimension": -1},
        {"adapter": {"file": "../../../etc/passwd", "sha256": "0" * 64}},
        {"adapter": {"file": "a.safetensors", "sha256": "short"}},
        {"adapter": "a.safetensors"},
        {"measured": None},
    ],
)
def test_read_declarations_damaged_is_refused(
    pair: tuple[Path, Path], change: dict[str, object]
) -> None:
    old, new = pair
    declare(new, read_space_id(old), DIMENSION, None, {})
    space = read_space(new)
    space["compatible"][0] |= change
    (new / "space.json").write_text(json.dumps(space))
    with pytest.raises(BundleError, match="damaged"):
        read_declarations(new)


def test_load_adapter_of_another_bundle_is_refused(pair: tuple[Path, Path]) -> None:
    old, new = pair
    declare(new, read_space_id(old), DIMENSION, SpaceAdapter(rotation(8)), {})
    with pytest.raises(BundleError, match="should map 16 numbers to 16"):
        load_adapter(new, read_declarations(new)[0])
    declare(new, read_space_id(old), 8, None, {})
    with pytest.raises(BundleError, match="without an adapter"):
        load_adapter(new, read_declarations(new)[0])


# --- the command ----------------------------------------------------------------------------------


def write_tables(folder: Path) -> Path:
    data = dataset()
    folder.mkdir()
    data.catalogue.write_parquet(folder / "catalogue.parquet")
    data.pairs.write_parquet(folder / "pairs.parquet")
    return folder


def against_index(new: Path, old: Path, tables: Path) -> list[str]:
    bundles = [str(new), "--against-index", str(old)]
    return [*bundles, "--data", str(tables), "--resamples", "100", "--json"]


@pytest.mark.slow
def test_evaluate_against_index_declares_within_limit(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = pair
    tables = write_tables(tmp_path / "tables")
    arguments = against_index(new, old, tables)
    refused = CliRunner().invoke(command, [*arguments, "--declare", "--adapter", "none"])
    assert refused.exit_code == 1 and "--max-loss" in refused.output and not read_declarations(new)
    measured = CliRunner().invoke(command, arguments)
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)["declared"] is False and not read_declarations(new)
    declared = CliRunner().invoke(command, [*arguments, "--declare"])
    assert declared.exit_code == 0, declared.output
    assert json.loads(declared.stdout)["way"] == ADAPTED
    declaration = read_declarations(new)[0]
    assert declaration.space_id == read_space_id(old) and declaration.adapter is not None
    assert (
        declaration.measured["pin"][ADAPTED]["recall@10"]
        == json.loads(declared.stdout)["measured"]["pin"][ADAPTED]["recall@10"]
    )
    assert load_file(new / FOLDER / declaration.adapter["file"])["matrix"].shape == (
        DIMENSION,
        DIMENSION,
    )


@pytest.mark.slow
def test_evaluate_against_index_type_without_pairs_blocks_declaration(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = pair
    tables = write_tables(tmp_path / "tables")
    of_pins_alone = (pl.col("entity_type") == "pin") | (pl.col("split") == "train")
    dataset().pairs.filter(of_pins_alone).write_parquet(tables / "pairs.parquet")
    arguments = against_index(new, old, tables)
    measured = CliRunner().invoke(command, arguments)
    assert measured.exit_code == 0 and list(json.loads(measured.stdout)["measured"]) == ["pin"]
    assert "product: no 'held-out dev' pairs; not evaluated" in measured.stderr
    refused = CliRunner().invoke(command, [*arguments, "--declare"])
    assert (
        refused.exit_code == 2
        and "entity type 'product'" in refused.stderr
        and not read_declarations(new)
    )
    declared = CliRunner().invoke(command, [*arguments, "--declare", "--entity-type", "pin"])
    assert declared.exit_code == 0 and list(read_declarations(new)[0].measured) == ["pin"]


def keep_tower_of_pins(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    save_bundle(bundle, loaded.query_encoder, {"pin": loaded.entity_encoders["pin"]})


@pytest.mark.slow
def test_evaluate_against_index_type_without_tower_blocks_declaration(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """An index holds only what the older bundle embeds; what the newer one cannot embed any more is
    not declared unless it is left out.
    """
    old, new = pair
    tables = write_tables(tmp_path / "tables")
    arguments = against_index(new, old, tables)
    keep_tower_of_pins(new)
    measured = CliRunner().invoke(command, arguments)
    assert measured.exit_code == 0 and list(json.loads(measured.stdout)["measured"]) == ["pin"], (
        measured.output
    )
    assert f"product: no tower in {new}; not evaluated" in measured.stderr
    refused = CliRunner().invoke(command, [*arguments, "--declare"])
    assert (
        refused.exit_code == 2
        and f"product: no tower in {new}" in refused.stderr
        and not read_declarations(new)
    )
    keep_tower_of_pins(old)
    declared = CliRunner().invoke(command, [*arguments, "--declare"])
    assert declared.exit_code == 0 and list(read_declarations(new)[0].measured) == ["pin"], (
        declared.output
    )
    assert f"product: no tower in {old}; not evaluated" in declared.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--declare"], "--against-index measured"),
        (["--against-index", "OLD", "--adapter", "large"], "'full', 'none' or a rank"),
        (["--against-index", "OLD", "--adapter", "0"], "rank of at least 1"),
        (["--against-index", "OLD", "--baselines", "bm25"], "takes one BUNDLE"),
        (["--against-index", "NOWHERE"], "cannot be read"),
    ],
)
def test_evaluate_against_index_bad_usage_names_next_step(
    pair: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    old, new = pair
    filled = [
        str(old) if a == "OLD" else str(tmp_path / "nowhere") if a == "NOWHERE" else a
        for a in arguments
    ]
    result = CliRunner().invoke(command, [str(new), *filled])
    assert result.exit_code in (1, 2) and message in " ".join(result.output.split())
