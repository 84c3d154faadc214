"""Forward of float32 for Hopper, on bfloat16 tensor cores: each operand is three parts, and a product six (ptx/parts.py).

    warpgroup 0     K and V, panel after panel. Up to head_dim 128 all its threads read them as float32 and store their parts; over it one
                    thread issues TMA loads of parts
    warpgroups 1, 2 S = Q K^T, softmax, O += P V. Up to head_dim 256 each has 64 query rows. Over it both have the same 64 rows: each
                    sums its half of every panel's columns of S, they exchange these sums, and each has half of the columns of O

    shared memory   Q, float32 | STAGES x a panel of K or V: 64 columns in three parts | the halves of S | barriers | parked words
    ring            FULL, EMPTY as in forward.py. A step takes all panels of K, then those of V: of both warpgroups in turns, if they
                    share rows; each lets the other's pass

Over head_dim 128 the producer has no registers to split with, and rows/split.py has written the parts of K and V before. Q stays float32 in
shared memory, 4 bytes an element and not 6: its parts would take 192 KB at head_dim 512. It is split in registers as it is loaded, 11
instructions for two numbers, which the other warpgroup's MMAs hide, and read once for six products. Tensor cores cut sums off, so a panel's
products have an accumulator of their own (of S: half a panel's), which ordinary additions add to S and to O.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx import cp_async, mbarrier, tma, wgmma, wgmma_float
from ..ptx.memory import shared_address
from ..ptx.sync import (
    barrier,
    barrier_arrive,
    decrease_registers,
    fence_async,
    increase_registers,
    opaque,
    thread_index,
    uniform,
    wait_for_previous,
)
from ..ptx.wgmma_float import CHUNK_BYTES, copy4_if, copy16_if
from ..spec import Spec
from ..tile.dropout import make_dropout
from ..tile.fragments import add, add_columns, lane_row, make_pack, quad_sum, scale_seen_rows, thread_col, zeros
from ..tile.gradients import add_piece, store_piece
from ..tile.mask import make_diagonals, make_keep
from ..tile.parked import park, parked, word
from ..tile.rescale import rescale
from ..tile.ring import make_ring
from ..tile.schedule import UNOWNED, make_key_row, make_num_tiles, make_tile_at, make_unowned
from ..tile.scores import make_score
from ..tile.smem import ALIGN, PANEL, ROW_BYTES, WARPGROUP, WARPGROUP_ROWS, Smem, make_clear, panels
from ..tile.softmax import NEG_INF, make_softmax, make_store_lse
from ..tile.stores import store_floats
from .bounds import make_tile_bounds
from .config_float import ForwardFloatConfig, columns_of

PANEL_COUNT = PANEL // 2            # registers of a panel of 64 columns of O
COPY = 4                            # columns of Q in 16 bytes


def make_unfinished(store_lse: Any) -> tuple[Any, Any]:
    """(finish, store_lse) of a split of the keys: O stays undivided. In the place of lse are maxima of all rows, and behind them sums."""
    @inline
    def finish(a, head, max0, max1, sum0, sum1):
        return float32(1), float32(1), (max0, quad_sum(sum0)), (max1, quad_sum(sum1))

    @inline
    def store(a, head, batch, q_start, seqlen_q, lane, row, state0, state1):
        store_lse(a, head, batch, q_start, seqlen_q, lane, row, state0[0], state1[0])
        store_lse(a, head, int32(batch + a.batch), q_start, seqlen_q, lane, row, state0[1], state1[1])
    return finish, store


def make_forward_float(spec: Spec, config: ForwardFloatConfig, WHOLE: bool) -> tuple[Any, int]:
    """(kernel, bytes of shared memory). WHOLE: rows of q consist of aligned pieces of 16 bytes."""
    BLOCK_M, BLOCK_N, STAGES, SHARED, CONSUMERS = config.block_m, config.block_n, config.stages, config.slices > 1, config.consumers
    COLUMNS = columns_of(spec, config)
    ROWS_APART, COLUMNS_APART = (0, COLUMNS) if SHARED else (WARPGROUP_ROWS, 0)         # of the warpgroups
    PARTS, PANELS, PANELS_V, ALL_V = spec.parts, panels(spec.head_dim), panels(COLUMNS), panels(spec.head_dim_v)
    PART_BYTES, THREADS, TURNS = BLOCK_N * ROW_BYTES, WARPGROUP * CONSUMERS, CONSUMERS if SHARED else 1
    SLOT, Q_ROW, COUNT_S, COUNT_O = PARTS * PART_BYTES, 4 * PANEL * PANELS, BLOCK_N // 2, COLUMNS // 2
    PIECES = Q_ROW // 16                                            # of a row of Q
    WHOLE_PANELS = PANELS - (not SHARED and 0 < spec.head_dim % PANEL <= PANEL // 2)        # of K: of the last one half may be 0
    PACKED, SINKS, STEP_USES = spec.packed, spec.sinks is not None, PANELS + TURNS * PANELS_V
    smem = Smem()
    Q, RING = smem.take(BLOCK_M * Q_ROW), smem.take(STAGES * SLOT)
    HALF_S = WARPGROUP * COUNT_S * 4
    HALVES = smem.take(CONSUMERS * HALF_S if SHARED else 0)
    HEAD, BATCH, Q_START, SEQLEN_Q, SEQLEN_K, K_START, FIRST, N_MIN, N_MAX, FULL_MIN, _, FULL_MAX, _ = parked(smem, 13)   # FULL: two each
    ring = make_ring(smem, STAGES, 4 * CONSUMERS)
    # named barriers: Q is there; both halves of S are there; a warpgroup's half has been read; V's tail is cleared, by a warpgroup; all
    # threads of the producer have filled a slot
    LOADED, BOTH, TAKEN, CLEARED, FILLED = smem.named(1), smem.named(1), smem.named(CONSUMERS), smem.named(CONSUMERS), smem.named(1)
    SPLIT, KEEP_Q, EARLY = config.split, config.keep_q, spec.bias is None          # a bias takes a register for each score
    UPPER, LOWER = BLOCK_N // 32, BLOCK_N // 16 - BLOCK_N // 32         # lines of a panel, 16 rows each, of a thread of the producer
    tile_blocks, full_blocks, intervals = make_tile_bounds(spec, BLOCK_M, BLOCK_N)
    give_registers, take_registers = decrease_registers(config.producer_registers), increase_registers(config.consumer_registers)
    to_parts, keep, (diagonal_of, alibi_from) = make_pack(spec.dtype), make_keep(spec), make_diagonals(spec)
    prepare, fetch, score = make_score(spec, COUNT_S)
    plane_of, draw, dropout = make_dropout(spec, COUNT_S)
    (update, _, finish), store_lse, clear = make_softmax(spec), make_store_lse(spec), make_clear(BLOCK_N, PARTS, WARPGROUP)
    if config.partial:
        finish, store_lse = make_unfinished(store_lse)
    tile_at, num_tiles, unowned, key_row = make_tile_at(spec, BLOCK_M), make_num_tiles(spec), make_unowned(spec), make_key_row(BLOCK_N)

    # ------------------------------------------------------------ where a thread of a consumer is
    @inline
    def own_warpgroup():
        return int32(uniform(int32(thread_index() >> 7)) - 1)

    @inline
    def own_warp():
        return int32((thread_index() >> 5) & 3)

    @inline
    def own_lane():
        return int32(thread_index() & 31)

    @inline
    def own_row(base):
        """The thread's first row in its sequence."""
        return int32(word(base, FIRST) + own_warpgroup() * ROWS_APART + own_warp() * 16 + lane_row(own_lane()))

    # ------------------------------------------------------------ load: by one thread, or by all of the producer's
    @inline
    def source_of(a, base, n_block, p):
        """Where this thread's columns of panel p of a key block begin in memory, bytes between rows, rows and columns that exist from there
        on: none below the tile's last block. The panels of V come after those of K."""
        head_k, batch, k_start = divide(word(base, HEAD), a.group), word(base, BATCH), word(base, K_START)
        row = int32(n_block * BLOCK_N + (thread_index() >> 3))
        rows = int32(word(base, SEQLEN_K) - row) if n_block >= word(base, N_MIN) else int32(0)
        column = int32((p if p < PANELS else p - PANELS) * PANEL + 8 * (thread_index() & 7))
        if p < PANELS:
            at = int64(a.k) + batch * a.k_batch + int64(k_start + row) * a.k_row + head_k * a.k_head
            by_row, dim = a.k_row, a.head_dim
        else:
            at = int64(a.v) + batch * a.v_batch + int64(k_start + row) * a.v_row + head_k * a.v_head
            by_row, dim = a.v_row, a.head_dim_v
        return uint64(at + 4 * column), by_row, rows, int32(dim - column)

    @inline
    def split(a, base):
        """All panels of the tile, by a warpgroup: the rows of each in two halves, which are loaded as soon as registers are free."""
        line, piece = int32(thread_index() >> 3), int32(thread_index() & 7)
        to = int32(base + RING + line * ROW_BYTES + ((piece ^ (line & 7)) << 4))
        it, p, n_block = int32(0), int32(0), int32(word(base, N_MAX) - 1)
        at, by_row, rows, columns = source_of(a, base, n_block, p)
        upper = wgmma_float.load_lines(at, by_row, rows, columns, 0, UPPER)
        lower = wgmma_float.load_lines(at, by_row, rows, columns, UPPER, LOWER)
        while n_block >= word(base, N_MIN):
            p = int32(p + 1)
            if p == STEP_USES:
                p, n_block = int32(0), int32(n_block - 1)
            at, by_row, rows, columns = source_of(a, base, n_block, p)
            stage, phase = ring.use(it)
            ring.wait_empty(base, stage, int32(phase ^ 1))
            wgmma_float.store_lines(upper, int32(to + stage * SLOT), PART_BYTES, 0)
            upper = wgmma_float.load_lines(at, by_row, rows, columns, 0, UPPER)
            wgmma_float.store_lines(lower, int32(to + stage * SLOT), PART_BYTES, UPPER)
            lower = wgmma_float.load_lines(at, by_row, rows, columns, UPPER, LOWER)
            fence_async()
            barrier(int32(FILLED), int32(WARPGROUP))
            if thread_index() == 0:
                ring.arrive_full(base, stage)
            it = int32(it + 1)

    @inline
    def load_panel(base, map_, it, column, by_part, row, head_k, batch):
        """The parts of 64 columns of K or V, `by_part` columns from each other."""
        stage, phase = ring.use(it)
        ring.wait_empty(base, stage, int32(phase ^ 1))
        ring.arrive_expect(base, stage, int32(SLOT))
        to, full = int32(base + RING + stage * SLOT), int32(base + ring.full(stage))
        for part in range(PARTS):
            tma.load(int32(to + part * PART_BYTES), map_, full, int32(column + part * by_part), row, head_k, batch)
        return int32(it + 1)

    @inline
    def load(a, base):
        """All panels of the tile, by one thread, from parts in memory."""
        head_k, batch = divide(word(base, HEAD), a.group), int32(0) if PACKED else word(base, BATCH)
        it, n_block, n_min, k_start = int32(0), word(base, N_MAX), word(base, N_MIN), word(base, K_START)
        while n_block > n_min:
            n_block = int32(n_block - 1)
            row = key_row(a, k_start, n_block)
            for p in range(PANELS):
                it = load_panel(base, a.map_k, it, int32(p * PANEL), int32(PANELS * PANEL), row, head_k, batch)
            for p in range(PANELS_V):
                for w in range(TURNS):      # the last one of an odd number is loaded twice, and its second result is not stored
                    column = int32(min(w * PANELS_V + p, ALL_V - 1) * PANEL)
                    it = load_panel(base, a.map_v, it, column, int32(ALL_V * PANEL), row, head_k, batch)

    @inline
    def copy_piece(a, to, source, columns):
        """Four columns of Q, of which `columns` exist."""
        if WHOLE:
            copy16_if(to, uint64(source), int32(min(max(4 * columns, 0), 16)))
        else:
            for k in range(COPY):
                copy4_if(int32(to + 4 * k), uint64(source + k * a.q_dim), int32(4 if k < columns else 0))

    @inline
    def load_q(a, base):
        """Q, by both warpgroups, in the places that ptx/wgmma_float.py reads."""
        i, first, seqlen_q = int32(thread_index() - WARPGROUP), word(base, FIRST), word(base, SEQLEN_Q)
        source = int64(a.q) + word(base, BATCH) * a.q_batch + word(base, Q_START) * a.q_row + word(base, HEAD) * a.q_head
        while i < BLOCK_M * PIECES:
            row = divide(i, int32(PIECES))
            piece = int32(i - row * PIECES)
            to = int32(base + Q + row * Q_ROW + ((piece ^ ((row & 3) << 1)) << 4))
            columns = int32(a.head_dim - COPY * piece) if first + row < seqlen_q else int32(0)
            copy_piece(a, to, int64(source + (first + row) * a.q_row + COPY * piece * a.q_dim), columns)
            i = int32(i + THREADS)
        cp_async.wait_all()
        barrier(int32(LOADED), int32(THREADS))

    # ------------------------------------------------------------ S = Q K^T
    @inline
    def slot_of(base, stage):
        """Opaque: the loop does not keep the descriptors of all products."""
        return int32(base + RING + opaque(stage) * SLOT)

    @inline
    def q_rows(base):
        """Where the lane's numbers of Q begin: its row, and its two columns of eight."""
        row = int32(own_warpgroup() * ROWS_APART + own_warp() * 16 + lane_row(own_lane()))
        return int32(base + Q + row * Q_ROW + (own_lane() & 3) * 8)

    @inline
    def split_q(q_at):
        """The parts of 32 columns of the thread's rows of Q."""
        return wgmma_float.load_parts(q_at, int32((lane_row(own_lane()) & 3) * 32), Q_ROW)

    @inline
    def kept_q(base):
        """The parts of all of Q, if KEEP_Q keeps them in registers."""
        if KEEP_Q:
            return split_q(q_rows(base)), split_q(int32(q_rows(base) + CHUNK_BYTES))
        else:
            return int32(0)

    @inline
    def chunk(base, acc_s, stage, q, half):
        """acc_s + Q K^T of 32 columns: half of the panel in a slot."""
        wgmma.fence()
        product = wgmma_float.qk(zeros(COUNT_S), q, wgmma.k_major(int32(slot_of(base, stage) + half * (ROW_BYTES // 2))), PART_BYTES)
        wgmma.commit()
        return add(acc_s, wgmma.wait_all(product))

    def make_panel(HALVES):
        """acc_s = panel(base, acc_s, q, it, q_at, lane): acc_s + Q K^T of the panel in use `it` of the ring. Of both halves of its columns,
        of one if the other is 0, of the warpgroup's if it shares its rows."""
        @inline
        def panel(base, acc_s, q, it, q_at, lane):
            stage, phase = ring.use(it)
            if SHARED:
                half = own_warpgroup()
                own = split_q(int32(q_at + half * CHUNK_BYTES))
                ring.wait_full(base, stage, phase)
                acc_s = chunk(base, acc_s, stage, own, half)
            elif KEEP_Q:
                ring.wait_full(base, stage, phase)
                acc_s = chunk(base, acc_s, stage, q[0], int32(0))
                if HALVES == 2:
                    acc_s = chunk(base, acc_s, stage, q[1], int32(1))
            else:
                own = split_q(q_at)
                ring.wait_full(base, stage, phase)
                acc_s = chunk(base, acc_s, stage, own, int32(0))
                if HALVES == 2:
                    acc_s = chunk(base, acc_s, stage, split_q(int32(q_at + CHUNK_BYTES)), int32(1))
            ring.release(base, stage, lane)
            return acc_s
        return panel
    whole_panel, half_panel = make_panel(2), make_panel(1)

    @inline
    def products(base, q, it, lane):
        """S of the rows; of shared ones the sum over half of the columns. q: kept_q's."""
        acc_s, q_at, p = zeros(COUNT_S), q_rows(base), int32(0)
        while p < WHOLE_PANELS:
            acc_s = whole_panel(base, acc_s, q, int32(it + p), q_at, lane)
            q_at, p = int32(q_at + 2 * CHUNK_BYTES), opaque(int32(p + 1))       # opaque: not unrolled, which would spill
        if WHOLE_PANELS < PANELS:
            acc_s = half_panel(base, acc_s, q, int32(it + WHOLE_PANELS), q_at, lane)
        return acc_s

    @inline
    def exchanged(base, acc_s):
        """The sum of both warpgroups' halves, which has the same bits in both."""
        if SHARED:
            w = own_warpgroup()
            own = int32(base + HALVES + own_warp() * (32 * 4 * COUNT_S) + own_lane() * 16)
            barrier(int32(TAKEN + w), int32(THREADS))               # the other has read the half before
            store_piece(acc_s, int32(own + w * HALF_S))
            barrier(int32(BOTH), int32(THREADS))
            acc_s = add_piece(acc_s, int32(own + (1 - w) * HALF_S))
            barrier_arrive(int32(TAKEN + 1 - w), int32(THREADS))
        return acc_s

    # ------------------------------------------------------------ O += P V
    @inline
    def clear_tail(base, stage, n_block, seqlen_k):
        """Zeros in the slot behind the keys of a packed sequence."""
        if PACKED and not SPLIT:
            rows = int32(seqlen_k - n_block * BLOCK_N)
            if rows < BLOCK_N:
                clear(slot_of(base, stage), rows, int32(thread_index() & (WARPGROUP - 1)))
                fence_async()
                barrier(int32(CLEARED + own_warpgroup()), int32(WARPGROUP))

    @inline
    def pass_on(base, it, lane):
        """The other warpgroup's panel: released as soon as it is there."""
        stage, phase = ring.use(it)
        ring.wait_full(base, stage, phase)
        ring.release(base, stage, lane)

    def make_add(PLACE):
        """acc_o = add_panels(base, acc_o, p, it, lane, n_block, seqlen_k): O of the warpgroup's panels from PLACE on, the first in use `it`
        of the ring."""
        MORE, FIRST_COLUMN, COUNT = PLACE + 1 < PANELS_V, PLACE * PANEL_COUNT, min(COUNT_O - PLACE * PANEL_COUNT, PANEL_COUNT)
        add_more: Any = make_add(PLACE + 1) if MORE else None

        @inline
        def add_panels(base, acc_o, p, it, lane, n_block, seqlen_k):
            turn = own_warpgroup() if SHARED else int32(0)
            stage, phase = ring.use(int32(it + turn))
            ring.wait_full(base, stage, phase)
            clear_tail(base, stage, n_block, seqlen_k)
            wgmma.fence()
            product = wgmma.pv_parts(zeros(COUNT), p, wgmma.mn_major(slot_of(base, stage), PART_BYTES), PART_BYTES)
            wgmma.commit()
            if SHARED:
                pass_on(base, int32(it + 1 - turn), lane)
            acc_o = add_columns(acc_o, wgmma.wait_all(product), FIRST_COLUMN)
            ring.release(base, stage, lane)
            if MORE:
                acc_o = add_more(base, acc_o, p, int32(it + TURNS), lane, n_block, seqlen_k)
            return acc_o
        return add_panels
    add_panels = make_add(0)

    # ------------------------------------------------------------ a step, and the tile
    @inline
    def step(a, base, q, acc_o, max0, max1, sum0, sum1, it, n_block):
        """Key block n_block, whose first panel is use `it` of the ring. q: kept_q's."""
        lane = own_lane()
        column = int32(n_block * BLOCK_N + thread_col(lane))
        if EARLY:
            early = fetch(a, word(base, BATCH), word(base, HEAD), own_row(base), column, word(base, SEQLEN_Q), word(base, SEQLEN_K))
        acc_s = exchanged(base, products(base, q, it, lane))
        batch, head, row = word(base, BATCH), word(base, HEAD), own_row(base)
        seqlen_q, seqlen_k = word(base, SEQLEN_Q), word(base, SEQLEN_K)
        if not EARLY:
            early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
        acc_s = score(a, acc_s, early, prepare(a, batch, head), row, column, alibi_from(a, batch, seqlen_q, seqlen_k))
        own = int32(4 * own_warpgroup())
        if (n_block < word(base, FULL_MIN + own)) | (n_block >= word(base, FULL_MAX + own)):
            acc_s = keep(acc_s, intervals(a, row, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k), column)
        acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1)
        acc_o = rescale(acc_o, alpha0, alpha1)
        p = to_parts(dropout(a, acc_s, draw(a, row, column, plane_of(a, batch, head))))
        acc_o = add_panels(base, acc_o, p, int32(it + PANELS), lane, n_block, word(base, SEQLEN_K))
        return acc_o, max0, max1, sum0, sum1

    @inline
    def consume(a, base):
        """Both warpgroups: the tile's output and lse."""
        diagonal, w = diagonal_of(a, word(base, BATCH), word(base, SEQLEN_Q), word(base, SEQLEN_K)), own_warpgroup()
        full_min, full_max = full_blocks(a, int32(word(base, FIRST) + w * ROWS_APART), diagonal, word(base, SEQLEN_K))
        park(base, FULL_MIN + 4 * w, full_min)
        park(base, FULL_MAX + 4 * w, full_max)
        load_q(a, base)
        if SHARED:
            barrier_arrive(int32(TAKEN + 1 - w), int32(THREADS))
        n_block, it, q = uniform(word(base, N_MAX)), int32(0), kept_q(base)
        acc_o, max0, max1, sum0, sum1 = zeros(COUNT_O), NEG_INF, NEG_INF, float32(0), float32(0)
        while n_block > uniform(word(base, N_MIN)):
            n_block = int32(n_block - 1)
            acc_o, max0, max1, sum0, sum1 = step(a, base, q, acc_o, max0, max1, sum0, sum1, it, n_block)
            it = int32(it + STEP_USES)
        epilogue(a, base, acc_o, max0, max1, sum0, sum1)

    @inline
    def epilogue(a, base, acc_o, max0, max1, sum0, sum1):
        head, batch, q_start, seqlen_q, w = word(base, HEAD), word(base, BATCH), word(base, Q_START), word(base, SEQLEN_Q), own_warpgroup()
        scale0, scale1, lse0, lse1 = finish(a, head, max0, max1, sum0, sum1)
        if PACKED and SINKS:
            if unowned(a, int32(cuda.blockIdx.x)) == UNOWNED:
                lse0, lse1 = NEG_INF, NEG_INF
        row, column = own_row(base), int32(w * COLUMNS_APART + thread_col(own_lane()))
        at = uint64(int64(a.out) + batch * a.out_batch + int64(q_start + row) * a.out_row + head * a.out_head + column * a.out_dim)
        rows0, rows1 = int32(1) if row < seqlen_q else int32(0), int32(1) if row + 8 < seqlen_q else int32(0)
        store_floats(scale_seen_rows(acc_o, scale0, scale1), at, uint64(at + uint64(8 * a.out_row)), a.out_dim, rows0, rows1,
                     int32(a.head_dim_v - column), 1)
        if not SHARED or w == 0:
            store_lse(a, head, batch, q_start, seqlen_q, own_lane(), row, lse0, lse1)

    def kernel(a):
        wait_for_previous()
        t = int32(cuda.blockIdx.x)
        if t >= num_tiles(a):
            return
        base = opaque(int32((shared_address(cuda.shared.array(0, uint8)) + ALIGN - 1) & -ALIGN))
        tile = tile_at(a, t)
        m_block, head, batch, q_start, seqlen_q, k_start, seqlen_k = tile
        n_min, n_max, _ = tile_blocks(a, batch, head, m_block, seqlen_q, seqlen_k)
        if cuda.threadIdx.x == 0:
            park(base, HEAD, head)
            park(base, BATCH, batch)
            park(base, Q_START, q_start)
            park(base, SEQLEN_Q, seqlen_q)
            park(base, SEQLEN_K, seqlen_k)
            park(base, K_START, k_start)
            park(base, FIRST, int32(m_block * BLOCK_M))
            park(base, N_MIN, n_min)
            park(base, N_MAX, n_max)
            ring.init(base)
            mbarrier.fence_init()
        cuda.syncthreads()
        if uniform(int32(cuda.threadIdx.x >> 7)) == 0:
            give_registers()
            if SPLIT:
                split(a, base)
            elif cuda.threadIdx.x == 0:
                load(a, base)
        else:
            take_registers()
            consume(a, base)

    return kernel, smem.size
