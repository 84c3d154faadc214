"""dQ alone for Hopper, half of the deterministic backward: a block owns 128 query rows of one head and loops over the keys they attend.

    warpgroup 0     one thread issues the TMA loads of Q and dO once, then of K and V of one key block after the other
    warpgroups 1, 2 64 query rows each; S, P, dP and dS stay in registers, so that no sum is ever shared:
                    S = Q K^T   P = exp2(S - lse)   dP = dO V^T   dS = P (dP - delta)   dQ += dS K

    shared memory   Q | dO | STAGES x K | STAGES_V x V | barriers
    Q_FULL, DO_FULL, K and V rings: FULL      TMA -> consumers: the bytes have arrived
    K and V rings: EMPTY                      consumers -> producer: the slot may be overwritten

A step issues the MMAs of S and dP of its key block and, with dS in registers, that of dQ of the block before; K therefore stays a step
longer than V. P is computed while the MMAs of dP and dQ run, dS while that of dQ runs (BEHIND). Key blocks go from last to first, so that
only the first step can meet the end of a sequence. Each element of dQ is one chain of sums in a fixed order: the same bits every run.
(Design: FlashAttention-3's forward, Shah et al. 2024, with dO V^T in place of the softmax.)
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda, float32, int32, int64, uint8, uint64
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, pack, unpack
from ..dsl.inline import divide, inline
from ..ptx import mbarrier, wgmma
from ..ptx.arith import emit_fma
from ..ptx.memory import load_f32, load_shared_b32, shared_address, store_shared_b32
from ..ptx.sync import any_lane, barrier, decrease_registers, fence_async, increase_registers, opaque, take_turn, uniform
from ..rows.preprocess import make_first_row
from ..spec import FAR_LSE, Spec
from ..tile.dropout import make_dropout
from ..tile.fragments import exp2_minus, make_pack, make_unpack, row_of, scale_seen_rows, zeros, zeros_packed
from ..tile.gradients import make_near, multiply
from ..tile.mask import make_diagonals, make_keep
from ..tile.ring import make_barrier, make_ring
from ..tile.schedule import make_key_row, make_num_tiles, make_tile_at
from ..tile.scores import make_cap_of, make_score
from ..tile.smem import ALIGN, ROW_BYTES, WARPGROUP, WARPGROUP_ROWS, Smem, copy_rows, make_clear, panels
from ..tile.softmax import make_log2_scale
from ..tile.stores import store_floats, store_rows, store_whole_rows
from .bounds import make_tile_bounds
from .config import slice_dim
from .config_alone import DqSm90Config
from .consumer import make_fresh

INF, FAR = float32(float("inf")), float32(FAR_LSE)


@intrinsic
def grad_rows(typingctx: Any, p: Any, dp: Any, factor: Any, delta0: Any, delta1: Any) -> Any:
    """p * (dp * factor - delta), with a delta for each of the thread's two rows: gradients.grad_scores if rows are queries."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        minus = [builder.fsub(F32(-0.0), x) for x in args[3:]]
        return pack(builder, [builder.fmul(x, emit_fma(builder, y, args[2], minus[row_of(k) // 8])) for k, (x, y) in
                              enumerate(zip(unpack(builder, args[0], p.count), unpack(builder, args[1], p.count), strict=True))])
    return signature(p, p, p, types.float32, types.float32, types.float32), generate


class Walk(NamedTuple):
    """Where a consumer is: its key block, and the slots of K and V."""

    n_block: Any
    stage: Any
    phase: Any
    stage_v: Any
    phase_v: Any


class Tile(NamedTuple):
    """What a consumer's 64 rows share: their tile, and the key blocks [full_min, full_max) that need no mask; `shared` is prepare's."""

    m_block: Any
    head: Any
    batch: Any
    seqlen_q: Any
    seqlen_k: Any
    full_min: Any
    full_max: Any
    shared: Any


class Stats(NamedTuple):
    """lse (in units of log2) and delta of a thread's two rows."""

    lse0: Any
    lse1: Any
    delta0: Any
    delta1: Any


def make_dq(spec: Spec, config: DqSm90Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    # constants: tile sizes, bytes, registers a thread
    BLOCK_M, BLOCK_N, STAGES, STAGES_V, BEHIND = config.block_m, config.block_n, config.stages, config.stages_v, config.behind
    SLICES, CONSUMERS = config.slices, config.consumers
    # each warpgroup has rows of its own, or a slice of dQ's columns
    COLUMNS, ROWS_APART = slice_dim(spec.head_dim, SLICES), WARPGROUP_ROWS if SLICES == 1 else 0
    HEAD_DIM, HEAD_DIM_V, PANELS, PANELS_V = spec.head_dim, spec.head_dim_v, panels(spec.head_dim), panels(spec.head_dim_v)
    PANELS_K, Q_PANEL, KV_PANEL = SLICES * panels(COLUMNS), BLOCK_M * ROW_BYTES, BLOCK_N * ROW_BYTES
    Q_BYTES, DO_BYTES, K_BYTES, V_BYTES = PANELS * Q_PANEL, PANELS_V * Q_PANEL, PANELS_K * KV_PANEL, PANELS_V * KV_PANEL
    Q_APART, COLUMNS_APART, SLICE_APART = (ROWS_APART * ROW_BYTES, 0, 0) if SLICES == 1 else (0, COLUMNS, panels(COLUMNS) * KV_PANEL)
    COUNT_S, COUNT_DS, COUNT_DQ = BLOCK_N // 2, BLOCK_N // 4, COLUMNS // 2
    WARPS, THREADS = 4 * CONSUMERS, WARPGROUP * CONSUMERS
    PACKED, DROPOUT, SOFTCAP = spec.packed, spec.dropout, spec.softcap

    # shared memory and barriers
    smem = Smem()
    Q, DO, K, V = smem.take(Q_BYTES), smem.take(DO_BYTES), smem.take(STAGES * K_BYTES), smem.take(STAGES_V * V_BYTES)
    q_full, do_full = make_barrier(smem), make_barrier(smem)
    k_ring, v_ring = make_ring(smem, STAGES, WARPS), make_ring(smem, STAGES_V, WARPS)
    Q_START = smem.take(4, 4)       # of the sequence
    CLEAR_BARRIER = smem.named(1)

    # what the steps are made of
    qk, pv = wgmma.make_products(spec.dtype)
    fresh = make_fresh(SLICES)
    to_half, SIZE = make_pack(spec.dtype), 4 if spec.out_dtype == "float32" else 2
    give_registers, take_registers = decrease_registers(config.producer_registers), increase_registers(config.consumer_registers)
    tile_blocks, full_blocks, intervals = make_tile_bounds(spec, BLOCK_M, BLOCK_N, EMPTY=True)
    keep_rows = make_keep(spec)
    prepare, fetch, score = make_score(spec, COUNT_S, CAPPED=True)
    (_, near_rows), log2_scale = make_near(spec), make_log2_scale(spec)
    cap_of, slopes = make_cap_of(spec), make_unpack("float16", True)
    (plane_of, draw, dropout), (diagonal_of, alibi_from) = make_dropout(spec, COUNT_S), make_diagonals(spec)
    tile_at, num_tiles, first_row, key_row = make_tile_at(spec, BLOCK_M), make_num_tiles(spec), make_first_row(spec), make_key_row(BLOCK_N)
    clear_k, clear_v = (make_clear(BLOCK_N, count, THREADS) for count in (PANELS_K, PANELS_V))

    @inline
    def keep(a, acc_s, batch, row, column, seqlen_q, seqlen_k):
        """The structural mask; row and column are the thread's first."""
        return keep_rows(acc_s, intervals(a, row, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k), column)

    @inline
    def thread_row(row0, thread):
        """The first of the thread's two rows, of the warpgroup's 64 from row0 on."""
        return int32(row0 + (thread >> 5) * 16 + ((thread >> 2) & 7))

    # ------------------------------------------------------------ load: the producer, one thread
    @inline
    def load(a, base, q_row, first, last, head, map_batch):
        """`first` and `last`: row of K and V of the first and of the last key block, in the order of the loop (descending)."""
        head_k = divide(head, a.group)
        q_full.arrive_expect(base, int32(Q_BYTES))
        copy_rows(base, a.map_q, q_full.FULL, Q, Q_PANEL, PANELS, q_row, head, map_batch)
        stage, phase, stage_v, phase_v, row = int32(0), int32(1), int32(0), int32(1), first
        while row >= last:
            k_ring.wait_empty(base, stage, phase)
            k_ring.arrive_expect(base, stage, int32(K_BYTES))
            copy_rows(base, a.map_k, k_ring.full(stage), K + stage * K_BYTES, KV_PANEL, PANELS_K, row, head_k, map_batch)
            if row == first:
                do_full.arrive_expect(base, int32(DO_BYTES))
                copy_rows(base, a.map_dout, do_full.FULL, DO, Q_PANEL, PANELS_V, q_row, head, map_batch)
            v_ring.wait_empty(base, stage_v, phase_v)
            v_ring.arrive_expect(base, stage_v, int32(V_BYTES))
            copy_rows(base, a.map_v, v_ring.full(stage_v), V + stage_v * V_BYTES, KV_PANEL, PANELS_V, row, head_k, map_batch)
            stage, phase = k_ring.next(stage, phase)
            stage_v, phase_v = v_ring.next(stage_v, phase_v)
            row = opaque(int32(row - BLOCK_N))

    # ------------------------------------------------------------ the MMAs
    @inline
    def mma_s(base, w, stage):
        """S = Q K^T of the warpgroup's rows."""
        return qk(zeros(COUNT_S), wgmma.k_major(fresh(base) + Q + w * Q_APART), wgmma.k_major(base + K + stage * K_BYTES), HEAD_DIM,
                  BLOCK_M, BLOCK_N)

    @inline
    def mma_dp(base, w, stage_v):
        """dP = dO V^T."""
        return qk(zeros(COUNT_S), wgmma.k_major(fresh(base) + DO + w * Q_APART), wgmma.k_major(base + V + stage_v * V_BYTES), HEAD_DIM_V,
                  BLOCK_M, BLOCK_N)

    @inline
    def mma_dq(base, w, acc_dq, ds, stage):
        """dQ += dS K, of the warpgroup's columns."""
        return pv(acc_dq, ds, wgmma.mn_major(base + K + stage * K_BYTES + w * SLICE_APART, KV_PANEL))

    @inline
    def hold(base):
        """Scheduling fence: waits on a barrier that completed long ago. ptxas hoists wgmma waits above independent arithmetic, but not
        across the loop that this compiles to."""
        q_full.wait(base, int32(0))

    def make_step(FIRST):
        # dQ of the block before: issued right after S (BETWEEN), as the last MMA of the step (LAST), or, in the first step, not at all
        NEXT, BETWEEN, LAST = not FIRST, not FIRST and not BEHIND, not FIRST and BEHIND
        wait_s = wgmma.wait_all_but_one if FIRST else wgmma.wait_all_but_two
        wait_dp = wgmma.wait_all_but_one if LAST else wgmma.wait_all

        @inline
        def step(a, base, w, thread, acc_dq, ds, walk, stats, tile):
            """dS of the next key block, overlapped with dQ += dS K of the block before, whose dS is `ds`."""
            n_block, stage, phase, stage_v, phase_v = walk
            m_block, head, batch, seqlen_q, seqlen_k, full_min, full_max, shared = tile
            lse0, lse1, delta0, delta1 = stats
            before = stage
            w, thread = opaque(w), opaque(thread)       # opaque: what follows from them is computed here, not kept in registers
            if NEXT:
                n_block = int32(n_block - 1)
                stage, phase = k_ring.next(stage, phase)
                stage_v, phase_v = v_ring.next(stage_v, phase_v)
            row, column = thread_row(int32(m_block * BLOCK_M + w * ROWS_APART), thread), int32(n_block * BLOCK_N + (thread & 3) * 2)

            # S = Q K^T and dP = dO V^T of this block, dQ += dS K of the block before
            k_ring.wait_full(base, stage, phase)
            wgmma.fence()
            acc_s = mma_s(base, w, stage)
            wgmma.commit()
            if BETWEEN:
                wgmma.fence()
                acc_dq = mma_dq(base, w, acc_dq, ds, before)
                wgmma.commit()
            if FIRST:
                do_full.wait(base, int32(0))
            v_ring.wait_full(base, stage_v, phase_v)
            wgmma.fence()
            acc_dp = mma_dp(base, w, stage_v)
            wgmma.commit()
            if LAST:
                wgmma.fence()
                acc_dq = mma_dq(base, w, acc_dq, ds, before)
                wgmma.commit()

            # score, mask
            early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
            acc_s = wait_s(acc_s)
            if SOFTCAP:
                acc_s, cap_slope = cap_of(a, acc_s)
            acc_s = score(a, acc_s, early, shared, row, column, alibi_from(a, batch, seqlen_q, seqlen_k))
            if (n_block < full_min) | (n_block >= full_max):
                acc_s = keep(a, acc_s, batch, row, column, seqlen_q, seqlen_k)

            # P = exp2(S - lse)
            if any_lane(int32(1) if lse0 == FAR or lse1 == FAR else int32(0)) != 0:
                at = uint64(a.row_lse + uint64(4 * (first_row(a, batch, head, load_shared_b32(base + Q_START)) + row)))
                acc_s = near_rows(a, acc_s, (lse0, lse1), (load_f32(at), load_f32(uint64(at + uint64(32)))))
            acc_s = exp2_minus(acc_s, log2_scale(a), log2_scale(a), lse0, lse1)

            # dS = P (dP - delta)
            if NEXT:
                hold(base)
            if BETWEEN:
                acc_dq = wgmma.wait_all_but_one(acc_dq)
                k_ring.release(base, before, thread & 31)
            acc_dp = wait_dp(acc_dp)
            v_ring.release(base, stage_v, thread & 31)
            acc_dp = dropout(a, acc_dp, draw(a, row, column, plane_of(a, batch, head)))
            acc_s = grad_rows(acc_s, acc_dp, a.keep_scale if DROPOUT else float32(1), delta0, delta1)
            if SOFTCAP:
                acc_s = multiply(acc_s, slopes(cap_slope))
            if LAST:
                hold(base)
                acc_dq = wgmma.wait_all(acc_dq)
                k_ring.release(base, before, thread & 31)
            return acc_dq, to_half(acc_s), Walk(n_block, stage, phase, stage_v, phase_v)
        return step

    step_first, step = make_step(True), make_step(False)

    @inline
    def clear_tails(a, base, w, thread, keys):
        """Zeros behind a packed sequence's last `keys` keys, which are in the first slots."""
        k_ring.wait_full(base, int32(0), int32(0))
        v_ring.wait_full(base, int32(0), int32(0))
        own = int32(w * WARPGROUP + thread)
        clear_k(int32(base + K), keys, own)
        clear_v(int32(base + V), keys, own)
        fence_async()
        barrier(int32(CLEAR_BARRIER), int32(THREADS))

    @inline
    def consume(a, base, w, thread, m_block, n_min, n_max, head, batch, seqlen_q, seqlen_k, stats):
        """acc_dq of a warpgroup's 64 rows; its tile attends at least one block of keys."""
        full_min, full_max = full_blocks(a, int32(m_block * BLOCK_M + w * ROWS_APART), diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k)
        tile = Tile(m_block, head, batch, seqlen_q, seqlen_k, full_min, full_max, prepare(a, batch, head))
        walk = Walk(int32(n_max - 1), int32(0), int32(0), int32(0), int32(0))
        q_full.wait(base, int32(0))
        if PACKED:
            if n_max * BLOCK_N > seqlen_k:
                clear_tails(a, base, w, thread, int32(seqlen_k - (n_max - 1) * BLOCK_N))
        acc_dq, ds, walk = step_first(a, base, w, thread, zeros(COUNT_DQ), zeros_packed(COUNT_DS), walk, stats, tile)
        while walk.n_block > n_min:
            acc_dq, ds, walk = step(a, base, w, thread, acc_dq, ds, walk, stats, tile)
        wgmma.fence()
        acc_dq = mma_dq(base, w, acc_dq, ds, walk.stage)       # of the last block
        wgmma.commit()
        return wgmma.wait_all(acc_dq)

    # ------------------------------------------------------------ epilogue
    @inline
    def store(a, acc_dq, lse0, lse1, map_batch, head, q_start, row, seqlen_q, w, thread):
        """16 rows a warp of dQ, those below seqlen_q. 0 if lse is +inf, whatever the row's q and dout hold."""
        acc_dq = scale_seen_rows(acc_dq, float32(0) if lse0 == INF else a.grad_scale, float32(0) if lse1 == INF else a.grad_scale)
        lane, col = int32(thread & 31), int32((thread & 3) * 2 + w * COLUMNS_APART)
        address = uint64(int64(a.dq) + map_batch * a.dq_batch + head * a.dq_head + int64(q_start + row) * a.dq_row + SIZE * col)
        next_row = uint64(address + uint64(8 * a.dq_row))
        rows0, rows1 = int32(1) if row < seqlen_q else int32(0), int32(1) if row + 8 < seqlen_q else int32(0)
        if SIZE == 4:
            store_floats(acc_dq, address, next_row, int64(4), rows0, rows1, int32(a.head_dim - col), 1)
            return
        packed = to_half(acc_dq)
        if a.head_dim == COLUMNS if SLICES == 1 else a.head_dim - w * COLUMNS_APART >= COLUMNS:
            store_whole_rows(packed, address, next_row, rows0, rows1, lane)
        else:
            store_rows(packed, address, next_row, rows0, rows1, int32(a.head_dim - col))

    @inline
    def init_barriers(base):
        q_full.init(base)
        do_full.init(base)
        k_ring.init(base)
        v_ring.init(base)

    def kernel(a):
        take_turn()
        base = int32((shared_address(cuda.shared.array(0, uint8)) + ALIGN - 1) & -ALIGN)
        warpgroup, thread = uniform(int32(cuda.threadIdx.x >> 7)), int32(cuda.threadIdx.x & (WARPGROUP - 1))
        t = int32(cuda.blockIdx.x)
        if t < num_tiles(a):
            m_block, head, batch, q_start, seqlen_q, k_start, seqlen_k = tile_at(a, t)
            map_batch = int32(0) if PACKED else batch
            n_min, n_max, _ = tile_blocks(a, batch, head, m_block, seqlen_q, seqlen_k)
            if cuda.threadIdx.x == 0:
                init_barriers(base)
                store_shared_b32(base + Q_START, q_start)
                mbarrier.fence_init()
            cuda.syncthreads()
            if warpgroup == 0:
                give_registers()
                if thread == 0 and n_min < n_max:
                    load(a, base, int32(q_start + m_block * BLOCK_M), key_row(a, k_start, n_max - 1), key_row(a, k_start, n_min), head,
                         map_batch)
            else:
                take_registers()
                w = int32(warpgroup - 1)
                row = thread_row(int32(m_block * BLOCK_M + w * ROWS_APART), thread)
                lse0, lse1, acc_dq = INF, INF, zeros(COUNT_DQ)
                if n_min < n_max:
                    at = uint64(4 * (first_row(a, batch, head, q_start) + row))
                    lse0, lse1 = load_f32(uint64(a.row_log2 + at)), load_f32(uint64(a.row_log2 + at + uint64(32)))
                    delta0, delta1 = load_f32(uint64(a.row_delta + at)), load_f32(uint64(a.row_delta + at + uint64(32)))
                    acc_dq = consume(a, base, w, thread, m_block, n_min, n_max, head, batch, seqlen_q, seqlen_k,
                                     Stats(lse0, lse1, delta0, delta1))
                store(a, acc_dq, lse0, lse1, map_batch, head, q_start, row, seqlen_q, w, thread)

    return kernel, smem.size
