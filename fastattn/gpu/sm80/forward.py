"""Forward with mma.sync, ldmatrix and cp.async: tensor cores fed by ordinary warps, on every architecture since sm_80.

    block           BLOCK_M query rows, one tile. A warp has 16 * TILES rows and all BLOCK_N keys of a step: warps share only K and V
    warp            S = Q K^T, softmax, O += P V in registers. P is S rounded to 16 bits; its registers are the A operand of P V
    all threads     copy K and V, 16 bytes at a time, into panels of 64 columns (ptx/mma.py says why accesses have no bank conflict)

    shared memory   Q, later out | STAGES x K | STAGES x V | the tile's parked words
    STAGES 2        a step waits for its K and V; after S = Q K^T it prefetches the next ones into the other stage: one barrier a step
    STAGES 1        V of a step is in flight during S = Q K^T, K of the next step during softmax and P V: two barriers, half the memory
    arrived()       waits for all threads' copies, and for the end of the step before, whose operands may then be overwritten

Key blocks are processed from last to first. Two blocks on a multiprocessor hide each other's latency. What this rung wins over
simt/forward.py: tensor cores, and operands that are read from shared memory once for 32 rows. Reading them for every 16 rows would take
longer than the MMAs. (Design: FlashAttention-2, Dao 2023.)
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import inline
from ..flex.bitmap import last_seen, line_of
from ..ptx import cp_async, mma, mma_parts
from ..ptx.cp_async import load_shared_b64, store_shared_b64
from ..ptx.memory import load_shared_b32, shared_address, store_shared_b32
from ..ptx.mma import lane_offset, lane_offset_b, load_rows, store_rows
from ..ptx.sync import any_lane, thread_index
from ..spec import Spec
from ..tile.copies import arrived, make_copy_rows
from ..tile.dropout import make_dropout
from ..tile.fragments import join, lane_row, make_pack, part, scale_rows, thread_col, zeros
from ..tile.mask import make_bounds, make_diagonals, make_intervals, make_keep
from ..tile.parked import parked
from ..tile.schedule import UNOWNED, make_key_row, make_num_tiles, make_tile_at, make_unowned
from ..tile.scores import make_score
from ..tile.smem import ALIGN, Smem, panels
from ..tile.softmax import NEG_INF, make_softmax, make_store_lse
from ..tile.stores import store_floats
from ..tile.traced import make_hide
from .config import ForwardSm80Config

ROW_BYTES = 128             # of a row of a panel: 64 columns


class ParkedTile(NamedTuple):
    """What steps and epilogue need to know of the tile; `first` is its first query row."""

    head: Any
    batch: Any
    q_start: Any
    seqlen_q: Any
    seqlen_k: Any
    first: Any


class Stats(NamedTuple):
    """Running maxima and sums of a thread's two rows."""

    max0: Any
    max1: Any
    sum0: Any
    sum1: Any


def make_forward(spec: Spec, config: ForwardSm80Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    BLOCK_M, BLOCK_N, TILES, STAGES, WARPS = config.block_m, config.block_n, config.tiles, config.stages, config.warps
    HEAD_DIM, PANELS, PANELS_V = spec.head_dim, spec.parts * panels(spec.head_dim), spec.parts * panels(spec.head_dim_v)
    WARP_ROWS, PASS_ROWS = 16 * TILES, 4 * WARPS        # query rows of a warp; rows that all threads together copy at a time
    Q_PANEL, KV_PANEL = BLOCK_M * ROW_BYTES, BLOCK_N * ROW_BYTES
    K_BYTES, V_BYTES = PANELS * KV_PANEL, PANELS_V * KV_PANEL
    COUNT_S, COUNT_O = TILES * BLOCK_N // 2, TILES * spec.head_dim_v // 2
    smem = Smem()
    Q, K, V = smem.take(max(PANELS, PANELS_V) * Q_PANEL), smem.take(STAGES * K_BYTES), smem.take(STAGES * V_BYTES)
    K_POINTER, V_POINTER = smem.take(8, 16), smem.take(8, 8)      # to the sequence's first key
    HEAD, BATCH, Q_START, SEQLEN_Q, SEQLEN_K, FIRST = parked(smem, 6)
    PACKED, LEFT, KEEP_Q = spec.packed, spec.left, config.keep_q
    FLOATS = spec.parts > 1
    STORE_FLOATS = FLOATS or spec.out_dtype == "float32"
    qk, pv = (mma_parts.qk, mma_parts.pv) if FLOATS else mma.make_products(spec.dtype)
    to_half = make_pack(spec.dtype)
    copy_rows, store_tile = make_copy_rows(config.whole, PASS_ROWS), cp_async.make_store(config.whole_out)
    (_, block_bounds), intervals, keep_rows = make_bounds(spec, BLOCK_N), make_intervals(spec), make_keep(spec)
    diagonal_of, alibi_from = make_diagonals(spec)
    prepare_score, fetch, score = make_score(spec, COUNT_S // TILES, SQUEEZE=config.squeeze)
    (prepare_mask, hide), SEEN = make_hide(spec.mask_mod), spec.mask_mod is not None
    plane_of, draw, dropout = make_dropout(spec, COUNT_S // TILES)
    (update, optimistic, finish), store_lse = make_softmax(spec), make_store_lse(spec)
    tile_at, num_tiles, unowned, key_row = make_tile_at(spec, BLOCK_M), make_num_tiles(spec), make_unowned(spec), make_key_row(BLOCK_N)
    SINKS, OPTIMISTIC = spec.sinks is not None, config.optimistic

    # ------------------------------------------------------------ helpers of this kernel
    @inline
    def prepare(a, batch, head):
        """What all rows of the head share: for scores, for the mask_mod."""
        return prepare_score(a, batch, head), prepare_mask(a, batch, head)

    @inline
    def park(base, k, v, head, batch, q_start, seqlen_q, seqlen_k, first):
        """Park what steps and epilogue need to know of the tile: the MMAs need the registers."""
        store_shared_b64(base + K_POINTER, k)
        store_shared_b64(base + V_POINTER, v)
        store_shared_b32(base + HEAD, head)
        store_shared_b32(base + BATCH, batch)
        store_shared_b32(base + Q_START, q_start)
        store_shared_b32(base + SEQLEN_Q, seqlen_q)
        store_shared_b32(base + SEQLEN_K, seqlen_k)
        store_shared_b32(base + FIRST, first)

    @inline
    def parked_tile(base):
        return ParkedTile(load_shared_b32(base + HEAD), load_shared_b32(base + BATCH), load_shared_b32(base + Q_START),
                          load_shared_b32(base + SEQLEN_Q), load_shared_b32(base + SEQLEN_K), load_shared_b32(base + FIRST))

    @inline
    def keep(a, acc_s, row, column, diagonal, seqlen_k):
        """The structural mask. row, column: the thread's first."""
        return keep_rows(acc_s, intervals(a, row, diagonal, seqlen_k), column)

    @inline
    def scale_tiles(acc_o, alphas):
        if TILES == 1:
            return scale_rows(acc_o, alphas[0][0], alphas[0][1])
        else:
            return join(scale_rows(part(acc_o, 0, 2), alphas[0][0], alphas[0][1]),
                        scale_rows(part(acc_o, 1, 2), alphas[1][0], alphas[1][1]))

    @inline
    def rescale(acc_o, alphas):
        """O on the scale of the new maxima. The branch skips multiplications by 1. It also keeps ptxas from moving the sums of P behind
        P V, which would need more registers."""
        change0 = alphas[0][0] != float32(1) or alphas[0][1] != float32(1)
        change1 = alphas[1][0] != float32(1) or alphas[1][1] != float32(1)
        if any_lane(int32(1) if change0 or change1 else int32(0)) != 0:
            acc_o = scale_tiles(acc_o, alphas)
        return acc_o

    @inline
    def row_of_thread(first):
        thread = thread_index()
        return int32(first + (thread >> 5) * WARP_ROWS + lane_row(int32(thread & 31)))

    @inline
    def col_of_thread():
        return thread_col(thread_index())

    @inline
    def q_lane(base):
        """This lane's ldmatrix address in its warp's Q."""
        thread = thread_index()
        return int32(base + Q + (thread >> 5) * (WARP_ROWS * ROW_BYTES) + lane_offset(thread))

    @inline
    def first_q(base):
        """Q as A operands, if KEEP_Q keeps it in registers."""
        if KEEP_Q:
            arrived()
            return load_rows(q_lane(base), TILES, HEAD_DIM, Q_PANEL)
        else:
            return int32(0)

    @inline
    def operand_q(base, q):
        if KEEP_Q:
            return q
        else:
            return q_lane(base)

    # ------------------------------------------------------------ load
    @inline
    def columns(dim, count):
        """Columns of a row in memory, of head size `dim` and in `count` panels. Rows of float32 parts fill their panels."""
        return int32(count * 64) if FLOATS else dim

    @inline
    def load_k(a, base, n_block, stage):
        copy_rows(int32(base + K + stage * K_BYTES), load_shared_b64(base + K_POINTER), a.k_row, a.k_dim, int32(n_block * BLOCK_N),
                  load_shared_b32(base + SEQLEN_K), columns(a.head_dim, PANELS), BLOCK_N, PANELS, KV_PANEL)

    @inline
    def load_v(a, base, n_block, stage):
        copy_rows(int32(base + V + stage * V_BYTES), load_shared_b64(base + V_POINTER), a.v_row, a.v_dim, int32(n_block * BLOCK_N),
                  load_shared_b32(base + SEQLEN_K), columns(a.head_dim_v, PANELS_V), BLOCK_N, PANELS_V, KV_PANEL)

    # ------------------------------------------------------------ step
    def make_step(MASKED, FAST):
        @inline
        def probabilities(a, acc_s, stat, early, shared, head, batch, row, column, seqlen_q, seqlen_k):
            """Softmax of 16 rows -> (P as an A operand, the new Stats, the factors of O). stat: Stats of the thread's rows."""
            max0, max1, sum0, sum1 = stat
            acc_s = score(a, acc_s, early, shared[0], row, column, alibi_from(a, batch, seqlen_q, seqlen_k))
            if MASKED:
                acc_s = keep(a, acc_s, row, column, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k)
                acc_s = hide(acc_s, a, shared[1], batch, head, row, column)
            acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1)
            acc_s = dropout(a, acc_s, draw(a, row, column, plane_of(a, batch, head)))
            return to_half(acc_s), Stats(max0, max1, sum0, sum1), (alpha0, alpha1)

        @inline
        def both(a, acc_s, stats, shared, head, batch, row, column, seqlen_q, seqlen_k):
            """`probabilities` of 32 rows."""
            early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
            p0, stat0, alpha0 = probabilities(a, part(acc_s, 0, 2), stats[0], early, shared, head, batch, row, column, seqlen_q, seqlen_k)
            row = int32(row + 16)
            early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
            p1, stat1, alpha1 = probabilities(a, part(acc_s, 1, 2), stats[1], early, shared, head, batch, row, column, seqlen_q, seqlen_k)
            return join(p0, p1), (stat0, stat1), (alpha0, alpha1)

        @inline
        def scores(a, acc_s, shared, head, batch, row, column, seqlen_q, seqlen_k):
            """Scores of 16 rows from their dot products."""
            early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
            return score(a, acc_s, early, shared[0], row, column, alibi_from(a, batch, seqlen_q, seqlen_k))

        @inline
        def hurried(a, acc_s, stats, shared, head, batch, row, column, seqlen_q, seqlen_k):
            """`optimistic` (softmax.py) of 32 rows -> (P under the maxima so far, the new sums, 1 if P must be recomputed)."""
            (max00, max01, sum00, sum01), (max10, max11, sum10, sum11) = stats
            s0 = scores(a, part(acc_s, 0, 2), shared, head, batch, row, column, seqlen_q, seqlen_k)
            s0, part00, part01, lags0 = optimistic(a, s0, max00, max01)
            s1 = scores(a, part(acc_s, 1, 2), shared, head, batch, int32(row + 16), column, seqlen_q, seqlen_k)
            s1, part10, part11, lags1 = optimistic(a, s1, max10, max11)
            plane = plane_of(a, batch, head)
            s0, s1 = dropout(a, s0, draw(a, row, column, plane)), dropout(a, s1, draw(a, int32(row + 16), column, plane))
            return join(to_half(s0), to_half(s1)), (sum00 + part00, sum01 + part01, sum10 + part10, sum11 + part11), lags0 | lags1

        @inline
        def step(a, base, q, shared, acc_o, stats, stage, n_block, n_min, after):
            """S = Q K^T, score, mask, softmax and O += P V for n_block, while the next operands are in flight: those of n_block - 1, or
            under a mask_mod of block `after`, if it is not negative."""
            arrived()
            if STAGES == 1:
                load_v(a, base, n_block, int32(0))
            head, batch, _, seqlen_q, seqlen_k, first = parked_tile(base)
            row, column = row_of_thread(first), int32(n_block * BLOCK_N + col_of_thread())
            if TILES == 1:      # with 32 rows there are no registers for it: `both` loads it when it is needed
                early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
            k_at = int32(base + K + stage * K_BYTES + lane_offset_b(thread_index()))
            acc_s = qk(zeros(COUNT_S), operand_q(base, q), k_at, TILES, HEAD_DIM, Q_PANEL, KV_PANEL)
            if STAGES == 1:
                arrived()
            if not SEEN:
                after = int32(n_block - 1)
            if (after >= 0) if SEEN else (n_block > n_min):
                load_k(a, base, after, int32(stage ^ (STAGES - 1)))
                if STAGES == 2:
                    load_v(a, base, after, int32(stage ^ 1))
            if TILES == 1:
                p, stat, alpha = probabilities(a, acc_s, stats[0], early, shared, head, batch, row, column, seqlen_q, seqlen_k)
                acc_o, stats = rescale(acc_o, (alpha, alpha)), (stat, stat)
            elif FAST:
                p, sums, lags = hurried(a, acc_s, stats, shared, head, batch, row, column, seqlen_q, seqlen_k)
                if any_lane(lags) != 0:
                    acc_s = qk(zeros(COUNT_S), operand_q(base, q), k_at, TILES, HEAD_DIM, Q_PANEL, KV_PANEL)
                    p, stats, alphas = both(a, acc_s, stats, shared, head, batch, row, column, seqlen_q, seqlen_k)
                    acc_o = scale_tiles(acc_o, alphas)
                else:
                    (max00, max01, _, _), (max10, max11, _, _) = stats
                    stats = Stats(max00, max01, sums[0], sums[1]), Stats(max10, max11, sums[2], sums[3])
            else:
                p, stats, alphas = both(a, acc_s, stats, shared, head, batch, row, column, seqlen_q, seqlen_k)
                acc_o = rescale(acc_o, alphas)
            v_at = int32(base + V + stage * V_BYTES + lane_offset(thread_index()))
            acc_o = pv(acc_o, p, v_at, TILES, KV_PANEL)
            return acc_o, stats, int32(stage ^ (STAGES - 1))
        return step
    step_masked, step_full = make_step(True, False), make_step(False, OPTIMISTIC)

    # ------------------------------------------------------------ epilogue
    @inline
    def finish_rows(a, acc_o, stat, to, head, batch, q_start, seqlen_q, lane, row):
        """Of 16 rows: store lse to global memory and O to this warp's part of shared memory; float32 O to global memory, too."""
        max0, max1, sum0, sum1 = stat
        scale0, scale1, lse0, lse1 = finish(a, head, max0, max1, sum0, sum1)
        if PACKED and SINKS:
            if unowned(a, int32(cuda.blockIdx.x)) == UNOWNED:
                lse0, lse1 = NEG_INF, NEG_INF
        acc_o = scale_rows(acc_o, scale0, scale1)
        if STORE_FLOATS:
            at = uint64(a.out + uint64(batch * a.out_batch + int64(q_start + row) * a.out_row + head * a.out_head
                                       + col_of_thread() * a.out_dim))
            rows0, rows1 = int32(1) if row < seqlen_q else int32(0), int32(1) if row + 8 < seqlen_q else int32(0)
            store_floats(acc_o, at, uint64(at + uint64(8 * a.out_row)), a.out_dim, rows0, rows1, int32(a.head_dim_v - col_of_thread()),
                         1)
        else:
            store_rows(to_half(acc_o), to, lane, Q_PANEL)
        store_lse(a, head, batch, q_start, seqlen_q, lane, row, lse0, lse1)

    @inline
    def epilogue(a, base, acc_o, stats):
        """Store `out` through the shared memory of this warp's Q, so that a thread stores 16 bytes at a time."""
        head, batch, q_start, seqlen_q, _, first = parked_tile(base)
        lane, row = int32(thread_index() & 31), row_of_thread(first)
        row0 = int32(row - lane_row(lane))
        q_rows = int32(base + Q + (row0 - first) * ROW_BYTES)
        cuda.syncwarp()         # until all lanes have read Q
        if TILES == 1:
            finish_rows(a, acc_o, stats[0], q_rows, head, batch, q_start, seqlen_q, lane, row)
        else:
            finish_rows(a, part(acc_o, 0, 2), stats[0], q_rows, head, batch, q_start, seqlen_q, lane, row)
            finish_rows(a, part(acc_o, 1, 2), stats[1], int32(q_rows + 16 * ROW_BYTES), head, batch, q_start, seqlen_q, lane,
                        int32(row + 16))
        if STORE_FLOATS:
            return
        cuda.syncwarp()
        behind, chunk = int32(lane >> 3), int32(lane & 7)
        row0 = int32(row0 + behind)
        to = uint64(a.out + uint64(batch * a.out_batch + int64(q_start + row0) * a.out_row + head * a.out_head + 8 * chunk * a.out_dim))
        store_tile(int32(q_rows + behind * ROW_BYTES + ((chunk ^ behind) << 4)), to, a.out_row, a.out_dim, int32(seqlen_q - row0),
                   int32(a.head_dim_v - 8 * chunk), WARP_ROWS, PANELS_V, Q_PANEL)

    @inline
    def go_through(a, base, q, shared, acc_o, stats, line, found, bounds):
        """The steps of a tile under a mask_mod: from block to block that its bitmap shows."""
        (n_min, full_min, full_max), stage, first = bounds, int32(0), True
        while found >= 0:
            n_block = int32(found >> 1)
            after = last_seen(line, n_min, n_block)
            full = ((found & 1) != 0) & (n_block >= full_min) & (n_block < full_max)
            if OPTIMISTIC:          # there is no maximum yet
                full = full & (not first)
            if full:
                acc_o, stats, stage = step_full(a, base, q, shared, acc_o, stats, stage, n_block, n_min, int32(after >> 1))
            else:
                acc_o, stats, stage = step_masked(a, base, q, shared, acc_o, stats, stage, n_block, n_min, int32(after >> 1))
            found, first = after, False
        return acc_o, stats

    def kernel(a):
        t = int32(cuda.blockIdx.x)
        if t >= num_tiles(a):
            return
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 127) & -128)       # aligned as a row of a panel
        tile = tile_at(a, t)
        m_block, head, batch, q_start, seqlen_q, _, seqlen_k = tile
        head_k, first = int32(head // a.group), int32(m_block * BLOCK_M)
        n_min, full_min, full_max, n_max = block_bounds(a, first, min(first + BLOCK_M, seqlen_q),
                                                        diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k)
        shared, first_key = prepare(a, batch, head), int64(key_row(a, tile.k_start, 0))      # steps count blocks from it
        if cuda.threadIdx.x == 0:
            park(base, uint64(a.k + uint64(batch * a.k_batch + first_key * a.k_row + head_k * a.k_head)),
                 uint64(a.v + uint64(batch * a.v_batch + first_key * a.v_row + head_k * a.v_head)),
                 head, batch, q_start, seqlen_q, seqlen_k, first)
        cuda.syncthreads()
        copy_rows(int32(base + Q), uint64(a.q + uint64(batch * a.q_batch + int64(q_start) * a.q_row + head * a.q_head)), a.q_row, a.q_dim,
                  first, seqlen_q, columns(a.head_dim, PANELS), BLOCK_M, PANELS, Q_PANEL)
        n_first = int32(n_max - 1)
        if SEEN:        # a tile whose rows see nothing has one block, which the mask hides
            line = line_of(a, batch, head, m_block)
            found = last_seen(line, n_min, n_max)
            found = int32(2 * n_first) if found < 0 else found
            n_first = int32(found >> 1)
        load_k(a, base, n_first, int32(0))
        if STAGES == 2:
            load_v(a, base, n_first, int32(0))
        q = first_q(base)
        start = Stats(NEG_INF, NEG_INF, float32(0), float32(0))
        acc_o, stats, stage = zeros(COUNT_O), (start, start), int32(0)
        n_block = int32(n_max)
        if OPTIMISTIC:       # there is no maximum yet
            full_max = min(full_max, n_max - 1)
        if SEEN:
            acc_o, stats = go_through(a, base, q, shared, acc_o, stats, line, found, (n_min, full_min, int32(full_max)))
        else:
            while n_block > full_max:
                n_block = int32(n_block - 1)
                acc_o, stats, stage = step_masked(a, base, q, shared, acc_o, stats, stage, n_block, n_min, int32(0))
            while n_block > full_min:
                n_block = int32(n_block - 1)
                acc_o, stats, stage = step_full(a, base, q, shared, acc_o, stats, stage, n_block, n_min, int32(0))
            if LEFT:
                while n_block > n_min:
                    n_block = int32(n_block - 1)
                    acc_o, stats, stage = step_masked(a, base, q, shared, acc_o, stats, stage, n_block, n_min, int32(0))
        epilogue(a, base, acc_o, stats)

    return kernel, smem.size - ALIGN + 128      # two blocks of 49 KiB fit 100 KiB, of 50 KiB not
