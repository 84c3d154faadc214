"""Backward for Hopper: a block takes 128 keys of one key head and goes through the queries that see them; dK and dV stay in registers.

    warpgroup 0     one thread asks the copy engine for K and V once, then for Q and lse, dO and delta of one query block after the other
    warpgroups 1, 2 64 keys each, scores transposed so that P^T and dS^T are operands as they come out of the accumulators:
                    S^T = K Q^T   P^T = exp2(S^T - lse)   dV += P^T dO
                    dP^T = V dO^T dS^T = P^T (dP^T - delta)   dK += dS^T Q   dQ = dS K, half of it each, from both halves of dS

    shared memory   K | V | Q_STAGES x Q | 2 x dO | 2 x dS | dQ of each warp | Q_STAGES x lse | 2 x delta | barriers
    K_FULL, V_FULL, Q_FULL[s], DO_FULL[s]     copy engine -> consumers: the bytes are there
    Q_EMPTY[s], DO_EMPTY[s]                   consumers -> producer: the place is free
    DS_FULL                                   consumers -> each other: all of dS is stored

dQ of a query block gets a part from every key block: each warp stores its 16 x 64 sums, which the copy engine adds to float32 memory one
step later, and postprocess.py rounds the total. A warp that asks for a product is held up until those before it have begun, so a product is
asked for where arithmetic follows that it does not feed:

    S, dQ of the block before | P | dK of the block before | dQ to shared memory | dP | dV | dS to shared memory

(Design: FlashAttention-3, Shah et al. 2024; what each part gave: docs/performance.md.)
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint8, uint64

from ..dsl.inline import inline
from ..ptx import mbarrier, tma, wgmma
from ..ptx.matrix import store_panels
from ..ptx.memory import shared_address
from ..ptx.sync import barrier, decrease_registers, fence_async, increase_registers, opaque, thread_index, uniform, warp
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.fragments import join, make_pack, make_unpack, part, scale_rows, zeros
from ..tile.gradients import (
    PIECE,
    exp2_columns,
    load_columns,
    make_add_dbias,
    make_any_far,
    make_dropout_transposed,
    make_kept_tile,
    make_near,
    make_store,
    multiply,
    store_piece,
)
from ..tile.mask import make_key_bounds
from ..tile.schedule import make_num_tiles, make_tile_at
from ..tile.scores import make_cap_of, make_score
from ..tile.smem import Smem, cleaned, copy_rows, init_clean, make_clear, make_next_stage
from ..tile.softmax import make_log2_scale
from .config import BLOCK_N, CONSUMERS, BackwardSm90Config


def make_backward(spec: Spec, config: BackwardSm90Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    DIM, BLOCK_M, Q_STAGES = config.dim, config.block_m, config.q_stages
    PANELS, Q_PANEL, KV_PANEL, DS_PANEL, DS_PANELS = DIM // 64, BLOCK_M * 128, BLOCK_N * 128, BLOCK_N * 128, BLOCK_M // 64
    Q_BYTES, KV_BYTES, DS_BYTES, ROW_BYTES = PANELS * Q_PANEL, PANELS * KV_PANEL, DS_PANELS * DS_PANEL, BLOCK_M * 4
    COUNT_S, COUNT_KV = BLOCK_M // 2, DIM // 2
    smem = Smem()
    K, V, Q, DO = smem.take(KV_BYTES), smem.take(KV_BYTES), smem.take(Q_STAGES * Q_BYTES), smem.take(2 * Q_BYTES)
    DS, DQ = smem.take(2 * DS_BYTES), smem.take(CONSUMERS * 4 * PIECE)
    LSE, DELTA = smem.take(Q_STAGES * ROW_BYTES, 128), smem.take(2 * ROW_BYTES, 128)
    K_FULL, V_FULL, Q_FULL, Q_EMPTY, DO_FULL, DO_EMPTY = (smem.barriers(n) for n in (1, 1, Q_STAGES, Q_STAGES, 2, 2))
    DS_FULL = smem.barriers(1)
    ROWS_CLEAN, KEYS_CLEAN = smem.barriers(2), smem.barriers(1)      # of the last blocks of a packed sequence
    WARPS, OWN_BARRIER = 4 * CONSUMERS, 1
    PACKED, DROPOUT, PRODUCERS = spec.packed, spec.dropout, 32 if spec.packed else 1
    SUM_DBIAS, SUM_DQ = spec.dbias is not None, not spec.deterministic
    CROWDED, HALVES, SOFTCAP = config.crowded, config.halves, spec.softcap
    COUNT_PART = COUNT_S // 2 if HALVES else COUNT_S
    qk, pv = wgmma.make_products(spec.dtype)
    dsk, dsq = wgmma.make_grad_products(spec.dtype)
    to_half = make_pack(spec.dtype)
    give_registers, take_registers = decrease_registers(24), increase_registers(240)
    key_bounds, limits_of, keep = make_key_bounds(spec, BLOCK_M)
    next_stage, store, add_dbias = make_next_stage(Q_STAGES), make_store(spec, DIM), make_add_dbias(spec)
    prepare, fetch, score = make_score(spec, COUNT_S, True, SQUEEZE=config.squeeze)
    any_far, (near_columns, _), log2_scale = make_any_far(BLOCK_M), make_near(spec), make_log2_scale(spec)
    cap_of, slopes = make_cap_of(spec), make_unpack("float16", True)
    draw, mark, pack_kept, grad = make_dropout_transposed(spec, COUNT_S)
    tile_at, num_tiles, first_row = make_tile_at(spec, BLOCK_N, True), make_num_tiles(spec), make_first_row(spec)
    clear_rows, clear_keys = make_clear(BLOCK_M, PANELS, 32), make_clear(BLOCK_N, PANELS, 32)
    keep_tile, kept_tile, _ = make_kept_tile(spec, smem)

    # ------------------------------------------------------------ load: the producer, one thread
    @inline
    def load(a, base, lane, m_min, m_max, head_k, plane, batch, q_start, k_row, seqlen_q, keys):
        """Lane 0 asks for tiles. A packed sequence's last blocks are cleaned by the warp, which the consumers wait for in their place."""
        if lane == 0:
            mbarrier.arrive_expect(base + K_FULL, int32(KV_BYTES))
            copy_rows(base, a.map_k, K_FULL, K, KV_PANEL, PANELS, k_row, head_k, plane)
        stage, phase, j = int32(0), int32(1), int32(0)
        for head in range(int32(head_k * a.group), int32(head_k * a.group + a.group)):
            line = first_row(a, batch, head, q_start)
            m = m_min
            while m < m_max:
                row, at = int32(q_start + m * BLOCK_M), int32(line + m * BLOCK_M)
                other = int32(j & 1)
                full, full_do = int32(Q_FULL + 8 * stage), int32(DO_FULL + 8 * other)
                mbarrier.wait(base + Q_EMPTY + 8 * stage, phase)
                if lane == 0:
                    mbarrier.arrive_expect(base + full, int32(Q_BYTES + ROW_BYTES))
                    copy_rows(base, a.map_q, full, Q + stage * Q_BYTES, Q_PANEL, PANELS, row, int32(head), plane)
                    tma.load_rows(base + LSE + stage * ROW_BYTES, a.map_rows, base + full, at, int32(0))
                    if j == 0:      # V behind what the first product needs
                        mbarrier.arrive_expect(base + V_FULL, int32(KV_BYTES))
                        copy_rows(base, a.map_v, V_FULL, V, KV_PANEL, PANELS, k_row, head_k, plane)
                mbarrier.wait(base + DO_EMPTY + 8 * other, int32(((j >> 1) & 1) ^ 1))
                if lane == 0:
                    mbarrier.arrive_expect(base + full_do, int32(Q_BYTES + ROW_BYTES))
                    copy_rows(base, a.map_dout, full_do, DO + other * Q_BYTES, Q_PANEL, PANELS, row, int32(head), plane)
                    tma.load_rows(base + DELTA + other * ROW_BYTES, a.map_rows, base + full_do, at, int32(1))
                if PACKED:
                    if j == 0 and keys < BLOCK_N:
                        mbarrier.wait(base + K_FULL, int32(0))
                        clear_keys(int32(base + K), keys, lane)
                        mbarrier.wait(base + V_FULL, int32(0))
                        clear_keys(int32(base + V), keys, lane)
                        cleaned(base + KEYS_CLEAN, lane)
                    if (m + 1) * BLOCK_M > seqlen_q:
                        mbarrier.wait(base + full, int32(phase ^ 1))
                        mbarrier.wait(base + full_do, int32((j >> 1) & 1))
                        clear_rows(int32(base + Q + stage * Q_BYTES), int32(seqlen_q - m * BLOCK_M), lane)
                        clear_rows(int32(base + DO + other * Q_BYTES), int32(seqlen_q - m * BLOCK_M), lane)
                        cleaned(base + ROWS_CLEAN + 8 * (head & 1), lane)
                stage, phase = next_stage(stage, phase)
                j = int32(j + 1)
                m = opaque(int32(m + 1))

    # ------------------------------------------------------------ the loop's parts
    @inline
    def products_s(base, w, acc_s, stage):
        return qk(acc_s, wgmma.k_major(base + K + w * 64 * 128), wgmma.k_major(base + Q + stage * Q_BYTES), DIM, BLOCK_N, BLOCK_M)

    @inline
    def products_dp(base, w, acc_dp, stage):
        return qk(acc_dp, wgmma.k_major(base + V + w * 64 * 128), wgmma.k_major(base + DO + stage * Q_BYTES), DIM, BLOCK_N, BLOCK_M)

    @inline
    def products_dq(base, w, acc_dq, buffer):
        """64 queries by 64 columns: with two panels of queries one of them, else one of two panels of columns."""
        queries, columns = (w, int32(0)) if DS_PANELS == 2 else (int32(0), w)
        return dsk(acc_dq, wgmma.mn_major(base + DS + buffer * DS_BYTES + queries * DS_PANEL, DS_PANEL),
                   wgmma.mn_major(base + K + columns * KV_PANEL, KV_PANEL), BLOCK_N)

    @inline
    def products_dk(base, w, acc_dk, buffer, stage):
        return dsq(acc_dk, wgmma.k_major(base + DS + buffer * DS_BYTES + w * 64 * 128), wgmma.mn_major(base + Q + stage * Q_BYTES, Q_PANEL),
                   BLOCK_M, BLOCK_N)

    @inline
    def store_ds(base, ds, buffer, w, thread, lane):
        """Own half of dS^T, keys by queries, for the products that need all of it. Its fence is dQ's too, which waits beside it."""
        row = int32(w * 64 + (thread >> 5) * 16 + (lane & 15))
        store_panels(ds, int32(base + DS + buffer * DS_BYTES + row * 128), int32(((lane & 7) << 4) ^ ((lane >> 4) << 4)), DS_PANEL,
                     DS_PANELS, 0)
        fence_async()
        barrier(int32(OWN_BARRIER + w), int32(128))     # dK takes what its own warpgroup has stored, and lse and delta have been read
        if SUM_DQ:
            if thread == 0:
                mbarrier.arrive(base + DS_FULL)

    @inline
    def store_dq(base, acc_dq, w, thread, lane):
        """A warp's sums to its piece of shared memory, when the copy engine has read what was there."""
        place = int32(base + DQ + (w * 4 + (thread >> 5)) * PIECE)
        tma.wait_read()
        warp()
        store_piece(acc_dq, int32(place + lane * 16))

    @inline
    def row_before(a, batch, q_start, head, m, m_min, m_max):
        """The first row, in a.accum, of the query block that comes before m of `head`."""
        again = m == m_min
        m, head = m_max if again else m, int32(head - 1) if again else head
        return int32(first_row(a, batch, head, q_start) + (m - 1) * BLOCK_M)

    @inline
    def send_dq(a, base, w, thread, row):
        """The piece is added to the sums in memory, `row` its query block's first there: 32 bits, for 2**31 rows would not fit any memory;
        negative: there is none yet. After a fence by all lanes and a meeting of them."""
        own = int32(w * 4 + (thread >> 5))
        # a block of 64 rows: panels of 64 columns, of four pieces each
        block = uint64(int64(row) * (4 * DIM)) + uint64(own * PIECE)
        tma.reduce_add_f32_if(int32(1) if ((thread & 31) == 0) & (row >= 0) else int32(0), uint64(a.accum + block),
                              int32(base + DQ + own * PIECE), int32(PIECE))
        tma.commit()

    @inline
    def hold(base):
        """A wait that was over long ago, which keeps what stands before it there: see backward_sm90_dq."""
        mbarrier.wait(base + K_FULL, int32(0))

    @inline
    def dropped(a, p, key, query, plane):
        """P with what dropout drops marked, and the operand of dV's product."""
        p = mark(a, p, draw(a, key, query, plane))
        return p, pack_kept(p)

    def make_step(FIRST):
        @inline
        def step(a, base, w, acc_dk, acc_dv, walk, seen, place):
            """The block m of `head`: its S, dP, P, dS and dV, and beside them dQ and dK of the block before, whose dS is there."""
            j, stage, phase, head, m, waiting, slope = walk
            m_min, m_max, full_min, full_max = seen
            first, batch, q_start, seqlen_q, seqlen_k = place
            w, other, before = opaque(w), int32(j & 1), stage     # opaque: what follows takes no registers
            thread = int32(thread_index() & 127)
            lane, col = int32(thread & 31), int32((thread & 3) * 2)
            key, query = int32(first + (thread >> 5) * 16 + (lane >> 2)), int32(m * BLOCK_M + col)
            if not FIRST:
                stage, phase = next_stage(stage, phase)
            if PACKED:
                ragged = (m + 1) * BLOCK_M > seqlen_q
                full = int32(base + (ROWS_CLEAN + 8 * (head & 1) if ragged else Q_FULL + 8 * stage))
                mbarrier.wait(full, int32((head >> 1) & 1 if ragged else phase))
            else:
                mbarrier.wait(base + Q_FULL + 8 * stage, phase)
            wgmma.fence()
            acc_s = products_s(base, w, zeros(COUNT_S), stage)
            wgmma.commit()
            if not FIRST:
                if SUM_DQ:
                    mbarrier.wait(base + DS_FULL, int32(other ^ 1))
                    acc_dq = products_dq(base, w, zeros(32), int32(other ^ 1))
                wgmma.commit()
                if CROWDED:
                    acc_dk = products_dk(base, w, acc_dk, int32(other ^ 1), before)
                    wgmma.commit()
                if SUM_DQ:
                    send_dq(a, base, w, thread, waiting)
                    waiting = row_before(a, batch, q_start, head, m, m_min, m_max)
            lse_at = int32(base + LSE + stage * ROW_BYTES + 4 * col)
            if HALVES:
                lses = load_columns(lse_at, COUNT_PART)
            far = any_far(int32(base + LSE + stage * ROW_BYTES))        # here, where all that runs beside S has been issued
            if FIRST:
                acc_s = wgmma.wait_all(acc_s)
            else:
                acc_s = wgmma.wait_all_but_one(acc_s)
                if CROWDED and SUM_DQ:
                    store_dq(base, wgmma.wait_all_but_one(acc_dq), w, thread, lane)
                if lane == 0:
                    mbarrier.arrive(base + DO_EMPTY + 8 * (other ^ 1))
            early = fetch(a, batch, head, query, key, seqlen_q, seqlen_k)
            if SOFTCAP:
                acc_s, cap_slope = cap_of(a, acc_s)
            acc_s = score(a, acc_s, early, slope, query, key, int32(seqlen_k - seqlen_q))
            if (m < full_min) | (m >= full_max) | (far != 0):       # one branch: most blocks are neither
                acc_s = keep(acc_s, limits_of(a, key, seqlen_q, seqlen_k), query)
                if far != 0:
                    at = uint64(4 * (first_row(a, opaque(batch), head, q_start) + int64(query)))      # opaque: computed here
                    acc_s = near_columns(a, acc_s, lse_at, uint64(a.row_lse + at))
            scale, plane = log2_scale(a), int32(batch * a.num_heads + head)
            if HALVES:
                left = exp2_columns(part(acc_s, 0, 2), scale, lses)
            else:
                p, p_half = dropped(a, exp2_columns(acc_s, scale, load_columns(lse_at, COUNT_PART)), key, query, plane)
            if not FIRST and not CROWDED:
                hold(base)
                wgmma.fence()
                acc_dk = products_dk(base, w, acc_dk, int32(other ^ 1), before)
                wgmma.commit()
                if SUM_DQ:
                    hold(base)
                    store_dq(base, wgmma.wait_all_but_one(acc_dq), w, thread, lane)
            if HALVES:
                lses = load_columns(int32(lse_at + 2 * BLOCK_M), COUNT_PART)
            if FIRST:
                mbarrier.wait(base + V_FULL, int32(0))
            mbarrier.wait(base + DO_FULL + 8 * other, int32((j >> 1) & 1))
            wgmma.fence()
            if CROWDED:
                acc_dv = pv(acc_dv, p_half, wgmma.mn_major(base + DO + other * Q_BYTES, Q_PANEL))
                wgmma.commit()
                acc_dv = wgmma.wait_all(acc_dv)     # and P's registers are free
                wgmma.fence()
                acc_dp = products_dp(base, w, zeros(COUNT_S), other)
                wgmma.commit()
                acc_dp = wgmma.wait_all(acc_dp)
            else:
                acc_dp = products_dp(base, w, zeros(COUNT_S), other)
                wgmma.commit()
                if HALVES:
                    p, p_half = dropped(a, join(left, exp2_columns(part(acc_s, 1, 2), scale, lses)), key, query, plane)
                    wgmma.fence()
                acc_dv = pv(acc_dv, p_half, wgmma.mn_major(base + DO + other * Q_BYTES, Q_PANEL))
                wgmma.commit()
                acc_dp = wgmma.wait_all_but_one(acc_dp)
            thread = int32(thread_index() & 127)
            lane, col = int32(thread & 31), int32((thread & 3) * 2)
            if not FIRST:
                if lane == 0:
                    mbarrier.arrive(base + Q_EMPTY + 8 * before)
            acc_ds = grad(a, p, acc_dp, load_columns(int32(base + DELTA + other * ROW_BYTES + 4 * col), COUNT_S))
            if SUM_DBIAS:
                key, query = int32(first + (thread >> 5) * 16 + (lane >> 2)), int32(m * BLOCK_M + col)
                add_dbias(a, acc_ds, batch, head, query, key, seqlen_q, seqlen_k)
            if SOFTCAP:
                acc_ds = multiply(acc_ds, slopes(cap_slope))
            store_ds(base, to_half(acc_ds), other, w, thread, lane)
            j, m = int32(j + 1), int32(m + 1)
            if m == m_max:
                m, head = m_min, int32(head + 1)
                slope = prepare(a, batch, int32(min(head, a.num_heads - 1)))
            return acc_dk, acc_dv, (j, stage, phase, head, m, waiting, slope)
        return step

    step_first, step = make_step(True), make_step(False)

    @inline
    def consume(a, base, w, thread, lane, m_min, full_min, full_max, m_max, n_block, head_k, batch, q_start, seqlen_q, seqlen_k):
        """(acc_dk, acc_dv) of a warpgroup's 64 keys, seen by at least one block of queries."""
        count = uniform(int32((m_max - m_min) * a.group))
        seen = (m_min, m_max, full_min, full_max)
        place = (int32(n_block * BLOCK_N + w * 64), batch, q_start, seqlen_q, seqlen_k)
        head = int32(head_k * a.group)
        walk = (int32(0), int32(0), int32(0), head, m_min, int32(-1), prepare(a, batch, head))
        mbarrier.wait(base + K_FULL, int32(0))
        if PACKED:
            if (n_block + 1) * BLOCK_N > seqlen_k:
                mbarrier.wait(base + KEYS_CLEAN, int32(0))
        acc_dk, acc_dv, walk = step_first(a, base, w, zeros(COUNT_KV), zeros(COUNT_KV), walk, seen, place)
        while walk[0] < count:
            acc_dk, acc_dv, walk = step(a, base, w, acc_dk, acc_dv, walk, seen, place)
        last = int32((walk[0] - 1) & 1)
        wgmma.fence()
        if SUM_DQ:
            mbarrier.wait(base + DS_FULL, last)
            send_dq(a, base, w, thread, walk[5])
            acc_dq = products_dq(base, w, zeros(32), last)
        wgmma.commit()
        acc_dk = products_dk(base, w, acc_dk, last, walk[1])
        wgmma.commit()
        if SUM_DQ:
            acc_dq = wgmma.wait_all_but_one(acc_dq)
            store_dq(base, acc_dq, w, thread, lane)
            fence_async()
            warp()
            send_dq(a, base, w, thread, row_before(a, batch, q_start, walk[3], walk[4], m_min, m_max))
        acc_dv = wgmma.wait_all(acc_dv)
        return wgmma.wait_all(acc_dk), acc_dv

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 1023) & -1024)
        warpgroup, thread = uniform(int32(cuda.threadIdx.x >> 7)), int32(cuda.threadIdx.x & 127)
        t, tiles, leads = int32(cuda.blockIdx.x), num_tiles(a), cuda.threadIdx.x == 0
        n_block, head_k, batch, q_start, seqlen_q, k_start, seqlen_k, keys = tile_at(a, t)      # on its way meanwhile
        if leads:
            for map_ in (a.map_k, a.map_q, a.map_rows, a.map_v, a.map_dout):
                tma.prefetch_map(map_)
            mbarrier.init(base + K_FULL, int32(1))
            mbarrier.init(base + V_FULL, int32(1))
            for s in range(Q_STAGES):
                mbarrier.init(base + Q_FULL + 8 * s, int32(1))
                mbarrier.init(base + Q_EMPTY + 8 * s, int32(WARPS))
            for s in range(2):
                mbarrier.init(base + DO_FULL + 8 * s, int32(1))
                mbarrier.init(base + DO_EMPTY + 8 * s, int32(WARPS))
            mbarrier.init(base + KEYS_CLEAN, int32(1))
            mbarrier.init(base + DS_FULL, int32(CONSUMERS))
        if t < tiles:
            first, plane = int32(n_block * BLOCK_N), int32(0) if PACKED else batch
            m_min, _, _, m_max = key_bounds(a, first, BLOCK_N, seqlen_q, seqlen_k)
            m_min, m_max = uniform(m_min), uniform(m_max)
            if leads:
                init_clean(base, ROWS_CLEAN, int32(head_k * a.group))
                keep_tile(base, n_block, head_k, batch, k_start, seqlen_k, keys, q_start)
                mbarrier.fence_init()
            cuda.syncthreads()
            if warpgroup == 0:
                give_registers()
                if thread < PRODUCERS and m_min < m_max:
                    load(a, base, thread, m_min, m_max, head_k, plane, batch, q_start, int32(k_start + first), seqlen_q,
                         int32(seqlen_k - first))
            else:
                take_registers()
                w, lane = int32(warpgroup - 1), int32(thread & 31)
                _, full_min, full_max, _ = key_bounds(a, int32(first + w * 64), 64, seqlen_q, seqlen_k)
                full_min, full_max = uniform(full_min), uniform(full_max)
                acc_dk, acc_dv = zeros(COUNT_KV), zeros(COUNT_KV)
                if m_min < m_max:
                    acc_dk, acc_dv = consume(a, base, w, thread, lane, m_min, full_min, full_max, m_max, n_block, head_k, batch, q_start,
                                             seqlen_q, seqlen_k)
                n_block, head_k, batch, k_start, used, keys = kept_tile(base)
                key, plane = int32(n_block * BLOCK_N + w * 64 + (thread >> 5) * 16 + (lane >> 2)), int32(0) if PACKED else batch
                if DROPOUT:
                    acc_dv = scale_rows(acc_dv, a.keep_scale, a.keep_scale)
                to_v = int64(a.dv) + plane * a.dv_batch + head_k * a.dv_head + k_start * a.dv_row
                store(acc_dv, to_v, a.dv_row, a.head_dim_v, lane, key, used, keys)
                acc_dk = scale_rows(acc_dk, a.grad_scale, a.grad_scale)
                to_k = int64(a.dk) + plane * a.dk_batch + head_k * a.dk_head + k_start * a.dk_row
                store(acc_dk, to_k, a.dk_row, a.head_dim, lane, key, used, keys)
                tma.wait_read()     # what is left of dQ has left shared memory, which ends with the block

    return kernel, smem.size
