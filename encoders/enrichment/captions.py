"""Caption images with BLIP (paper 4.2), in batches, and only those that are new or changed.

State: an append-only ``captions.jsonl``, one line per image and outcome with the hash of the
image's bytes and of the model. A run that was stopped loses at most one batch. An image whose bytes
and model are already there is not captioned again; a failed one is tried again.
"""

from __future__ import annotations

import hashlib
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import polars as pl

from encoders.errors import BundleError, ConfigError, DataError, MissingDependency

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

T = TypeVar("T")

DEFAULT_MODEL = "Salesforce/blip-image-captioning-base"
CAPTIONS_FILE = "captions.jsonl"
MAX_IMAGE_BYTES = 64 * 2**20
SCHEMA: dict[str, pl.DataType] = {
    "entity_type": pl.String(),
    "id": pl.String(),
    "image_hash": pl.String(),
    "model": pl.String(),
    "caption": pl.String(),
    "error": pl.String(),
}
"""Columns of the state; either ``caption`` or ``error`` is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """How captions are made."""

    model: str = DEFAULT_MODEL
    """Hugging Face name or local folder of a BLIP captioning model with its processor."""
    batch_size: int = 16
    """Images per forward pass."""
    max_new_tokens: int = 30
    """Longest caption, in tokens."""
    beams: int = 3
    """Beam search width; 1: greedy."""
    device: str = "auto"
    """``auto`` (GPU if there is one), ``cpu``, ``cuda``."""
    svg_pixels: int = 384
    """Width at which SVG images are drawn."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "beams", "svg_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"CaptionConfig.{name} must be at least 1, got {getattr(self, name)}"
                )


class Captioner(Protocol):
    """Write captions for images, as ``BlipCaptioner`` does."""

    fingerprint: str
    """Changes when the captions would."""

    def caption(self, images: Sequence[Image]) -> list[str]:
        """Write one caption per RGB image."""


class BlipCaptioner:
    """Write captions with BLIP, through transformers."""

    def __init__(self, config: CaptionConfig) -> None:
        """Load the model.

        Raises:
            BundleError: It is neither in the cache nor on disk nor downloadable.
        """
        import torch
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self.config = config
        self.device = (
            ("cuda" if torch.cuda.is_available() else "cpu")
            if config.device == "auto"
            else config.device
        )
        try:
            self.processor = BlipProcessor.from_pretrained(config.model)
            model = BlipForConditionalGeneration.from_pretrained(config.model)
        except (OSError, ValueError) as error:
            raise BundleError(
                f"the captioning model {config.model!r} cannot be loaded"
                f" ({str(error).splitlines()[0]}). Give --model the folder of a downloaded BLIP"
                " model, or run once with network access."
            ) from error
        self.model = model.to(self.device).eval()
        self.fingerprint = _fingerprint(config, model.state_dict())

    def caption(self, images: Sequence[Image]) -> list[str]:
        """Write one caption per RGB image."""
        import torch

        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.config.max_new_tokens, num_beams=self.config.beams
            )
        return [
            text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)
        ]


def _fingerprint(config: CaptionConfig, weights: Mapping[str, Tensor]) -> str:
    """Hash what decides the captions of an image: settings and weights."""
    digest = hashlib.sha256(f"{config.max_new_tokens}:{config.beams}:{config.svg_pixels}".encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


class CaptionRun(NamedTuple):
    """Entities by what one run did with them."""

    captioned: int
    unchanged: int
    failed: int
    without_image: int


class Track(Protocol):
    """Iterate over items and show how far it is, as ``encoders.commands.console.track`` does."""

    def __call__(self, items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        """Yield ``items``, ``total`` in number."""


def untracked(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Iterate without showing anything."""
    return iter(items)


def caption_catalogue(
    catalogue: pl.DataFrame,
    state: Path,
    captioner: Captioner,
    config: CaptionConfig,
    images: Path,
    track: Track = untracked,
) -> CaptionRun:
    """Caption every new or changed image of a catalogue, recording the outcome of each batch.

    Args:
        catalogue: With ``entity_type``, ``id`` and ``image`` (a path relative to ``images``, or a
            URL).
        state: Folder of the state; made if missing.
        captioner: Writes the captions.
        config: Batch size and drawing size.
        images: Folder that relative image paths count from.
        track: Shows the progress over batches.

    Raises:
        DataError: The catalogue has no ``image`` column, or the state is damaged.
    """
    if "image" not in catalogue.columns:
        raise DataError(
            "captions need a column 'image' (path or URL); the catalogue has"
            f" {', '.join(catalogue.columns)}."
        )
    state.mkdir(parents=True, exist_ok=True)
    known = _captioned_hashes(state, captioner)
    filled = pl.col("image").fill_null("").str.strip_chars() != ""
    rows = catalogue.filter(filled).select("entity_type", "id", "image")
    batches = (
        rows.slice(start, config.batch_size).to_dicts()
        for start in range(0, rows.height, config.batch_size)
    )
    captioned = failed = 0
    with (state / CAPTIONS_FILE).open("a", encoding="utf-8") as file:
        for batch in track(batches, "captions", total=-(-rows.height // config.batch_size)):
            pending, failures = _read_images(batch, known, config, images)
            captions = captioner.caption([image for _, image in pending]) if pending else []
            records = failures + [
                record | {"caption": text}
                for (record, _), text in zip(pending, captions, strict=True)
            ]
            captioned += len(captions)
            failed += len(failures)
            for record in records:
                line = record | {"model": captioner.fingerprint}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    return CaptionRun(
        captioned=captioned,
        unchanged=rows.height - captioned - failed,
        failed=failed,
        without_image=catalogue.height - rows.height,
    )


def _captioned_hashes(state: Path, captioner: Captioner) -> dict[tuple[str, str], str]:
    """Return the image hash of each entity (type, id) that this captioner has captioned."""
    return {
        (record["entity_type"], record["id"]): record["image_hash"]
        for record in read_captions(state).iter_rows(named=True)
        if record["caption"] is not None and record["model"] == captioner.fingerprint
    }


def _read_images(
    batch: list[dict[str, str]],
    known: Mapping[tuple[str, str], str],
    config: CaptionConfig,
    images: Path,
) -> tuple[list[tuple[dict[str, str], Image]], list[dict[str, str]]]:
    """Read the images of a batch whose bytes are not ``known``.

    Returns:
        Records to caption with their images, and records of images that cannot be read, with the
        ``error``.
    """
    pending, failures = [], []
    for row in batch:
        record = {"entity_type": row["entity_type"], "id": row["id"]}
        try:
            content = read_image_bytes(row["image"], images)
            record["image_hash"] = hashlib.sha256(content).hexdigest()[:32]
            if known.get((row["entity_type"], row["id"])) != record["image_hash"]:
                pending.append((record, decode_image(content, config.svg_pixels)))
        except DataError as error:
            failures.append(record | {"error": str(error)})
    return pending, failures


def read_captions(state: Path) -> pl.DataFrame:
    """Read the last outcome of every entity (columns of ``SCHEMA``).

    A last line that a crash cut short is removed from the file.

    Raises:
        DataError: Another line is damaged.
    """
    path = state / CAPTIONS_FILE
    if not path.is_file():
        return pl.DataFrame(schema=SCHEMA)
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}: line {number} is not a record ({error}). Delete the line; its images are"
                " captioned again."
            ) from error
    if lines[-1]:  # the next run appends here
        path.write_text("\n".join(lines[:-1]) + ("\n" if len(lines) > 1 else ""), encoding="utf-8")
    frame = pl.DataFrame([{name: r.get(name) for name in SCHEMA} for r in records], schema=SCHEMA)
    return frame.unique(["entity_type", "id"], keep="last", maintain_order=True)


def attach_captions(catalogue: pl.DataFrame, state: Path) -> pl.DataFrame:
    """Put the state's captions on the catalogue; entities without one keep what they have."""
    written = read_captions(state).filter(pl.col("caption").is_not_null())
    captions = written.select("entity_type", "id", pl.col("caption").alias("__new"))
    if "caption" not in catalogue.columns:
        catalogue = catalogue.with_columns(pl.lit(None, pl.String).alias("caption"))
    joined = catalogue.join(captions, on=["entity_type", "id"], how="left", maintain_order="left")
    return joined.with_columns(pl.coalesce("__new", "caption").alias("caption")).drop("__new")


def read_image_bytes(reference: str, images: Path) -> bytes:
    """Read the bytes of a path (relative to ``images``) or an http(s) URL.

    Raises:
        DataError: Nothing is there, it is too large, or a relative path leaves the folder.
    """
    if reference.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(reference, timeout=20) as response:
                content: bytes = response.read(MAX_IMAGE_BYTES + 1)
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            raise DataError(f"{reference}: cannot be fetched ({error})") from error
    else:
        path = (images / reference).resolve()
        if not path.is_relative_to(images.resolve()):
            raise DataError(f"{reference}: lies outside the image folder")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{reference}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_IMAGE_BYTES:
        raise DataError(f"{reference}: larger than {MAX_IMAGE_BYTES >> 20} MiB")
    return content


def decode_image(content: bytes, svg_pixels: int) -> Image:
    """Decode a PNG, JPEG, WebP, ... or SVG to RGB; transparent parts become white.

    Raises:
        DataError: The bytes are no image.
        MissingDependency: Pillow (or, for SVG, resvg-py) is not installed.
    """
    try:
        from PIL import Image as Pillow
    except ImportError as error:
        raise MissingDependency("pillow", "captions", "captioning") from error
    if content.lstrip()[:5] in (b"<svg ", b"<?xml"):
        content = _draw_svg(content, svg_pixels)
    try:
        image = Pillow.open(io.BytesIO(content)).convert("RGBA")
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise DataError(f"not a readable image ({type(error).__name__}: {error})") from error
    white = Pillow.new("RGBA", image.size, "white")
    return Pillow.alpha_composite(white, image).convert("RGB")


def _draw_svg(content: bytes, pixels: int) -> bytes:
    """Draw an SVG as a PNG ``pixels`` wide."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingDependency("resvg-py", "captions", "drawing SVG images") from error
    try:
        return bytes(resvg_py.svg_to_bytes(svg_string=content.decode("utf-8"), width=pixels))
    except Exception as error:  # the renderer raises plain ValueErrors and worse
        raise DataError(f"not a readable SVG ({error})") from error
