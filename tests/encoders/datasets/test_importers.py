"""Importers of public data sets, on small files of exactly the published shape."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from encoders.commands.data import group
from encoders.datasets.importers import ADAPTERS, import_tables
from encoders.errors import ConfigError, DataError, SchemaError


def tsv(path: Path, *rows: str) -> None:
    path.write_text("".join(row.replace("|", "\t") + "\n" for row in rows), encoding="utf-8")


@pytest.fixture()
def unsplash(tmp_path: Path) -> Path:
    photos = "photo_id|photo_url|photo_image_url|photo_description|photographer_username|"
    photos += "photo_location_country|stats_views|stats_downloads|ai_description|blur_hash"
    tsv(
        tmp_path / "photos.tsv000",
        photos,
        "A1|u|https://i/1|A red barn|ann|Norway|10|2|red barn in snow|x",
    )
    tsv(tmp_path / "photos.tsv001", photos, "B2|u|https://i/2||bo||5|1|blue sea|y")
    keywords = "photo_id|keyword|ai_service_1_confidence|ai_service_2_confidence|suggested_by_user"
    tsv(
        tmp_path / "keywords.tsv000", keywords, "A1|barn|99.1||f", "A1|winter|||t", "B2|sea|80|70|f"
    )
    tsv(
        tmp_path / "collections.tsv000",
        "photo_id|collection_id|collection_title|photo_collected_at",
        "A1|77|Farm life|2016-05-01 10:00:00",
    )
    conversions = (
        "converted_at|conversion_type|keyword|photo_id|anonymous_user_id|conversion_country"
    )
    tsv(
        tmp_path / "conversions.tsv000",
        conversions,
        "2020-04-01 00:00:15.6|download|red barn|A1|u-1|NO",
        "2020-04-02 01:00:00|download|sea|B2|u-2|US",
    )
    return tmp_path


def test_unsplash_becomes_catalogue_boards_log_and_pairs(unsplash: Path) -> None:
    tables = {name: checked.frame for name, checked in import_tables("unsplash", unsplash).items()}
    assert tables["catalogue"]["id"].to_list() == ["A1", "B2"]
    assert tables["catalogue"]["caption"].to_list() == ["red barn in snow", "blue sea"]
    assert tables["catalogue"]["keywords"].to_list() == [["barn", "winter"], ["sea"]]
    assert tables["boards"].rows() == [("77", "Farm life", "A1")]
    assert tables["log"].select("query", "country", "user_id", "entity_id", "action").rows()[0] == (
        "red barn",
        "NO",
        "u-1",
        "A1",
        "save",
    )
    assert str(tables["log"]["timestamp"][0]) == "2020-04-01 00:00:15.600000+00:00"
    assert tables["pairs"]["query"].to_list() == ["winter"]


def test_unsplash_of_another_shape_is_refused(unsplash: Path) -> None:
    tsv(unsplash / "conversions.tsv000", "converted_at|keyword", "2020-04-01|x")
    with pytest.raises(
        SchemaError, match=r"conversions: the published column\(s\) conversion_type"
    ):
        import_tables("unsplash", unsplash)
    (unsplash / "collections.tsv000").unlink()
    with pytest.raises(DataError, match=r"collections\.tsv"):
        import_tables("unsplash", unsplash)


@pytest.fixture()
def esci(tmp_path: Path) -> Path:
    examples = [
        (0, "revent 80 cfm", 0, "B000MOO21W", "us", "I", 0, 1, "train"),
        (1, "revent 80 cfm", 0, "B07X3Y6B1V", "us", "E", 0, 1, "train"),
        (2, "鍋", 1, "B07X3Y6B1V", "jp", "E", 1, 1, "test"),
        (3, "鍋", 1, "B000MOO21W", "us", "S", 1, 1, "test"),
    ]
    columns = [
        "example_id",
        "query",
        "query_id",
        "product_id",
        "product_locale",
        "esci_label",
        "small_version",
        "large_version",
        "split",
    ]
    pl.DataFrame(examples, schema=columns, orient="row").write_parquet(
        tmp_path / "shopping_queries_dataset_examples.parquet"
    )
    products = [
        ("B000MOO21W", "Fan", None, "quiet", "Panasonic", "White", "us"),
        ("B07X3Y6B1V", "Fan 80", "A fan", None, None, None, "us"),
        ("B07X3Y6B1V", "鍋", None, None, "X", None, "jp"),
    ]
    columns = [
        "product_id",
        "product_title",
        "product_description",
        "product_bullet_point",
        "product_brand",
        "product_color",
        "product_locale",
    ]
    pl.DataFrame(products, schema=columns, orient="row").write_parquet(
        tmp_path / "shopping_queries_dataset_products.parquet"
    )
    return tmp_path


def test_esci_ids_keep_locales_apart_with_grades(esci: Path) -> None:
    tables = {name: checked.frame for name, checked in import_tables("esci", esci).items()}
    assert tables["catalogue"]["id"].to_list() == [
        "us:B000MOO21W",
        "us:B07X3Y6B1V",
        "jp:B07X3Y6B1V",
    ]
    assert tables["catalogue"]["description"].to_list()[:2] == ["quiet", "A fan"]
    assert tables["judgements"].select("entity_id", "grade", "country").rows() == [
        ("us:B000MOO21W", 0, "US"),
        ("us:B07X3Y6B1V", 3, "US"),
        ("jp:B07X3Y6B1V", 3, "JP"),
        ("us:B000MOO21W", 2, "US"),
    ]
    assert tables["pairs"].select("query", "language", "split").rows() == [
        ("revent 80 cfm", "en", "train"),
        ("鍋", "ja", "heldout"),
    ]


@pytest.fixture()
def wands(tmp_path: Path) -> Path:
    tsv(
        tmp_path / "query.csv",
        "query_id|query|query_class",
        "0|salon chair|Massage Chairs",
        "1|oak table|Dining / Tables",
    )
    product = (
        "product_id|product_name|product_class|category"
        " hierarchy|product_description|product_features|"
    )
    product += "rating_count|average_rating|review_count"
    tsv(
        tmp_path / "product.csv",
        product,
        "0|solid wood bed|Beds|Furniture / Bedroom|good|overallwidth:64|15.0|4.5|15.0",
        "1|chair|Chairs|||x:1|||",
    )
    tsv(
        tmp_path / "label.csv",
        "id|query_id|product_id|label",
        "0|0|1|Exact",
        "1|0|0|Irrelevant",
        "2|1|0|Partial",
    )
    return tmp_path


def test_wands_becomes_graded_judgements_and_taxonomy(wands: Path) -> None:
    tables = {name: checked.frame for name, checked in import_tables("wands", wands).items()}
    assert tables["catalogue"].select("id", "category", "average_rating").rows() == [
        ("0", "Furniture / Bedroom", 4.5),
        ("1", "Chairs", None),
    ]
    assert tables["judgements"].select("query", "entity_id", "grade").rows() == [
        ("salon chair", "1", 2),
        ("salon chair", "0", 0),
        ("oak table", "0", 1),
    ]
    assert tables["labels"]["path"].to_list() == [["Massage Chairs"], ["Dining", "Tables"]]
    assert tables["pairs"].select("query", "entity_id").rows() == [("salon chair", "1")]


def test_wands_unknown_labels_are_left_out_and_counted(wands: Path) -> None:
    tsv(
        wands / "label.csv",
        "id|query_id|product_id|label",
        "0|0|1|Exact",
        "1|0|0|Superb",
        "2|9|0|Exact",
    )
    checked = import_tables("wands", wands)["judgements"]
    assert checked.frame.height == 1
    assert checked.rejected.height == 2


def test_small_set_is_read_in_its_own_format(tmp_path: Path) -> None:
    entity = {
        "id": "pin:1",
        "entity_type": "pin",
        "title": "cat",
        "boards": ["animals"],
        "source": "s",
    }
    pair = {
        "language": "de",
        "query": "Katze",
        "entity_id": "pin:1",
        "kind": "name",
        "split": "heldout",
    }
    for name, row in (("entities", entity), ("pairs", pair)):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(
            gzip.compress((json.dumps(row) + "\n").encode())
        )
    tables = {name: checked.frame for name, checked in import_tables("small", tmp_path).items()}
    assert tables["boards"].rows() == [("animals", "animals", "pin:1")]
    assert tables["pairs"].select("query", "entity_type", "action", "split").rows() == [
        ("Katze", "pin", "name", "heldout")
    ]


def test_every_adapter_empty_folder_names_missing_files(tmp_path: Path) -> None:
    for name in ADAPTERS:
        with pytest.raises((DataError, ConfigError), match="expected"):
            import_tables(name, tmp_path)


def test_import_command_writes_parquet(wands: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        group, ["import", "wands", str(wands), "--out", str(tmp_path / "o"), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["catalogue"]["rows_kept"] == 2
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "catalogue.parquet",
        "judgements.parquet",
        "labels.parquet",
        "pairs.parquet",
    ]
