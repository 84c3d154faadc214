"""Merge the results of key splits, each of which has its rows' maxima, sums and outputs (Milakov and Gimelshein 2018).

A kernel of its own would start only after all blocks have ended. Instead the last block of a key head that finishes merges that head.
Which block that is varies from run to run; the order of the sums does not.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import atomic_inc_wrap, fence_gpu, load_f32, load_shared_b32, shared_address, store_f32, store_shared_b32
from ..ptx.scalar import load_chunk, load_shared, store, store_shared
from ..ptx.sync import wait_for_previous
from ..spec import Spec
from ..tile.smem import ALIGN, Smem
from ..tile.softmax import NEG_INF, make_decay, make_finish_row
from .config import MOST_SPLITS, WARP, DecodeConfig
from .places import make_place_of
from .prefix import make_shared, of_shared


@inline
def query_of(a, place, r):
    """Row r of a block is query i of a query head: (i, head). The heads that share a key head are neighbours."""
    r = int32(place.row + r)
    i = divide(r, a.group)
    return i, int32(place.head_k * a.group + r - i * a.group)


@inline
def scale_of(pointer, by_batch, by_head, batch, head_k):
    """The scale of a request's key head; 1 without scales."""
    scale = float32(1)
    if pointer != 0:
        scale = load_f32(uint64(pointer + uint64(batch * by_batch + head_k * by_head)))
    return scale


@inline
def scale_at(pointer, by_batch, by_head, place):
    """scale_of a block's request."""
    return scale_of(pointer, by_batch, by_head, place.batch, place.head_k)


def make_line_of(spec: Spec) -> Any:
    """line_of(a, place, row, head): index of the lse of a request's query row."""
    PACKED = spec.packed

    @inline
    def line_of(a, place, row, head):
        if PACKED:
            return int64(head) * a.total_q + place.q_start + row
        else:
            return (int64(place.batch) * a.num_heads + head) * a.seqlen_q + row
    return line_of


def _make_put(spec: Spec) -> Any:
    """put(a, place, r, column, values, maximum, total): finish and store four columns of row r of a block, with the first ones its lse."""
    LSE, store_out, finish_row = spec.lse, store(spec.out_dtype or spec.dtype, "float32"), make_finish_row(spec)
    (PREFIX, BEHIND), (put_prefix, with_prefix) = of_shared(spec), make_shared(spec)
    PACKED, SINKS, EIGHT_BIT = spec.packed, spec.sinks is not None, spec.cache_dtype is not None

    line_of = make_line_of(spec)

    @inline
    def put(a, place, r, column, values, maximum, total):
        row, head = query_of(a, place, r)
        if PREFIX:
            return put_prefix(a, place, row, head, column, values, maximum, total)
        if BEHIND:
            values, maximum, total = with_prefix(a, place, row, head, column, values, maximum, total)
        factor, lse = finish_row(a, head, maximum, total)
        if PACKED and SINKS:
            if place.batch == a.batch:      # rows of no request
                lse = NEG_INF
        if EIGHT_BIT:
            factor = factor * a.v_number * scale_at(a.v_scale, a.v_scale_batch, a.v_scale_head, place)
        at = uint64(a.out + uint64(place.batch * a.out_batch + (place.q_start + row) * a.out_row + head * a.out_head + column * a.out_dim))
        for n in range(4):
            store_out(at, values[n] * factor)
            at = uint64(at + uint64(a.out_dim))
        if LSE:
            if column == 0:
                store_f32(uint64(a.lse + uint64(line_of(a, place, row, head) * 4)), lse)
    return put


def _make_first_of(spec: Spec, BLOCK_ROWS: int, BLOCKS: bool = False) -> Any:
    """first_of(a, place, split): index of a split's first row among those of all splits and planes. BLOCKS: see make_place_of."""
    LENGTHS = spec.lengths or BLOCKS

    @inline
    def first_of(a, place, split):
        if LENGTHS:
            return int64(split) * int64(a.lines) + int64(place.part) * BLOCK_ROWS
        else:
            return int64(split) * int64(a.lines) + int64(place.plane * place.rows)

    return first_of


def make_part_of(spec: Spec, BLOCK_ROWS: int, BLOCKS: bool = False) -> tuple[Any, Any]:
    """(part_of, note) of a block's split. BLOCKS: see make_place_of.

    part_of(a, place, r, column): address of a column of row r of its result
    note(a, place, r, maximum, total): store the row's maximum and its sum
    """
    HEAD_DIM_V, first_of = spec.head_dim_v, _make_first_of(spec, BLOCK_ROWS, BLOCKS)

    @inline
    def part_of(a, place, r, column):
        return uint64(a.part + uint64(((first_of(a, place, place.split) + r) * HEAD_DIM_V + column) * 4))

    @inline
    def note(a, place, r, maximum, total):
        at = uint64(a.part_rows + uint64((first_of(a, place, place.split) + r) * 8))
        store_f32(at, maximum)
        store_f32(uint64(at + uint64(4)), total)
    return part_of, note


def _make_merged(spec: Spec, BLOCK_ROWS: int, PARTS: int, BLOCKS: bool = False) -> Any:
    """merged(a, base, place, r, column, first): four columns of row r of a block, its maximum and its sum. Those of the splits are in
    shared memory at offset PARTS, from the `first` pair on."""
    HEAD_DIM_V, first_of = spec.head_dim_v, _make_first_of(spec, BLOCK_ROWS, BLOCKS)
    load, decay, read = load_chunk("float32"), make_decay(spec), load_shared("float32", 1)

    @inline
    def maximum_of(base, n):
        return read(int32(base + PARTS + 8 * n))[0]

    @inline
    def total_of(base, n):
        return read(int32(base + PARTS + 8 * n + 4))[0]

    @inline
    def one(at, left):
        inside = int32(1) if left > 0 else int32(0)
        return load(at, inside)

    @inline
    def four(at, by_split, left):
        """Four columns of each of four splits, zeros past the last."""
        return (one(at, left), one(uint64(at + by_split), int32(left - 1)), one(uint64(at + uint64(2) * by_split), int32(left - 2)),
                one(uint64(at + uint64(3) * by_split), int32(left - 3)))

    @inline
    def add(a, base, out, x, n, left, top):
        weight = decay(a, maximum_of(base, n), top) if left > 0 else float32(0)
        return out[0] + weight * x[0], out[1] + weight * x[1], out[2] + weight * x[2], out[3] + weight * x[3]

    @inline
    def add_four(a, base, out, x, n, left, top):
        out = add(a, base, out, x[0], n, left, top)
        out = add(a, base, out, x[1], int32(n + 1), int32(left - 1), top)
        out = add(a, base, out, x[2], int32(n + 2), int32(left - 2), top)
        return add(a, base, out, x[3], int32(n + 3), int32(left - 3), top)

    @inline
    def merged(a, base, place, r, column, first):
        splits = place.splits
        top, total = NEG_INF, float32(0)
        for n in range(splits):
            top = max(top, maximum_of(base, int32(first + n)))
        for n in range(splits):
            total += total_of(base, int32(first + n)) * decay(a, maximum_of(base, int32(first + n)), top)
        out = (float32(0), float32(0), float32(0), float32(0))
        at = uint64(a.part + uint64(((first_of(a, place, 0) + r) * HEAD_DIM_V + column) * 4))
        by_split = uint64(int64(a.lines) * (HEAD_DIM_V * 4))
        n = int32(0)
        while n < splits:         # eight loads in flight
            left = int32(splits - n)
            x, y = four(at, by_split, left), four(uint64(at + uint64(4) * by_split), by_split, int32(left - 4))
            out = add_four(a, base, out, x, int32(first + n), left, top)
            out = add_four(a, base, out, y, int32(first + n + 4), int32(left - 4), top)
            at = uint64(at + uint64(8) * by_split)
            n = int32(n + 8)
        return out, top, total
    return merged


def make_combine(spec: Spec, config: DecodeConfig, PARTS: int) -> tuple[Any, Any, Any, Any]:
    """(fours, put, put_part, combine). PARTS: offset in shared memory for the maxima and sums of all splits and rows.

    fours(a): how many times four columns a row of the output has
    put(a, place, r, column, values, maximum, total): finish and store four columns of row r of a block, with the first ones its lse too
    put_part(a, place, r, column, values, maximum, total): store four columns of the split's row r for the block that merges
    combine(a, base, thread, place): by all threads, after put_part; merges if this block is the last

    place: places.Place.
    """
    HEAD_DIM_V, THREADS, EXACT, BLOCK_ROWS = spec.head_dim_v, WARP * config.warps, config.exact, config.rows
    put, put_shared, merged = _make_put(spec), store_shared("float32"), _make_merged(spec, BLOCK_ROWS, PARTS)
    first_of, (part_of, note) = _make_first_of(spec, BLOCK_ROWS), make_part_of(spec, BLOCK_ROWS)

    @inline
    def fours(a):
        if EXACT:
            return int32(HEAD_DIM_V // 4)
        else:
            return int32(a.head_dim_v >> 2)

    @inline
    def put_part(a, place, r, column, values, maximum, total):
        at = part_of(a, place, r, column)
        for n in range(4):
            store_f32(uint64(at + uint64(4 * n)), values[n])
        if column == 0:
            note(a, place, r, maximum, total)

    @inline
    def is_last(a, base, thread, splits, plane):
        """Whether all other splits of the plane are stored. By all threads, after their own stores."""
        fence_gpu()
        cuda.syncthreads()
        if thread == 0:
            before = atomic_inc_wrap(uint64(a.arrived + uint64(4 * plane)), int32(splits - 1))     # the last one wraps to 0
            store_shared_b32(base + PARTS, before)
        cuda.syncthreads()
        found = load_shared_b32(base + PARTS)
        fence_gpu()
        cuda.syncthreads()
        return found == splits - 1

    @inline
    def combine(a, base, thread, place):
        splits, rows = place.splits, place.rows
        if is_last(a, base, thread, splits, place.plane):
            i = thread
            while i < rows * splits:      # row by row
                r = divide(i, splits)
                index = first_of(a, place, int32(i - r * splits)) + r
                put_shared(int32(base + PARTS + 8 * i), load_f32(uint64(a.part_rows + uint64(index * 8))))
                put_shared(int32(base + PARTS + 8 * i + 4), load_f32(uint64(a.part_rows + uint64(index * 8 + 4))))
                i = int32(i + THREADS)
            cuda.syncthreads()
            i = thread
            while i < rows * fours(a):
                r = divide(i, fours(a))
                column = int32((i - r * fours(a)) * 4)
                values, maximum, total = merged(a, base, place, r, column, int32(r * splits))
                put(a, place, r, column, values, maximum, total)
                i = int32(i + THREADS)
    return fours, put, put_part, combine


def make_merge(spec: Spec, BLOCK_ROWS: int, STEP: int, OVERHEAD: int) -> tuple[Any, int]:
    """(kernel, bytes of shared memory): a plane's BLOCK_ROWS rows are merged by a.pieces blocks, one row after another.

    For splits whose results are so wide that a last block would take longer than all others before it: 64 rows of 512 columns of float32
    are 128 KB of each split. Blocks of planes with one split end at once. A thread has four columns.
    """
    place_of, put, put_shared = make_place_of(spec, BLOCK_ROWS, STEP, OVERHEAD, True), _make_put(spec), store_shared("float32")
    smem, THREADS, PLANNED = Smem(), spec.head_dim_v // 4, spec.planned
    PARTS = smem.take(MOST_SPLITS * 8, 16)
    first_of, merged = _make_first_of(spec, BLOCK_ROWS, True), _make_merged(spec, BLOCK_ROWS, PARTS, True)

    def kernel(a):
        wait_for_previous()         # it is launched while the splits' last blocks run
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
        thread, plane = int32(cuda.threadIdx.x), divide(int32(cuda.blockIdx.x), a.pieces)
        r, column = int32(cuda.blockIdx.x - plane * a.pieces), int32(4 * thread)
        first = plane
        if not PLANNED:
            first = int32(plane * a.splits)
        place = place_of(a, first)
        if place.splits < 2 or place.split != 0:
            return
        while r < place.rows:
            n = thread
            while n < place.splits:
                index = first_of(a, place, n) + r
                put_shared(int32(base + PARTS + 8 * n), load_f32(uint64(a.part_rows + uint64(index * 8))))
                put_shared(int32(base + PARTS + 8 * n + 4), load_f32(uint64(a.part_rows + uint64(index * 8 + 4))))
                n = int32(n + THREADS)
            cuda.syncthreads()
            values, maximum, total = merged(a, base, place, r, column, int32(0))
            put(a, place, r, column, values, maximum, total)
            cuda.syncthreads()
            r = int32(r + a.pieces)
    return kernel, smem.size - ALIGN + 16
