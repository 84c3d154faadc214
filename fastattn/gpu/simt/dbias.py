"""dbias with plain threads, for every family: dS summed over the axes that the bias is broadcast over, always in the same order.

A block owns a tile of dbias, in registers. It loops over everything that the tile is broadcast over and recomputes dS (pairs.py):

    for each sequence, head, block of query rows, block of keys that shares the tile's elements:    acc += dS

If dbias has one row or one column, those of the tile are then summed through shared memory. Nothing is atomic, and there is no
workspace. Elements that no sequence of a packed problem reaches become 0.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import shared_address
from ..ptx.scalar import load_shared, store, store_shared
from ..ptx.sync import opaque
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.mask import make_bounds, make_diagonals
from ..tile.scalar import compute_of, make_score
from ..tile.schedule import make_sequence_at
from .config import WIDE, Tile
from .pairs import Corner, Pointers, make_pairs, make_put_tile, places_of
from .threads import row_address


def make_dbias(spec: Spec, tile: Tile, USED: bool) -> Any:
    """The kernel. One tile of dbias a block."""
    BLOCK_M, BLOCK_N, ROWS, COLS, PITCH_P = tile.lines, tile.columns, tile.rows, tile.cols, tile.pitch_p
    MASK = spec.mask or spec.mask_mod is not None
    PACKED, THREADS, P = spec.packed, tile.threads, places_of(spec, tile).p
    compute, REAL, SIZE = compute_of(spec)
    assert spec.dbias is not None
    get, put, store_element = load_shared(compute, 1), store_shared(compute), store(spec.dbias, compute)
    pairs, put_tile, first_row, sequence_at = make_pairs(spec, tile, False, True), make_put_tile(spec, tile), make_first_row(spec), \
        make_sequence_at(USED)
    (_, block_bounds), (diagonal_of, _) = make_bounds(spec, BLOCK_N), make_diagonals(spec)
    prepare, _, _ = make_score(spec, True, False)

    @inline
    def sequence(a, batch):
        if PACKED:
            return sequence_at(a, batch)
        else:
            return int32(0), a.seqlen_q, int32(0), a.seqlen_k, a.seqlen_k

    @inline
    def part_of(length, n, own):
        """Indices [begin, end) of an axis that contribute to a tile: all of them if dbias has length 1 there, else the tile's own `n`."""
        return (int32(0), int32(length)) if own == 1 else (int32(n), int32(min(n + 1, length)))

    @inline
    def add_head(a, base, acc, batch, head, where, mine, thread, x, y):
        """dS of one head of one sequence."""
        q_start, seqlen_q, k_start, seqlen_k = where
        m_tile, n_tile = mine
        head_k = int32(head // a.group)
        q = row_address(a.q, a.q_batch, a.q_head, a.q_row, batch, head, q_start)
        dout = row_address(a.dout, a.dout_batch, a.dout_head, a.dout_row, batch, head, q_start)
        k = row_address(a.k, a.k_batch, a.k_head, a.k_row, batch, head_k, k_start)
        v = row_address(a.v, a.v_batch, a.v_head, a.v_row, batch, head_k, k_start)
        shared, first = prepare(a, batch, head), first_row(a, batch, head, q_start)
        acc_s, acc_dp = cuda.local.array((ROWS, COLS), REAL), cuda.local.array((ROWS, COLS), REAL)
        m_begin, m_end = part_of(divide(int32(seqlen_q + BLOCK_M - 1), BLOCK_M), m_tile, a.bias_rows)
        n_begin, n_end = part_of(divide(int32(seqlen_k + BLOCK_N - 1), BLOCK_N), n_tile, a.bias_cols)
        for m_block in range(m_begin, m_end):
            row0 = int32(m_block * BLOCK_M)
            last = min(row0 + BLOCK_M, seqlen_q)
            n_min, full_min, full_max, n_max = block_bounds(a, row0, last, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k)
            for n_block in range(max(n_min, n_begin), min(n_max, n_end)):
                col0 = int32(n_block * BLOCK_N)
                full = int32(not MASK and full_min <= n_block and n_block < full_max)
                pointers = Pointers(q + row0 * a.q_row, k + col0 * a.k_row, v + col0 * a.v_row, dout + row0 * a.dout_row)
                corner = Corner(batch, head, row0, col0, seqlen_q, seqlen_k, first)
                pairs(a, base, acc_s, acc_dp, pointers, corner, full, shared, thread, x, y)
                for i in range(ROWS):
                    for j in range(COLS):
                        acc[i, j] += acc_dp[i, j]

    @inline
    def number(base, line, column):
        return int32(base + P + (line * PITCH_P + column) * SIZE)

    @inline
    def add_up(a, base, thread):
        """Sum the tile of numbers: lines into the first if dbias has one row, columns into the first if it has one column."""
        if a.bias_rows == 1:
            if thread < BLOCK_N:
                total = REAL(0)
                for line in range(BLOCK_M):
                    total += get(number(base, line, thread))[0]
                put(number(base, 0, thread), total)
            cuda.syncthreads()
        if a.bias_cols == 1:
            if thread < BLOCK_M:
                total = REAL(0)
                for column in range(BLOCK_N):
                    total += get(number(base, thread, column))[0]
                put(number(base, thread, 0), total)
            cuda.syncthreads()

    @inline
    def store_tile(a, base, batch, head, row0, col0, thread):
        pointer = int64(a.dbias) + batch * a.dbias_by_batch + head * a.dbias_by_head
        for n in range(thread, BLOCK_M * BLOCK_N, THREADS):
            line, column = int32(n // BLOCK_N), int32(n % BLOCK_N)
            row, col = int32(row0 + line), int32(col0 + column)
            if row < a.bias_rows and col < a.bias_cols:
                store_element(uint64(pointer + row * a.dbias_by_row + col * a.dbias_by_col), get(number(base, line, column))[0])

    @inline
    def own_tile(a):
        """This block's (batch, head, block of rows, block of columns) of dbias. Opaque: a second call recomputes them."""
        t, rows, cols = opaque(int32(cuda.blockIdx.x)), opaque(a.bias_rows), opaque(a.bias_cols)
        n_tiles, m_tiles = divide(int32(cols + BLOCK_N - 1), BLOCK_N), divide(int32(rows + BLOCK_M - 1), BLOCK_M)
        rest = divide(t, n_tiles)
        plane = divide(rest, m_tiles)
        batch = divide(plane, a.heads)
        return batch, int32(plane - batch * a.heads), int32(rest - plane * m_tiles), int32(t - rest * n_tiles)

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
        thread = int32(cuda.threadIdx.x)
        x, y = int32(thread % WIDE), int32(thread // WIDE)
        bias_batch, bias_head, m_tile, n_tile = own_tile(a)
        acc = cuda.local.array((ROWS, COLS), REAL)
        for i in range(ROWS):
            for j in range(COLS):
                acc[i, j] = REAL(0)
        batch_begin, batch_end = part_of(a.batch, bias_batch, a.batches)
        head_begin, head_end = part_of(a.num_heads, bias_head, a.heads)
        for batch in range(batch_begin, batch_end):
            q_start, seqlen_q, k_start, seqlen_k, _ = sequence(a, batch)
            for head in range(head_begin, head_end):
                add_head(a, base, acc, int32(batch), int32(head), (q_start, seqlen_q, k_start, seqlen_k), (m_tile, n_tile), thread, x, y)
        cuda.syncthreads()
        put_tile(base, acc, x, y)
        cuda.syncthreads()
        add_up(a, base, thread)
        bias_batch, bias_head, m_tile, n_tile = own_tile(a)      # recomputed: during the loop they need no registers
        store_tile(a, base, bias_batch, bias_head, int32(m_tile * BLOCK_M), int32(n_tile * BLOCK_N), thread)
    return kernel
