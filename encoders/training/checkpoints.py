"""Write and read training checkpoints that survive kill -9.

Finished towers are saved by ``towers/bundle.py``. Checkpoints are written beside their
place, renamed in one step and verified by checksum; the last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from encoders.errors import CheckpointError

CHECKPOINT_FORMAT = 1
KEPT = 2
_STATE = "state.pt"
_META = "meta.json"
_REMEDY = (
    "Remove this folder to fall back to the checkpoint before it, or start again in an empty output"
    " folder."
)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    name: str | None = None,
) -> Path:
    """Write a checkpoint and return its folder, ``folder/step-00000500`` or ``folder/<name>``.

    A process killed at any moment leaves the older checkpoints whole and at most a ``.partial``
    folder, which the next save removes.

    Args:
        folder: Where checkpoints live.
        step: Optimiser steps done.
        state: Tensors and plain values (``torch.save``).
        meta: What explains the checkpoint: config, run fingerprint, metrics. Goes to ``meta.json``
            with format, step and checksum.
        name: Folder name instead of the step's, e.g. ``best``; it replaces its predecessor and is
            not counted among the kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover)
    place = folder / (name or f"step-{step:08d}")
    partial = folder / f"{place.name}.partial"
    partial.mkdir()
    torch.save(dict(state), partial / _STATE)
    described = {
        "format_version": CHECKPOINT_FORMAT,
        "step": step,
        "sha256": _sha256(partial / _STATE),
        **meta,
    }
    (partial / _META).write_text(
        json.dumps(described, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8"
    )
    for path in (partial / _STATE, partial / _META, partial):
        _sync(path)
    _put_in_place(partial, place)
    _sync(folder)
    if name is None:
        for older in list_checkpoints(folder)[:-KEPT]:
            shutil.rmtree(older)
    return place


def _put_in_place(partial: Path, place: Path) -> None:
    """Rename a complete folder to its place.

    A folder cannot be replaced in one step: the old one is moved aside, so that one of the two is
    always whole.
    """
    if not place.exists():
        partial.rename(place)
        return
    old = place.with_name(f"{place.name}.old.partial")
    place.rename(old)
    partial.rename(place)
    shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete step checkpoints in ``folder``, oldest first; none where it is missing."""
    found = (path for path in folder.glob("step-*") if path.suffix != ".partial")
    return sorted(path for path in found if path.is_dir())


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Read ``meta.json`` of a checkpoint.

    Raises:
        CheckpointError: It is missing, not JSON, or of another format version.
    """
    try:
        meta: dict[str, Any] = json.loads((checkpoint / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint with meta.json, but could not read it ({error})."
            f" {_REMEDY}"
        ) from error
    if meta.get("format_version") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{checkpoint}: format version {meta.get('format_version')!r}, but this code reads"
            f" {CHECKPOINT_FORMAT}. {_REMEDY}"
        )
    return meta


def load_checkpoint(
    checkpoint: Path, run: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint's state (on the CPU) and meta.

    Args:
        checkpoint: Its folder.
        run: Fingerprint the checkpoint must carry as ``meta["run"]``; None: any.

    Raises:
        CheckpointError: Missing, truncated, altered, of another version or of another run.
    """
    meta = read_meta(checkpoint)
    if run is not None and meta.get("run") != run:
        raise CheckpointError(
            f"{checkpoint}: belongs to another run (fingerprint {str(meta.get('run'))[:16]},"
            f" expected {run[:16]}): config or data changed. Train into an empty output folder, or"
            " restore the config and data this run began with."
        )
    path = checkpoint / _STATE
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: {_STATE} is missing. {_REMEDY}")
    digest = _sha256(path)
    if digest != meta.get("sha256"):
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: checksum {digest[:16]} ({size} bytes), expected"
            f" {str(meta.get('sha256'))[:16]}: truncated or altered. {_REMEDY}"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state, meta
