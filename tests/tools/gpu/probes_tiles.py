"""Probes of gpu/test_intrinsics.py: tiles. Barriers in shared memory, TMA,
wgmma, mma.sync, cp.async and matrix stores."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, int64, uint8, uint64

from fastattn.gpu.dsl.inline import inline
from fastattn.gpu.ptx import cp_async, direct, matrix, mbarrier, memory, mma, scalar, sync, tma, wgmma
from fastattn.gpu.tile import fragments as f
from tests.tools.gpu.probes import COL, COUNT, HALVES, ROW, Array, C, add, as_matrix, load, normal, same, save
from tests.tools.problems import NUMPY

PANEL = 64 * 128            # bytes of 64 rows of 64 columns
BAR = 8 * PANEL             # where a probe's barrier lies, behind its tiles
SHARED = BAR + 16 + 1024
KIND = {"float16": "f16", "bfloat16": "bf16"}


@inline
def begin(arrivals):
    """The base of shared memory, 1024-byte aligned, with a barrier at BAR."""
    base = int32((memory.shared_address(cuda.shared.array(0, uint8)) + 1023) & -1024)
    if cuda.threadIdx.x == 0:
        mbarrier.init(int32(base + BAR), int32(arrivals))
        mbarrier.fence_init()
    cuda.syncthreads()
    return base


# ---------------------------------------------------------------- mbarrier and TMA
def meeting() -> Any:
    def kernel(a):
        i = int32(cuda.threadIdx.x)
        base = begin(128)
        for turn in range(3):
            memory.store_shared_b32(int32(base + 4 * i), int32(1000 * turn + i))
            mbarrier.arrive(int32(base + BAR))
            mbarrier.wait(int32(base + BAR), int32(turn & 1))
            memory.store_b32(uint64(a.dst + uint64(4 * (128 * turn + i))), memory.load_shared_b32(int32(base + 4 * (127 - i))))
            cuda.syncthreads()
    return kernel


add("mbarrier.init mbarrier.fence_init mbarrier.arrive mbarrier.wait",
    "mbarrier.init.shared::cta.b64; fence.mbarrier_init; mbarrier.arrive.shared::cta; mbarrier.try_wait.parity", meeting,
    lambda launch: same(launch(dst=np.zeros((3, 128), np.int32)), 1000 * np.arange(3)[:, None] + np.arange(128)[::-1]),
    threads=128, shared=SHARED)


def box(HINTED: bool = False) -> Any:
    """64 x 64 elements from row 10 of head 1, batch 1, as they lie in shared memory."""
    def kernel(a):
        i = int32(cuda.threadIdx.x)
        base = begin(1)
        if i == 0:
            tma.prefetch_map(a.map_a)
            if HINTED:
                tma.prefetch_hinted(a.map_a, int32(0), int32(10), int32(1), int32(1), tma.evict_first())
            else:
                tma.prefetch(a.map_a, int32(0), int32(10), int32(1), int32(1))
            mbarrier.arrive_expect(int32(base + BAR), int32(PANEL))
            if HINTED:
                tma.load_hinted(base, a.map_a, int32(base + BAR), int32(0), int32(10), int32(1), int32(1), tma.evict_last())
            else:
                tma.load(base, a.map_a, int32(base + BAR), int32(0), int32(10), int32(1), int32(1))
        mbarrier.wait(int32(base + BAR), int32(0))
        for k in range(PANEL // 512):
            memory.store_b32(uint64(a.dst + uint64(4 * (128 * k + i))), memory.load_shared_b32(int32(base + 4 * (128 * k + i))))
    return kernel


def check_box(launch: Any) -> None:
    x = normal(2, 50, 3, 40).astype(np.float16)
    tile = np.zeros((64, 64), np.float16)
    tile[:40, :40] = x[1, 10:, 1]
    chunks = launch(x, dst=np.zeros((64, 8, 8), np.float16), maps=[("src", 64)])
    rows, places = np.indices((64, 8))
    same(chunks[rows, places ^ (rows % 8)], tile.reshape(64, 8, 8))


add("tma.load tma.prefetch_map tma.prefetch mbarrier.arrive_expect",
    "cp.async.bulk.tensor.4d.shared::cluster.global; prefetch.tensormap; cp.async.bulk.prefetch.tensor.4d; mbarrier.arrive.expect_tx",
    box, check_box, threads=128, shared=SHARED)
add("tma.load_hinted tma.prefetch_hinted tma.evict_first tma.evict_last",
    "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint; cp.async.bulk.prefetch.tensor.4d; "
    "createpolicy.fractional.L2::evict_first; createpolicy.fractional.L2::evict_last",
    lambda: box(True), check_box, threads=128, shared=SHARED)


def box_back(HINTED: bool = False) -> Any:
    """Loaded whole, stored from row 5 on: only what is inside the tensor is written."""
    def kernel(a):
        base = begin(1)
        if cuda.threadIdx.x == 0:
            mbarrier.arrive_expect(int32(base + BAR), int32(PANEL))
            tma.load(base, a.map_a, int32(base + BAR), int32(0), int32(0), int32(0), int32(0))
            mbarrier.wait(int32(base + BAR), int32(0))
            if HINTED:
                tma.store_hinted(a.map_b, base, int32(0), int32(5), int32(1), int32(0), tma.evict_first())
            else:
                tma.store(a.map_b, base, int32(0), int32(5), int32(1), int32(0))
            tma.commit()
            tma.wait_read()
            tma.wait_all()
    return kernel


def check_box_back(launch: Any) -> None:
    x, expected = normal(1, 64, 1, 64).astype(np.float16), np.full((1, 50, 2, 40), 7, np.float16)
    got = launch(x, dst=expected.copy(), maps=[("src", 64), ("dst", 64)])
    expected[0, 5:, 1] = x[0, :45, 0, :40]
    same(got, expected)


add("tma.store tma.commit tma.wait_read tma.wait_all",
    "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group; cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; "
    "cp.async.bulk.wait_group 0", box_back, check_box_back, shared=SHARED)
add("tma.store_hinted", "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint", lambda: box_back(True), check_box_back,
    shared=SHARED)


def bulk() -> Any:
    def kernel(a):
        base = begin(1)
        if cuda.threadIdx.x == 0:
            mbarrier.arrive_expect(int32(base + BAR), int32(1024))
            tma.load_rows(base, a.map_a, int32(base + BAR), int32(300), int32(1))
            mbarrier.wait(int32(base + BAR), int32(0))
            for _ in range(2):
                tma.reduce_add_f32_if(int32(1), a.dst, base, int32(1024))
            tma.reduce_add_f32_if(int32(0), a.dst, base, int32(1024))
            tma.commit()
            tma.wait_all()
    return kernel


def check_bulk(launch: Any) -> None:
    x = np.arange(2 * 512, dtype=np.float32).reshape(2, 512)
    expected = np.concatenate([1 + 2 * x[1, 300:], np.ones(44)])      # 0 is added where the line has ended
    same(launch(x, dst=np.ones(256, np.float32), maps=[("src", 256)]), expected)


add("tma.load_rows tma.reduce_add_f32_if",
    "cp.async.bulk.tensor.2d.shared::cluster.global; cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32", bulk, check_bulk,
    shared=SHARED)


# ---------------------------------------------------------------- wgmma
@inline
def two_panels(map_, base, to):
    for p in range(2):
        tma.load(int32(base + to + p * PANEL), map_, int32(base + BAR), int32(64 * p), int32(0), int32(0), int32(0))


@inline
def save_at(pointer, at, acc, count):
    for k in range(count):
        memory.store_f32(uint64(pointer + uint64(4 * (32 * (at + k) + (cuda.threadIdx.x & 31)))), acc[k])


def wgmma_qk(dtype: str) -> Callable[[], Any]:
    """A B^T and B A^T of two 64 x 128 tiles, both in flight at once."""
    qk, _ = wgmma.make_products(dtype)

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            if cuda.threadIdx.x == 0:
                mbarrier.arrive_expect(int32(base + BAR), int32(4 * PANEL))
                two_panels(a.map_a, base, 0)
                two_panels(a.map_b, base, 2 * PANEL)
            mbarrier.wait(int32(base + BAR), int32(0))
            x, y = wgmma.k_major(base), wgmma.k_major(int32(base + 2 * PANEL))
            wgmma.fence()
            first = qk(f.zeros(32), x, y, 128, 64, 64)
            wgmma.commit()
            wgmma.fence()
            second = qk(f.zeros(32), y, x, 128, 64, 64)
            wgmma.commit()
            first = wgmma.wait_all_but_one(first)
            warp = int32(cuda.threadIdx.x >> 5)
            save_at(a.dst, warp * 32, first, 32)
            second = wgmma.wait_all(second)
            save_at(a.dst, 128 + warp * 32, second, 32)
        return kernel
    return make


def check_wgmma_qk(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x, y = (normal(1, 64, 1, 128, seed=s).astype(NUMPY[dtype]) for s in (0, 1))
        got = launch(x, y, dst=np.zeros((2, 4, 32, 32), np.float32), maps=[("src", 64), ("other", 64)])
        exact = x[0, :, 0].astype(np.float64) @ y[0, :, 0].astype(np.float64).T
        for result, expected in zip(got, (exact, exact.T), strict=True):
            np.testing.assert_allclose(np.concatenate([as_matrix(warp) for warp in result]), expected, rtol=1e-5, atol=1e-4)
    return check


def wgmma_pv(dtype: str) -> Callable[[], Any]:
    """1 + P V for P (64 x 64) in registers and V (64 x 128)."""
    _, pv = wgmma.make_products(dtype)
    to_half = f.make_pack(dtype)

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            warp, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
            if cuda.threadIdx.x == 0:
                mbarrier.arrive_expect(int32(base + BAR), int32(2 * PANEL))
                two_panels(a.map_a, base, 0)
            p = to_half(load(uint64(a.other + uint64(4 * 16 * C * warp)), lane))
            mbarrier.wait(int32(base + BAR), int32(0))
            wgmma.fence()
            acc = pv(f.zeros(64), p, wgmma.mn_major(base, PANEL))
            wgmma.commit()
            acc = wgmma.wait_all(acc)
            wgmma.fence()
            acc = pv(acc, p, wgmma.mn_major(base, PANEL))
            wgmma.commit()
            save_at(a.dst, warp * 64, wgmma.wait_all(acc), 64)
        return kernel
    return make


def check_pv(dtype: str, rows: int, times: int, tiles: tuple[int, ...]) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        v, p = normal(1, 64, 1, 128).astype(NUMPY[dtype]), normal(rows, 64, seed=1)
        got = launch(v, p, dst=np.zeros((*tiles, 64, 32), np.float32), maps=[("src", 64)])
        exact = times * p.astype(NUMPY[dtype]).astype(np.float64) @ v[0, :, 0].astype(np.float64)
        registers = np.arange(64)[:, None]
        lane = np.arange(32)[None, :]
        whole = np.empty((rows, 128))
        for n, tile in enumerate(got.reshape(-1, 64, 32)):
            whole[16 * n + lane // 4 + 8 * (registers // 2 % 2), 2 * (lane % 4) + 8 * (registers // 4) + registers % 2] = tile
        np.testing.assert_allclose(whole, exact, rtol=1e-5, atol=1e-4)
    return check


for _dtype in HALVES:
    add("wgmma.make_products wgmma.k_major wgmma.fence wgmma.commit wgmma.wait wgmma.wait_all wgmma.wait_all_but_one",
        f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{KIND[_dtype]}.{KIND[_dtype]}; wgmma.fence.sync.aligned; "
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; wgmma.wait_group.sync.aligned 0",
        wgmma_qk(_dtype), check_wgmma_qk(_dtype),
        name=f"wgmma.qk_{_dtype}", threads=128, shared=SHARED)
    add("wgmma.make_products wgmma.mn_major", f"wgmma.mma_async.sync.aligned.m64n128k16.f32.{KIND[_dtype]}.{KIND[_dtype]}",
        wgmma_pv(_dtype), check_pv(_dtype, 64, 2, (4,)), name=f"wgmma.pv_{_dtype}", threads=128, shared=SHARED)


def panels_out(dtype: str) -> Callable[[], Any]:
    """64 rows twice side by side, through shared memory and TMA."""
    to_half = f.make_pack(dtype)

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            warp, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
            half = to_half(load(uint64(a.src + uint64(4 * 16 * C * warp)), lane))
            row = int32(16 * warp + (lane & 15))
            swizzle, both = int32(((lane & 7) << 4) ^ ((lane >> 4) << 4)), f.join(half, half)
            matrix.store_panels(both, int32(base + row * 128), swizzle, PANEL, 1, 0)
            matrix.store_panels(both, int32(base + PANEL + row * 128), swizzle, PANEL, 1, 1)
            sync.fence_async()
            sync.barrier(int32(1), int32(128))
            if cuda.threadIdx.x == 0:
                for p in range(2):
                    tma.store(a.map_a, int32(base + p * PANEL), int32(64 * p), int32(0), int32(0), int32(0))
                tma.commit()
                tma.wait_all()
        return kernel
    return make


def check_panels_out(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x = normal(64, C)
        got = launch(x, dst=np.zeros((1, 64, 1, 128), NUMPY[dtype]), maps=[("dst", 64)])
        same(got[0, :, 0], np.hstack([x, x]).astype(NUMPY[dtype]))
    return check


for _dtype in HALVES:
    add("matrix.store_panels", "stmatrix.sync.aligned.m8n8.x4.shared.b16", panels_out(_dtype), check_panels_out(_dtype),
        name=f"matrix.store_panels_{_dtype}", threads=128, shared=SHARED)


# ---------------------------------------------------------------- mma.sync and cp.async
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
    load_tile, store_tile, to_half = cp_async.make_load(True), cp_async.make_store(whole), f.make_pack(dtype)

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            t, lane = int32(cuda.threadIdx.x), int32(cuda.threadIdx.x & 31)
            row, chunk = int32(t >> 3), int32(t & 7)
            to = int32(base + row * 128 + ((chunk ^ (row & 7)) << 4))
            load_tile(to, uint64(a.src + uint64(256 * row + 16 * chunk)), int64(256), int64(2), int32(64 - row), int32(128 - 8 * chunk),
                      64, 8, 2, PANEL)
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
    load_tile, to_half = cp_async.make_load(True), f.make_pack(dtype)
    TILES, DEPTH, STEP, P = (4, 32, 4, 4 * PANEL) if trans else (2, 64, 2, 4 * PANEL)
    LINE = 1024

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            t, lane, warp = int32(cuda.threadIdx.x), int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
            row, chunk = int32(t >> 3), int32(t & 7)
            load_tile(int32(base + row * 128 + ((chunk ^ (row & 7)) << 4)), uint64(a.src + uint64(256 * row + 16 * chunk)), int64(256),
                      int64(2), int32(64 - row), int32(128 - 8 * chunk), 64, 8, 2, PANEL)
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


# ---------------------------------------------------------------- mma.sync straight from global memory
def direct_products(dtype: str) -> Callable[[], Any]:
    """S = Q K^T and O = S V of 16 queries and 16 keys, of which there are n; columns of O as float32 rows."""
    qk, pv = direct.make_products(dtype)
    to_half, read = f.make_pack(dtype), scalar.load_shared("float32", 1)
    PITCH = 4 * 128 + 16

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            g, c, last = int32(lane >> 2), int32(lane & 3), int32(a.n - 1)
            base = int32((memory.shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
            chunk = uint64(16 * c)
            q0 = direct.load_rows(uint64(a.src + chunk), int64(256), g, int32(15), 1, 4)
            q1 = direct.load_rows(uint64(a.src + chunk), int64(256), int32(g + 8), int32(15), 1, 4)
            k = direct.load_rows(uint64(a.other + chunk), int64(256), g, last, 2, 4)
            v = direct.load_columns(uint64(a.other + uint64(16 * 256 + 16 * g)), int64(256), int32(2 * c), last, 1, 2)
            acc_s = qk(f.zeros(8), q0, q1, k)
            save_at(a.dst, 0, acc_s, 8)
            direct.store_output(pv(f.zeros(64), to_half(acc_s), v), int32(base + g * PITCH + 64 * c), PITCH)
            cuda.syncwarp()
            for row in range(16):
                for part in range(4):
                    column = int32(32 * part + lane)
                    at = uint64(a.dst + uint64(4 * (256 + 128 * row + column)))
                    memory.store_f32(at, read(int32(base + row * PITCH + 4 * column))[0])
        return kernel
    return make


def check_direct_products(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        q, k, v = (normal(16, 128, seed=s).astype(NUMPY[dtype]) for s in (0, 1, 2))
        for n in (16, 13, 1):
            there = np.minimum(np.arange(16), n - 1)        # the last row where there is none
            got = launch(q, np.stack([k, v]), dst=np.zeros(256 + 16 * 128, np.float32), n=n)
            s = as_matrix(got[:256].reshape(8, 32))
            np.testing.assert_allclose(s, q.astype(np.float64) @ k[there].astype(np.float64).T, rtol=1e-5, atol=1e-4)
            p = s.astype(NUMPY[dtype]).astype(np.float64)
            np.testing.assert_allclose(got[256:].reshape(16, 128), p @ v[there].astype(np.float64), rtol=1e-5, atol=1e-3)
    return check


for dtype in HALVES:
    add("direct.load_rows direct.load_columns direct.make_products direct.store_output mma.multiply",
        f"ld.global.nc.L1::no_allocate.v4.b32; prmt.b32; mma.sync.aligned.m16n8k16.row.col.f32.{KIND[dtype]}", direct_products(dtype),
        check_direct_products(dtype), name=f"direct.make_products {dtype}", shared=16 * (4 * 128 + 16) + 16)
