"""Probes of gpu/test_intrinsics.py: 8-bit floats."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, uint64

from fastattn.arrays.view import EIGHT_BIT, LARGEST, numpy_dtype
from fastattn.gpu.ptx import memory, scalar

from .probes import add


# ---------------------------------------------------------------- single bytes
def loads(dtype: str) -> Callable[[], Any]:
    load = scalar.load_if(dtype, "float32")

    def make() -> Any:
        def kernel(a):
            for n in range(int32(cuda.threadIdx.x), 256, 32):
                memory.store_f32(uint64(a.dst + 4 * n), load(uint64(a.src + n), int32(1)))
        return kernel
    return make


def stores(dtype: str) -> Callable[[], Any]:
    put = scalar.store(dtype, "float32")

    def make() -> Any:
        def kernel(a):
            for n in range(int32(cuda.threadIdx.x), a.n, 32):
                put(uint64(a.dst + n), memory.load_f32(uint64(a.src + 4 * n)))
        return kernel
    return make


def check_loads(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        src = np.arange(256, dtype=np.uint8)
        np.testing.assert_array_equal(launch(src, dst=np.zeros(256, np.float32)), src.view(numpy_dtype(dtype)).astype(np.float32))
    return check


def every_rounding(dtype: str) -> Any:
    """Every number of the dtype, the middle of neighbours, what lies beside those, numbers beyond, infinities and NaN."""
    exact = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
    exact = np.sort(exact[np.isfinite(exact)])
    middle = (exact[1:] + exact[:-1]) / 2
    near = [np.nextafter(middle, np.float32(to)) for to in (-np.inf, np.inf)]
    return np.concatenate([exact, middle, *near, np.float32([1e9, -1e9, np.inf, -np.inf, np.nan, 1e-30, -1e-45])]).astype(np.float32)


def check_stores(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        src = every_rounding(dtype)
        got = launch(src, dst=np.zeros(src.size, np.uint8), n=src.size).view(numpy_dtype(dtype))
        want = np.clip(src, -LARGEST[dtype], LARGEST[dtype]).astype(numpy_dtype(dtype))
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    return check


for _dtype in EIGHT_BIT:
    add("scalar.load_if", "ld.global.u8; cvt.f32.f16", loads(_dtype), check_loads(_dtype), name=f"scalar.load_if_{_dtype}")
    add("scalar.store", "st.global.u8; add.rn.f32", stores(_dtype), check_stores(_dtype), name=f"scalar.store_{_dtype}")
