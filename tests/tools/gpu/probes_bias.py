"""Probes of gpu/test_intrinsics.py: a bias in shared memory, read as fragments."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, uint64

from fastattn.gpu.ptx import mbarrier, memory, scalar
from fastattn.gpu.spec import Spec
from fastattn.gpu.tile.bias import make_bias_tile
from tests.tools.gpu.probes import HALVES, Array, add, as_matrix, normal, same
from tests.tools.gpu.probes_tiles import BAR, PANEL, SHARED, begin, load_panels, save_at
from tests.tools.problems import NUMPY

KEYS, COUNT = 128, 64       # COUNT: registers of 16 queries by 128 keys


def bias_tile(dtype: str, transposed: bool) -> Callable[[], Any]:
    """64 queries by 128 keys: each of four warps reads 16 queries, or with `transposed` 16 keys and then the 64 keys on."""
    count = COUNT // 2 if transposed else COUNT
    _, lane_address, read = make_bias_tile(Spec(dtype, 64, 64, bias=dtype), 64, KEYS, count, transposed)

    def make() -> Any:
        def kernel(a):
            base, warp, lane = begin(1), int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
            if cuda.threadIdx.x == 0:
                mbarrier.arrive_expect(int32(base + BAR), int32(2 * PANEL))
                load_panels(a.map_a, base, 0, 2)
            mbarrier.wait(int32(base + BAR), int32(0))
            save_at(a.dst, count * warp, read(lane_address(base, int32(16 * warp), lane)), count)
            if transposed:
                save_at(a.dst, count * (4 + warp), read(lane_address(base, int32(64 + 16 * warp), lane)), count)
        return kernel
    return make


def check_bias_tile(dtype: str, transposed: bool) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x = normal(1, 64, 1, KEYS).astype(NUMPY[dtype])
        got = launch(x, dst=np.zeros((4, 2, COUNT // 2, 32), np.float32), maps=[("src", 64)])
        expected = x[0, :, 0].astype(np.float32)
        if transposed:
            same(np.concatenate([as_matrix(warp) for warp in got.reshape(8, COUNT // 2, 32)]), expected.T)
        else:
            same(np.concatenate([np.hstack([as_matrix(half) for half in warp]) for warp in got]), expected)
    return check


def shared_chunks(dtype: str) -> Callable[[], Any]:
    load = scalar.load_shared_chunk(dtype)

    def make() -> Any:
        def kernel(a):
            base, i = begin(1), int32(cuda.threadIdx.x)
            for k in range(4):
                memory.store_shared_b32(int32(base + 16 * i + 4 * k), memory.load_b32(uint64(a.src + uint64(16 * i + 4 * k))))
            numbers = load(int32(base + 16 * i))
            for k in range(8):
                memory.store_f32(uint64(a.dst + uint64(32 * i + 4 * k)), numbers[k])
        return kernel
    return make


def check_shared_chunks(dtype: str) -> Callable[[Any], None]:
    x: Array = normal(32, 8).astype(NUMPY[dtype])
    return lambda launch: same(launch(x, dst=np.zeros((32, 8), np.float32)), x.astype(np.float32))


for _dtype in HALVES:
    for _transposed in (False, True):
        add("mma.emit_ldmatrix", "ldmatrix.sync.aligned.m8n8.x4" + ".trans" * _transposed + ".shared.b16", bias_tile(_dtype, _transposed),
            check_bias_tile(_dtype, _transposed), name=f"tma.bias_tile_{_dtype}" + "_transposed" * _transposed, threads=128, shared=SHARED)
    add("scalar.load_shared_chunk", "ld.shared.v4.b32", shared_chunks(_dtype), check_shared_chunks(_dtype),
        name=f"scalar.load_shared_chunk_{_dtype}", shared=SHARED)
