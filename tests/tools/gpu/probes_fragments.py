"""Probes of gpu/test_intrinsics.py: fragments of 16 x C, one warp."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, float32, int32, int64, uint32, uint64

from fastattn.gpu.ptx import arith, memory
from fastattn.gpu.tile import bits as b
from fastattn.gpu.tile import fragments as f
from fastattn.gpu.tile import stores
from fastattn.gpu.tile.dropout import philox
from fastattn.philox import keep_mask
from fastattn.problem import Dropout
from tests.tools.gpu.probes import BITS, COUNT, HALVES, Array, C, add, as_matrix, inlined, load, normal, same, save, to_float
from tests.tools.problems import NUMPY


def first_elements() -> Any:
    def kernel(a):
        thread = int32(cuda.threadIdx.x)
        lane = int32(thread & 31)
        at = uint64(a.dst + uint64(12 * thread))
        memory.store_b32(at, f.thread_row(thread, lane))
        memory.store_b32(uint64(at + uint64(4)), f.lane_row(lane))
        memory.store_b32(uint64(at + uint64(8)), f.thread_col(lane))
    return kernel


def check_first_elements(launch: Any) -> None:
    thread = np.arange(128)
    rows = thread % 32 // 4
    same(launch(dst=np.zeros((128, 3), np.int32)), np.stack([thread // 32 * 16 + rows, rows, thread % 4 * 2], 1).astype(np.int32))


add("fragments.thread_row fragments.lane_row fragments.thread_col", "", first_elements, check_first_elements, threads=128)


def on_fragment(change: Any) -> Callable[[], Any]:
    """dst = change(acc, lane, row, col, n) of the fragment in src."""
    change = inlined(change)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            save(a.dst, lane, change(load(a.src, lane), lane, f.lane_row(lane), f.thread_col(lane), a.n))
        return kernel
    return make


def expect(function: Callable[[Array, Array, Array], Array], rtol: float = 0.0, n: int = 0) -> Callable[[Any], None]:
    """The result is function(matrix, rows, columns)."""
    def check(launch: Any) -> None:
        x, (rows, cols) = normal(16, C), np.indices((16, C))
        got = as_matrix(launch(x, dst=np.zeros((COUNT, 32), np.float32), n=n))
        np.testing.assert_allclose(got, function(x, rows, cols), rtol=rtol)
    return check


minus_inf = np.float32(-np.inf)
add("fragments.make_gather fragments.make_unpack", "ld.global.b32", on_fragment(lambda acc, lane, row, col, n: acc),
    expect(lambda x, r, c: x))
add("fragments.zeros", "st.global", on_fragment(lambda acc, lane, row, col, n: f.zeros(COUNT)), expect(lambda x, r, c: 0 * x))
add("fragments.own_zeros", "mov; st.global", on_fragment(lambda acc, lane, row, col, n: f.own_zeros(COUNT)), expect(lambda x, r, c: 0 * x))
add("fragments.zeros_packed", "st.global", on_fragment(lambda acc, lane, row, col, n: f.add(
    acc, to_float(f.zeros_packed(COUNT)))), expect(lambda x, r, c: x))
add("fragments.scale_rows", "mul", on_fragment(lambda acc, lane, row, col, n: f.scale_rows(acc, float32(row), float32(row + 8))),
    expect(lambda x, r, c: x * r.astype(np.float32)))
add("fragments.scale_seen_rows", "selp", on_fragment(lambda acc, lane, row, col, n: f.scale_seen_rows(
    f.scale_rows(acc, float32(np.inf) if row == 0 else float32(1), float32(1)), float32(row), float32(row + 8))),
    expect(lambda x, r, c: x * r.astype(np.float32)))
add("fragments.exp2_minus arith.emit_fma", "fma.rn.f32; ex2.approx.ftz.f32",
    on_fragment(lambda acc, lane, row, col, n: f.exp2_minus(acc, float32(1.5), float32(1.25), float32(row), float32(row + 8))),
    expect(lambda x, r, c: np.exp2(np.where(r < 8, 1.5, 1.25) * x - r), rtol=2e-6))
add("fragments.keep_below", "selp",
    on_fragment(lambda acc, lane, row, col, n: f.keep_below(acc, int32(row + n - col), int32(row + 8 + n - col))),
    expect(lambda x, r, c: np.where(c < r + 20, x, minus_inf), n=20))
add("fragments.keep_interval", "selp", on_fragment(
    lambda acc, lane, row, col, n: f.keep_interval(acc, int32(row - col), int32(row + n - col), int32(row + 8 - col),
                                                   int32(row + 8 + n - col))),
    expect(lambda x, r, c: np.where((r <= c) & (c < r + 20), x, minus_inf), n=20))
add("fragments.add", "add",
    on_fragment(lambda acc, lane, row, col, n: f.add(acc, f.scale_rows(acc, float32(2), float32(4)))),
    expect(lambda x, r, c: x * np.where(r < 8, 3, 5), rtol=3e-7))
add("fragments.scale_add", "fma.rn.f32",
    on_fragment(lambda acc, lane, row, col, n: f.scale_add(acc, float32(8), f.scale_rows(acc, float32(2), float32(4)))),
    expect(lambda x, r, c: x * np.where(r < 8, 10, 12), rtol=3e-7))


def _position(x, row, col, factor):
    return x + factor * float32(int32(row * 100 + col))


_apply = f.elementwise(_position)
add("fragments.elementwise", "fma", on_fragment(lambda acc, lane, row, col, n: _apply(acc, row, col, (float32(0.5),))),
    expect(lambda x, r, c: x + 0.5 * (100 * r + c), rtol=1e-6))
_draw = f.make_draw(philox, COUNT, EARLY=True)
DROPOUT = Dropout(0.3, 0x0123_4567_89AB_CDEF, 5)
THRESHOLD = DROPOUT.threshold
add("fragments.drop fragments.make_draw sync.emit_opaque", "mul; mov.b32", on_fragment(lambda acc, lane, row, col, n: f.drop(
    acc, _draw(int32(2), int32(3), lane, n, uint32(5), uint32(0x89AB_CDEF), uint32(0x0123_4567)), uint32(THRESHOLD << 16))),
    expect(lambda x, r, c: np.where(keep_mask(DROPOUT, range(4), 7, 48, 48 + C)[3, 4][32:, 48:], x, 0), n=3 * 7 + 4))


def rows_of(function: Any) -> Callable[[], Any]:
    """dst[2 lane + r] = function(acc)[r]: something of each of the thread's two rows."""
    function = inlined(function)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            pair = function(load(a.src, lane))
            for r in range(2):
                memory.store_f32(uint64(a.dst + uint64(4 * (2 * lane + r))), pair[r])
        return kernel
    return make


def expect_rows(function: Callable[[Array], Array], rtol: float = 0.0) -> Callable[[Any], None]:
    """function((..., columns of a thread or all)) along the last axis."""
    def check(launch: Any) -> None:
        x = normal(16, C)
        got = launch(x, dst=np.zeros((32, 2), np.float32))
        own = x.reshape(2, 8, C // 8, 4, 2).transpose(1, 3, 0, 2, 4).reshape(8, 4, 2, C // 4)
        np.testing.assert_allclose(got.reshape(8, 4, 2), function(own), rtol=rtol, atol=1e-6 if rtol else 0)
    return check


add("fragments.row_max", "max.f32", rows_of(lambda acc: f.row_max(acc, float32(0.9), float32(2.5))),
    expect_rows(lambda own: np.maximum(own.max(-1), np.array([0.9, 2.5], np.float32))))
add("fragments.row_sum", "add", rows_of(f.row_sum), expect_rows(lambda own: own.sum(-1), rtol=1e-5))


def quads() -> Any:
    def kernel(a):
        at = uint64(4 * cuda.threadIdx.x)
        x = memory.load_f32(uint64(a.src + at))
        memory.store_f32(uint64(a.dst + at), f.quad_max(x))
        memory.store_f32(uint64(a.dst + at + uint64(128)), f.quad_sum(x))
    return kernel


def check_quads(launch: Any) -> None:
    x = normal(32).reshape(8, 4)
    got = launch(x, dst=np.zeros((2, 32), np.float32))
    same(got[0], x.max(1).repeat(4))
    np.testing.assert_allclose(got[1], x.sum(1).repeat(4), rtol=1e-6, atol=1e-6)


add("fragments.quad_max fragments.quad_sum sync.emit_shuffle_xor", "shfl.sync.bfly.b32", quads, check_quads)


def gathers(dtype: str, pairs: bool, squeeze: bool = False) -> Callable[[], Any]:
    """A 10 x 37 tile of an operand of `dtype` with rows of 44: what lies outside is not read and is 0. Squeezed: packed as it arrives."""
    size = NUMPY[dtype].itemsize
    gather, plain, to_float = f.make_gather_pairs() if pairs else None, f.make_gather(dtype), f.make_unpack(dtype, pairs or squeeze)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            row, col = f.lane_row(lane), f.thread_col(lane)
            at = uint64(a.other + uint64(size * (44 * row + col)))
            limit0, limit1 = int32(a.n - col), int32(a.n - col) if row + 8 < 10 else int32(0)
            if pairs:
                tile = gather(at, uint64(at + uint64(8 * 44 * size)), limit0, limit1, COUNT)
            else:
                tile = plain(at, uint64(at + uint64(8 * 44 * size)), int64(size), limit0, limit1, COUNT)
            if squeeze:
                save(a.dst, lane, to_float(f.pairs_of(tile)))
            else:
                save(a.dst, lane, to_float(tile))
        return kernel
    return make


def bits() -> Any:
    """The same of a mask, a word of bits for each of a thread's rows: what is hidden or lies outside becomes -inf."""
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        row, col = f.lane_row(lane), f.thread_col(lane)
        at = uint64(a.other + uint64(44 * row + col))
        limit0, limit1 = int32(a.n - col), int32(a.n - col) if row + 8 < 10 else int32(0)
        words = b.line_bits(at, int64(1), limit0, BITS), b.line_bits(uint64(at + uint64(8 * 44)), int64(1), limit1, BITS)
        save(a.dst, lane, b.keep_words(load(a.src, lane), words))
    return kernel


def transposed_bits() -> Any:
    """Four lines a lane, whose bytes are next to each other: of a mask (37, 128), columns by lines."""
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        words = b.lines_bits(uint64(a.src + uint64(4 * lane)), int64(128), a.n, BITS)
        memory.store_b32(uint64(a.dst + uint64(16 * lane)), words[0])
        memory.store_b32(uint64(a.dst + uint64(16 * lane + 4)), words[1])
        memory.store_b32(uint64(a.dst + uint64(16 * lane + 8)), words[2])
        memory.store_b32(uint64(a.dst + uint64(16 * lane + 12)), words[3])
    return kernel


def check_transposed_bits(launch: Any) -> None:
    x = np.random.default_rng(3).choice([0, 0, 1, 128, 255], (37, 128)).astype(np.uint8)
    columns = [8 * (k // 2) + k % 2 for k in range(BITS)]
    same(launch(x, dst=np.zeros(128, np.int32), n=37), sum((x[c] != 0).astype(np.int32) << k for k, c in enumerate(columns) if c < 37))


add("bits.lines_bits", "@p ld.global.b32", transposed_bits, check_transposed_bits)


def check_gathers(dtype: str, n: int) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x = normal(16, C)
        operand = normal(10, 44, seed=2) > 0 if dtype == "bool" else normal(10, 44, seed=2).astype(NUMPY[dtype])
        inside = np.zeros((16, C), operand.dtype)
        inside[:10, :n] = operand[:, :n]
        got = as_matrix(launch(x, operand, dst=np.zeros((COUNT, 32), np.float32), n=n))
        same(got, np.where(inside, x, minus_inf) if dtype == "bool" else inside.astype(np.float32))
    return check


for _dtype in ("float32", *HALVES):
    add("fragments.make_gather fragments.make_unpack memory.emit_load_if memory.halves memory.half_to_float",
        {"float32": "@p ld.global.b32"}.get(_dtype, "@p ld.global.u16"), gathers(_dtype, False),
        check_gathers(_dtype, 37), name=f"fragments.gather_{_dtype}")
for _dtype in HALVES:
    add("fragments.pairs_of", "@p ld.global.u16", gathers(_dtype, False, squeeze=True), check_gathers(_dtype, 37),
        name=f"fragments.squeeze_{_dtype}")
add("bits.line_bits bits.keep_words", "@p ld.global.u8", bits, check_gathers("bool", 37))
for _dtype in HALVES:
    add("fragments.make_gather_pairs fragments.make_unpack", "@p ld.global.b32", gathers(_dtype, True), check_gathers(_dtype, 38),
        name=f"fragments.gather_pairs_{_dtype}")


def whole_gathers(dtype: str) -> Callable[[], Any]:
    """As gathers, of rows of 72, eight columns a load."""
    gather, to_float = f.make_gather_whole(), f.make_unpack_whole(dtype)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            row, col = f.lane_row(lane), f.thread_col(lane)
            at = uint64(a.other + uint64(2 * (72 * row + col)))
            limit0, limit1 = int32(a.n - col), int32(a.n - col) if row + 8 < 10 else int32(0)
            save(a.dst, lane, to_float(gather(at, uint64(at + uint64(8 * 72 * 2)), limit0, limit1, col, COUNT), col))
        return kernel
    return make


def check_whole_gathers(dtype: str, n: int) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        operand = normal(10, 72, seed=2).astype(NUMPY[dtype])
        inside = np.zeros((16, C), np.float32)
        inside[:10, :n] = operand[:, :n].astype(np.float32)
        same(as_matrix(launch(normal(16, C), operand, dst=np.zeros((COUNT, 32), np.float32), n=n)), inside)
    return check


for _dtype in HALVES:
    add("fragments.make_gather_whole fragments.make_unpack_whole fragments.transpose_quad memory.emit_load16_if",
        "@p ld.global.v4.b32; shfl.sync.bfly.b32", whole_gathers(_dtype), check_whole_gathers(_dtype, 40),
        name=f"fragments.gather_whole_{_dtype}")


def rows_out(dtype: str, pairs: bool) -> Callable[[], Any]:
    """The fragment, packed, into rows of PITCH elements: rows < 11 and, element by element, columns < n."""
    to_half = f.make_pack(dtype)
    PITCH = C + 8 if pairs else C + 2

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            row, col = f.lane_row(lane), f.thread_col(lane)
            packed = to_half(load(a.src, lane))
            at = uint64(a.dst + uint64(2 * (PITCH * row + col)))
            next_row = uint64(at + uint64(16 * PITCH))
            if pairs:
                stores.store_whole_rows(packed, at, next_row, int32(1), int32(row + 8 < 11), lane)
            else:
                stores.store_rows(packed, at, next_row, int32(1), int32(row + 8 < 11), int32(a.n - col))
        return kernel
    return make


def check_rows_out(dtype: str, pairs: bool) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        x, n = normal(16, C), 33
        pitch = C + 8 if pairs else C + 2
        expected = np.full((16, pitch), 7, NUMPY[dtype])
        width = C if pairs else n
        expected[:11, :width] = x[:11, :width].astype(NUMPY[dtype])
        same(launch(x, dst=np.full((16, pitch), 7, NUMPY[dtype]), n=n), expected)
    return check


for _dtype in HALVES:
    add("fragments.make_pack stores.store_rows memory.emit_store_halves_if arith.emit_pack_half",
        f"{arith.CONVERT[_dtype]}; @p st.global.b16", rows_out(_dtype, False),
        check_rows_out(_dtype, False), name=f"stores.store_rows_{_dtype}")
    add("fragments.make_pack stores.store_whole_rows memory.emit_store16_if",
        f"{arith.CONVERT[_dtype]}; shfl.sync.bfly.b32; @p st.global.v4.b32", rows_out(_dtype, True),
        check_rows_out(_dtype, True), name=f"stores.store_whole_rows_{_dtype}")
