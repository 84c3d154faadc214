"""What a block of a split-key kernel has: which rows of which request, and which of its keys."""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32
from ..spec import Spec
from ..tile.mask import diagonal_of, make_row_bounds
from ..tile.requests import make_request_at
from .config import PLAN_ENTRY, TILE
from .prefix import make_shared_keys, of_shared
from .units import make_units


class Place(NamedTuple):
    """What a thread block has.

    Parameters
    ----------
    plane, batch, head_k
        Its key head, of all the batch's and in its batch entry. With LENGTHS a plane is a block of rows of a key head.
    split, splits
        Its split of the keys, and how many there are.
    seqlen_k
        Keys of the batch entry.
    first, end
        Keys of the split.
    q_start, seqlen_q
        Queries of the batch entry, from q_start on of packed arrays.
    part
        The results of the plane's splits begin with the rows of this plane of a split.
    row, rows
        Its rows, from `row` on of those of the key head: the queries of all heads that share it.
    """

    plane: Any
    batch: Any
    head_k: Any
    split: Any
    splits: Any
    seqlen_k: Any
    first: Any
    end: Any
    q_start: Any
    seqlen_q: Any
    part: Any
    row: Any
    rows: Any


def make_place_of(spec: Spec, BLOCK_ROWS: int, STEP: int, OVERHEAD: int, BLOCKS: bool = False) -> Any:
    """place_of(a, block): the Place of a block of BLOCK_ROWS rows.

    Splits are whole steps of STEP keys. One more costs as much as OVERHEAD steps. BLOCKS: the rows of a call over arrays may be in several
    blocks, as those of one over caches.
    """
    PLANNED, LENGTHS, PACKED, PREFIX, BEHIND = spec.planned, spec.lengths or BLOCKS, spec.packed, *of_shared(spec)
    shared_keys = make_shared_keys(spec)
    row_bounds, request_at, (batch_of, tile_of) = (make_row_bounds(spec), make_request_at(spec.packed, not spec.lengths),
                                                   make_units(spec.packed, BLOCK_ROWS))

    @inline
    def place_of(a, block):
        """The Place of a block."""
        if PLANNED:
            return planned_place(a, block)
        if PREFIX:
            return prefix_place(a, block)
        plane = divide(block, a.splits)
        unit, split = divide(plane, a.heads_k), int32(block - plane * a.splits)
        head_k = int32(plane - unit * a.heads_k)
        if LENGTHS:
            batch = batch_of(a, unit)
            q_start, seqlen_q, _, seqlen_k = request_at(a, batch)
            row = int32(tile_of(a, unit, batch) * BLOCK_ROWS)
            rows = int32(min(max(seqlen_q * a.group - row, 0), BLOCK_ROWS))
            first, end, splits = part_of(a, split, row, rows, seqlen_q, seqlen_k)
        else:
            batch, q_start, seqlen_q, row, rows = unit, int32(0), int32(a.seqlen_q), int32(0), int32(a.group * a.seqlen_q)
            first, seqlen_k, splits = int32(a.first_key + split * a.split_keys), int32(a.seqlen_k), int32(a.splits)
            end = int32(min(first + a.split_keys, a.end_key))
        return Place(plane, batch, head_k, split, splits, seqlen_k, first, end, q_start, seqlen_q, plane, row, rows)

    @inline
    def planned_place(a, block):
        """place_of by the plan's entry."""
        entry = divide(block, a.heads_k)
        head_k, at = int32(block - entry * a.heads_k), uint64(a.plan + uint64(int64(entry) * PLAN_ENTRY))
        batch, which = load_b32(at), load_b32(uint64(at + uint64(4)))
        split, row = int32(which & ((1 << TILE) - 1)), int32((which >> TILE) * BLOCK_ROWS)
        splits, each = load_b32(uint64(at + uint64(8))), load_b32(uint64(at + uint64(12)))
        q_start, seqlen_q, _, seqlen_k = request_at(a, batch)
        rows = int32(min(max(seqlen_q * a.group - row, 0), BLOCK_ROWS))
        lo, hi = attended(a, row, rows, seqlen_q, seqlen_k)
        first, plane = int32(lo + split * each * STEP), int32((entry - split) * a.heads_k + head_k)
        end = int32(min(first + each * STEP, hi))
        return Place(plane, batch, head_k, split, splits, seqlen_k, first, end, q_start, seqlen_q, plane, row, rows)

    @inline
    def prefix_place(a, block):
        """place_of where rows of all requests, one after another, have the shared keys. A row's bounds are those of its request."""
        plane = divide(block, a.splits)
        unit, split = divide(plane, a.heads_k), int32(block - plane * a.splits)
        all_rows = int32(a.total_q) if PACKED else int32(a.batch * a.seqlen_q)
        row, keys = int32(unit * BLOCK_ROWS), shared_keys(a)
        rows = int32(min(max(all_rows * a.group - row, 0), BLOCK_ROWS))
        first, end, splits = split_of(a, split, int32(0), keys)
        head_k = int32(plane - unit * a.heads_k)
        return Place(plane, int32(0), head_k, split, splits, keys, first, end, int32(0), all_rows, plane, row, rows)

    @inline
    def attended(a, row, rows, seqlen_q, seqlen_k):
        """The keys [lo, hi) that any row attends."""
        diagonal, last = diagonal_of(a, seqlen_q, seqlen_k), divide(int32(row + max(rows, 1) - 1), a.group)
        lo, hi = row_bounds(a, divide(row, a.group), diagonal, seqlen_k)[0], row_bounds(a, last, diagonal, seqlen_k)[1]
        if BEHIND:
            lo = int32(max(lo, shared_keys(a)))
        return lo, hi

    @inline
    def part_of(a, split, row, rows, seqlen_q, seqlen_k):
        """(first, end, splits): the keys of a split among those that any row attends, and how many splits these have. One more costs as
        much as `overhead` steps, so it has that many at least; a number of splits that is asked for is the most that there are."""
        lo, hi = attended(a, row, rows, seqlen_q, seqlen_k)
        return split_of(a, split, lo, hi)

    @inline
    def split_of(a, split, lo, hi):
        """part_of the keys [lo, hi)."""
        steps = divide(int32(max(hi - lo, 0) + STEP - 1), int32(STEP))
        each = int32(max(divide(int32(steps + a.splits - 1), a.splits), OVERHEAD))
        first = int32(lo + split * each * STEP)
        return first, int32(min(first + each * STEP, hi)), int32(max(divide(int32(steps + each - 1), each), 1))
    return place_of
