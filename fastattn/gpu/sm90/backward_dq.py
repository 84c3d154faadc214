"""dQ alone for Hopper, half of the deterministic backward: a block takes 128 query rows of one head and goes through the keys they see.

    warpgroup 0     one thread asks the copy engine for Q and dO once, then for K and V of one key block after the other
    warpgroups 1, 2 64 query rows each, all in registers between the products, so that no sum is ever shared:
                    S = Q K^T   P = exp2(S - lse)   dP = dO V^T   dS = P (dP - delta)   dQ += dS K

    shared memory   Q | dO | STAGES x K | STAGES_V x V | barriers
    Q_FULL, DO_FULL, K_FULL[s], V_FULL[s]     copy engine -> consumers: the bytes are there
    K_EMPTY[s], V_EMPTY[s]                    consumers -> producer: the place is free

A step issues S and dP of its block and, with dS out of registers, dQ of the block before, which is why K stays a step longer than V; P is
computed while the products of dP and dQ run, dS while that of dQ does (BEHIND). Key blocks go from last to first: only the first step can
meet the end of a sequence. Each element of dQ is one chain of sums in a fixed order: the same bits every run. (Design: FlashAttention-3's
forward, Shah et al. 2024, with dO V^T in the softmax's place.)
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, pack, unpack
from ..dsl.inline import divide, inline
from ..ptx import mbarrier, wgmma
from ..ptx.arith import emit_fma
from ..ptx.memory import load_f32, load_shared_b32, shared_address, store_shared_b32
from ..ptx.sync import any_lane, barrier, decrease_registers, fence_async, increase_registers, opaque, uniform
from ..rows.preprocess import make_first_row
from ..spec import FAR_LSE, Spec
from ..tile.dropout import make_dropout
from ..tile.fragments import exp2_minus, make_pack, make_unpack, row_of, scale_seen_rows, store_rows, store_whole_rows, zeros, zeros_packed
from ..tile.gradients import make_near, multiply
from ..tile.mask import diagonal_of, make_bounds, make_keep
from ..tile.schedule import make_num_tiles, make_tile_at
from ..tile.scores import make_cap_of, make_score
from ..tile.smem import Smem, copy_rows, make_clear, make_next_stage, panels
from ..tile.softmax import make_log2_scale
from .config import CONSUMERS, DqSm90Config
from .config import DQ_BLOCK_M as BLOCK_M

INF, FAR = float32(float("inf")), float32(FAR_LSE)


@intrinsic
def grad_rows(typingctx: Any, p: Any, dp: Any, factor: Any, delta0: Any, delta1: Any) -> Any:
    """p * (dp * factor - delta) with the delta of each row: gradients.grad_scores where rows are queries."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus = [builder.fsub(F32(-0.0), x) for x in args[3:]]
        return pack(builder, [builder.fmul(x, emit_fma(builder, y, args[2], minus[row_of(k) // 8])) for k, (x, y) in
                              enumerate(zip(unpack(builder, args[0], p.count), unpack(builder, args[1], p.count), strict=True))])
    return signature(p, p, p, types.float32, types.float32, types.float32), generate


def make_dq(spec: Spec, config: DqSm90Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    BLOCK_N, STAGES, STAGES_V, BEHIND = config.block_n, config.stages, config.stages_v, config.behind
    HEAD_DIM, HEAD_DIM_V, PANELS, PANELS_V = spec.head_dim, spec.head_dim_v, panels(spec.head_dim), panels(spec.head_dim_v)
    Q_PANEL, KV_PANEL = BLOCK_M * 128, BLOCK_N * 128
    Q_BYTES, DO_BYTES, K_BYTES, V_BYTES = PANELS * Q_PANEL, PANELS_V * Q_PANEL, PANELS * KV_PANEL, PANELS_V * KV_PANEL
    COUNT_S, COUNT_DS, COUNT_DQ = BLOCK_N // 2, BLOCK_N // 4, HEAD_DIM // 2
    smem = Smem()
    Q, DO, K, V = smem.take(Q_BYTES), smem.take(DO_BYTES), smem.take(STAGES * K_BYTES), smem.take(STAGES_V * V_BYTES)
    Q_FULL, DO_FULL, K_FULL, K_EMPTY, V_FULL, V_EMPTY = (smem.barriers(n) for n in (1, 1, STAGES, STAGES, STAGES_V, STAGES_V))
    Q_START = smem.take(4, 4)       # of the sequence
    WARPS, THREADS, CLEAR_BARRIER = 4 * CONSUMERS, 128 * CONSUMERS, 1
    PACKED, DROPOUT, SOFTCAP = spec.packed, spec.dropout, spec.softcap
    qk, pv = wgmma.make_products(spec.dtype)
    to_half = make_pack(spec.dtype)
    give_registers, take_registers = decrease_registers(24), increase_registers(240)
    (row_bounds, block_bounds), keep_rows = make_bounds(spec, BLOCK_N), make_keep(spec)
    prepare, fetch, score = make_score(spec, COUNT_S, CAPPED=True)
    (_, near_rows), log2_scale = make_near(spec), make_log2_scale(spec)
    cap_of, slopes = make_cap_of(spec), make_unpack("float16", True)
    draw, dropout = make_dropout(spec, COUNT_S)
    next_stage, next_stage_v = make_next_stage(STAGES), make_next_stage(STAGES_V)
    tile_at, num_tiles, first_row = make_tile_at(spec, BLOCK_M), make_num_tiles(spec), make_first_row(spec)
    clear_k, clear_v = (make_clear(BLOCK_N, count, THREADS) for count in (PANELS, PANELS_V))

    # ------------------------------------------------------------ helpers of this kernel
    @inline
    def tile_blocks(a, m_block, seqlen_q, seqlen_k):
        """The key blocks [n_min, n_max) that all warpgroups of a tile go through; none where no row sees a key."""
        first, last = int32(m_block * BLOCK_M), min((m_block + 1) * BLOCK_M, seqlen_q)
        diagonal = diagonal_of(a, seqlen_q, seqlen_k)
        n_min, _, _, n_max = block_bounds(a, first, last, diagonal, seqlen_k)
        lo, _ = row_bounds(a, first, diagonal, seqlen_k)
        _, hi = row_bounds(a, int32(last - 1), diagonal, seqlen_k)
        return uniform(n_min), uniform(n_max if lo < hi else n_min)

    @inline
    def full_blocks(a, row0, seqlen_q, seqlen_k):
        """[full_min, full_max): blocks that all 64 rows from row0 on see all of."""
        _, full_min, full_max, _ = block_bounds(a, row0, int32(row0 + 64), diagonal_of(a, seqlen_q, seqlen_k), seqlen_k)
        return uniform(full_min), uniform(full_max)

    @inline
    def keep(a, acc_s, row, column, seqlen_q, seqlen_k):
        """The structural mask; row and column are the thread's first."""
        diagonal = diagonal_of(a, seqlen_q, seqlen_k)
        lo0, hi0 = row_bounds(a, row, diagonal, seqlen_k)
        lo1, hi1 = row_bounds(a, int32(row + 8), diagonal, seqlen_k)
        return keep_rows(acc_s, (lo0, hi0, lo1, hi1), column)

    @inline
    def thread_row(row0, thread):
        """The first of the thread's two rows, of the warpgroup's 64 from row0 on."""
        return int32(row0 + (thread >> 5) * 16 + ((thread >> 2) & 7))

    # ------------------------------------------------------------ load: the producer, one thread
    @inline
    def load(a, base, q_row, first, last, head, plane):
        """`first` and `last`: first rows of the first and the last key block, in the order in which they come."""
        head_k = divide(head, a.group)
        mbarrier.arrive_expect(base + Q_FULL, int32(Q_BYTES))
        copy_rows(base, a.map_q, Q_FULL, Q, Q_PANEL, PANELS, q_row, head, plane)
        stage, phase, stage_v, phase_v, row = int32(0), int32(1), int32(0), int32(1), first
        while row >= last:
            mbarrier.wait(base + K_EMPTY + 8 * stage, phase)
            mbarrier.arrive_expect(base + K_FULL + 8 * stage, int32(K_BYTES))
            copy_rows(base, a.map_k, K_FULL + 8 * stage, K + stage * K_BYTES, KV_PANEL, PANELS, row, head_k, plane)
            if row == first:
                mbarrier.arrive_expect(base + DO_FULL, int32(DO_BYTES))
                copy_rows(base, a.map_dout, DO_FULL, DO, Q_PANEL, PANELS_V, q_row, head, plane)
            mbarrier.wait(base + V_EMPTY + 8 * stage_v, phase_v)
            mbarrier.arrive_expect(base + V_FULL + 8 * stage_v, int32(V_BYTES))
            copy_rows(base, a.map_v, V_FULL + 8 * stage_v, V + stage_v * V_BYTES, KV_PANEL, PANELS_V, row, head_k, plane)
            stage, phase = next_stage(stage, phase)
            stage_v, phase_v = next_stage_v(stage_v, phase_v)
            row = opaque(int32(row - BLOCK_N))

    # ------------------------------------------------------------ the loop's parts
    @inline
    def products_s(base, w, stage):
        return qk(zeros(COUNT_S), wgmma.k_major(base + Q + w * 64 * 128), wgmma.k_major(base + K + stage * K_BYTES), HEAD_DIM, BLOCK_M,
                  BLOCK_N)

    @inline
    def products_dp(base, w, stage_v):
        return qk(zeros(COUNT_S), wgmma.k_major(base + DO + w * 64 * 128), wgmma.k_major(base + V + stage_v * V_BYTES), HEAD_DIM_V, BLOCK_M,
                  BLOCK_N)

    @inline
    def products_dq(base, acc_dq, ds, stage):
        return pv(acc_dq, ds, wgmma.mn_major(base + K + stage * K_BYTES, KV_PANEL))

    @inline
    def hold(base):
        """A wait that was over long ago. In straight code the assembler would move the next wait for a product up, before the arithmetic
        that is to run beside it; it moves nothing across a loop."""
        mbarrier.wait(base + Q_FULL, int32(0))

    @inline
    def release(empty, thread):
        if (thread & 31) == 0:
            mbarrier.arrive(empty)

    def make_step(FIRST):
        NEXT, BETWEEN, LAST = not FIRST, not FIRST and not BEHIND, not FIRST and BEHIND     # BETWEEN, LAST: where dQ of the block before is
        wait_s = wgmma.wait_all_but_one if FIRST else wgmma.wait_all_but_two
        wait_dp = wgmma.wait_all_but_one if LAST else wgmma.wait_all

        @inline
        def step(a, base, w, thread, acc_dq, ds, walk, lse0, lse1, delta0, delta1, slope, place):
            """dS of the next key block, while dQ takes in the block before, of which dS is there."""
            n_block, stage, phase, stage_v, phase_v = walk
            m_block, head, batch, seqlen_q, seqlen_k, full_min, full_max = place
            before = stage
            w, thread = opaque(w), opaque(thread)       # what follows from them is computed here, not kept in registers
            if NEXT:
                n_block = int32(n_block - 1)
                stage, phase = next_stage(stage, phase)
                stage_v, phase_v = next_stage_v(stage_v, phase_v)
            row, column = thread_row(int32(m_block * BLOCK_M + w * 64), thread), int32(n_block * BLOCK_N + (thread & 3) * 2)
            mbarrier.wait(base + K_FULL + 8 * stage, phase)
            wgmma.fence()
            acc_s = products_s(base, w, stage)
            wgmma.commit()
            if BETWEEN:
                wgmma.fence()
                acc_dq = products_dq(base, acc_dq, ds, before)
                wgmma.commit()
            if FIRST:
                mbarrier.wait(base + DO_FULL, int32(0))
            mbarrier.wait(base + V_FULL + 8 * stage_v, phase_v)
            wgmma.fence()
            acc_dp = products_dp(base, w, stage_v)
            wgmma.commit()
            if LAST:
                wgmma.fence()
                acc_dq = products_dq(base, acc_dq, ds, before)
                wgmma.commit()
            early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
            acc_s = wait_s(acc_s)
            if SOFTCAP:
                acc_s, cap_slope = cap_of(a, acc_s)
            acc_s = score(a, acc_s, early, slope, row, column, int32(seqlen_k - seqlen_q))
            if (n_block < full_min) | (n_block >= full_max):
                acc_s = keep(a, acc_s, row, column, seqlen_q, seqlen_k)
            if any_lane(int32(1) if lse0 == FAR or lse1 == FAR else int32(0)) != 0:
                at = uint64(a.row_lse + uint64(4 * (first_row(a, batch, head, load_shared_b32(base + Q_START)) + row)))
                acc_s = near_rows(a, acc_s, (lse0, lse1), (load_f32(at), load_f32(uint64(at + uint64(32)))))
            acc_s = exp2_minus(acc_s, log2_scale(a), lse0, lse1)
            if NEXT:
                hold(base)
            if BETWEEN:
                acc_dq = wgmma.wait_all_but_one(acc_dq)
                release(base + K_EMPTY + 8 * before, thread)
            acc_dp = wait_dp(acc_dp)
            release(base + V_EMPTY + 8 * stage_v, thread)
            acc_dp = dropout(a, acc_dp, draw(a, row, column, int32(batch * a.num_heads + head)))
            acc_s = grad_rows(acc_s, acc_dp, a.keep_scale if DROPOUT else float32(1), delta0, delta1)
            if SOFTCAP:
                acc_s = multiply(acc_s, slopes(cap_slope))
            if LAST:
                hold(base)
                acc_dq = wgmma.wait_all(acc_dq)
                release(base + K_EMPTY + 8 * before, thread)
            return acc_dq, to_half(acc_s), (n_block, stage, phase, stage_v, phase_v)
        return step

    step_first, step = make_step(True), make_step(False)

    @inline
    def consume(a, base, w, thread, m_block, n_min, n_max, head, batch, seqlen_q, seqlen_k, lse0, lse1, delta0, delta1):
        """acc_dq of a warpgroup's 64 rows, whose tile sees at least one block of keys."""
        full_min, full_max = full_blocks(a, int32(m_block * BLOCK_M + w * 64), seqlen_q, seqlen_k)
        place = (m_block, head, batch, seqlen_q, seqlen_k, full_min, full_max)
        walk = (int32(n_max - 1), int32(0), int32(0), int32(0), int32(0))
        slope = prepare(a, batch, head)
        mbarrier.wait(base + Q_FULL, int32(0))
        if PACKED:
            if n_max * BLOCK_N > seqlen_k:
                mbarrier.wait(base + K_FULL, int32(0))
                mbarrier.wait(base + V_FULL, int32(0))
                keys, own = int32(seqlen_k - (n_max - 1) * BLOCK_N), int32(w * 128 + thread)
                clear_k(int32(base + K), keys, own)
                clear_v(int32(base + V), keys, own)
                fence_async()
                barrier(int32(CLEAR_BARRIER), int32(THREADS))
        acc_dq, ds, walk = step_first(a, base, w, thread, zeros(COUNT_DQ), zeros_packed(COUNT_DS), walk, lse0, lse1, delta0, delta1, slope,
                                      place)
        while walk[0] > n_min:
            acc_dq, ds, walk = step(a, base, w, thread, acc_dq, ds, walk, lse0, lse1, delta0, delta1, slope, place)
        wgmma.fence()
        acc_dq = products_dq(base, acc_dq, ds, walk[1])
        wgmma.commit()
        return wgmma.wait_all(acc_dq)

    # ------------------------------------------------------------ epilogue
    @inline
    def store(a, acc_dq, lse0, lse1, plane, head, q_start, row, seqlen_q, thread):
        """16 rows a warp of dQ, those below seqlen_q; 0 where lse is +inf, whatever the row's q and dout hold."""
        packed = to_half(scale_seen_rows(acc_dq, float32(0) if lse0 == INF else a.grad_scale, float32(0) if lse1 == INF else a.grad_scale))
        lane, col = int32(thread & 31), int32((thread & 3) * 2)
        address = uint64(int64(a.dq) + plane * a.dq_batch + head * a.dq_head + int64(q_start + row) * a.dq_row + 2 * col)
        next_row = uint64(address + uint64(8 * a.dq_row))
        rows0, rows1 = int32(1) if row < seqlen_q else int32(0), int32(1) if row + 8 < seqlen_q else int32(0)
        if a.head_dim == HEAD_DIM:
            store_whole_rows(packed, address, next_row, rows0, rows1, lane)
        else:
            store_rows(packed, address, next_row, rows0, rows1, int32(a.head_dim - col))

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 1023) & -1024)
        warpgroup, thread = uniform(int32(cuda.threadIdx.x >> 7)), int32(cuda.threadIdx.x & 127)
        t = int32(cuda.blockIdx.x)
        if t < num_tiles(a):
            m_block, head, batch, q_start, seqlen_q, k_start, seqlen_k = tile_at(a, t)
            plane = int32(0) if PACKED else batch
            n_min, n_max = tile_blocks(a, m_block, seqlen_q, seqlen_k)
            if cuda.threadIdx.x == 0:
                mbarrier.init(base + Q_FULL, int32(1))
                mbarrier.init(base + DO_FULL, int32(1))
                for s in range(STAGES):
                    mbarrier.init(base + K_FULL + 8 * s, int32(1))
                    mbarrier.init(base + K_EMPTY + 8 * s, int32(WARPS))
                for s in range(STAGES_V):
                    mbarrier.init(base + V_FULL + 8 * s, int32(1))
                    mbarrier.init(base + V_EMPTY + 8 * s, int32(WARPS))
                store_shared_b32(base + Q_START, q_start)
                mbarrier.fence_init()
            cuda.syncthreads()
            if warpgroup == 0:
                give_registers()
                if thread == 0 and n_min < n_max:
                    load(a, base, int32(q_start + m_block * BLOCK_M), int32(k_start + (n_max - 1) * BLOCK_N),
                         int32(k_start + n_min * BLOCK_N), head, plane)
            else:
                take_registers()
                w = int32(warpgroup - 1)
                row = thread_row(int32(m_block * BLOCK_M + w * 64), thread)
                lse0, lse1, acc_dq = INF, INF, zeros(COUNT_DQ)
                if n_min < n_max:
                    at = uint64(4 * (first_row(a, batch, head, q_start) + row))
                    lse0, lse1 = load_f32(uint64(a.row_log2 + at)), load_f32(uint64(a.row_log2 + at + uint64(32)))
                    delta0, delta1 = load_f32(uint64(a.row_delta + at)), load_f32(uint64(a.row_delta + at + uint64(32)))
                    acc_dq = consume(a, base, w, thread, m_block, n_min, n_max, head, batch, seqlen_q, seqlen_k, lse0, lse1, delta0, delta1)
                store(a, acc_dq, lse0, lse1, plane, head, q_start, row, seqlen_q, thread)

    return kernel, smem.size
