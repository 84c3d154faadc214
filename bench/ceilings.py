"""Measured limits of the hardware: multiply-adds per second and bytes read per second.

probe.c is compiled for this processor with the first C compiler of $CC, gcc and cc. Without one there are no ceilings.
"""
from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .machine import version
from .timing import wall

_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
_MATMUL = 2048


def _compiler() -> str | None:
    return next((path for path in map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc")) if path), None)


def missing_compiler() -> str | None:
    return None if _compiler() else "not installed: a C compiler"


@functools.cache
def _probe() -> ctypes.CDLL:
    """probe.c, compiled and loaded. The file is deleted once it is loaded."""
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("the hardware probe needs a C compiler; $CC names one")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        subprocess.run([compiler, *_FLAGS, str(Path(__file__).with_name("probe.c")), "-o", str(library)], check=True)
        probe = ctypes.CDLL(str(library))
    probe.fma_chunk_flops.restype = ctypes.c_long
    probe.fma_run.argtypes = (ctypes.c_long, ctypes.c_int)
    probe.fma_run.restype = None
    probe.read_run.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    probe.read_run.restype = None
    return probe


def fma_call(flops: int, threads: int) -> Callable[[], None]:
    """A call that performs `flops` float32 operations as multiply-adds in registers, rounded to 2 million."""
    probe = _probe()
    chunks = max(1, round(flops / probe.fma_chunk_flops()))
    return lambda: probe.fma_run(chunks, threads)


def read_call(arrays: list[np.ndarray[Any, Any]], threads: int) -> Callable[[], None]:
    """A call that reads contiguous arrays, which start on a cache line, to the last whole 256 KiB."""
    probe = _probe()
    places = [(array.ctypes.data, array.nbytes) for array in arrays]

    def call() -> None:
        for address, size in places:
            probe.read_run(address, size, threads)

    return call


def measure(threads: int, repeats: int = 5) -> dict[str, tuple[float, str]]:
    """GF/s of float32 by up to three means, and GB/s of reading an array larger than a core's caches.

    The largest GF/s is the peak: the probe has nothing to load or store. BLAS on matrices of 2048 is what a very good
    kernel reaches.
    """
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, _MATMUL, _MATMUL), dtype=np.float32)
    flops = 2 * _MATMUL**3
    results: dict[str, tuple[float, str]] = {}

    def fastest(call: Callable[[], object]) -> float:
        return min(wall(call) for _ in range(repeats + 1))

    if missing_compiler() is None:
        array = random.integers(1, 1 << 62, 1 << 25)
        start = -array.ctypes.data % 64 // 8
        array = array[start:]
        results["memory read"] = array.nbytes / fastest(read_call([array], threads)) / 1e9, "GB/s"
        results["float32 FMA in registers"] = flops / fastest(fma_call(flops, threads)) / 1e9, "GF/s"
    results["numpy matmul"] = flops / fastest(lambda: a @ b) / 1e9, "GF/s"
    if version("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        x, y = torch.from_numpy(a), torch.from_numpy(b)
        results["torch matmul"] = flops / fastest(lambda: x @ y) / 1e9, "GF/s"
    return results
