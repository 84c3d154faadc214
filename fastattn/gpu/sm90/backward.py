"""Backward for Hopper: a block owns 128 keys of one key head and loops over the queries that attend them; dK and dV stay in registers.
At 192/128 and in deterministic calls it computes these two alone: no dQ.

    warpgroup 0     one thread issues the TMA loads of K and V once, then of Q and lse, dO and delta of one query block after the other
    warpgroup 3     at small head sizes and with two blocks of queries: dQ of all keys (BackwardSm90Config.split)
    warpgroups 1, 2 64 keys each, scores transposed so that P^T and dS^T are operands as they come out of the accumulators:
                    S^T = K Q^T   P^T = exp2(S^T - lse)   dV += P^T dO
                    dP^T = V dO^T dS^T = P^T (dP^T - delta)   dK += dS^T Q   dQ = dS K, half of it each, from both halves of dS

    pair            the two tiles of keys of a head as a cluster: each thread block stores dQ of one block of queries (dq_sums.make_dq_pair)
    shared memory   K | V | Q_STAGES x Q | 2 x dO | 2 x dS | dQ of each warp | Q_STAGES x lse | 2 x delta | barriers
                    a bias that TMA copies arrives with Q, in the buffer of its block's dS; Q then has two stages, as dS has two buffers
    K_FULL, V_FULL, Q and dO rings: FULL      TMA -> consumers: the bytes have arrived; lse arrives with Q, delta with dO
    Q and dO rings: EMPTY                     consumers -> producer: the slot may be overwritten
    DS_FULL                                   consumers -> each other: all of dS is stored

Every key block adds to dQ of a query block: each warp stores its 16 x 64 sums to shared memory, TMA adds them to float32 memory one
step later, and postprocess.py rounds the total. Issuing a wgmma blocks until the earlier ones have started. Each is therefore issued
right before arithmetic that does not depend on it:

    S, dQ of the block before | P | dK of the block before | dQ to shared memory | dP | dV | dS to shared memory

(Design: FlashAttention-3, Shah et al. 2024; what each part gave: docs/performance.md.)
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint8, uint64

from ..dsl.inline import inline
from ..flex.derived import is_rated
from ..ptx import cluster, mbarrier, tma, wgmma
from ..ptx.matrix import store_panels
from ..ptx.memory import load_b32, shared_address
from ..ptx.sync import barrier, decrease_registers, fence_async, increase_registers, opaque, take_turn, uniform, warp
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.bias import make_bias_tile, tile_bytes
from ..tile.fragments import join, make_pack, own_zeros, part, thread_col, zeros
from ..tile.gradients import (
    PIECE,
    exp2_columns,
    load_columns,
    make_add_dbias,
    make_any_far,
    make_dropout_transposed,
    make_grad_rounded,
    make_kept_tile,
    make_near,
    multiply,
)
from ..tile.mask import make_key_bounds
from ..tile.ring import make_barrier, make_ring, make_tails
from ..tile.schedule import make_key_row, make_num_tiles, make_tile_at
from ..tile.scores import make_cap_of, make_rated_score, make_score, make_slopes
from ..tile.smem import ALIGN, ROW_BYTES, WARPGROUP, WARPGROUP_ROWS, Smem, copy_rows, make_clear, panels
from ..tile.softmax import make_log2_scale
from ..tile.traced import make_hide, times_rate
from ..tile.words import make_kept_queries
from .config import BLOCK_N, CONSUMERS, BackwardSm90Config
from .consumer import Queries, Tile, Walk, make_order, own_lane, own_thread, own_warpgroup
from .dq_sums import make_dq_stores, make_dq_warpgroup
from .key_gradients import make_store_keys
from .mmas import Places, columns_of_dq, make_mmas
from .seen_queries import make_seen_queries


def make_backward(spec: Spec, config: BackwardSm90Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    # constants: tile sizes, bytes, registers a thread
    DIM, DIM_V, BLOCK_M, Q_STAGES = config.dim, config.dim_v, config.block_m, config.q_stages
    PANELS, PANELS_V, Q_PANEL, KV_PANEL = panels(DIM), panels(DIM_V), BLOCK_M * ROW_BYTES, BLOCK_N * ROW_BYTES
    DS_PANEL, DS_PANELS = BLOCK_N * ROW_BYTES, panels(BLOCK_M)
    Q_BYTES, DO_BYTES, K_BYTES, V_BYTES = PANELS * Q_PANEL, PANELS_V * Q_PANEL, PANELS * KV_PANEL, PANELS_V * KV_PANEL
    COUNT_S, COUNT_K, COUNT_V, DS_BYTES, LSE_BYTES = BLOCK_M // 2, DIM // 2, DIM_V // 2, DS_PANELS * DS_PANEL, BLOCK_M * 4
    COUNT_DQ, SPLIT = columns_of_dq(config)[0], config.split
    WARPS, PRODUCERS, PACKED, SOFTCAP, BIAS_TILES = 4 * CONSUMERS, 32 if spec.packed else 1, spec.packed, spec.softcap, spec.bias_tiles
    BIAS_LATE, BIAS_BYTES = spec.bias is not None and not BIAS_TILES, tile_bytes(BLOCK_M, BLOCK_N) if BIAS_TILES else 0
    SUM_DBIAS, APART, ONE_TILE, PAIR = spec.dbias is not None, config.apart, config.one_tile, config.pair
    ADD_DQ, OWN_DQ = not spec.deterministic, not (spec.deterministic or SPLIT)      # to sums in memory; by the warpgroups that compute dS

    # shared memory and barriers
    smem = Smem()
    K, V, Q, DO = smem.take(K_BYTES), smem.take(V_BYTES), smem.take(Q_STAGES * Q_BYTES), smem.take(2 * DO_BYTES)
    DS, DQ = smem.take(2 * DS_BYTES), smem.take(CONSUMERS * 4 * PIECE if ADD_DQ and (PAIR or not ONE_TILE) else 0)
    LSE, DELTA = smem.take(Q_STAGES * LSE_BYTES, 128), smem.take(2 * LSE_BYTES, 128)
    k_full, v_full = make_barrier(smem), make_barrier(smem)
    q_ring, do_ring = make_ring(smem, Q_STAGES, WARPS), make_ring(smem, 2, WARPS)
    ds_full = make_barrier(smem, CONSUMERS)
    ds_ring: Any = make_ring(smem, 2, 4, CONSUMERS) if SPLIT else None      # dS to the warpgroup of dQ
    bias_read: Any = make_barrier(smem, WARPS) if BIAS_TILES else None
    assert not BIAS_TILES or (Q_STAGES == 2 and BIAS_BYTES == DS_BYTES)
    tails, keys_cleared = make_tails(smem, q_ring), make_barrier(smem)      # of the last blocks of a packed sequence
    (keep_tile, kept_tile, _), DS_BARRIER = make_kept_tile(spec, smem), smem.named(CONSUMERS)       # a barrier for each warpgroup

    # what the steps are made of
    mma_s, mma_dp, mma_dv, mma_dq, mma_dk = make_mmas(spec, config, Places(K, V, Q, DO, DS))
    to_half, give_registers, take_registers = make_pack(spec.dtype), decrease_registers(24), increase_registers(config.registers)
    (key_bounds, limits_of, keep, alibi_from), kept_queries = make_key_bounds(spec, BLOCK_M), make_kept_queries(spec, BLOCK_N)
    store_keys, add_dbias, key_row = make_store_keys(spec, config, kept_tile), make_add_dbias(spec), make_key_row(BLOCK_N)
    copy_bias, lane_address, read_bias = make_bias_tile(spec, BLOCK_M, BLOCK_N, COUNT_S, True)
    read, RATED, SEEN = read_bias if BIAS_TILES else None, is_rated(spec), spec.mask_mod is not None
    prepare_score, fetch, score = (make_rated_score(spec, COUNT_S) if RATED else
                                   make_score(spec, COUNT_S, True, SQUEEZE=config.squeeze, READ_BIAS=read))
    (prepare_mask, hide), seen = make_hide(spec.mask_mod, True), make_seen_queries(spec, config, smem)
    any_far, (near_columns, _), log2_scale = make_any_far(BLOCK_M), make_near(spec), make_log2_scale(spec)
    cap_of, slopes = make_cap_of(spec), make_slopes(spec)
    store_dq, send_dq, end_dq, clear_dq = make_dq_stores(spec, config, DQ)
    take_dq_registers, add_dq = make_dq_warpgroup(spec, config, (k_full, keys_cleared, ds_ring), (mma_dq, store_dq, send_dq))
    first_block, next_block, is_block, row_before = make_order(spec, config)
    plane_of, draw, mark, pack_kept, grad = make_dropout_transposed(spec, COUNT_S)
    grad_rounded: Any = make_grad_rounded(spec.dtype) if SPLIT else None
    tile_at, num_tiles, first_row = make_tile_at(spec, BLOCK_N, True), make_num_tiles(spec), make_first_row(spec)
    clear_q, clear_do, clear_k, clear_v = (make_clear(rows, count, 32) for rows in (BLOCK_M, BLOCK_N) for count in (PANELS, PANELS_V))

    # ------------------------------------------------------------ load: the producer, one thread (a warp if packed)
    @inline
    def load(a, base, lane, m_min, m_max, head_k, map_batch, batch, q_start, k_row, seqlen_q, keys):
        """Lane 0 issues the TMA loads. The warp clears the tails of a packed sequence's last blocks; consumers wait for that instead."""
        if lane == 0:
            k_full.arrive_expect(base, int32(K_BYTES))
            copy_rows(base, a.map_k, k_full.FULL, K, KV_PANEL, PANELS, k_row, head_k, map_batch)
        stage, phase, j = int32(0), int32(1), int32(0)
        for head in range(int32(head_k * a.group), int32(head_k * a.group + a.group)):
            head_row = first_row(a, batch, head, q_start)
            m, found = first_block(m_min, m_max), int32(0)
            if SEEN:
                found = seen.following(a, batch, head, k_row, m_min, m_max)
                m = int32(found >> 1)
            while is_block(m, m_min, m_max):
                row, lse_row = int32(q_start + m * BLOCK_M), int32(head_row + m * BLOCK_M)
                stage_do = int32(j & 1)
                full, full_do = q_ring.full(stage), do_ring.full(stage_do)
                q_ring.wait_empty(base, stage, phase)
                if lane == 0:
                    if SEEN:
                        seen.tell(base, stage, head, found)
                    mbarrier.arrive_expect(base + full, int32(Q_BYTES + LSE_BYTES + BIAS_BYTES))
                    copy_rows(base, a.map_q, full, Q + stage * Q_BYTES, Q_PANEL, PANELS, row, int32(head), map_batch)
                    tma.load_rows(base + LSE + stage * LSE_BYTES, a.map_rows, base + full, lse_row, int32(0))
                    if BIAS_TILES:      # the slot of Q of two blocks ago is empty, so its dS has been read, too
                        copy_bias(base, a, full, DS + stage * DS_BYTES, row, k_row, int32(head), map_batch)
                    if j == 0:      # V after what S needs
                        v_full.arrive_expect(base, int32(V_BYTES))
                        copy_rows(base, a.map_v, v_full.FULL, V, KV_PANEL, PANELS_V, k_row, head_k, map_batch)
                do_ring.wait_empty_nth(base, j)
                if lane == 0:
                    mbarrier.arrive_expect(base + full_do, int32(DO_BYTES + LSE_BYTES))
                    copy_rows(base, a.map_dout, full_do, DO + stage_do * DO_BYTES, Q_PANEL, PANELS_V, row, int32(head), map_batch)
                    tma.load_rows(base + DELTA + stage_do * LSE_BYTES, a.map_rows, base + full_do, lse_row, int32(1))
                if PACKED:
                    if j == 0 and keys < BLOCK_N:
                        k_full.wait(base, int32(0))
                        clear_k(int32(base + K), keys, lane)
                        v_full.wait(base, int32(0))
                        clear_v(int32(base + V), keys, lane)
                        keys_cleared.publish(base, lane)
                    if (m + 1) * BLOCK_M > seqlen_q:
                        mbarrier.wait(base + full, int32(phase ^ 1))
                        mbarrier.wait(base + full_do, int32((j >> 1) & 1))
                        clear_q(int32(base + Q + stage * Q_BYTES), int32(seqlen_q - m * BLOCK_M), lane)
                        clear_do(int32(base + DO + stage_do * DO_BYTES), int32(seqlen_q - m * BLOCK_M), lane)
                        tails.publish(base, head, lane)
                stage, phase = q_ring.next(stage, phase)
                j = int32(j + 1)
                m = opaque(next_block(m))
                if SEEN:
                    found = seen.following(a, batch, head, k_row, m, m_max)
                    m = int32(found >> 1)

    # ------------------------------------------------------------ the parts of a step
    @inline
    def prepare(a, batch, head):
        """What rows of the head share: for scores, for a mask_mod."""
        return prepare_score(a, batch, head), prepare_mask(a, batch, head)

    @inline
    def store_ds(base, ds, j, w, thread, lane):
        """The warpgroup's half of dS^T, keys by queries, to shared memory. Its fence also covers the stored dQ, which TMA reads next."""
        buffer, row = int32(j & 1), int32(w * WARPGROUP_ROWS + (thread >> 5) * 16 + (lane & 15))
        if SPLIT:
            ds_ring.wait_empty_nth(base, j)
        store_panels(ds, int32(base + DS + buffer * DS_BYTES + row * ROW_BYTES), int32(((lane & 7) << 4) ^ ((lane >> 4) << 4)), DS_PANEL,
                     DS_PANELS, 0)
        fence_async()
        barrier(int32(DS_BARRIER + w), int32(WARPGROUP))    # dK reads what its own warpgroup has stored, and lse and delta have been read
        if SPLIT:
            if thread == 0:
                ds_ring.arrive_full(base, buffer)
        elif ADD_DQ:
            if thread == 0:
                ds_full.arrive(base)

    @inline
    def hold(base):
        """Scheduling fence: waits on a barrier that completed long ago; see backward_dq."""
        k_full.wait(base, int32(0))

    @inline
    def dropped(a, p, key, query, draw_head):
        """P with the dropped elements marked, and the 16-bit P of dV's MMA; draw_head is the flattened (batch, head) index."""
        p = mark(a, p, draw(a, key, query, draw_head))
        return p, pack_kept(p)

    @inline
    def wait_q(base, stage, phase, head, m, seqlen_q):
        """Until Q and lse of block m have arrived, in a packed sequence's last block without what follows the sequence."""
        if PACKED:
            tails.wait_full(base, stage, phase, head, (m + 1) * BLOCK_M > seqlen_q)
        else:
            q_ring.wait_full(base, stage, phase)

    @inline
    def issued(acc):
        """A product that was issued just now, as a group of its own."""
        wgmma.commit()
        return acc

    @inline
    def operands(a, base, w, buffer, batch, head, query, key, seqlen_q, seqlen_k):
        """Bias and mask of a block; for a bias in shared memory, where this lane reads it."""
        bias, mask = fetch(a, batch, head, query, key, seqlen_q, seqlen_k)
        if BIAS_TILES:
            first = int32(w * WARPGROUP_ROWS + (own_thread() >> 5) * 16)
            return lane_address(int32(base + DS + buffer * DS_BYTES), first, own_lane()), mask
        else:
            return bias, mask

    def make_step(FIRST, FAR, CROWDED, HALVES):
        # The schedules:
        # NEXT     there is a block before: its dS is in shared memory, its dQ and dK are computed in this step
        # FAR      far rows are looked for
        # CROWDED  register-bound: dK of the block before is issued right after S, its dQ is stored before the scores are touched, and dV
        #          ends before dP is issued
        # HALVES   P of the first half of the queries is computed before dP is issued, P of the second half after
        # OWN_DQ   dQ is summed over key blocks in memory, by this warpgroup (not if deterministic, and not if SPLIT)
        # ALWAYS   every block is masked, needed or not, in the loop of calls with far rows: two registers fewer
        ALWAYS = FAR and APART
        NEXT, COUNT_PART = not FIRST, COUNT_S // 2 if HALVES else COUNT_S
        wait_s = wgmma.wait_all_but_one if NEXT else wgmma.wait_all

        @inline
        def step(a, base, w, acc_dk, acc_dv, walk, queries, tile):
            """S, P, dP, dS and dV of block m of `head`, overlapped with dQ and dK of the block before."""
            j, stage, phase, head, m, waiting, shared = walk
            m_min, m_max, full_min, full_max = queries
            first, batch, q_start, seqlen_q, seqlen_k = tile
            w, other, before = opaque(w), int32(j & 1), stage     # opaque: what follows takes no registers
            thread = own_thread()
            lane, col = int32(thread & 31), thread_col(thread)
            key, query = int32(first + (thread >> 5) * 16 + (lane >> 2)), int32(m * BLOCK_M + col)
            if NEXT:
                stage, phase = q_ring.next(stage, phase)

            # S^T = K Q^T; of the block before dQ = dS K
            wait_q(base, stage, phase, head, m, seqlen_q)
            wgmma.fence()
            acc_s = issued(mma_s(base, w, zeros(COUNT_S), stage))
            if SEEN:
                head, m, full = seen.told(base, stage)
                shared, query = prepare(a, batch, head), int32(m * BLOCK_M + col)
            if not BIAS_LATE:       # in registers a bias takes so many that it is loaded only when S is there
                early = operands(a, base, w, other, batch, head, query, key, seqlen_q, seqlen_k)
            if NEXT:
                if OWN_DQ:
                    ds_full.wait(base, int32(other ^ 1))
                    acc_dq = mma_dq(base, w, zeros(COUNT_DQ), int32(other ^ 1))
                wgmma.commit()
                if CROWDED:
                    acc_dk = mma_dk(base, w, acc_dk, int32(other ^ 1), before)
                    wgmma.commit()
                if OWN_DQ:
                    send_dq(a, base, w, thread, waiting)
                    waiting = seen.row(a, base, before, batch) if SEEN else row_before(a, batch, q_start, head, m, m_min, m_max)
            lse_at = int32(base + LSE + stage * LSE_BYTES + 4 * col)
            if HALVES:
                lses = load_columns(lse_at, COUNT_PART)
            far = any_far(int32(base + LSE + stage * LSE_BYTES)) if FAR else int32(0)       # after all that overlaps with S was issued
            acc_s = wait_s(acc_s)
            if NEXT:
                if CROWDED and OWN_DQ:
                    store_dq(a, base, wgmma.wait_all_but_one(acc_dq), w, thread, lane, waiting, batch)
                do_ring.release(base, int32(other ^ 1), lane)

            # score, mask
            if BIAS_LATE:
                early = fetch(a, batch, head, query, key, seqlen_q, seqlen_k)
            if SOFTCAP:
                acc_s, cap_slope = cap_of(a, acc_s)
            if RATED:
                acc_s, cap_slope = score(a, acc_s, early, shared[0], query, key, alibi_from(a, batch, seqlen_q, seqlen_k))
            else:
                acc_s = score(a, acc_s, early, shared[0], query, key, alibi_from(a, batch, seqlen_q, seqlen_k))
            if SEEN:
                if full == 0:
                    acc_s = hide(acc_s, a, shared[1], batch, head, query, key)
            if BIAS_TILES:
                if lane == 0:
                    bias_read.arrive(base)
            if ALWAYS or (m < full_min) | (m >= full_max) | (far != 0):       # one branch: most blocks are neither
                acc_s = keep(acc_s, limits_of(a, batch, key, seqlen_q, seqlen_k), query)
                if FAR:
                    if far != 0:
                        at = uint64(4 * (first_row(a, opaque(batch), head, q_start) + int64(query)))      # opaque: computed here
                        acc_s = near_columns(a, acc_s, lse_at, uint64(a.row_lse + at))

            # P^T = exp2(S^T - lse)
            scale, draw_head = log2_scale(a), plane_of(a, batch, head)
            if HALVES:
                left = exp2_columns(part(acc_s, 0, 2), scale, lses)
            else:
                p, p_half = dropped(a, exp2_columns(acc_s, scale, load_columns(lse_at, COUNT_PART)), key, query, draw_head)

            # of the block before: dK += dS^T Q, dQ to shared memory
            if NEXT and not CROWDED:
                hold(base)
                wgmma.fence()
                acc_dk = mma_dk(base, w, acc_dk, int32(other ^ 1), before)
                wgmma.commit()
                if OWN_DQ:
                    hold(base)
                    store_dq(a, base, wgmma.wait_all_but_one(acc_dq), w, thread, lane, waiting, batch)
            if HALVES:
                lses = load_columns(int32(lse_at + 2 * BLOCK_M), COUNT_PART)

            # dP^T = V dO^T and dV += P^T dO
            if FIRST:
                v_full.wait(base, int32(0))
            do_ring.wait_full_nth(base, j)
            wgmma.fence()
            if CROWDED:
                acc_dv = wgmma.wait_all(issued(mma_dv(base, acc_dv, p_half, other)))      # and P's registers are free
                wgmma.fence()
                acc_dp = wgmma.wait_all(issued(mma_dp(base, w, zeros(COUNT_S), other)))
            else:
                acc_dp = issued(mma_dp(base, w, zeros(COUNT_S), other))
                if HALVES:
                    p, p_half = dropped(a, join(left, exp2_columns(part(acc_s, 1, 2), scale, lses)), key, query, draw_head)
                    wgmma.fence()
                acc_dv = issued(mma_dv(base, acc_dv, p_half, other))
                if SPLIT:       # P is read again: no MMA may have its registers
                    acc_dp, acc_dv = wgmma.wait_all(acc_dp), wgmma.wait_all(acc_dv)
                else:
                    acc_dp = wgmma.wait_all_but_one(acc_dp)

            # dS^T = P^T (dP^T - delta), to shared memory
            thread = own_thread()
            lane, col = int32(thread & 31), thread_col(thread)
            if NEXT:
                q_ring.release(base, before, lane)
            deltas = load_columns(int32(base + DELTA + other * LSE_BYTES + 4 * col), COUNT_S)
            acc_ds = grad_rounded(p_half, acc_dp, deltas) if SPLIT else grad(a, p, acc_dp, deltas)
            if SUM_DBIAS:
                key, query = int32(first + (thread >> 5) * 16 + (lane >> 2)), int32(m * BLOCK_M + col)
                add_dbias(a, acc_ds, batch, head, query, key, seqlen_q, seqlen_k)
            if RATED:
                acc_ds = times_rate(acc_ds, slopes(cap_slope))
            elif SOFTCAP:
                acc_ds = multiply(acc_ds, slopes(cap_slope))
            if BIAS_TILES:      # dS goes where the bias is, and a warp stores to parts that others have read
                bias_read.wait(base, other)
            store_ds(base, to_half(acc_ds), j, w, thread, lane)
            j, m = int32(j + 1), next_block(m)
            if not SEEN and not is_block(m, m_min, m_max):
                m, head = first_block(m_min, m_max), int32(head + 1)
                shared = prepare(a, batch, int32(min(head, a.num_heads - 1)))
            return acc_dk, acc_dv, Walk(j, stage, phase, head, m, waiting, shared)
        return step

    step_first, step = (make_step(FIRST, not APART, config.crowded, config.halves) for FIRST in (True, False))
    step_alone = make_step(True, True, True, False)

    @inline
    def finish(a, base, w, acc_dk, acc_dv, walk, queries, tile):
        """dQ and dK of the block before, whose slots may then be overwritten."""
        last, thread, lane = int32((walk.j - 1) & 1), own_thread(), own_lane()
        wgmma.fence()
        if PAIR:
            cluster.arrive()        # what the other thread block stores has been sent
        if OWN_DQ:
            ds_full.wait(base, last)
            send_dq(a, base, w, thread, walk.waiting)
            acc_dq = mma_dq(base, w, zeros(COUNT_DQ), last)
        wgmma.commit()
        acc_dk = mma_dk(base, w, acc_dk, last, walk.stage)
        wgmma.commit()
        if OWN_DQ:
            acc_dq, batch, head, (m_min, m_max, _, _) = wgmma.wait_all_but_one(acc_dq), tile.batch, walk.head, queries
            row = row_before(a, batch, tile.q_start, head, walk.m, m_min, m_max) if ONE_TILE else int32(0)
            end_dq(a, base, acc_dq, w, thread, lane, row, batch)
            fence_async()
            warp()
            send_dq(a, base, w, thread, seen.row(a, base, walk.stage, batch) if SEEN else
                    row_before(a, batch, tile.q_start, head, walk.m, m_min, m_max))
        acc_dv, acc_dk = wgmma.wait_all(acc_dv), wgmma.wait_all(acc_dk)
        q_ring.release(base, walk.stage, lane)
        do_ring.release(base, last, lane)
        stage, phase = q_ring.next(walk.stage, walk.phase)
        return acc_dk, acc_dv, Walk(walk.j, stage, phase, walk.head, walk.m, int32(-1), walk.shared)

    @inline
    def together(a, base, walk, queries, tile, count):
        """(acc_dk, acc_dv) over all `count` blocks of queries, counted over all heads."""
        w = own_warpgroup()
        acc_dk, acc_dv, walk = step_first(a, base, w, zeros(COUNT_K), zeros(COUNT_V), walk, queries, tile)
        while walk.j < count:
            acc_dk, acc_dv, walk = step(a, base, w, acc_dk, acc_dv, walk, queries, tile)
        acc_dk, acc_dv, _ = finish(a, base, w, acc_dk, acc_dv, walk, queries, tile)
        return acc_dk, acc_dv

    @inline
    def alone(a, base, walk, queries, tile, count):
        """`together` of a call with far rows, which is rare: block after block, so that the loop above has no code for them."""
        acc_dk, acc_dv, going = own_zeros(COUNT_K), own_zeros(COUNT_V), True
        while going:
            acc_dk, acc_dv, walk = step_alone(a, base, own_warpgroup(), acc_dk, acc_dv, walk, queries, tile)
            acc_dk, acc_dv, walk = finish(a, base, own_warpgroup(), acc_dk, acc_dv, walk, queries, tile)
            going = walk.j < count
        return acc_dk, acc_dv

    @inline
    def consume(a, base, queries, n_block, head_k, tile):
        """(acc_dk, acc_dv) of a warpgroup's 64 keys, attended by at least one block of queries."""
        count = (seen.count(a, tile.batch, head_k, n_block, queries.m_min, queries.m_max) if SEEN else
                 uniform(int32((queries.m_max - queries.m_min) * a.group)))
        head = int32(head_k * a.group)
        walk = Walk(int32(0), int32(0), int32(0), head, first_block(queries.m_min, queries.m_max), int32(-1), prepare(a, tile.batch, head))
        far = load_b32(a.far) if APART else int32(0)        # in flight while the keys are
        k_full.wait(base, int32(0))
        if PAIR:
            cluster.wait()          # until the other thread block has begun
        if PACKED:
            if (n_block + 1) * BLOCK_N > tile.seqlen_k:
                keys_cleared.wait(base, int32(0))
        if APART:
            if uniform(int32(1) if far == a.far_mark else int32(0)) != 0:
                return alone(a, base, walk, queries, tile, count)
        return together(a, base, walk, queries, tile, count)

    @inline
    def init_barriers(base):
        k_full.init(base)
        v_full.init(base)
        q_ring.init(base)
        do_ring.init(base)
        keys_cleared.init(base)
        ds_full.init(base)
        if SPLIT:
            ds_ring.init(base)
        if BIAS_TILES:
            bias_read.init(base)

    def kernel(a):
        take_turn()
        base = int32((shared_address(cuda.shared.array(0, uint8)) + ALIGN - 1) & -ALIGN)
        warpgroup, thread = uniform(int32(cuda.threadIdx.x >> 7)), int32(cuda.threadIdx.x & (WARPGROUP - 1))
        t, tiles, leads = int32(cuda.blockIdx.x), num_tiles(a), cuda.threadIdx.x == 0
        n_block, head_k, batch, q_start, seqlen_q, k_start, seqlen_k, keys = tile_at(a, t)      # in flight during what follows
        if leads:
            for map_ in (a.map_k, a.map_q, a.map_rows, a.map_v, a.map_dout):
                tma.prefetch_map(map_)
            init_barriers(base)
        if t < tiles:
            first, map_batch = int32(n_block * BLOCK_N), int32(0) if PACKED else batch
            m_min, _, _, m_max = key_bounds(a, batch, first, BLOCK_N, seqlen_q, seqlen_k)
            m_min, m_max = kept_queries(a, batch, head_k, first, seqlen_k, m_min, m_max)
            if SEEN:
                m_max = m_max if seen.count(a, batch, head_k, n_block, m_min, m_max) > 0 else m_min
            m_min, m_max = uniform(m_min), uniform(m_max)
            if leads:
                tails.init(base, int32(head_k * a.group))
                keep_tile(base, n_block, head_k, batch, k_start, seqlen_k, keys, q_start)
                mbarrier.fence_init()
            if PAIR:
                clear_dq(base, warpgroup, thread)
                cluster.arrive()
            cuda.syncthreads()
            if warpgroup == 0:
                give_registers()
                if thread < PRODUCERS and m_min < m_max:
                    load(a, base, thread, m_min, m_max, head_k, map_batch, batch, q_start, key_row(a, k_start, n_block), seqlen_q,
                         int32(seqlen_k - first))
            elif (warpgroup > CONSUMERS) if SPLIT else False:
                take_dq_registers()
                if m_min < m_max:
                    add_dq(a, base, m_min, m_max, head_k, batch, q_start, int32(seqlen_k - first))
            else:
                take_registers()
                w = int32(warpgroup - 1)
                _, full_min, full_max, _ = key_bounds(a, batch, int32(first + w * WARPGROUP_ROWS), WARPGROUP_ROWS, seqlen_q, seqlen_k)
                queries = Queries(m_min, m_max, uniform(full_min), uniform(full_max))
                acc_dk, acc_dv = zeros(COUNT_K), zeros(COUNT_V)
                if m_min < m_max:
                    tile = Tile(int32(n_block * BLOCK_N + w * WARPGROUP_ROWS), batch, q_start, seqlen_q, seqlen_k)
                    acc_dk, acc_dv = consume(a, base, queries, n_block, head_k, tile)
                store_keys(a, base, acc_dk, acc_dv)
                tma.wait_read()     # TMA has read the last dQ: shared memory ends with the block

    return kernel, smem.size
