"""A partial result merged into a running one in place: out = w0 out + w1 part, lse the log of both weights' sum. merge.py has the formula.

A warp has a row, in vectors of 16 bytes where both arrays allow it. So a merge reads and writes out once and reads the part once; any
number of parts by merge.py reads and writes a sum besides.
"""
from __future__ import annotations

import math
from typing import Any

from numba import cuda, float32, float64, int32, int64, uint64

from ..dsl.inline import divide
from ..ptx.scalar import load_if, store
from .config import MERGE_WARPS as WARPS
from .transform import add_chunk, make_access, scale_chunk


def make_merge_into(dtype: str, target: str, WHOLE: bool) -> Any:
    """The kernel for a part of `dtype` and a running result of `target`, float32 or float64. a.columns: vectors of a row."""
    REAL, NEG_INF = (float64, float64(-math.inf)) if target == "float64" else (float32, float32(-math.inf))
    load, load_out = make_access(dtype, WHOLE, target)[0], make_access(target, WHOLE, target)[0]
    put = make_access(target, WHOLE, target)[1]
    load_real, put_real = load_if(target, target), store(target, target)

    def kernel(a):
        thread = int32(cuda.threadIdx.x)
        lane, line = int32(thread & 31), int32(int32(cuda.blockIdx.x) * WARPS + int32(thread >> 5))
        inside = int32(line < a.lines)
        plane = divide(line, a.heads)
        batch = divide(plane, a.rows)
        row, head = int64(plane - batch * a.rows), int64(line - plane * a.heads)
        lse_at = uint64(int64(a.lse) + int64(batch) * a.lse_batch + head * a.lse_head + row * a.lse_row)
        part_at = uint64(int64(a.part_lse) + int64(batch) * a.part_lse_batch + head * a.part_lse_head + row * a.part_lse_row)
        before, new = load_real(lse_at, inside), load_real(part_at, inside)
        cuda.syncthreads()          # until all lanes have read lse
        if before == -NEG_INF:      # FlashAttention's lse of a row that attends no key
            before = NEG_INF
        if new == -NEG_INF:
            new = NEG_INF
        top, share0, share1, merged = max(before, new), REAL(0), REAL(0), NEG_INF
        if top != NEG_INF:
            share0, share1 = math.exp(before - top), math.exp(new - top)
            total = share0 + share1
            merged, share0, share1 = top + math.log(total), share0 / total, share1 / total
        if inside != 0:
            out = int64(a.out) + int64(batch) * a.out_batch + row * a.out_row + head * a.out_head
            part = int64(a.part) + int64(batch) * a.part_batch + row * a.part_row + head * a.part_head
            for column in range(lane, a.columns, 32):
                # what has weight 0 is not read: it may hold NaN
                x = scale_chunk(load_out(uint64(out + int64(column) * a.out_dim), int32(share0 != REAL(0))), share0)
                y = scale_chunk(load(uint64(part + int64(column) * a.part_dim), int32(share1 != REAL(0))), share1)
                put(uint64(out + int64(column) * a.out_dim), add_chunk(x, y))
            if lane == 0:
                put_real(lse_at, merged)
    return kernel
