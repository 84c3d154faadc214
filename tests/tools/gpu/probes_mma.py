"""Probes of gpu/test_intrinsics.py: mma.sync, cp.async, and operands that warps share."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, int64, uint64

from fastattn.gpu.dsl.inline import inline
from fastattn.gpu.ptx import cp_async, memory, mma
from fastattn.gpu.tile import fragments as f
from tests.tools.gpu.probes import COL, COUNT, HALVES, ROW, Array, C, add, as_matrix, load, normal, same, save
from tests.tools.gpu.probes_tiles import KIND, PANEL, SHARED, begin, save_at
from tests.tools.problems import NUMPY

# ---------------------------------------------------------------- mma.sync and cp.async
load_whole = cp_async.make_load(True)


@inline
def copy_v(a, base, thread, panels):
    """V, 64 rows of `panels` panels, by cp.async; the caller waits. `thread` is one of 64."""
    row, chunk = int32(thread >> 3), int32(thread & 7)
    load_whole(int32(base + row * 128 + ((chunk ^ (row & 7)) << 4)), uint64(a.src + uint64(128 * panels * row + 16 * chunk)),
               int64(128 * panels), int64(2), int32(64 - row), int32(64 * panels - 8 * chunk), 64, 8, panels, PANEL)


def mma_qk(dtype: str, whole: bool) -> Callable[[], Any]:
    """Q (32 x 128) K (64 x 128)^T; warp 0 reads Q in shared memory, warp 1 keeps it in registers. n rows of K exist."""
    qk, _ = mma.make_products(dtype)
    load_tile = cp_async.make_load(whole)

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            t, lane = int32(cuda.threadIdx.x), int32(cuda.threadIdx.x & 31)
            row, chunk = int32(t >> 3), int32(t & 7)
            to = int32(base + row * 128 + ((chunk ^ (row & 7)) << 4))
            source = uint64(256 * row + 16 * chunk)
            load_tile(to, uint64(a.src + source), int64(256), int64(2), int32(32 - row), int32(128 - 8 * chunk), 32, 8, 2, 4096)
            load_tile(int32(to + PANEL), uint64(a.other + source), int64(256), int64(2), int32(a.n - row), int32(128 - 8 * chunk),
                      64, 8, 2, PANEL)
            cp_async.wait_all()
            cuda.syncthreads()
            q, k = int32(base + mma.lane_offset(lane)), int32(base + PANEL + mma.lane_offset_b(lane))
            if t < 32:
                acc = qk(f.zeros(64), q, k, 2, 128, 4096, PANEL)
            else:
                acc = qk(f.zeros(64), mma.load_rows(q, 2, 128, 4096), k, 2, 128, 4096, PANEL)
            save_at(a.dst, 64 * (t >> 5), acc, 64)
        return kernel
    return make


def check_mma_qk(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        q, k = normal(32, 128).astype(NUMPY[dtype]), normal(64, 128, seed=1).astype(NUMPY[dtype])
        got = launch(q, k, dst=np.zeros((2, 2, 32, 32), np.float32), n=50)
        exact = q.astype(np.float64) @ k.astype(np.float64).T
        exact[:, 50:] = 0
        for warp in got:
            np.testing.assert_allclose(np.concatenate([as_matrix(tile) for tile in warp]), exact, rtol=1e-5, atol=1e-4)
    return check


def mma_pv(dtype: str, whole: bool) -> Callable[[], Any]:
    """P (32 x 64) in registers times V (64 x 128), rounded and stored through shared memory: n rows and 120 columns of it."""
    _, pv = mma.make_products(dtype)
    store_tile, to_half = cp_async.make_store(whole), f.make_pack(dtype)

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            t, lane = int32(cuda.threadIdx.x), int32(cuda.threadIdx.x & 31)
            copy_v(a, base, t, 2)
            cp_async.wait_all()
            cuda.syncthreads()
            if t < 32:
                p = f.join(to_half(load(a.other, lane)), to_half(load(uint64(a.other + uint64(4 * 16 * C)), lane)))
                acc = pv(f.zeros(128), p, int32(base + mma.lane_offset(lane)), 2, PANEL)
                out = int32(base + 2 * PANEL)
                mma.store_rows(to_half(f.part(acc, 0, 2)), out, lane, 4096)
                mma.store_rows(to_half(f.part(acc, 1, 2)), int32(out + 16 * 128), lane, 4096)
                cuda.syncwarp()
                row, chunk = int32(lane >> 3), int32(lane & 7)
                store_tile(int32(out + row * 128 + ((chunk ^ row) << 4)), uint64(a.dst + uint64(256 * row + 16 * chunk)),
                           int64(256), int64(2), int32(a.n - row), int32(120 - 8 * chunk), 32, 2, 4096)
        return kernel
    return make


def check_mma_pv(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        v, p = normal(64, 128).astype(NUMPY[dtype]), normal(32, 64, seed=1)
        got = launch(v, p, dst=np.full((32, 128), 77, NUMPY[dtype]), n=27).astype(np.float64)
        exact = p.astype(NUMPY[dtype]).astype(np.float64) @ v.astype(np.float64)
        np.testing.assert_allclose(got[:27, :120], exact[:27, :120], rtol=2.0**-7, atol=1e-4)
        assert (got[27:] == 77).all() and (got[:, 120:] == 77).all()
    return check


for _dtype in HALVES:
    for _whole in (True, False):
        _how = "whole" if _whole else "elements"
        add("mma.make_products mma.lane_offset mma.lane_offset_b mma.load_rows cp_async.make_load cp_async.wait_all",
            f"mma.sync.aligned.m16n8k16.row.col.f32.{KIND[_dtype]}.{KIND[_dtype]}.f32; ldmatrix.sync.aligned.m8n8.x4.shared.b16; "
            "cp.async.wait_all; " + ("cp.async.cg.shared.global.L2::128B" if _whole else "@p ld.global.b16"),
            mma_qk(_dtype, _whole), check_mma_qk(_dtype), name=f"mma.qk_{_dtype}_{_how}", threads=64, shared=SHARED)
        add("mma.make_products fragments.part fragments.join mma.store_rows cp_async.make_store",
            f"mma.sync.aligned.m16n8k16.row.col.f32.{KIND[_dtype]}.{KIND[_dtype]}.f32; ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16; "
            "st.shared.b32; " + ("@p st.global.v4.b32" if _whole else "@p st.global.b16"),
            mma_pv(_dtype, _whole), check_mma_pv(_dtype), name=f"mma.pv_{_dtype}_{_how}", threads=64, shared=SHARED)


# ---------------------------------------------------------------- operands and sums that warps share
def copies() -> Any:
    """128 numbers, each four at the place of the opposite four."""
    def kernel(a):
        i, base = int32(cuda.threadIdx.x), begin(1)
        cp_async.copy16(int32(base + 16 * (31 - i)), uint64(a.src + uint64(16 * i)))
        cp_async.wait_all()
        cuda.syncthreads()
        for k in range(4):
            memory.store_b32(uint64(a.dst + uint64(16 * i + 4 * k)), memory.load_shared_b32(int32(base + 16 * i + 4 * k)))
    return kernel


add("cp_async.copy16", "cp.async.cg.shared.global [", copies,
    lambda launch: same(launch(normal(32, 4), dst=np.zeros((32, 4), np.float32)), normal(32, 4)[::-1]), shared=SHARED)


def tiles_products(dtype: str, trans: bool) -> Callable[[], Any]:
    """P (32 x 64) V (64 x 128), or P^T (64 x 32) V[:32], P in tiles: each of two warps has 16 of every 32, or 64, columns."""
    product = mma.make_tiles_product(dtype, trans)
    to_half = f.make_pack(dtype)
    TILES, DEPTH, STEP, P = (4, 32, 4, 4 * PANEL) if trans else (2, 64, 2, 4 * PANEL)
    LINE = 1024

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            t, lane, warp = int32(cuda.threadIdx.x), int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
            copy_v(a, base, t, 2)
            half = to_half(load(uint64(a.other + uint64(4 * 16 * C * warp)), lane))
            mma.store_tiles(half, int32(base + P + 2 * LINE * warp + 4 * lane), LINE)
            cp_async.wait_all()
            cuda.syncthreads()
            place = mma.tiles_lane_trans(lane, int32(LINE)) if trans else mma.tiles_lane(lane, int32(LINE))
            columns = int32((base + mma.lane_offset(lane)) ^ (warp << 5))
            acc = product(f.zeros(64), int32(base + P + place), columns, TILES, DEPTH, LINE, STEP, PANEL)
            save_at(a.dst, 64 * warp, acc, 64)
        return kernel
    return make


def check_tiles_products(dtype: str, trans: bool) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        v, p = normal(64, 128).astype(NUMPY[dtype]), normal(32, 64, seed=1)
        tiles, step = (4, 4) if trans else (2, 2)
        got = launch(v, p, dst=np.zeros((2, tiles, 64 // tiles, 32), np.float32))
        a, b = p.astype(NUMPY[dtype]).astype(np.float64), v.astype(np.float64)
        exact = (a.T @ b[:32] if trans else a @ b).reshape(16 * tiles, 8 // step, step, 16)
        for warp in (0, 1):
            mine = np.concatenate([as_matrix(tile) for tile in got[warp]])
            np.testing.assert_allclose(mine, exact[:, :, warp].reshape(mine.shape), rtol=1e-5, atol=1e-4)
    return check


def columns_out(dtype: str) -> Callable[[], Any]:
    """Two fragments of 16 x 64, 16 columns of each in turn, through shared memory."""
    store_tile, to_half = cp_async.make_store(True), f.make_pack(dtype)

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            lane, warp = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
            half = to_half(load(uint64(a.src + uint64(4 * 16 * C * warp)), lane))
            mma.store_columns(half, base, lane, warp, 2, PANEL)
            cuda.syncthreads()
            if warp == 0:
                row, chunk = int32(lane >> 3), int32(lane & 7)
                store_tile(int32(base + row * 128 + ((chunk ^ row) << 4)), uint64(a.dst + uint64(256 * row + 16 * chunk)), int64(256),
                           int64(2), int32(16 - row), int32(128 - 8 * chunk), 16, 2, PANEL)
        return kernel
    return make


def check_columns_out(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x = normal(2, 16, 4, 16)
        got = launch(x, dst=np.zeros((16, 4, 2, 16), NUMPY[dtype]))
        same(got, x.transpose(1, 2, 0, 3).astype(NUMPY[dtype]))
    return check


def sums(vector: int) -> Callable[[], Any]:
    """Two tiles of 16 x 64 added to columns 16-31 of every 64 of two bands; then the band at src as a fragment."""
    LANE = 16 if vector else 4

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            acc = f.join(load(a.other, lane), load(uint64(a.other + uint64(4 * 16 * C)), lane))
            mma.add_sums(acc, uint64(a.dst + uint64(1024 + LANE * lane)), 2, 4, 256, vector)
            piece = mma.load_sums(uint64(a.src + uint64(LANE * lane)), C, vector)
            save(uint64(a.dst + uint64(65536)), lane, piece)
        return kernel
    return make


def check_sums(vector: int) -> Callable[[Any], None]:
    def pieces_of(x: Array) -> Array:
        """(16, columns) -> the floats of their groups of 8 columns."""
        registers = x[ROW[:x.shape[1] // 2], COL[:x.shape[1] // 2]].reshape(-1, 4, 32)
        return (registers.swapaxes(1, 2) if vector else registers).reshape(-1, 128)

    def check(launch: Any) -> None:
        before, x, piece = normal(17 * 1024), normal(2, 16, 64, seed=1), normal(16, 64, seed=2)
        got = launch(pieces_of(piece), x, dst=before)
        expected = before.copy()
        bands = expected[:16384].reshape(4, 4, 8, 128)
        for tile in (0, 1):
            bands[tile, :, 2:4] += pieces_of(x[tile]).reshape(4, 2, 128)
        same(got[:16384], expected[:16384])
        same(as_matrix(got[16384:].reshape(32, 32)), piece)
    return check


for _dtype in HALVES:
    for _trans in (False, True):
        _lane = "mma.tiles_lane_trans" if _trans else "mma.tiles_lane"
        add(f"mma.make_tiles_product mma.store_tiles {_lane}", "mma.sync.aligned.m16n8k16.row.col; st.shared.b32; "
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" + ("" if _trans else "; ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
            tiles_products(_dtype, _trans), check_tiles_products(_dtype, _trans),
            name=f"mma.tiles_{_dtype}" + "_trans" * _trans, threads=64, shared=SHARED)
    add("mma.store_columns", "st.shared.b32", columns_out(_dtype), check_columns_out(_dtype), name=f"mma.store_columns_{_dtype}",
        threads=64, shared=SHARED)
add("mma.add_sums mma.load_sums", "red.relaxed.gpu.global.add.f32; ld.global.f32", sums(0), check_sums(0), name="mma.sums")
add("mma.add_sums mma.load_sums memory.emit_add_vector", "red.relaxed.gpu.global.add.v4.f32; ld.global.v4.f32", sums(1), check_sums(1),
    name="matrix.sums_vector")        # a name that runs on sm_90 only
assert COUNT == C // 2 and save is not None
