"""Merging the results of key splits: out = sum(2^(lse_n - lse) out_n), lse in units of log2 (Milakov and Gimelshein 2018).

No kernel of its own, which would start when all others have ended: the last block of a key head that comes here does it for that head.
Which one that is changes from run to run, the order of the sums does not.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint64

from .inline import divide, inline
from .ptx.arith import exp2, log2
from .ptx.memory import atomic_inc_wrap, fence_gpu, load_f32, load_scalar, load_shared_b32, store_f32, store_shared_b32
from .ptx.scalar import load_chunk, load_shared, store, store_shared
from .softmax import LN2, NEG_INF
from .spec import LOG2E, Spec

_LOG2E = float32(LOG2E)


@inline
def share(lse, top):
    """What a result with this lse counts for beside one with the lse `top`."""
    return exp2(lse - top) if lse != NEG_INF else float32(0)


def _make_put(spec: Spec) -> Any:
    LSE, SINKS = spec.lse, spec.sinks is not None
    load_sink, store_out = load_scalar(spec.sinks or "float32"), store(spec.dtype, "float32")

    @inline
    def with_sink(a, head, lse):
        """(lse with the sink, what the row is multiplied by)."""
        if SINKS:
            sink = load_sink(uint64(a.sinks + head * a.sinks_head)) * _LOG2E
            top = max(lse, sink)
            if top == NEG_INF:
                return NEG_INF, float32(0)
            mine = exp2(lse - top)
            total = mine + exp2(sink - top)
            return top + log2(total), mine / total
        else:
            return lse, float32(1)

    @inline
    def put(a, batch, head_k, r, column, values, lse):
        row = divide(r, a.group)
        head = int32(head_k * a.group + r - row * a.group)
        lse, factor = with_sink(a, head, lse)
        at = uint64(a.out + uint64(batch * a.out_batch + row * a.out_row + head * a.out_head + column * a.out_dim))
        for n in range(4):
            store_out(at, values[n] * factor)
            at = uint64(at + uint64(a.out_dim))
        if LSE:
            if column == 0:
                line = (int64(batch) * a.num_heads + head) * a.seqlen_q + row
                store_f32(uint64(a.lse + uint64(line * 4)), lse * LN2)
    return put


def make_combine(spec: Spec, THREADS: int, LSE_PARTS: int) -> tuple[Any, Any, Any]:
    """(put, put_part, combine), for a block of THREADS; LSE_PARTS: a place in shared memory for the lse of all splits and rows, and a word.

    put(a, batch, head_k, r, column, values, lse): four columns of row r of a key head, finished, and with the first ones its lse.
    put_part(a, split, plane, rows, r, column, values, lse): four columns of a split's row r, for the block that merges.
    combine(a, base, thread, plane, batch, head_k, rows): after all of these, by all threads; does it where this block is the last.
    """
    HEAD_DIM_V = spec.head_dim_v
    put, load = _make_put(spec), load_chunk("float32")
    read, put_shared = load_shared("float32", 1), store_shared("float32")

    @inline
    def line_of(a, split, plane, rows):
        """Number of a split's first row, of those of all splits and planes."""
        return int64(split) * int64(a.lines) + int64(plane * rows)

    @inline
    def put_part(a, split, plane, rows, r, column, values, lse):
        line = line_of(a, split, plane, rows) + r
        at = uint64(a.part + uint64((line * HEAD_DIM_V + column) * 4))
        for n in range(4):
            store_f32(uint64(at + uint64(4 * n)), values[n])
        if column == 0:
            store_f32(uint64(a.part_lse + uint64(line * 4)), lse)

    @inline
    def is_last(a, base, thread, plane):
        """Whether all other splits of the plane are written; for all threads, and after their own writes."""
        fence_gpu()
        cuda.syncthreads()
        if thread == 0:
            before = atomic_inc_wrap(uint64(a.arrived + uint64(4 * plane)), int32(a.splits - 1))     # the last one leaves 0
            store_shared_b32(base + LSE_PARTS, before)
        cuda.syncthreads()
        found = load_shared_b32(base + LSE_PARTS)
        fence_gpu()
        cuda.syncthreads()
        return found == a.splits - 1

    @inline
    def part(base, n):
        return read(int32(base + LSE_PARTS + 4 * n))[0]

    @inline
    def one(at, left):
        return load(at, int32(1) if left > 0 else int32(0))

    @inline
    def four(at, by_split, left):
        """Of four splits, zeros where there are no more."""
        return (one(at, left), one(uint64(at + by_split), int32(left - 1)), one(uint64(at + uint64(2) * by_split), int32(left - 2)),
                one(uint64(at + uint64(3) * by_split), int32(left - 3)))

    @inline
    def add(base, out, x, n, left, top):
        weight = share(part(base, n), top) if left > 0 else float32(0)
        return out[0] + weight * x[0], out[1] + weight * x[1], out[2] + weight * x[2], out[3] + weight * x[3]

    @inline
    def add_four(base, out, x, n, left, top):
        out = add(base, out, x[0], n, left, top)
        out = add(base, out, x[1], int32(n + 1), int32(left - 1), top)
        out = add(base, out, x[2], int32(n + 2), int32(left - 2), top)
        return add(base, out, x[3], int32(n + 3), int32(left - 3), top)

    @inline
    def merged(a, base, plane, rows, r, column):
        """Four columns of a row, and its lse."""
        first = int32(r * a.splits)
        top, total = NEG_INF, float32(0)
        for n in range(a.splits):
            top = max(top, part(base, int32(first + n)))
        for n in range(a.splits):
            total += share(part(base, int32(first + n)), top)
        out = (float32(0), float32(0), float32(0), float32(0))
        at = uint64(a.part + uint64(((line_of(a, 0, plane, rows) + r) * HEAD_DIM_V + column) * 4))
        by_split = uint64(int64(a.lines) * (HEAD_DIM_V * 4))
        n = int32(0)
        while n < a.splits:         # eight on their way at a time
            left = int32(a.splits - n)
            x, y = four(at, by_split, left), four(uint64(at + uint64(4) * by_split), by_split, int32(left - 4))
            out = add_four(base, out, x, int32(first + n), left, top)
            out = add_four(base, out, y, int32(first + n + 4), int32(left - 4), top)
            at = uint64(at + uint64(8) * by_split)
            n = int32(n + 8)
        inverse = float32(1) / total if total != float32(0) else float32(0)
        values = (out[0] * inverse, out[1] * inverse, out[2] * inverse, out[3] * inverse)
        return values, top + log2(total) if total != float32(0) else NEG_INF

    @inline
    def combine(a, base, thread, plane, batch, head_k, rows):
        if is_last(a, base, thread, plane):
            i = thread
            while i < rows * a.splits:      # row by row
                r = divide(i, a.splits)
                line = line_of(a, int32(i - r * a.splits), plane, rows) + r
                put_shared(int32(base + LSE_PARTS + 4 * i), load_f32(uint64(a.part_lse + uint64(line * 4))))
                i = int32(i + THREADS)
            cuda.syncthreads()
            i = thread
            while i < rows * (HEAD_DIM_V // 4):
                r = divide(i, int32(HEAD_DIM_V // 4))
                column = int32((i - r * (HEAD_DIM_V // 4)) * 4)
                values, lse = merged(a, base, plane, rows, r, column)
                put(a, batch, head_k, r, column, values, lse)
                i = int32(i + THREADS)
    return put, put_part, combine
