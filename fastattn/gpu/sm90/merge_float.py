"""Merge what forward_float stores of splits of the keys (Milakov and Gimelshein 2018): maxima and sums of rows, and O before its division.

By lse alone it would go wrong: how much a split counts is in the log of its sum, and beside a maximum of 1e8 lse has no bits left for it.
A thread block has a row of a head. Maxima and sums of its splits are read once; then weights are in shared memory.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import load_f32, shared_address, store_f32
from ..ptx.scalar import load_if, load_shared, store_shared
from ..spec import Spec
from ..tile.smem import ALIGN, Smem
from ..tile.softmax import NEG_INF, make_decay, make_finish_row
from .config_float import MERGE_THREADS, MOST_SPLITS


def make_merge_float(spec: Spec) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    LSE, decay, finish_row = spec.lse, make_decay(spec), make_finish_row(spec)
    smem = Smem()
    MAXIMA, TOTALS = smem.take(4 * MOST_SPLITS, 16), smem.take(4 * MOST_SPLITS, 16)     # the maxima become weights
    get, put, load = load_shared("float32", 1), store_shared("float32"), load_if("float32", "float32")

    @inline
    def read_state(a, base, at, thread):
        """Maxima and sums of the row in all splits, to shared memory."""
        n = thread
        while n < a.splits:
            state = uint64(at + n * a.row_split)
            put(int32(base + MAXIMA + 4 * n), load_f32(state))
            put(int32(base + TOTALS + 4 * n), load_f32(uint64(state + a.totals)))
            n = int32(n + MERGE_THREADS)
        cuda.syncthreads()

    @inline
    def weigh(a, base, thread):
        """The row's maximum and its sum. Each split's weight takes the place of its maximum."""
        top, total = NEG_INF, float32(0)
        for n in range(a.splits):
            top = max(top, get(int32(base + MAXIMA + 4 * n))[0])
        cuda.syncthreads()
        n = thread
        while n < a.splits:
            at = int32(base + MAXIMA + 4 * n)
            put(at, decay(a, get(at)[0], top))
            n = int32(n + MERGE_THREADS)
        cuda.syncthreads()
        for n in range(a.splits):
            total += get(int32(base + TOTALS + 4 * n))[0] * get(int32(base + MAXIMA + 4 * n))[0]
        return top, total

    @inline
    def weighted(a, base, at, n):
        """What split n adds to a column; 0 past the last split. One that counts nothing is not read."""
        weight = get(int32(base + MAXIMA + 4 * min(n, int32(a.splits - 1))))[0]
        return weight * load(uint64(at + n * a.part_split), int32((n < a.splits) & (weight != float32(0))))

    @inline
    def merged(a, base, at):
        """A column of all splits. Four loads are in flight."""
        x, n = float32(0), int32(0)
        while n < a.splits:
            first, second = weighted(a, base, at, n), weighted(a, base, at, int32(n + 1))
            third, fourth = weighted(a, base, at, int32(n + 2)), weighted(a, base, at, int32(n + 3))
            x, n = x + first + second + third + fourth, int32(n + 4)
        return x

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + ALIGN - 1) & -ALIGN)
        thread, line = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
        plane = divide(line, a.seqlen_q)
        row, batch = int32(line - plane * a.seqlen_q), divide(plane, a.num_heads)
        head = int32(plane - batch * a.num_heads)
        read_state(a, base, int64(a.rows) + batch * a.row_batch + head * a.row_head + row * int64(4), thread)
        top, total = weigh(a, base, thread)
        factor, lse = finish_row(a, head, top, total)
        part = int64(a.part) + batch * a.part_batch + row * a.part_row + head * a.part_head
        out = int64(a.out) + batch * a.out_batch + row * a.out_row + head * a.out_head
        for column in range(thread, a.head_dim_v, MERGE_THREADS):
            store_f32(uint64(out + column * a.out_dim), merged(a, base, int64(part + 4 * column)) * factor)
        if LSE and thread == 0:
            store_f32(uint64(a.lse + uint64(4) * uint64(line)), lse)
    return kernel, smem.size
