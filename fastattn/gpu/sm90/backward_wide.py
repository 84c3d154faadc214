"""dK alone, or dV alone, for Hopper and head sizes over 128, where the registers do not hold both: a block owns 128 keys of one key head
and loops over the queries that attend them. With backward_dq these are three kernels and eight GEMMs instead of five.
Over 256 a block owns 64 keys, and each warpgroup computes all of P or dS and a slice of the gradient's columns.

    warpgroup 0     one thread issues the TMA loads of K (and V) once, then of Q and dO of one query block after the other
    warpgroups 1, 2 64 keys each; S, P, dP and dS stay in registers, transposed:
        part "dv"   S^T = K Q^T   P^T = exp2(S^T - lse)                                                       dV += P^T dO
        part "dk"   S^T = K Q^T   P^T = exp2(S^T - lse)   dP^T = V dO^T   dS^T = P^T (dP^T - delta)           dK += dS^T Q

    shared memory   K | V ("dk") | Q_STAGES x Q | DO_STAGES x dO | Q_STAGES x lse | Q_STAGES x delta ("dk") | barriers
    K_FULL, V_FULL, Q and dO rings: FULL      TMA -> consumers: the bytes have arrived; lse and delta arrive with Q
    Q and dO rings: EMPTY                     consumers -> producer: the slot may be overwritten
    tails             producer warp -> consumers: rows past a packed sequence's end are zeros, of Q and dO, or of each alone (APART)

A step issues S of its block, then the MMA of the gradient of the block before, with P or dS in registers, so that the exponentials overlap
with it. "dv" therefore keeps dO, "dk" keeps Q, a step longer than S does. Every sum is one chain in a fixed order: the same bits every run.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda, int32, int64, uint8, uint64

from ..dsl.inline import inline
from ..ptx import mbarrier, tma, wgmma
from ..ptx.memory import shared_address
from ..ptx.sync import decrease_registers, increase_registers, opaque, take_turn, uniform
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.fragments import make_pack, make_unpack, scale_rows, thread_col, zeros, zeros_packed
from ..tile.gradients import (
    exp2_columns,
    load_columns,
    make_add_dbias,
    make_any_far,
    make_dropout_transposed,
    make_kept_tile,
    make_near,
    make_store,
    multiply,
)
from ..tile.mask import make_key_bounds
from ..tile.ring import make_barrier, make_ring, make_tails
from ..tile.schedule import make_key_row, make_num_tiles, make_tile_at
from ..tile.scores import make_cap_of, make_score
from ..tile.smem import ALIGN, ROW_BYTES, TMA_ALIGN, WARPGROUP, WARPGROUP_ROWS, Smem, copy_rows, make_clear, panels
from ..tile.softmax import make_log2_scale
from ..tile.words import make_kept_queries
from .config import slice_dim
from .config_alone import WideSm90Config
from .consumer import Queries, make_fresh


class Walk(NamedTuple):
    """Where a consumer is: how many query blocks are left, the slots of Q and dO, the query head and block, and what rows of the head
    share (prepare)."""

    left: Any
    stage: Any
    phase: Any
    stage_do: Any
    phase_do: Any
    head: Any
    m: Any
    shared: Any


class Tile(NamedTuple):
    batch: Any
    seqlen_q: Any
    seqlen_k: Any


def make_wide(spec: Spec, config: WideSm90Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    # constants: tile sizes, bytes, registers a thread
    DK, Q_STAGES, DO_STAGES, BEHIND, LATE = config.part == "dk", config.q_stages, config.do_stages, config.behind, config.late
    BLOCK_M, BLOCK_N, SLICES, WARPS = config.block_m, config.block_n, config.slices, 4 * config.consumers
    HEAD_DIM, HEAD_DIM_V = spec.head_dim, spec.head_dim_v
    # each warpgroup has keys of its own, or a slice of the gradient's columns
    COLUMNS, ROWS_APART = slice_dim(HEAD_DIM if DK else HEAD_DIM_V, SLICES), WARPGROUP_ROWS if SLICES == 1 else 0
    PANELS, PANELS_V, SLICED_PANELS = panels(HEAD_DIM), panels(HEAD_DIM_V), SLICES * panels(COLUMNS)
    PANELS_Q, PANELS_DO = (SLICED_PANELS, PANELS_V) if DK else (PANELS, SLICED_PANELS)
    Q_PANEL, KV_PANEL, LSE_BYTES, LSE_SLOT = BLOCK_M * ROW_BYTES, BLOCK_N * ROW_BYTES, BLOCK_M * 4, max(BLOCK_M * 4, TMA_ALIGN)
    Q_BYTES, DO_BYTES, K_BYTES, V_BYTES = PANELS_Q * Q_PANEL, PANELS_DO * Q_PANEL, PANELS * KV_PANEL, PANELS_V * KV_PANEL
    KEYS_APART, COLUMNS_APART, SLICE_APART = (ROWS_APART * ROW_BYTES, 0, 0) if SLICES == 1 else (0, COLUMNS, panels(COLUMNS) * Q_PANEL)
    COUNT_S, COUNT_HALF, COUNT = BLOCK_M // 2, BLOCK_M // 4, COLUMNS // 2
    PRODUCERS, Q_ARRIVE = 32 if spec.packed else 1, Q_BYTES + (2 if DK else 1) * LSE_BYTES
    PACKED, DROPOUT, SOFTCAP, SUM_DBIAS = spec.packed, spec.dropout, spec.softcap, spec.dbias is not None and DK

    # shared memory and barriers
    smem = Smem()
    K, V, Q, DO = smem.take(K_BYTES), smem.take(V_BYTES if DK else 0), smem.take(Q_STAGES * Q_BYTES), smem.take(DO_STAGES * DO_BYTES)
    LSE, DELTA = smem.take(Q_STAGES * LSE_SLOT, TMA_ALIGN), smem.take(Q_STAGES * LSE_SLOT if DK else 0, TMA_ALIGN)
    k_full, v_full = make_barrier(smem), make_barrier(smem)
    q_ring, do_ring = make_ring(smem, Q_STAGES, WARPS), make_ring(smem, DO_STAGES, WARPS)
    # of dV, a single stage of dO is released in the step that waits for the next Q: a tail of Q that waits for dO's would wait for ever
    APART = PACKED and not DK and DO_STAGES == 1
    tails: Any = make_tails(smem, q_ring)
    do_tails: Any = make_tails(smem, do_ring) if APART else tails
    keep_tile, kept_tile, kept_q_start = make_kept_tile(spec, smem)

    # what the steps are made of
    qk, pv = wgmma.make_products(spec.dtype)
    fresh = make_fresh(SLICES)
    to_half = make_pack(spec.dtype)
    give_registers, take_registers = decrease_registers(config.producer_registers), increase_registers(config.consumer_registers)
    (key_bounds, limits_of, keep, alibi_from), kept_queries = make_key_bounds(spec, BLOCK_M), make_kept_queries(spec, BLOCK_N)
    prepare, fetch, score = make_score(spec, COUNT_S, True, SQUEEZE=config.squeeze)
    any_far, (near_columns, _), log2_scale = make_any_far(BLOCK_M), make_near(spec), make_log2_scale(spec)
    cap_of, slopes = make_cap_of(spec), make_unpack("float16", True)
    plane_of, draw, mark, pack_kept, grad = make_dropout_transposed(spec, COUNT_S)
    store, add_dbias, SIZE = make_store(spec, COLUMNS), make_add_dbias(spec), 4 if spec.out_dtype == "float32" else 2
    tile_at, num_tiles = make_tile_at(spec, BLOCK_N, True), make_num_tiles(spec)
    first_row, key_row = make_first_row(spec), make_key_row(BLOCK_N)
    clear_q, clear_do = make_clear(BLOCK_M, PANELS_Q, 32), make_clear(BLOCK_M, PANELS_DO, 32)

    # ------------------------------------------------------------ load: the producer, one thread (a warp if packed)
    @inline
    def load(a, base, lane, m_min, m_max, head_k, map_batch, batch, q_start, k_row, seqlen_q):
        """As in backward.py. Keys past the end need no clearing: they spoil only their own rows, which are stored as 0."""
        if lane == 0:
            k_full.arrive_expect(base, int32(K_BYTES))
            copy_rows(base, a.map_k, k_full.FULL, K, KV_PANEL, PANELS, k_row, head_k, map_batch)
        stage, phase, stage_do, phase_do, first = int32(0), int32(1), int32(0), int32(1), True
        for head in range(int32(head_k * a.group), int32(head_k * a.group + a.group)):
            head_row = first_row(a, batch, head, q_start)
            m = m_min
            while m < m_max:
                row, lse_row = int32(q_start + m * BLOCK_M), int32(head_row + m * BLOCK_M)
                full, full_do = q_ring.full(stage), do_ring.full(stage_do)
                q_ring.wait_empty(base, stage, phase)
                if lane == 0:
                    mbarrier.arrive_expect(base + full, int32(Q_ARRIVE))
                    copy_rows(base, a.map_q, full, Q + stage * Q_BYTES, Q_PANEL, PANELS_Q, row, int32(head), map_batch)
                    tma.load_rows(base + LSE + stage * LSE_SLOT, a.map_rows, base + full, lse_row, int32(0))
                    if DK:
                        tma.load_rows(base + DELTA + stage * LSE_SLOT, a.map_rows, base + full, lse_row, int32(1))
                        if first:
                            v_full.arrive_expect(base, int32(V_BYTES))
                            copy_rows(base, a.map_v, v_full.FULL, V, KV_PANEL, PANELS_V, k_row, head_k, map_batch)
                            first = False
                if APART:
                    if (m + 1) * BLOCK_M > seqlen_q:
                        mbarrier.wait(base + full, int32(phase ^ 1))
                        clear_q(int32(base + Q + stage * Q_BYTES), int32(seqlen_q - m * BLOCK_M), lane)
                        tails.publish(base, head, lane)
                do_ring.wait_empty(base, stage_do, phase_do)
                if lane == 0:
                    mbarrier.arrive_expect(base + full_do, int32(DO_BYTES))
                    copy_rows(base, a.map_dout, full_do, DO + stage_do * DO_BYTES, Q_PANEL, PANELS_DO, row, int32(head),
                              map_batch)
                if PACKED:
                    if (m + 1) * BLOCK_M > seqlen_q:
                        if not APART:
                            mbarrier.wait(base + full, int32(phase ^ 1))
                        mbarrier.wait(base + full_do, int32(phase_do ^ 1))
                        if not APART:
                            clear_q(int32(base + Q + stage * Q_BYTES), int32(seqlen_q - m * BLOCK_M), lane)
                        clear_do(int32(base + DO + stage_do * DO_BYTES), int32(seqlen_q - m * BLOCK_M), lane)
                        do_tails.publish(base, head, lane)
                stage, phase = q_ring.next(stage, phase)
                stage_do, phase_do = do_ring.next(stage_do, phase_do)
                m = opaque(int32(m + 1))

    # ------------------------------------------------------------ the MMAs
    @inline
    def mma_s(base, w, stage):
        """S^T = K Q^T of the warpgroup's keys."""
        return qk(zeros(COUNT_S), wgmma.k_major(fresh(base) + K + w * KEYS_APART), wgmma.k_major(base + Q + stage * Q_BYTES), HEAD_DIM,
                  BLOCK_N, BLOCK_M)

    @inline
    def mma_dp(base, w, stage_do):
        """dP^T = V dO^T."""
        return qk(zeros(COUNT_S), wgmma.k_major(fresh(base) + V + w * KEYS_APART), wgmma.k_major(base + DO + stage_do * DO_BYTES),
                  HEAD_DIM_V, BLOCK_N, BLOCK_M)

    @inline
    def mma_grad(base, w, acc, half, stage, stage_do):
        """dK += dS^T Q, or dV += P^T dO, of the warpgroup's columns; `half` is dS^T or P^T."""
        at = base + (Q + stage * Q_BYTES if DK else DO + stage_do * DO_BYTES) + w * SLICE_APART
        return pv(acc, half, wgmma.mn_major(at, Q_PANEL))

    @inline
    def issue_dp(base, w, stage_do, phase_do, first):
        if first:
            v_full.wait(base, int32(0))
        do_ring.wait_full(base, stage_do, phase_do)
        wgmma.fence()
        acc_dp = mma_dp(base, w, stage_do)
        wgmma.commit()
        return acc_dp

    @inline
    def issue_grad(base, w, acc, half, stage, stage_do):
        wgmma.fence()
        acc = mma_grad(base, w, acc, half, stage, stage_do)
        wgmma.commit()
        return acc

    @inline
    def wait_q(base, stage, phase, head, m, seqlen_q):
        """Until Q, lse and delta of block m have arrived, in a packed sequence's last block without what follows the sequence."""
        if PACKED:
            tails.wait_full(base, stage, phase, head, (m + 1) * BLOCK_M > seqlen_q)
        else:
            q_ring.wait_full(base, stage, phase)

    @inline
    def wait_do(base, stage_do, phase_do, head, m, queries, seqlen_q):
        """Until dO of the block before block m of `head` has arrived, as wait_q."""
        if APART:
            first = m == queries.m_min
            before, end = int32(head - 1 if first else head), int32(queries.m_max if first else m)
            do_tails.wait_full(base, stage_do, phase_do, before, end * BLOCK_M > seqlen_q)
        else:
            do_ring.wait_full(base, stage_do, phase_do)

    @inline
    def release(empty, lane):
        """As a ring's release; the address is computed before the branch."""
        if lane == 0:
            mbarrier.arrive(empty)

    @inline
    def hold(base):
        """Scheduling fence: waits on a barrier that completed long ago; see backward_dq."""
        k_full.wait(base, int32(0))

    def make_step(FIRST):
        # The schedules:
        # BETWEEN  the MMA of the gradient of the block before is issued right after S
        # LAST     it is the last MMA of the step (BEHIND); the first step has none
        # LATE     dP is issued when P is computed and that MMA has ended, else right after S
        NEXT, BETWEEN, LAST = not FIRST, not FIRST and not BEHIND, not FIRST and BEHIND
        wait_s = wgmma.wait(int(NEXT) + int(DK and not LATE))
        wait_dp = wgmma.wait_all_but_one if LAST else wgmma.wait_all
        wait_between = wgmma.wait_all_but_one if DK and not LATE else wgmma.wait_all

        @inline
        def step(a, base, w, lane, warp_keys, acc, half, walk, queries, tile):
            """P or dS of block m of `head`, overlapped with the MMA of the gradient of the block before, whose P or dS is `half`."""
            left, stage, phase, stage_do, phase_do, head, m, shared = walk
            m_min, m_max, full_min, full_max = queries
            batch, seqlen_q, seqlen_k = tile
            w, lane, before = opaque(w), opaque(lane), stage        # opaque: what follows from them is computed here, not kept in registers
            key, col = int32(warp_keys + (lane >> 2)), thread_col(lane)
            query = int32(m * BLOCK_M + col)
            if NEXT:
                stage, phase = q_ring.next(stage, phase)
                if DK:
                    stage_do, phase_do = do_ring.next(stage_do, phase_do)

            # S^T = K Q^T and dP^T = V dO^T of this block, dK += dS^T Q or dV += P^T dO of the block before
            wait_q(base, stage, phase, head, m, seqlen_q)
            wgmma.fence()
            acc_s = mma_s(base, w, stage)
            wgmma.commit()
            if BETWEEN:
                if not DK:
                    wait_do(base, stage_do, phase_do, head, m, queries, seqlen_q)
                acc = issue_grad(base, w, acc, half, before, stage_do)
            if DK and not LATE:
                acc_dp = issue_dp(base, w, stage_do, phase_do, FIRST)
            if LAST:
                acc = issue_grad(base, w, acc, half, before, stage_do)

            # score, mask
            early = fetch(a, batch, head, query, key, seqlen_q, seqlen_k)
            far = any_far(int32(base + LSE + stage * LSE_SLOT))
            acc_s = wait_s(acc_s)
            if SOFTCAP:
                acc_s, cap_slope = cap_of(a, acc_s)
            acc_s = score(a, acc_s, early, shared, query, key, alibi_from(a, batch, seqlen_q, seqlen_k))
            lse_at = int32(base + LSE + stage * LSE_SLOT + 4 * col)
            if (m < full_min) | (m >= full_max) | (far != 0):       # one branch: most blocks are neither
                acc_s = keep(acc_s, limits_of(a, batch, key, seqlen_q, seqlen_k), query)
                if far != 0:
                    at = uint64(4 * (first_row(a, batch, head, kept_q_start(base)) + int64(query)))
                    acc_s = near_columns(a, acc_s, lse_at, uint64(a.row_lse + at))

            # P^T = exp2(S^T - lse)
            p = exp2_columns(acc_s, log2_scale(a), load_columns(lse_at, COUNT_S))
            p = mark(a, p, draw(a, key, query, plane_of(a, batch, head)))

            # the block before: its gradient's MMA has ended
            if NEXT:
                hold(base)
            if BETWEEN:
                acc = wait_between(acc)
                release(q_ring.empty(base, before) if DK else do_ring.empty(base, stage_do), lane)
            if DK:
                # dS^T = P^T (dP^T - delta)
                if LATE:
                    acc_dp = issue_dp(base, w, stage_do, phase_do, FIRST)
                acc_dp = wait_dp(acc_dp)
                release(do_ring.empty(base, stage_do), lane)
                acc_ds = grad(a, p, acc_dp, load_columns(int32(base + DELTA + stage * LSE_SLOT + 4 * col), COUNT_S))
                if SUM_DBIAS:       # coordinates computed again: kept that long, they would spill
                    own = opaque(lane)
                    rows = seqlen_q if SLICES == 1 or w == 0 else int32(0)      # one of the warpgroups that have the same dS adds it
                    add_dbias(a, acc_ds, batch, head, int32(m * BLOCK_M + (own & 3) * 2), int32(warp_keys + (own >> 2)), rows, seqlen_k)
                if SOFTCAP:
                    acc_ds = multiply(acc_ds, slopes(cap_slope))
                if LAST:
                    hold(base)
                    acc = wgmma.wait_all(acc)
                    release(q_ring.empty(base, before), lane)
                half = to_half(acc_ds)
            else:
                release(q_ring.empty(base, stage), lane)       # S has ended and lse was read
                if NEXT:
                    stage_do, phase_do = do_ring.next(stage_do, phase_do)
                half = pack_kept(p)
            left, m = int32(left - 1), int32(m + 1)
            if m == m_max:
                m, head = m_min, int32(head + 1)
                shared = prepare(a, batch, int32(min(head, a.num_heads - 1)))
            return acc, half, Walk(left, stage, phase, stage_do, phase_do, head, m, shared)
        return step

    step_first, step = make_step(True), make_step(False)

    @inline
    def consume(a, base, w, thread, lane, queries, n_block, head_k, tile):
        """dK or dV of a warpgroup's 64 keys, attended by at least one block of queries."""
        blocks, head = uniform(int32((queries.m_max - queries.m_min) * a.group)), int32(head_k * a.group)
        warp_keys = int32(n_block * BLOCK_N + w * ROWS_APART + (thread >> 5) * 16)
        walk = Walk(blocks, int32(0), int32(0), int32(0), int32(0), head, queries.m_min, prepare(a, tile.batch, head))
        k_full.wait(base, int32(0))
        acc, half, walk = step_first(a, base, w, lane, warp_keys, zeros(COUNT), zeros_packed(COUNT_HALF), walk, queries, tile)
        while walk.left > 0:
            acc, half, walk = step(a, base, w, lane, warp_keys, acc, half, walk, queries, tile)
        if not DK:
            wait_do(base, walk.stage_do, walk.phase_do, walk.head, walk.m, queries, tile.seqlen_q)
        return wgmma.wait_all(issue_grad(base, w, acc, half, walk.stage, walk.stage_do))

    @inline
    def own_columns(dim, column):
        """How many of the warpgroup's columns there are."""
        if SLICES == 1:
            return dim
        else:
            return int32(min(dim - column, COLUMNS))

    @inline
    def init_barriers(base):
        k_full.init(base)
        v_full.init(base)
        q_ring.init(base)
        do_ring.init(base)

    def kernel(a):
        take_turn()
        base = int32((shared_address(cuda.shared.array(0, uint8)) + ALIGN - 1) & -ALIGN)
        warpgroup, thread = uniform(int32(cuda.threadIdx.x >> 7)), int32(cuda.threadIdx.x & (WARPGROUP - 1))
        t = int32(cuda.blockIdx.x)
        if t < num_tiles(a):
            n_block, head_k, batch, q_start, seqlen_q, k_start, seqlen_k, keys = tile_at(a, t)
            first, map_batch = int32(n_block * BLOCK_N), int32(0) if PACKED else batch
            m_min, _, _, m_max = key_bounds(a, batch, first, BLOCK_N, seqlen_q, seqlen_k)
            m_min, m_max = kept_queries(a, batch, head_k, first, seqlen_k, m_min, m_max)
            m_min, m_max = uniform(m_min), uniform(m_max)
            if cuda.threadIdx.x == 0:
                init_barriers(base)
                tails.init(base, int32(head_k * a.group))
                if APART:
                    do_tails.init(base, int32(head_k * a.group))
                keep_tile(base, n_block, head_k, batch, k_start, seqlen_k, keys, q_start)
                mbarrier.fence_init()
            cuda.syncthreads()
            if warpgroup == 0:
                give_registers()
                if thread < PRODUCERS and m_min < m_max:
                    load(a, base, thread, m_min, m_max, head_k, map_batch, batch, q_start, key_row(a, k_start, n_block), seqlen_q)
            else:
                take_registers()
                w, lane = int32(warpgroup - 1), int32(thread & 31)
                _, full_min, full_max, _ = key_bounds(a, batch, int32(first + w * ROWS_APART), WARPGROUP_ROWS, seqlen_q, seqlen_k)
                acc = zeros(COUNT)
                if m_min < m_max:
                    queries = Queries(m_min, m_max, uniform(full_min), uniform(full_max))
                    acc = consume(a, base, w, thread, lane, queries, n_block, head_k, Tile(batch, seqlen_q, seqlen_k))
                n_block, head_k, batch, k_start, used, keys = kept_tile(base)
                key, column = int32(n_block * BLOCK_N + w * ROWS_APART + (thread >> 5) * 16 + (lane >> 2)), int32(w * COLUMNS_APART)
                map_batch = int32(0) if PACKED else batch
                if DK:
                    acc = scale_rows(acc, a.grad_scale, a.grad_scale)
                    to = int64(a.dk) + map_batch * a.dk_batch + head_k * a.dk_head + k_start * a.dk_row + SIZE * column
                    store(acc, to, a.dk_row, own_columns(a.head_dim, column), lane, key, used, keys)
                else:
                    if DROPOUT:
                        acc = scale_rows(acc, a.keep_scale, a.keep_scale)
                    to = int64(a.dv) + map_batch * a.dv_batch + head_k * a.dv_head + k_start * a.dv_row + SIZE * column
                    store(acc, to, a.dv_row, own_columns(a.head_dim_v, column), lane, key, used, keys)

    return kernel, smem.size
