"""Whether bfloat16 is worth asking for: a processor without instructions for it imitates them, many times slower than float32."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""What /proc/cpuinfo calls the instructions: x86 with AVX-512 or AMX, Arm."""


@lru_cache
def computes_bf16(device_type: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether a device (``cuda``, ``cpu``) computes in bfloat16 itself. Where the processor does not say what it can, it is believed to."""
    if device_type != "cpu":
        return True
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = next((line.partition(":")[2].split() for line in lines if line.partition(":")[0].strip() in ("flags", "Features")), None)
    return flags is None or not BF16_FLAGS.isdisjoint(flags)
