"""Forward with plain threads: any dtype, any head_dim, any strides, any architecture. The kernel to read first.

A block computes one tile of query rows of one head. Its threads form a grid, 16 wide; thread (x, y) owns rows y, y + HIGH, ... and
keys x, x + 16, ... of S, and the same rows and every 16th column (or pair or four of columns) of O, all in its registers:

                 keys x, x + 16, ..                  columns of head_dim_v
               +--------------------+              +--------------------+
    rows y,    |  S = Q K^T         |   softmax    |  O += P V          |
    y + HIGH   |  acc_s[ROWS, COLS] |  ---> P ---> |  acc_o[ROWS, OUTS] |
               +--------------------+              +--------------------+

    shared memory   Q slice | K slice, then V slice | P | alive: for each key of the block, whether a row of the tile attends it

Numbers are float32, or float64 for float64 arrays (threads.py). A slice of K has all keys of a block and some columns of head_dim. A
slice of V has some keys and all columns of head_dim_v. So slices fit shared memory, whatever head_dim is. All threads copy, wait for
each other, compute, and wait for each other. The next rungs of the ladder hide the latency that is exposed here.

The 16 threads of a row are half a warp and exchange maxima and sums by shuffles. Memory past the end is never read. A masked pair gets
the score -inf. A key that no row of the tile attends counts as V = 0, so that what it holds, NaN included, does not matter.
"""
from __future__ import annotations

import math
from typing import Any

from numba import cuda, int32, int64, uint8, uint64

from ..dsl.inline import inline
from ..flex.bitmap import EMPTY, FULL, make_kind
from ..ptx.memory import shared_address, store_shared_b32
from ..ptx.scalar import store, store_shared
from ..spec import Spec
from ..tile.mask import make_bounds, make_diagonals
from ..tile.scalar import compute_of, make_dropout, make_score, make_softmax
from ..tile.schedule import UNOWNED, make_key_row, make_num_tiles, make_tile_at, make_unowned
from ..tile.smem import Smem
from .config import WIDE, SimtConfig, Tile
from .threads import make_column, make_load, make_outer_product, make_product, make_sums, row_address


def make_forward(spec: Spec, config: SimtConfig) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    BLOCK_M, BLOCK_N, THREADS = config.block_m, config.block_n, config.threads
    tile = Tile(BLOCK_M, BLOCK_N, config.slice_dim, THREADS, config.loads)
    HEAD_DIM_V, HIGH = spec.head_dim_v, tile.high
    ROWS, COLS, OUTS = tile.rows, tile.cols, HEAD_DIM_V // WIDE                 # a thread's share
    compute, REAL, SIZE = compute_of(spec)
    VECTOR = 16 // SIZE                                                         # elements of a 16-byte load
    SLICES, SLICE = tile.slices(spec.head_dim)
    KEYS = tile.keys(HEAD_DIM_V, VECTOR)                                        # of a slice of V
    PITCH, PITCH_P = SLICE + VECTOR, tile.pitch_p
    smem = Smem()
    Q = smem.take(BLOCK_M * PITCH * SIZE, 16)
    KV = smem.take(max(BLOCK_N * PITCH, tile.slice_elements(HEAD_DIM_V, VECTOR)) * SIZE, 16)
    P = smem.take(BLOCK_M * PITCH_P * SIZE, 16)
    ALIVE = smem.take(BLOCK_N * 4, 16)
    PACKED, LSE, MASK, NEG_INF = spec.packed, spec.lse, spec.mask, REAL(-math.inf)
    store_element, store_lse, put = store(spec.out_dtype or spec.dtype, compute), store(compute, compute), store_shared(compute)
    load_q, load_k = make_load(spec, tile, BLOCK_M, SLICE, PITCH, False), make_load(spec, tile, BLOCK_N, SLICE, PITCH, False)
    load_v = make_load(spec, tile, KEYS, HEAD_DIM_V, HEAD_DIM_V, True)
    multiply_qk, multiply_pv = make_product(spec, tile, SLICE), make_outer_product(spec, tile, HEAD_DIM_V)
    column, (clear, move) = make_column(spec, HEAD_DIM_V), make_sums(spec, tile)
    (row_bounds, block_bounds), (diagonal_of, _) = make_bounds(spec, BLOCK_N), make_diagonals(spec)
    prepare, score, visible = make_score(spec)
    max16, sum16, finish = make_softmax(spec)
    dropout = make_dropout(spec, BLOCK_M, BLOCK_N, PITCH_P, 1, THREADS)
    kind_of = make_kind(spec.mask_mod)
    tile_at, num_tiles, unowned, key_row = make_tile_at(spec, BLOCK_M), make_num_tiles(spec), make_unowned(spec), make_key_row(BLOCK_N)

    # ------------------------------------------------------------ the loop body
    @inline
    def softmax(acc_s, acc_o, row_max, row_sum, base, x, y):
        """Scores become probabilities, in shared memory. Sums and outputs so far are rescaled to the new maximum."""
        for i in range(ROWS):
            new = row_max[i]
            for j in range(COLS):
                new = max(new, acc_s[i, j])
            new = max16(new)
            top = REAL(0) if new == NEG_INF else new        # no key attended so far: exp(-inf - 0) = 0
            alpha, total = math.exp(row_max[i] - top), REAL(0)
            for j in range(COLS):
                p = math.exp(acc_s[i, j] - top)
                total += p
                put(int32(base + P + ((y + i * HIGH) * PITCH_P + x + j * WIDE) * SIZE), p)
            row_max[i] = new
            row_sum[i] = row_sum[i] * alpha + total
            for c in range(OUTS):
                acc_o[i, c] *= alpha

    @inline
    def step(a, base, acc_o, row_max, row_sum, pointer_q, pointer_k, pointer_v, n_block, full, thread, x, y, shared, batch, head, row0,
             seqlen_q, seqlen_k):
        """S = Q K^T, score, mask, softmax and O += P V for one block of keys.

        One piece of code for masked and full blocks: if `full` is 1, every row attends every key, and the mask is skipped.
        """
        col0 = int32(n_block * BLOCK_N)
        acc_s = cuda.local.array((ROWS, COLS), REAL)
        clear(acc_s)
        if SLICES > 1:
            part = cuda.local.array((ROWS, COLS), REAL)
            clear(part)
        if thread < BLOCK_N:
            store_shared_b32(int32(base + ALIVE + thread * 4), full)
        for s in range(SLICES):             # S = Q K^T
            cuda.syncthreads()
            if SLICES > 1:
                load_q(base + Q, pointer_q, a.q_row, a.q_dim, seqlen_q - row0, s * SLICE, a.head_dim, base, thread)
            load_k(base + KV, pointer_k + col0 * a.k_row, a.k_row, a.k_dim, seqlen_k - col0, s * SLICE, a.head_dim, base, thread)
            cuda.syncthreads()
            if SLICES > 1:
                multiply_qk(part, base + Q, base + KV, x, y, a.head_dim - s * SLICE)
                move(acc_s, part)
            else:
                multiply_qk(acc_s, base + Q, base + KV, x, y, a.head_dim - s * SLICE)
        for i in range(ROWS):               # score and mask
            row = int32(row0 + y + i * HIGH)
            lo, hi = row_bounds(a, row, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k)
            for j in range(COLS):
                col = int32(col0 + x + j * WIDE)
                s, _ = score(a, acc_s[i, j], shared, batch, head, row, col, seqlen_q, seqlen_k)
                if full == 0:
                    if visible(a, batch, head, row, col, seqlen_q, lo, hi):
                        store_shared_b32(int32(base + ALIVE + (x + j * WIDE) * 4), int32(1))
                    else:
                        s = NEG_INF
                acc_s[i, j] = s
        softmax(acc_s, acc_o, row_max, row_sum, base, x, y)
        for key0 in range(0, BLOCK_N, KEYS):        # O += P V
            cuda.syncthreads()
            if key0 == 0:
                dropout(a, base + P, row0, col0, batch, head, thread)
            load_v(base + KV, pointer_v + (col0 + key0) * a.v_row, a.v_row, a.v_dim, seqlen_k - col0 - key0, 0, a.head_dim_v,
                   base + ALIVE + key0 * 4, thread)
            cuda.syncthreads()
            multiply_pv(acc_o, base + P, base + KV, x, y, key0, seqlen_k - col0 - key0)

    @inline
    def epilogue(a, acc_o, row_max, row_sum, no_sequence, x, y, batch, head, q_start, row0, seqlen_q):
        pointer = row_address(a.out, a.out_batch, a.out_head, a.out_row, batch, head, q_start)
        for i in range(ROWS):
            row = int32(row0 + y + i * HIGH)
            scale, lse = finish(a, head, row_max[i], sum16(row_sum[i]), no_sequence)
            if row < seqlen_q:
                for c in range(OUTS):
                    col = column(c, x)
                    # a select, not a product: 0 * NaN, of a V that other rows attend, is NaN
                    out = acc_o[i, c] * scale if scale != REAL(0) else REAL(0)
                    if col < a.head_dim_v:
                        store_element(uint64(pointer + row * a.out_row + col * a.out_dim), out)
                if LSE and x == 0:
                    at = head * a.total_q + q_start if PACKED else (batch * a.num_heads + head) * int64(a.seqlen_q)
                    store_lse(uint64(int64(a.lse) + (at + row) * SIZE), lse)

    def kernel(a):
        base = int32((shared_address(cuda.shared.array(0, uint8)) + 15) & -16)
        t, thread = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        x, y = int32(thread % WIDE), int32(thread // WIDE)
        if t < num_tiles(a):
            tile_here = tile_at(a, t)
            m_block, head, batch, q_start, seqlen_q, _, seqlen_k = tile_here
            row0, first_key = int32(m_block * BLOCK_M), key_row(a, tile_here.k_start, 0)
            last = min(row0 + BLOCK_M, seqlen_q)
            head_k = int32(head // a.group)
            pointer_q = row_address(a.q, a.q_batch, a.q_head, a.q_row, batch, head, q_start + row0)
            pointer_k = row_address(a.k, a.k_batch, a.k_head, a.k_row, batch, head_k, first_key)      # steps count blocks from it
            pointer_v = row_address(a.v, a.v_batch, a.v_head, a.v_row, batch, head_k, first_key)
            shared = prepare(a, batch, head)
            acc_o, row_max, row_sum = cuda.local.array((ROWS, OUTS), REAL), cuda.local.array(ROWS, REAL), cuda.local.array(ROWS, REAL)
            for i in range(ROWS):
                row_max[i], row_sum[i] = NEG_INF, REAL(0)
                for c in range(OUTS):
                    acc_o[i, c] = REAL(0)
            if SLICES == 1:
                load_q(base + Q, pointer_q, a.q_row, a.q_dim, seqlen_q - row0, 0, a.head_dim, base, thread)
            n_min, full_min, full_max, n_max = block_bounds(a, row0, last, diagonal_of(a, batch, seqlen_q, seqlen_k), seqlen_k)
            for n_block in range(n_max - 1, n_min - 1, -1):
                kind = kind_of(a, batch, head, m_block, n_block)
                if kind != EMPTY:
                    full = int32(not MASK and kind == FULL and full_min <= n_block and n_block < full_max)
                    step(a, base, acc_o, row_max, row_sum, pointer_q, pointer_k, pointer_v, n_block, full, thread, x, y, shared, batch,
                         head, row0, seqlen_q, seqlen_k)
            epilogue(a, acc_o, row_max, row_sum, unowned(a, t) == UNOWNED, x, y, batch, head, q_start, row0, seqlen_q)

    return kernel, smem.size
