"""The last kernel of a backward with float32 sums: round them to the gradient's dtype.

dq: sums are in bands of 16 rows (ptx/mma.py). A warp loads a band as a fragment and stores rows of dq.
dbias: sums have dbias's own shape, contiguous.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64

from ..dsl.inline import divide
from ..ptx.memory import load_f32
from ..ptx.mma import load_sums
from ..ptx.scalar import store
from ..ptx.sync import wait_for_previous
from ..spec import Spec
from ..tile.fragments import lane_row, make_pack, scale_rows, thread_col
from ..tile.gradients import COLUMN_BYTES, without_last
from ..tile.stores import store_floats, store_rows, store_whole_rows
from .config import ROUND_THREADS as THREADS
from .preprocess import make_row_at


def make_round(spec: Spec, DIM: int, VECTOR: int, WHOLE: bool, EARLY: bool) -> Any:
    """The kernel. VECTOR: a lane's four sums are contiguous (mma.add_sums). WHOLE: rows of dq have DIM or DIM - 8 columns and are 16-byte
    aligned. EARLY: it may start before the kernel of the sums has ended."""
    PACKED, LANE_BYTES, FLOATS = spec.packed, 16 if VECTOR else 4, (spec.out_dtype or spec.dtype) == "float32"
    to_half, row_at = make_pack(spec.dtype), make_row_at(spec)

    def kernel(a):
        if EARLY:
            wait_for_previous()
        lane = int32(cuda.threadIdx.x & 31)
        band = int64(cuda.blockIdx.x) * (THREADS // 32) + int64(cuda.threadIdx.x >> 5)      # over all lines
        if band < a.bands:
            line = int32(band // int64(divide(a.rows, int32(16))))
            p = int32(band * 16 - int64(line) * a.rows)
            batch = int32(0) if PACKED else divide(line, a.num_heads)
            head = line if PACKED else int32(line - batch * a.num_heads)
            at = uint64(a.accum + uint64(band * (COLUMN_BYTES * DIM)) + uint64(lane * LANE_BYTES))
            if PACKED:
                acc = load_sums(at, DIM, VECTOR)    # in flight during row_at
            first, count, _ = row_at(a, int32(p))
            if count > 0:
                if not PACKED:
                    acc = load_sums(at, DIM, VECTOR)
                acc = scale_rows(acc, a.grad_scale, a.grad_scale)
                row, col = lane_row(lane), thread_col(lane)
                address = uint64(int64(a.dq) + batch * a.dq_batch + head * a.dq_head + int64(first + row) * a.dq_row
                                 + (a.dq_dim if FLOATS else int64(2)) * col)
                next_row = uint64(address + uint64(8 * a.dq_row))
                keep0, keep1 = int32(1) if row < count else int32(0), int32(1) if row + 8 < count else int32(0)
                if FLOATS:
                    store_floats(acc, address, next_row, a.dq_dim, keep0, keep1, int32(a.head_dim - col), 1)
                elif not WHOLE:
                    store_rows(to_half(acc), address, next_row, keep0, keep1, int32(a.head_dim - col))
                elif a.head_dim == DIM:
                    store_whole_rows(to_half(acc), address, next_row, keep0, keep1, lane)
                else:
                    store_whole_rows(without_last(to_half(acc)), address, next_row, keep0, keep1, lane)
    return kernel


# ---------------------------------------------------------------- dbias
def make_round_dbias(dtype: str) -> Any:
    """The kernel: a block writes one row (batch, head, row) of dbias."""
    put = store(dtype, "float32")

    def kernel(a):
        line = int32(cuda.blockIdx.x)
        rest = divide(line, a.bias_rows)
        row = int32(line - rest * a.bias_rows)
        batch = divide(rest, a.heads)
        head = int32(rest - batch * a.heads)
        source = int64(a.sums) + int64(line) * int64(a.bias_cols) * 4
        to = int64(a.dbias) + batch * a.dbias_batch + head * a.dbias_head + row * a.dbias_row
        for col in range(int32(cuda.threadIdx.x), a.bias_cols, THREADS):
            put(uint64(to + col * a.dbias_col), load_f32(uint64(source + 4 * int64(col))))
    return kernel
