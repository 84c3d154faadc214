"""The first kernel of every backward: delta of each query row, and a copy of lse with padding.

    delta = sum(dout * out) - dlse          lse, and for some lse in units of log2     of each row, float32 (float64 for float64 problems)

They are stored in temporary memory, one line of rows for each (batch, head). Packed: one line for each head, with all sequences one after
the other. A sequence starts at a multiple of PADDING and is followed by padding rows up to the next sequence. So a tile of rows whose
size divides PADDING can be read whole, without bounds checks:

    dense     line batch * num_heads + head, of ceil(seqlen_q / PADDING) * PADDING rows; the sequence starts at row 0
    packed    line head; sequence b starts at row padded_start(q_start, b); rows of no sequence count as one more sequence

Padding rows and rows that attend no key have lse = +inf and delta = 0: exp(s - lse) is 0 there, whatever else memory holds. In units of
log2, far rows have FAR_LSE: tile/gradients.py says why. dsinks needs only lse and delta.

A float16 out of dropout may have passed 65504, by the factor 1 / (1 - dropout_p). Then delta is infinite or NaN, and so would be
P (dP - delta) of all pairs of the row, masked ones with P = 0 too: the gradients of keys that do not belong to the row. So tensor-core
kernels get float32's largest number instead (make_bounded): times 0 it is 0, and times any other P it is infinite as a float16.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, float32, float64, int32, int64, uint64

from ...arrays.view import ITEMSIZE
from ..dsl.inline import divide, inline
from ..ptx.memory import store_b32, store_zero16
from ..ptx.scalar import load_chunk, load_if, store
from ..ptx.sync import let_next_start
from ..spec import FAR_EXPONENT, FAR_LSE, LOG2E, Spec
from ..tile.scalar import WARP, compute_of
from ..tile.schedule import length_at
from .config import PADDING, ROUND_ROWS, SINK_THREADS
from .config import PREPROCESS_ROWS as BLOCK_ROWS
from .config import PREPROCESS_THREADS as THREADS

ROWS_AT_ONCE = 4            # rows of a thread whose loads are in flight together
LARGEST = float32(np.finfo(np.float32).max)


# ---------------------------------------------------------------- where rows are
def make_padded_start(PADDING: int) -> Any:
    """padded_start(q_start, batch): the row of a line where a packed sequence starts.

    Sequences do not overlap: the next one starts at least PADDING after the last multiple of PADDING before this one's end.
    """
    @inline
    def padded_start(q_start, batch):
        return int32(divide(int32(q_start + PADDING * batch), PADDING) * PADDING)
    return padded_start


def make_first_row(spec: Spec) -> Any:
    """first_row(a, batch, head, q_start): int64 index of a sequence's row 0 in lse, delta and the sums of dq. Needs a.rows, of a line."""
    PACKED, padded_start = spec.packed, make_padded_start(PADDING)

    @inline
    def first_row(a, batch, head, q_start):
        if PACKED:
            return int64(head) * int64(a.rows) + int64(padded_start(q_start, batch))
        else:
            return (int64(batch) * int64(a.num_heads) + int64(head)) * int64(a.rows)
    return first_row


def make_row_at(spec: Spec) -> Any:
    """row_at(a, p): row p of a line -> (row of the arrays, how many rows exist from there on, 1 if they belong to a sequence, else 0)."""
    PACKED, padded_start = spec.packed, make_padded_start(PADDING)

    @inline
    def row_at(a, p):
        if PACKED:      # the last sequence that starts at p or before; a.batch stands for rows of no sequence
            low, high = int32(0), int32(a.batch)
            while low < high:
                middle = int32((low + high + 1) >> 1)
                if padded_start(length_at(a.cu_seqlens_q, middle, a.q_step, a.total_q), middle) <= p:
                    low = middle
                else:
                    high = int32(middle - 1)
            start = length_at(a.cu_seqlens_q, low, a.q_step, a.total_q)
            end = length_at(a.cu_seqlens_q, int32(low + 1), a.q_step, a.total_q) if low < a.batch else a.total_q
            row = int32(start + p - padded_start(start, low))
            return row, int32(end - row), int32(low < a.batch)
        else:
            return p, int32(a.seqlen_q - p), int32(1)
    return row_at


# ---------------------------------------------------------------- delta and lse
def make_row_rules(compute: str) -> tuple[Any, Any, Any]:
    """(hidden, kept_lse, in_log2): what becomes of a row's lse. Numbers are of the dtype `compute`.

    nothing = hidden(lse, inside): whether the row attends no key, or (inside == 0) does not exist
    lse = kept_lse(lse, nothing): the lse that kernels subtract
    x, far = in_log2(lse): the same in units of log2, and whether the row is far (tile/gradients.py)
    """
    REAL = float32 if compute == "float32" else float64
    INF = REAL(math.inf)

    @inline
    def hidden(lse, inside):
        return inside == 0 or lse == -INF

    @inline
    def kept_lse(lse, nothing):
        """+inf is the mark of a row that attends no key; a given lse of +inf or NaN gives NaN gradients."""
        return INF if nothing else lse + (lse - lse)

    @inline
    def in_log2(lse):
        """NaN and infinities are kept."""
        x = lse * REAL(LOG2E)
        if abs(lse) < REAL(1e-30):      # could be mistaken for FAR_LSE
            x = REAL(0)
        far = abs(lse) > REAL(FAR_EXPONENT / LOG2E) and abs(lse) != INF
        if far:
            x = REAL(FAR_LSE)
        return x, far
    return hidden, kept_lse, in_log2


def make_bounded(BOUNDED: bool) -> Any:
    """bounded(delta): float32's largest number in place of an infinite delta or NaN. Not BOUNDED: delta as it is."""
    if not BOUNDED:
        @inline
        def unchanged(delta):
            return delta
        return unchanged

    @inline
    def bounded(delta):
        if delta - delta != float32(0):
            delta = LARGEST if delta > float32(0) else -LARGEST
        return delta
    return bounded


def make_preprocess(spec: Spec, WHOLE: bool, DLSE: bool, IN_LOG2: bool, ACCUM: bool, EARLY: bool, BOUNDED: bool) -> Any:
    """The kernel. A block has BLOCK_ROWS rows of a line, and neighbouring lanes share a row. WHOLE: rows of dout and out are 16-byte
    aligned and of one dtype, and a lane loads 16 bytes at a time. EARLY: the next kernel may start before this one has ended.
    BOUNDED: delta is finite. spec.out_dtype: that of out, where it is not dout's."""
    PACKED = spec.packed
    compute, REAL, SIZE = compute_of(spec)
    VECTOR = 16 // ITEMSIZE[spec.dtype] if WHOLE else 1
    CHUNKS = -(-spec.head_dim_v // VECTOR)
    LANES = min(32, 1 << (CHUNKS - 1).bit_length())
    PASS = THREADS // LANES
    AT_ONCE = min(ROWS_AT_ONCE, BLOCK_ROWS // PASS)
    load_element, load_vector, load_real, put = load_if(spec.dtype, compute), load_chunk(spec.dtype), load_if(compute, compute), \
        store(compute, compute)
    load_out = load_if(spec.out_dtype or spec.dtype, compute)
    row_at, (hidden, kept_lse, in_log2), bounded = make_row_at(spec), make_row_rules(compute), make_bounded(BOUNDED)

    @inline
    def product(dout, out):
        """dout * out, by a select: a row that attends no key has out = 0, and its dout may be NaN."""
        return dout * out if out != REAL(0) else REAL(0)

    @inline
    def part_of(a, dout, out, inside, lane):
        """This lane's share of sum(dout * out)."""
        total = REAL(0)
        for first in range(0, CHUNKS, LANES):
            dim = int32((first + lane) * VECTOR)
            there = int32((inside != 0) & (dim < a.head_dim_v))
            if WHOLE:
                x, y = load_vector(uint64(dout + 16 * (first + lane)), there), load_vector(uint64(out + 16 * (first + lane)), there)
                for e in range(VECTOR):
                    total += product(x[e], y[e])
            else:
                total += product(load_element(uint64(dout + dim * a.dout_dim), there), load_out(uint64(out + dim * a.out_dim), there))
        return total

    @inline
    def put_log2(a, at, lse):
        """Store lse in units of log2. A far row marks the call."""
        x, far = in_log2(lse)
        if far:
            store_b32(uint64(a.out_far), a.far_mark)
        put(uint64(int64(a.out_log2) + at * SIZE), x)

    @inline
    def sum_lanes(x):
        step = int32(LANES // 2)
        while step > 0:
            x += cuda.shfl_xor_sync(WARP, x, step)
            step = int32(step >> 1)
        return x

    def kernel(a):
        if EARLY:
            let_next_start()
        t, thread = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        rest = divide(t, a.num_heads)                       # neighbouring blocks are heads of the same rows, neighbours in memory
        head, batch = int32(t - rest * a.num_heads), divide(rest, a.chunks)
        p0 = int32((rest - batch * a.chunks) * BLOCK_ROWS)
        line = int64(head) if PACKED else int64(batch) * int64(a.num_heads) + int64(head)
        lane, first = int32(thread % LANES), int32(p0 + thread // LANES)
        dout, out = int64(a.dout) + batch * a.dout_batch + head * a.dout_head, int64(a.out) + batch * a.out_batch + head * a.out_head
        lse_in, dlse = int64(a.lse_in) + batch * a.lse_batch + head * a.lse_head, int64(a.dlse) + batch * a.dlse_batch + head * a.dlse_head
        row0, count0, owned = row_at(a, p0)                 # a block's rows belong to one sequence
        rows, insides = cuda.local.array(AT_ONCE, int32), cuda.local.array(AT_ONCE, int32)
        parts, lses, dlses = cuda.local.array(AT_ONCE, REAL), cuda.local.array(AT_ONCE, REAL), cuda.local.array(AT_ONCE, REAL)
        for i0 in range(0, BLOCK_ROWS // PASS, AT_ONCE):
            for i in range(AT_ONCE):
                behind = int32(first - p0 + (i0 + i) * PASS)
                rows[i], insides[i] = int32(row0 + behind), int32((behind < count0) & (owned != 0))
            for i in range(AT_ONCE):                        # by all lanes of a row, before its sum: one memory latency for both
                lses[i] = load_real(uint64(lse_in + rows[i] * a.lse_row), insides[i])
                dlses[i] = load_real(uint64(dlse + rows[i] * a.dlse_row), insides[i]) if DLSE else REAL(0)
            for i in range(AT_ONCE):
                parts[i] = part_of(a, dout + rows[i] * a.dout_row, out + rows[i] * a.out_row, insides[i], lane)
            for i in range(AT_ONCE):
                p = int32(first + (i0 + i) * PASS)
                delta, at = sum_lanes(parts[i]), line * int64(a.rows) + int64(p)
                if lane == 0 and p < a.rows:
                    nothing = hidden(lses[i], insides[i])
                    lse = kept_lse(lses[i], nothing)
                    put(uint64(int64(a.out_lse) + at * SIZE), lse)
                    if IN_LOG2:
                        put_log2(a, at, lse)
                    put(uint64(int64(a.out_delta) + at * SIZE), REAL(0) if nothing else bounded(delta - dlses[i]))
                if ACCUM:
                    if int32(p - p0 & -ROUND_ROWS) < count0:        # a band without rows is never rounded
                        for byte in range(16 * lane, a.accum_row, 16 * LANES):
                            store_zero16(uint64(int64(a.out_accum) + at * a.accum_row + byte))
    return kernel


# ---------------------------------------------------------------- dsinks
def make_dsinks(spec: Spec, BOUNDED: bool) -> Any:
    """The kernel: one block a head sums -exp(sink - lse) * delta over its rows, always in the same order. BOUNDED: see make_bounded."""
    PACKED = spec.packed
    compute, REAL, SIZE = compute_of(spec)
    assert spec.sinks is not None
    load_sink, load_real, put = load_if(spec.sinks, compute), load_if(compute, compute), store(spec.sinks, compute)

    def kernel(a):
        head, thread = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        sums = cuda.shared.array(SINK_THREADS, REAL)
        sink = load_sink(uint64(int64(a.sinks) + head * a.sinks_head), int32(1))
        total = REAL(0)
        for batch in range(1 if PACKED else a.batch):
            at = (int64(batch) * int64(a.num_heads) + int64(head)) * int64(a.rows)
            for row in range(thread, a.rows, SINK_THREADS):
                lse = load_real(uint64(int64(a.row_lse) + (at + row) * SIZE), int32(1))
                delta = load_real(uint64(int64(a.row_delta) + (at + row) * SIZE), int32(1))
                if BOUNDED:             # infinite again: twice the largest number
                    delta = (delta + delta) * REAL(0.5)
                total -= (REAL(1) if sink > lse else math.exp(sink - lse)) * delta      # only by rounding can the sink exceed lse
        sums[thread] = total
        cuda.syncthreads()
        half = int32(SINK_THREADS // 2)
        while half > 0:
            if thread < half:
                sums[thread] += sums[thread + half]
            cuda.syncthreads()
            half = int32(half >> 1)
        if thread == 0:
            put(uint64(int64(a.dsinks) + head * a.dsinks_head), sums[0])
    return kernel
