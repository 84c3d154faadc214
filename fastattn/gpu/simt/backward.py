"""Backward with plain threads: any dtype, any head_dim, any strides, any architecture. The one to read first.

    P = exp(score(Q K^T) - lse)    dP = dO V^T    dS = P (dP - delta)           dQ = dS K    dK = dS^T Q    dV = P^T dO

Two kernels follow rows/preprocess.py. A block owns what it writes: nothing is added atomically, and every run gives the same bits. The
price is that both kernels compute P and dS:

    dq      a block owns a tile of query rows and loops over the blocks of keys that they attend: dQ += dS K
    dkdv    a block owns a tile of keys of a key head and loops over the query heads of its group and the blocks of query rows that
            attend the keys. Its tiles are transposed: lines are keys, so that dK += dS^T Q and dV += P^T dO have the form of dS K

    per step        pairs.py: P and dS in registers, operands in slices of head_dim
                    then P or dS through shared memory, times slices of rows with all columns of head_dim

dbias has its own kernel (dbias.py), and so has dsinks (rows/preprocess.py). Gradients of rows and keys that belong to no sequence, and
of keys past seqused_k, are 0.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, uint8

from ..dsl.inline import inline
from ..flex.bitmap import EMPTY, FULL, make_kind
from ..ptx.memory import shared_address
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.mask import make_bounds, make_diagonals, make_query_bounds
from ..tile.scalar import compute_of, make_score
from ..tile.schedule import make_key_row, make_num_tiles, make_tile_at
from .config import WIDE, Tile
from .pairs import Corner, Pointers, make_accumulate, make_pairs, make_put_tile
from .threads import make_store, row_address


# ---------------------------------------------------------------- dq
def make_dq(spec: Spec, tile: Tile) -> Any:
    """The kernel. One tile of `lines` query rows a block."""
    BLOCK_M, BLOCK_N, ROWS, COLS, OUTS, MASK = tile.lines, tile.columns, tile.rows, tile.cols, spec.head_dim // WIDE, spec.mask
    REAL = compute_of(spec)[1]
    pairs, put_tile, accumulate = make_pairs(spec, tile, False), make_put_tile(spec, tile), make_accumulate(spec, tile, spec.head_dim)
    store_rows, first_row = make_store(spec, tile, spec.head_dim), make_first_row(spec)
    (_, block_bounds), (diagonal_of, _) = make_bounds(spec, BLOCK_N), make_diagonals(spec)
    (prepare, _, _), kind_of = make_score(spec, True), make_kind(spec.mask_mod)
    tile_at, num_tiles, key_row = make_tile_at(spec, BLOCK_M), make_num_tiles(spec), make_key_row(BLOCK_N)

    @inline
    def step(a, base, acc_dq, pointers, corner, n_block, full, shared, thread, x, y):
        """dQ += dS K of one block of keys. The pointers of k and v are those of the sequence's first key."""
        q, k, v, dout = pointers
        batch, head, row0, _, seqlen_q, seqlen_k, first = corner
        col0 = int32(n_block * BLOCK_N)
        k, v = k + col0 * a.k_row, v + col0 * a.v_row
        acc_s, acc_dp = cuda.local.array((ROWS, COLS), REAL), cuda.local.array((ROWS, COLS), REAL)
        corner = Corner(batch, head, row0, col0, seqlen_q, seqlen_k, first)
        pairs(a, base, acc_s, acc_dp, Pointers(q, k, v, dout), corner, full, shared, thread, x, y)
        put_tile(base, acc_dp, x, y)
        accumulate(acc_dq, base, k, a.k_row, a.k_dim, seqlen_k - col0, a.head_dim, thread, x, y)

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
            dq = row_address(a.dq, a.dq_batch, a.dq_head, a.dq_row, batch, head, q_start + row0)
            k = row_address(a.k, a.k_batch, a.k_head, a.k_row, batch, head_k, first_key)
            v = row_address(a.v, a.v_batch, a.v_head, a.v_row, batch, head_k, first_key)
            shared, first = prepare(a, batch, head), first_row(a, batch, head, q_start)
            acc_dq = cuda.local.array((ROWS, OUTS), REAL)
            for i in range(ROWS):
                for c in range(OUTS):
                    acc_dq[i, c] = REAL(0)
            n_min, full_min, full_max, n_max = block_bounds(a, row0, last, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k)
            for n_block in range(n_min, n_max):
                kind = kind_of(a, batch, head, m_block, n_block)
                if kind != EMPTY:
                    full = int32(not MASK and kind == FULL and full_min <= n_block and n_block < full_max)
                    step(a, base, acc_dq, Pointers(q, k, v, dout), Corner(batch, head, row0, int32(0), seqlen_q, seqlen_k, first),
                         n_block, full, shared, thread, x, y)
            rows = int32(seqlen_q - row0)
            store_rows(acc_dq, a.scale, dq, a.dq_row, a.dq_dim, rows, rows, a.head_dim, x, y)
    return kernel


# ---------------------------------------------------------------- dk and dv
def make_dkdv(spec: Spec, tile: Tile, DK: bool, DV: bool) -> Any:
    """The kernel, for both or one of dk and dv. One tile of `lines` keys of a key head a block; columns are query rows."""
    BLOCK_N, BLOCK_M, ROWS, COLS, MASK = tile.lines, tile.columns, tile.rows, tile.cols, spec.mask
    OUTS, OUTS_V = spec.head_dim // WIDE, spec.head_dim_v // WIDE
    REAL = compute_of(spec)[1]
    pairs, put_tile = make_pairs(spec, tile, True), make_put_tile(spec, tile)
    accumulate_dk, accumulate_dv = make_accumulate(spec, tile, spec.head_dim), make_accumulate(spec, tile, spec.head_dim_v)
    store_dk, store_dv, first_row = make_store(spec, tile, spec.head_dim), make_store(spec, tile, spec.head_dim_v), make_first_row(spec)
    query_bounds, (diagonal_of, _) = make_query_bounds(spec, BLOCK_M), make_diagonals(spec)
    (prepare, _, _), kind_of = make_score(spec, True), make_kind(spec.mask_mod)
    tile_at, num_tiles = make_tile_at(spec, BLOCK_N, True), make_num_tiles(spec)

    @inline
    def step(a, base, acc_dk, acc_dv, pointers, corner, m_block, full, shared, thread, x, y):
        """dV += P^T dO and dK += dS^T Q of one block of query rows of one head. The pointers of q and dout are those of the sequence's
        first row."""
        q, k, v, dout = pointers
        batch, head, _, col0, seqlen_q, seqlen_k, first = corner
        row0 = int32(m_block * BLOCK_M)
        q, dout = q + row0 * a.q_row, dout + row0 * a.dout_row
        acc_s, acc_dp = cuda.local.array((ROWS, COLS), REAL), cuda.local.array((ROWS, COLS), REAL)
        corner = Corner(batch, head, row0, col0, seqlen_q, seqlen_k, first)
        pairs(a, base, acc_s, acc_dp, Pointers(q, k, v, dout), corner, full, shared, thread, x, y)
        if DV:
            put_tile(base, acc_s, x, y)
            accumulate_dv(acc_dv, base, dout, a.dout_row, a.dout_dim, seqlen_q - row0, a.head_dim_v, thread, x, y)
            cuda.syncthreads()
        if DK:
            put_tile(base, acc_dp, x, y)
            accumulate_dk(acc_dk, base, q, a.q_row, a.q_dim, seqlen_q - row0, a.head_dim, thread, x, y)

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
        t, thread = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        x, y = int32(thread % WIDE), int32(thread // WIDE)
        if t < num_tiles(a):
            tile_here = tile_at(a, t)
            n_block, head_k, batch, q_start, seqlen_q, _, seqlen_k, all_keys = tile_here
            col0 = int32(n_block * BLOCK_N)
            first_key = tile_here.k_start + col0        # int64; with the int32 of key_row the machine code would change
            k = row_address(a.k, a.k_batch, a.k_head, a.k_row, batch, head_k, first_key)
            v = row_address(a.v, a.v_batch, a.v_head, a.v_row, batch, head_k, first_key)
            acc_dk, acc_dv = cuda.local.array((ROWS, OUTS), REAL), cuda.local.array((ROWS, OUTS_V), REAL)
            for i in range(ROWS):
                for c in range(OUTS):
                    acc_dk[i, c] = REAL(0)
                for c in range(OUTS_V):
                    acc_dv[i, c] = REAL(0)
            if col0 < seqlen_k:
                last = min(col0 + BLOCK_N, seqlen_k)
                m_min, full_min, full_max, m_max = query_bounds(a, col0, last, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_q)
                for member in range(a.group):
                    head = int32(head_k * a.group + member)
                    q = row_address(a.q, a.q_batch, a.q_head, a.q_row, batch, head, q_start)
                    dout = row_address(a.dout, a.dout_batch, a.dout_head, a.dout_row, batch, head, q_start)
                    shared, first = prepare(a, batch, head), first_row(a, batch, head, q_start)
                    for m_block in range(m_min, m_max):
                        kind = kind_of(a, batch, head, n_block, m_block)
                        if kind != EMPTY:
                            full = int32(not MASK and kind == FULL and full_min <= m_block and m_block < full_max)
                            step(a, base, acc_dk, acc_dv, Pointers(q, k, v, dout), Corner(batch, head, int32(0), col0, seqlen_q,
                                 seqlen_k, first), m_block, full, shared, thread, x, y)
            if DK:
                dk = row_address(a.dk, a.dk_batch, a.dk_head, a.dk_row, batch, head_k, first_key)
                store_dk(acc_dk, a.scale, dk, a.dk_row, a.dk_dim, all_keys - col0, seqlen_k - col0, a.head_dim, x, y)
            if DV:
                dv = row_address(a.dv, a.dv_batch, a.dv_head, a.dv_row, batch, head_k, first_key)
                store_dv(acc_dv, REAL(1), dv, a.dv_row, a.dv_dim, all_keys - col0, seqlen_k - col0, a.head_dim_v, x, y)
    return kernel
