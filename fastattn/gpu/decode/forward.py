"""Forward for few queries and many keys, since sm_80: keys are split over blocks, and inside a block over warps. Results are merged.

    block           one key head, one split of the keys. Its rows are the queries of all heads that share the key head
    warp            16 or 32 rows, 8 to 32 keys at a time, alone: S = Q K^T, softmax, O += P V. K and V are loaded to registers
    shared memory   at the end: O of each warp | its maxima and sums. Before: Q, where registers do not hold it

A step prefetches the operands of the next one as soon as their registers are free: K after S, V after O. So memory is never idle. The
results of the warps are summed in shared memory, those of the splits by the last block that finishes (combine.py), or where they are a
cluster by all of its blocks (cluster.py). With more rows than a warp has several warps load the same keys at about the same time: they
come from memory once, and then from the L1 cache. None gets far ahead: the first one waits for memory, the others do not. Four such warps
share what they load (operands.py).

The other forwards have tiles of 64 rows and more of one query head. What this one wins over them: all multiprocessors load keys, and K
and V are loaded once for all heads that share them. (Flash-Decoding, Dao et al. 2023.)
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx import cluster, direct, direct_8bit, direct_parts
from ..ptx.memory import shared_address
from ..ptx.scalar import load_shared, store_shared
from ..ptx.sync import opaque, take_turn, thread_index
from ..spec import Spec
from ..tile.fragments import join, lane_row, make_pack, part, quad_max, quad_sum, scale_rows, zeros
from ..tile.mask import TwoIntervals, diagonal_of, make_keep, make_row_bounds
from ..tile.rescale import rescale
from ..tile.smem import ALIGN, Smem
from ..tile.softmax import NEG_INF, make_decay, make_softmax
from .cluster import make_merge, received_bytes
from .combine import make_combine, query_of, scale_at, scale_of
from .config import ROW_BYTES, ROWS, DecodeConfig, chunks_of, ring_bytes
from .operands import Walk, make_operands
from .places import make_place_of
from .prefix import make_owner_of, of_shared
from .scores import get_address, make_parked, make_row_scores, put_address


class Sums(NamedTuple):
    """Maxima and sums of rows g and g + 8 of a tile over the keys so far."""

    max0: Any
    max1: Any
    sum0: Any
    sum1: Any


class HeldQ(NamedTuple):
    """Rows g and g + 8 of a warp's Q, a lane's chunks, and the factors of their scores."""

    row0: Any
    row1: Any
    unit0: Any
    unit1: Any


class KeptQ(NamedTuple):
    """The address of a lane's operands in shared memory, and the factors of its rows' scores."""

    address: Any
    unit0: Any
    unit1: Any


def make_forward(spec: Spec, config: DecodeConfig) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    KEYS, WARPS, ROW_WARPS, KEY_WARPS, KEEP_Q = config.keys, config.warps, config.row_warps, config.key_warps, config.keep_q
    EIGHT_BIT = spec.cache_dtype is not None
    assert config.row_tiles == 1 or not (spec.dtype == "float32" or spec.bias or spec.mask), "they take one tile"
    CHUNK, CHUNKS, CHUNKS_V, WHOLE, _ = chunks_of(spec, config)
    COUNT_S, COUNT_O = config.row_tiles * KEYS // 2, config.row_tiles * 4 * CHUNK * CHUNKS_V
    BLOCK_ROWS, PITCH = config.rows, 32 * CHUNK * CHUNKS_V + 16         # bytes of a row of O in shared memory; neighbours use other banks
    TILES, WARP_ROWS = config.row_tiles, ROWS * config.row_tiles        # of a warp
    NARROW = spec.p_dtype != spec.dtype          # q is bfloat16, and float16 in products
    LENGTHS, PAGED, PACKED, STEP = spec.lengths, spec.paged, spec.packed, KEYS * KEY_WARPS
    keep, decay = make_keep(spec), make_decay(spec)
    smem = Smem()
    # of a warp: the ring of K and V, then its rows of O
    OUT_BYTES = max(WARP_ROWS * PITCH, config.stages * ring_bytes(spec, config)[1])
    OUT, FOUND = smem.take(WARPS * OUT_BYTES, 16), smem.take(4, 16)
    TOP, TOTAL = smem.take(KEY_WARPS * BLOCK_ROWS * 4, 16), smem.take(KEY_WARPS * BLOCK_ROWS * 4, 16)
    Q_BYTES = direct.Q_STEP * CHUNKS * (4 if EIGHT_BIT else 3 if spec.dtype == "float32" else 2)
    Q = smem.take(ROW_WARPS * TILES * Q_BYTES if KEEP_Q else 0, 16)
    UNITS = smem.take(BLOCK_ROWS * 4 if KEEP_Q and NARROW else 0, 16)
    RECEIVED, CLUSTER, EARLY = smem.take(received_bytes(spec, config), 16), config.cluster, config.early
    SUMS, SUMS_BYTES = smem.take(TILES * 512 * WARPS if TILES > 1 else 0, 16), 512 * WARPS
    LINES, TABLE = smem.take(BLOCK_ROWS * ROW_BYTES if KEEP_Q else 0, 16), smem.take(8 if KEEP_Q and PAGED else 0, 16)
    if spec.dtype == "float32":
        keep_q, qk, pv = direct_parts.keep_q, direct_parts.qk, direct_parts.pv
    else:
        qk, pv = direct.make_products(spec.dtype, TILES)
        keep_q, kept_qk = direct.make_kept(spec.dtype, TILES)
        if spec.cache_dtype is not None:
            qk, kept_qk, pv = direct_8bit.make_products(spec.p_dtype, spec.cache_dtype, config.native, TILES)
        qk = kept_qk if KEEP_Q else qk
    load_rows, _ = direct.make_loads(ROW_WARPS == 1)
    load_every_second = direct.make_load_pairs(ROW_WARPS == 1)
    to_half, store_output = make_pack(spec.p_dtype), direct.make_store_output(16 // CHUNK)
    # a split has one step at least: what one more costs is known to the host
    (PREFIX, _), owner_of = of_shared(spec), make_owner_of(spec)
    row_bounds, place_of = make_row_bounds(spec), make_place_of(spec, BLOCK_ROWS, STEP, 1)
    row_of, fetch, score = make_row_scores(spec, KEYS)
    park, addresses, numbers = make_parked(spec)
    update, _, _ = make_softmax(spec)
    fours, put_out, put_part, combine = make_combine(spec, config, FOUND)
    read, read4, put = load_shared("float32", 1), load_shared("float32", 4), store_shared("float32")

    @inline
    def q_row(a, place, r, chunk):
        """A lane's chunks of row r of Q."""
        i, head = query_of(a, place, r)
        if PREFIX and not PACKED:
            batch = divide(i, a.seqlen_q)
            address = uint64(a.q + uint64(batch * a.q_batch + (i - batch * a.seqlen_q) * a.q_row + head * a.q_head))
        else:
            address = uint64(a.q + uint64(place.batch * a.q_batch + (place.q_start + i) * a.q_row + head * a.q_head))
        if EIGHT_BIT:       # a chunk of K has as many elements as two of Q
            left, address = int32(divide(a.head_dim, 8) - 2 * chunk), uint64(address + uint64(32 * chunk))
            even = load_every_second(address, int64(0), int32(0), int32(0), 8, CHUNKS, left, 0, int32(0))
            odd = load_every_second(uint64(address + uint64(16)), int64(0), int32(0), int32(0), 8, CHUNKS, int32(left - 1), 0, int32(0))
            return direct_8bit.weave(even, odd)
        address = uint64(address + uint64(16 * chunk))
        return load_rows(address, int64(0), int32(0), int32(0), 8, CHUNKS, int32(divide(a.head_dim, CHUNK) - chunk), WHOLE, int32(0))

    @inline
    def scale_of_row(a, place, r):
        """The factor of the scores of row r of a block with rows of all requests."""
        batch = int32(min(owner_of(a, query_of(a, place, r)[0])[0], a.batch - 1))
        scale = scale_of(a.k_scale, a.k_scale_batch, a.k_scale_head, batch, place.head_k)
        return scale * scale_of(a.q_scale, a.q_scale_batch, a.q_scale_head, batch, place.head_k)

    @inline
    def scale_of_keys(a, place, unit0, unit1, first):
        """Factors of the scores of rows `first` and first + 8 of the block."""
        if EIGHT_BIT and PREFIX:
            last = int32(place.rows - 1)
            return (scale_of_row(a, place, int32(min(first, last))) * unit0,
                    scale_of_row(a, place, int32(min(first + 8, last))) * unit1)
        elif EIGHT_BIT:
            scale = scale_at(a.k_scale, a.k_scale_batch, a.k_scale_head, place)
            scale = scale * scale_at(a.q_scale, a.q_scale_batch, a.q_scale_head, place)
            return scale * unit0, scale * unit1
        else:
            return float32(1), float32(1)

    @inline
    def scale_keys(acc_s, scale):
        if EIGHT_BIT:
            return scale_rows(acc_s, scale[0], scale[1])
        else:
            return acc_s

    @inline
    def warp_of(thread):
        """(which of the warps with different keys this thread is in, its first row in the block)."""
        w = int32(thread >> 5)
        row_warp = divide(w, KEY_WARPS)
        return int32(w - row_warp * KEY_WARPS), int32(row_warp * WARP_ROWS + lane_row(int32(thread & 31)))

    @inline
    def narrow(words):
        """(a lane's chunks of a row of Q for products, the factor of the row's scores): times a power of two all are below 2**15. What is
        below 2**-28 of the largest number of the row loses bits, an error of 2**-39 of that number."""
        if NARROW:
            factor, unit = direct_8bit.factors(quad_max(direct_8bit.largest(words)))
            return direct_8bit.narrowed(words, factor), unit
        else:
            return words, float32(1)

    @inline
    def load_pair(a, place, r0, r1, lane):
        """Rows of the block for products, and the factors of their scores."""
        (q0, unit0), (q1, unit1) = narrow(q_row(a, place, r0, int32(lane & 3))), narrow(q_row(a, place, r1, int32(lane & 3)))
        return HeldQ(q0, q1, unit0, unit1)

    @inline
    def store_pair(base, address, first, q):
        keep_q(address, q.row0, q.row1)
        if NARROW:      # the lanes of a quad write the same
            units = int32(base + UNITS + 4 * first)
            put(units, q.unit0)
            put(int32(units + 32), q.unit1)

    @inline
    def units_of(base, first):
        """The factors of the scores of rows `first` and first + 8."""
        if NARROW:
            units = int32(base + UNITS + 4 * first)
            return read(units)[0], read(int32(units + 32))[0]
        else:
            return float32(1), float32(1)

    @inline
    def load_q(a, base, place, first, lane, w, rows):
        """Rows g and g + 8 of the warp, `first` and first + 8 of the block; of a second tile rows behind them, in shared memory."""
        r0, r1 = int32(min(first, rows - 1)), int32(min(first + 8, rows - 1))
        if KEEP_Q:
            address = int32(base + Q + divide(w, KEY_WARPS) * (TILES * Q_BYTES) + 16 * lane)
            if w - divide(w, KEY_WARPS) * KEY_WARPS == 0:
                store_pair(base, address, first, load_pair(a, place, r0, r1, lane))
                if TILES == 2:
                    r0, r1 = int32(min(first + ROWS, rows - 1)), int32(min(first + ROWS + 8, rows - 1))
                    store_pair(base, int32(address + Q_BYTES), int32(first + ROWS), load_pair(a, place, r0, r1, lane))
            cuda.syncthreads()
            unit0, unit1 = units_of(base, first)
            return KeptQ(address, unit0, unit1)
        else:
            return load_pair(a, place, r0, r1, lane)

    @inline
    def scores_of(q, k):
        """S = Q K^T."""
        if KEEP_Q:
            return qk(zeros(COUNT_S), q.address, k)
        else:
            return qk(zeros(COUNT_S), q.row0, q.row1, k)

    @inline
    def second_lines(lines):
        """Where what the scores of the second tile's rows need lies."""
        return int32(lines + ROWS * ROW_BYTES)

    @inline
    def table_at(a, batch):
        """Address of the batch entry's pages."""
        if PAGED:
            return uint64(a.table + batch * a.table_row)
        else:
            return uint64(0)

    @inline
    def table_of(a, base, batch, thread):
        """table_at; or where that lies, stored before load_q's barrier."""
        if not KEEP_Q or not PAGED:
            return table_at(a, batch)
        if thread == 0:
            put_address(int32(base + TABLE), table_at(a, batch))
        return int32(base + TABLE)

    @inline
    def pages_of(a, table, by_page):
        """direct.Pages. table: of table_at."""
        if not PAGED:
            return int32(0)
        else:
            return direct.Pages(table, a.table_entry, by_page, a.last_page, a.page_size, a.page_magic, a.page_shift)

    @inline
    def pages_of_place(a, table, by_page):
        """direct.Pages. table: of table_of."""
        if KEEP_Q and PAGED:
            return pages_of(a, get_address(table), by_page)
        else:
            return pages_of(a, table, by_page)

    start, first_k_v, k_of, next_k, v_of, next_v, finish = make_operands(spec, config, pages_of, pages_of_place)

    @inline
    def base_of(pointer, by_batch, by_head, batch, head_k, chunk):
        """Address of a chunk of key 0, or of the first row of page 0."""
        if PAGED:
            batch = int32(0)
        return uint64(pointer + uint64(batch * by_batch + head_k * by_head) + uint64(16 * chunk))

    @inline
    def ring_of(base, n):
        """Shared address of the ring of warps with keys n."""
        return int32(base + OUT + n * ROW_WARPS * OUT_BYTES)

    @inline
    def out_of(base, n, row):
        """Shared address of a row of O of warps with keys n."""
        row_warp = divide(row, WARP_ROWS)
        return int32(base + OUT + (n * ROW_WARPS + row_warp) * OUT_BYTES + (row - row_warp * WARP_ROWS) * PITCH)

    @inline
    def score_row(a, place, r):
        i, head = query_of(a, place, r)
        if PREFIX:
            batch, i, seqlen_q, seqlen_k = owner_of(a, i)
            lo, hi = row_bounds(a, i, diagonal_of(a, seqlen_q, seqlen_k), seqlen_k)
            return row_of(a, int32(min(batch, a.batch - 1)), head, i, seqlen_q, seqlen_k, int32(max(lo, place.first)),
                          int32(min(hi, place.end)))
        lo, hi = row_bounds(a, i, diagonal_of(a, place.seqlen_q, place.seqlen_k), place.seqlen_k)
        batch = int32(min(place.batch, a.batch - 1)) if PACKED else place.batch         # rows of no request have no slope
        return row_of(a, batch, head, i, place.seqlen_q, place.seqlen_k, int32(max(lo, place.first)), int32(min(hi, place.end)))

    @inline
    def rows_of(a, base, place, first, rows, thread):
        """What the scores of rows `first` and first + 8 need; or where that lies for `first`, stored before load_q's barrier."""
        if KEEP_Q:
            if thread < BLOCK_ROWS:
                park(int32(base + LINES + ROW_BYTES * thread), score_row(a, place, int32(min(thread, rows - 1))))
            return int32(base + LINES + ROW_BYTES * first)
        else:
            return (score_row(a, place, int32(min(first, rows - 1))),
                    score_row(a, place, int32(min(first + 8, rows - 1))))

    @inline
    def before_s(lines):
        """The two rows, with what fetch needs."""
        if KEEP_Q:
            return addresses(lines), addresses(int32(lines + 8 * ROW_BYTES))
        else:
            return lines

    @inline
    def behind_s(lines):
        """The two rows, with what scores need."""
        if KEEP_Q:
            return numbers(lines), numbers(int32(lines + 8 * ROW_BYTES))
        else:
            return lines

    @inline
    def sums_at(base, tile):
        """Shared address of this thread's Sums of a tile."""
        return int32(base + SUMS + tile * SUMS_BYTES + 16 * thread_index())

    @inline
    def take_sums(base, tile):
        x = read4(sums_at(base, tile))
        return Sums(x[0], x[1], x[2], x[3])

    @inline
    def put_sums(base, tile, sums):
        at = sums_at(base, tile)
        put(at, sums.max0)
        put(int32(at + 4), sums.max1)
        put(int32(at + 8), sums.sum0)
        put(int32(at + 12), sums.sum1)

    @inline
    def probabilities(a, acc_s, early, lines, column, sums):
        """(P of a tile, its Sums with these keys, the factors of its rows of O), from dot products times scales."""
        row0, row1 = behind_s(lines)
        acc_s = score(a, acc_s, early, row0, row1, column)
        acc_s = keep(acc_s, TwoIntervals(row0.lo, row0.hi, row1.lo, row1.hi), column)
        acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, sums.max0, sums.max1, sums.sum0, sums.sum1)
        return to_half(acc_s), Sums(max0, max1, sum0, sum1), alpha0, alpha1

    @inline
    def note(base, w, row, lane, maximum, total):
        """Store a row's maximum and sum to shared memory, for all warps."""
        total = quad_sum(total)
        if (lane & 3) == 0:
            put(int32(base + TOP + (w * BLOCK_ROWS + row) * 4), maximum)
            put(int32(base + TOTAL + (w * BLOCK_ROWS + row) * 4), total)

    @inline
    def whole(a, base, row):
        """(maximum, sum) of a row over all warps that have it."""
        top, total = NEG_INF, float32(0)
        for w in range(KEY_WARPS):
            top = max(top, read(int32(base + TOP + (w * BLOCK_ROWS + row) * 4))[0])
        for w in range(KEY_WARPS):
            total += read(int32(base + TOTAL + (w * BLOCK_ROWS + row) * 4))[0] * factor(a, base, w, row, top)
        return top, total

    @inline
    def factor(a, base, w, row, top):
        """The factor of a warp's O and sum of a row under the maximum of all warps; 0 if the warp's keys were all masked."""
        return decay(a, read(int32(base + TOP + (w * BLOCK_ROWS + row) * 4))[0], top)

    @inline
    def result(a, base, row, column):
        """Four columns of a row over this block's keys, its maximum and its sum."""
        top, total = whole(a, base, row)
        out0, out1, out2, out3 = float32(0), float32(0), float32(0), float32(0)
        for n in range(KEY_WARPS):
            part = factor(a, base, int32(n), row, top)
            x = read4(int32(out_of(base, int32(n), row) + 4 * column))
            out0, out1, out2, out3 = out0 + part * x[0], out1 + part * x[1], out2 + part * x[2], out3 + part * x[3]
        return (out0, out1, out2, out3), top, total

    merge = make_merge(spec, config, RECEIVED, fours, result, put_out)

    def kernel(a):
        if EARLY:
            take_turn()
        if CLUSTER > 1:
            cluster.arrive()
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
        thread = int32(cuda.threadIdx.x)
        w, lane = int32(thread >> 5), int32(thread & 31)
        g, c = lane_row(lane), int32(lane & 3)          # the lane's first row, its chunk of a row
        place = place_of(a, int32(cuda.blockIdx.x))
        if LENGTHS:
            if place.rows == 0 or (CLUSTER == 1 and not PREFIX and place.split >= place.splits):
                return
        rows = place.rows
        last = int32(place.end - 1)
        key_warp, row = warp_of(thread)
        row_warp = int32(divide(w, KEY_WARPS))
        key, ring = int32(place.first + key_warp * KEYS), int32(ring_of(base, key_warp) + 16 * lane)
        k_base = base_of(a.k, a.k_batch, a.k_head, place.batch, place.head_k, c)
        v_base = base_of(a.v, a.v_batch, a.v_head, place.batch, place.head_k, g)
        start(a, ring, Walk(k_base, v_base, last, g, c, key_warp, row_warp, table_at(a, place.batch)), key)
        lines = rows_of(a, base, place, row, rows, thread)
        table = table_of(a, base, place.batch, thread)
        q = load_q(a, base, place, row, lane, w, rows)
        walk = Walk(k_base, v_base, last, g, c, key_warp, row_warp, table)
        key_scale = scale_of_keys(a, place, q.unit0, q.unit1, row)
        key_scale1 = key_scale
        if TILES == 2:
            unit0, unit1 = units_of(base, int32(row + ROWS))
            key_scale1 = scale_of_keys(a, place, unit0, unit1, int32(row + ROWS))
        acc_o, sums = zeros(COUNT_O), Sums(NEG_INF, NEG_INF, float32(0), float32(0))
        if TILES == 2:
            put_sums(base, 0, sums)
            put_sums(base, 1, sums)
        if key <= last:
            k, v = first_k_v(a, ring, walk, key)
            while key <= last:
                column = int32(key + 2 * c)
                row0, row1 = before_s(lines)
                early = fetch(a, row0, row1, column, place.seqlen_k)
                acc_s = scores_of(q, k_of(walk, k))
                k = next_k(a, ring, walk, key, k)
                if TILES == 1:
                    p, sums, alpha0, alpha1 = probabilities(a, scale_keys(acc_s, key_scale), early, lines, column, sums)
                    acc_o = pv(rescale(acc_o, alpha0, alpha1), p, v_of(walk, v))
                else:
                    acc_s0, acc_s1 = scale_keys(part(acc_s, 0, TILES), key_scale), scale_keys(part(acc_s, 1, TILES), key_scale1)
                    p, now, alpha0, alpha1 = probabilities(a, acc_s0, early, lines, column, take_sums(base, 0))
                    put_sums(base, 0, now)
                    acc_o0 = rescale(part(acc_o, 0, TILES), alpha0, alpha1)
                    p1, now, alpha0, alpha1 = probabilities(a, acc_s1, early, second_lines(lines), column, take_sums(base, 1))
                    put_sums(base, 1, now)
                    acc_o = pv(join(acc_o0, rescale(part(acc_o, 1, TILES), alpha0, alpha1)), join(p, p1), v_of(walk, v))
                v = next_v(a, ring, walk, key, v)
                key = int32(key + STEP)
        # computed again: the loop has no registers for what is needed only behind it
        place, thread = place_of(a, opaque(int32(cuda.blockIdx.x))), thread_index()
        splits, rows = place.splits, place.rows
        lane, c, (key_warp, row) = int32(thread & 31), int32(thread & 3), warp_of(thread)
        if TILES == 2:
            sums = take_sums(base, 0)
        note(base, key_warp, row, lane, sums.max0, sums.sum0)
        note(base, key_warp, int32(row + 8), lane, sums.max1, sums.sum1)
        if TILES == 2:
            sums = take_sums(base, 1)
            note(base, key_warp, int32(row + ROWS), lane, sums.max0, sums.sum0)
            note(base, key_warp, int32(row + ROWS + 8), lane, sums.max1, sums.sum1)
        finish(key_warp)
        store_output(part(acc_o, 0, TILES), int32(out_of(base, key_warp, row) + 8 * CHUNK * c), PITCH)
        if TILES == 2:
            store_output(part(acc_o, 1, TILES), int32(out_of(base, key_warp, row) + ROWS * PITCH + 8 * CHUNK * c), PITCH)
        cuda.syncthreads()
        if CLUSTER > 1:
            merge(a, base, thread, place)
        else:
            i = thread
            while i < rows * fours(a):
                r = divide(i, fours(a))
                column = int32((i - r * fours(a)) * 4)
                values, maximum, total = result(a, base, r, column)
                if PREFIX or splits == 1:
                    put_out(a, place, r, column, values, maximum, total)
                else:
                    put_part(a, place, r, column, values, maximum, total)
                i = int32(i + 32 * WARPS)
            if not PREFIX and splits > 1:
                combine(a, base, thread, place)

    return kernel, smem.size - ALIGN + 16
