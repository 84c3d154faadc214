"""Score, softmax and dropout as arithmetic on one pair or one row, for kernels on plain threads.

The same formulas as reference.py, in units of natural log. scores.py and softmax.py have them for fragments of the tensor cores.
"""
from __future__ import annotations

import math
from typing import Any

from numba import cuda, float32, float64, int32, uint32, uint64

from ..dsl.inline import inline
from ..flex.pairs import make_pair_mods
from ..ptx.scalar import load_flag, load_if, rounded_product, store_shared
from ..spec import Spec
from .dropout import philox as philox_words
from .dropout import plane_of
from .mask import make_diagonals

WARP = 0xFFFFFFFF
philox = inline(philox_words)


def compute_of(spec: Spec) -> tuple[str, Any, int]:
    """(the dtype of the arithmetic, its Numba type, its size in bytes)."""
    return ("float64", float64, 8) if spec.dtype == "float64" else ("float32", float32, 4)


def make_score(spec: Spec, DERIVATIVE: bool = False, INNER: bool = True) -> tuple[Any, Any, Any]:
    """`make_own_score` with the Spec's score_mod and mask_mod.

    DERIVATIVE: `rate` is wanted. Without INNER it is that of the score_mod alone, the derivative by what the function is given.
    """
    own = make_own_score(spec)
    if not spec.traced:
        return own
    (prepare_own, score_own, visible_own), (prepare_mods, modify, sees) = own, make_pair_mods(spec, DERIVATIVE)

    @inline
    def prepare(a, batch, head):
        return prepare_own(a, batch, head), prepare_mods(a, batch, head)

    @inline
    def score(a, s, shared, batch, head, row, col, seqlen_q, seqlen_k):
        s, inner = score_own(a, s, shared[0], batch, head, row, col, seqlen_q, seqlen_k)
        s, rate = modify(a, s, shared[1], batch, head, row, col)
        if INNER:
            rate = rate * inner
        return s, rate

    @inline
    def visible(a, batch, head, row, col, seqlen_q, lo, hi):
        return visible_own(a, batch, head, row, col, seqlen_q, lo, hi) & sees(a, prepare_mods(a, batch, head), batch, head, row, col)
    return prepare, score, visible


def make_own_score(spec: Spec) -> tuple[Any, Any, Any]:
    """(prepare, score, visible) for one pair of a query row and a key column.

    shared = prepare(a, batch, head): what all rows of a head share (the ALiBi slope). Kernels only pass it on.
    s, rate = score(a, s, shared, batch, head, row, col, seqlen_q, seqlen_k): from a dot product to a score, and the derivative of the
    softcap, d score / d (softmax_scale * dot product)
    visible(a, batch, head, row, col, seqlen_q, lo, hi): True if no mask hides the pair; [lo, hi) is the row's interval of keys
    """
    SOFTCAP, ALIBI, BIAS, MASK = spec.softcap, spec.alibi is not None, spec.bias is not None, spec.mask
    compute, REAL, _ = compute_of(spec)
    load_slope, load_bias = load_if(spec.alibi or compute, compute), load_if(spec.bias or compute, compute)
    _, alibi_from = make_diagonals(spec)
    product = rounded_product(compute)      # rounded, like the maximum or lse that is subtracted from a score

    @inline
    def prepare(a, batch, head):
        if ALIBI:
            return load_slope(uint64(a.alibi + batch * a.alibi_batch + head * a.alibi_head), int32(1))
        else:
            return REAL(0)

    @inline
    def operand_has(a, row, col):
        """bias and mask end at max_seqlen_q and max_seqlen_k, which lengths on the device may exceed."""
        return (row < a.seqlen_q) & (col < a.seqlen_k)

    @inline
    def score(a, s, shared, batch, head, row, col, seqlen_q, seqlen_k):
        s, rate = product(s, a.scale), REAL(1)
        if SOFTCAP:
            tanh = math.tanh(s / a.cap)
            s, rate = product(a.cap, tanh), REAL(1) - tanh * tanh
        if ALIBI:       # from the mask's diagonal
            s = s - shared * REAL(int32(abs(int32(row + alibi_from(a, batch, seqlen_q, seqlen_k) - col))))
        if BIAS:
            address = uint64(a.bias + batch * a.bias_batch + head * a.bias_head + row * a.bias_row + col * a.bias_col)
            s = s + load_bias(address, int32((row < seqlen_q) & (col < seqlen_k) & operand_has(a, row, col)))
        return s, rate

    @inline
    def visible(a, batch, head, row, col, seqlen_q, lo, hi):
        inside = (lo <= col) & (col < hi) & (row < seqlen_q)
        if MASK:
            address = uint64(a.mask + batch * a.mask_batch + head * a.mask_head + row * a.mask_row + col * a.mask_col)
            return load_flag(address, int32(inside & operand_has(a, row, col))) != 0
        else:
            return inside

    return prepare, score, visible


def make_softmax(spec: Spec) -> tuple[Any, Any, Any]:
    """(max16, sum16, finish): reductions over the 16 threads that share a row, and the end of a row.

    scale, lse = finish(a, head, row_max, row_sum, unowned): the factor of the output row, 0 for a row that attends no key, and its lse.
    unowned: the row belongs to no sequence, so that it has no sink either.
    """
    SINKS, DROPOUT = spec.sinks is not None, spec.dropout
    compute, REAL, _ = compute_of(spec)
    NEG_INF = REAL(-math.inf)
    load_sink = load_if(spec.sinks or compute, compute)

    @inline
    def finite(x):
        return REAL(0) if x == NEG_INF else x

    @inline
    def max16(x):
        x = max(x, cuda.shfl_xor_sync(WARP, x, 8))
        x = max(x, cuda.shfl_xor_sync(WARP, x, 4))
        x = max(x, cuda.shfl_xor_sync(WARP, x, 2))
        return max(x, cuda.shfl_xor_sync(WARP, x, 1))

    @inline
    def sum16(x):
        x = x + cuda.shfl_xor_sync(WARP, x, 8)
        x = x + cuda.shfl_xor_sync(WARP, x, 4)
        x = x + cuda.shfl_xor_sync(WARP, x, 2)
        return x + cuda.shfl_xor_sync(WARP, x, 1)

    @inline
    def finish(a, head, row_max, row_sum, unowned):
        empty, factor = row_sum == REAL(0), REAL(1)
        if SINKS:
            sink = NEG_INF if unowned else load_sink(uint64(a.sinks + head * a.sinks_head), int32(1))
            new = max(row_max, sink)
            factor = math.exp(row_max - finite(new))
            row_sum = row_sum * factor + math.exp(sink - finite(new))
            row_max = new
        lse = NEG_INF if row_sum == REAL(0) else row_max + math.log(row_sum)
        if DROPOUT:
            factor = factor * a.keep
        return (REAL(0) if empty else factor / row_sum), lse

    return max16, sum16, finish


def make_dropout(spec: Spec, BLOCK_M: int, BLOCK_N: int, BY_ROW: int, BY_COL: int, THREADS: int) -> Any:
    """dropout(a, p, row0, col0, batch, head, thread): store zeros in the tile P at shared address p. Without dropout nothing is done.

    Query rows of P are BY_ROW elements apart, keys BY_COL. Each thread handles the eight elements of one Philox call (philox.py): rows r,
    r + 8 and columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of a 16 x 16 piece.
    """
    compute, REAL, SIZE = compute_of(spec)
    put = store_shared(compute)
    CALLS = BLOCK_M * BLOCK_N // 8

    if not spec.dropout:
        @inline
        def nothing(a, p, row0, col0, batch, head, thread):
            pass
        return nothing

    @inline
    def drop(address, word, threshold):
        if uint32(word << uint32(16)) < threshold:
            put(address, REAL(0))
        if word < threshold:
            put(int32(address + BY_COL * SIZE), REAL(0))

    @inline
    def dropout(a, p, row0, col0, batch, head, thread):
        plane = plane_of(a, batch, head)
        for call in range(thread, CALLS, THREADS):
            row, col = int32(call // (BLOCK_N // 4)), int32(call % (BLOCK_N // 4))      # of the Philox counter, inside the tile
            c0, c1 = uint32(8 * a.row16 + (row0 >> 1) + row), uint32(4 * a.column16 + (col0 >> 2) + col)
            w0, w1, w2, w3 = philox(c0, c1, plane, a.offset, a.seed_low, a.seed_high)
            at = int32(p + (((row >> 3) * 16 + (row & 7)) * BY_ROW + ((col >> 2) * 16 + (col & 3) * 2) * BY_COL) * SIZE)
            drop(at, w0, a.threshold)
            drop(int32(at + 8 * BY_COL * SIZE), w1, a.threshold)
            drop(int32(at + 8 * BY_ROW * SIZE), w2, a.threshold)
            drop(int32(at + 8 * (BY_ROW + BY_COL) * SIZE), w3, a.threshold)
    return dropout


__all__ = ["compute_of", "make_dropout", "make_score", "make_softmax"]
