"""Probes of gpu/test_intrinsics.py: queries as columns of MMAs (ptx/direct_columns.py). They also run from their PTX, without a GPU."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, int32, int64, uint8, uint64

from fastattn.gpu.ptx import direct, direct_columns, memory, scalar
from fastattn.gpu.ptx.mma import KIND
from fastattn.gpu.tile import fragments as f
from tests.tools.gpu.probes import HALVES, Array, add, normal, same
from tests.tools.gpu.probes_tiles import save_at
from tests.tools.problems import NUMPY

DIM = 112                   # columns, of 128 that chunks would have
PITCH, ROW = 4 * 128 + 16, 2 * DIM
LANE = np.arange(32)


def products(dtype: str, KEYS: int) -> Callable[[], Any]:
    """S = Q K^T and O = S V of 8 queries and KEYS keys, of which there are n; S with Q in registers and in shared memory."""
    COUNT, OUT = KEYS // 4, 2 * 8 * KEYS
    (q_rows, _), (load_rows, load_columns) = direct.make_loads(True), direct_columns.make_loads(True)
    (qk, pv), (keep_q, kept_qk) = direct_columns.make_products(dtype), direct_columns.make_kept(dtype)
    first_key, to_half, read = direct_columns.make_first_key(KEYS), f.make_pack(dtype), scalar.load_shared("float32", 1)

    def make() -> Any:
        def kernel(a):
            lane = int32(cuda.threadIdx.x)
            g, c, last = int32(lane >> 2), int32(lane & 3), int32(a.n - 1)
            base = int32((memory.shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
            chunk, left, left_v = uint64(16 * c), int32(DIM // 8 - c), int32(DIM // 8 - g)
            q = q_rows(uint64(a.src + chunk), int64(ROW), g, int32(7), 8, 4, left, 3, int32(0))
            k = load_rows(uint64(a.other + chunk), int64(ROW), first_key(g), last, KEYS, 4, left, 3, int32(0))
            v = load_columns(uint64(a.other + uint64(KEYS * ROW + 16 * g)), int64(ROW), first_key(int32(2 * c)), last, KEYS, 2, left_v, 1,
                             int32(0))
            keep_q(int32(base + 16 * lane), q)
            acc_s = kept_qk(f.zeros(COUNT), int32(base + 16 * lane), k)
            save_at(a.dst, 0, acc_s, COUNT)
            save_at(a.dst, COUNT, qk(f.zeros(COUNT), q, k), COUNT)
            cuda.syncwarp()
            acc_o = pv(f.zeros(32), to_half(direct_columns.by_key(acc_s)), v)
            direct_columns.store_output(acc_o, int32(base + 2 * c * PITCH + 32 * g), PITCH)
            cuda.syncwarp()
            for row in range(8):
                for part in range(4):
                    column = int32(32 * part + lane)
                    at = uint64(a.dst + uint64(4 * (OUT + 128 * row + column)))
                    memory.store_f32(at, read(int32(base + row * PITCH + 4 * column))[0])
        return kernel
    return make


def check_products(dtype: str, KEYS: int) -> Callable[[Any], None]:
    count = KEYS // 4
    first, register = 2 * (LANE // 4 & 3) + KEYS // 2 * (LANE // 16), np.arange(count)[:, None]
    row, key = 2 * (LANE % 4) + register // 2 % 2, first + 8 * (register // 4) + register % 2

    def scores(registers: Array) -> Array:
        s = np.full((8, KEYS), np.nan, np.float32)
        s[row, key] = registers.reshape(count, 32)
        return s

    def check(launch: Any) -> None:
        q, k, v = (normal(n, DIM, seed=s).astype(NUMPY[dtype]) for s, n in enumerate((8, KEYS, KEYS)))
        for n in (KEYS, KEYS - 3, 1):
            there = np.minimum(np.arange(KEYS), n - 1)      # the last row where there is none
            got = launch(q, np.stack([k, v]), dst=np.zeros(2 * 8 * KEYS + 8 * 128, np.float32), n=n)
            s = scores(got[:8 * KEYS])
            same(s, scores(got[8 * KEYS:16 * KEYS]))
            np.testing.assert_allclose(s, q.astype(np.float64) @ k[there].astype(np.float64).T, rtol=1e-5, atol=1e-4)
            p, o = s.astype(NUMPY[dtype]).astype(np.float64), got[16 * KEYS:].reshape(8, 128)
            np.testing.assert_allclose(o[:, :DIM], p @ v[there].astype(np.float64), rtol=1e-5, atol=1e-3)
            assert (o[:, DIM:] == 0).all()
    return check


for KEYS in (16, 32, 64):
    for dtype in HALVES:
        add("direct.make_load direct_columns.make_first_key direct_columns.make_loads direct_columns.by_key direct_columns.make_products "
            "direct_columns.make_kept direct_columns.store_output",
            "ld.global.nc.L1::no_allocate.v4.b32; prmt.b32; movmatrix; st.shared.v4.b32; "
            f"mma.sync.aligned.m16n8k16.row.col.f32.{KIND[dtype]}",
            products(dtype, KEYS), check_products(dtype, KEYS), name=f"direct_columns.make_products {dtype} {KEYS}", shared=8 * PITCH + 16)


def columns() -> Any:
    def kernel(a):
        at = uint64(4 * cuda.threadIdx.x)
        x = memory.load_f32(uint64(a.src + at))
        memory.store_f32(uint64(a.dst + at), f.column_max(x))
        memory.store_f32(uint64(a.dst + at + uint64(128)), f.column_sum(x))
    return kernel


def check_columns(launch: Any) -> None:
    x = normal(32).reshape(8, 4)
    got = launch(x, dst=np.zeros((2, 8, 4), np.float32))
    same(got[0], np.tile(x.max(0), (8, 1)))
    np.testing.assert_allclose(got[1], np.tile(x.sum(0), (8, 1)), rtol=1e-5, atol=1e-6)


add("fragments.column_max fragments.column_sum", "shfl.sync.bfly.b32", columns, check_columns)
