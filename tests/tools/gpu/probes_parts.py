"""Probes of gpu/test_intrinsics.py: float32 as three bfloat16 parts, and products of them."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, int64, uint64

from fastattn.gpu.dsl.inline import inline
from fastattn.gpu.ptx import cp_async, mbarrier, memory, mma, mma_parts, wgmma
from fastattn.gpu.rows.split import store_parts
from fastattn.gpu.tile import fragments as f
from fastattn.gpu.tile import stores
from fastattn.gpu.tile.gradients import store_numbers
from tests.tools.gpu.probes import COUNT, Array, C, add, as_matrix, load, normal, same
from tests.tools.gpu.probes_mma import copy_v, load_whole
from tests.tools.gpu.probes_tiles import BAR, PANEL, SHARED, begin, load_panels, save_at
from tests.tools.problems import NUMPY

EXACT: dict[str, float] = {"rtol": 1e-6, "atol": 3e-6}      # of sums of 128 products of normal numbers: float32, not less
to_parts = f.make_pack("float32")


def parts(x: Array) -> list[Array]:
    """What emit_parts makes of x."""
    high = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    with np.errstate(invalid="ignore"):
        rest = np.where(np.isinf(x), 0, x - high).astype(np.float32)
        middle = rest.astype(NUMPY["bfloat16"])
        low = (rest - middle.astype(np.float32)).astype(NUMPY["bfloat16"])
    return [high.astype(NUMPY["bfloat16"]), middle, low]


def rows_of_parts(x: Array) -> Array:
    """rows/split.py's layout: the parts of a row one after the other."""
    return np.concatenate(parts(x), axis=-1)


def hard(*shape: int) -> Array:
    """Numbers of many sizes, with the largest finite ones, zeros and numbers that a single part holds."""
    x = (normal(*shape) * np.exp2(np.random.default_rng(1).integers(-80, 100, shape))).astype(np.float32)
    big = np.finfo(np.float32).max
    x.flat[:8] = big, -big, 0, -0.0, 1, 1 + 2.0**-8, 1 + 2.0**-23, 2 - 2.0**-23
    return x


# ---------------------------------------------------------------- parts
def packed() -> Any:
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        words = to_parts(load(a.src, lane))
        for k in range(3 * COUNT // 2):
            memory.store_b32(uint64(a.dst + uint64(4 * (32 * k + lane))), words[k])
    return kernel


def check_packed(launch: Any) -> None:
    x = hard(16, C)
    words = launch(x, dst=np.zeros((3, COUNT // 2, 32), np.int32))
    got = [as_matrix(np.stack([part.view(np.uint32) << 16, part.view(np.uint32) & np.uint32(0xFFFF0000)], 1).reshape(COUNT, 32)
                     .view(np.float32)) for part in words]
    for part, expected in zip(got, parts(x), strict=True):
        same(part, expected.astype(np.float32))
    same(sum(part.astype(np.float64) for part in got), x.astype(np.float64))


add("parts.emit_parts fragments.make_pack", "prmt.b32; cvt.rn.bf16x2.f32; sub.f32", packed, check_packed, name="parts.emit_parts")


def split_rows() -> Any:
    """Eight neighbours a thread; infinities are among them."""
    def kernel(a):
        at = int32(cuda.threadIdx.x)
        x = f.part(load(a.src, at), 0, 4)
        store_parts(uint64(a.dst + uint64(16 * at)), int32(512), x, int32(at < a.n))
    return kernel


def check_split_rows(launch: Any) -> None:
    x = hard(16, C)
    x[3, ::3], x[5, 1], x[9, 2] = np.inf, -np.inf, np.nan
    lanes = np.arange(32)[:, None]
    registers = np.arange(8)[None, :]
    given = x[lanes // 4 + 8 * (registers // 2 % 2), 2 * (lanes % 4) + 8 * (registers // 4) + registers % 2]
    expected = np.full((3, 32, 8), 7, NUMPY["bfloat16"])
    expected[:, :30] = np.stack(parts(np.ascontiguousarray(given)))[:, :30]
    same(launch(x, dst=np.full((3, 32, 8), 7, NUMPY["bfloat16"]), n=30).astype(np.float32), expected.astype(np.float32))


add("parts.emit_parts memory.emit_store16_if", "@p st.global.v4.b32", split_rows, check_split_rows, name="parts.store_parts")


def float_rows(step: int) -> Callable[[], Any]:
    """Rows < 11 and columns < n of 16 of every 16 * step columns."""
    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            row, col = f.lane_row(lane), f.thread_col(lane)
            at = uint64(a.dst + uint64(4 * (step * C * row + col)))
            stores.store_floats(load(a.src, lane), at, uint64(at + uint64(32 * step * C)), int64(4), int32(1), int32(row + 8 < 11),
                                int32(a.n - col), step)
        return kernel
    return make


def check_float_rows(step: int) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x, n = normal(16, C), 16 * step + 3
        expected = np.full((16, C // 16, step, 16), 7, np.float32)
        expected[:11, :, 0] = x.reshape(16, C // 16, 16)[:11]
        expected = expected.reshape(16, -1)
        expected[:, n:] = 7
        same(launch(x, dst=np.full((16, step * C), 7, np.float32), n=n), expected)
    return check


for _step in (1, 2):
    add("stores.store_floats memory.emit_store_f32_if", "@p st.global.f32", float_rows(_step), check_float_rows(_step),
        name=f"stores.store_floats_{_step}")


def number_rows() -> Any:
    """All columns of rows < 11, pairs of neighbours at once."""
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        row, col = f.lane_row(lane), f.thread_col(lane)
        at = uint64(a.dst + uint64(4 * (C * row + col)))
        store_numbers(load(a.src, lane), at, uint64(at + uint64(32 * C)), int32(1), int32(row + 8 < 11))
    return kernel


def check_number_rows(launch: Any) -> None:
    x, expected = normal(16, C), np.full((16, C), 7, np.float32)
    expected[:11] = x[:11]
    same(launch(x, dst=np.full((16, C), 7, np.float32)), expected)


add("memory.emit_store_pair_if", "@p st.global.v2.f32", number_rows, check_number_rows, name="gradients.store_numbers")


# ---------------------------------------------------------------- wgmma
@inline
def load_tiles(a, base):
    """A and B, three parts of 64 x 64 each."""
    if cuda.threadIdx.x == 0:
        mbarrier.arrive_expect(int32(base + BAR), int32(6 * PANEL))
        load_panels(a.map_a, base, 0, 3)
        load_panels(a.map_b, base, 3 * PANEL, 3)
    mbarrier.wait(int32(base + BAR), int32(0))


@inline
def load_v(a, base):
    """V, three parts of 64 x 128; the caller waits."""
    if cuda.threadIdx.x == 0:
        mbarrier.arrive_expect(int32(base + BAR), int32(6 * PANEL))
        load_panels(a.map_a, base, 0, 6)


def check_tiles(product: Callable[[Array, Array], Array]) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x, y = normal(1, 64, 1, 64), normal(1, 64, 1, 64, seed=1)
        got = launch(rows_of_parts(x), rows_of_parts(y), dst=np.zeros((4, 32, 32), np.float32), maps=[("src", 64), ("other", 64)])
        exact = product(x[0, :, 0].astype(np.float64), y[0, :, 0].astype(np.float64))
        np.testing.assert_allclose(np.concatenate([as_matrix(warp) for warp in got]), exact, **EXACT)
    return check


def wgmma_kq() -> Any:
    """A B^T of two 64 x 64 tiles."""
    def kernel(a):
        base = begin(1)
        load_tiles(a, base)
        wgmma.fence()
        acc = wgmma.kq_parts(f.zeros(32), wgmma.k_major(base), wgmma.k_major(int32(base + 3 * PANEL)), 64, 64, 64)
        wgmma.commit()
        save_at(a.dst, int32(cuda.threadIdx.x >> 5) * 32, wgmma.wait_all(acc), 32)
    return kernel


add("wgmma.kq_parts", "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", wgmma_kq, check_tiles(lambda x, y: x @ y.T), threads=128,
    shared=SHARED)


def check_pv(rows: int, times: int = 1) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        v, p = normal(1, 64, 1, 128), normal(rows, 64, seed=1)
        got = launch(rows_of_parts(v), p, dst=np.zeros((rows // 16, 64, 32), np.float32), maps=[("src", 64)])
        exact = times * p.astype(np.float64) @ v[0, :, 0].astype(np.float64)
        result = np.concatenate([np.hstack([as_matrix(tile[:32]), as_matrix(tile[32:])]) for tile in got])
        np.testing.assert_allclose(result, exact, **EXACT)
    return check


def wgmma_pv_apart() -> Any:
    """2 P V for P (64 x 64) in registers and V (64 x 128), one panel of columns after the other, the second in halves."""
    PART, RIGHT, MIDDLE, LAST = 2 * PANEL, 32, 32, 48

    def kernel(a):
        base = begin(1)
        warp, lane = int32(cuda.threadIdx.x >> 5), int32(cuda.threadIdx.x & 31)
        load_v(a, base)
        p = to_parts(load(uint64(a.other + uint64(4 * 16 * C * warp)), lane))
        mbarrier.wait(int32(base + BAR), int32(0))
        acc = f.zeros(64)
        for _ in range(2):
            wgmma.fence()
            left = wgmma.pv_parts(f.zeros(RIGHT), p, wgmma.mn_major(base, PANEL), PART)
            middle = wgmma.pv_parts(f.zeros(16), p, wgmma.mn_major(int32(base + PANEL), PANEL), PART)
            right = wgmma.pv_parts(f.zeros(16), p, wgmma.mn_major(int32(base + PANEL + 64), PANEL), PART)
            wgmma.commit()
            left, middle, right = wgmma.wait_all(left), wgmma.wait_all(middle), wgmma.wait_all(right)
            acc = f.add_columns(f.add_columns(f.add_columns(acc, left, 0), middle, MIDDLE), right, LAST)
        save_at(a.dst, warp * 64, acc, 64)
    return kernel


add("wgmma.pv_parts fragments.add_columns", "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16; "
    "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16", wgmma_pv_apart, check_pv(64, 2), name="wgmma.pv_parts", threads=128,
    shared=SHARED)


def wgmma_dsk() -> Any:
    """A^T B of two 64 x 64 tiles, each half of the columns by itself."""
    def kernel(a):
        base = begin(1)
        load_tiles(a, base)
        wgmma.fence()
        x, y = wgmma.mn_major(base, PANEL), int32(base + 3 * PANEL)
        left = wgmma.dsk_parts(f.zeros(16), x, wgmma.mn_major(y, PANEL), 64, PANEL, PANEL)
        right = wgmma.dsk_parts(f.zeros(16), x, wgmma.mn_major(int32(y + 64), PANEL), 64, PANEL, PANEL)
        wgmma.commit()
        left, right = wgmma.wait_all(left), wgmma.wait_all(right)
        save_at(a.dst, int32(cuda.threadIdx.x >> 5) * 32, left, 16)
        save_at(a.dst, int32(cuda.threadIdx.x >> 5) * 32 + 16, right, 16)
    return kernel


add("wgmma.dsk_parts", "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16", wgmma_dsk, check_tiles(lambda x, y: x.T @ y), threads=128,
    shared=SHARED)


# ---------------------------------------------------------------- mma.sync
def mma_qk() -> Any:
    """Q (32 x 128) K (32 x 128)^T by each of two warps, and K Q^T."""
    K = 6 * 4096

    def kernel(a):
        base = begin(1)
        thread, lane = int32(cuda.threadIdx.x), int32(cuda.threadIdx.x & 31)
        row, chunk = int32(thread >> 3), int32(thread & 7)
        to, source = int32(base + row * 128 + ((chunk ^ (row & 7)) << 4)), uint64(768 * row + 16 * chunk)
        load_whole(to, uint64(a.src + source), int64(768), int64(2), int32(32 - row), int32(384 - 8 * chunk), 32, 8, 6, 4096)
        load_whole(int32(to + K), uint64(a.other + source), int64(768), int64(2), int32(32 - row), int32(384 - 8 * chunk), 32, 8, 6, 4096)
        cp_async.wait_all()
        cuda.syncthreads()
        rows, columns = int32(base + mma.lane_offset(lane)), int32(base + mma.lane_offset_b(lane))
        acc = mma_parts.qk(f.zeros(32), rows, int32(columns + K), 2, 128, 4096, 4096)
        turned = mma_parts.kq(f.zeros(32), int32(rows + K), columns, 2, 128, 4096, 4096)
        if thread < 32:
            save_at(a.dst, 0, acc, 32)
            save_at(a.dst, 32, turned, 32)
    return kernel


def check_mma_qk(launch: Any) -> None:
    q, k = normal(32, 128), normal(32, 128, seed=1)
    got = launch(rows_of_parts(q), rows_of_parts(k), dst=np.zeros((4, 16, 32), np.float32))
    s, turned = (np.concatenate([as_matrix(tile) for tile in tiles]) for tiles in (got[:2], got[2:]))
    np.testing.assert_allclose(s, q.astype(np.float64) @ k.astype(np.float64).T, **EXACT)
    same(s, turned.T)                       # the same bits: a backward's S^T is the forward's S


add("mma_parts.qk mma_parts.kq", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32; ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    mma_qk, check_mma_qk, threads=64, shared=SHARED)


def mma_pv() -> Any:
    """P (32 x 64) in registers times V (64 x 128), by each of two warps."""
    def kernel(a):
        base = begin(1)
        thread, lane = int32(cuda.threadIdx.x), int32(cuda.threadIdx.x & 31)
        copy_v(a, base, thread, 6)
        cp_async.wait_all()
        cuda.syncthreads()
        p = f.join(to_parts(load(a.other, lane)), to_parts(load(uint64(a.other + uint64(4 * 16 * C)), lane)))
        acc = mma_parts.pv(f.zeros(128), p, int32(base + mma.lane_offset(lane)), 2, PANEL)
        if thread < 32:
            save_at(a.dst, 0, acc, 128)
    return kernel


add("mma_parts.pv", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32; ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", mma_pv,
    check_pv(32), threads=64, shared=SHARED)


def tiles_products(trans: bool) -> Callable[[], Any]:
    """P (32 x 64) V (64 x 128), or P^T (64 x 32) V[:32], P in tiles: each of two warps has 16 of every 32, or 64, columns."""
    TILES, DEPTH, STEP, P, P_PART, LINE = (4, 32, 4, 6 * PANEL, 4096, 1024) if trans else (2, 64, 2, 6 * PANEL, 4096, 1024)
    product = mma_parts.make_tiles_product(trans, P_PART, 2)

    def make() -> Any:
        def kernel(a):
            base = begin(1)
            t, lane, warp = int32(cuda.threadIdx.x), int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
            copy_v(a, base, t, 6)
            words = to_parts(load(uint64(a.other + uint64(4 * 16 * C * warp)), lane))
            at = int32(base + P + 2 * LINE * warp + 4 * lane)
            mma.store_tiles(f.part(words, 0, 3), at, LINE)
            mma.store_tiles(f.part(words, 1, 3), int32(at + P_PART), LINE)
            mma.store_tiles(f.part(words, 2, 3), int32(at + 2 * P_PART), LINE)
            cp_async.wait_all()
            cuda.syncthreads()
            place = mma.tiles_lane_trans(lane, int32(LINE)) if trans else mma.tiles_lane(lane, int32(LINE))
            columns = int32((base + mma.lane_offset(lane)) ^ (warp << 5))
            save_at(a.dst, 64 * warp, product(f.zeros(64), int32(base + P + place), columns, TILES, DEPTH, LINE, STEP, PANEL), 64)
        return kernel
    return make


def check_tiles_products(trans: bool) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        v, p = normal(64, 128), normal(32, 64, seed=1)
        tiles, step = (4, 4) if trans else (2, 2)
        got = launch(rows_of_parts(v), p, dst=np.zeros((2, tiles, 64 // tiles, 32), np.float32))
        a, b = p.astype(np.float64), v.astype(np.float64)
        exact = (a.T @ b[:32] if trans else a @ b).reshape(16 * tiles, 8 // step, step, 16)
        for warp in (0, 1):
            mine = np.concatenate([as_matrix(tile) for tile in got[warp]])
            np.testing.assert_allclose(mine, exact[:, :, warp].reshape(mine.shape), **EXACT)
    return check


for _trans in (False, True):
    add("mma_parts.make_tiles_product", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", tiles_products(_trans),
        check_tiles_products(_trans), name="mma_parts.tiles" + "_trans" * _trans, threads=64, shared=SHARED)
