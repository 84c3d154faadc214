"""Probes of gpu/test_intrinsics.py: 16-bit Q with K and V of 8 bits straight from global memory. They also run from their PTX."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, int64, uint8, uint64

from fastattn.arrays.view import numpy_dtype
from fastattn.gpu.ptx import direct, direct_8bit, memory, scalar
from fastattn.gpu.ptx.mma import KIND
from fastattn.gpu.tile import fragments as f
from tests.tools.gpu.probes import HALVES, Array, add, as_matrix, normal
from tests.tools.gpu.probes_tiles import save_at
from tests.tools.problems import NUMPY

DIM = 112                   # columns, of 128 that chunks would have
PITCH = 4 * 128 + 16
OUT = 2 * 16 * 16           # numbers before O: S twice


def products(dtype: str, source: str, native: bool, KEYS: int) -> Callable[[], Any]:
    """S = Q K^T and O = S V of 16 queries and KEYS keys, of which there are n; S with Q in registers and in shared memory."""
    COUNT = KEYS // 2
    load_rows, load_columns = direct.make_loads(True)
    load_pairs, (keep_q, _) = direct.make_load_pairs(True), direct.make_kept(dtype)
    qk, kept_qk, pv = direct_8bit.make_products(dtype, source, native)
    to_half, read, store_output = f.make_pack(dtype), scalar.load_shared("float32", 1), direct.make_store_output(1)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            g, c, last = int32(lane >> 2), int32(lane & 3), int32(a.n - 1)
            base = int32((memory.shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
            row, left = uint64(a.src + uint64(2 * DIM * g + 32 * c)), int32(DIM // 8 - 2 * c)
            second = uint64(row + uint64(2 * DIM * 8))
            zero = int32(0)
            q0 = direct_8bit.weave(load_pairs(row, int64(0), zero, zero, 8, 2, left, 0, zero),
                                   load_pairs(uint64(row + uint64(16)), int64(0), zero, zero, 8, 2, int32(left - 1), 0, zero))
            q1 = direct_8bit.weave(load_pairs(second, int64(0), zero, zero, 8, 2, left, 0, zero),
                                   load_pairs(uint64(second + uint64(16)), int64(0), zero, zero, 8, 2, int32(left - 1), 0, zero))
            k = load_rows(uint64(a.other + uint64(16 * c)), int64(DIM), g, last, KEYS, 2, int32(DIM // 16 - c), 1, int32(0))
            v = load_columns(uint64(a.other + uint64(KEYS * DIM + 16 * g)), int64(DIM), int32(2 * c), last, KEYS, 1, int32(DIM // 16 - g),
                             0, int32(0))
            keep_q(int32(base + 16 * lane), q0, q1)
            acc_s = kept_qk(f.zeros(COUNT), int32(base + 16 * lane), k)
            save_at(a.dst, 0, acc_s, COUNT)
            save_at(a.dst, COUNT, qk(f.zeros(COUNT), q0, q1, k), COUNT)
            cuda.syncwarp()
            store_output(pv(f.zeros(64), to_half(acc_s), v), int32(base + g * PITCH + 128 * c), PITCH)
            cuda.syncwarp()
            for n in range(16):
                for part in range(4):
                    column = int32(32 * part + lane)
                    at = uint64(a.dst + uint64(4 * (OUT + 128 * n + column)))
                    memory.store_f32(at, read(int32(base + n * PITCH + 4 * column))[0])
        return kernel
    return make


def check_products(dtype: str, source: str, KEYS: int) -> Callable[[Any], None]:
    def scores(registers: Array) -> Array:
        wide = np.zeros((8, 32), np.float32)
        wide[:KEYS // 2] = registers.reshape(-1, 32)
        return as_matrix(wide)[:, :KEYS]

    def check(launch: Any) -> None:
        q = normal(16, DIM).astype(NUMPY[dtype])
        codes = np.random.default_rng(3).integers(0, 256, (2, KEYS, DIM)).astype(np.uint8)
        eight = codes.view(numpy_dtype(source))
        small = np.where(np.abs(eight.astype(np.float32)) <= 4, eight, 0).astype(eight.dtype)      # finite ones, subnormal ones too
        for n in (KEYS, KEYS - 3, 1):
            there = np.minimum(np.arange(KEYS), n - 1)
            got = launch(q, small, dst=np.zeros(OUT + 16 * 128, np.float32), n=n)
            s = scores(got[:16 * KEYS])
            np.testing.assert_array_equal(s, scores(got[16 * KEYS:32 * KEYS]))
            k, v = (x[there].astype(np.float64) for x in small)
            np.testing.assert_allclose(s, q.astype(np.float64) @ k.T, rtol=1e-5, atol=1e-4)
            p, o = s.astype(NUMPY[dtype]).astype(np.float64), got[OUT:].reshape(16, 128)
            np.testing.assert_allclose(o[:, :DIM], p @ v, rtol=1e-5, atol=2e-3)
            assert (o[:, DIM:] == 0).all()
    return check


def codes(dtype: str, source: str, native: bool) -> Callable[[], Any]:
    """Q is 1 in one column: S of a key is the number there. 8 keys of 16 columns, all codes of one half at a time."""
    load_rows, _ = direct.make_loads(True)
    load_pairs, (qk, _, _) = direct.make_load_pairs(True), direct_8bit.make_products(dtype, source, native)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            g, c = int32(lane >> 2), int32(lane & 3)
            row, left = uint64(a.src + uint64(32 * g + 32 * c)), int32(2 - 2 * c)
            zero = int32(0)
            q0 = direct_8bit.weave(load_pairs(row, int64(0), zero, zero, 8, 1, left, 0, zero),
                                   load_pairs(uint64(row + uint64(16)), int64(0), zero, zero, 8, 1, int32(left - 1), 0, zero))
            row = uint64(row + uint64(256))
            q1 = direct_8bit.weave(load_pairs(row, int64(0), zero, zero, 8, 1, left, 0, zero),
                                   load_pairs(uint64(row + uint64(16)), int64(0), zero, zero, 8, 1, int32(left - 1), 0, zero))
            for n in range(2):
                k = load_rows(uint64(a.other + uint64(128 * n + 16 * c)), int64(16), g, int32(7), 8, 1, int32(1 - c), 0, zero)
                save_at(a.dst, int32(4 * n), qk(f.zeros(4), q0, q1, k), 4)
        return kernel
    return make


def check_codes(dtype: str, source: str) -> Callable[[Any], None]:
    def check(launch: Any) -> None:
        """Every code but infinities and NaN times 1; a row with NaN is NaN."""
        all_codes = np.arange(256, dtype=np.uint8)
        finite = np.isfinite(all_codes.view(numpy_dtype(source)).astype(np.float32))
        given = np.where(finite, all_codes, 0).astype(np.uint8)
        one, eight = np.eye(16).astype(NUMPY[dtype]), given.view(numpy_dtype(source))
        got = launch(one, eight, dst=np.zeros(256, np.float32), n=0).reshape(2, 4, 32)
        for n in range(2):
            want = given.view(numpy_dtype(source)).astype(np.float32).reshape(2, 8, 16)[n].T
            np.testing.assert_array_equal(as_matrix(got[n]), want)
        bad = np.zeros(256, np.uint8)
        bad[[3, 200]] = 0x7F, 0xFF
        ones = np.ones((16, 16)).astype(NUMPY[dtype])
        got = launch(ones, bad.view(numpy_dtype(source)), dst=np.zeros(256, np.float32), n=0).reshape(2, 4, 32)
        assert [int(np.isnan(as_matrix(x)).all(axis=0).sum()) for x in got] == [1, 1]
    return check


for source in ("float8_e4m3fn", "float8_e5m2"):
    for dtype in HALVES:
        for native in (True, False)[:1 + (source == "float8_e4m3fn")]:
            name = f"{source} {dtype}" + " native" * native
            instruction = "cvt.rn.f16x2.e4m3x2" if native and source == "float8_e4m3fn" else "prmt.b32"
            for KEYS in (8, 16):
                add("direct_8bit.make_products direct_8bit.weave widen.make_widen widen.emit_permute direct.make_load_pairs",
                    f"{instruction}; mma.sync.aligned.m16n8k{KEYS}.row.col.f32.{KIND[dtype]}", products(dtype, source, native, KEYS),
                    check_products(dtype, source, KEYS), name=f"direct_8bit {name} {KEYS}", shared=16 * PITCH + 16)
            add("direct_8bit.make_products", instruction, codes(dtype, source, native), check_codes(dtype, source),
                name=f"direct_8bit codes {name}")


def narrow() -> Any:
    """Each lane has four words of a row of its own; factors are those of the whole row."""
    def kernel(a):
        lane = int32(cuda.threadIdx.x)
        words = load_words(uint64(a.src + uint64(16 * lane)), int64(0), int32(0), int32(0), 8, 1, int32(1), 1, int32(0))
        factor, unit = direct_8bit.factors(f.quad_max(direct_8bit.largest(words)))
        half = direct_8bit.narrowed(words, factor)
        for k in range(4):
            memory.store_b32(uint64(a.dst + uint64(20 * lane + 4 * k)), half[k])
        memory.store_f32(uint64(a.dst + uint64(20 * lane + 16)), unit)
    return kernel


load_words, _ = direct.make_loads(True)


def check_narrow(launch: Any) -> None:
    """Eight rows of 32 numbers of all sizes, some not finite."""
    draw = np.random.default_rng(1)
    q = (draw.standard_normal((8, 32)) * 2.0**draw.integers(-20, 1, (8, 32)) * 2.0**np.array([0, 100, -100, 126, -126, 3, -3, 50])[:, None])
    q = q.astype(NUMPY["bfloat16"])
    q[5, 3], q[6, 7] = np.inf, np.nan
    q[7] = 0
    q[7, 0] = 2.0**-133
    got = launch(q, np.zeros(4, np.int32), dst=np.zeros((32, 5), np.float32), n=0).reshape(8, 4, 5)
    half = np.ascontiguousarray(got[:, :, :4]).view(np.float16).reshape(8, 32).astype(np.float64)
    unit = got[:, :, 4].astype(np.float64)
    assert (unit == unit[:, :1]).all() and (np.log2(unit) % 1 == 0).all()
    assert np.array_equal(half * unit[:, :1], q.astype(np.float64), equal_nan=True)
    assert (np.abs(half[:5]).max(axis=1) >= 2.0**14).sum() == 4         # but for the smallest row, whose unit has no smaller one


add("direct_8bit.largest direct_8bit.factors direct_8bit.narrowed", "cvt.rn.f16x2.f32", lambda: narrow(), check_narrow,
    name="direct_8bit.narrowed")
