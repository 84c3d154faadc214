"""Probes of gpu/test_intrinsics.py: what only the backward uses. Columns' numbers in shared memory, pieces of dQ, turned dropout bits, its
products."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, float32, int32, int64, uint8, uint32, uint64

from fastattn.arrays.view import EIGHT_BIT, ITEMSIZE, numpy_dtype
from fastattn.gpu.ptx import cluster, mbarrier, memory, mma, scalar, sync, tma, wgmma
from fastattn.gpu.spec import FAR_LSE
from fastattn.gpu.tile import fragments as f
from fastattn.gpu.tile import gradients as g
from fastattn.philox import keep_mask
from tests.tools.gpu.probes import COUNT, HALVES, Array, C, add, as_matrix, load, normal, same, save
from tests.tools.gpu.probes_fragments import DROPOUT, THRESHOLD, expect, minus_inf, on_fragment
from tests.tools.gpu.probes_tiles import BAR, KIND, PANEL, SHARED, begin, load_panels, save_at
from tests.tools.problems import NUMPY

add("fragments.keep_from", "selp",
    on_fragment(lambda acc, lane, row, col, n: f.keep_from(acc, int32(row + n - col), int32(row + 8 + n - col))),
    expect(lambda x, r, c: np.where(c >= r + 20, x, minus_inf), n=20))


def columns() -> Any:
    """exp2(x / 2 - y[column]) * (x * 3 - y[column]), y the first C numbers of `other`."""
    def kernel(a):
        base, lane = begin(1), int32(cuda.threadIdx.x)
        for i in range(lane, C, 32):
            memory.store_shared_b32(int32(base + 4 * i), memory.load_b32(uint64(a.other + uint64(4 * i))))
        sync.warp()
        acc, mine = load(a.src, lane), int32(base + 8 * (lane & 3))
        columns = g.load_columns(mine, COUNT)
        save(a.dst, lane, g.grad_scores(g.exp2_columns(acc, float32(0.5), columns), acc, float32(3), columns))
    return kernel


def check_columns(launch: Any) -> None:
    x, y = normal(16, C), normal(C, seed=1)
    got = as_matrix(launch(x, y, dst=np.zeros((COUNT, 32), np.float32)))
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    np.testing.assert_allclose(got, np.exp2(x64 / 2 - y64) * (x64 * 3 - y64), rtol=2e-6, atol=2e-6)


add("memory.emit_load_shared_pair sync.warp", "ld.shared.v2.f32; bar.warp.sync", columns, check_columns, shared=SHARED,
    name="gradients.columns")


def far_columns() -> Any:
    """near_columns of lse 8 x the first C numbers of `other`, every fourth column far, and near_rows of the same numbers by row."""
    any_far = g.make_any_far(32)

    def kernel(a):
        base, lane = begin(1), int32(cuda.threadIdx.x)
        for i in range(lane, C, 32):
            memory.store_shared_b32(int32(base + 4 * i), memory.load_b32(uint64(a.other + uint64(4 * (C + i)))))
        sync.warp()
        acc, mine = load(a.src, lane), int32(base + 8 * (lane & 3))
        if any_far(base) == a.n:
            acc = g.near_columns(acc, float32(3), float32(0.5), mine, uint64(a.other + uint64(8 * (lane & 3))))
        row = f.lane_row(lane)
        far = memory.load_f32(uint64(a.other + uint64(4 * (C + row)))), memory.load_f32(uint64(a.other + uint64(4 * (C + row + 8))))
        lse = memory.load_f32(uint64(a.other + uint64(4 * row))), memory.load_f32(uint64(a.other + uint64(4 * (row + 8))))
        save(a.dst, lane, g.near_rows(acc, float32(3), float32(0.5), far, lse))
    return kernel


def check_far(launch: Any) -> None:
    x, lse, far = normal(16, C), normal(C, seed=1), np.arange(C) % 4 == 1
    lse[9] = np.nan
    marked = np.where(far, np.float32(FAR_LSE), np.float32(1))
    got = as_matrix(launch(x, np.r_[lse, marked].astype(np.float32), dst=np.zeros((COUNT, 32), np.float32), n=1))

    def near(x: Array, lse: Array, far: Array) -> Array:
        return np.where(far, np.minimum(x * np.float32(3) - lse, 0) * np.float32(0.5), x)
    same(got, near(near(x, lse, far), lse[:16, None], far[:16, None]))


add("memory.emit_load_pair arith.emit_min_nan arith.emit_product", "ld.global.v2.f32; min.NaN.f32; mul.rn.f32; vote.sync.any.pred",
    far_columns, check_far, shared=SHARED, name="gradients.far_columns")


def piece() -> Any:
    """A fragment through a piece in shared memory and its copy in `other`."""
    def kernel(a):
        base, lane = begin(1), int32(cuda.threadIdx.x)
        g.store_piece(load(a.src, lane), int32(base + 16 * lane))
        sync.warp()
        for i in range(lane, 1024, 32):
            memory.store_b32(uint64(a.other + uint64(4 * i)), memory.load_shared_b32(int32(base + 4 * i)))
        cuda.syncthreads()
        save(a.dst, lane, mma.load_sums(uint64(a.other + uint64(16 * lane)), C, 1))
    return kernel


def check_piece(launch: Any) -> None:
    x = normal(16, C)
    same(as_matrix(launch(x, np.zeros(1024, np.float32), dst=np.zeros((COUNT, 32), np.float32))), x)


add("memory.emit_store_shared_vector memory.emit_load_vector", "st.shared.v4.f32; ld.global.v4.f32", piece, check_piece, shared=SHARED,
    name="gradients.piece")


def sent() -> Any:
    """Twice a fragment: through a piece in the shared memory of the cluster's only block."""
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        acc, base = load(a.src, lane), int32((memory.shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
        mine = int32(base + 16 * lane)
        cluster.arrive()
        cluster.wait()
        g.send_piece(acc, cluster.address_in(mine, cluster.rank()))
        cluster.arrive()
        cluster.wait()
        save(a.dst, lane, g.add_piece(acc, mine))
    return kernel


def check_sent(launch: Any) -> None:
    x = normal(16, C)
    same(as_matrix(launch(src=x, other=np.zeros(1, np.float32), dst=np.zeros((COUNT, 32), np.float32), n=0)), x + x)


add("memory.emit_store_cluster_vector cluster.rank", "st.shared::cluster.v4.f32; %cluster_ctarank", sent, check_sent, shared=SHARED,
    name="direct cluster.piece")


def scattered() -> Any:
    """Adds x to a matrix of `other`, 16 x 70, rows < 11 and columns < n, and shows the matrix."""
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        row, col = f.lane_row(lane), f.thread_col(lane)
        at = uint64(a.dst + uint64(4 * (70 * row + col)))
        g.add_elements(load(a.src, lane), at, uint64(at + uint64(8 * 280)), int64(4), int32(a.n - col),
                       int32(a.n - col) if row + 8 < 11 else int32(0))
    return kernel


def check_scattered(launch: Any) -> None:
    x = normal(16, C)
    expected = np.full((16, 70), 2, np.float32)
    expected[:11, :33] += x[:11, :33]
    same(launch(x, dst=np.full((16, 70), 2, np.float32), n=33), expected)


add("memory.emit_add_if", "@p red.relaxed.gpu.global.add.f32", scattered, check_scattered, name="gradients.add_elements")


_draw = g.make_draw(COUNT)
add("matrix.emit_transpose", "movmatrix.sync.aligned.m8n8.trans.b16",
    on_fragment(lambda acc, lane, row, col, n: g.mark_dropped(acc, _draw(
        int32(3), int32(2), lane, n, uint32(5), uint32(0x89AB_CDEF), uint32(0x0123_4567)), uint32(THRESHOLD << 16))),
    expect(lambda x, r, c: np.where(keep_mask(DROPOUT, range(4), 7, 48 + C, 48)[3, 4][48:, 32:].T, x, -x), n=3 * 7 + 4),
    name="gradients.dropout")


def marked() -> Any:
    """|x| * ((0 where x < 0, else x * 3) - y[column]), y the first C numbers of `other`."""
    def kernel(a):
        base, lane = begin(1), int32(cuda.threadIdx.x)
        for i in range(lane, C, 32):
            memory.store_shared_b32(int32(base + 4 * i), memory.load_b32(uint64(a.other + uint64(4 * i))))
        sync.warp()
        acc = load(a.src, lane)
        save(a.dst, lane, g.grad_marked(acc, acc, float32(3), g.load_columns(int32(base + 8 * (lane & 3)), COUNT)))
    return kernel


def check_marked(launch: Any) -> None:
    x, y = normal(16, C), normal(C, seed=1)
    got = as_matrix(launch(x, y, dst=np.zeros((COUNT, 32), np.float32)))
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    np.testing.assert_allclose(got, np.abs(x64) * (np.maximum(x64, 0) * 3 - y64), rtol=2e-6, atol=2e-6)


add("arith.emit_abs", "abs.f32; max.f32", marked, check_marked, shared=SHARED, name="gradients.marked")


def positive(dtype: str) -> Callable[[], Any]:
    """x rounded to 16 bits, 0 where it is negative."""
    pack, unpack = f.make_pack(dtype, True), f.make_unpack(dtype, True)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            save(a.dst, lane, unpack(pack(load(a.src, lane))))
        return kernel
    return make


for _dtype in HALVES:
    add("fragments.make_pack arith.emit_pack_half", f"cvt.rn.relu.{KIND[_dtype]}x2.f32", positive(_dtype),
        expect(lambda x, r, c, dtype=_dtype: np.maximum(x, 0).astype(NUMPY[dtype]).astype(np.float32)), name=f"fragments.positive_{_dtype}")


def chunks(dtype: str) -> Callable[[], Any]:
    """Lane i: 16 bytes of `src`, where i < n. Then zeros, by way of `other`."""
    load_chunk, number = scalar.load_chunk(dtype), scalar.store("float32", "float32")

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            x = load_chunk(uint64(a.src + uint64(16 * lane)), int32(lane < a.n))
            for e in range(len(x)):
                number(uint64(a.dst + uint64(4 * (len(x) * lane + e))), float32(x[e]))
            memory.store_zero16(uint64(a.other + uint64(16 * lane)))
            for e in range(4):
                zero = memory.load_f32(uint64(a.other + uint64(16 * lane + 4 * e)))
                number(uint64(a.dst + uint64(4 * (len(x) * 32 + 4 * lane + e))), zero)
        return kernel
    return make


def check_chunks(dtype: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        count = 16 // ITEMSIZE[dtype]
        x = normal(32, count).astype(numpy_dtype(dtype))
        got = launch(x, normal(128), dst=np.ones(32 * count + 128, np.float32), n=20)
        same(got[:32 * count].reshape(32, count), np.where(np.arange(32)[:, None] < 20, x.astype(np.float32), 0).astype(np.float32))
        same(got[32 * count:], np.zeros(128, np.float32))
    return check


for _dtype in ("float32", *HALVES, *EIGHT_BIT):
    add("scalar.load_chunk memory.store_zero16", "@p ld.global.v4.b32; st.global.v4.b32", chunks(_dtype), check_chunks(_dtype),
        name=f"scalar.load_chunk_{_dtype}")


# ---------------------------------------------------------------- products
def dsk(dtype: str) -> Callable[[], Any]:
    """A^T B of two tiles of 128 x 64."""
    product, _ = wgmma.make_grad_products(dtype)

    def make() -> Any:
        def kernel(a):
            base, warp = begin(1), int32(cuda.threadIdx.x >> 5)
            if cuda.threadIdx.x == 0:
                mbarrier.arrive_expect(int32(base + BAR), int32(4 * PANEL))
                tma.load(base, a.map_a, int32(base + BAR), int32(0), int32(0), int32(0), int32(0))
                tma.load(int32(base + 2 * PANEL), a.map_b, int32(base + BAR), int32(0), int32(0), int32(0), int32(0))
            mbarrier.wait(int32(base + BAR), int32(0))
            wgmma.fence()
            acc = product(f.zeros(32), wgmma.mn_major(base, PANEL), wgmma.mn_major(int32(base + 2 * PANEL), PANEL), 128)
            wgmma.commit()
            save_at(a.dst, warp * 32, wgmma.wait_all(acc), 32)
        return kernel
    return make


def dsq(dtype: str) -> Callable[[], Any]:
    """A B three times, of 64 x 64 and 64 x 128."""
    _, product = wgmma.make_grad_products(dtype)

    def make() -> Any:
        def kernel(a):
            base, warp = begin(1), int32(cuda.threadIdx.x >> 5)
            if cuda.threadIdx.x == 0:
                mbarrier.arrive_expect(int32(base + BAR), int32(3 * PANEL))
                tma.load(base, a.map_a, int32(base + BAR), int32(0), int32(0), int32(0), int32(0))
                load_panels(a.map_b, base, PANEL, 2)
            mbarrier.wait(int32(base + BAR), int32(0))
            acc = f.zeros(64)
            for _ in range(3):
                wgmma.fence()
                acc = product(acc, wgmma.k_major(base), wgmma.mn_major(int32(base + PANEL), PANEL), 64, 64)
                wgmma.commit()
            acc = wgmma.wait_all_but_two(acc)
            save_at(a.dst, warp * 64, wgmma.wait_all(acc), 64)
        return kernel
    return make


def check_product(dtype: str, shapes: tuple[tuple[int, ...], ...], rows: int,
                  exact: Callable[[Array, Array], Array]) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x, y = (normal(*shape, seed=s).astype(NUMPY[dtype]) for s, shape in enumerate(shapes))
        wide = shapes[1][3]
        got = launch(x, y, dst=np.zeros((4, wide // 2, 32), np.float32), maps=[("src", rows), ("other", rows)])
        registers, lane, whole = np.arange(wide // 2)[:, None], np.arange(32)[None, :], np.empty((64, wide))
        for n, tile in enumerate(got):
            whole[16 * n + lane // 4 + 8 * (registers // 2 % 2), 2 * (lane % 4) + 8 * (registers // 4) + registers % 2] = tile
        np.testing.assert_allclose(whole, exact(x[0, :, 0].astype(np.float64), y[0, :, 0].astype(np.float64)), rtol=1e-5, atol=1e-4)
    return check


for _dtype in HALVES:
    add("wgmma.make_grad_products", f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{KIND[_dtype]}.{KIND[_dtype]}", dsk(_dtype),
        check_product(_dtype, ((1, 128, 1, 64), (1, 128, 1, 64)), 128, lambda x, y: x.T @ y), name=f"wgmma.dsk_{_dtype}", threads=128,
        shared=SHARED)
    add("wgmma.make_grad_products wgmma.wait_all_but_two",
        f"wgmma.mma_async.sync.aligned.m64n128k16.f32.{KIND[_dtype]}.{KIND[_dtype]}; wgmma.wait_group.sync.aligned 2", dsq(_dtype),
        check_product(_dtype, ((1, 64, 1, 64), (1, 64, 1, 128)), 64, lambda x, y: 3 * x @ y), name=f"wgmma.dsq_{_dtype}", threads=128,
        shared=SHARED)
