"""Backward of short sequences with mma.sync: all keys of a head are one tile, so one kernel is the whole backward.

    block           a key head of one or more batch entries; a warp has 16 of its 64 keys. Scores are transposed, as in sm80/backward.py
                    delta = rowsum(dO O)            of the rows themselves: no kernel comes before
                    S^T = K Q^T     P^T = exp2(S^T - lse)          dV += P^T dO
                    dP^T = V dO^T   dS^T = P^T (dP^T - delta)      dK += dS^T Q
                    dQ = dS K       over all keys: rounded and stored, no sums in memory, no kernel comes after
    SINGLE          a head has one block of queries, and a key head one query head. dS of batch entries that share their bias is added up
                    in registers, and the bias stays in registers from one entry to the next
    all threads     copy K, V, Q, dO and O, 16 bytes at a time, into panels of 64 columns

    shared memory   K | V | Q | dO | O, later dS | lse, in units of log2 | lse | delta

What this rung wins over the sm80 backward: one launch instead of three, no float32 sums of dQ (four times the bytes of dQ, written and
read), no tile of 128 keys that is mostly padding. Several blocks on a multiprocessor hide each other's latency.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx import mma
from ..ptx.memory import shared_address
from ..ptx.mma import lane_offset, lane_offset_b, store_tiles, tiles_lane_trans
from ..ptx.scalar import load_if, load_shared_chunk, store_shared
from ..ptx.sync import thread_index
from ..rows.preprocess import make_bounded, make_row_rules
from ..spec import Spec
from ..tile.copies import arrived, make_copy_rows
from ..tile.fragments import add, lane_row, make_pack, make_unpack, scale_rows, thread_col, zeros
from ..tile.gradients import exp2_columns, load_columns, make_add_dbias, make_any_far, make_dropout_transposed, make_near, multiply
from ..tile.mask import make_key_bounds
from ..tile.scalar import WARP
from ..tile.scores import make_cap_of, make_score
from ..tile.smem import ALIGN, ROW_BYTES, Smem, panels
from ..tile.softmax import make_log2_scale
from ..tile.stores import store_rows, store_whole_rows
from .config import BLOCK_M, BLOCK_N, WARPS, ShortConfig


def make_backward(spec: Spec, config: ShortConfig) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    HEAD_DIM, HEAD_DIM_V, PANELS, PANELS_V = spec.head_dim, spec.head_dim_v, panels(spec.head_dim), panels(spec.head_dim_v)
    Q_PANEL, KV_PANEL, LINE = BLOCK_M * ROW_BYTES, BLOCK_N * ROW_BYTES, BLOCK_M * 16        # LINE: bytes of 8 keys of dS
    COUNT_S, COUNT_K, COUNT_V, STAT_BYTES = BLOCK_M // 2, HEAD_DIM // 2, HEAD_DIM_V // 2, BLOCK_M * 4
    smem = Smem()
    K, V = smem.take(PANELS * KV_PANEL), smem.take(PANELS_V * KV_PANEL)
    Q, DO = smem.take(PANELS * Q_PANEL), smem.take(PANELS_V * Q_PANEL)
    OUT = DS = smem.take(max(PANELS_V * Q_PANEL, BLOCK_N // 8 * LINE))
    LOG2, LSE, DELTA = smem.take(STAT_BYTES, 128), smem.take(STAT_BYTES, 128), smem.take(STAT_BYTES, 128)
    SOFTCAP, DROPOUT, SUM_DBIAS, KEEP, DLSE = spec.softcap, spec.dropout, spec.dbias is not None, config.keep_bias, config.dlse
    WHOLE_OUT, SUM_LATER, CHUNKS = config.whole_out, KEEP and SUM_DBIAS, HEAD_DIM_V // 8
    qk, pv = mma.make_products(spec.dtype)
    multiply_tiles_trans, to_half = mma.make_tiles_product(spec.dtype, True), make_pack(spec.dtype)
    copy_rows, load_chunk = make_copy_rows(config.whole, 4 * WARPS), load_shared_chunk(spec.dtype)
    load_real, put, (hidden, kept_lse, in_log2) = load_if("float32", "float32"), store_shared("float32"), make_row_rules("float32")
    bounded = make_bounded(spec.dropout and spec.dtype == "float16")
    key_bounds, limits_of, keep, alibi_from = make_key_bounds(spec, BLOCK_M)
    prepare, fetch, score = make_score(spec, COUNT_S, True, SQUEEZE=config.squeeze)
    plane_of, draw, mark, pack_kept, grad = make_dropout_transposed(spec, COUNT_S)
    any_far, (near_columns, _), log2_scale = make_any_far(BLOCK_M), make_near(spec), make_log2_scale(spec)
    cap_of, slopes, add_dbias = make_cap_of(spec), make_unpack("float16", True), make_add_dbias(spec)

    # ------------------------------------------------------------ where a thread is
    @inline
    def key_of_thread():
        thread = thread_index()
        return int32((thread >> 5) * 16 + lane_row(int32(thread & 31)))

    @inline
    def query_of_thread():
        return thread_col(thread_index())

    # ------------------------------------------------------------ load
    @inline
    def load_keys(a, base, batch, head_k):
        copy_rows(int32(base + K), uint64(a.k + uint64(batch * a.k_batch + head_k * a.k_head)), a.k_row, a.k_dim, int32(0), a.seqlen_k,
                  a.head_dim, BLOCK_N, PANELS, KV_PANEL)
        copy_rows(int32(base + V), uint64(a.v + uint64(batch * a.v_batch + head_k * a.v_head)), a.v_row, a.v_dim, int32(0), a.seqlen_k,
                  a.head_dim_v, BLOCK_N, PANELS_V, KV_PANEL)

    @inline
    def load_queries(a, base, batch, head, row):
        """Q, dO and O of a block of rows of one head."""
        copy_rows(int32(base + Q), uint64(a.q + uint64(batch * a.q_batch + head * a.q_head)), a.q_row, a.q_dim, row, a.seqlen_q,
                  a.head_dim, BLOCK_M, PANELS, Q_PANEL)
        copy_rows(int32(base + DO), uint64(a.dout + uint64(batch * a.dout_batch + head * a.dout_head)), a.dout_row, a.dout_dim, row,
                  a.seqlen_q, a.head_dim_v, BLOCK_M, PANELS_V, Q_PANEL)
        copy_rows(int32(base + OUT), uint64(a.out + uint64(batch * a.out_batch + head * a.out_head)), a.out_row, a.out_dim, row,
                  a.seqlen_q, a.head_dim_v, BLOCK_M, PANELS_V, Q_PANEL)

    # ------------------------------------------------------------ lse and delta
    @inline
    def rows_given(a, batch, head, row):
        """lse and dlse of the thread's row: two threads have one."""
        row = int32(row + (thread_index() >> 1))
        inside = int32(1) if row < a.seqlen_q else int32(0)
        lse = load_real(uint64(int64(a.lse_in) + batch * a.lse_batch + head * a.lse_head + row * a.lse_row), inside)
        dlse = float32(0)
        if DLSE:
            dlse = load_real(uint64(int64(a.dlse) + batch * a.dlse_batch + head * a.dlse_head + row * a.dlse_row), inside)
        return lse, dlse, inside

    @inline
    def put_rows(base, lse, dlse, inside):
        """lse, lse in units of log2 and delta of all rows to shared memory."""
        thread, total = thread_index(), float32(0)
        row, odd = int32(thread >> 1), int32(thread & 1)
        for i in range(CHUNKS // 2):
            at = int32(base + (i >> 2) * Q_PANEL + row * ROW_BYTES + ((((2 * i + odd) & 7) ^ (row & 7)) << 4))
            dout, out = load_chunk(int32(at + DO)), load_chunk(int32(at + OUT))
            for e in range(8):      # by a select: a row that attends no key has out = 0, and its dout may be NaN
                total += dout[e] * out[e] if out[e] != float32(0) else float32(0)
        total += cuda.shfl_xor_sync(WARP, total, 1)
        nothing = hidden(lse, inside)
        lse = kept_lse(lse, nothing)
        log2, _ = in_log2(lse)
        if odd == 0:
            put(int32(base + LSE + 4 * row), lse)
            put(int32(base + LOG2 + 4 * row), log2)
            delta = float32(0) if nothing else bounded(total - dlse)
            put(int32(base + DELTA + 4 * row), delta)

    # ------------------------------------------------------------ the step's parts
    @inline
    def own_rows(panels_at):
        """This lane's address in its warp's 16 rows of a tile at `panels_at`."""
        thread = thread_index()
        return int32(panels_at + (thread >> 5) * (16 * ROW_BYTES) + lane_offset(thread))

    @inline
    def probabilities(a, base, early, shared, batch, head, row, full):
        """P^T of this warp's keys, negative where dropped, and the derivative of the softcap."""
        key, query, columns = key_of_thread(), int32(row + query_of_thread()), int32(4 * query_of_thread())
        k_at, q_at = own_rows(int32(base + K)), int32(base + Q + lane_offset_b(thread_index()))
        acc_s = qk(zeros(COUNT_S), k_at, q_at, 1, HEAD_DIM, KV_PANEL, Q_PANEL)
        if SOFTCAP:
            acc_s, cap_slope = cap_of(a, acc_s)
        else:
            cap_slope = int32(0)
        acc_s = score(a, acc_s, early, shared, query, key, alibi_from(a, batch, a.seqlen_q, a.seqlen_k))
        if full == 0:
            acc_s = keep(acc_s, limits_of(a, batch, key, a.seqlen_q, a.seqlen_k), query)
        log2_at = int32(base + LOG2 + columns)
        if any_far(int32(base + LOG2)) != 0:
            acc_s = near_columns(a, acc_s, log2_at, int32(base + LSE + columns))
        p = exp2_columns(acc_s, log2_scale(a), load_columns(log2_at, COUNT_S))
        return mark(a, p, draw(a, key, query, plane_of(a, batch, head))), cap_slope

    @inline
    def store(acc, pointer, by_row, dim, DIM, row, end):
        """A warp's 16 rows of a gradient, those below `end`."""
        thread = thread_index()
        packed, col = to_half(acc), thread_col(thread)
        address = uint64(pointer + row * by_row + 2 * col)
        next_row = uint64(address + uint64(8 * by_row))
        rows0, rows1 = int32(1) if row < end else int32(0), int32(1) if row + 8 < end else int32(0)
        if WHOLE_OUT and dim == DIM:
            store_whole_rows(packed, address, next_row, rows0, rows1, int32(thread & 31))
        else:
            store_rows(packed, address, next_row, rows0, rows1, int32(dim - col))

    @inline
    def write_dq(a, base, batch, head, row):
        """dQ = dS K of the warp's 16 queries."""
        thread = thread_index()
        ds_at = int32(base + DS + (thread >> 5) * (16 * 16) + tiles_lane_trans(thread, int32(LINE)))
        acc_dq = multiply_tiles_trans(zeros(COUNT_K), ds_at, int32(base + K + lane_offset(thread)), 1, BLOCK_N, LINE, 1, KV_PANEL)
        store(scale_rows(acc_dq, a.grad_scale, a.grad_scale), int64(a.dq) + batch * a.dq_batch + head * a.dq_head, a.dq_row, a.head_dim,
              HEAD_DIM, int32(row + key_of_thread()), a.seqlen_q)

    @inline
    def write_keys(a, acc_dk, acc_dv, batch, head_k):
        key = key_of_thread()
        if DROPOUT:
            acc_dv = scale_rows(acc_dv, a.keep_scale, a.keep_scale)
        store(acc_dv, int64(a.dv) + batch * a.dv_batch + head_k * a.dv_head, a.dv_row, a.head_dim_v, HEAD_DIM_V, key, a.seqlen_k)
        store(scale_rows(acc_dk, a.grad_scale, a.grad_scale), int64(a.dk) + batch * a.dk_batch + head_k * a.dk_head, a.dk_row, a.head_dim,
              HEAD_DIM, key, a.seqlen_k)

    # ------------------------------------------------------------ step
    @inline
    def step(a, base, acc_dk, acc_dv, acc_db, early, batch, head, row, full):
        """A block of queries whose copies are in flight: dV += P^T dO, dK += dS^T Q, dQ = dS K."""
        lse, dlse, inside = rows_given(a, batch, head, row)
        if not KEEP:
            early = fetch(a, batch, head, int32(row + query_of_thread()), key_of_thread(), a.seqlen_q, a.seqlen_k)
        arrived()
        put_rows(base, lse, dlse, inside)
        cuda.syncthreads()      # lse and delta are there, and O has been read
        p, cap_slope = probabilities(a, base, early, prepare(a, batch, head), batch, head, row, full)
        do_at, q_at = int32(base + DO + lane_offset(thread_index())), int32(base + Q + lane_offset(thread_index()))
        acc_dv = pv(acc_dv, pack_kept(p), do_at, 1, Q_PANEL)
        acc_dp = qk(zeros(COUNT_S), own_rows(int32(base + V)), int32(base + DO + lane_offset_b(thread_index())), 1, HEAD_DIM_V, KV_PANEL,
                    Q_PANEL)
        acc_ds = grad(a, p, acc_dp, load_columns(int32(base + DELTA + 4 * query_of_thread()), COUNT_S))
        if SUM_LATER:
            acc_db = add(acc_db, acc_ds)
        elif SUM_DBIAS:
            add_dbias(a, acc_ds, batch, head, int32(row + query_of_thread()), key_of_thread(), a.seqlen_q, a.seqlen_k)
        if SOFTCAP:
            acc_ds = multiply(acc_ds, slopes(cap_slope))
        ds = to_half(acc_ds)
        acc_dk = pv(acc_dk, ds, q_at, 1, Q_PANEL)
        store_tiles(ds, int32(base + DS + (thread_index() >> 5) * (2 * LINE) + (thread_index() & 31) * 4), LINE)
        cuda.syncthreads()
        write_dq(a, base, batch, head, row)
        return acc_dk, acc_dv, acc_db

    @inline
    def entry(a, base, acc_db, early, batch, head_k, full_min, full_max):
        """A key head of one batch entry."""
        acc_dk, acc_dv = zeros(COUNT_K), zeros(COUNT_V)
        load_keys(a, base, batch, head_k)
        if KEEP:
            load_queries(a, base, batch, head_k, int32(0))
            acc_dk, acc_dv, acc_db = step(a, base, acc_dk, acc_dv, acc_db, early, batch, head_k, int32(0), int32(full_max - full_min))
        else:
            for head in range(head_k * a.group, head_k * a.group + a.group):
                m = int32(0)
                while m * BLOCK_M < a.seqlen_q:
                    load_queries(a, base, batch, int32(head), int32(m * BLOCK_M))
                    full = int32(1) if (m >= full_min) & (m < full_max) else int32(0)
                    acc_dk, acc_dv, acc_db = step(a, base, acc_dk, acc_dv, acc_db, early, batch, int32(head), int32(m * BLOCK_M), full)
                    cuda.syncthreads()      # until all warps have read dS
                    m = int32(m + 1)
        write_keys(a, acc_dk, acc_dv, batch, head_k)
        return acc_db

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 127) & -128)       # aligned as a row of a panel
        parts = divide(int32(a.batch + a.entries - 1), a.entries)
        head_k = divide(int32(cuda.blockIdx.x), parts)      # batch entries of a head are neighbours: most often they share the bias
        batch = int32((int32(cuda.blockIdx.x) - head_k * parts) * a.entries)
        end = int32(min(batch + a.entries, a.batch))
        _, full_min, full_max, _ = key_bounds(a, batch, int32(0), int32(BLOCK_N), a.seqlen_q, a.seqlen_k)
        acc_db, early = zeros(COUNT_S), int32(0)
        if KEEP:
            early = fetch(a, batch, head_k, query_of_thread(), key_of_thread(), a.seqlen_q, a.seqlen_k)
        while batch < end:
            acc_db = entry(a, base, acc_db, early, batch, head_k, full_min, full_max)
            cuda.syncthreads()      # until all warps have read K and dS
            batch = int32(batch + 1)
        if SUM_LATER:
            add_dbias(a, acc_db, int32(0), head_k, query_of_thread(), key_of_thread(), a.seqlen_q, a.seqlen_k)

    return kernel, smem.size - ALIGN + 128
