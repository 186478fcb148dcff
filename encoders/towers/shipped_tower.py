"""Pack and unpack the query towers that ship with the package.

Packed to a few megabytes: int8 token embeddings, float16 for the rest.

``encoders/pretraining/tiny_multilingual.py`` is the recipe that made them. A packed tower is one
folder with ``config.json`` (transformers configuration), ``tokenizer.json.gz`` and
``weights.safetensors``.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

from encoders.errors import BundleError

_ROOT = Path(__file__).parents[1] / "pretrained"
SHIPPED_TOWERS = {"tiny-multilingual": _ROOT / "tiny_multilingual"}
PACKED_FILES = ("config.json", "tokenizer.json.gz", "weights.safetensors")
_TABLE = "transformer.embeddings.word_embeddings.weight"


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a ``tokenizers`` tokenizer whose special tokens are [PAD], [UNK] and [CLS]."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def pack_tower(
    folder: Path, transformer: nn.Module, tokenizer: PreTrainedTokenizerFast, projection: nn.Linear
) -> None:
    """Write a packed tower.

    Each row of the token table is int8 with a float16 scale, every other tensor float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"transformer.{name}": value for name, value in transformer.state_dict().items()}
    weights |= {f"projection.{name}": value for name, value in projection.state_dict().items()}
    table = weights.pop(_TABLE).float()
    scale = (table.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-8).half()
    packed: dict[str, Tensor] = {name: value.half().contiguous() for name, value in weights.items()}
    packed["table.int8"] = (table / scale.float()).round().clamp(-127, 127).to(torch.int8)
    packed["table.scale"] = scale
    save_file(packed, folder / "weights.safetensors")
    config: Any = transformer.config
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    with gzip.GzipFile(folder / "tokenizer.json.gz", "wb", compresslevel=9, mtime=0) as file:
        file.write(tokenizer.backend_tokenizer.to_str().encode())


def is_packed(folder: Path) -> bool:
    """Tell whether a folder holds a packed tower."""
    return (folder / "tokenizer.json.gz").is_file()


def copy_packed(source: Path, folder: Path) -> None:
    """Copy a packed tower's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PACKED_FILES:
        shutil.copyfile(source / name, folder / name)


def unpack_tower(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast, dict[str, Tensor]]:
    """Read what ``pack_tower`` wrote, as float32.

    Raises:
        BundleError: A file is missing or damaged.
    """
    try:
        packed = load_file(folder / "weights.safetensors")
        config = DistilBertConfig.from_dict(
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        )
        with gzip.open(folder / "tokenizer.json.gz", "rt", encoding="utf-8") as file:
            tokenizer = fast_tokenizer(Tokenizer.from_str(file.read()))
        table = packed.pop("table.int8").float() * packed.pop("table.scale").float()
    except (OSError, KeyError, ValueError) as error:
        raise BundleError(
            f"{folder}: the packed query tower is missing or damaged ({error}). Reinstall the"
            " package, or copy the bundle again."
        ) from error
    transformer = DistilBertModel(config)
    weights = {
        name.removeprefix("transformer."): value.float()
        for name, value in packed.items()
        if name.startswith("transformer.")
    }
    weights[_TABLE.removeprefix("transformer.")] = table
    transformer.load_state_dict(weights)
    projection = {
        name.removeprefix("projection."): value.float()
        for name, value in packed.items()
        if name.startswith("projection.")
    }
    return transformer, tokenizer, projection
