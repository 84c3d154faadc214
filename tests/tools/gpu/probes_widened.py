"""Probes of gpu/test_intrinsics.py: 8-bit rows widened on their way to shared memory. They also run from their PTX."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, uint8, uint64

from fastattn.arrays.view import numpy_dtype
from fastattn.gpu.ptx import memory, widened
from tests.tools.gpu.probes import HALVES, add
from tests.tools.problems import NUMPY


def chunks(dtype: str, source: str) -> Callable[[], Any]:
    """16 numbers a lane, those of the first n lanes; the second eight before the first."""
    store_chunk = widened.make_store_chunk(dtype, source)

    def make() -> Any:
        def kernel(a):
            lane, base = int32(cuda.threadIdx.x), int32((memory.shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
            at = uint64(a.src + uint64(16 * lane))
            widened.prefetch(at)
            words = widened.load_chunk_if(at, int32(1) if lane < a.n else int32(0))
            first = int32(base + 32 * lane)
            store_chunk(int32(first + 16), first, words)
            cuda.syncwarp()
            for k in range(8):
                word = memory.load_shared_b32(int32(first + 4 * k))
                memory.store_b32(uint64(a.dst + uint64(32 * lane + 4 * k)), word)
        return kernel
    return make


def check_chunks(dtype: str, source: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        codes = np.arange(512).astype(np.uint8)
        values = codes.view(numpy_dtype(source))
        codes[~np.isfinite(values.astype(np.float32))] = 0
        got = launch(values, values, dst=np.zeros((32, 2, 8), NUMPY[dtype]), n=30)
        want = values.astype(np.float32).reshape(32, 2, 8)[:, ::-1].copy()
        want[30:] = 0
        np.testing.assert_array_equal(got.astype(np.float32), want)
    return check


for _source in ("float8_e4m3fn", "float8_e5m2"):
    for _dtype in HALVES:
        add("widened.load_chunk_if widened.make_store_chunk widened.prefetch",
            "prefetch.global.L2; ld.global.v4.b32; st.shared.v4.b32" + "; cvt.rn.f16x2.e4m3x2" * (_source == "float8_e4m3fn"),
            chunks(_dtype, _source), check_chunks(_dtype, _source), name=f"direct widened {_source} {_dtype}", shared=32 * 32 + 16)
