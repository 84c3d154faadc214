"""Where a measurement was made: processor, versions, date."""
from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import time
from pathlib import Path

# Processor flags that decide which kernels a library can use.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def cpu_model() -> str:
    """The processor's name and its vector instructions, from /proc/cpuinfo if there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.machine()
    return f"{name} ({' '.join(flag for flag in _FLAGS if flag in flags)})"


def available_threads() -> int:
    """The number of processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class OtherWork:
    """How many processors other processes keep busy. On a busy machine even paired times mean little."""

    def __init__(self) -> None:
        self._start = self._now()

    def processors(self) -> float | None:
        """The mean since the start. None without /proc/stat."""
        now = self._now()
        if self._start is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, busy - own) / max(wall, 1e-3)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Three clocks in seconds: the wall's; busy time of all processors; CPU time of this process and its ended children.

        Busy is user, nice, system, irq, softirq and steal.
        """
        try:
            line = Path("/proc/stat").read_text().split(None, 9)
        except OSError:
            return None
        ticks = sum(int(line[field]) for field in (1, 2, 3, 6, 7, 8))
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time() + sum(os.times()[2:4])


def version(package: str) -> str | None:
    """The installed version of a package, found without importing it. None if it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
