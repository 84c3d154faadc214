"""Forward for Hopper on 8-bit operands: forward.py's roles, rings and steps, with products of twice the speed.

What differs from it:
    V   comes transposed (rows/transpose_8bit.py), because 8-bit operands are K-major always
    P   is e4m3, times 2**offset. Scores and the output are scaled by the numbers of their (batch, key head)
    O   P V of config.gather blocks is a sum of its own, which is added to O in float32: the tensor cores' 8-bit sums keep some 14 bits, and
        over 16384 positive keys they lose a quarter. The first sum of a tile begins with its first block

    shared memory   Q | STAGES x (K, V) | out | barriers | tile records

A step under the maxima so far is computed again where one of its numbers might be too large for e4m3.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from numba import cuda, float32, int32, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx import mbarrier, tma, wgmma, wgmma_8bit
from ..ptx.memory import atomic_add_b32, atomic_inc_wrap, fence_gpu, load_f32, shared_address, store_b32
from ..ptx.sync import any_lane, any_thread, decrease_registers, increase_registers, opaque, thread_index, uniform, wait_for_previous
from ..spec import Spec
from ..tile.fragments import add_columns, join, own_zeros, part, scale_rows, thread_col, zeros
from ..tile.mask import make_diagonals, make_keep
from ..tile.rescale import changed
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


def make_forward_8bit(spec: Spec, config: Forward8BitConfig, dtype_k: str, dtype_v: str) -> tuple[Any, int]:
    """(kernel, bytes of shared memory); spec.dtype is q's."""
    # constants: tile sizes, bytes, registers a thread
    BLOCK_M, BLOCK_N, STAGES, CONSUMERS = config.block_m, config.block_n, config.stages, config.consumers
    HEAD_DIM, ROW, PANEL = spec.head_dim, row_bytes(spec.head_dim), config.panel
    PANELS, PANELS_V = HEAD_DIM // ROW, BLOCK_N // PANEL
    Q_PANEL, K_PANEL, V_PANEL = BLOCK_M * ROW, BLOCK_N * ROW, HEAD_DIM * PANEL
    Q_BYTES, K_BYTES, V_BYTES = PANELS * Q_PANEL, PANELS * K_PANEL, PANELS_V * V_PANEL
    COUNT_S, COUNT_O, GATHER = BLOCK_N // 2, HEAD_DIM // 2, config.gather
    LAG, LIMIT, AHEAD = float32(lag_of(config.offset)), float32(TOP), config.ahead
    assert COUNT_S == COUNT_O or not AHEAD, "banks of one size"
    WARPS, PACKED, MASKED_ALWAYS = 4 * CONSUMERS, spec.packed, spec.left or spec.right

    # shared memory and barriers
    smem = Smem()
    Q, K, V = smem.take(Q_BYTES), smem.take(STAGES * K_BYTES), smem.take(STAGES * V_BYTES)
    OUT = smem.take(CONSUMERS * min(config.out_panels, panels(HEAD_DIM)) * OUT_PANEL)
    (tile_blocks, full_blocks, intervals), (diagonal_of, _) = make_tile_bounds(spec, BLOCK_M, BLOCK_N), make_diagonals(spec)
    records = make_records(spec, BLOCK_M, smem, WARPS, tile_blocks)
    q_ring, k_ring, v_ring = make_ring(smem, 1, WARPS), make_ring(smem, STAGES, WARPS), make_ring(smem, STAGES, WARPS)
    VOTE_BARRIER = smem.named(CONSUMERS)

    # what the steps are made of
    qk, pv = wgmma_8bit.make_qk(spec.dtype, dtype_k, ROW), wgmma_8bit.make_pv(dtype_v, PANEL)
    rows_of, values_of = wgmma_8bit.make_descriptor(ROW), wgmma_8bit.make_descriptor(PANEL)
    give_registers, take_registers = decrease_registers(config.producer_registers), increase_registers(config.consumer_registers)
    keep, num_tiles = make_keep(spec), make_num_tiles(spec)
    raised, probabilities, finish_row = make_softmax_8bit(config.offset)

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
        v_ring.arrive_expect(base, stage, int32(V_BYTES))
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
    def mma_s(acc, base, w, stage, add):
        """S = Q K^T of the warpgroup's rows; add: 0."""
        q, k = rows_of(base + Q + w * WARPGROUP_ROWS * ROW), rows_of(base + K + stage * K_BYTES)
        return qk(acc, q, k, HEAD_DIM, BLOCK_M, BLOCK_N, add)

    @inline
    def place_in_sum(n_block, tile):
        """Which of the blocks of its sum a block of keys is."""
        return int32((tile.n_first - n_block) & (GATHER - 1))

    @inline
    def mma_o(acc, p, base, stage, add):
        """P V of a block onto acc, or alone if `add` is 0."""
        return pv(acc, p, values_of(base + V + stage * V_BYTES), HEAD_DIM, add)

    @inline
    def issue_first(base, w, stage):
        """S of the block in `stage`."""
        wgmma.fence()
        acc_s = mma_s(zeros(COUNT_S), base, w, stage, int32(0))
        wgmma.commit()
        return acc_s

    @inline
    def issue_last(base, sums, p, stage, parity, n_block, tile):
        """P V of n_block onto the sum that it belongs to."""
        v_ring.wait_full(base, stage, parity)
        wgmma.fence()
        product = mma_o(sums, p, base, stage, place_in_sum(n_block, tile))
        wgmma.commit()
        return product

    @inline
    def release_k(base, stage, n_block, n_min, lane):
        """The slot of K, and with a tile's last block that of Q, may be overwritten."""
        if lane == 0:
            k_ring.arrive_empty(base, stage)
            if n_block == n_min:
                q_ring.arrive_empty(base, 0)

    # ------------------------------------------------------------ the parts of a step
    @inline
    def redo(base, w, stage, acc_o, product, max0, max1, sum0, sum1, scale):
        """Recompute the block's scores and raise the row maxima. Warpgroup-uniform."""
        sums = wgmma.wait_all(product)
        acc_s = wgmma.wait_all(issue_first(base, w, stage))
        max0, max1, alpha0, alpha1 = raised(scale, acc_s, max0, max1, float32(0))
        acc_s, part0, part1 = probabilities(scale, acc_s, max0, max1)
        acc_o, sums = scale_rows(acc_o, alpha0, alpha1), scale_rows(sums, alpha0, alpha1)
        return acc_s, acc_o, sums, max0, max1, sum0 * alpha0 + part0, sum1 * alpha1 + part1

    def make_step(MASKED, OPTIMISTIC_STEP):
        @inline
        def step(base, w, lane, col, acc_o, sums, p, max0, max1, sum0, sum1, it, n_block, tile):
            """S and P of n_block, overlapped with P V of the block before, whose P is `p`. Optimistic: under the maxima so far, which all
            rows have."""
            before, parity = v_ring.use(it)
            it = int32(it + 1)
            stage, _ = k_ring.use(it)

            # S = Q K^T of this block, P V of the block before
            k_ring.wait_full_nth(base, it)
            acc_s = issue_first(base, w, stage)
            product = issue_last(base, sums, p, before, parity, int32(n_block + 1), tile)
            acc_s = wgmma.wait_all_but_one(acc_s)

            # mask, softmax. Both branches wait for P V: in straight code ptxas would hoist the wait above the softmax, which is to overlap
            # with the MMA
            if OPTIMISTIC_STEP:
                acc_s, part0, part1 = probabilities(tile.scale, acc_s, max0, max1)
                lags = int32(1) if max(part0, part1) > LIMIT else int32(0)
                if any_lane(any_thread(int32(VOTE_BARRIER + opaque(w)), int32(WARPGROUP), lags)) != 0:
                    acc_s, acc_o, sums, max0, max1, sum0, sum1 = redo(base, w, stage, acc_o, product, max0, max1, sum0, sum1, tile.scale)
                else:
                    sums = wgmma.wait_all(product)
                    sum0, sum1 = sum0 + part0, sum1 + part1
                release_k(base, stage, n_block, tile.n_min, lane)
            else:
                release_k(base, stage, n_block, tile.n_min, lane)
                if MASKED:
                    acc_s = keep(acc_s, tile.intervals, int32(n_block * BLOCK_N + col))
                max0, max1, alpha0, alpha1 = raised(tile.scale, acc_s, max0, max1, LAG)
                acc_s, part0, part1 = probabilities(tile.scale, acc_s, max0, max1)
                sum0, sum1 = sum0 * alpha0 + part0, sum1 * alpha1 + part1
                if any_lane(changed(alpha0, alpha1, sum0, sum1)) != 0:
                    sums = wgmma.wait_all(product)
                    acc_o, sums = scale_rows(acc_o, alpha0, alpha1), scale_rows(sums, alpha0, alpha1)
                else:
                    sums = wgmma.wait_all(product)
            p = wgmma_8bit.to_e4m3(acc_s)
            if place_in_sum(int32(n_block + 1), tile) == GATHER - 1:
                acc_o = add_columns(acc_o, sums, 0)
            v_ring.release(base, before, lane)
            return acc_o, sums, p, max0, max1, sum0, sum1, it
        return step

    step_slow, step_fast = make_step(MASKED_ALWAYS, False), make_step(False, True)

    @inline
    def blocks_in_order(base, i, w, lane, it, n_max, fast_min, fast_max, tile, seqlen_k):
        """O, maxima and sums of the tile's rows, `it` of its last block."""
        n_block, col = int32(n_max - 1), thread_col(lane)
        p, max0, max1, sum0, sum1 = first_step(base, i, w, lane, col, it, n_max, tile, seqlen_k)
        acc_o, sums = zeros(COUNT_O), own_zeros(COUNT_O)
        while n_block > tile.n_min:
            n_block = int32(n_block - 1)
            if (n_block >= fast_min) & (n_block < fast_max):
                acc_o, sums, p, max0, max1, sum0, sum1, it = step_fast(
                    base, w, lane, col, acc_o, sums, p, max0, max1, sum0, sum1, it, n_block, tile)
            else:
                acc_o, sums, p, max0, max1, sum0, sum1, it = step_slow(
                    base, w, lane, col, acc_o, sums, p, max0, max1, sum0, sum1, it, n_block, tile)
        stage, phase = v_ring.use(it)
        acc_o = add_columns(acc_o, wgmma.wait_all(issue_last(base, sums, p, stage, phase, tile.n_min, tile)), 0)
        v_ring.release(base, stage, lane)
        return acc_o, max0, max1, sum0, sum1, it

    # ------------------------------------------------------------ scores a block ahead
    # Two banks of registers: one has the scores of a block, which become P; the other P V of the block before. Half a softmax later that is
    # in O, and the bank takes the scores of the next block. So each bank is given to the product that takes its place, with a zero that
    # the compiler does not know, the sign of n_block: it would use a third bank.
    @inline
    def own_col():
        """thread_col, computed again: the loop has no register for it."""
        return thread_col(int32(thread_index() & 31))

    @inline
    def issue_s(base, w, bank, stage, n_block):
        wgmma.fence()
        acc_s = mma_s(bank, base, w, stage, int32(n_block >> 31))
        wgmma.commit()
        return acc_s

    @inline
    def issue_o(base, bank, p, stage, n_block):
        wgmma.fence()
        product = mma_o(bank, p, base, stage, int32(n_block >> 31))
        wgmma.commit()
        return product

    @inline
    def redo_ahead(base, w, acc_s, stage, n_block, acc_o, max0, max1, sum0, sum1, scale):
        """Recompute the block's scores and raise the row maxima. Warpgroup-uniform."""
        acc_s = wgmma.wait_all(issue_s(base, w, acc_s, stage, n_block))
        max0, max1, alpha0, alpha1 = raised(scale, acc_s, max0, max1, float32(0))
        acc_s, part0, part1 = probabilities(scale, acc_s, max0, max1)
        return acc_s, scale_rows(acc_o, alpha0, alpha1), max0, max1, sum0 * alpha0 + part0, sum1 * alpha1 + part1

    @inline
    def last_product(base, lane, acc_o, bank, p, it, n_block):
        stage, _ = v_ring.use(it)
        acc_o = add_columns(acc_o, wgmma.wait_all(issue_o(base, bank, p, stage, n_block)), 0)
        v_ring.release(base, stage, lane)
        return acc_o

    def make_step_ahead(OPTIMISTIC_STEP, LAST):
        @inline
        def step(base, w, lane, acc_o, acc_s, bank, p, max0, max1, sum0, sum1, it, n_block, tile):
            """P of n_block from its scores, P V of the block before, whose P is `p`, and, but for a tile's LAST, the scores of the next.
            Returns O, the bank with the next scores, the other, P, maxima, sums and `it`."""
            before, _ = v_ring.use(it)
            it = int32(it + 1)
            stage, phase = k_ring.use(it)
            after, _ = k_ring.use(int32(it + 1))
            product = issue_o(base, bank, p, before, n_block)
            if not LAST:    # here, because ptxas spreads MMAs over what follows them up to the next branch
                k_ring.wait_full_nth(base, int32(it + 1))

            if OPTIMISTIC_STEP:
                first, part0, part1 = probabilities(tile.scale, part(acc_s, 0, 2), max0, max1)
                # Both branches wait for P V: in straight code ptxas would hoist the wait above the softmax
                if any_lane(int32(1) if max(part0, part1) > LIMIT else int32(0)) != 0:
                    lags = opaque(int32(1))
                    bank = wgmma.wait_all(product)
                    lags = opaque(lags)
                else:
                    lags = int32(0)
                    bank = wgmma.wait_all(product)
                acc_o = add_columns(acc_o, bank, 0)
                bank = issue_s(base, w, bank, after, n_block)
                v_ring.wait_full(base, stage, phase)
                second, more0, more1 = probabilities(tile.scale, part(acc_s, 1, 2), max0, max1)
                part0, part1, acc_s = part0 + more0, part1 + more1, join(first, second)
                lags = int32(1) if max(part0, part1) > LIMIT else lags
                p = wgmma_8bit.to_e4m3(acc_s)
                if any_lane(any_thread(int32(VOTE_BARRIER + opaque(w)), int32(WARPGROUP), lags)) != 0:
                    bank = wgmma.wait_all(bank)
                    acc_s, acc_o, max0, max1, sum0, sum1 = redo_ahead(base, w, acc_s, stage, n_block, acc_o, max0, max1, sum0, sum1,
                                                                      tile.scale)
                    p = wgmma_8bit.to_e4m3(acc_s)
                else:
                    bank = wgmma.wait_all(bank)
                    sum0, sum1 = sum0 + part0, sum1 + part1
            else:
                if MASKED_ALWAYS:
                    acc_s = keep(acc_s, tile.intervals, int32(n_block * BLOCK_N + own_col()))
                max0, max1, alpha0, alpha1 = raised(tile.scale, acc_s, max0, max1, LAG)
                bank = wgmma.wait_all(product)
                acc_o = add_columns(acc_o, bank, 0)
                if any_lane(changed(alpha0, alpha1, sum0, sum1)) != 0:
                    acc_o = scale_rows(acc_o, alpha0, alpha1)
                if not LAST:
                    bank = issue_s(base, w, bank, after, n_block)
                v_ring.wait_full(base, stage, phase)
                acc_s, part0, part1 = probabilities(tile.scale, acc_s, max0, max1)
                sum0, sum1 = sum0 * alpha0 + part0, sum1 * alpha1 + part1
                p = wgmma_8bit.to_e4m3(acc_s)
                if not LAST:
                    bank = wgmma.wait_all(bank)
            release_k(base, stage, n_block, tile.n_min, lane)
            v_ring.release(base, before, lane)
            if LAST:
                return last_product(base, lane, acc_o, bank, p, it, n_block), max0, max1, sum0, sum1, it
            return acc_o, bank, acc_s, p, max0, max1, sum0, sum1, it
        return step

    ahead_slow, ahead_fast, ahead_last = make_step_ahead(False, False), make_step_ahead(True, False), make_step_ahead(False, True)

    @inline
    def ahead(base, w, lane, acc_o, acc_s, bank, p, max0, max1, sum0, sum1, it, n_block, fast_min, fast_max, tile):
        if (n_block >= fast_min) & (n_block < fast_max):
            acc_o, acc_s, bank, p, max0, max1, sum0, sum1, it = ahead_fast(
                base, w, lane, acc_o, acc_s, bank, p, max0, max1, sum0, sum1, it, n_block, tile)
        else:
            acc_o, acc_s, bank, p, max0, max1, sum0, sum1, it = ahead_slow(
                base, w, lane, acc_o, acc_s, bank, p, max0, max1, sum0, sum1, it, n_block, tile)
        return acc_o, acc_s, bank, p, max0, max1, sum0, sum1, it

    @inline
    def first_ahead(base, i, w, lane, it, n_max, tile, seqlen_k):
        """The scores of a tile's second block; the bank and P of the first (its last keys), of which some may be past the sequence's end. A
        lone block has its own scores for the second's."""
        n_block = int32(n_max - 1)
        stage, phase = k_ring.use(it)
        second = int32(it + 1 if n_block > tile.n_min else it)
        q_ring.wait_full_nth(base, i)
        k_ring.wait_full(base, stage, phase)
        acc_s = wgmma.wait_all(issue_first(base, w, stage))
        k_ring.wait_full_nth(base, second)
        after, _ = k_ring.use(second)
        bank = issue_first(base, w, after)
        if MASKED_ALWAYS or n_max * BLOCK_N > seqlen_k:
            acc_s = keep(acc_s, tile.intervals, int32(n_block * BLOCK_N + own_col()))
        max0, max1, _, _ = raised(tile.scale, acc_s, NEG_INF, NEG_INF, LAG)
        acc_s, sum0, sum1 = probabilities(tile.scale, acc_s, max0, max1)
        p = wgmma_8bit.to_e4m3(acc_s)
        v_ring.wait_full(base, stage, phase)
        bank = wgmma.wait_all(bank)
        release_k(base, stage, n_block, tile.n_min, lane)
        return bank, acc_s, p, max0, max1, sum0, sum1

    @inline
    def blocks_ahead(base, i, w, lane, it, n_max, fast_min, fast_max, tile, seqlen_k):
        """As blocks_in_order. Two steps at a time, after which each bank has what it had before."""
        n_block = int32(n_max - 1)
        even, odd, p, max0, max1, sum0, sum1 = first_ahead(base, i, w, lane, it, n_max, tile, seqlen_k)
        acc_o, going = own_zeros(COUNT_O), n_block > tile.n_min
        if not going:
            acc_o = last_product(base, lane, acc_o, odd, p, it, n_block)
        while going:
            n_block = int32(n_block - 1)
            if n_block == tile.n_min:
                acc_o, max0, max1, sum0, sum1, it = ahead_last(
                    base, w, lane, acc_o, even, odd, p, max0, max1, sum0, sum1, it, n_block, tile)
                break
            acc_o, odd, even, p, max0, max1, sum0, sum1, it = ahead(
                base, w, lane, acc_o, even, odd, p, max0, max1, sum0, sum1, it, n_block, fast_min, fast_max, tile)
            n_block = int32(n_block - 1)
            if n_block == tile.n_min:
                acc_o, max0, max1, sum0, sum1, it = ahead_last(
                    base, w, lane, acc_o, odd, even, p, max0, max1, sum0, sum1, it, n_block, tile)
                break
            acc_o, even, odd, p, max0, max1, sum0, sum1, it = ahead(
                base, w, lane, acc_o, odd, even, p, max0, max1, sum0, sum1, it, n_block, fast_min, fast_max, tile)
        return acc_o, max0, max1, sum0, sum1, it
    blocks = blocks_ahead if AHEAD else blocks_in_order

    @inline
    def tile_of(a, base, i, w, thread, lane):
        """(Tile, n_max, fast_min, fast_max, seqlen_k) of the i-th tile: key blocks [fast_min, fast_max) need no mask for this warpgroup's
        rows, which have maxima there."""
        m_block, head, batch = records.get(base, i, TILE.M_BLOCK), records.get(base, i, TILE.HEAD), records.get(base, i, TILE.BATCH)
        seqlen_q, seqlen_k = records.get(base, i, TILE.SEQLEN_Q), records.get(base, i, TILE.SEQLEN_K)
        row0 = int32(m_block * BLOCK_M + w * WARPGROUP_ROWS)
        row = int32(row0 + ((thread >> 5) & 3) * 16 + (lane >> 2))
        diagonal = diagonal_of(a, batch, seqlen_q, seqlen_k)
        n_min, n_max, _ = tile_blocks(a, batch, head, m_block, seqlen_q, seqlen_k)
        full_min, full_max = full_blocks(a, row0, diagonal, seqlen_k)
        scale = load_f32(scales_at(a, int32(batch * a.num_heads + head)))
        # the last full block gives all rows a maximum; a tile's last one would release Q a softmax later
        fast_min, fast_max = int32(max(full_min, n_min + 1)), int32(full_max - 1)
        tile = Tile(intervals(a, row, diagonal, seqlen_k), scale, uniform(n_min), uniform(int32(n_max - 1)))
        return tile, uniform(n_max), uniform(fast_min), uniform(fast_max), seqlen_k

    @inline
    def first_step(base, i, w, lane, col, it, n_max, tile, seqlen_k):
        """P of a tile's first block (its last keys), of which some may be past the sequence's end."""
        n_block = int32(n_max - 1)
        stage, phase = k_ring.use(it)
        q_ring.wait_full_nth(base, i)
        k_ring.wait_full(base, stage, phase)
        acc_s = wgmma.wait_all(issue_first(base, w, stage))
        release_k(base, stage, n_block, tile.n_min, lane)
        if MASKED_ALWAYS or n_max * BLOCK_N > seqlen_k:
            acc_s = keep(acc_s, tile.intervals, int32(n_block * BLOCK_N + col))
        max0, max1, _, _ = raised(tile.scale, acc_s, NEG_INF, NEG_INF, LAG)
        acc_s, sum0, sum1 = probabilities(tile.scale, acc_s, max0, max1)
        return wgmma_8bit.to_e4m3(acc_s), max0, max1, sum0, sum1

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
        cuda.syncthreads()
        wait_for_previous()     # for the transposed V
        if warpgroup == 0:
            give_registers()
            if thread == 0:
                load(a, base)
        else:
            take_registers()
            w, lane = int32(warpgroup - 1), int32(thread & 31)
            it, i = int32(-1), int32(0)      # it: the last block whose S was issued; i: the tile
            records.wait(base, i)
            while records.get(base, i, TILE.KIND) != 0:
                tile, n_max, fast_min, fast_max, seqlen_k = tile_of(a, base, i, w, thread, lane)
                acc_o, max0, max1, sum0, sum1, it = blocks(base, i, w, lane, int32(it + 1), n_max, fast_min, fast_max, tile, seqlen_k)
                epilogue(a, base, acc_o, max0, max1, sum0, sum1, i, w, thread, lane, thread_col(lane))
                i = int32(i + 1)
                records.wait(base, i)
            if thread == 0:
                tma.wait_all()

    return kernel, smem.size
