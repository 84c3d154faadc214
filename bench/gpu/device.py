"""The card: timing with events, its clock, its versions, and what it can do at best."""
from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from typing import Any

from .. import machine
from ..events import Events
from ..results import Where
from ..timing import Call

# Distributions that decide which machine code runs, ours or a rival's.
DISTRIBUTIONS = ("flash-attn-4", "nvidia-cutlass-dsl", "numba-cuda", "numba", "llvmlite", "nvidia-nvjitlink", "nvidia-cuda-nvcc",
                 "cuda-core", "numpy")


class Device(Events):
    """Where calls run, how they are timed, and what the card is. The tests have their own."""

    def clock_mhz(self, call: Call) -> int | None:
        """The multiprocessors' clock while `call` runs. None if it cannot be read."""
        try:
            for _ in range(8):
                call()
            return int(self.torch.cuda.clock_rate())
        except Exception:  # needs pynvml, a driver that answers, ...
            return None

    def extra_megabytes(self, call: Callable[[], Any]) -> float:
        """Peak memory of a call, beyond what was there before and what it returns.

        Counts torch's allocations and what fastattn and others took from the driver. Memory that torch and fastattn
        keep of earlier calls is freed first.
        """
        from fastattn.gpu.runtime import workspace

        cuda = self.torch.cuda
        self.release()
        self.synchronize()
        workspace.trim(0)
        cuda.reset_peak_memory_stats()
        before, free, reserved = cuda.memory_allocated(), cuda.mem_get_info()[0], cuda.memory_reserved()
        result = call()
        least = cuda.mem_get_info()[0]      # read before the synchronization, at which a pool frees its unused memory
        self.synchronize()
        kept = cuda.memory_allocated() - before
        elsewhere = max(0, free - min(least, cuda.mem_get_info()[0]) - (cuda.memory_reserved() - reserved))
        del result
        return float(cuda.max_memory_allocated() - before - kept + elsewhere) / 1e6

    def poison(self, *like: Any) -> None:
        """Fill with NaN the memory that the next allocations of these sizes will get. An element that is not written cannot look right."""
        poisoned = [self.torch.full_like(tensor, float("nan")) for tensor in like]
        del poisoned, like
        self.synchronize()

    def release(self) -> None:
        self.torch.cuda.empty_cache()

    def where(self) -> Where:
        torch = self.torch
        major, minor = torch.cuda.get_device_capability(0)
        count = torch.cuda.get_device_properties(0).multi_processor_count
        cudnn = ".".join(map(str, (lambda v: (v // 10000, v // 100 % 100, v % 100))(torch.backends.cudnn.version() or 0)))
        versions = [f"driver {_driver()}", f"CUDA {torch.version.cuda}", f"torch {torch.__version__}", f"cuDNN {cudnn}",
                    *(f"{name} {distribution(name) or 'not installed'}" for name in DISTRIBUTIONS)]
        return Where(machine.today(), f"{torch.cuda.get_device_name(0)} ({count} multiprocessors)", f"sm_{major}{minor}", 1,
                     platform.python_version(), ", ".join(versions), self._ceilings())

    def _ceilings(self) -> str:
        """A square bf16 GEMM, and a copy (bytes read plus bytes written)."""
        torch = self.torch
        a, b = torch.randn(2, 8192, 8192, device=self.name, dtype=torch.bfloat16)
        source = torch.empty(1 << 30, device=self.name, dtype=torch.uint8)
        target = torch.empty_like(source)
        found = []
        for name, call, amount, unit in (("bf16 matmul", lambda: a @ b, 2 * 8192**3 / 1e12, "TFLOP/s"),
                                         ("copy", lambda: target.copy_(source), 2 * (1 << 30) / 1e9, "GB/s")):
            turn = self.turn([call], 0.03)
            found.append(f"{name} {amount / min(turn() for _ in range(3)):.0f} {unit}")
        return ", ".join(found)


def distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"
