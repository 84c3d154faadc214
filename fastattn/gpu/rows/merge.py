"""merge_states on the GPU: partial results over disjoint keys become one, out = sum(exp(lse_n - lse) out_n) (Milakov and Gimelshein 2018).

One launch for each part, one block for each row: the block adds the part to the sum so far. The sum is in the dtype of the arithmetic, and
the weights of its parts add up to 1. The log of their total weight is kept in two numbers, the largest lse and the sum of
exp(lse_n - largest). In one number, log(sum) would be lost below the precision of a large lse, and the next part would get the same weight
as all parts before it. The first launch starts the sum, the last one rounds it.
"""
from __future__ import annotations

import math
from typing import Any

from numba import cuda, float32, float64, int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx.scalar import load_if, store
from .config import MERGE_THREADS as THREADS


def make_add_part(dtype: str, target: str) -> Any:
    """The kernel that adds one part of that dtype; the last one rounds the sum to `target`."""
    wide = dtype == "float64"
    compute, REAL, SIZE = ("float64", float64, 8) if wide else ("float32", float32, 4)
    INF, NEG_INF = REAL(math.inf), REAL(-math.inf)
    load, load_real, put, put_real = load_if(dtype, compute), load_if(compute, compute), store(target, compute), store(compute, compute)

    @inline
    def weights(before, total, new):
        """(weight of the sum, weight of the part, the largest lse, the sum of exp(lse_n - largest)).

        before, total: the last two so far. new: lse of the part.
        """
        top = max(before, new)
        if top == NEG_INF:
            return REAL(0), REAL(0), NEG_INF, REAL(0)
        share0, share1 = total * math.exp(before - top), math.exp(new - top)
        total = share0 + share1
        return share0 / total, share1 / total, top, total

    def kernel(a):
        thread, line = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        plane = divide(line, a.heads)
        batch = divide(plane, a.rows)
        row, head = int32(plane - batch * a.rows), int32(line - plane * a.heads)
        at = uint64(int64(a.part_lse) + batch * a.part_lse_batch + head * a.part_lse_head + row * a.part_lse_row)
        state = uint64(int64(a.sum_top) + int64(line) * (2 * SIZE))
        new, before = load_real(at, int32(1)), load_real(state, int32(1 - a.first))
        if a.first != 0:
            before = NEG_INF
        if new == INF:      # FlashAttention's lse of a row that attends no key
            new = NEG_INF
        share0, share1, top, total = weights(before, load_real(uint64(state + SIZE), int32(1 - a.first)), new)
        cuda.syncthreads()      # until all threads have read the sum's state
        part = int64(a.part) + batch * a.part_batch + row * a.part_row + head * a.part_head
        out = int64(a.out) + batch * a.out_batch + row * a.out_row + head * a.out_head
        for column in range(thread, a.dim, THREADS):
            sum_at = uint64(int64(a.sum) + (int64(line) * a.dim + column) * SIZE)
            # a part of weight 0 is not read: it may hold NaN
            x = load(uint64(part + column * a.part_dim), int32(1) if share1 != REAL(0) else int32(0)) * share1
            x += load_real(sum_at, int32(1) if share0 != REAL(0) else int32(0)) * share0
            if a.last != 0:
                put(uint64(out + column * a.out_dim), x)
            else:
                put_real(sum_at, x)
        if thread == 0:
            if a.last != 0:
                lse = NEG_INF if total == REAL(0) else top + math.log(total)
                put_real(uint64(int64(a.lse) + batch * a.lse_batch + head * a.lse_head + row * a.lse_row), lse)
            else:
                put_real(state, top)
                put_real(uint64(state + SIZE), total)
    return kernel
