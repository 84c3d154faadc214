"""Which key blocks a tile of query rows of the Hopper kernels goes through, and which of them need no mask."""
from __future__ import annotations

from typing import Any

from numba import int32

from ..dsl.inline import inline
from ..ptx.sync import uniform
from ..spec import Spec
from ..tile.mask import make_bounds, make_diagonals, make_intervals
from ..tile.smem import WARPGROUP_ROWS
from ..tile.words import make_needed


def make_tile_bounds(spec: Spec, BLOCK_M: int, BLOCK_N: int, EMPTY: bool = False) -> tuple[Any, Any, Any]:
    """(tile_blocks, full_blocks, intervals) of tiles of BLOCK_M query rows and blocks of BLOCK_N keys.

    n_min, n_max, ends = tile_blocks(a, batch, head, m_block, seqlen_q, seqlen_k)
        Key blocks [n_min, n_max) that all warpgroups of a tile loop over. If no row attends a key: one block, or none if
        EMPTY, and then the bounds are warp-uniform values, those of full_blocks too. The blocks before and after all
        that the boolean mask keeps are left out. ends: with a mask, where those of each warpgroup's rows end, a tuple.
    full_min, full_max = full_blocks(a, row, diagonal, seqlen_k)
        Key blocks [full_min, full_max) that need no mask for a warpgroup's rows, from `row` on.
    intervals(a, row, diagonal, seqlen_k): see tile/mask.py.
    """
    (row_bounds, block_bounds), (diagonal_of, _) = make_bounds(spec, BLOCK_N), make_diagonals(spec)
    PACKED, MASK, needed = spec.packed, spec.mask, make_needed(BLOCK_M)

    @inline
    def tile_blocks(a, batch, head, m_block, seqlen_q, seqlen_k):
        first, last = int32(m_block * BLOCK_M), min((m_block + 1) * BLOCK_M, seqlen_q)
        diagonal = diagonal_of(a, batch, seqlen_q, seqlen_k)
        n_min, _, _, n_max = block_bounds(a, first, last, diagonal, seqlen_k)
        if EMPTY:
            lo, _ = row_bounds(a, first, diagonal, seqlen_k)
            _, hi = row_bounds(a, int32(last - 1), diagonal, seqlen_k)
            n_max = n_max if lo < hi else n_min
        if MASK:
            first_kept, end_kept, ends = needed(a, batch, head, first, min(last, a.seqlen_q) if PACKED else last)
            n_max = int32(min(n_max, end_kept))
            if EMPTY:
                n_min = int32(min(max(n_min, first_kept), n_max))
            else:
                n_max = int32(max(n_max, n_min + 1))
                n_min = int32(min(max(n_min, first_kept), n_max - 1))
        else:
            ends = int32(0)
        if EMPTY:
            return uniform(n_min), uniform(n_max), ends
        else:
            return n_min, n_max, ends

    @inline
    def full_blocks(a, row, diagonal, seqlen_k):
        _, full_min, full_max, _ = block_bounds(a, row, int32(row + WARPGROUP_ROWS), diagonal, seqlen_k)
        if EMPTY:
            return uniform(full_min), uniform(full_max)
        else:
            return full_min, full_max
    return tile_blocks, full_blocks, make_intervals(spec)
