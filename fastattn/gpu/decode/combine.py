"""Merge the results of key splits, each of which has its rows' maxima, sums and outputs.

A kernel of its own would start only after all blocks have ended. Instead the last block of a key head that finishes merges that head.
Which block that is varies from run to run; the order of the sums does not.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import atomic_inc_wrap, fence_gpu, load_f32, load_shared_b32, store_f32, store_shared_b32
from ..ptx.scalar import store
from ..ptx.sync import wait_for_previous
from ..spec import Spec
from ..tile.softmax import NEG_INF, make_finish_row
from .config import WARP, DecodeConfig
from .places import make_place_of
from .prefix import make_shared, of_shared
from .splits import make_add_splits


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


def _make_merged(spec: Spec, BLOCK_ROWS: int, BLOCKS: bool = False) -> Any:
    """merged(a, place, r, column): four columns of row r of a block, its maximum and its sum, over all splits.

    BLOCKS: see make_place_of.
    """
    HEAD_DIM_V, first_of, add_splits = spec.head_dim_v, _make_first_of(spec, BLOCK_ROWS, BLOCKS), make_add_splits(spec, 16)

    @inline
    def merged(a, place, r, column):
        row, zero = int64(first_of(a, place, 0) + r), float32(0)
        by_row, by_split = int64(a.lines) * 8, int64(a.lines) * (HEAD_DIM_V * 4)
        rows_at, at = uint64(a.part_rows + uint64(row * 8)), uint64(a.part + uint64((row * HEAD_DIM_V + column) * 4))
        return add_splits(a, (zero, zero, zero, zero), NEG_INF, zero, rows_at, by_row, at, by_split, place.splits)
    return merged


def make_combine(spec: Spec, config: DecodeConfig, FOUND: int) -> tuple[Any, Any, Any, Any]:
    """(fours, put, put_part, combine). FOUND: offset of a word in shared memory.

    fours(a): how many times four columns a row of the output has
    put(a, place, r, column, values, maximum, total): finish and store four columns of row r of a block, with the first ones its lse too
    put_part(a, place, r, column, values, maximum, total): store four columns of the split's row r for the block that merges
    combine(a, base, thread, place): by all threads, after put_part; merges if this block is the last

    place: places.Place.
    """
    HEAD_DIM_V, THREADS, EXACT, BLOCK_ROWS = spec.head_dim_v, WARP * config.warps, config.exact, config.rows
    put, merged, (part_of, note) = _make_put(spec), _make_merged(spec, BLOCK_ROWS), make_part_of(spec, BLOCK_ROWS)

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
        """Whether all other splits of the plane are stored. By all threads, after their own stores.

        The first thread's fences also order what the others have stored before the first barrier, and what they load behind the second.
        """
        cuda.syncthreads()
        if thread == 0:
            fence_gpu()
            before = atomic_inc_wrap(uint64(a.arrived + uint64(4 * plane)), int32(splits - 1))     # the last one wraps to 0
            fence_gpu()
            store_shared_b32(base + FOUND, before)
        cuda.syncthreads()
        return load_shared_b32(base + FOUND) == splits - 1

    @inline
    def combine(a, base, thread, place):
        rows = place.rows
        if is_last(a, base, thread, place.splits, place.plane):
            i = thread
            while i < rows * fours(a):
                r = divide(i, fours(a))
                column = int32((i - r * fours(a)) * 4)
                values, maximum, total = merged(a, place, r, column)
                put(a, place, r, column, values, maximum, total)
                i = int32(i + THREADS)
    return fours, put, put_part, combine


def make_merge(spec: Spec, BLOCK_ROWS: int, STEP: int, OVERHEAD: int) -> tuple[Any, int]:
    """(kernel, bytes of shared memory): a plane's BLOCK_ROWS rows are merged by a.pieces blocks, one row after another.

    For splits whose results are so wide that a last block would take longer than all others before it: 64 rows of 512 columns of float32
    are 128 KB of each split. Blocks of planes with one split end at once. A thread has four columns.
    """
    place_of, put, merged = make_place_of(spec, BLOCK_ROWS, STEP, OVERHEAD, True), _make_put(spec), _make_merged(spec, BLOCK_ROWS, True)
    PLANNED = spec.planned

    def kernel(a):
        wait_for_previous()         # it is launched while the splits' last blocks run
        plane = divide(int32(cuda.blockIdx.x), a.pieces)
        r, column = int32(cuda.blockIdx.x - plane * a.pieces), int32(4 * cuda.threadIdx.x)
        first = plane
        if not PLANNED:
            first = int32(plane * a.splits)
        place = place_of(a, first)
        if place.splits < 2 or place.split != 0:
            return
        while r < place.rows:
            values, maximum, total = merged(a, place, r, column)
            put(a, place, r, column, values, maximum, total)
            r = int32(r + a.pieces)
    return kernel, 0
