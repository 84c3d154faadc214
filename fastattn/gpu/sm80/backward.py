"""Backward with mma.sync, ldmatrix and cp.async: a block owns BLOCK_N keys of one key head and loops over the queries that attend them.

    block           scores are transposed, keys by queries. dK and dV of its keys stay in registers, dQ is added to sums in memory
                    S^T = K Q^T     P^T = exp2(S^T - lse)          dV += P^T dO
                    dP^T = V dO^T   dS^T = P^T (dP^T - delta)      dK += dS^T Q      dQ = dS K
    SPLIT 1         a warp has 16 * TILES keys and all BLOCK_M queries of a step. Its accumulators of P^T and dS^T are the A operands of
                    dV and dK. Only dQ, a sum over all keys, reads dS of all warps, from shared memory
    SPLIT 2, 4      so many warps share 16 * TILES keys. Each computes the scores of its part of the queries, and its part of the columns
                    of dK and dV. P and dS go through shared memory. With 32 keys a warp, operands are loaded from there less often
    all threads     copy Q and dO, 16 bytes at a time, into panels of 64 columns, and lse and delta, which have padding rows at the end

    shared memory   K, later dK | V, later dV | STAGES x Q | STAGES x dO | dS | P, with SPLIT | STAGES x lse | STAGES x delta | parked words
    arrived()       waits for all threads' copies, and for the end of the step before, whose operands may then be overwritten
    STAGES 2        Q and dO of the next step are in flight, into the other stage, during this one: two barriers a step
    STAGES 1        they are in flight during the MMAs of dQ

Every key block contributes to dQ of a query block: float32 sums in memory, added to atomically in any order. A last kernel rounds them.
(Design: FlashAttention-2, Dao 2023.)
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..flex.bitmap import FULL, first_seen, kind_at, line_of
from ..flex.derived import is_rated
from ..ptx import cp_async, mma, mma_parts
from ..ptx.cp_async import copy16, load_shared_b64, store_shared_b64
from ..ptx.memory import shared_address
from ..ptx.mma import add_sums, lane_offset, lane_offset_b, store_columns, store_tiles, tiles_lane, tiles_lane_trans
from ..ptx.sync import thread_index
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.copies import arrived, make_copy_rows
from ..tile.fragments import join, lane_row, make_pack, part, scale_seen_rows, thread_col, zeros
from ..tile.gradients import exp2_columns, load_columns, make_any_far, make_dropout_transposed, make_near, multiply
from ..tile.mask import make_key_bounds
from ..tile.parked import park, parked, word
from ..tile.schedule import make_num_tiles, make_tile_at
from ..tile.scores import make_cap_of, make_rated_score, make_score, make_slopes
from ..tile.smem import ALIGN, Smem, panels
from ..tile.softmax import make_log2_scale
from ..tile.stores import store_floats
from ..tile.traced import make_hide, times_rate
from .config import BackwardSm80Config


def pieces(dim: int, step: int) -> int:
    """Registers of 16 rows by the columns of one of `step` warps: 16 columns of every 16 * step."""
    return 8 * -(-dim // (16 * step))


ROW_BYTES = 128             # of a row of a panel: 64 columns


def make_backward(spec: Spec, config: BackwardSm80Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    BLOCK_M, BLOCK_N, TILES, SPLIT, STAGES, WARPS = config.block_m, config.block_n, config.tiles, config.split, config.stages, config.warps
    HEAD_DIM, HEAD_DIM_V, PARTS, FLOATS = spec.head_dim, spec.head_dim_v, spec.parts, spec.parts > 1
    STORE_FLOATS = FLOATS or spec.out_dtype == "float32"
    PANELS, PANELS_V = PARTS * panels(HEAD_DIM), PARTS * panels(HEAD_DIM_V)
    WARP_KEYS, PART_M, PASS_ROWS, STORE_ROWS = 16 * TILES, BLOCK_M // SPLIT, 4 * WARPS, BLOCK_N // WARPS
    Q_PANEL, KV_PANEL, LINE = BLOCK_M * ROW_BYTES, BLOCK_N * ROW_BYTES, BLOCK_M * 16     # LINE: bytes of 8 keys of dS or P
    Q_BYTES, DO_BYTES, DS_BYTES, STAT_BYTES = PANELS * Q_PANEL, PANELS_V * Q_PANEL, BLOCK_N // 8 * LINE, BLOCK_M * 4
    APART = config.columns_apart                    # warps that share rows of dQ; each has its part of the columns
    ROWS_DQ = BLOCK_M // (WARPS // APART)
    TILES_DQ, ACCUM_COLUMNS = ROWS_DQ // 16, panels(HEAD_DIM) * 64
    ACCUM_ROW = ACCUM_COLUMNS * 4
    COUNT_S, COUNT_K, COUNT_V = PART_M // 2, TILES * pieces(HEAD_DIM, SPLIT), TILES * pieces(HEAD_DIM_V, SPLIT)
    COUNT_ALL, COUNT_DQ = TILES * COUNT_S, TILES_DQ * pieces(HEAD_DIM, APART)
    smem = Smem()
    K, V = smem.take(PANELS * KV_PANEL), smem.take(PANELS_V * KV_PANEL)
    Q, DO = smem.take(STAGES * Q_BYTES), smem.take(STAGES * DO_BYTES)
    DS = smem.take(PARTS * DS_BYTES)
    P = DS if config.one_buffer else smem.take(PARTS * DS_BYTES if SPLIT > 1 else 0)
    LSE, DELTA = smem.take(STAGES * STAT_BYTES, 128), smem.take(STAGES * STAT_BYTES, 128)
    Q_POINTER, DO_POINTER = smem.take(8, 16), smem.take(8, 8)       # to the sequence's first row
    # HEAD_END: one past the last query head
    (BATCH, Q_START, SEQLEN_Q, SEQLEN_K, FIRST, M_MIN, FULL_MIN, FULL_MAX, HEAD_K, K_START, KEYS, M_MAX,
     HEAD_END) = parked(smem, 13)
    SOFTCAP, DROPOUT, ONE_BUFFER = spec.softcap, spec.dropout, config.one_buffer
    VECTOR, COPIES, SHIFT = int(config.vector), BLOCK_M // 4, 4 + SPLIT.bit_length()    # COPIES: 16-byte copies of lse, and of delta
    LANE_BYTES, EARLY, LATER = 16 if VECTOR else 4, STAGES == 2 and SPLIT > 1, STAGES == 2 and SPLIT == 1
    if FLOATS:
        qk, pv = mma_parts.kq, mma_parts.pv             # S^T has the bits of the forward's S
        multiply_p, multiply_ds, multiply_ds_trans = (mma_parts.make_tiles_product(trans, DS_BYTES, panels(dim))
                                                      for trans, dim in ((False, HEAD_DIM_V), (False, HEAD_DIM), (True, HEAD_DIM)))
    else:
        qk, pv = mma.make_products(spec.dtype)
        multiply_p = multiply_ds = mma.make_tiles_product(spec.dtype, False)
        multiply_ds_trans = mma.make_tiles_product(spec.dtype, True)
    to_half = make_pack(spec.dtype)
    copy_rows, store_tile = make_copy_rows(config.whole, PASS_ROWS), cp_async.make_store(config.whole_out)
    key_bounds, limits_of, keep, alibi_from = make_key_bounds(spec, BLOCK_M)
    (prepare_mask, hide), SEEN, RATED = make_hide(spec.mask_mod, True), spec.mask_mod is not None, is_rated(spec)
    prepare_score, fetch, score = make_rated_score(spec, COUNT_S) if RATED else make_score(spec, COUNT_S, True)
    plane_of, draw, mark, pack_kept, grad = make_dropout_transposed(spec, COUNT_S)
    any_far, (near_columns, _), log2_scale = make_any_far(BLOCK_M), make_near(spec), make_log2_scale(spec)
    cap_of, slopes = make_cap_of(spec), make_slopes(spec)
    tile_at, num_tiles, first_row = make_tile_at(spec, BLOCK_N, True), make_num_tiles(spec), make_first_row(spec)

    # ------------------------------------------------------------ helpers of this kernel
    @inline
    def prepare(a, batch, head):
        """What all keys of the head share: for scores, for the mask_mod."""
        return prepare_score(a, batch, head), prepare_mask(a, batch, head)

    @inline
    def keys_of_warp():
        """Index of the WARP_KEYS keys of this warp."""
        return int32(thread_index() >> SHIFT)

    @inline
    def part_of_warp():
        """Index of this warp among the SPLIT that share its keys: of its queries, and of its columns of dK and dV."""
        return int32((thread_index() >> 5) & (SPLIT - 1))

    @inline
    def key_of_thread():
        return int32(keys_of_warp() * WARP_KEYS + lane_row(int32(thread_index() & 31)))

    @inline
    def query_of_thread():
        return int32(part_of_warp() * PART_M + thread_col(thread_index()))

    @inline
    def following(a, base, head, m):
        """The next block of queries: (head, m, whether there is one). Under a mask_mod the next that its bitmap shows."""
        m = int32(m + 1)
        if SEEN:
            m_max, end, found = word(base, M_MAX), word(base, HEAD_END), int32(-1)
            n_block = divide(word(base, FIRST), int32(BLOCK_N))
            while head < end and found < 0:
                found = first_seen(line_of(a, word(base, BATCH), head, n_block), m, m_max)
                if found < 0:
                    head, m = int32(head + 1), word(base, M_MIN)
            m = int32(found >> 1)
            return head, m, found >= 0
        if m == word(base, M_MAX):
            head, m = int32(head + 1), word(base, M_MIN)
        return head, m, head < word(base, HEAD_END)

    # ------------------------------------------------------------ load
    @inline
    def width(dim, count):
        """Columns of a row in memory, of head size `dim` and in `count` panels. Rows of float32 parts fill their panels."""
        return int32(count * 64) if FLOATS else dim

    @inline
    def load_keys(a, base, batch, head_k, k_start, seqlen_k, first):
        copy_rows(int32(base + K), uint64(a.k + uint64(batch * a.k_batch + k_start * a.k_row + head_k * a.k_head)), a.k_row, a.k_dim,
                  first, seqlen_k, width(a.head_dim, PANELS), BLOCK_N, PANELS, KV_PANEL)
        copy_rows(int32(base + V), uint64(a.v + uint64(batch * a.v_batch + k_start * a.v_row + head_k * a.v_head)), a.v_row, a.v_dim,
                  first, seqlen_k, width(a.head_dim_v, PANELS_V), BLOCK_N, PANELS_V, KV_PANEL)

    @inline
    def load_q_rows(a, base, head, row, seqlen_q, stage):
        copy_rows(int32(base + Q + stage * Q_BYTES), uint64(load_shared_b64(base + Q_POINTER) + uint64(head * a.q_head)), a.q_row, a.q_dim,
                  row, seqlen_q, width(a.head_dim, PANELS), BLOCK_M, PANELS, Q_PANEL)

    @inline
    def load_dout_rows(a, base, head, row, seqlen_q, stage):
        copy_rows(int32(base + DO + stage * DO_BYTES), uint64(load_shared_b64(base + DO_POINTER) + uint64(head * a.dout_head)), a.dout_row,
                  a.dout_dim, row, seqlen_q, width(a.head_dim_v, PANELS_V), BLOCK_M, PANELS_V, Q_PANEL)

    @inline
    def stat_at(a, base, head, row, byte):
        """Where in row_log2 and row_delta a byte of a block's rows is."""
        return uint64(uint64(4 * (first_row(a, word(base, BATCH), head, word(base, Q_START)) + int64(row))) + uint64(byte))

    @inline
    def load_queries(a, base, head, m, stage):
        """Q, dO, lse and delta of a block of rows of one head."""
        row, seqlen_q = int32(m * BLOCK_M), word(base, SEQLEN_Q)
        load_q_rows(a, base, head, row, seqlen_q, stage)
        load_dout_rows(a, base, head, row, seqlen_q, stage)
        thread = thread_index()
        if thread < 2 * COPIES:
            byte = int32((thread & (COPIES - 1)) * 16)
            at = stat_at(a, base, head, row, byte)
            if thread < COPIES:
                copy16(int32(base + LSE + stage * STAT_BYTES + byte), uint64(a.row_log2 + at))
            else:
                copy16(int32(base + DELTA + stage * STAT_BYTES + byte), uint64(a.row_delta + at))

    @inline
    def load_following(a, base, head, m, stage):
        head, m, there = following(a, base, head, m)
        if there:
            load_queries(a, base, head, m, stage)

    @inline
    def load_following_q(a, base, head, m):
        """Q and lse of the next block, into the only stage."""
        head, m, there = following(a, base, head, m)
        if there:
            load_q_rows(a, base, head, int32(m * BLOCK_M), word(base, SEQLEN_Q), int32(0))
            byte = int32(thread_index() * 16)
            if byte < STAT_BYTES:
                copy16(int32(base + LSE + byte), uint64(a.row_log2 + stat_at(a, base, head, int32(m * BLOCK_M), byte)))

    @inline
    def load_following_dout(a, base, head, m):
        """dO and delta of the next block, into the only stage."""
        head, m, there = following(a, base, head, m)
        if there:
            load_dout_rows(a, base, head, int32(m * BLOCK_M), word(base, SEQLEN_Q), int32(0))
            byte = int32(thread_index() * 16)
            if byte < STAT_BYTES:
                copy16(int32(base + DELTA + byte), uint64(a.row_delta + stat_at(a, base, head, int32(m * BLOCK_M), byte)))

    # ------------------------------------------------------------ the step's parts
    @inline
    def scores_of(base, stage):
        """S^T = K Q^T of this warp."""
        k_at = int32(base + K + keys_of_warp() * (WARP_KEYS * ROW_BYTES) + lane_offset(thread_index()))
        q_at = int32(base + Q + stage * Q_BYTES + part_of_warp() * (PART_M * ROW_BYTES) + lane_offset_b(thread_index()))
        return qk(zeros(COUNT_ALL), k_at, q_at, TILES, HEAD_DIM, KV_PANEL, Q_PANEL)

    @inline
    def grad_probabilities(base, stage):
        """dP^T = V dO^T of this warp."""
        v_at = int32(base + V + keys_of_warp() * (WARP_KEYS * ROW_BYTES) + lane_offset(thread_index()))
        do_at = int32(base + DO + stage * DO_BYTES + part_of_warp() * (PART_M * ROW_BYTES) + lane_offset_b(thread_index()))
        return qk(zeros(COUNT_ALL), v_at, do_at, TILES, HEAD_DIM_V, KV_PANEL, Q_PANEL)

    @inline
    def columns(panels_at):
        """This lane's address in rows of dO or Q at `panels_at`, as B operand of its warp's columns."""
        return int32((panels_at + lane_offset(thread_index())) ^ (part_of_warp() << 5))

    @inline
    def rows_of_warp(tiles_at):
        """This lane's address in P^T or dS^T at `tiles_at`, as A operand of its warp's keys."""
        return int32(tiles_at + keys_of_warp() * (2 * TILES * LINE) + tiles_lane(thread_index(), int32(LINE)))

    @inline
    def store_scores(base, offset, halves, tile):
        """Store P^T or dS^T of 16 keys to shared memory, for all warps."""
        at = int32(base + offset + keys_of_warp() * (2 * TILES * LINE) + part_of_warp() * (PART_M * 16)
                   + (thread_index() & 31) * 4 + tile * 2 * LINE)
        if FLOATS:
            store_tiles(part(halves, 0, 3), at, LINE)
            store_tiles(part(halves, 1, 3), int32(at + DS_BYTES), LINE)
            store_tiles(part(halves, 2, 3), int32(at + 2 * DS_BYTES), LINE)
        else:
            store_tiles(halves, at, LINE)

    @inline
    def probabilities(a, base, acc_s, early, shared, head, m, key, query, lse_at, far):
        """P^T of 16 keys, negative where dropped, and the derivative of the softcap."""
        batch, seqlen_q, seqlen_k = word(base, BATCH), word(base, SEQLEN_Q), word(base, SEQLEN_K)
        if RATED:
            acc_s, cap_slope = score(a, acc_s, early, shared[0], query, key, alibi_from(a, batch, seqlen_q, seqlen_k))
        elif SOFTCAP:
            acc_s, cap_slope = cap_of(a, acc_s)
        else:
            cap_slope = int32(0)
        if not RATED:
            acc_s = score(a, acc_s, early, shared[0], query, key, alibi_from(a, batch, seqlen_q, seqlen_k))
        if (m < word(base, FULL_MIN)) | (m >= word(base, FULL_MAX)):
            acc_s = keep(acc_s, limits_of(a, batch, key, seqlen_q, seqlen_k), query)
        if SEEN:
            if kind_at(a, line_of(a, batch, head, divide(word(base, FIRST), int32(BLOCK_N))), m) != FULL:
                acc_s = hide(acc_s, a, shared[1], batch, head, query, key)
        if far != 0:
            at = uint64(4 * (first_row(a, batch, head, word(base, Q_START)) + int64(query)))
            acc_s = near_columns(a, acc_s, lse_at, uint64(a.row_lse + at))
        p = exp2_columns(acc_s, log2_scale(a), load_columns(lse_at, COUNT_S))
        return mark(a, p, draw(a, key, query, plane_of(a, batch, head))), cap_slope

    @inline
    def gradients(a, of_scores, acc_dp, delta_at):
        """(P^T with dropout, dS^T) of 16 keys, rounded: the operands of dV and dK."""
        p, cap_slope = of_scores
        acc_ds = grad(a, p, acc_dp, load_columns(delta_at, COUNT_S))
        if RATED:
            acc_ds = times_rate(acc_ds, slopes(cap_slope))
        elif SOFTCAP:
            acc_ds = multiply(acc_ds, slopes(cap_slope))
        return pack_kept(p), to_half(acc_ds)

    @inline
    def add_dq(a, base, head, m):
        """dQ = dS K over all keys of the block: this warp's rows and columns are added to the sums."""
        thread = thread_index()
        rows, columns = int32((thread >> 5) // APART), int32((thread >> 5) & (APART - 1))
        ds_at = int32(base + DS + rows * (ROWS_DQ * 16) + tiles_lane_trans(thread, int32(LINE)))
        k_at = int32((base + K + lane_offset(thread)) ^ (columns << 5))
        acc_dq = multiply_ds_trans(zeros(COUNT_DQ), ds_at, k_at, TILES_DQ, BLOCK_N, LINE, APART, KV_PANEL)
        row = int64(first_row(a, word(base, BATCH), head, word(base, Q_START)) + int64(m * BLOCK_M + rows * ROWS_DQ))
        at = (row >> 4) * (16 * ACCUM_ROW) + int64(columns * 1024 + (thread & 31) * LANE_BYTES)
        add_sums(acc_dq, uint64(a.accum + uint64(at)), TILES_DQ, APART, ACCUM_COLUMNS, VECTOR)

    # ------------------------------------------------------------ step
    @inline
    def scores(a, base, shared, head, m, stage):
        """(P^T, dS^T) of this warp, rounded: two packed fragments."""
        key, query = int32(word(base, FIRST) + key_of_thread()), int32(m * BLOCK_M + query_of_thread())
        rows = int32(stage * STAT_BYTES + 4 * query_of_thread())
        lse_at, delta_at = int32(base + LSE + rows), int32(base + DELTA + rows)
        early = fetch(a, word(base, BATCH), head, query, key, word(base, SEQLEN_Q), word(base, SEQLEN_K))
        acc_s = scores_of(base, stage)
        far = any_far(int32(base + LSE + stage * STAT_BYTES))
        if TILES == 1:
            of_scores = probabilities(a, base, acc_s, early, shared, head, m, key, query, lse_at, far)
            p_half, ds = gradients(a, of_scores, grad_probabilities(base, stage), delta_at)
            if not ONE_BUFFER:
                store_scores(base, DS, ds, 0)
            if SPLIT > 1:
                store_scores(base, P, p_half, 0)
            return p_half, ds
        else:
            first = probabilities(a, base, part(acc_s, 0, 2), early, shared, head, m, key, query, lse_at, far)
            early = fetch(a, word(base, BATCH), head, query, int32(key + 16), word(base, SEQLEN_Q), word(base, SEQLEN_K))
            second = probabilities(a, base, part(acc_s, 1, 2), early, shared, head, m, int32(key + 16), query, lse_at, far)
            acc_dp = grad_probabilities(base, stage)
            half0, ds0 = gradients(a, first, part(acc_dp, 0, 2), delta_at)
            half1, ds1 = gradients(a, second, part(acc_dp, 1, 2), delta_at)
            if not ONE_BUFFER:
                store_scores(base, DS, ds0, 0)
                store_scores(base, DS, ds1, 1)
            if SPLIT > 1:
                store_scores(base, P, half0, 0)
                store_scores(base, P, half1, 1)
            return join(half0, half1), join(ds0, ds1)

    @inline
    def step(a, base, acc_dk, acc_dv, shared, head, m, stage):
        """Query block m of `head`: dV += P^T dO, dK += dS^T Q, dQ += dS K, while the next operands are in flight."""
        arrived()
        if EARLY:
            load_following(a, base, head, m, int32(stage ^ 1))
        p, ds = scores(a, base, shared, head, m, stage)
        if LATER:           # issued earlier, a few registers would spill
            load_following(a, base, head, m, int32(stage ^ 1))
        q_at, do_at = int32(base + Q + stage * Q_BYTES), int32(base + DO + stage * DO_BYTES)
        if SPLIT == 1:
            acc_dv = pv(acc_dv, p, columns(do_at), TILES, Q_PANEL)
            acc_dk = pv(acc_dk, ds, columns(q_at), TILES, Q_PANEL)
            cuda.syncthreads()
        elif ONE_BUFFER:
            cuda.syncthreads()
            acc_dv = multiply_p(acc_dv, rows_of_warp(int32(base + P)), columns(do_at), TILES, BLOCK_M, LINE, SPLIT, Q_PANEL)
            cuda.syncthreads()
            load_following_dout(a, base, head, m)
            if TILES == 1:
                store_scores(base, DS, ds, 0)
            else:
                store_scores(base, DS, part(ds, 0, 2), 0)
                store_scores(base, DS, part(ds, 1, 2), 1)
            cuda.syncthreads()
            acc_dk = multiply_ds(acc_dk, rows_of_warp(int32(base + DS)), columns(q_at), TILES, BLOCK_M, LINE, SPLIT, Q_PANEL)
            cuda.syncthreads()
            load_following_q(a, base, head, m)
        else:
            cuda.syncthreads()
            acc_dv = multiply_p(acc_dv, rows_of_warp(int32(base + P)), columns(do_at), TILES, BLOCK_M, LINE, SPLIT, Q_PANEL)
            acc_dk = multiply_ds(acc_dk, rows_of_warp(int32(base + DS)), columns(q_at), TILES, BLOCK_M, LINE, SPLIT, Q_PANEL)
            if STAGES == 1:
                cuda.syncthreads()
        if STAGES == 1 and not ONE_BUFFER:
            load_following(a, base, head, m, int32(0))
        add_dq(a, base, head, m)
        return acc_dk, acc_dv

    # ------------------------------------------------------------ epilogue
    @inline
    def put_rows(acc, to, key, scale, seqlen_k):
        """Store 16 keys of dK or dV to shared memory, 0 for keys from seqlen_k on."""
        scale0, scale1 = scale if key < seqlen_k else float32(0), scale if key + 8 < seqlen_k else float32(0)
        store_columns(to_half(scale_seen_rows(acc, scale0, scale1)), to, int32(thread_index() & 31), part_of_warp(), SPLIT, KV_PANEL)

    @inline
    def put(base, acc, offset, scale):
        key, seqlen_k = int32(word(base, FIRST) + key_of_thread()), word(base, SEQLEN_K)
        to = int32(base + offset + keys_of_warp() * (WARP_KEYS * ROW_BYTES))
        if TILES == 1:
            put_rows(acc, to, key, scale, seqlen_k)
        else:
            put_rows(part(acc, 0, 2), to, key, scale, seqlen_k)
            put_rows(part(acc, 1, 2), int32(to + 16 * ROW_BYTES), int32(key + 16), scale, seqlen_k)

    @inline
    def store(base, offset, pointer, by_batch, by_row, by_head, by_dim, dim, count):
        """Store dK or dV of all the tile's keys that exist: STORE_ROWS rows a warp, 16 bytes a thread at a time."""
        thread = thread_index()
        behind, chunk = int32((thread & 31) >> 3), int32(thread & 7)
        row = int32((thread >> 5) * STORE_ROWS + behind)
        key = int32(word(base, FIRST) + row)
        to = uint64(pointer + uint64(word(base, BATCH) * by_batch + int64(word(base, K_START) + key) * by_row
                                     + word(base, HEAD_K) * by_head + 8 * chunk * by_dim))
        store_tile(int32(base + offset + row * ROW_BYTES + ((chunk ^ behind) << 4)), to, by_row, by_dim, int32(word(base, KEYS) - key),
                   int32(dim - 8 * chunk), STORE_ROWS, count, KV_PANEL)

    @inline
    def store_float_rows(base, acc, key, scale, pointer, by_row, by_dim, dim):
        """16 keys of float32 dK or dV from the registers, 0 for keys past those used. `pointer`: to the sequence's first key."""
        scale0 = scale if key < word(base, SEQLEN_K) else float32(0)
        scale1 = scale if key + 8 < word(base, SEQLEN_K) else float32(0)
        column, keys = int32(part_of_warp() * 16 + thread_col(thread_index())), word(base, KEYS)
        at = uint64(pointer + uint64(int64(key) * by_row + column * by_dim))
        store_floats(scale_seen_rows(acc, scale0, scale1), at, uint64(at + uint64(8 * by_row)), by_dim,
                     int32(1) if key < keys else int32(0), int32(1) if key + 8 < keys else int32(0), int32(dim - column), SPLIT)

    @inline
    def store_float_tile(base, acc, scale, pointer, by_batch, by_row, by_head, by_dim, dim):
        key = int32(word(base, FIRST) + key_of_thread())
        pointer = uint64(pointer + uint64(word(base, BATCH) * by_batch + int64(word(base, K_START)) * by_row
                                          + word(base, HEAD_K) * by_head))
        if TILES == 1:
            store_float_rows(base, acc, key, scale, pointer, by_row, by_dim, dim)
        else:
            store_float_rows(base, part(acc, 0, 2), key, scale, pointer, by_row, by_dim, dim)
            store_float_rows(base, part(acc, 1, 2), int32(key + 16), scale, pointer, by_row, by_dim, dim)

    @inline
    def float_epilogue(a, base, acc_dk, acc_dv):
        store_float_tile(base, acc_dk, a.grad_scale, a.dk, a.dk_batch, a.dk_row, a.dk_head, a.dk_dim, a.head_dim)
        store_float_tile(base, acc_dv, a.keep_scale if DROPOUT else float32(1), a.dv, a.dv_batch, a.dv_row, a.dv_head, a.dv_dim,
                         a.head_dim_v)

    @inline
    def epilogue(a, base, acc_dk, acc_dv):
        cuda.syncthreads()          # until all warps have read K
        put(base, acc_dk, K, a.grad_scale)
        put(base, acc_dv, V, a.keep_scale if DROPOUT else float32(1))
        cuda.syncthreads()
        store(base, K, a.dk, a.dk_batch, a.dk_row, a.dk_head, a.dk_dim, a.head_dim, PANELS)
        store(base, V, a.dv, a.dv_batch, a.dv_row, a.dv_head, a.dv_dim, a.head_dim_v, PANELS_V)

    def kernel(a):
        t = int32(cuda.blockIdx.x)
        if t >= num_tiles(a):
            return
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 127) & -128)       # aligned as a row of a panel
        n_block, head_k, batch, q_start, seqlen_q, k_start, seqlen_k, keys = tile_at(a, t)
        first = int32(n_block * BLOCK_N)
        m_min, full_min, full_max, m_max = key_bounds(a, batch, first, BLOCK_N, seqlen_q, seqlen_k)
        if cuda.threadIdx.x == 0:
            store_shared_b64(base + Q_POINTER, uint64(a.q + uint64(batch * a.q_batch + q_start * a.q_row)))
            store_shared_b64(base + DO_POINTER, uint64(a.dout + uint64(batch * a.dout_batch + q_start * a.dout_row)))
            park(base, BATCH, batch)
            park(base, Q_START, q_start)
            park(base, SEQLEN_Q, seqlen_q)
            park(base, SEQLEN_K, seqlen_k)
            park(base, FIRST, first)
            park(base, M_MIN, m_min)
            park(base, FULL_MIN, full_min)
            park(base, FULL_MAX, full_max)
            park(base, HEAD_K, head_k)
            park(base, K_START, k_start)
            park(base, KEYS, keys)
            park(base, M_MAX, m_max)
            park(base, HEAD_END, int32((head_k + 1) * a.group))
        cuda.syncthreads()
        acc_dk, acc_dv = zeros(COUNT_K), zeros(COUNT_V)
        if m_min < m_max:
            head, m, stage = int32(head_k * a.group), m_min, int32(0)
            there = True
            if SEEN:
                head, m, there = following(a, base, head, int32(m_min - 1))
            if there:
                load_keys(a, base, batch, head_k, k_start, seqlen_k, first)
                load_queries(a, base, head, m, stage)
            while there:
                shared = prepare(a, word(base, BATCH), head)
                acc_dk, acc_dv = step(a, base, acc_dk, acc_dv, shared, head, m, stage)
                head, m, there = following(a, base, head, m)
                stage = int32(stage ^ (STAGES - 1))
        if STORE_FLOATS:
            float_epilogue(a, base, acc_dk, acc_dv)
        else:
            epilogue(a, base, acc_dk, acc_dv)

    return kernel, smem.size - ALIGN + 128
