"""dK alone, or dV alone, for Hopper and head sizes over 128, where the registers do not hold both: a block takes 128 keys of one key head
and goes through the queries that see them; with backward_sm90_dq they are three kernels, eight products instead of five.

    warpgroup 0     one thread asks the copy engine for K (and V) once, then for Q and dO of one query block after the other
    warpgroups 1, 2 64 keys each, all in registers between the products, scores transposed:
        part "dv"   S^T = K Q^T   P^T = exp2(S^T - lse)                                                       dV += P^T dO
        part "dk"   S^T = K Q^T   P^T = exp2(S^T - lse)   dP^T = V dO^T   dS^T = P^T (dP^T - delta)           dK += dS^T Q

    shared memory   K | V ("dk") | Q_STAGES x Q | DO_STAGES x dO | Q_STAGES x lse | Q_STAGES x delta ("dk") | barriers
    K_FULL, V_FULL, Q_FULL[s], DO_FULL[s]     copy engine -> consumers: the bytes are there, with Q's those of lse and delta
    Q_EMPTY[s], DO_EMPTY[s]                   consumers -> producer: the place is free

A step issues S of its block, then the gradient's product of the block before out of registers, so that the exponentials run beside it.
"dv" therefore keeps dO, "dk" keeps Q, a step longer than S does. Every sum is one chain in a fixed order: the same bits every run.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint8, uint64

from ..dsl.inline import inline
from ..ptx import mbarrier, tma, wgmma
from ..ptx.memory import shared_address
from ..ptx.sync import decrease_registers, increase_registers, opaque, uniform
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.fragments import make_pack, make_unpack, scale_rows, zeros, zeros_packed
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
from ..tile.schedule import make_num_tiles, make_tile_at
from ..tile.scores import make_cap_of, make_score
from ..tile.smem import Smem, cleaned, copy_rows, init_clean, make_clear, make_next_stage, panels
from ..tile.softmax import make_log2_scale
from .config import BLOCK_N, CONSUMERS, WideSm90Config
from .config import WIDE_BLOCK_M as BLOCK_M


def make_wide(spec: Spec, config: WideSm90Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    DK, Q_STAGES, DO_STAGES, BEHIND, LATE = config.part == "dk", config.q_stages, config.do_stages, config.behind, config.late
    HEAD_DIM, HEAD_DIM_V, PANELS, PANELS_V = spec.head_dim, spec.head_dim_v, panels(spec.head_dim), panels(spec.head_dim_v)
    Q_PANEL, KV_PANEL, ROW_BYTES = BLOCK_M * 128, BLOCK_N * 128, BLOCK_M * 4
    Q_BYTES, DO_BYTES, K_BYTES, V_BYTES = PANELS * Q_PANEL, PANELS_V * Q_PANEL, PANELS * KV_PANEL, PANELS_V * KV_PANEL
    DIM = HEAD_DIM if DK else HEAD_DIM_V
    COUNT_S, COUNT_HALF, COUNT = BLOCK_M // 2, BLOCK_M // 4, DIM // 2
    smem = Smem()
    K, V, Q, DO = smem.take(K_BYTES), smem.take(V_BYTES if DK else 0), smem.take(Q_STAGES * Q_BYTES), smem.take(DO_STAGES * DO_BYTES)
    LSE, DELTA = smem.take(Q_STAGES * ROW_BYTES, 128), smem.take(Q_STAGES * ROW_BYTES if DK else 0, 128)
    K_FULL, V_FULL, Q_FULL, Q_EMPTY, DO_FULL, DO_EMPTY = (smem.barriers(n) for n in (1, 1, Q_STAGES, Q_STAGES, DO_STAGES, DO_STAGES))
    ROWS_CLEAN, PRODUCERS = smem.barriers(2), 32 if spec.packed else 1
    WARPS, Q_ARRIVE = 4 * CONSUMERS, Q_BYTES + (2 if DK else 1) * ROW_BYTES
    PACKED, DROPOUT, SOFTCAP, SUM_DBIAS = spec.packed, spec.dropout, spec.softcap, spec.dbias is not None and DK
    qk, pv = wgmma.make_products(spec.dtype)
    to_half = make_pack(spec.dtype)
    give_registers, take_registers = decrease_registers(24), increase_registers(240)
    key_bounds, limits_of, keep = make_key_bounds(spec, BLOCK_M)
    prepare, fetch, score = make_score(spec, COUNT_S, True, SQUEEZE=config.squeeze)
    any_far, (near_columns, _), log2_scale = make_any_far(BLOCK_M), make_near(spec), make_log2_scale(spec)
    cap_of, slopes = make_cap_of(spec), make_unpack("float16", True)
    draw, mark, pack_kept, grad = make_dropout_transposed(spec, COUNT_S)
    store, add_dbias = make_store(spec, DIM), make_add_dbias(spec)
    next_stage, next_do = make_next_stage(Q_STAGES), make_next_stage(DO_STAGES)
    tile_at, num_tiles, first_row = make_tile_at(spec, BLOCK_N, True), make_num_tiles(spec), make_first_row(spec)
    clear_q, clear_do = make_clear(BLOCK_M, PANELS, 32), make_clear(BLOCK_M, PANELS_V, 32)
    keep_tile, kept_tile, kept_q_start = make_kept_tile(spec, smem)

    # ------------------------------------------------------------ load: the producer, one thread
    @inline
    def load(a, base, lane, m_min, m_max, head_k, plane, batch, q_start, k_row, seqlen_q):
        """As in backward_sm90. Keys past the end need no cleaning: they spoil only their own rows, which are stored as 0."""
        if lane == 0:
            mbarrier.arrive_expect(base + K_FULL, int32(K_BYTES))
            copy_rows(base, a.map_k, K_FULL, K, KV_PANEL, PANELS, k_row, head_k, plane)
        stage, phase, stage_do, phase_do, first = int32(0), int32(1), int32(0), int32(1), True
        for head in range(int32(head_k * a.group), int32(head_k * a.group + a.group)):
            line = first_row(a, batch, head, q_start)
            m = m_min
            while m < m_max:
                row, at, full = int32(q_start + m * BLOCK_M), int32(line + m * BLOCK_M), int32(Q_FULL + 8 * stage)
                full_do = int32(DO_FULL + 8 * stage_do)
                mbarrier.wait(base + Q_EMPTY + 8 * stage, phase)
                if lane == 0:
                    mbarrier.arrive_expect(base + full, int32(Q_ARRIVE))
                    copy_rows(base, a.map_q, full, Q + stage * Q_BYTES, Q_PANEL, PANELS, row, int32(head), plane)
                    tma.load_rows(base + LSE + stage * ROW_BYTES, a.map_rows, base + full, at, int32(0))
                    if DK:
                        tma.load_rows(base + DELTA + stage * ROW_BYTES, a.map_rows, base + full, at, int32(1))
                        if first:
                            mbarrier.arrive_expect(base + V_FULL, int32(V_BYTES))
                            copy_rows(base, a.map_v, V_FULL, V, KV_PANEL, PANELS_V, k_row, head_k, plane)
                            first = False
                mbarrier.wait(base + DO_EMPTY + 8 * stage_do, phase_do)
                if lane == 0:
                    mbarrier.arrive_expect(base + full_do, int32(DO_BYTES))
                    copy_rows(base, a.map_dout, full_do, DO + stage_do * DO_BYTES, Q_PANEL, PANELS_V, row, int32(head), plane)
                if PACKED:
                    if (m + 1) * BLOCK_M > seqlen_q:
                        mbarrier.wait(base + full, int32(phase ^ 1))
                        mbarrier.wait(base + full_do, int32(phase_do ^ 1))
                        clear_q(int32(base + Q + stage * Q_BYTES), int32(seqlen_q - m * BLOCK_M), lane)
                        clear_do(int32(base + DO + stage_do * DO_BYTES), int32(seqlen_q - m * BLOCK_M), lane)
                        cleaned(base + ROWS_CLEAN + 8 * (head & 1), lane)
                stage, phase = next_stage(stage, phase)
                stage_do, phase_do = next_do(stage_do, phase_do)
                m = opaque(int32(m + 1))

    # ------------------------------------------------------------ the loop's parts
    @inline
    def products_s(base, w, stage):
        return qk(zeros(COUNT_S), wgmma.k_major(base + K + w * 64 * 128), wgmma.k_major(base + Q + stage * Q_BYTES), HEAD_DIM, BLOCK_N,
                  BLOCK_M)

    @inline
    def products_dp(base, w, stage_do):
        return qk(zeros(COUNT_S), wgmma.k_major(base + V + w * 64 * 128), wgmma.k_major(base + DO + stage_do * DO_BYTES), HEAD_DIM_V,
                  BLOCK_N, BLOCK_M)

    @inline
    def add(base, acc, half, stage, stage_do):
        """What the gradient takes in: half Q of that stage, or half dO of the other."""
        return pv(acc, half, wgmma.mn_major(base + (Q + stage * Q_BYTES if DK else DO + stage_do * DO_BYTES), Q_PANEL))

    @inline
    def hold(base):
        """A wait that was over long ago: see backward_sm90_dq."""
        mbarrier.wait(base + K_FULL, int32(0))

    @inline
    def release(empty, lane):
        if lane == 0:
            mbarrier.arrive(empty)

    def make_step(FIRST):
        NEXT, BETWEEN, LAST = not FIRST, not FIRST and not BEHIND, not FIRST and BEHIND     # BETWEEN, LAST: where the block before is
        wait_s = wgmma.wait(int(NEXT) + int(DK and not LATE))
        wait_dp = wgmma.wait_all_but_one if LAST else wgmma.wait_all
        wait_between = wgmma.wait_all_but_one if DK and not LATE else wgmma.wait_all

        @inline
        def step(a, base, w, lane, warp_keys, acc, half, walk, seen, place):
            """P or dS of the block m of `head`, while the gradient takes in the block before, whose P or dS is `half`."""
            left, stage, phase, stage_do, phase_do, head, m, slope = walk
            m_min, m_max, full_min, full_max = seen
            batch, seqlen_q, seqlen_k = place
            w, lane, before = opaque(w), opaque(lane), stage        # opaque: what follows from them is computed here, not kept in registers
            key, col = int32(warp_keys + (lane >> 2)), int32((lane & 3) * 2)
            query = int32(m * BLOCK_M + col)
            if NEXT:
                stage, phase = next_stage(stage, phase)
                if DK:
                    stage_do, phase_do = next_do(stage_do, phase_do)
            if PACKED:
                ragged = (m + 1) * BLOCK_M > seqlen_q
                full = int32(base + (ROWS_CLEAN + 8 * (head & 1) if ragged else Q_FULL + 8 * stage))
                mbarrier.wait(full, int32((head >> 1) & 1 if ragged else phase))
            else:
                mbarrier.wait(base + Q_FULL + 8 * stage, phase)
            wgmma.fence()
            acc_s = products_s(base, w, stage)
            wgmma.commit()
            if BETWEEN:
                if not DK:
                    mbarrier.wait(base + DO_FULL + 8 * stage_do, phase_do)
                wgmma.fence()
                acc = add(base, acc, half, before, stage_do)
                wgmma.commit()
            if DK and not LATE:
                acc_dp = ask_dp(base, w, stage_do, phase_do, FIRST)
            if LAST:
                wgmma.fence()
                acc = add(base, acc, half, before, stage_do)
                wgmma.commit()
            early = fetch(a, batch, head, query, key, seqlen_q, seqlen_k)
            far = any_far(int32(base + LSE + stage * ROW_BYTES))
            acc_s = wait_s(acc_s)
            if SOFTCAP:
                acc_s, cap_slope = cap_of(a, acc_s)
            acc_s = score(a, acc_s, early, slope, query, key, int32(seqlen_k - seqlen_q))
            lse_at = int32(base + LSE + stage * ROW_BYTES + 4 * col)
            if (m < full_min) | (m >= full_max) | (far != 0):       # one branch: most blocks are neither
                acc_s = keep(acc_s, limits_of(a, key, seqlen_q, seqlen_k), query)
                if far != 0:
                    at = uint64(4 * (first_row(a, batch, head, kept_q_start(base)) + int64(query)))
                    acc_s = near_columns(a, acc_s, lse_at, uint64(a.row_lse + at))
            p = exp2_columns(acc_s, log2_scale(a), load_columns(lse_at, COUNT_S))
            p = mark(a, p, draw(a, key, query, int32(batch * a.num_heads + head)))
            if NEXT:
                hold(base)
            if BETWEEN:
                acc = wait_between(acc)
                release(base + Q_EMPTY + 8 * before if DK else base + DO_EMPTY + 8 * stage_do, lane)
            if DK:
                if LATE:
                    acc_dp = ask_dp(base, w, stage_do, phase_do, FIRST)
                acc_dp = wait_dp(acc_dp)
                release(base + DO_EMPTY + 8 * stage_do, lane)
                acc_ds = grad(a, p, acc_dp, load_columns(int32(base + DELTA + stage * ROW_BYTES + 4 * col), COUNT_S))
                if SUM_DBIAS:       # coordinates again: kept so long, they would spill
                    own = opaque(lane)
                    add_dbias(a, acc_ds, batch, head, int32(m * BLOCK_M + (own & 3) * 2), int32(warp_keys + (own >> 2)), seqlen_q, seqlen_k)
                if SOFTCAP:
                    acc_ds = multiply(acc_ds, slopes(cap_slope))
                if LAST:
                    hold(base)
                    acc = wgmma.wait_all(acc)
                    release(base + Q_EMPTY + 8 * before, lane)
                half = to_half(acc_ds)
            else:
                release(base + Q_EMPTY + 8 * stage, lane)       # S has ended and lse was read
                if NEXT:
                    stage_do, phase_do = next_do(stage_do, phase_do)
                half = pack_kept(p)
            left, m = int32(left - 1), int32(m + 1)
            if m == m_max:
                m, head = m_min, int32(head + 1)
                slope = prepare(a, batch, int32(min(head, a.num_heads - 1)))
            return acc, half, (left, stage, phase, stage_do, phase_do, head, m, slope)
        return step

    @inline
    def ask_dp(base, w, stage_do, phase_do, first):
        if first:
            mbarrier.wait(base + V_FULL, int32(0))
        mbarrier.wait(base + DO_FULL + 8 * stage_do, phase_do)
        wgmma.fence()
        acc_dp = products_dp(base, w, stage_do)
        wgmma.commit()
        return acc_dp

    step_first, step = make_step(True), make_step(False)

    @inline
    def consume(a, base, w, thread, lane, m_min, full_min, full_max, m_max, n_block, head_k, batch, seqlen_q, seqlen_k):
        """dK or dV of a warpgroup's 64 keys, seen by at least one block of queries."""
        blocks, head = uniform(int32((m_max - m_min) * a.group)), int32(head_k * a.group)
        warp_keys = int32(n_block * BLOCK_N + w * 64 + (thread >> 5) * 16)
        seen, place = (m_min, m_max, full_min, full_max), (batch, seqlen_q, seqlen_k)
        walk = (blocks, int32(0), int32(0), int32(0), int32(0), head, m_min, prepare(a, batch, head))
        mbarrier.wait(base + K_FULL, int32(0))
        acc, half, walk = step_first(a, base, w, lane, warp_keys, zeros(COUNT), zeros_packed(COUNT_HALF), walk, seen, place)
        while walk[0] > 0:
            acc, half, walk = step(a, base, w, lane, warp_keys, acc, half, walk, seen, place)
        if not DK:
            mbarrier.wait(base + DO_FULL + 8 * walk[3], walk[4])
        wgmma.fence()
        acc = add(base, acc, half, walk[1], walk[3])
        wgmma.commit()
        return wgmma.wait_all(acc)

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 1023) & -1024)
        warpgroup, thread = uniform(int32(cuda.threadIdx.x >> 7)), int32(cuda.threadIdx.x & 127)
        t = int32(cuda.blockIdx.x)
        if t < num_tiles(a):
            n_block, head_k, batch, q_start, seqlen_q, k_start, seqlen_k, keys = tile_at(a, t)
            first, plane = int32(n_block * BLOCK_N), int32(0) if PACKED else batch
            m_min, _, _, m_max = key_bounds(a, first, BLOCK_N, seqlen_q, seqlen_k)
            m_min, m_max = uniform(m_min), uniform(m_max)
            if cuda.threadIdx.x == 0:
                mbarrier.init(base + K_FULL, int32(1))
                mbarrier.init(base + V_FULL, int32(1))
                for s in range(Q_STAGES):
                    mbarrier.init(base + Q_FULL + 8 * s, int32(1))
                    mbarrier.init(base + Q_EMPTY + 8 * s, int32(WARPS))
                for s in range(DO_STAGES):
                    mbarrier.init(base + DO_FULL + 8 * s, int32(1))
                    mbarrier.init(base + DO_EMPTY + 8 * s, int32(WARPS))
                init_clean(base, ROWS_CLEAN, int32(head_k * a.group))
                keep_tile(base, n_block, head_k, batch, k_start, seqlen_k, keys, q_start)
                mbarrier.fence_init()
            cuda.syncthreads()
            if warpgroup == 0:
                give_registers()
                if thread < PRODUCERS and m_min < m_max:
                    load(a, base, thread, m_min, m_max, head_k, plane, batch, q_start, int32(k_start + first), seqlen_q)
            else:
                take_registers()
                w, lane = int32(warpgroup - 1), int32(thread & 31)
                _, full_min, full_max, _ = key_bounds(a, int32(first + w * 64), 64, seqlen_q, seqlen_k)
                acc = zeros(COUNT)
                if m_min < m_max:
                    acc = consume(a, base, w, thread, lane, m_min, uniform(full_min), uniform(full_max), m_max, n_block, head_k, batch,
                                  seqlen_q, seqlen_k)
                n_block, head_k, batch, k_start, used, keys = kept_tile(base)
                key, plane = int32(n_block * BLOCK_N + w * 64 + (thread >> 5) * 16 + (lane >> 2)), int32(0) if PACKED else batch
                if DK:
                    acc = scale_rows(acc, a.grad_scale, a.grad_scale)
                    to = int64(a.dk) + plane * a.dk_batch + head_k * a.dk_head + k_start * a.dk_row
                    store(acc, to, a.dk_row, a.head_dim, lane, key, used, keys)
                else:
                    if DROPOUT:
                        acc = scale_rows(acc, a.keep_scale, a.keep_scale)
                    to = int64(a.dv) + plane * a.dv_batch + head_k * a.dv_head + k_start * a.dv_row
                    store(acc, to, a.dv_row, a.head_dim_v, lane, key, used, keys)

    return kernel, smem.size
