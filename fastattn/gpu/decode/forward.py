"""Forward for few queries and many keys, since sm_80: keys are split over blocks, and inside a block over warps. Results are merged.

    block           one key head, one split of the keys. Its rows are the queries of all heads that share the key head, at most 16
    warp            16 or 32 keys at a time, alone: S = Q K^T, softmax, O += P V. K and V are loaded from global memory to registers
    shared memory   at the end: O of each warp | its maxima and sums, then those of all splits

A step prefetches the operands of the next one as soon as their registers are free: K after S, V after O. So memory is never idle. The
results of the warps are summed in shared memory, those of the splits by the last block that finishes (combine.py).

The other forwards have tiles of 64 rows and more of one query head. What this one wins over them: all multiprocessors load keys, and K
and V are loaded once for all heads that share them. (Flash-Decoding, Dao et al. 2023.)
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx import direct
from ..ptx.memory import shared_address
from ..ptx.scalar import load_shared, store_shared
from ..ptx.sync import any_lane
from ..spec import Spec
from ..tile.fragments import lane_row, make_pack, quad_sum, scale_rows, zeros
from ..tile.mask import TwoIntervals, diagonal_of, make_keep, make_row_bounds
from ..tile.scores import make_score
from ..tile.smem import ALIGN, Smem
from ..tile.softmax import NEG_INF, make_decay, make_softmax
from .combine import make_combine
from .config import MOST_SPLITS, ROWS, DecodeConfig


def make_forward(spec: Spec, config: DecodeConfig) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    KEYS, WARPS, HEAD_DIM_V = config.keys, config.warps, spec.head_dim_v
    TILES, GROUPS, CHUNKS, CHUNKS_V = KEYS // 8, KEYS // 16, spec.head_dim // 32, spec.head_dim_v // 64
    COUNT_S, COUNT_O = KEYS // 2, spec.head_dim_v // 2
    keep, decay = make_keep(spec), make_decay(spec)
    PITCH = 4 * HEAD_DIM_V + 16         # bytes of a row of O in shared memory; neighbours use other banks
    smem = Smem()
    OUT, TOP, TOTAL = smem.take(WARPS * ROWS * PITCH, 16), smem.take(WARPS * ROWS * 4, 16), smem.take(WARPS * ROWS * 4, 16)
    assert ROWS * MOST_SPLITS * 8 <= TOP, "combine uses the shared memory of O"
    # score() is then the scale and the softcap alone: it needs no row, and what a head shares is nothing
    assert spec.alibi is None and spec.bias is None and not spec.mask
    qk, pv = direct.make_products(spec.dtype)
    to_half = make_pack(spec.dtype)
    row_bounds = make_row_bounds(spec)
    _, _, score = make_score(spec, COUNT_S)
    update, _, _ = make_softmax(spec)
    put_out, put_part, combine = make_combine(spec, 32 * WARPS, OUT)
    read, read4, put = load_shared("float32", 1), load_shared("float32", 4), store_shared("float32")

    @inline
    def q_row(a, batch, head_k, r, chunk):
        """A lane's chunks of row r of Q: query r / group of the key head's query head r % group."""
        i = divide(r, a.group)
        head = int32(head_k * a.group + r - i * a.group)
        address = uint64(a.q + uint64(batch * a.q_batch + i * a.q_row + head * a.q_head) + uint64(16 * chunk))
        return direct.load_rows(address, int64(0), int32(0), int32(0), 1, CHUNKS)

    @inline
    def bounds(a, r, first, end):
        """The keys [lo, hi) of this split that row r attends."""
        lo, hi = row_bounds(a, divide(r, a.group), diagonal_of(a, a.seqlen_q, a.seqlen_k), a.seqlen_k)
        return int32(max(lo, first)), int32(min(hi, end))

    @inline
    def rescale(acc_o, alpha0, alpha1):
        if any_lane(int32(1) if alpha0 != float32(1) or alpha1 != float32(1) else int32(0)) != 0:
            acc_o = scale_rows(acc_o, alpha0, alpha1)
        return acc_o

    @inline
    def note(base, w, row, lane, maximum, total):
        """Store a row's maximum and sum to shared memory, for all warps."""
        total = quad_sum(total)
        if (lane & 3) == 0:
            put(int32(base + TOP + (w * ROWS + row) * 4), maximum)
            put(int32(base + TOTAL + (w * ROWS + row) * 4), total)

    @inline
    def whole(a, base, row):
        """(maximum, sum) of a row over all warps."""
        top, total = NEG_INF, float32(0)
        for w in range(WARPS):
            top = max(top, read(int32(base + TOP + (w * ROWS + row) * 4))[0])
        for w in range(WARPS):
            total += read(int32(base + TOTAL + (w * ROWS + row) * 4))[0] * factor(a, base, w, row, top)
        return top, total

    @inline
    def factor(a, base, w, row, top):
        """The factor of a warp's O and sum of a row under the maximum of all warps; 0 if the warp's keys were all masked."""
        return decay(a, read(int32(base + TOP + (w * ROWS + row) * 4))[0], top)

    @inline
    def result(a, base, row, column):
        """Four columns of a row over this block's keys, its maximum and its sum."""
        top, total = whole(a, base, row)
        out0, out1, out2, out3 = float32(0), float32(0), float32(0), float32(0)
        for n in range(WARPS):
            part = factor(a, base, int32(n), row, top)
            x = read4(int32(base + OUT + (n * ROWS + row) * PITCH + 4 * column))
            out0, out1, out2, out3 = out0 + part * x[0], out1 + part * x[1], out2 + part * x[2], out3 + part * x[3]
        return (out0, out1, out2, out3), top, total

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
        thread = int32(cuda.threadIdx.x)
        w, lane = int32(thread >> 5), int32(thread & 31)
        g, c = lane_row(lane), int32(lane & 3)          # the lane's first row, its chunk of a row
        plane = divide(int32(cuda.blockIdx.x), a.splits)
        split = int32(cuda.blockIdx.x - plane * a.splits)
        batch = divide(plane, a.heads_k)
        head_k, rows = int32(plane - batch * a.heads_k), int32(a.group * a.seqlen_q)
        first = int32(a.first_key + split * a.split_keys)
        end = int32(min(first + a.split_keys, a.end_key))
        last = int32(end - 1)
        r0, r1 = int32(min(g, rows - 1)), int32(min(g + 8, rows - 1))
        q0, q1 = q_row(a, batch, head_k, r0, c), q_row(a, batch, head_k, r1, c)
        lo0, hi0 = bounds(a, r0, first, end)
        lo1, hi1 = bounds(a, r1, first, end)
        intervals = TwoIntervals(lo0, hi0, lo1, hi1)
        k_base = uint64(a.k + uint64(batch * a.k_batch + head_k * a.k_head) + uint64(16 * c))
        v_base = uint64(a.v + uint64(batch * a.v_batch + head_k * a.v_head) + uint64(16 * g))
        acc_o, max0, max1, sum0, sum1 = zeros(COUNT_O), NEG_INF, NEG_INF, float32(0), float32(0)
        key = int32(first + w * KEYS)
        if key < end:
            k = direct.load_rows(k_base, a.k_row, int32(key + g), last, TILES, CHUNKS)
            v = direct.load_columns(v_base, a.v_row, int32(key + 2 * c), last, GROUPS, CHUNKS_V)
            while key < end:
                following = int32(key + WARPS * KEYS)
                column = int32(key + 2 * c)
                acc_s = qk(zeros(COUNT_S), q0, q1, k)
                k = direct.load_rows(k_base, a.k_row, int32(following + g), last, TILES, CHUNKS)
                acc_s = score(a, acc_s, int32(0), float32(0), int32(0), column, int32(0))
                acc_s = keep(acc_s, intervals, column)
                acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1)
                acc_o = pv(rescale(acc_o, alpha0, alpha1), to_half(acc_s), v)
                v = direct.load_columns(v_base, a.v_row, int32(following + 2 * c), last, GROUPS, CHUNKS_V)
                key = following
        note(base, w, g, lane, max0, sum0)
        note(base, w, int32(g + 8), lane, max1, sum1)
        direct.store_output(acc_o, int32(base + OUT + (w * ROWS + g) * PITCH + 64 * c), PITCH)
        cuda.syncthreads()
        i = thread
        while i < rows * (HEAD_DIM_V // 4):
            row = divide(i, int32(HEAD_DIM_V // 4))
            column = int32((i - row * (HEAD_DIM_V // 4)) * 4)
            values, maximum, total = result(a, base, row, column)
            if a.splits == 1:
                put_out(a, batch, head_k, row, column, values, maximum, total)
            else:
                put_part(a, split, plane, rows, row, column, values, maximum, total)
            i = int32(i + 32 * WARPS)
        if a.splits > 1:
            combine(a, base, thread, plane, batch, head_k, rows)

    return kernel, smem.size - ALIGN + 16
