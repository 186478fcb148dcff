"""Text to vectors: features, query and entity towers, training, evaluation and batch inference.

``from encoders import load_bundle, train`` is the way in: one reads a model bundle, the other makes
its towers. A name is looked up when it is first used, so that ``import encoders`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from encoders.towers.bundle import load_bundle
    from encoders.training.loop import train

__all__ = ["load_bundle", "train"]

_MODULES = {"load_bundle": "encoders.towers.bundle", "train": "encoders.training.loop"}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from encoders.extras import extra_named

    with extra_named(f"encoders.{name}"):
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
