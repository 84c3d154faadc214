"""Probes of gpu/test_intrinsics.py: tiles of Hopper. Barriers in shared memory, TMA, wgmma and matrix stores."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, uint8, uint64

from fastattn.gpu.dsl.inline import inline
from fastattn.gpu.ptx import matrix, mbarrier, memory, sync, tma, wgmma
from fastattn.gpu.runtime.tensormap import WholeRows
from fastattn.gpu.tile import fragments as f
from tests.tools.gpu.probes import HALVES, C, add, as_matrix, load, normal, same
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


def two_back() -> Any:
    """A box is stored to the first head; another, loaded to the same shared memory, to the second. The group committed last is empty."""
    def kernel(a):
        base = begin(1)
        if cuda.threadIdx.x == 0:
            for head in range(2):
                mbarrier.arrive_expect(int32(base + BAR), int32(PANEL))
                tma.load(base, a.map_a, int32(base + BAR), int32(0), int32(0), int32(head), int32(0))
                mbarrier.wait(int32(base + BAR), int32(head))
                tma.store(a.map_b, base, int32(0), int32(0), int32(head), int32(0))
                tma.commit()
                tma.commit()
                tma.wait_read_but_one()         # the store has read shared memory
            tma.wait_all()
    return kernel


def check_two_back(launch: Any) -> None:
    x = normal(1, 64, 2, 64).astype(np.float16)
    same(launch(x, dst=np.zeros_like(x), maps=[("src", 64), ("dst", 64)]), x)


add("tma.wait_read_but_one", "cp.async.bulk.wait_group.read 1", two_back, check_two_back, shared=SHARED)


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
def load_panels(map_, base, to, count):
    """`count` panels of 64 columns by TMA, the first at base + to."""
    for p in range(count):
        tma.load(int32(base + to + p * PANEL), map_, int32(base + BAR), int32(64 * p), int32(0), int32(0), int32(0))


@inline
def begin_pair(a):
    """The base of shared memory, where two tiles of 64 rows and 128 columns have come."""
    base = begin(1)
    if cuda.threadIdx.x == 0:
        mbarrier.arrive_expect(int32(base + BAR), int32(4 * PANEL))
        load_panels(a.map_a, base, 0, 2)
        load_panels(a.map_b, base, 2 * PANEL, 2)
    mbarrier.wait(int32(base + BAR), int32(0))
    return base


@inline
def save_at(pointer, at, acc, count):
    for k in range(count):
        memory.store_f32(uint64(pointer + uint64(4 * (32 * (at + k) + (cuda.threadIdx.x & 31)))), acc[k])


def wgmma_qk(dtype: str) -> Callable[[], Any]:
    """A B^T and B A^T of two 64 x 128 tiles, both in flight at once."""
    qk, _ = wgmma.make_products(dtype)

    def make() -> Any:
        def kernel(a):
            base = begin_pair(a)
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


def wgmma_more_qk(dtype: str) -> Callable[[], Any]:
    """The same, half of the columns after the other."""
    (qk, _), more_qk = wgmma.make_products(dtype), wgmma.make_more_qk(dtype)

    @inline
    def both(x, y):
        wgmma.fence()
        acc = qk(f.zeros(32), wgmma.k_major(x), wgmma.k_major(y), 64, 64, 64)
        acc = more_qk(acc, wgmma.k_major(int32(x + PANEL)), wgmma.k_major(int32(y + PANEL)), 64, 64, 64)
        wgmma.commit()
        return wgmma.wait_all(acc)

    def make() -> Any:
        def kernel(a):
            base = begin_pair(a)
            warp = int32(cuda.threadIdx.x >> 5)
            save_at(a.dst, warp * 32, both(base, int32(base + 2 * PANEL)), 32)
            save_at(a.dst, 128 + warp * 32, both(int32(base + 2 * PANEL), base), 32)
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
                load_panels(a.map_a, base, 0, 2)
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
    add("wgmma.make_more_qk", f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{KIND[_dtype]}.{KIND[_dtype]}", wgmma_more_qk(_dtype),
        check_wgmma_qk(_dtype), name=f"wgmma.more_qk_{_dtype}", threads=128, shared=SHARED)
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


WIDE = 72       # columns of rows that TMA stores whole


def rows_out(dtype: str) -> Callable[[], Any]:
    """The same, 80 columns of which a row has WIDE, in rows that lie in shared memory as in memory."""
    to_half = f.make_pack(dtype)

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            warp, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
            half = to_half(load(uint64(a.src + uint64(4 * 16 * C * warp)), lane))
            row = int32(base + (16 * warp + (lane & 15)) * 2 * (WIDE + 8) + (lane >> 4) * 16)
            matrix.store_matrix_rows(half, row)
            matrix.store_matrix_rows(f.part(half, 0, 4), int32(row + 2 * C))
            sync.fence_async()
            sync.barrier(int32(1), int32(128))
            if cuda.threadIdx.x == 0:
                tma.store(a.map_a, base, int32(0), int32(0), int32(0), int32(0))
                tma.commit()
                tma.wait_all()
        return kernel
    return make


def check_rows_out(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x = normal(64, C)
        got = launch(x, dst=np.zeros((1, 64, 1, WIDE), NUMPY[dtype]), maps=[("dst", WholeRows(64, WIDE + 8))])
        same(got[0, :, 0], np.hstack([x, x[:, :WIDE - C]]).astype(NUMPY[dtype]))
    return check


for _dtype in HALVES:
    add("matrix.store_matrix_rows", "stmatrix.sync.aligned.m8n8.x4.shared.b16", rows_out(_dtype), check_rows_out(_dtype),
        name=f"matrix.store_matrix_rows_{_dtype}", threads=128, shared=SHARED)
    add("matrix.store_panels", "stmatrix.sync.aligned.m8n8.x4.shared.b16", panels_out(_dtype), check_panels_out(_dtype),
        name=f"matrix.store_panels_{_dtype}", threads=128, shared=SHARED)
