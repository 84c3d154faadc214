"""P and dS of a tile of pairs with plain threads, for the kernels of backward.py and dbias.py.

    S = Q K^T    P = exp(score(S) - lse)    dP = dO V^T    dS = P (dP - delta)          dropout: P and dP times 0 or keep_scale

Lines of a tile are query rows and its columns keys, or TRANSPOSED lines are keys and columns query rows. S and dP stay in registers
(threads.py). Their operands are copied in slices of head_dim:

    shared memory   A: slice of the lines' operand | B: slice of the columns' | P: one tile of numbers | alive: a word for each column

A pair is alive if no mask hides it and its row attends a key. Other pairs have P = dS = 0, by a select. In the product that follows, a
column without an alive pair counts as 0. So what such rows and keys hold, NaN included, does not matter.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from numba import cuda, int32, int64, uint64

from ..dsl.inline import inline
from ..ptx.memory import store_shared_b32
from ..ptx.scalar import load_if, load_shared, store_shared
from ..spec import Spec
from ..tile.mask import make_bounds, make_diagonals
from ..tile.scalar import compute_of, make_dropout, make_own_score, make_score
from ..tile.smem import Smem
from .config import WIDE, Tile
from .threads import make_load, make_outer_product, make_product, make_sums


class Pointers(NamedTuple):
    """Addresses in q, k, v and dout of one head: of a tile's first row and key, or of the sequence's."""

    q: Any
    k: Any
    v: Any
    dout: Any


class Corner(NamedTuple):
    """The first pair of a tile, in its sequence. `first` is the index of the sequence's row 0 in lse and delta."""

    batch: Any
    head: Any
    row0: Any
    col0: Any
    seqlen_q: Any
    seqlen_k: Any
    first: Any


@dataclass(frozen=True, slots=True)
class Places:
    """Offsets in shared memory, and its size in bytes."""

    a: int
    b: int
    p: int
    alive: int
    size: int


def places_of(spec: Spec, tile: Tile) -> Places:
    _, _, size = compute_of(spec)
    vector, dims, smem = 16 // size, (spec.head_dim, spec.head_dim_v), Smem()
    pitch = tile.slices(max(dims))[1] + vector
    a = smem.take(tile.lines * pitch * size, 16)
    b = smem.take(max(tile.columns * pitch, *(tile.slice_elements(dim, vector) for dim in dims)) * size, 16)
    p, alive = smem.take(tile.lines * tile.pitch_p * size, 16), smem.take(tile.columns * 4, 16)
    return Places(a, b, p, alive, smem.size)


def make_pairs(spec: Spec, tile: Tile, TRANSPOSED: bool, FOR_BIAS: bool = False, ADD_UP: Any = None) -> Any:
    """pairs(a, base, acc_s, acc_dp, pointers, corner, full, shared, thread, x, y): acc_s becomes P with dropout, acc_dp dS.

    pointers: Pointers at the tile's first row and key. corner: Corner. full: 1 if every row attends every key; the mask is then skipped.
    dS contains the softcap's derivative, as dq and dk need it, and the words `alive` are complete after the next barrier. FOR_BIAS it
    has neither, because dbias is dS itself. ADD_UP(a, ds, s, shared, batch, head, row, col): is called for each pair that is alive, with
    the dS of its score_mod's result and the score that the function is given.
    """
    places = places_of(spec, tile)
    A, B, P, ALIVE = places.a, places.b, places.p, places.alive
    LINES, COLUMNS, ROWS, COLS, HIGH, PITCH_P = tile.lines, tile.columns, tile.rows, tile.cols, tile.high, tile.pitch_p
    _, SLICE = tile.slices(max(spec.head_dim, spec.head_dim_v))
    SLICED = spec.head_dim > SLICE
    OUTER, INNER = (COLS, ROWS) if TRANSPOSED else (ROWS, COLS)      # of a thread: query rows, keys
    BY_ROW, BY_COL = (1, PITCH_P) if TRANSPOSED else (PITCH_P, 1)
    BLOCK_M, BLOCK_N = (COLUMNS, LINES) if TRANSPOSED else (LINES, COLUMNS)
    compute, REAL, SIZE = compute_of(spec)
    VECTOR, DROPOUT, INF, TRACED = 16 // SIZE, spec.dropout, REAL(math.inf), spec.score_mod is not None
    load_a, load_b = (make_load(spec, tile, n, SLICE, SLICE + VECTOR, False) for n in (LINES, COLUMNS))
    multiply = make_product(spec, tile, SLICE)
    load_real, get, put = load_if(compute, compute), load_shared(compute, 1), store_shared(compute)
    (row_bounds, _), (diagonal_of, _) = make_bounds(spec, BLOCK_N), make_diagonals(spec)
    _, score, visible = make_score(spec, True, not FOR_BIAS)
    RATED, ADDS = not FOR_BIAS or spec.score_mod is not None, ADD_UP is not None
    _, own_score, _ = make_own_score(spec)
    dropout = make_dropout(spec, BLOCK_M, BLOCK_N, BY_ROW, BY_COL, tile.threads)

    clear, move = make_sums(spec, tile)

    @inline
    def fill_keep(a, base, x, y):
        """Fill the tile of numbers with keep_scale; dropout then stores zeros in it."""
        if DROPOUT:
            for i in range(ROWS):
                for j in range(COLS):
                    put(int32(base + P + ((y + i * HIGH) * PITCH_P + x + j * WIDE) * SIZE), a.keep)

    @inline
    def products(a, base, acc_s, acc_dp, pointers, corner, thread, x, y):
        """S, then dP, in one loop, so that the code exists once. S is the sum of its slices' sums, as in the forward."""
        q, k, v, dout = pointers
        batch, head, row0, col0, seqlen_q, seqlen_k, _ = corner
        rows, keys = seqlen_q - row0, seqlen_k - col0
        if SLICED:
            clear(acc_s)
        for which in range(2):
            clear(acc_dp)
            m, m_row, m_dim = (q, a.q_row, a.q_dim) if which == 0 else (dout, a.dout_row, a.dout_dim)
            n, n_row, n_dim = (k, a.k_row, a.k_dim) if which == 0 else (v, a.v_row, a.v_dim)
            dims = a.head_dim if which == 0 else a.head_dim_v
            for dim0 in range(0, dims, SLICE):
                cuda.syncthreads()
                if which == 1 and dim0 == 0:
                    dropout(a, base + P, row0, col0, batch, head, thread)
                if TRANSPOSED:
                    load_a(base + A, n, n_row, n_dim, keys, dim0, dims, base, thread)
                    load_b(base + B, m, m_row, m_dim, rows, dim0, dims, base, thread)
                else:
                    load_a(base + A, m, m_row, m_dim, rows, dim0, dims, base, thread)
                    load_b(base + B, n, n_row, n_dim, keys, dim0, dims, base, thread)
                cuda.syncthreads()
                multiply(acc_dp, base + A, base + B, x, y, dims - dim0)
                if SLICED:
                    if which == 0:
                        move(acc_s, acc_dp)
            if which == 0:
                fill_keep(a, base, x, y)
                if not SLICED:
                    for i in range(ROWS):
                        for j in range(COLS):
                            acc_s[i, j] = acc_dp[i, j]

    @inline
    def kept(base, i, j, x, y):
        if DROPOUT:
            return get(int32(base + P + ((y + i * HIGH) * PITCH_P + x + j * WIDE) * SIZE))[0]
        else:
            return REAL(1)

    @inline
    def product_or_zero(ds, rate):
        """ds * rate; 0 where ds is 0, whatever the rate of a traced function is there."""
        if TRACED:
            product = REAL(0) if ds == REAL(0) else ds * rate
            return product
        else:
            return ds * rate

    @inline
    def not_above(s, lse):
        """s - lse, at most 0: only by rounding can s exceed lse. NaN stays NaN."""
        return REAL(0) if s > lse else s - lse

    @inline
    def pairs(a, base, acc_s, acc_dp, pointers, corner, full, shared, thread, x, y):
        if not FOR_BIAS and thread < COLUMNS:
            store_shared_b32(int32(base + ALIVE + thread * 4), int32(0))
        products(a, base, acc_s, acc_dp, pointers, corner, thread, x, y)
        batch, head, row0, col0, seqlen_q, seqlen_k, first = corner
        for r in range(OUTER):
            row = int32(row0 + x + r * WIDE) if TRANSPOSED else int32(row0 + y + r * HIGH)
            lse = load_real(uint64(int64(a.row_lse) + (first + row) * SIZE), int32(1))
            delta = load_real(uint64(int64(a.row_delta) + (first + row) * SIZE), int32(1))
            lo, hi = row_bounds(a, row, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k)
            for c in range(INNER):
                col = int32(col0 + y + c * HIGH) if TRANSPOSED else int32(col0 + x + c * WIDE)
                i, j = (c, r) if TRANSPOSED else (r, c)
                s, rate = score(a, acc_s[i, j], shared, batch, head, row, col, seqlen_q, seqlen_k)
                keep, p, ds = kept(base, i, j, x, y), REAL(0), REAL(0)
                if (full != 0 or visible(a, batch, head, row, col, seqlen_q, lo, hi)) and lse != INF:
                    p = math.exp(not_above(s, lse))
                    ds = p * (acc_dp[i, j] * keep - delta)
                    if ADDS:
                        given, _ = own_score(a, acc_s[i, j], shared[0], batch, head, row, col, seqlen_q, seqlen_k)
                        ADD_UP(a, ds, given, shared, batch, head, row, col)
                    if RATED:
                        ds = product_or_zero(ds, rate)
                    if not FOR_BIAS:
                        store_shared_b32(int32(base + ALIVE + (x + j * WIDE) * 4), int32(1))
                acc_s[i, j], acc_dp[i, j] = p * keep, ds
    return pairs


def make_put_tile(spec: Spec, tile: Tile) -> Any:
    """put_tile(base, acc, x, y): store registers to the tile of numbers in shared memory."""
    P, PITCH_P, HIGH, ROWS, COLS = places_of(spec, tile).p, tile.pitch_p, tile.high, tile.rows, tile.cols
    compute, _, SIZE = compute_of(spec)
    put = store_shared(compute)

    @inline
    def put_tile(base, acc, x, y):
        for i in range(ROWS):
            for j in range(COLS):
                put(int32(base + P + ((y + i * HIGH) * PITCH_P + x + j * WIDE) * SIZE), acc[i, j])
    return put_tile


def make_accumulate(spec: Spec, tile: Tile, DIM: int) -> Any:
    """accumulate(acc, base, pointer, by_row, by_dim, left, dims, thread, x, y): acc += T X.

    T is the tile of numbers. X are the `left` rows at `pointer` that belong to its columns, DIM wide, of which `dims` columns exist. Rows
    of columns that are not alive count as 0.
    """
    places, COLUMNS = places_of(spec, tile), tile.columns
    B, P, ALIVE, VECTOR = places.b, places.p, places.alive, 16 // compute_of(spec)[2]
    COUNT = tile.keys(DIM, VECTOR)
    load, multiply = make_load(spec, tile, COUNT, DIM, DIM, True), make_outer_product(spec, tile, DIM)

    @inline
    def accumulate(acc, base, pointer, by_row, by_dim, left, dims, thread, x, y):
        for n0 in range(0, COLUMNS, COUNT):
            cuda.syncthreads()
            load(base + B, pointer + n0 * by_row, by_row, by_dim, left - n0, 0, dims, base + ALIVE + n0 * 4, thread)
            cuda.syncthreads()
            multiply(acc, base + P, base + B, x, y, n0, left - n0)
    return accumulate
