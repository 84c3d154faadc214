"""Probes of gpu/test_intrinsics.py: 8-bit floats, and exponentials that are exact enough for them."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, uint64

from fastattn.arrays.view import EIGHT_BIT, LARGEST, numpy_dtype
from fastattn.gpu.ptx import mbarrier, memory, scalar, tma, wgmma, wgmma_8bit
from fastattn.gpu.tile import fragments as f
from fastattn.gpu.tile.stores import store_bytes as stores_rows
from tests.tools.gpu.probes import C, add, as_matrix, load, normal, same
from tests.tools.gpu.probes_tiles import BAR, PANEL, SHARED, begin, save_at

E4M3, E5M2 = EIGHT_BIT


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


# ---------------------------------------------------------------- words and bytes
def turned() -> Any:
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        at = uint64(a.src + 16 * lane)
        x = wgmma_8bit.transpose_bytes(memory.load_b32(at), memory.load_b32(uint64(at + 4)), memory.load_b32(uint64(at + 8)),
                                       memory.load_b32(uint64(at + 12)))
        memory.store_words(uint64(a.dst + 16 * lane), x[0], x[1], x[2], x[3])
    return kernel


def check_turned(launch: Any) -> None:
    src = np.random.default_rng(0).integers(0, 256, (32, 4, 4), np.uint8)
    same(launch(src, dst=np.zeros((32, 4, 4), np.uint8)), src.swapaxes(1, 2))


add("wgmma_8bit.transpose_bytes memory.store_words", "prmt.b32; st.global.v4.b32", turned, check_turned)


def stored_rows() -> Any:
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        at = uint64(a.dst + uint64(f.lane_row(lane) * C + f.thread_col(lane)))
        stores_rows(load(a.src, lane), at, uint64(at + uint64(8 * C)), int32(1), int32(f.lane_row(lane) < a.n))
    return kernel


def check_stored_rows(launch: Any) -> None:
    x = 100 * normal(16, C)
    x[3, :4] = 1e9, -1e9, np.inf, np.nan
    got = launch(x, dst=np.full((16, C), 0xAA, np.uint8), n=5)
    want = np.clip(x, -448, 448).astype(numpy_dtype(E4M3)).view(np.uint8)
    want[13:] = 0xAA
    same(got & 0x7F, want & 0x7F)
    same(got[np.isfinite(x)], want[np.isfinite(x)])


add("stores.store_bytes memory.emit_store_e4m3_pair_if", "cvt.rn.satfinite.e4m3x2.f32; st.global.b16", stored_rows, check_stored_rows)


# ---------------------------------------------------------------- wgmma
def drawn(dtype: str, *shape: int, seed: int = 0) -> Any:
    return np.clip(normal(*shape, seed=seed), -8, 8).astype(numpy_dtype(dtype))


def product_qk(dim: int, dtype_a: str, dtype_b: str) -> Callable[[], Any]:
    """A B^T of two 64 x dim tiles: twice, the second added to the first."""
    ROW = min(dim, 128)
    qk, rows_of, PANELS, BYTES = wgmma_8bit.make_qk(dtype_a, dtype_b, ROW), wgmma_8bit.make_descriptor(ROW), dim // ROW, 64 * ROW

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            if cuda.threadIdx.x == 0:
                mbarrier.arrive_expect(int32(base + BAR), int32(2 * PANELS * BYTES))
                for p in range(PANELS):
                    tma.load(int32(base + p * BYTES), a.map_a, int32(base + BAR), int32(p * ROW), int32(0), int32(0), int32(0))
                    tma.load(int32(base + 2 * PANEL + p * BYTES), a.map_b, int32(base + BAR), int32(p * ROW), int32(0), int32(0), int32(0))
            mbarrier.wait(int32(base + BAR), int32(0))
            wgmma.fence()
            acc = qk(f.zeros(32), rows_of(base), rows_of(int32(base + 2 * PANEL)), dim, 64, 64, int32(0))
            wgmma.commit()
            acc = wgmma.wait_all(acc)
            wgmma.fence()
            acc = qk(acc, rows_of(base), rows_of(int32(base + 2 * PANEL)), dim, 64, 64, int32(1))
            wgmma.commit()
            save_at(a.dst, int32(cuda.threadIdx.x >> 5) * 32, wgmma.wait_all(acc), 32)
        return kernel
    return make


def check_qk(dim: int, dtype_a: str, dtype_b: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x, y = drawn(dtype_a, 1, 64, 1, dim), drawn(dtype_b, 1, 64, 1, dim, seed=1)
        got = launch(x, y, dst=np.zeros((4, 32, 32), np.float32), maps=[("src", 64), ("other", 64)])
        exact = 2 * (x[0, :, 0].astype(np.float64) @ y[0, :, 0].astype(np.float64).T)
        np.testing.assert_allclose(np.concatenate([as_matrix(warp) for warp in got]), exact, rtol=2e-3, atol=2e-2)
    return check


def product_pv(panel: int, dtype_v: str) -> Callable[[], Any]:
    """P V of the columns 64 to 127, for P (64 x 64) in registers and the transposed V (128 x 64 keys) in panels of `panel` keys: twice, the
    second added to the first."""
    pv, values_of, PANELS, BYTES = wgmma_8bit.make_pv(dtype_v, panel), wgmma_8bit.make_descriptor(panel), 64 // panel, 128 * panel

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            warp, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
            if cuda.threadIdx.x == 0:
                mbarrier.arrive_expect(int32(base + BAR), int32(PANELS * BYTES))
                for p in range(PANELS):
                    tma.load(int32(base + p * BYTES), a.map_a, int32(base + BAR), int32(0), int32(128 * p), int32(0), int32(0))
            p = wgmma_8bit.to_e4m3(load(uint64(a.other + uint64(4 * 16 * C * warp)), lane))
            mbarrier.wait(int32(base + BAR), int32(0))
            wgmma.fence()
            values = values_of(int32(base + 64 * panel))
            acc = pv(load(uint64(a.other), lane), p, values, 128, a.n)
            wgmma.commit()
            acc = wgmma.wait_all(acc)
            wgmma.fence()
            acc = pv(acc, p, values, 128, int32(1))
            wgmma.commit()
            save_at(a.dst, warp * 32, wgmma.wait_all(acc), 32)
        return kernel
    return make


def check_pv(panel: int, dtype_v: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        v, p = drawn(dtype_v, 64, 128), normal(64, 64, seed=1)
        p[0, :3] = 1000, -1000, 0.001           # saturate; a subnormal number
        order = (np.array(wgmma_8bit.KEY_OF) + 32 * np.arange(2)[:, None]).ravel()
        turned = np.ascontiguousarray(v[order].reshape(64 // panel, panel, 128).swapaxes(1, 2)).reshape(1, -1, 1, panel)
        got = launch(turned, p, dst=np.zeros((4, 32, 32), np.float32), maps=[("src", 128)])
        exact = np.clip(p, -448, 448).astype(numpy_dtype(E4M3)).astype(np.float64) @ v[:, 64:].astype(np.float64)
        terms = np.clip(np.abs(p), 0, 448).astype(np.float64) @ np.abs(v[:, 64:]).astype(np.float64)
        error = np.abs(np.concatenate([as_matrix(warp) for warp in got]) / 2 - exact)
        # each of a sum's steps keeps 13 to 14 bits of its largest term. Measured on an H200: up to 2**-10.7 of all terms
        assert (error <= 2.0**-10 * terms).all(), (error / terms).max()
    return check


for _dim, _a, _b in ((64, E4M3, E4M3), (256, E4M3, E4M3), (128, E4M3, E5M2)):
    add("wgmma_8bit.make_qk wgmma_8bit.make_descriptor", f"m64n64k32.f32.{wgmma_8bit.KIND[_a]}.{wgmma_8bit.KIND[_b]}",
        product_qk(_dim, _a, _b), check_qk(_dim, _a, _b), name=f"wgmma_8bit.qk_{_dim}_{_b}", threads=128, shared=SHARED)
for _panel, _v in ((64, E4M3), (32, E4M3), (64, E5M2)):
    add("wgmma_8bit.make_pv wgmma_8bit.to_e4m3", f"m64n64k32.f32.e4m3.{wgmma_8bit.KIND[_v]}; cvt.rn.satfinite.e4m3x2.f32",
        product_pv(_panel, _v), check_pv(_panel, _v), name=f"wgmma_8bit.pv_{_panel}_{_v}", threads=128, shared=SHARED)
