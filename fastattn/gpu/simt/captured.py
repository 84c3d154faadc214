"""Gradients of a score_mod's captured arrays with plain threads, for every family.

A block owns a tile of query rows of one head, loops over the blocks of keys that they attend and recomputes dS (pairs.py). What each pair
is worth to the elements that the function loaded is added up as flex/sums.py says.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, uint8, uint64

from ..dsl.inline import inline
from ..flex.bitmap import EMPTY, FULL, make_kind
from ..flex.config import ANY_ORDER
from ..flex.sums import make_sums
from ..ptx.memory import shared_address
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.mask import make_bounds, make_diagonals
from ..tile.scalar import compute_of, make_score
from ..tile.schedule import make_key_row, make_num_tiles, make_tile_at
from .config import WIDE, Tile
from .pairs import Corner, Pointers, make_pairs
from .threads import row_address


def make_captured(spec: Spec, tile: Tile, arrays: tuple[int, ...], order: int = ANY_ORDER) -> Any:
    """The kernel, for the gradients of these captured arrays. One tile of `lines` query rows a block. order: see make_sums."""
    BLOCK_M, BLOCK_N, ROWS, COLS, MASK = tile.lines, tile.columns, tile.rows, tile.cols, spec.mask
    compute, REAL, _ = compute_of(spec)
    assert spec.score_mod is not None
    prepare_sums, add_up, finish, SUMS = make_sums(spec.score_mod, arrays, compute, order)

    @inline
    def add_pair(a, ds, s, shared, batch, head, row, col):
        if ds != REAL(0):
            add_up(a, ds, s, shared[2], shared[3], batch, head, row, col)
    pairs = make_pairs(spec, tile, False, True, add_pair)
    (prepare, _, _), first_row, kind_of = make_score(spec, True, False), make_first_row(spec), make_kind(spec.mask_mod)
    (_, block_bounds), (diagonal_of, _) = make_bounds(spec, BLOCK_N), make_diagonals(spec)
    tile_at, num_tiles, key_row = make_tile_at(spec, BLOCK_M), make_num_tiles(spec), make_key_row(BLOCK_N)

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
        t, thread = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        x, y = int32(thread % WIDE), int32(thread // WIDE)
        if t < num_tiles(a):
            tile_here = tile_at(a, t)
            m_block, head, batch, q_start, seqlen_q, _, seqlen_k = tile_here
            first_key = key_row(a, tile_here.k_start, 0)
            row0, head_k = int32(m_block * BLOCK_M), int32(head // a.group)
            last = min(row0 + BLOCK_M, seqlen_q)
            q = row_address(a.q, a.q_batch, a.q_head, a.q_row, batch, head, q_start + row0)
            dout = row_address(a.dout, a.dout_batch, a.dout_head, a.dout_row, batch, head, q_start + row0)
            k = row_address(a.k, a.k_batch, a.k_head, a.k_row, batch, head_k, first_key)
            v = row_address(a.v, a.v_batch, a.v_head, a.v_row, batch, head_k, first_key)
            totals, places, tops = cuda.local.array(SUMS, REAL), cuda.local.array(SUMS, uint64), cuda.local.array(SUMS, int32)
            for i in range(SUMS):
                totals[i], places[i], tops[i] = REAL(0), uint64(0), int32(0)
            own, mods = prepare(a, batch, head)
            shared, first = (own, mods, prepare_sums(a, batch, head), (totals, places, tops)), first_row(a, batch, head, q_start)
            acc_s, acc_dp = cuda.local.array((ROWS, COLS), REAL), cuda.local.array((ROWS, COLS), REAL)
            n_min, full_min, full_max, n_max = block_bounds(a, row0, last, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k)
            for n_block in range(n_min, n_max):
                kind = kind_of(a, batch, head, m_block, n_block)
                if kind != EMPTY:
                    full = int32(not MASK and kind == FULL and full_min <= n_block and n_block < full_max)
                    col0 = int32(n_block * BLOCK_N)
                    pairs(a, base, acc_s, acc_dp, Pointers(q, k + col0 * a.k_row, v + col0 * a.v_row, dout),
                          Corner(batch, head, row0, col0, seqlen_q, seqlen_k, first), full, shared, thread, x, y)
            finish(a, (totals, places, tops))
    return kernel
