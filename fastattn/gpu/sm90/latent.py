"""Few queries over a latent cache, on Hopper: the keys of a block are loaded once, and their first columns are its values (MLA's decode).

    warpgroup 0     one thread issues the TMA loads; or all widen 8-bit keys (latent_8bit.py)
    warpgroup 1     S = Q K^T of 64 rows and the softmax; P goes to shared memory, too. O += P V, the first half of the columns
    warpgroup 2     O += P V, the second half

    block           64 rows of a request, of all heads that share the key head, and one split of the keys (decode/places.py)
    shared memory   Q | STAGES x (first columns of a block of keys) | STAGES x (the others) | P | factors of rows | barriers
    LOW, HIGH       rings of the two halves of the values' columns; HIGH has the rotary part, too. The warpgroup that multiplies by a half
                    releases it
    READY, TAKEN    P and the factors of a step are there; warpgroup 2 has used them

A step issues O += P V of the block before, then S of its own block, and computes the softmax when both have ended. In the other order the
softmax would hide behind O += P V, as in forward.py. But it needs two blocks at once, which is all that shared memory has room for, and
the next one comes too late (docs/log-gpu.md). In this order a block's slots are free early in a step, and the next block has until the end
of it. Each score is computed once. What a split has found goes to memory in float32, and decode/combine.make_merge merges. (FlashMLA,
DeepSeek 2025, solves the same problem.)
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, uint8, uint64

from ..decode.combine import make_line_of, make_part_of, query_of, scale_at
from ..decode.places import make_place_of
from ..dsl.inline import divide, inline
from ..ptx import cp_async, mbarrier, wgmma
from ..ptx.matrix import store_panels
from ..ptx.memory import shared_address, store_f32
from ..ptx.scalar import load_shared, store_shared
from ..ptx.sync import barrier, decrease_registers, fence_async, increase_registers, opaque, uniform
from ..spec import Spec
from ..tile.fragments import make_pack, quad_sum, scale_rows, scale_seen_rows, thread_row, zeros
from ..tile.gradients import store_numbers
from ..tile.mask import TwoIntervals, diagonal_of, make_keep, make_row_bounds
from ..tile.pages import make_key_loads
from ..tile.rescale import rescale
from ..tile.ring import make_barrier, make_ring
from ..tile.scores import make_score
from ..tile.smem import ALIGN, ROW_BYTES, WARPGROUP, Smem, make_clear, make_copy_rows, panels
from ..tile.softmax import NEG_INF, make_finish_row, make_softmax
from ..tile.stores import store_whole_rows
from .config_latent import CONSUMERS, ROWS, LatentConfig
from .latent_8bit import make_load_8bit

REGISTERS, REGISTERS_8BIT = (24, 240), (88, 208)     # of a thread of the producers and of the consumers
WARPS = 4                   # of a warpgroup


def make_latent(spec: Spec, config: LatentConfig) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    BLOCK_N, STAGES, HEAD_DIM = config.block_n, config.stages, spec.head_dim
    COLUMNS = spec.head_dim_v // CONSUMERS                      # of O, of a warpgroup
    LOW_PANELS, PANELS = panels(COLUMNS), panels(HEAD_DIM)      # LOW: the columns of warpgroup 1
    HIGH_PANELS, HIGH_DIM = PANELS - LOW_PANELS, HEAD_DIM - COLUMNS
    Q_PANEL, K_PANEL = ROWS * ROW_BYTES, BLOCK_N * ROW_BYTES
    LOW_BYTES, HIGH_BYTES = LOW_PANELS * K_PANEL, HIGH_PANELS * K_PANEL
    COUNT_S, COUNT_O, THREADS = BLOCK_N // 2, COLUMNS // 2, WARPGROUP * CONSUMERS
    LSE, PACKED, SINKS, EIGHT_BIT = spec.lse, spec.packed, spec.sinks is not None, spec.cache_dtype is not None

    smem = Smem()
    Q, LOW, HIGH = smem.take(PANELS * Q_PANEL), smem.take(STAGES * LOW_BYTES), smem.take(STAGES * HIGH_BYTES)
    P, FACTORS = smem.take(Q_PANEL), smem.take(4 * ROWS, 16)
    low, high = (make_ring(smem, STAGES, WARPS, WARPS if EIGHT_BIT else 1) for _ in range(2))
    ready, taken = make_barrier(smem, WARPS), make_barrier(smem, WARPS)
    Q_BARRIER, CLEAR_BARRIER = smem.named(1), smem.named(1)

    place_of, row_bounds = make_place_of(spec, ROWS, BLOCK_N, config.overhead, True), make_row_bounds(spec)
    (qk, pv), more_qk = wgmma.make_products(spec.dtype), wgmma.make_more_qk(spec.dtype)
    _, shared_pv = wgmma.make_grad_products(spec.dtype)
    make_fill, keys_at = make_key_loads(spec, config.box, config.whole)
    fill_low = make_fill(low, LOW, K_PANEL, LOW_PANELS, make_copy_rows())
    fill_high = make_fill(high, HIGH, K_PANEL, HIGH_PANELS, make_copy_rows(None, LOW_PANELS))
    of_producer, of_consumer = REGISTERS_8BIT if EIGHT_BIT else REGISTERS
    give_registers, take_registers = decrease_registers(of_producer), increase_registers(of_consumer)
    (update, _, _), finish_row, keep = make_softmax(spec), make_finish_row(spec), make_keep(spec)
    to_half, to_out = make_pack(spec.dtype), make_pack(spec.out_dtype or spec.dtype)
    clear, (part_of, note), line_of = make_clear(BLOCK_N, LOW_PANELS, WARPGROUP), make_part_of(spec, ROWS, True), make_line_of(spec)
    _, _, score = make_score(spec, COUNT_S)
    read, put = load_shared("float32", 1), store_shared("float32")

    # ------------------------------------------------------------ load
    @inline
    def load(a, base, place):
        """The producer, one thread: both halves of each block of keys."""
        keys, n, row = keys_at(a, place.batch, place.seqlen_k), int32(0), int32(place.first)
        while row < place.end:
            stage, phase = low.use(n)
            fill_high(base, a.map_k, stage, int32(phase ^ 1), row, place.head_k, keys)
            fill_low(base, a.map_k, stage, int32(phase ^ 1), row, place.head_k, keys)
            row, n = opaque(int32(row + BLOCK_N)), int32(n + 1)

    load_8bit: Any = make_load_8bit(spec, config, low, high, LOW, HIGH) if EIGHT_BIT else None

    @inline
    def load_q(a, base, place, thread):
        """Q by all consumers. Rows past the last one are that one again."""
        row, chunk = int32(thread >> 3), int32(thread & 7)
        while row < ROWS:
            i, head = query_of(a, place, int32(min(row, place.rows - 1)))
            source = uint64(a.q + uint64(place.batch * a.q_batch + (place.q_start + i) * a.q_row + head * a.q_head + 16 * chunk))
            to = int32(base + Q + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4))
            for p in range(PANELS):
                cp_async.copy16(int32(to + p * Q_PANEL), uint64(source + uint64(p * ROW_BYTES)))
            row = int32(row + THREADS // 8)
        cp_async.wait_all()
        fence_async()
        barrier(int32(Q_BARRIER), int32(THREADS))

    # ------------------------------------------------------------ rows
    @inline
    def bounds_of(a, place, row):
        """The end of the split's keys that a row attends."""
        i, _ = query_of(a, place, int32(min(row, place.rows - 1)))
        _, hi = row_bounds(a, i, diagonal_of(a, place.seqlen_q, place.seqlen_k), place.seqlen_k)
        return int32(min(hi, place.end))

    @inline
    def put_factors(base, row, lane, factor0, factor1):
        if (lane & 3) == 0:
            put(int32(base + FACTORS + 4 * row), factor0)
            put(int32(base + FACTORS + 4 * row + 32), factor1)

    @inline
    def get_factors(base, row):
        return read(int32(base + FACTORS + 4 * row))[0], read(int32(base + FACTORS + 4 * row + 32))[0]

    # ------------------------------------------------------------ warpgroup 1
    @inline
    def begin_s(base, n):
        """S = Q K^T of the n-th block, of the columns in HIGH."""
        stage, phase = high.use(n)
        base = opaque(base)     # opaque: the descriptors of 36 products are not kept in registers
        high.wait_full(base, stage, phase)
        wgmma.fence()
        return qk(zeros(COUNT_S), wgmma.k_major(base + Q + LOW_PANELS * Q_PANEL), wgmma.k_major(base + HIGH + stage * HIGH_BYTES), HIGH_DIM,
                  ROWS, BLOCK_N)

    @inline
    def end_s(base, acc_s, n):
        """The other columns."""
        stage, phase = low.use(n)
        base = opaque(base)
        low.wait_full(base, stage, phase)
        wgmma.fence()
        acc_s = more_qk(acc_s, wgmma.k_major(base + Q), wgmma.k_major(base + LOW + stage * LOW_BYTES), COLUMNS, ROWS, BLOCK_N)
        wgmma.commit()
        return acc_s

    @inline
    def mma_low(base, acc_o, p, n):
        """O += P V of the n-th block, of the first columns."""
        stage, _ = low.use(n)
        wgmma.fence()
        acc_o = pv(acc_o, p, wgmma.mn_major(opaque(base) + LOW + stage * LOW_BYTES, K_PANEL))
        wgmma.commit()
        return acc_o

    @inline
    def clear_tail(base, place, n, thread):
        """Zeros in V behind the request's keys: what a page has there may be anything. Before S, so that nobody reads the block yet."""
        if EIGHT_BIT:       # the producers have stored zeros
            return
        first = int32(place.first + n * BLOCK_N)
        if first + BLOCK_N > place.seqlen_k:
            stage, phase = low.use(n)
            high.wait_full(base, stage, phase)
            low.wait_full(base, stage, phase)
            clear(int32(base + HIGH + stage * HIGH_BYTES), int32(place.seqlen_k - first), thread)
            clear(int32(base + LOW + stage * LOW_BYTES), int32(place.seqlen_k - first), thread)
            fence_async()
            barrier(int32(CLEAR_BARRIER), int32(WARPGROUP))

    @inline
    def key_scale(a, place):
        """The factor of q k that 8-bit operands have."""
        if EIGHT_BIT:
            return scale_at(a.q_scale, a.q_scale_batch, a.q_scale_head, place) * scale_at(a.k_scale, a.k_scale_batch, a.k_scale_head, place)
        else:
            return float32(1)

    @inline
    def softmax(a, acc_s, scale, full, hi0, hi1, column, max0, max1, sum0, sum1):
        if EIGHT_BIT:
            acc_s = scale_rows(acc_s, scale, scale)
        acc_s = score(a, acc_s, int32(0), float32(0), int32(0), column, int32(0))
        if (column & -BLOCK_N) + BLOCK_N > full:        # some row attends no more than some of the block's keys
            acc_s = keep(acc_s, TwoIntervals(int32(0), hi0, int32(0), hi1), column)
        return update(a, acc_s, max0, max1, sum0, sum1)

    @inline
    def hand_over(base, packed, n, thread, lane, row, alpha0, alpha1):
        """P of the n-th block, and the factors of O, for warpgroup 2."""
        taken.wait(base, int32((n & 1) ^ 1))
        own_row = int32((thread >> 5) * 16 + (lane & 15))
        store_panels(packed, int32(base + P + own_row * ROW_BYTES), int32(((lane & 7) << 4) ^ ((lane >> 4) << 4)), Q_PANEL, 1, 0)
        put_factors(base, row, lane, alpha0, alpha1)
        ready.publish(base, lane)

    @inline
    def attend(a, base, place, tiles, thread, lane, row):
        """(O of the first columns, maxima and sums of the thread's rows)."""
        hi0, hi1, scale = bounds_of(a, place, row), bounds_of(a, place, int32(row + 8)), key_scale(a, place)
        full = uniform(bounds_of(a, place, int32(0)))       # keys that all rows attend
        acc_o, max0, max1, sum0, sum1 = zeros(COUNT_O), NEG_INF, NEG_INF, float32(0), float32(0)
        if tiles > 0:
            column, n, alpha0, alpha1 = int32(place.first + 2 * (lane & 3)), int32(1), float32(1), float32(1)
            clear_tail(base, place, int32(0), thread)
            acc_s = wgmma.wait_all(end_s(base, begin_s(base, int32(0)), int32(0)))
            acc_s, max0, max1, sum0, sum1, _, _ = softmax(a, acc_s, scale, full, hi0, hi1, column, max0, max1, sum0, sum1)
            p = to_half(acc_s)
            while n < tiles:
                before, column = int32(n - 1), int32(column + BLOCK_N)
                clear_tail(base, place, n, thread)
                product = mma_low(base, acc_o, p, before)
                hand_over(base, p, before, thread, lane, row, alpha0, alpha1)
                acc_s = end_s(base, begin_s(base, n), n)
                product = wgmma.wait_all_but_one(product)
                low.release(base, low.use(before)[0], lane)
                acc_s = wgmma.wait_all(acc_s)
                acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = softmax(a, acc_s, scale, full, hi0, hi1, column, max0, max1, sum0, sum1)
                acc_o, p, n = rescale(product, alpha0, alpha1), to_half(acc_s), int32(n + 1)
            last = int32(tiles - 1)
            product = mma_low(base, acc_o, p, last)
            hand_over(base, p, last, thread, lane, row, alpha0, alpha1)
            acc_o = wgmma.wait_all(product)
        return acc_o, max0, max1, sum0, sum1

    # ------------------------------------------------------------ warpgroup 2
    @inline
    def follow(base, tiles, lane, row):
        """O of the second half of the columns."""
        acc_o, n = zeros(COUNT_O), int32(0)
        while n < tiles:
            stage, phase = high.use(n)
            ready.wait(base, int32(n & 1))
            alpha0, alpha1 = get_factors(base, row)
            acc_o = rescale(acc_o, alpha0, alpha1)
            high.wait_full(base, stage, phase)
            wgmma.fence()
            at = opaque(base)
            acc_o = shared_pv(acc_o, wgmma.k_major(at + P), wgmma.mn_major(at + HIGH + stage * HIGH_BYTES, K_PANEL), BLOCK_N, ROWS)
            wgmma.commit()
            acc_o = wgmma.wait_all(acc_o)
            high.release(base, stage, lane)
            if lane == 0:
                taken.arrive(base)
            n = int32(n + 1)
        return acc_o

    # ------------------------------------------------------------ the result
    @inline
    def store(a, place, acc_o, w, lane, row, factor0, factor1):
        """Rows `row` and row + 8 of the output, of one split."""
        packed = to_out(scale_seen_rows(acc_o, factor0, factor1))
        inside0, inside1 = int32(1) if row < place.rows else int32(0), int32(1) if row + 8 < place.rows else int32(0)
        store_whole_rows(packed, address_of(a, place, row, w, lane), address_of(a, place, int32(row + 8), w, lane), inside0, inside1, lane)

    @inline
    def address_of(a, place, row, w, lane):
        i, head = query_of(a, place, int32(min(row, place.rows - 1)))
        column = int32(w * COLUMNS + 2 * (lane & 3))
        return uint64(a.out + uint64(place.batch * a.out_batch + (place.q_start + i) * a.out_row + head * a.out_head + 2 * column))

    @inline
    def store_parts(a, place, acc_o, w, lane, row):
        """The same of one of several splits."""
        column = int32(w * COLUMNS + 2 * (lane & 3))
        inside0, inside1 = int32(1) if row < place.rows else int32(0), int32(1) if row + 8 < place.rows else int32(0)
        store_numbers(acc_o, part_of(a, place, row, column), part_of(a, place, int32(row + 8), column), inside0, inside1)

    @inline
    def finish(a, place, row, lane, maximum, total):
        """The factor of a row of O; its lse, or for the merge its maximum and its sum, are stored."""
        total, factor = quad_sum(total), float32(1)
        i, head = query_of(a, place, int32(min(row, place.rows - 1)))
        if place.splits == 1:
            factor, lse = finish_row(a, head, maximum, total)
            if EIGHT_BIT:
                factor = factor * a.v_number * scale_at(a.v_scale, a.v_scale_batch, a.v_scale_head, place)
            if PACKED and SINKS:
                if place.batch == a.batch:      # rows of no request
                    lse = NEG_INF
            if LSE:
                if (lane & 3) == 0 and row < place.rows:
                    store_f32(uint64(a.lse + uint64(line_of(a, place, i, head) * 4)), lse)
        elif (lane & 3) == 0 and row < place.rows:
            note(a, place, row, maximum, total)
        return factor

    def kernel(a):
        base = opaque(int32((shared_address(cuda.shared.array(0, uint8)) + ALIGN - 1) & -ALIGN))
        warpgroup, thread = uniform(int32(cuda.threadIdx.x >> 7)), int32(cuda.threadIdx.x & (WARPGROUP - 1))
        place = place_of(a, int32(cuda.blockIdx.x))
        if place.split >= place.splits or place.rows == 0:
            return
        if cuda.threadIdx.x == 0:
            low.init(base)
            high.init(base)
            ready.init(base)
            taken.init(base)
            mbarrier.fence_init()
        cuda.syncthreads()
        tiles = uniform(divide(int32(max(place.end - place.first, 0) + BLOCK_N - 1), int32(BLOCK_N)))
        if warpgroup == 0:
            give_registers()
            if EIGHT_BIT:
                load_8bit(a, base, place, thread)
            elif thread == 0:
                load(a, base, place)
        else:
            take_registers()
            w, lane = int32(warpgroup - 1), int32(thread & 31)
            row = thread_row(thread, lane)
            load_q(a, base, place, int32(w * WARPGROUP + thread))
            factor0, factor1 = float32(1), float32(1)
            if w == 0:
                acc_o, max0, max1, sum0, sum1 = attend(a, base, place, tiles, thread, lane, row)
                factor0, factor1 = finish(a, place, row, lane, max0, sum0), finish(a, place, int32(row + 8), lane, max1, sum1)
                taken.wait(base, int32((tiles & 1) ^ 1))
                put_factors(base, row, lane, factor0, factor1)
                ready.publish(base, lane)
            else:
                acc_o = follow(base, tiles, lane, row)
                ready.wait(base, int32(tiles & 1))
                factor0, factor1 = get_factors(base, row)
            if place.splits == 1:
                store(a, place, acc_o, w, lane, row, factor0, factor1)
            else:
                store_parts(a, place, acc_o, w, lane, row)

    return kernel, smem.size
