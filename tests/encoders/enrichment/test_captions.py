"""Captions by a tiny random BLIP: what is captioned again, broken images, quality, judges."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from encoders.commands.enrich import group
from encoders.enrichment.caption_quality import (
    agreement,
    judgement_sheet,
    quality_report,
    read_grades,
)
from encoders.enrichment.captions import (
    CAPTIONS_FILE,
    BlipCaptioner,
    CaptionConfig,
    attach_captions,
    caption_catalogue,
    decode_image,
    read_captions,
    read_image_bytes,
)
from encoders.errors import BundleError, DataError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "[ENC]",
    *["a", "red", "cat", "dog", "on", "the", "of", "with", "house", "tree"],
]


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of a few thousand random weights, saved as a real one is."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {
        "encoder_hidden_size": 16,
        "projection_dim": 16,
        "bos_token_id": 5,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    )
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(
        folder
    )
    return folder


@pytest.fixture()
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for n, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (40, 30), colour).save(folder / f"{n}.png")
    (folder / "3.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><circle cx="4" cy="4"'
        ' r="3"/></svg>'
    )
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def catalogue_of(*names: str | None) -> pl.DataFrame:
    return pl.DataFrame(
        {"id": [f"p{i}" for i in range(len(names))], "entity_type": "pin", "image": list(names)},
        schema_overrides={"image": pl.String},
    )


def test_blip_captions_an_image_again_only_when_bytes_change(
    blip_folder: Path, images: Path, tmp_path: Path
) -> None:
    config = CaptionConfig(
        model=str(blip_folder), batch_size=2, max_new_tokens=5, beams=1, device="cpu", svg_pixels=32
    )
    captioner = BlipCaptioner(config)
    rows = catalogue_of("0.png", "1.png", "2.png", "3.svg", "broken.png", "gone.png", None)
    first = caption_catalogue(rows, tmp_path / "state", captioner, config, images)
    assert first == (4, 0, 2, 1)
    second = caption_catalogue(rows, tmp_path / "state", captioner, config, images)
    assert second == (0, 4, 2, 1)
    Image.new("RGB", (40, 30), "white").save(images / "1.png")
    assert caption_catalogue(rows, tmp_path / "state", captioner, config, images).captioned == 1
    errors = read_captions(tmp_path / "state").filter(pl.col("error").is_not_null())["id"].to_list()
    assert errors == ["p4", "p5"]
    assert attach_captions(rows, tmp_path / "state")["caption"].null_count() == 3


def test_captions_do_not_depend_on_batch_size(blip_folder: Path, images: Path) -> None:
    loaded = [decode_image((images / f"{n}.png").read_bytes(), 32) for n in range(3)]
    captioner = BlipCaptioner(
        CaptionConfig(model=str(blip_folder), max_new_tokens=5, beams=1, device="cpu")
    )
    together = captioner.caption(loaded)
    assert together == [captioner.caption([image])[0] for image in loaded]


class Stub:
    """Counts calls; stops the run at the third batch, as a power cut would."""

    fingerprint = "stub"

    def __init__(self, fail_at: int) -> None:
        self.calls, self.fail_at = 0, fail_at

    def caption(self, images: list[Image.Image]) -> list[str]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return [f"{image.size[0]} wide" for image in images]


def test_captions_stopped_run_resumes_after_half_a_line(images: Path, tmp_path: Path) -> None:
    config = CaptionConfig(batch_size=1)
    rows = catalogue_of("0.png", "1.png", "2.png")
    with pytest.raises(KeyboardInterrupt):
        caption_catalogue(rows, tmp_path, Stub(fail_at=3), config, images)
    with (tmp_path / CAPTIONS_FILE).open("a") as file:
        file.write('{"entity_type": "pin", "id": "p2", "capt')
    assert caption_catalogue(rows, tmp_path, Stub(fail_at=99), config, images) == (1, 2, 0, 0)
    assert read_captions(tmp_path)["caption"].to_list() == ["40 wide"] * 3


def test_captions_of_another_model_are_made_again(images: Path, tmp_path: Path) -> None:
    rows, config = catalogue_of("0.png"), CaptionConfig()
    caption_catalogue(rows, tmp_path, Stub(99), config, images)
    other = Stub(99)
    other.fingerprint = "other"
    assert caption_catalogue(rows, tmp_path, other, config, images).captioned == 1


def test_captions_damaged_state_line_is_named(tmp_path: Path) -> None:
    (tmp_path / CAPTIONS_FILE).write_text("{}\nnonsense\n{}\n")
    with pytest.raises(DataError, match="line 2"):
        read_captions(tmp_path)


def test_captions_image_path_outside_folder_is_refused(images: Path) -> None:
    (images.parent / "secret.png").write_bytes(b"x")
    with pytest.raises(DataError, match="outside"):
        read_image_bytes("../secret.png", images)


def test_captions_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BundleError, match="--model"):
        BlipCaptioner(CaptionConfig(model=str(tmp_path / "nothing")))


def test_quality_report_counts_repetition_length_script_and_titles() -> None:
    rows = pl.DataFrame(
        {
            "title": ["red cat", "dog", "tree", None],
            "caption": ["a red cat on the tree", "dog dog dog", "дерево", "a red cat on the tree"],
        }
    )
    report = quality_report(rows)
    assert report["captioned"] == 4
    assert report["repeat"] == 0.25
    assert report["shorter_than_3_words"] == 0.25
    assert report["letters_not_latin"] == 0.25
    assert report["shared_captions"] == 0.5
    assert report["agreement_with_title"] == {
        "titles": 3,
        "mean_share": pytest.approx(2 / 3, abs=1e-3),
        "none": pytest.approx(1 / 3, abs=1e-3),
    }


def test_judgement_sheet_same_items_in_another_order_per_judge() -> None:
    rows = pl.DataFrame(
        {"id": [str(i) for i in range(50)], "caption": [f"caption {i}" for i in range(50)]}
    )
    sheet = judgement_sheet(rows, items=20, judges=["a", "b"], seed=3)
    a, b = (sheet.filter(judge=name)["item"].to_list() for name in ("a", "b"))
    assert sorted(a) == sorted(b) == list(range(1, 21))
    assert a != b


def test_krippendorff_alpha_equals_worked_example() -> None:
    """Krippendorff (2011), example C reduced to two observers and two values: alpha = 0.095."""
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    names = {0: "wrong", 1: "good"}
    rows = [("a", i, names[v]) for i, v in enumerate(first)] + [
        ("b", i, names[v]) for i, v in enumerate(second)
    ]
    found = agreement(
        read_grades(pl.DataFrame(rows, schema=["judge", "item", "grade"], orient="row"))
    )
    assert found["alpha_nominal"] == pytest.approx(0.095, abs=0.001)
    assert found["identical"] == pytest.approx(0.6)


def test_agreement_edge_cases() -> None:
    perfect = agreement({"a": {"1": 2, "2": 0}, "b": {"1": 2, "2": 0}, "c": {"1": 2}})
    assert perfect["alpha_nominal"] == perfect["alpha_interval"] == 1.0
    assert agreement({"a": {"1": 2}, "b": {"1": 2}})["alpha_nominal"] is None
    with pytest.raises(DataError, match="two judges"):
        agreement({"a": {"1": 2}, "b": {"2": 2}})
    with pytest.raises(DataError, match="'great'"):
        read_grades(pl.DataFrame({"item": ["1"], "judge": ["a"], "grade": ["great"]}))


def test_commands_go_from_images_to_agreement(
    blip_folder: Path, images: Path, tmp_path: Path
) -> None:
    catalogue_of("0.png", "1.png", "2.png").with_columns(title=pl.lit("cat")).write_parquet(
        tmp_path / "c.parquet"
    )
    run = CliRunner().invoke
    arguments = [
        "captions",
        "--catalogue",
        str(tmp_path / "c.parquet"),
        "--images",
        str(images),
        "--state",
        str(tmp_path / "s"),
    ]
    arguments += [
        "--out",
        str(tmp_path / "o.parquet"),
        "--model",
        str(blip_folder),
        "--device",
        "cpu",
        "--json",
    ]
    result = run(group, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["captioned"] >= 0
    captioned = pl.read_parquet(tmp_path / "o.parquet").with_columns(
        pl.lit("a red cat").alias("caption")
    )
    captioned.write_parquet(tmp_path / "o.parquet")
    sheet = tmp_path / "sheet.csv"
    assert (
        run(
            group,
            ["caption-sheet", "--catalogue", str(tmp_path / "o.parquet"), "--out", str(sheet)],
        ).exit_code
        == 0
    )
    pl.read_csv(sheet).with_columns(pl.lit("good").alias("grade")).write_csv(sheet)
    result = run(group, ["caption-agreement", str(sheet), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["identical"] == 1.0
