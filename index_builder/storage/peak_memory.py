"""Measure the peak memory of a stage.

Private pages, which cannot be evicted, are sampled; the resident peak is the kernel's own.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType

_SAMPLE_SECONDS = 0.02


def _status_kib(field: str) -> int:
    """Read a field of ``/proc/self/status``, KiB; 0 where it is not there."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def private_mib() -> float:
    """Measure the anonymous resident memory of this process, MiB; 0 where it is not reported."""
    return _status_kib("RssAnon:") / 1024


class PeakMemory:
    """Measure the peak between enter and exit of a ``with`` block.

    Attributes:
        private_mib: Highest anonymous resident memory seen, sampled every 20 ms.
        resident_mib: Highest resident memory (also mapped files), by the kernel where
            ``/proc/self/clear_refs`` can be written.
    """

    def __init__(self) -> None:
        self.private_mib = 0.0
        self.resident_mib = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._thread = threading.Thread(target=self._sample, daemon=True, name="peak-memory")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.private_mib = max(self.private_mib, private_mib())
        self.resident_mib = _status_kib("VmHWM:") / 1024

    def _sample(self) -> None:
        """Keep the highest private memory until the block ends."""
        while True:
            # Without a free file descriptor this sample is left out
            with contextlib.suppress(OSError):
                self.private_mib = max(self.private_mib, private_mib())
            if self._stop.wait(_SAMPLE_SECONDS):
                return
