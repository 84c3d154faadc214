"""Forward for Hopper: TMA loads and wgmma run asynchronously, each warpgroup has one role, thread blocks are persistent.

    warpgroup 0     one thread issues the TMA loads of Q, K and V and draws tile indices from an atomic counter
    warpgroups 1..  64 query rows each: S = Q K^T and O += P V on the tensor cores, softmax in between
                    head_dim over 256: the same 64 rows, and a slice of O's columns each; each computes all of S

    shared memory   Q | STAGES x (K, V, a bias that TMA copies) | out, if there is room | barriers | tile records
    Q, K and V rings: FULL      TMA -> consumers: the bytes have arrived
    Q, K and V rings: EMPTY     consumers -> producer: the slot may be overwritten; the bias belongs to the K ring
    tile records                the producer is up to two tiles ahead

A step issues S = Q K^T of its key block, then O += P V of the block before, and computes its softmax while that MMA runs. Key blocks go
from last to first. A tile begins with S of its first block and ends with P V of its last and the epilogue, during which the next Q arrives.
What this rung wins over the sm80 forward: no thread copies or waits for copies, and a warpgroup's softmax is hidden behind MMAs, its own
and another warpgroup's. (Design: FlashAttention-3, Shah et al. 2024.)
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx import mbarrier, tma, wgmma
from ..ptx.memory import atomic_add_b32, atomic_inc_wrap, fence_gpu, shared_address, store_b32
from ..ptx.sync import (
    any_lane,
    any_thread,
    barrier,
    barrier_arrive,
    fence_async,
    opaque,
    thread_index,
    uniform,
)
from ..spec import Spec
from ..tile.bias import make_bias_tile, tile_bytes
from ..tile.dropout import make_dropout
from ..tile.fragments import make_pack, scale_rows, thread_col, zeros
from ..tile.mask import make_diagonals, make_keep
from ..tile.pages import make_key_loads
from ..tile.rescale import changed
from ..tile.ring import make_ring
from ..tile.schedule import make_key_row, make_num_tiles
from ..tile.scores import make_score
from ..tile.smem import ALIGN, PANEL, ROW_BYTES, WARPGROUP, WARPGROUP_ROWS, Smem, make_clear, make_copy_rows, panels
from ..tile.softmax import NEG_INF, make_softmax
from .bounds import make_tile_bounds
from .config import ForwardSm90Config, slice_dim
from .epilogue import make_epilogue, out_bytes
from .records import TILE, make_records
from .roles import make_roles
from .seen import Tile, make_load_seen, make_seen, stays
from .values import SECOND, make_load_values


def make_forward(spec: Spec, config: ForwardSm90Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    # constants: tile sizes, bytes, registers a thread
    BLOCK_M, BLOCK_N, STAGES, CONSUMERS, SLICES = config.block_m, config.block_n, config.stages, config.consumers, config.slices
    # each warpgroup has rows of its own, or a slice of the columns of O
    COLUMNS, ROWS_APART = slice_dim(spec.head_dim_v, SLICES), WARPGROUP_ROWS if SLICES == 1 else 0
    HEAD_DIM, PANELS, PANELS_V = spec.head_dim, panels(spec.head_dim), SLICES * panels(COLUMNS)
    Q_PANEL, KV_PANEL = BLOCK_M * ROW_BYTES, BLOCK_N * ROW_BYTES
    Q_APART, V_APART = ROWS_APART * ROW_BYTES, 0 if SLICES == 1 else panels(COLUMNS) * KV_PANEL
    Q_BYTES, K_BYTES, V_BYTES = PANELS * Q_PANEL, PANELS * KV_PANEL, PANELS_V * KV_PANEL
    COUNT_S, COUNT_O, WARPS, THREADS = BLOCK_N // 2, COLUMNS // 2, 4 * CONSUMERS, WARPGROUP * CONSUMERS
    PACKED, MASK, MASKED_ALWAYS, CACHED = spec.packed, spec.mask, spec.left or spec.right, spec.lengths
    OPTIMISTIC, HINTS = config.optimistic, config.hints
    TWO_PRODUCERS = config.box > 0 and config.wide_producer
    LATE_V = STAGES == 1                    # V of a block is loaded after K of the next one, whose slot is free earlier
    BIAS_TILES, BIAS_BYTES = spec.bias_tiles, tile_bytes(BLOCK_M, BLOCK_N) if spec.bias_tiles else 0
    TURNS, FEW_UNIFORM = config.turns and CONSUMERS > 1, MASKED_ALWAYS and HEAD_DIM > 192

    # shared memory and barriers
    smem = Smem()
    Q, K, V = smem.take(Q_BYTES), smem.take(STAGES * K_BYTES), smem.take(STAGES * V_BYTES)
    BIAS, OUT = smem.take(STAGES * BIAS_BYTES), smem.take(out_bytes(config, COLUMNS))
    tile_blocks, full_blocks, intervals = make_tile_bounds(spec, BLOCK_M, BLOCK_N)
    records = make_records(spec, BLOCK_M, smem, WARPS, tile_blocks)
    q_ring, k_ring, v_ring = make_ring(smem, 1, WARPS), make_ring(smem, STAGES, WARPS), make_ring(smem, STAGES, WARPS)
    seen, SEEN = make_seen(spec, STAGES, OPTIMISTIC, smem, k_ring), spec.mask_mod is not None

    # what the steps are made of
    (qk, pv), to_half = wgmma.make_products(spec.dtype), make_pack(spec.dtype)
    PRODUCER, FIRST, give_registers, take_registers = make_roles(config)
    copy_bias, lane_address, read_bias = make_bias_tile(spec, BLOCK_M, BLOCK_N, COUNT_S)
    prepare, fetch, score = make_score(spec, COUNT_S, READ_BIAS=read_bias if BIAS_TILES else None)
    plane_of, draw, dropout = make_dropout(spec, COUNT_S, EARLY=not spec.mask and spec.bias is None)      # overlapped with the MMA of S
    keep, num_tiles, key_row, (diagonal_of, alibi_from) = make_keep(spec), make_num_tiles(spec), make_key_row(BLOCK_N), make_diagonals(spec)
    keep_after = keep if MASKED_ALWAYS else stays       # with a mask_mod alone, only a tile's first block may reach over the last key
    copy_q, copy_kv = (make_copy_rows(tma.evict_first), make_copy_rows(tma.evict_last)) if HINTS else (make_copy_rows(), make_copy_rows())
    make_fill, keys_at = make_key_loads(spec, config.box, config.whole)
    fill_k, fill_v = make_fill(k_ring, K, KV_PANEL, PANELS, copy_kv), make_fill(v_ring, V, KV_PANEL, PANELS_V, copy_kv)
    (update, optimistic, finish), clear_v = make_softmax(spec), make_clear(BLOCK_N, PANELS_V, THREADS)
    epilogue = make_epilogue(spec, config, smem, OUT, finish, records)
    # named barriers: ping-pong, one for each warpgroup; all consumers; votes, one for each consumer
    TURN_BARRIER, CLEAR_BARRIER, VOTE_BARRIER = smem.named(4), smem.named(1), smem.named(CONSUMERS)

    # ------------------------------------------------------------ load: the producer, one thread
    @inline
    def load_k(a, base, it, row, head_k, keys, m_block, head):
        """K of a key block, and the bias of the tile's rows there. keys: the plane of K and V, or where a cache has them."""
        stage, phase = k_ring.use(it)
        if BIAS_TILES:
            k_ring.wait_empty(base, stage, int32(phase ^ 1))
            k_ring.arrive_expect(base, stage, int32(K_BYTES + BIAS_BYTES))
            copy_kv(base, a.map_k, k_ring.full(stage), K + stage * K_BYTES, KV_PANEL, PANELS, row, head_k, keys)
            copy_bias(base, a, k_ring.full(stage), BIAS + stage * BIAS_BYTES, int32(m_block * BLOCK_M), row, head, keys)
        else:
            fill_k(base, a.map_k, stage, int32(phase ^ 1), row, head_k, keys)

    @inline
    def load_v(a, base, it, row, head_k, keys):
        stage, phase = v_ring.use(it)
        fill_v(base, a.map_v, stage, int32(phase ^ 1), row, head_k, keys)

    @inline
    def load_q(a, base, i, q_start, m_block, head, map_batch):
        q_ring.wait_empty_nth(base, i)
        q_ring.arrive_expect(base, 0, int32(Q_BYTES))
        copy_q(base, a.map_q, q_ring.full(0), Q, Q_PANEL, PANELS, int32(q_start + m_block * BLOCK_M), head, map_batch)

    @inline
    def prefetch_q(a, base, i):
        """Prefetch Q of the i-th tile into the L2 cache, behind all loads of the tile before: TMA works in order."""
        row = int32(records.word(base, i, TILE.Q_START) + records.word(base, i, TILE.M_BLOCK) * BLOCK_M)
        head, map_batch = records.word(base, i, TILE.HEAD), int32(0) if PACKED else records.word(base, i, TILE.BATCH)
        for p in range(PANELS):
            if HINTS:
                tma.prefetch_hinted(a.map_q, int32(p * PANEL), row, head, map_batch, tma.evict_first())
            else:
                tma.prefetch(a.map_q, int32(p * PANEL), row, head, map_batch)

    @inline
    def load(a, base):
        """Tile after tile: its record, K of its first key block, Q, V of that block; then K and V of the other blocks.

        `it` counts key blocks, `i` tiles. A tile's other blocks are loaded after the next record is written, so that consumers never wait
        for a record. TWO_PRODUCERS: V is loaded by the second one.
        """
        it, i, t, tiles = int32(0), int32(0), int32(cuda.blockIdx.x), num_tiles(a)
        row, end, head_k, m_block, head, going = int32(0), int32(0), int32(0), int32(0), int32(0), True
        keys = keys_at(a, int32(0), int32(0))
        while going:
            records.put(a, base, i, t, tiles)
            while row > end:            # the other blocks of the tile before
                row = opaque(int32(row - BLOCK_N))
                load_k(a, base, it, row, head_k, keys, m_block, head)
                if LATE_V:
                    load_v(a, base, int32(it - 1), int32(row + BLOCK_N), head_k, keys)
                elif not TWO_PRODUCERS:
                    load_v(a, base, it, row, head_k, keys)
                it = int32(it + 1)
            if LATE_V:
                if i > 0:
                    load_v(a, base, int32(it - 1), row, head_k, keys)
            going = t < tiles
            if going:
                prefetch_q(a, base, i)
                t = int32(atomic_add_b32(a.counter, int32(1)) + int32(cuda.gridDim.x))     # the tile after this one
                m_block, head = records.word(base, i, TILE.M_BLOCK), records.word(base, i, TILE.HEAD)
                q_start, k_start = records.word(base, i, TILE.Q_START), records.word(base, i, TILE.K_START)
                n_min, n_max = records.blocks(a, base, i)
                head_k, map_batch = divide(head, a.group), int32(0) if PACKED else records.word(base, i, TILE.BATCH)
                keys = keys_at(a, records.word(base, i, TILE.BATCH), records.word(base, i, TILE.SEQLEN_K)) if CACHED else map_batch
                row, end = key_row(a, k_start, n_max - 1), key_row(a, k_start, n_min)
                load_k(a, base, it, row, head_k, keys, m_block, head)
                load_q(a, base, i, q_start, m_block, head, map_batch)
                if not (LATE_V or TWO_PRODUCERS):
                    load_v(a, base, it, row, head_k, keys)
                it, i = int32(it + 1), int32(i + 1)
        fence_gpu()     # the last thread block to end leaves the counter as it was found
        if atomic_inc_wrap(uint64(a.counter + uint64(4)), int32(cuda.gridDim.x) - 1) == int32(cuda.gridDim.x) - 1:
            store_b32(a.counter, int32(0))

    if SEEN:
        load = make_load_seen(spec, BLOCK_N, records, seen, (prefetch_q, load_q, load_k, load_v))
    load_values = make_load_values(records, load_v, keys_at, key_row, BLOCK_N)

    # ------------------------------------------------------------ the MMAs
    @inline
    def q_rows(base, w):
        """Q's descriptor. Opaque under a mask at head_dim 256: the uniform registers do not suffice there, and ptxas would use none."""
        if FEW_UNIFORM:
            w = opaque(w)
        if SLICES > 1:      # and at larger sizes: a step has 17 to 36 descriptors, which would be kept in registers
            base = opaque(base)
        return wgmma.k_major(base + Q + w * Q_APART)

    @inline
    def k_slot(base, stage):
        return wgmma.k_major(base + K + stage * K_BYTES)

    @inline
    def v_slot(base, w, stage):
        return wgmma.mn_major(base + V + stage * V_BYTES + w * V_APART, KV_PANEL)

    @inline
    def mma_s(acc_s, base, w, stage):
        """S = Q K^T of the warpgroup's rows."""
        return qk(acc_s, q_rows(base, w), k_slot(base, stage), HEAD_DIM, BLOCK_M, BLOCK_N)

    @inline
    def mma_o(acc_o, p, base, w, stage):
        """O += P V, of the warpgroup's columns."""
        return pv(acc_o, p, v_slot(base, w, stage))

    @inline
    def wait_turn(w):
        """Ping-pong: until it is this warpgroup's turn to issue MMAs, so that its softmax overlaps with another's MMAs."""
        if TURNS:
            barrier(int32(TURN_BARRIER + opaque(w)), int32(2 * WARPGROUP))      # opaque: added here each time, no register kept for it

    @inline
    def pass_turn(w):
        """Ping-pong: the next warpgroup's turn."""
        if TURNS:
            after = int32(opaque(w) + 1)
            barrier_arrive(int32(TURN_BARRIER if after == CONSUMERS else TURN_BARRIER + after), int32(2 * WARPGROUP))

    @inline
    def issue_first(base, w, stage):
        """S of a tile's first block, alone."""
        wait_turn(w)
        wgmma.fence()
        acc_s = mma_s(zeros(COUNT_S), base, w, stage)
        wgmma.commit()
        pass_turn(w)
        return acc_s

    @inline
    def issue(base, w, acc_o, p, stage, before, parity):
        """S of the block in `stage`, then O += P V of the one in `before`."""
        wait_turn(w)
        wgmma.fence()
        acc_s = mma_s(zeros(COUNT_S), base, w, stage)
        wgmma.commit()
        v_ring.wait_full(base, before, parity)
        wgmma.fence()
        product = mma_o(acc_o, p, base, w, before)
        wgmma.commit()
        pass_turn(w)
        return acc_s, product

    @inline
    def issue_last(base, w, acc_o, p, stage, parity):
        """O += P V of a tile's last block, alone."""
        v_ring.wait_full(base, stage, parity)
        wait_turn(w)
        wgmma.fence()
        product = mma_o(acc_o, p, base, w, stage)
        wgmma.commit()
        pass_turn(w)
        return product

    @inline
    def release_k(base, stage, n_block, after, n_min, lane):
        """The slot of K, and with a tile's last block that of Q, may be overwritten."""
        if lane == 0:
            k_ring.arrive_empty(base, stage)
            if (after < 0) if SEEN else (n_block == n_min):
                q_ring.arrive_empty(base, 0)

    # ------------------------------------------------------------ the parts of a step
    @inline
    def operands(a, base, w, stage, column, tile):
        """Bias and mask of a block, loaded while the MMA of S runs; for a bias in shared memory, where this lane reads it."""
        bias, mask = fetch(a, tile.batch, tile.head, tile.row, column, tile.seqlen_q, tile.seqlen_k)
        if BIAS_TILES:
            thread = thread_index()
            first = int32(w * WARPGROUP_ROWS + ((thread >> 5) & 3) * 16)
            return lane_address(int32(base + BIAS + stage * BIAS_BYTES), first, int32(thread & 31)), mask
        else:
            return bias, mask

    @inline
    def scores(a, acc_s, early, column, tile):
        """S to scores; `early` is what `operands` gave for them."""
        return score(a, acc_s, early, tile.shared, tile.row, column, alibi_from(a, tile.batch, tile.seqlen_q, tile.seqlen_k))

    @inline
    def redo(a, base, w, stage, acc_s, acc_o, max0, max1, sum0, sum1, column, tile):
        """Recompute the block's scores and update the row maxima. Warpgroup-uniform."""
        acc_o = wgmma.wait_all(acc_o)
        wgmma.fence()
        acc_s = mma_s(acc_s, base, w, stage)
        wgmma.commit()
        early = operands(a, base, w, stage, column, tile)
        acc_s = scores(a, wgmma.wait_all(acc_s), early, column, tile)
        acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1)
        return acc_s, scale_rows(acc_o, alpha0, alpha1), max0, max1, sum0, sum1

    def make_step(MASKED, OPTIMISTIC_STEP):
        @inline
        def step(a, base, w, lane, col, acc_o, p, max0, max1, sum0, sum1, it, n_block, full, tile):
            """S and P of n_block, overlapped with O += P V of the block before, whose P is `p`."""
            before, parity = v_ring.use(it)
            it = int32(it + 1)
            stage, _ = k_ring.use(it)
            column = int32(n_block * BLOCK_N + col)

            # S = Q K^T of this block, O += P V of the block before
            k_ring.wait_full_nth(base, it)
            acc_s, product = issue(base, w, acc_o, p, stage, before, parity)
            after = seen.after(base, it)
            early = operands(a, base, w, stage, column, tile)
            words = draw(a, tile.row, column, plane_of(a, tile.batch, tile.head))
            acc_s = wgmma.wait_all_but_one(acc_s)

            # score, mask, softmax. Both branches wait for O: in straight code ptxas would hoist the wait above the softmax, which is to
            # overlap with the MMA
            if OPTIMISTIC_STEP:
                acc_s, part0, part1, lags = optimistic(a, scores(a, acc_s, early, column, tile), max0, max1)
                if uniform(any_thread(int32(VOTE_BARRIER + opaque(w)), int32(WARPGROUP), lags)) != 0:
                    acc_s, acc_o, max0, max1, sum0, sum1 = redo(a, base, w, stage, acc_s, product, max0, max1, sum0, sum1, column,
                                                                    tile)
                else:
                    acc_o = wgmma.wait_all(product)
                    sum0, sum1 = sum0 + part0, sum1 + part1
                release_k(base, stage, n_block, after, tile.n_min, lane)
                acc_s = dropout(a, acc_s, words)
            else:
                if not BIAS_TILES:
                    release_k(base, stage, n_block, after, tile.n_min, lane)
                acc_s = scores(a, acc_s, early, column, tile)
                if BIAS_TILES:
                    release_k(base, stage, n_block, after, tile.n_min, lane)
                if MASKED:
                    acc_s = seen.hide_partial(keep_after(acc_s, tile.intervals, column), a, tile, column, full)
                acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1)
                acc_s = dropout(a, acc_s, words)
                if any_lane(changed(alpha0, alpha1, sum0, sum1)) != 0:
                    acc_o = scale_rows(wgmma.wait_all(product), alpha0, alpha1)
                else:
                    acc_o = wgmma.wait_all(product)
            v_ring.release(base, before, lane)
            p = to_half(acc_s)
            return acc_o, p, max0, max1, sum0, sum1, it, after
        return step

    step_slow, step_fast = make_step(MASKED_ALWAYS or SEEN, False), make_step(False, OPTIMISTIC)

    @inline
    def tile_of(a, base, i, w, thread, lane):
        """(Tile, n_max, fast_min, fast_max) of the i-th tile: key blocks [fast_min, fast_max) need no mask for this warpgroup's rows."""
        m_block, head, batch = records.get(base, i, TILE.M_BLOCK), records.get(base, i, TILE.HEAD), records.get(base, i, TILE.BATCH)
        seqlen_q, seqlen_k = records.get(base, i, TILE.SEQLEN_Q), records.get(base, i, TILE.SEQLEN_K)
        row0 = int32(m_block * BLOCK_M + w * ROWS_APART)
        row = int32(row0 + ((thread >> 5) & 3) * 16 + (lane >> 2))
        diagonal = diagonal_of(a, batch, seqlen_q, seqlen_k)
        if MASK:
            n_min, n_max = records.get(base, i, TILE.N_MIN), records.get(base, i, TILE.N_MAX)
        else:
            n_min, n_max, _ = tile_blocks(a, batch, head, m_block, seqlen_q, seqlen_k)
        full_min, full_max = full_blocks(a, row0, diagonal, seqlen_k)
        n_min, n_max = uniform(n_min), uniform(n_max)
        if MASK:        # an optimistic step for rows that have seen nothing would be done twice; most begin with their last block
            full_max = int32(min(full_max, records.get(base, i, TILE.END + (w if SLICES == 1 else 0)) - 1))
        fast_max = uniform(int32(max(min(full_max, n_max - 1), n_min)))
        fast_min = int32(n_min + 1) if OPTIMISTIC else n_min       # the last block would release Q's slot a softmax later
        fast_min = uniform(int32(max(min(full_min, fast_max), fast_min)))
        tile = Tile(head, batch, seqlen_q, seqlen_k, row, intervals(a, row, diagonal, seqlen_k), prepare(a, batch, head), n_min,
                    seen.prepare(a, batch, head))
        return tile, n_max, fast_min, fast_max

    @inline
    def first_step(a, base, i, w, thread, lane, col, it, n_max, after, tile):
        """P of a tile's first block (its last keys), of which some may be past the sequence's end."""
        n_block = int32(n_max - 1)
        column = int32(n_block * BLOCK_N + col)
        stage, phase = k_ring.use(it)
        q_ring.wait_full_nth(base, i)
        k_ring.wait_full(base, stage, phase)
        acc_s = issue_first(base, w, stage)
        early = operands(a, base, w, stage, column, tile)
        words = draw(a, tile.row, column, plane_of(a, tile.batch, tile.head))
        acc_s = wgmma.wait_all(acc_s)
        if not BIAS_TILES:
            release_k(base, stage, n_block, after, tile.n_min, lane)
        acc_s = scores(a, acc_s, early, column, tile)
        if BIAS_TILES:
            release_k(base, stage, n_block, after, tile.n_min, lane)
        if MASKED_ALWAYS or n_max * BLOCK_N > tile.seqlen_k:
            acc_s = keep(acc_s, tile.intervals, column)
        acc_s = seen.hide(acc_s, a, tile, column)
        acc_s, max0, max1, sum0, sum1, _, _ = update(a, acc_s, NEG_INF, NEG_INF, float32(0), float32(0))
        p = to_half(dropout(a, acc_s, words))
        return p, max0, max1, sum0, sum1

    @inline
    def clear_tail(base, w, thread, it, n_block, seqlen_k):
        """Zeros in V behind the keys of a packed sequence, or of a cache. All consumers clear, all wait."""
        if seqlen_k - n_block * BLOCK_N < BLOCK_N:
            stage, phase = v_ring.use(it)
            v_ring.wait_full(base, stage, phase)
            clear_v(int32(base + V + stage * V_BYTES), int32(seqlen_k - n_block * BLOCK_N), int32(w * WARPGROUP + thread))
            fence_async()
            barrier(int32(CLEAR_BARRIER), int32(THREADS))

    def kernel(a):
        base = opaque(int32((shared_address(cuda.shared.array(0, uint8)) + ALIGN - 1) & -ALIGN))     # opaque: not computed again
        warpgroup = uniform(int32(cuda.threadIdx.x >> 7))
        thread = int32(cuda.threadIdx.x & (WARPGROUP - 1))
        if cuda.threadIdx.x == 0:
            q_ring.init_stage(base, 0)
            records.init(base)
            for s in range(STAGES):
                k_ring.init_stage(base, s)
                v_ring.init_stage(base, s)
            mbarrier.fence_init()
        cuda.syncthreads()
        if warpgroup == PRODUCER:
            give_registers()
            if thread == 0:
                load(a, base)
            if TWO_PRODUCERS:
                if thread == SECOND:
                    load_values(a, base)
        else:
            take_registers()
            w, lane = int32(warpgroup - FIRST), int32(thread & 31)
            col, it, i = thread_col(lane), int32(-1), int32(0)      # it: the last block whose S was issued; i: the tile
            if w == CONSUMERS - 1:
                pass_turn(w)
            records.wait(base, i)
            while records.get(base, i, TILE.KIND) != 0:
                tile, n_max, fast_min, fast_max = tile_of(a, base, i, w, thread, lane)
                n_block, it, after = int32(n_max - 1), int32(it + 1), int32(0)
                if SEEN:
                    n_max, after = seen.first(base, it)
                    n_block = int32(n_max - 1)
                p, max0, max1, sum0, sum1 = first_step(a, base, i, w, thread, lane, col, it, n_max, after, tile)
                acc_o = zeros(COUNT_O)
                if PACKED or CACHED:
                    clear_tail(base, w, thread, it, n_block, tile.seqlen_k)
                while (after >= 0) if SEEN else (n_block > tile.n_min):
                    n_block = int32(n_block - 1)
                    fast, full = (n_block >= fast_min) & (n_block < fast_max), int32(0)
                    if SEEN:
                        n_block, fast, full = seen.following(after, fast_min, fast_max)
                    if fast:
                        acc_o, p, max0, max1, sum0, sum1, it, after = step_fast(
                            a, base, w, lane, col, acc_o, p, max0, max1, sum0, sum1, it, n_block, full, tile)
                    else:
                        acc_o, p, max0, max1, sum0, sum1, it, after = step_slow(
                            a, base, w, lane, col, acc_o, p, max0, max1, sum0, sum1, it, n_block, full, tile)
                stage, phase = v_ring.use(it)
                acc_o = wgmma.wait_all(issue_last(base, w, acc_o, p, stage, phase))
                v_ring.release(base, stage, lane)
                epilogue(a, base, acc_o, max0, max1, sum0, sum1, i, w, thread, lane, col)
                i = int32(i + 1)
                records.wait(base, i)
            if thread == 0:
                tma.wait_all()

    return kernel, smem.size
