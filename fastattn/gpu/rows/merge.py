"""merge_states on the GPU: partial results over disjoint keys become one, out = sum(exp(lse_n - lse) out_n) (Milakov and Gimelshein 2018).

One launch for each part, one block for each row: the block adds the part to the sum so far. The sum is in the dtype of the arithmetic, and
the weights of its parts add up to 1. The first launch starts the sum, the last one rounds it.
"""
from __future__ import annotations

import math
from functools import cache
from typing import Any

from numba import cuda, float32, float64, int32, int64, uint64

from ...buffers import View
from ...errors import UnsupportedError
from ..dsl.inline import divide, inline
from ..ptx.scalar import load_if, store
from ..runtime.compile import Source
from ..runtime.compile import load as load_kernel
from ..runtime.device import current, device
from ..runtime.workspace import temporary

THREADS = 128
FIELDS = ("part:l part_batch:q part_row:q part_head:q part_dim:q part_lse:l part_lse_batch:q part_lse_head:q part_lse_row:q "
          "sum:l sum_lse:l out:l out_batch:q out_row:q out_head:q out_dim:q lse:l lse_batch:q lse_head:q lse_row:q "
          "first:i last:i rows:i heads:i dim:i")


def make_add_part(dtype: str) -> Any:
    """The kernel that adds one part."""
    wide = dtype == "float64"
    compute, REAL, SIZE = ("float64", float64, 8) if wide else ("float32", float32, 4)
    INF, NEG_INF = REAL(math.inf), REAL(-math.inf)
    load, load_real, put, put_real = load_if(dtype, compute), load_if(compute, compute), store(dtype, compute), store(compute, compute)

    @inline
    def weights(before, new):
        """(weight of the sum, weight of the part, lse of both), from their lse."""
        top = max(before, new)
        if top == NEG_INF:
            return REAL(0), REAL(0), NEG_INF
        share0, share1 = math.exp(before - top), math.exp(new - top)
        total = share0 + share1
        return share0 / total, share1 / total, top + math.log(total)

    def kernel(a):
        thread, line = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        plane = divide(line, a.heads)
        batch = divide(plane, a.rows)
        row, head = int32(plane - batch * a.rows), int32(line - plane * a.heads)
        at = uint64(int64(a.part_lse) + batch * a.part_lse_batch + head * a.part_lse_head + row * a.part_lse_row)
        new, before = load_real(at, int32(1)), load_real(uint64(int64(a.sum_lse) + int64(line) * SIZE), int32(1 - a.first))
        if a.first != 0:
            before = NEG_INF
        if new == INF:      # FlashAttention's lse of a row that attends no key
            new = NEG_INF
        share0, share1, lse = weights(before, new)
        cuda.syncthreads()      # until all threads have read the sum's lse
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
                put_real(uint64(int64(a.lse) + batch * a.lse_batch + head * a.lse_head + row * a.lse_row), lse)
            else:
                put_real(uint64(int64(a.sum_lse) + int64(line) * SIZE), lse)
    return kernel


@cache
def source(dtype: str) -> Source:
    fields = tuple((name, letter) for name, _, letter in (field.partition(":") for field in FIELDS.split()))
    return Source(f"merge {dtype}", lambda: (make_add_part(dtype), 0), fields, THREADS)


def merge_states(outs: list[View], lses: list[View], out: View, lse: View, stream: int) -> None:
    """Enqueues writing out (batch, rows, heads, dim) and lse (batch, heads, rows) from parts of the same shapes, or without the axis of
    the batch."""
    shape = (1,) * (4 - len(out.shape)) + out.shape
    lines, real = math.prod(shape[:3]), lse.itemsize
    if lines >= 2**31:
        raise UnsupportedError(f"merge_states(): {lines} rows, more than 2**31 - 1.")
    if 0 in shape[:3]:
        return

    def strides(x: View, axes: int) -> tuple[int, ...]:
        return (0,) * (axes - len(x.strides)) + x.strides
    d, out_bytes = device(out.device[1]), lines * shape[3] * real
    with current(d), temporary(out_bytes + lines * real, d.ordinal, stream) as memory:
        kernel = load_kernel(source(out.dtype), d.ordinal)
        result = out.ptr, *strides(out, 4), lse.ptr, *strides(lse, 3)
        for n, (part, part_lse) in enumerate(zip(outs, lses, strict=True)):
            values = [part.ptr, *strides(part, 4), part_lse.ptr, *strides(part_lse, 3), memory, memory + out_bytes, *result, int(n == 0),
                      int(n == len(outs) - 1), *shape[1:]]
            kernel.launch(lines, values, stream)
