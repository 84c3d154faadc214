"""The structural mask on the device: problem.py's row_bounds and block_bounds, for one tile of query rows."""
from __future__ import annotations

from typing import Any

from numba import int32

from .inline import divide, inline
from .spec import Spec


def make_bounds(spec: Spec, BLOCK_N: int) -> tuple[Any, Any]:
    """(row_bounds, block_bounds) for the limits that the Spec has."""
    LEFT, RIGHT = spec.left, spec.right

    @inline
    def row_bounds(a, row, diagonal, seqlen_k):
        """Keys [lo, hi) of a query row, whose diagonal is key row + diagonal. Rows past the end have bounds too; nobody asks."""
        lo = int32(0)
        hi = int32(seqlen_k)
        if LEFT:
            lo = int32(min(max(row + diagonal - a.left, 0), seqlen_k))
        if RIGHT:
            hi = int32(min(max(row + diagonal + a.right + 1, 0), seqlen_k))
        return lo, int32(max(lo, hi))

    @inline
    def block_bounds(a, first, last, diagonal, seqlen_k):
        """(n_min, full_min, full_max, n_max) of the rows first to last, inclusive: see problem.block_bounds.

        At least one block, so that kernels have no empty loop: one whose mask keeps nothing gives out 0 and lse -inf.
        """
        lo_first, hi_first = row_bounds(a, first, diagonal, seqlen_k)
        lo_last, hi_last = row_bounds(a, last, diagonal, seqlen_k)
        n_max = int32(max(divide(int32(hi_last + BLOCK_N - 1), BLOCK_N), 1))
        n_min = int32(min(divide(lo_first, BLOCK_N), n_max - 1))
        full_min = int32(min(max(divide(int32(lo_last + BLOCK_N - 1), BLOCK_N), n_min), n_max))
        full_max = int32(min(max(divide(hi_first, BLOCK_N), full_min), n_max))
        return n_min, full_min, full_max, n_max

    return row_bounds, block_bounds
