"""Sums of a captured array's gradient to its dtype."""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64

from ...arrays.view import ITEMSIZE
from ..ptx.scalar import load_if, store
from .config import ROUND_THREADS


def make_round(dtype: str, compute: str) -> Any:
    """The kernel: `count` contiguous numbers at `sums` to elements at `to`."""
    get, put, SIZE, SIZE_SUM, THREADS = load_if(compute, compute), store(dtype, compute), ITEMSIZE[dtype], ITEMSIZE[compute], ROUND_THREADS

    def kernel(a):
        n = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
        if n < a.count:
            put(uint64(int64(a.to) + n * SIZE), get(uint64(int64(a.sums) + n * SIZE_SUM), int32(1)))
    return kernel
