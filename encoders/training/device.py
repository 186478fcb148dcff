"""Whether bfloat16 is worth asking for: a processor without instructions for it imitates them, many times slower than float32."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from encoders.errors import ConfigError
from encoders.training.distributed import process_rank

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""What /proc/cpuinfo calls the instructions: x86 with AVX-512 or AMX, Arm."""


@lru_cache
def computes_bf16(device_type: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether a device (``cuda``, ``cpu``) computes in bfloat16 itself.

    Where the processor does not say what it can, it is believed to.
    """
    if device_type != "cpu":
        return True
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = next(
        (
            line.partition(":")[2].split()
            for line in lines
            if line.partition(":")[0].strip() in ("flags", "Features")
        ),
        None,
    )
    return flags is None or not BF16_FLAGS.isdisjoint(flags)


# -------------------------------------------------------------------------------------------- parts
def choose_device(name: str) -> torch.device:
    """The device a config names; ``auto`` takes CUDA (this process's local rank) when there is one.

    Raises:
        ConfigError: The device is unknown or not there.
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
