"""Backward with mma.sync, ldmatrix and cp.async: a block takes BLOCK_N keys of one key head and goes through the queries that see them.

    block           scores transposed, keys by queries; dK and dV of its keys stay in registers, dQ is added to sums in memory
                    S^T = K Q^T     P^T = exp2(S^T - lse)          dV += P^T dO
                    dP^T = V dO^T   dS^T = P^T (dP^T - delta)      dK += dS^T Q      dQ = dS K
    SPLIT 1         a warp has 16 * TILES keys and all BLOCK_M queries of a step: P^T and dS^T are operands as they come out of the
                    accumulators, only dQ, which adds over all keys, reads dS of all warps
    SPLIT 2, 4      so many warps share 16 * TILES keys: each computes scores of its part of the queries and has its part of the columns of
                    dK and dV. P and dS go through shared memory; with 32 keys a warp, operands are read from there less often
    all threads     copy Q and dO, 16 bytes at a time, into panels of 64 columns, and lse and delta, which end in rows that are nobody's

    shared memory   K, later dK | V, later dV | STAGES x Q | STAGES x dO | dS | P, with SPLIT | STAGES x lse | STAGES x delta | the tile
    arrived()       after it a thread's copies are everyone's, and what the step before read may be overwritten
    STAGES 2        Q and dO of the next step travel into the other stage while this one is computed: two barriers a step
    STAGES 1        they travel during the product of dQ

dQ of a query block gets a part from every key block: float32 sums in memory, added to in any order, that a last kernel rounds.
(Design: FlashAttention-2, Dao 2023.)
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import inline
from ..ptx import cp_async, mma
from ..ptx.cp_async import copy16, load_shared_b64, store_shared_b64
from ..ptx.memory import load_shared_b32, shared_address, store_shared_b32
from ..ptx.mma import add_sums, lane_offset, lane_offset_b, store_columns, store_tiles, tiles_lane, tiles_lane_trans
from ..ptx.sync import thread_index
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.fragments import join, make_pack, make_unpack, part, scale_seen_rows, zeros
from ..tile.gradients import PIECE, exp2_columns, load_columns, make_any_far, make_dropout_transposed, make_near, multiply
from ..tile.mask import make_key_bounds
from ..tile.schedule import make_num_tiles, make_tile_at
from ..tile.scores import make_cap_of, make_score
from ..tile.smem import ALIGN, Smem, panels
from ..tile.softmax import make_log2_scale
from .config import BackwardSm80Config


def pieces(dim: int, step: int) -> int:
    """Registers that 16 rows take of 16 columns of every 16 * step."""
    return 8 * -(-dim // (16 * step))


def make_backward(spec: Spec, config: BackwardSm80Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    BLOCK_M, BLOCK_N, TILES, SPLIT, STAGES, WARPS = config.block_m, config.block_n, config.tiles, config.split, config.stages, config.warps
    HEAD_DIM, HEAD_DIM_V, PANELS, PANELS_V = spec.head_dim, spec.head_dim_v, panels(spec.head_dim), panels(spec.head_dim_v)
    WARP_KEYS, PART_M, PASS_ROWS, STORE_ROWS = 16 * TILES, BLOCK_M // SPLIT, 4 * WARPS, BLOCK_N // WARPS
    Q_PANEL, KV_PANEL, LINE = BLOCK_M * 128, BLOCK_N * 128, BLOCK_M * 16        # LINE: of dS and P, 8 keys by BLOCK_M queries
    Q_BYTES, DO_BYTES, DS_BYTES, ROW_BYTES = PANELS * Q_PANEL, PANELS_V * Q_PANEL, BLOCK_N // 8 * LINE, BLOCK_M * 4
    APART = config.columns_apart                    # warps side by side in dQ, whose rows are then
    ROWS_DQ = BLOCK_M // (WARPS // APART)
    TILES_DQ, ACCUM_ROW = ROWS_DQ // 16, PANELS * 64 * 4
    COUNT_S, COUNT_K, COUNT_V = PART_M // 2, TILES * pieces(HEAD_DIM, SPLIT), TILES * pieces(HEAD_DIM_V, SPLIT)
    COUNT_ALL, COUNT_DQ = TILES * COUNT_S, TILES_DQ * pieces(HEAD_DIM, APART)
    smem = Smem()
    K, V = smem.take(PANELS * KV_PANEL), smem.take(PANELS_V * KV_PANEL)
    Q, DO = smem.take(STAGES * Q_BYTES), smem.take(STAGES * DO_BYTES)
    DS, P = smem.take(DS_BYTES), smem.take(DS_BYTES if SPLIT > 1 else 0)
    LSE, DELTA, TILE = smem.take(STAGES * ROW_BYTES, 128), smem.take(STAGES * ROW_BYTES, 128), smem.take(80, 16)
    SOFTCAP, DROPOUT = spec.softcap, spec.dropout
    VECTOR, COPIES, SHIFT = int(config.vector), BLOCK_M // 4, 4 + SPLIT.bit_length()    # COPIES: of 16 bytes of lse, and of delta
    LANE_BYTES, EARLY, LATER = 16 if VECTOR else 4, STAGES == 2 and SPLIT > 1, STAGES == 2 and SPLIT == 1
    qk, pv = mma.make_products(spec.dtype)
    product, product_trans = mma.make_tiles_product(spec.dtype, False), mma.make_tiles_product(spec.dtype, True)
    to_half = make_pack(spec.dtype)
    load_tile, store_tile = cp_async.make_load(config.whole), cp_async.make_store(config.whole_out)
    key_bounds, limits_of, keep = make_key_bounds(spec, BLOCK_M)
    prepare, fetch, score = make_score(spec, COUNT_S, True)
    draw, mark, pack_kept, grad = make_dropout_transposed(spec, COUNT_S)
    any_far, (near_columns, _), log2_scale = make_any_far(BLOCK_M), make_near(spec), make_log2_scale(spec)
    cap_of, slopes = make_cap_of(spec), make_unpack("float16", True)
    tile_at, num_tiles, first_row = make_tile_at(spec, BLOCK_N, True), make_num_tiles(spec), make_first_row(spec)

    # ------------------------------------------------------------ helpers of this kernel
    @inline
    def note(base, number, value):
        """A word about the tile waits in shared memory, because products need the registers."""
        store_shared_b32(int32(base + TILE + 16 + 4 * number), int32(value))

    @inline
    def noted(base, number):
        """0 batch, 1 q_start, 2 seqlen_q, 3 seqlen_k, 4 first key, 5 m_min, 6 full_min, 7 full_max, 8 head_k, 9 k_start, 10 keys,
        11 m_max, 12 one past the last head."""
        return load_shared_b32(int32(base + TILE + 16 + 4 * number))

    @inline
    def keys_of_warp():
        """Which stretch of WARP_KEYS keys this warp has."""
        return int32(thread_index() >> SHIFT)

    @inline
    def part_of_warp():
        """Which part of its queries and of its columns."""
        return int32((thread_index() >> 5) & (SPLIT - 1))

    @inline
    def key_of_thread():
        return int32(keys_of_warp() * WARP_KEYS + ((thread_index() & 31) >> 2))

    @inline
    def query_of_thread():
        return int32(part_of_warp() * PART_M + (thread_index() & 3) * 2)

    @inline
    def arrived():
        """Every copy so far is there, and all threads are done with what was there before the next."""
        cp_async.wait_all()
        cuda.syncthreads()

    @inline
    def following(base, head, m):
        """The block of queries after this one, and whether there is one."""
        m = int32(m + 1)
        if m == noted(base, 11):
            head, m = int32(head + 1), noted(base, 5)
        return head, m, head < noted(base, 12)

    # ------------------------------------------------------------ load
    @inline
    def copy_rows(to, source, by_row, by_dim, first, length, dim, rows, count, panel):
        """Rows `first` to first + rows of `length`, `dim` columns each: to panels at `to`, by all threads."""
        thread = thread_index()
        line, chunk = int32(thread >> 3), int32(thread & 7)
        source = uint64(source + uint64(int64(first + line) * by_row + 8 * chunk * by_dim))
        load_tile(int32(to + line * 128 + ((chunk ^ (line & 7)) << 4)), source, by_row, by_dim, int32(length - first - line),
                  int32(dim - 8 * chunk), rows, PASS_ROWS, count, panel)

    @inline
    def load_keys(a, base, batch, head_k, k_start, seqlen_k, first):
        copy_rows(int32(base + K), uint64(a.k + uint64(batch * a.k_batch + k_start * a.k_row + head_k * a.k_head)), a.k_row, a.k_dim,
                  first, seqlen_k, a.head_dim, BLOCK_N, PANELS, KV_PANEL)
        copy_rows(int32(base + V), uint64(a.v + uint64(batch * a.v_batch + k_start * a.v_row + head_k * a.v_head)), a.v_row, a.v_dim,
                  first, seqlen_k, a.head_dim_v, BLOCK_N, PANELS_V, KV_PANEL)

    @inline
    def load_queries(a, base, head, m, stage):
        """Q, dO, lse and delta of a block of rows of one head."""
        row, seqlen_q = int32(m * BLOCK_M), noted(base, 2)
        copy_rows(int32(base + Q + stage * Q_BYTES), uint64(load_shared_b64(base + TILE) + uint64(head * a.q_head)), a.q_row, a.q_dim,
                  row, seqlen_q, a.head_dim, BLOCK_M, PANELS, Q_PANEL)
        copy_rows(int32(base + DO + stage * DO_BYTES), uint64(load_shared_b64(base + TILE + 8) + uint64(head * a.dout_head)), a.dout_row,
                  a.dout_dim, row, seqlen_q, a.head_dim_v, BLOCK_M, PANELS_V, Q_PANEL)
        thread = thread_index()
        if thread < 2 * COPIES:
            byte = int32((thread & (COPIES - 1)) * 16)
            at = uint64(uint64(4 * (first_row(a, noted(base, 0), head, noted(base, 1)) + int64(row))) + uint64(byte))
            if thread < COPIES:
                copy16(int32(base + LSE + stage * ROW_BYTES + byte), uint64(a.row_log2 + at))
            else:
                copy16(int32(base + DELTA + stage * ROW_BYTES + byte), uint64(a.row_delta + at))

    @inline
    def load_following(a, base, head, m, stage):
        head, m, there = following(base, head, m)
        if there:
            load_queries(a, base, head, m, stage)

    # ------------------------------------------------------------ the step's parts
    @inline
    def products_s(base, stage):
        """S^T of this warp."""
        k_at = int32(base + K + keys_of_warp() * (WARP_KEYS * 128) + lane_offset(thread_index()))
        q_at = int32(base + Q + stage * Q_BYTES + part_of_warp() * (PART_M * 128) + lane_offset_b(thread_index()))
        return qk(zeros(COUNT_ALL), k_at, q_at, TILES, HEAD_DIM, KV_PANEL, Q_PANEL)

    @inline
    def products_dp(base, stage):
        """dP^T of this warp."""
        v_at = int32(base + V + keys_of_warp() * (WARP_KEYS * 128) + lane_offset(thread_index()))
        do_at = int32(base + DO + stage * DO_BYTES + part_of_warp() * (PART_M * 128) + lane_offset_b(thread_index()))
        return qk(zeros(COUNT_ALL), v_at, do_at, TILES, HEAD_DIM_V, KV_PANEL, Q_PANEL)

    @inline
    def columns(place):
        """This lane's address in rows of dO or Q at `place`, as B of its warp's columns."""
        return int32((place + lane_offset(thread_index())) ^ (part_of_warp() << 5))

    @inline
    def rows_of_warp(place):
        """This lane's address in P^T or dS^T at `place`, as A of its warp's keys."""
        return int32(place + keys_of_warp() * (2 * TILES * LINE) + tiles_lane(thread_index(), int32(LINE)))

    @inline
    def store_scores(base, place, halves, tile):
        """P^T or dS^T of 16 keys to where all warps find it."""
        store_tiles(halves, int32(base + place + keys_of_warp() * (2 * TILES * LINE) + part_of_warp() * (PART_M * 16)
                                  + (thread_index() & 31) * 4 + tile * 2 * LINE), LINE)

    @inline
    def probabilities(a, base, acc_s, early, slope, head, m, key, query, lse_at, far):
        """P^T of 16 keys, negative where dropout drops it, and the slopes of the softcap."""
        batch, seqlen_q, seqlen_k = noted(base, 0), noted(base, 2), noted(base, 3)
        if SOFTCAP:
            acc_s, cap_slope = cap_of(a, acc_s)
        else:
            cap_slope = int32(0)
        acc_s = score(a, acc_s, early, slope, query, key, int32(seqlen_k - seqlen_q))
        if (m < noted(base, 6)) | (m >= noted(base, 7)):
            acc_s = keep(acc_s, limits_of(a, key, seqlen_q, seqlen_k), query)
        if far != 0:
            at = uint64(4 * (first_row(a, batch, head, noted(base, 1)) + int64(query)))
            acc_s = near_columns(a, acc_s, lse_at, uint64(a.row_lse + at))
        p = exp2_columns(acc_s, log2_scale(a), load_columns(lse_at, COUNT_S))
        return mark(a, p, draw(a, key, query, int32(batch * a.num_heads + head))), cap_slope

    @inline
    def gradients(a, of_scores, acc_dp, delta_at):
        """What dV is made of, and dS^T, of 16 keys."""
        p, cap_slope = of_scores
        acc_ds = grad(a, p, acc_dp, load_columns(delta_at, COUNT_S))
        if SOFTCAP:
            acc_ds = multiply(acc_ds, slopes(cap_slope))
        return pack_kept(p), to_half(acc_ds)

    @inline
    def add_dq(a, base, head, m):
        """dQ of this step: this warp's rows and columns, over all keys of the block, to the sums."""
        thread = thread_index()
        rows, columns = int32((thread >> 5) // APART), int32((thread >> 5) & (APART - 1))
        ds_at = int32(base + DS + rows * (ROWS_DQ * 16) + tiles_lane_trans(thread, int32(LINE)))
        k_at = int32((base + K + lane_offset(thread)) ^ (columns << 5))
        acc_dq = product_trans(zeros(COUNT_DQ), ds_at, k_at, TILES_DQ, BLOCK_N, LINE, APART, KV_PANEL)
        row = int64(first_row(a, noted(base, 0), head, noted(base, 1)) + int64(m * BLOCK_M + rows * ROWS_DQ))
        at = (row >> 6) * (64 * ACCUM_ROW) + ((row >> 4) & 3) * PIECE + int64(columns * 1024 + (thread & 31) * LANE_BYTES)
        add_sums(acc_dq, uint64(a.accum + uint64(at)), TILES_DQ, APART, VECTOR)

    # ------------------------------------------------------------ step
    @inline
    def scores(a, base, slope, head, m, stage):
        """P^T and dS^T of this warp, rounded: a pair of packed fragments."""
        key, query = int32(noted(base, 4) + key_of_thread()), int32(m * BLOCK_M + query_of_thread())
        rows = int32(stage * ROW_BYTES + 4 * query_of_thread())
        lse_at, delta_at = int32(base + LSE + rows), int32(base + DELTA + rows)
        early = fetch(a, noted(base, 0), head, query, key, noted(base, 2), noted(base, 3))
        acc_s = products_s(base, stage)
        far = any_far(int32(base + LSE + stage * ROW_BYTES))
        if TILES == 1:
            of_scores = probabilities(a, base, acc_s, early, slope, head, m, key, query, lse_at, far)
            p_half, ds = gradients(a, of_scores, products_dp(base, stage), delta_at)
            store_scores(base, DS, ds, 0)
            if SPLIT > 1:
                store_scores(base, P, p_half, 0)
            return p_half, ds
        else:
            first = probabilities(a, base, part(acc_s, 0, 2), early, slope, head, m, key, query, lse_at, far)
            early = fetch(a, noted(base, 0), head, query, int32(key + 16), noted(base, 2), noted(base, 3))
            second = probabilities(a, base, part(acc_s, 1, 2), early, slope, head, m, int32(key + 16), query, lse_at, far)
            acc_dp = products_dp(base, stage)
            half0, ds0 = gradients(a, first, part(acc_dp, 0, 2), delta_at)
            half1, ds1 = gradients(a, second, part(acc_dp, 1, 2), delta_at)
            store_scores(base, DS, ds0, 0)
            store_scores(base, DS, ds1, 1)
            if SPLIT > 1:
                store_scores(base, P, half0, 0)
                store_scores(base, P, half1, 1)
            return join(half0, half1), join(ds0, ds1)

    @inline
    def step(a, base, acc_dk, acc_dv, slope, head, m, stage):
        """Block m of `head`, while what comes next travels."""
        arrived()
        if EARLY:
            load_following(a, base, head, m, int32(stage ^ 1))
        p, ds = scores(a, base, slope, head, m, stage)
        if LATER:           # not before: a few registers would spill
            load_following(a, base, head, m, int32(stage ^ 1))
        q_at, do_at = int32(base + Q + stage * Q_BYTES), int32(base + DO + stage * DO_BYTES)
        if SPLIT == 1:
            acc_dv = pv(acc_dv, p, columns(do_at), TILES, Q_PANEL)
            acc_dk = pv(acc_dk, ds, columns(q_at), TILES, Q_PANEL)
            cuda.syncthreads()
        else:
            cuda.syncthreads()
            acc_dv = product(acc_dv, rows_of_warp(int32(base + P)), columns(do_at), TILES, BLOCK_M, LINE, SPLIT, Q_PANEL)
            acc_dk = product(acc_dk, rows_of_warp(int32(base + DS)), columns(q_at), TILES, BLOCK_M, LINE, SPLIT, Q_PANEL)
            if STAGES == 1:
                cuda.syncthreads()
        if STAGES == 1:
            load_following(a, base, head, m, int32(0))
        add_dq(a, base, head, m)
        return acc_dk, acc_dv

    # ------------------------------------------------------------ epilogue
    @inline
    def put_rows(acc, to, key, scale, seqlen_k):
        """16 keys of dK or dV, those that exist, to shared memory; the others are 0."""
        scale0, scale1 = scale if key < seqlen_k else float32(0), scale if key + 8 < seqlen_k else float32(0)
        store_columns(to_half(scale_seen_rows(acc, scale0, scale1)), to, int32(thread_index() & 31), part_of_warp(), SPLIT, KV_PANEL)

    @inline
    def put(base, acc, place, scale):
        key, seqlen_k = int32(noted(base, 4) + key_of_thread()), noted(base, 3)
        to = int32(base + place + keys_of_warp() * (WARP_KEYS * 128))
        if TILES == 1:
            put_rows(acc, to, key, scale, seqlen_k)
        else:
            put_rows(part(acc, 0, 2), to, key, scale, seqlen_k)
            put_rows(part(acc, 1, 2), int32(to + 2048), int32(key + 16), scale, seqlen_k)

    @inline
    def store(base, place, pointer, by_batch, by_row, by_head, by_dim, dim, count):
        """All keys of the sequence in this tile, STORE_ROWS a warp, 16 bytes a thread."""
        thread = thread_index()
        line, chunk = int32((thread & 31) >> 3), int32(thread & 7)
        row = int32((thread >> 5) * STORE_ROWS + line)
        key = int32(noted(base, 4) + row)
        to = uint64(pointer + uint64(noted(base, 0) * by_batch + int64(noted(base, 9) + key) * by_row + noted(base, 8) * by_head
                                     + 8 * chunk * by_dim))
        store_tile(int32(base + place + row * 128 + ((chunk ^ line) << 4)), to, by_row, by_dim, int32(noted(base, 10) - key),
                   int32(dim - 8 * chunk), STORE_ROWS, count, KV_PANEL)

    @inline
    def epilogue(a, base, acc_dk, acc_dv):
        cuda.syncthreads()          # all warps have read K
        put(base, acc_dk, K, a.grad_scale)
        put(base, acc_dv, V, a.keep_scale if DROPOUT else float32(1))
        cuda.syncthreads()
        store(base, K, a.dk, a.dk_batch, a.dk_row, a.dk_head, a.dk_dim, a.head_dim, PANELS)
        store(base, V, a.dv, a.dv_batch, a.dv_row, a.dv_head, a.dv_dim, a.head_dim_v, PANELS_V)

    def kernel(a):
        t = int32(cuda.blockIdx.x)
        if t >= num_tiles(a):
            return
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 127) & -128)       # of a row of a panel
        n_block, head_k, batch, q_start, seqlen_q, k_start, seqlen_k, keys = tile_at(a, t)
        first = int32(n_block * BLOCK_N)
        m_min, full_min, full_max, m_max = key_bounds(a, first, BLOCK_N, seqlen_q, seqlen_k)
        if cuda.threadIdx.x == 0:
            store_shared_b64(base + TILE, uint64(a.q + uint64(batch * a.q_batch + q_start * a.q_row)))
            store_shared_b64(base + TILE + 8, uint64(a.dout + uint64(batch * a.dout_batch + q_start * a.dout_row)))
            note(base, 0, batch)
            note(base, 1, q_start)
            note(base, 2, seqlen_q)
            note(base, 3, seqlen_k)
            note(base, 4, first)
            note(base, 5, m_min)
            note(base, 6, full_min)
            note(base, 7, full_max)
            note(base, 8, head_k)
            note(base, 9, k_start)
            note(base, 10, keys)
            note(base, 11, m_max)
            note(base, 12, int32((head_k + 1) * a.group))
        cuda.syncthreads()
        acc_dk, acc_dv = zeros(COUNT_K), zeros(COUNT_V)
        if m_min < m_max:
            head, m, stage = int32(head_k * a.group), m_min, int32(0)
            there = True
            load_keys(a, base, batch, head_k, k_start, seqlen_k, first)
            load_queries(a, base, head, m, stage)
            while there:
                slope = prepare(a, noted(base, 0), head)
                acc_dk, acc_dv = step(a, base, acc_dk, acc_dv, slope, head, m, stage)
                head, m, there = following(base, head, m)
                stage = int32(stage ^ (STAGES - 1))
        epilogue(a, base, acc_dk, acc_dv)

    return kernel, smem.size - ALIGN + 128
