"""Forward for Hopper on 8-bit operands: forward.py's roles and rings, with products of twice the speed.

What differs from it: V comes transposed (rows/transpose_8bit.py), because 8-bit operands are K-major always. P V of a block is a sum of its
own, added to O in float32: the tensor cores' 8-bit sums keep some 14 bits, and over 16384 positive keys they lose a quarter. P is e4m3,
times 2**offset. Scores and the output are scaled by the numbers of their (batch, key head). A step computes its maxima first, or is
optimistic. With config.gather a sum has several blocks, which begin with a tile's first one. With config.parked O is in shared memory, and
registers have the factors that its rows must be multiplied by since.

    shared memory   Q | STAGES x (K, V) | out | barriers | tile records

P V is issued in PIECES of columns, because O in float32 and another accumulator of its size do not fit the registers together: the first
beside S, each other one when the one before is added, the last of them before the exponentials, which it overlaps with.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from numba import cuda, float32, int32, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx import mbarrier, tma, wgmma, wgmma_8bit
from ..ptx.memory import atomic_add_b32, atomic_inc_wrap, fence_gpu, load_f32, shared_address, store_b32, store_shared_b32
from ..ptx.sums import APART, PIECE, add_sums, store_sums
from ..ptx.sync import (
    any_lane,
    any_thread,
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
from ..spec import Spec
from ..tile.fragments import add_columns, own_zeros, scale_rows, zeros
from ..tile.mask import make_diagonals, make_keep
from ..tile.ring import make_ring
from ..tile.schedule import make_num_tiles
from ..tile.smem import ALIGN, WARPGROUP, WARPGROUP_ROWS, Smem, panels
from ..tile.softmax import NEG_INF
from ..tile.softmax_8bit import TOP, lag_of, make_softmax_8bit
from .bounds import make_tile_bounds
from .config_8bit import Forward8BitConfig, row_bytes
from .epilogue import OUT_PANEL, make_epilogue
from .records import TILE, make_records


class Tile(NamedTuple):
    """What a consumer keeps of its tile. `intervals`: the keys that its two rows attend; `scale`: the factor from q.k to exponents of 2;
    n_min, n_first: the tile's last and first key block in the order of the loop."""

    intervals: Any
    scale: Any
    n_min: Any
    n_first: Any


def make_forward_ahead(spec: Spec, config: Forward8BitConfig, dtype_k: str, dtype_v: str) -> tuple[Any, int]:
    """(kernel, bytes of shared memory); spec.dtype is q's."""
    # constants: tile sizes, bytes, registers a thread
    BLOCK_M, BLOCK_N, STAGES, CONSUMERS = config.block_m, config.block_n, config.stages, config.consumers
    HEAD_DIM, ROW, PANEL = spec.head_dim, row_bytes(spec.head_dim), config.panel
    PANELS, PANELS_V = HEAD_DIM // ROW, BLOCK_N // PANEL
    Q_PANEL, K_PANEL = BLOCK_M * ROW, BLOCK_N * ROW
    Q_BYTES, K_BYTES = PANELS * Q_PANEL, PANELS * K_PANEL
    ONES, PAIRS = config.ones, config.pairs
    ROWS_V = HEAD_DIM + 8 if ONES else HEAD_DIM
    V_PANEL = ROWS_V * PANEL
    V_BYTES, COUNT_S, COUNT_O = PANELS_V * V_PANEL, BLOCK_N // 2, ROWS_V // 2
    V_LOADED = PANELS_V * HEAD_DIM * PANEL
    PARKED, SUMS_BYTES = config.parked, COUNT_O // 4 * APART if config.parked else 0
    GATHER, OPTIMISTIC = config.gather, config.optimistic
    ONE = int32(0x3C3C3C3C if dtype_v == "float8_e5m2" else 0x38383838)
    LAG, LIMIT = float32(lag_of(config.offset)), float32(TOP)
    WARPS, PACKED, MASKED_ALWAYS, TURNS = 4 * CONSUMERS, spec.packed, spec.left or spec.right, config.turns and CONSUMERS > 1

    # shared memory and barriers
    smem = Smem()
    Q, K, V = smem.take(Q_BYTES), smem.take(STAGES * K_BYTES), smem.take(STAGES * V_BYTES)
    OUT = smem.take(CONSUMERS * min(config.out_panels, panels(HEAD_DIM)) * OUT_PANEL)
    SUMS = smem.take(CONSUMERS * SUMS_BYTES)
    (tile_blocks, full_blocks, intervals), (diagonal_of, _) = make_tile_bounds(spec, BLOCK_M, BLOCK_N), make_diagonals(spec)
    records = make_records(spec, BLOCK_M, smem, WARPS, tile_blocks)
    q_ring, k_ring, v_ring = make_ring(smem, 1, WARPS), make_ring(smem, STAGES, WARPS), make_ring(smem, STAGES, WARPS)
    TURN_BARRIER, VOTE_BARRIER = smem.named(4), smem.named(CONSUMERS)

    # what the steps are made of
    qk, _ = wgmma_8bit.make_qk(spec.dtype, dtype_k, ROW), 0
    pv_onto = wgmma_8bit.make_pv_onto(dtype_v, PANEL)
    rows_of, values_of = wgmma_8bit.make_descriptor(ROW), wgmma_8bit.make_descriptor(PANEL)
    give_registers, take_registers = decrease_registers(config.producer_registers), increase_registers(config.consumer_registers)
    keep, num_tiles = make_keep(spec), make_num_tiles(spec)
    raised, probabilities, finish_row = make_softmax_8bit(config.offset, config.polynomial, config.degree)

    @inline
    def scales_at(a, plane):
        """Address of the scales of batch * num_heads + head."""
        batch = divide(plane, a.num_heads)
        head_k = divide(int32(plane - batch * a.num_heads), a.group)
        return uint64(a.scales + uint64(8) * uint64(batch * a.num_heads_k + head_k))

    @inline
    def finish(a, plane, max0, max1, sum0, sum1):
        at = scales_at(a, plane)
        scale, out_scale = load_f32(at), load_f32(at + uint64(4))
        scale0, lse0 = finish_row(scale, out_scale, max0, sum0)
        scale1, lse1 = finish_row(scale, out_scale, max1, sum1)
        return scale0, scale1, lse0, lse1
    epilogue = make_epilogue(replace(spec, dtype=spec.out_dtype or spec.dtype), config, smem, OUT, finish, records, BY_BATCH=True)

    # ------------------------------------------------------------ load: the producer, one thread
    @inline
    def load_k(a, base, it, row, head_k, map_batch):
        stage, phase = k_ring.use(it)
        k_ring.wait_empty(base, stage, int32(phase ^ 1))
        k_ring.arrive_expect(base, stage, int32(K_BYTES))
        for p in range(PANELS):
            tma.load(base + K + stage * K_BYTES + p * K_PANEL, a.map_k, base + k_ring.full(stage), int32(p * ROW), row, head_k, map_batch)

    @inline
    def load_v(a, base, it, block, head_k, map_batch):
        """The transposed V of a key block: `block` counts blocks of the whole tensor."""
        stage, phase = v_ring.use(it)
        v_ring.wait_empty(base, stage, int32(phase ^ 1))
        v_ring.arrive_expect(base, stage, int32(V_LOADED))
        for p in range(PANELS_V):
            tma.load(base + V + stage * V_BYTES + p * V_PANEL, a.map_v, base + v_ring.full(stage), int32(0),
                     int32((block * PANELS_V + p) * HEAD_DIM), head_k, map_batch)

    @inline
    def load_q(a, base, i, row, head, map_batch):
        q_ring.wait_empty_nth(base, i)
        q_ring.arrive_expect(base, 0, int32(Q_BYTES))
        for p in range(PANELS):
            tma.load(base + Q + p * Q_PANEL, a.map_q, base + q_ring.full(0), int32(p * ROW), row, head, map_batch)

    @inline
    def load(a, base):
        """Tile after tile: its record, K of its first key block, Q, V of that block; then K and V of the other blocks.

        `it` counts key blocks, `i` tiles. A tile's other blocks are loaded after the next record is written, so that consumers never wait
        for a record.
        """
        it, i, t, tiles = int32(0), int32(0), int32(cuda.blockIdx.x), num_tiles(a)
        n, end, row, block, head_k, map_batch, going = int32(0), int32(0), int32(0), int32(0), int32(0), int32(0), True
        while going:
            records.put(a, base, i, t, tiles)
            while n > end:              # the other blocks of the tile before
                n = opaque(int32(n - 1))
                load_k(a, base, it, int32(row + n * BLOCK_N), head_k, map_batch)
                load_v(a, base, it, int32(block + n), head_k, map_batch)
                it = int32(it + 1)
            going = t < tiles
            if going:
                t = int32(atomic_add_b32(a.counter, int32(1)) + int32(cuda.gridDim.x))     # the tile after this one
                head, batch = records.word(base, i, TILE.HEAD), records.word(base, i, TILE.BATCH)
                q_row = int32(records.word(base, i, TILE.Q_START) + records.word(base, i, TILE.M_BLOCK) * BLOCK_M)
                row = records.word(base, i, TILE.K_START)
                end, n_max = records.blocks(a, base, i)
                head_k, map_batch, n = divide(head, a.group), int32(0) if PACKED else batch, int32(n_max - 1)
                block = int32(divide(row, int32(BLOCK_N)) + batch) if PACKED else int32(0)
                load_k(a, base, it, int32(row + n * BLOCK_N), head_k, map_batch)
                load_q(a, base, i, q_row, head, map_batch)
                load_v(a, base, it, int32(block + n), head_k, map_batch)
                it, i = int32(it + 1), int32(i + 1)
        fence_gpu()     # the last thread block to end leaves the counter as it was found
        if atomic_inc_wrap(uint64(a.counter + uint64(4)), int32(cuda.gridDim.x) - 1) == int32(cuda.gridDim.x) - 1:
            store_b32(a.counter, int32(0))

    # ------------------------------------------------------------ the MMAs
    @inline
    def mma_s(base, w, stage):
        """S = Q K^T of the warpgroup's rows."""
        q, k = rows_of(base + Q + w * WARPGROUP_ROWS * ROW), rows_of(base + K + stage * K_BYTES)
        return qk(zeros(COUNT_S), q, k, HEAD_DIM, BLOCK_M, BLOCK_N)

    @inline
    def place_in_sum(n_block, tile):
        """Which of the blocks of its sum a block of keys is."""
        return int32((tile.n_first - n_block) & (GATHER - 1))

    @inline
    def mma_o(sums, p, base, stage, n_block, tile):
        """P V of n_block onto the sum that it belongs to, or alone if it is the first of it."""
        values = values_of(base + V + stage * V_BYTES)
        return pv_onto(sums, p, values, ROWS_V, place_in_sum(n_block, tile))

    @inline
    def wait_turn(w):
        """Ping-pong: until it is this warpgroup's turn to issue MMAs, so that its softmax overlaps with another's MMAs."""
        if TURNS:
            barrier(int32(TURN_BARRIER + opaque(w)), int32(2 * WARPGROUP))

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
        acc_s = mma_s(base, w, stage)
        wgmma.commit()
        pass_turn(w)
        return acc_s

    @inline
    def issue_values(base, sums, p, stage, parity, n_block, tile):
        """P V of n_block."""
        v_ring.wait_full(base, stage, parity)
        wgmma.fence()
        product = mma_o(sums, p, base, stage, n_block, tile)
        wgmma.commit()
        return product

    @inline
    def issue(base, w, sums, p, stage, before, parity, n_block, tile):
        """S of the block in `stage`, then P V of n_block, whose values are in `before`."""
        wait_turn(w)
        wgmma.fence()
        acc_s = mma_s(base, w, stage)
        wgmma.commit()
        product = issue_values(base, sums, p, before, parity, n_block, tile)
        pass_turn(w)
        return acc_s, product

    @inline
    def scaled(acc_o, sums, alpha0, alpha1):
        if PARKED:
            return (acc_o[0] * alpha0, acc_o[1] * alpha1), scale_rows(sums, alpha0, alpha1)
        else:
            return scale_rows(acc_o, alpha0, alpha1), scale_rows(sums, alpha0, alpha1)

    @inline
    def parked_at(base, w):
        return int32(base + SUMS + opaque(w) * SUMS_BYTES + (thread_index() & (WARPGROUP - 1)) * PIECE)

    @inline
    def with_parked(acc_o, sums, n_block, tile, base, w):
        """O of all sums in front of n_block's, which are in shared memory, and of this one."""
        if tile.n_first - n_block >= GATHER:
            sums = add_sums(parked_at(base, w), sums, acc_o[0], acc_o[1])
        return sums

    @inline
    def gathered(acc_o, sums, n_block, tile, base, w):
        """O, with the sum that n_block ends."""
        if place_in_sum(n_block, tile) == GATHER - 1:
            if PARKED:
                store_sums(parked_at(base, w), with_parked(acc_o, sums, n_block, tile, base, w))
                acc_o = float32(1), float32(1)
            else:
                acc_o = add_columns(acc_o, sums, 0)
        return acc_o

    @inline
    def issue_last(base, w, acc_o, sums, p, stage, parity, tile):
        """O with P V of a tile's last block."""
        wait_turn(w)
        product = issue_values(base, sums, p, stage, parity, tile.n_min, tile)
        pass_turn(w)
        sums = wgmma.wait_all(product)
        if PARKED:
            return with_parked(acc_o, sums, tile.n_min, tile, base, w)
        else:
            return add_columns(acc_o, sums, 0)

    @inline
    def release_k(base, stage, n_block, n_min, lane):
        """The slot of K, and with a tile's last block that of Q, may be overwritten."""
        if lane == 0:
            k_ring.arrive_empty(base, stage)
            if n_block == n_min:
                q_ring.arrive_empty(base, 0)

    # ------------------------------------------------------------ the parts of a step
    @inline
    def changed(alpha0, alpha1, sum0, sum1):
        """1 if O must be rescaled. The test on the sums is never true; it is a data dependence that keeps this after the softmax."""
        return int32(1) if alpha0 != float32(1) or alpha1 != float32(1) or sum0 < float32(0) or sum1 < float32(0) else int32(0)

    @inline
    def redo(base, w, stage, acc_o, sums, max0, max1, sum0, sum1, scale):
        """Recompute the block's scores, and raise the maxima. Warpgroup-uniform."""
        wgmma.fence()
        acc_s = mma_s(base, w, stage)
        wgmma.commit()
        acc_s = wgmma.wait_all(acc_s)
        max0, max1, alpha0, alpha1 = raised(scale, acc_s, max0, max1, float32(0))
        acc_s, part0, part1 = probabilities(scale, acc_s, max0, max1)
        acc_o, sums = scaled(acc_o, sums, alpha0, alpha1)
        return acc_s, acc_o, sums, max0, max1, sum0 * alpha0 + part0, sum1 * alpha1 + part1

    @inline
    def step_fast(base, w, lane, col, acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it, n_block, tile):
        """A step under the maxima so far, which all rows have."""
        before, parity = v_ring.use(it)
        it = int32(it + 1)
        stage, _ = k_ring.use(it)
        following, _ = k_ring.use(int32(it + 1))
        k_ring.wait_full_nth(base, int32(it + 1))
        next_s, product = issue(base, w, sums, p, following, before, parity, int32(n_block + 1), tile)
        acc_s, part0, part1 = probabilities(tile.scale, acc_s, max0, max1)
        if ONES:
            packed = wgmma_8bit.to_e4m3(acc_s)
            lags = wgmma_8bit.any_saturated(packed)
        else:
            packed = p
            lags = int32(1) if max(part0, part1) > LIMIT else int32(0)
        if any_lane(any_thread(int32(VOTE_BARRIER + opaque(w)), int32(WARPGROUP), lags)) != 0:
            next_s, sums = wgmma.wait_all(next_s), wgmma.wait_all(product)
            acc_s, acc_o, sums, max0, max1, sum0, sum1 = redo(base, w, stage, acc_o, sums, max0, max1, sum0, sum1, tile.scale)
            if ONES:
                packed = wgmma_8bit.to_e4m3(acc_s)
        else:
            next_s, sums = wgmma.wait_all(next_s), wgmma.wait_all(product)
            sum0, sum1 = sum0 + part0, sum1 + part1
        release_k(base, stage, n_block, tile.n_min, lane)
        if ONES:
            p = wgmma_8bit.words_after(packed, sums, opaque(int32(lane >> 5)))
        else:
            p = wgmma_8bit.to_e4m3(acc_s)
        if not PAIRS:
            next_s = wgmma_8bit.copy_after(next_s, p)
        acc_o = gathered(acc_o, sums, int32(n_block + 1), tile, base, w)
        v_ring.release(base, before, lane)
        return acc_o, sums, p, next_s, max0, max1, sum0, sum1, it

    def make_step(MASKED, NEXT):
        @inline
        def step(base, w, lane, col, acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it, n_block, tile):
            """P of n_block, whose scores are acc_s, beside S of the block after it and P V of the one before."""
            before, parity = v_ring.use(it)
            it = int32(it + 1)
            stage, _ = k_ring.use(it)
            release_k(base, stage, n_block, tile.n_min, lane)
            if NEXT:
                following, _ = k_ring.use(int32(it + 1))
                k_ring.wait_full_nth(base, int32(it + 1))
                next_s, product = issue(base, w, sums, p, following, before, parity, int32(n_block + 1), tile)
            else:
                wait_turn(w)
                product = issue_values(base, sums, p, before, parity, int32(n_block + 1), tile)
                next_s = product
                pass_turn(w)
            if MASKED:
                acc_s = keep(acc_s, tile.intervals, int32(n_block * BLOCK_N + col))
            max0, max1, alpha0, alpha1 = raised(tile.scale, acc_s, max0, max1, LAG)
            acc_s, part0, part1 = probabilities(tile.scale, acc_s, max0, max1)
            sum0, sum1 = sum0 * alpha0 + part0, sum1 * alpha1 + part1
            # both branches wait: in straight code ptxas would hoist the wait above the softmax, which is to overlap with the MMAs
            if any_lane(changed(alpha0, alpha1, part0, part1)) != 0:
                next_s, sums = wgmma.wait_all(next_s), wgmma.wait_all(product)
                acc_o, sums = scaled(acc_o, sums, alpha0, alpha1)
            else:
                next_s, sums = wgmma.wait_all(next_s), wgmma.wait_all(product)
            p = wgmma_8bit.to_e4m3(acc_s)
            if NEXT:
                next_s = wgmma_8bit.copy_after(next_s, p)
            acc_o = gathered(acc_o, sums, int32(n_block + 1), tile, base, w)
            v_ring.release(base, before, lane)
            return acc_o, sums, p, next_s, max0, max1, sum0, sum1, it
        return step

    step_masked, step_last = make_step(MASKED_ALWAYS, True), make_step(MASKED_ALWAYS, False)
    step_whole = step_fast if OPTIMISTIC else make_step(False, True)

    @inline
    def tile_of(a, base, i, w, thread, lane):
        """(Tile, n_max, full_min, full_max, seqlen_k) of the i-th tile: blocks [full_min, full_max) need no mask for this warpgroup."""
        m_block, head, batch = records.get(base, i, TILE.M_BLOCK), records.get(base, i, TILE.HEAD), records.get(base, i, TILE.BATCH)
        seqlen_q, seqlen_k = records.get(base, i, TILE.SEQLEN_Q), records.get(base, i, TILE.SEQLEN_K)
        row0 = int32(m_block * BLOCK_M + w * WARPGROUP_ROWS)
        row = int32(row0 + ((thread >> 5) & 3) * 16 + (lane >> 2))
        diagonal = diagonal_of(a, batch, seqlen_q, seqlen_k)
        n_min, n_max, _ = tile_blocks(a, batch, head, m_block, seqlen_q, seqlen_k)
        full_min, full_max = full_blocks(a, row0, diagonal, seqlen_k)
        scale = load_f32(scales_at(a, int32(batch * a.num_heads + head)))
        if OPTIMISTIC:      # the last full block gives all rows a maximum; a tile's last one would release Q a softmax later
            full_min, full_max = int32(max(full_min, n_min + 1)), int32(full_max - 1)
        tile = Tile(intervals(a, row, diagonal, seqlen_k), scale, uniform(n_min), uniform(int32(n_max - 1)))
        return tile, uniform(n_max), uniform(full_min), uniform(full_max), seqlen_k

    @inline
    def first_scores(base, w, it, n_max, tile):
        """S of a tile's first block and of the one after it, if there is one."""
        stage, phase = k_ring.use(it)
        k_ring.wait_full(base, stage, phase)
        acc_s = issue_first(base, w, stage)
        if n_max - 1 > tile.n_min:
            following, parity = k_ring.use(int32(it + 1))
            k_ring.wait_full(base, following, parity)
            next_s = issue_first(base, w, following)
            acc_s, next_s = wgmma.wait_all(acc_s), wgmma.wait_all(next_s)
        else:
            acc_s = wgmma.wait_all(acc_s)
            next_s = zeros(COUNT_S)
        return acc_s, next_s

    @inline
    def first_step(base, i, w, lane, col, it, n_max, tile, seqlen_k):
        """P of a tile's first block (its last keys), of which some may be past the sequence's end, and S of the next one."""
        n_block = int32(n_max - 1)
        q_ring.wait_full_nth(base, i)
        acc_s, next_s = first_scores(base, w, it, n_max, tile)
        stage, _ = k_ring.use(it)
        release_k(base, stage, n_block, tile.n_min, lane)
        if MASKED_ALWAYS or n_max * BLOCK_N > seqlen_k:
            acc_s = keep(acc_s, tile.intervals, int32(n_block * BLOCK_N + col))
        max0, max1, _, _ = raised(tile.scale, acc_s, NEG_INF, NEG_INF, LAG)
        acc_s, sum0, sum1 = probabilities(tile.scale, acc_s, max0, max1)
        return wgmma_8bit.to_e4m3(acc_s), next_s, max0, max1, sum0, sum1

    @inline
    def write_ones(base):
        for n in range(cuda.threadIdx.x, STAGES * PANELS_V * 2 * PANEL, WARPGROUP * (1 + CONSUMERS)):
            slot = int32(n // (2 * PANEL))
            store_shared_b32(int32(base + V + slot * V_PANEL + HEAD_DIM * PANEL + (n % (2 * PANEL)) * 4), ONE)
        fence_async()

    @inline
    def init_barriers(base):
        q_ring.init_stage(base, 0)
        records.init(base)
        for s in range(STAGES):
            k_ring.init_stage(base, s)
            v_ring.init_stage(base, s)

    def kernel(a):
        base = opaque(int32((shared_address(cuda.shared.array(0, uint8)) + ALIGN - 1) & -ALIGN))     # opaque: not computed again
        warpgroup = uniform(int32(cuda.threadIdx.x >> 7))
        thread = int32(cuda.threadIdx.x & (WARPGROUP - 1))
        if cuda.threadIdx.x == 0:
            init_barriers(base)
            mbarrier.fence_init()
        if ONES:
            write_ones(base)
        cuda.syncthreads()
        wait_for_previous()     # the transposition of V
        if warpgroup == 0:
            give_registers()
            if thread == 0:
                load(a, base)
        else:
            take_registers()
            w, lane = int32(warpgroup - 1), int32(thread & 31)
            col = int32((lane & 3) * 2)
            it, i = int32(-1), int32(0)      # it: the last block whose S was issued; i: the tile
            if w == CONSUMERS - 1:
                pass_turn(w)
            records.wait(base, i)
            while records.get(base, i, TILE.KIND) != 0:
                tile, n_max, full_min, full_max, seqlen_k = tile_of(a, base, i, w, thread, lane)
                n_block, it = int32(n_max - 1), int32(it + 1)
                p, acc_s, max0, max1, sum0, sum1 = first_step(base, i, w, lane, col, it, n_max, tile, seqlen_k)
                acc_o = (float32(1), float32(1)) if PARKED else zeros(COUNT_O)
                sums = own_zeros(COUNT_O)
                while n_block > tile.n_min + 1:
                    if not PAIRS and (n_block - 1 >= full_min) & (n_block <= full_max):
                        n_block = int32(n_block - 1)
                        acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it = step_whole(
                            base, w, lane, col, acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it, n_block, tile)
                    elif PAIRS and (n_block - 2 >= full_min) & (n_block <= full_max) & (n_block > tile.n_min + 2):
                        n_block = int32(n_block - 1)
                        acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it = step_whole(
                            base, w, lane, col, acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it, n_block, tile)
                        n_block = int32(n_block - 1)
                        acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it = step_whole(
                            base, w, lane, col, acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it, n_block, tile)
                    else:
                        n_block = int32(n_block - 1)
                        acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it = step_masked(
                            base, w, lane, col, acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it, n_block, tile)
                if n_block > tile.n_min:
                    n_block = int32(n_block - 1)
                    acc_o, sums, p, _, max0, max1, sum0, sum1, it = step_last(
                        base, w, lane, col, acc_o, sums, p, acc_s, max0, max1, sum0, sum1, it, n_block, tile)
                stage, phase = v_ring.use(it)
                out = issue_last(base, w, acc_o, sums, p, stage, phase, tile)
                v_ring.release(base, stage, lane)
                if ONES:
                    out, sum0, sum1 = wgmma_8bit.split_totals(out)
                epilogue(a, base, out, max0, max1, sum0, sum1, i, w, thread, lane, col)
                i = int32(i + 1)
                records.wait(base, i)
            if thread == 0:
                tma.wait_all()

    return kernel, smem.size
