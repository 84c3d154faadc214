"""Blocks of rows of a call over caches: a request's rows are in one or several, and only the device knows how many it has if queries are
packed.

Packed, the blocks of request b begin with number floor(cu_seqlens_q[b] * group / ROWS) + b. There is room for all that it can have before
those of the next one, whatever the lengths are, so nothing has to be counted: a block searches for its request, and ends at once if there
are no rows for it. The rows of no request come last, as those of request `batch`.
"""
from __future__ import annotations

from typing import Any

from numba import int32, int64

from ..dsl.inline import divide, inline
from ..tile.schedule import length_at


def make_units(PACKED: bool, ROWS: int) -> tuple[Any, Any]:
    """(batch_of, tile_of) of blocks of ROWS rows.

    batch_of(a, unit): the request of a block, a.batch for rows of none
    tile_of(a, unit, batch): which of the request's blocks it is
    """
    @inline
    def first_of(a, b):
        start = length_at(a.cu_seqlens_q, b, a.q_step, a.total_q)
        return int32(int64(start) * int64(a.group) // int64(ROWS) + b)

    @inline
    def batch_of(a, unit):
        if PACKED:
            low, high = int32(0), int32(a.batch)        # the last one that begins at or before the block
            while low < high:
                middle = int32((low + high + 1) >> 1)
                if first_of(a, middle) <= unit:
                    low = middle
                else:
                    high = int32(middle - 1)
            return low
        else:
            return divide(unit, a.tiles)

    @inline
    def tile_of(a, unit, batch):
        if PACKED:
            return int32(max(unit - first_of(a, batch), 0))
        else:
            return int32(unit - batch * a.tiles)
    return batch_of, tile_of

