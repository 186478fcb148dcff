"""Read and write what Sentence-Transformers puts around a transformer: pooling and dense layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from encoders.towers.forms import MAX_TOKENS

POOLINGS = ("cls", "mean", "max")
_PACKAGE = "sentence_transformers.models"
_IDENTITY = "torch.nn.modules.linear.Identity"
ACTIVATIONS: dict[str, type[nn.Module]] = {
    _IDENTITY: nn.Identity,
    "torch.nn.modules.activation.Tanh": nn.Tanh,
    "torch.nn.modules.activation.ReLU": nn.ReLU,
    "torch.nn.modules.activation.GELU": nn.GELU,
    "torch.nn.modules.activation.Sigmoid": nn.Sigmoid,
}
"""Activation functions that are known, by the name that folders give."""
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}


class DenseLayer(nn.Module):
    """A linear layer and an activation function."""

    def __init__(self, linear: nn.Linear, activation: str = _IDENTITY) -> None:
        super().__init__()
        self.linear = linear
        self.activation_name = activation
        self.activation = ACTIVATIONS[activation]()

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, in) -> (B, out)."""
        output: Tensor = self.activation(self.linear(inputs))
        return output

    @property
    def is_linear(self) -> bool:
        """Whether the activation is the identity."""
        return self.activation_name == _IDENTITY

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": True,
            "activation_function": self.activation_name,
        }
        _write_json(folder / "config.json", described)
        state = self.linear.state_dict()
        weights = {f"linear.{n}": v.detach().float().cpu().contiguous() for n, v in state.items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> DenseLayer:
        """Read what ``save``, or Sentence-Transformers, wrote.

        Raises:
            ValueError: The activation function is not known.
        """
        described = _read_json(folder / "config.json")
        activation = str(described.get("activation_function", _IDENTITY))
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{folder.name}: activation function {activation!r}, but known are"
                f" {', '.join(ACTIVATIONS)}"
            )
        binary = folder / "pytorch_model.bin"
        if (folder / "model.safetensors").is_file():
            weights = load_file(folder / "model.safetensors")
        else:
            weights = torch.load(binary, map_location="cpu", weights_only=True)
        size = weights["linear.weight"].shape
        linear = nn.Linear(int(size[1]), int(size[0]))
        state = {name.removeprefix("linear."): value.float() for name, value in weights.items()}
        linear.load_state_dict({"bias": torch.zeros(size[0]), **state})
        return cls(linear, activation)


class FolderModel(NamedTuple):
    """What a Sentence-Transformers folder declares around its transformer."""

    transformer: Path
    """Folder of the transformer and its tokenizer."""
    max_tokens: int
    pooling: str
    dense: list[DenseLayer]


def is_sentence_transformer(folder: Path) -> bool:
    """Tell whether a folder is a Sentence-Transformers model."""
    return (folder / "modules.json").is_file()


def read_folder(folder: Path) -> FolderModel:
    """Read a Sentence-Transformers folder, its transformer's weights apart.

    Raises:
        ValueError: A part is of a kind that is not known.
        OSError, KeyError: A file is missing or not what it should be.
    """
    root, max_tokens, pooling = folder, MAX_TOKENS, "cls"
    dense: list[DenseLayer] = []
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        kind, path = str(module["type"]).rsplit(".", 1)[-1], folder / str(module["path"])
        if kind == "Transformer":
            root, max_tokens = path, _max_tokens(path)
        elif kind == "Pooling":
            pooling = _pooling(path)
        elif kind == "Dense":
            dense.append(DenseLayer.load(path))
        elif kind not in ("Normalize", "Dropout"):
            raise ValueError(
                f"{folder.name}: a Sentence-Transformers module {kind!r}; known are Transformer,"
                " Pooling, Dense, Dropout and Normalize"
            )
    return FolderModel(root, max_tokens, pooling, dense)


def write_modules(folder: Path, paths: Sequence[str]) -> None:
    """Write ``modules.json`` for folders called ``""``, ``1_Pooling``, ``2_Dense`` and so on."""
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"{_PACKAGE}.{path.partition('_')[2] or 'Transformer'}",
        }
        for number, path in enumerate(paths)
    ]
    _write_json(folder / "modules.json", modules)


def write_pooling(folder: Path, pooling: str, width: int) -> None:
    """Write the pooling's ``config.json``."""
    flags = {flag: name == pooling for flag, name in _FLAGS.items()}
    _write_json(folder / "config.json", {"word_embedding_dimension": width, **flags})


def _pooling(folder: Path) -> str:
    described = _read_json(folder / "config.json")
    named = described.get("pooling_mode")
    wanted = [named] if isinstance(named, str) else list(named or [])
    flags = (flag for flag, on in described.items() if flag.startswith("pooling_mode_") and on)
    wanted = wanted or list(flags)
    found = [_FLAGS.get(name, name) for name in wanted]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise ValueError(f"pooling {', '.join(found) or 'of no kind'}; known are {POOLINGS}")
    return str(found[0])


def _max_tokens(folder: Path) -> int:
    for path in (folder / "sentence_bert_config.json", folder.parent / "sentence_bert_config.json"):
        if path.is_file():
            length = _read_json(path).get("max_seq_length")
            return min(int(length), MAX_TOKENS) if length else MAX_TOKENS
    return MAX_TOKENS


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
