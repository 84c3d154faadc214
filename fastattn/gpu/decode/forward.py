"""Forward for few queries and many keys, since sm_80: keys are split over blocks, and inside a block over warps. Results are merged.

    block           one key head, one split of the keys. Its rows are the queries of all heads that share the key head
    warp            8, 16 or 32 rows, 8 to 32 keys at a time, alone: S = Q K^T, softmax, O += P V. K and V are loaded to registers
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

from numba import cuda, float32, int32, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx import cluster, direct, direct_columns
from ..ptx.memory import load_b32, shared_address
from ..ptx.scalar import load_shared, store_shared
from ..ptx.sync import opaque, take_turn, thread_index
from ..spec import Spec
from ..tile.fragments import column_max, column_sum, join, lane_row, make_pack, part, quad_max, quad_sum, scale_rows, zeros
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
from .queries import make_products, make_queries, q_bytes
from .scores import get_address, make_parked, make_row_scores, put_address


class Sums(NamedTuple):
    """Maxima and sums of rows g and g + 8 of a tile over the keys so far."""

    max0: Any
    max1: Any
    sum0: Any
    sum1: Any


def make_forward(spec: Spec, config: DecodeConfig) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    KEYS, WARPS, ROW_WARPS, KEY_WARPS, KEEP_Q = config.keys, config.warps, config.row_warps, config.key_warps, config.keep_q
    EIGHT_BIT = spec.cache_dtype is not None
    assert config.row_tiles == 1 or not (spec.dtype == "float32" or spec.bias or spec.mask), "they take one tile"
    CHUNK, _, CHUNKS_V, _, _ = chunks_of(spec, config)
    COLUMNS, COUNT_O = config.columns, config.row_tiles * 4 * CHUNK * CHUNKS_V // (1 + config.columns)
    BLOCK_ROWS, PITCH = config.rows, 32 * CHUNK * CHUNKS_V + 16         # bytes of a row of O in shared memory; neighbours use other banks
    TILES, WARP_ROWS, NEXT = config.row_tiles, config.warp_rows, 1 if COLUMNS else 8         # of a warp; from a thread's row to its second
    NARROW = spec.p_dtype != spec.dtype          # q is bfloat16, and float16 in products
    ONE_PAGE, PAGED = spec.paged and config.one_page, spec.paged and not config.one_page
    LENGTHS, PACKED, STEP = spec.lengths, spec.packed, KEYS * KEY_WARPS
    keep, decay = make_keep(spec), make_decay(spec)
    smem = Smem()
    # of a warp: the ring of K and V, then its rows of O
    OUT_BYTES = max(WARP_ROWS * PITCH, config.stages * ring_bytes(spec, config)[1])
    OUT, FOUND = smem.take(WARPS * OUT_BYTES, 16), smem.take(4, 16)
    TOP, TOTAL = smem.take(KEY_WARPS * BLOCK_ROWS * 4, 16), smem.take(KEY_WARPS * BLOCK_ROWS * 4, 16)
    Q = smem.take(ROW_WARPS * TILES * q_bytes(spec, config) if KEEP_Q else 0, 16)
    UNITS = smem.take(BLOCK_ROWS * 4 if KEEP_Q and NARROW else 0, 16)
    RECEIVED, CLUSTER, EARLY = smem.take(received_bytes(spec, config), 16), config.cluster, config.early
    SUMS, SUMS_BYTES = smem.take(TILES * 512 * WARPS if TILES > 1 else 0, 16), 512 * WARPS
    LINES, TABLE = smem.take(BLOCK_ROWS * ROW_BYTES if KEEP_Q else 0, 16), smem.take(8 if KEEP_Q and PAGED else 0, 16)
    (load_q, units_of, scores_of), (_, _, pv) = make_queries(spec, config, Q, UNITS), make_products(spec, config)
    to_half, store_output = make_pack(spec.p_dtype), direct_columns.store_output if COLUMNS else direct.make_store_output(16 // CHUNK)
    first_key = direct_columns.make_first_key(KEYS)
    # a split has one step at least: what one more costs is known to the host
    (PREFIX, _), owner_of = of_shared(spec), make_owner_of(spec)
    row_bounds, place_of = make_row_bounds(spec), make_place_of(spec, BLOCK_ROWS, STEP, 1)
    row_of, fetch, score = make_row_scores(spec, config.fragment_keys)
    park, addresses, numbers = make_parked(spec)
    update, _, _ = make_softmax(spec, column_max if COLUMNS else quad_max)
    sum_of = column_sum if COLUMNS else quad_sum
    fours, put_out, put_part, combine = make_combine(spec, config, FOUND)
    read, read4, put = load_shared("float32", 1), load_shared("float32", 4), store_shared("float32")

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
        if COLUMNS:
            return w, int32(2 * (thread & 3))
        return int32(w - row_warp * KEY_WARPS), int32(row_warp * WARP_ROWS + lane_row(int32(thread & 31)))

    @inline
    def second_lines(lines):
        """Where what the scores of the second tile's rows need lies."""
        return int32(lines + ROWS * ROW_BYTES)

    @inline
    def table_at(a, batch):
        """Address of the batch entry's pages."""
        if PAGED or ONE_PAGE:
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
    def base_of(a, pointer, by_batch, by_head, batch, head_k, chunk):
        """Address of a chunk of key 0, or of the first row of page 0."""
        if PAGED:
            batch = int32(0)
        if ONE_PAGE:
            page = load_b32(table_at(a, int32(min(batch, a.batch - 1))))        # rows of no request read no key
            batch = int32(a.last_page) if page < 0 else int32(min(page, a.last_page))
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
                    score_row(a, place, int32(min(first + NEXT, rows - 1))))

    @inline
    def before_s(lines):
        """The two rows, with what fetch needs."""
        if KEEP_Q:
            return addresses(lines), addresses(int32(lines + NEXT * ROW_BYTES))
        else:
            return lines

    @inline
    def behind_s(lines):
        """The two rows, with what scores need."""
        if KEEP_Q:
            return numbers(lines), numbers(int32(lines + NEXT * ROW_BYTES))
        else:
            return lines

    @inline
    def column_of(key, g, c):
        """The lane's first key of a step."""
        if COLUMNS:
            return int32(key + first_key(g))
        else:
            return int32(key + 2 * c)

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
        if COLUMNS:
            acc_s = direct_columns.by_key(acc_s)
        return to_half(acc_s), Sums(max0, max1, sum0, sum1), alpha0, alpha1

    @inline
    def note(base, w, row, lane, maximum, total):
        """Store a row's maximum and sum to shared memory, for all warps."""
        total = sum_of(total)
        if (lane & 3) == 0 if not COLUMNS else lane < 4:
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
        k_base = base_of(a, a.k, a.k_batch, a.k_head, place.batch, place.head_k, c)
        v_base = base_of(a, a.v, a.v_batch, a.v_head, place.batch, place.head_k, g)
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
                column = column_of(key, g, c)
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
        note(base, key_warp, int32(row + NEXT), lane, sums.max1, sums.sum1)
        if TILES == 2:
            sums = take_sums(base, 1)
            note(base, key_warp, int32(row + ROWS), lane, sums.max0, sums.sum0)
            note(base, key_warp, int32(row + ROWS + 8), lane, sums.max1, sums.sum1)
        finish(key_warp)
        if COLUMNS:
            store_output(acc_o, int32(out_of(base, key_warp, row) + 4 * CHUNK * lane_row(lane)), PITCH)
        else:
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
