"""Choose the device of a run, and say whether it computes in bfloat16.

A processor without bfloat16 instructions emulates them, many times slower than float32.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from encoders.errors import ConfigError
from encoders.training.distributed import process_rank

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Names of the instructions in /proc/cpuinfo: x86 with AVX-512 or AMX, Arm."""


@lru_cache
def computes_bf16(device_type: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Say whether a device (``cuda``, ``cpu``) has bfloat16 instructions.

    A processor that does not list its instructions is believed to.
    """
    if device_type != "cpu":
        return True
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    for line in lines:
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not BF16_FLAGS.isdisjoint(flags.split())
    return True


def choose_device(name: str) -> torch.device:
    """Return the device a config names; ``auto`` takes CUDA (by local rank) when there is one.

    Raises:
        ConfigError: The device is unknown or not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', but got {name!r}.")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "device is 'cuda', but torch sees no CUDA device. Use device = 'auto' or 'cpu'."
            )
        torch.cuda.set_device(process_rank() % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
