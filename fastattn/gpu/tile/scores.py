"""From dot products to scores: softmax_scale, softcap, ALiBi, bias and the boolean mask, each compiled only if the Spec has it.

Scores are in units of natural log, so that a bias of the most negative finite number stays finite. softmax.py changes to exponents of 2.
"""
from __future__ import annotations

from typing import Any

from numba import float32, int32, uint64

from ..dsl.inline import inline
from ..ptx.arith import exp2, reciprocal
from ..ptx.memory import load_scalar
from ..spec import LOG2E, Spec
from .fragments import (
    add,
    bits_of,
    elementwise,
    join,
    keep_bits,
    keep_nonzero,
    make_gather,
    make_gather_pairs,
    make_gather_whole,
    make_pack,
    make_unpack,
    make_unpack_whole,
    pairs_of,
    scale_add,
)

_LOG2E = float32(LOG2E)


@inline
def cap_scale(a):
    """Factor from a dot product to 2 * score / softcap in units of log2: the exponent in tanh."""
    return float32(2) * _LOG2E * (a.softmax_scale / a.softcap)


def make_score(spec: Spec, COUNT: int, TRANSPOSED: bool = False, CAPPED: bool = False, SQUEEZE: int = 0) -> tuple[Any, Any, Any]:
    """(prepare, fetch, score) for fragments of COUNT registers.

    shared = prepare(a, batch, head): what all rows of a head share (the ALiBi slope). Kernels only pass it on.
    early = fetch(a, batch, head, row, col, seqlen_q, seqlen_k): bias and mask elements, loaded while the MMAs of S run
    acc_s = score(a, acc_s, early, shared, row, col, corner): corner = seqlen_k - seqlen_q, the key of row 0 on the bottom-right diagonal

    `row` and `col` are the thread's first query and key. TRANSPOSED: rows of the fragment are keys, its columns queries. TRANSPOSED or
    CAPPED, for the backward: with a softcap, acc_s is the tanh from `cap_of`, not the dot products. SQUEEZE: elements of bias and mask
    are packed as they arrive, in so many pieces of the fragment, to save registers.
    """
    PACKED = spec.packed
    SCALED, SOFTCAP, ALIBI, BIAS, MASK = spec.scaled, spec.softcap, spec.alibi is not None, spec.bias is not None, spec.mask
    CAPPED = SOFTCAP and (TRANSPOSED or CAPPED)
    PAIRS = spec.bias_pairs and not TRANSPOSED
    bias_tile, bias_float = _score_tile(spec.bias or "float32", COUNT, PAIRS, spec.bias_whole and PAIRS and COUNT % 16 == 0)
    if SQUEEZE and not PAIRS and spec.bias in ("float16", "bfloat16"):
        bias_tile, bias_float = _squeezed_tile(spec.bias, COUNT, SQUEEZE, pairs_of), _score_tile(spec.bias, COUNT, pairs=True)[1]
    mask_tile = _squeezed_tile("bool", COUNT, SQUEEZE, bits_of) if SQUEEZE else _score_tile("bool", COUNT)[0]
    keep_mask = keep_bits if SQUEEZE else keep_nonzero
    load_slope = load_scalar(spec.alibi or "float32")
    fetch_bias, fetch_mask = _make_fetch(bias_tile, TRANSPOSED), _make_fetch(mask_tile, TRANSPOSED)

    def element(s, row, col, scale, cap, shared):
        s = s * (cap if CAPPED else scale)
        if SOFTCAP and not CAPPED:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1); scale is cap_scale
            s = cap * (float32(1) - float32(2) * reciprocal(exp2(s) + float32(1)))
        if ALIBI:
            s = s - shared * float32(int32(abs(int32(row - col))))
        return s
    scale_elements = elementwise(element)

    @inline
    def prepare(a, batch, head):
        if ALIBI:
            return load_slope(uint64(a.alibi + batch * a.alibi_batch + head * a.alibi_head))
        else:
            return float32(0)

    @inline
    def bias_of(a, batch, head, row, col, seqlen_q, seqlen_k):
        if BIAS:
            return fetch_bias(a.bias, a.bias_batch, a.bias_head, a.bias_row, a.bias_col, batch, head, row, col, seqlen_q, seqlen_k)
        else:
            return int32(0)

    @inline
    def mask_of(a, batch, head, row, col, seqlen_q, seqlen_k):
        if MASK:
            return fetch_mask(a.mask, a.mask_batch, a.mask_head, a.mask_row, a.mask_col, batch, head, row, col, seqlen_q, seqlen_k)
        else:
            return int32(0)

    @inline
    def fetch(a, batch, head, row, col, seqlen_q, seqlen_k):
        if PACKED:      # bias and mask end at max_seqlen_q and max_seqlen_k, which lengths on the device may exceed
            seqlen_q, seqlen_k = int32(min(seqlen_q, a.seqlen_q)), int32(min(seqlen_k, a.seqlen_k))
        if SQUEEZE:         # the mask first: once packed, it leaves its registers to the bias
            mask = mask_of(a, batch, head, row, col, seqlen_q, seqlen_k)
            return bias_of(a, batch, head, row, col, seqlen_q, seqlen_k), mask
        else:
            return bias_of(a, batch, head, row, col, seqlen_q, seqlen_k), mask_of(a, batch, head, row, col, seqlen_q, seqlen_k)

    @inline
    def score(a, acc_s, early, shared, row, col, corner):
        if SCALED:
            diagonal = int32(0) if a.top_left != 0 else corner      # ALiBi counts from the mask's diagonal, see diagonal_of
            scale, cap = a.softmax_scale, float32(0)
            if SOFTCAP:
                scale, cap = cap_scale(a), a.softcap
            if BIAS and not SOFTCAP and not ALIBI:
                acc_s = scale_add(acc_s, scale, bias_float(early[0], col))
            elif TRANSPOSED:
                acc_s = scale_elements(acc_s, col, int32(row + diagonal), (scale, cap, shared))      # |row - col| is the same
            else:
                acc_s = scale_elements(acc_s, int32(row + diagonal), col, (scale, cap, shared))
        if BIAS and (SOFTCAP or ALIBI):
            acc_s = add(acc_s, bias_float(early[0], col))
        if MASK:
            acc_s = keep_mask(acc_s, early[1])
        return acc_s

    return prepare, fetch, score


def make_cap_of(spec: Spec) -> Any:
    """acc_s, slope = cap_of(a, acc_s): tanh(softmax_scale * dot product / softcap), and its derivative, 1 - tanh**2, in 16 bits."""
    to_half = make_pack("float16")

    def fall(s, row, col, scale):       # 1 - tanh(x) = 2 / (exp(2 x) + 1), exact where tanh is near 1
        return float32(2) * reciprocal(exp2(s * scale) + float32(1))

    def slope_of(r, row, col):
        return r * (float32(2) - r)

    def tanh_of(r, row, col):
        return float32(1) - r
    falls, slopes, tanhs = elementwise(fall), elementwise(slope_of), elementwise(tanh_of)

    @inline
    def cap_of(a, acc_s):
        acc_r = falls(acc_s, int32(0), int32(0), (cap_scale(a),))
        return tanhs(acc_r, int32(0), int32(0), ()), to_half(slopes(acc_r, int32(0), int32(0), ()))
    return cap_of


def _score_tile(dtype: str, COUNT: int, pairs: bool = False, whole: bool = False) -> tuple[Any, Any]:
    """(tile, to_float): load the thread's elements of a (batch, head, row, column) operand; convert them to a float32 fragment."""
    gather = make_gather_whole() if whole else make_gather_pairs() if pairs else make_gather(dtype)
    unpack, unpack_whole = make_unpack(dtype, pairs), make_unpack_whole(dtype)

    @inline
    def tile(pointer, by_batch, by_head, by_row, by_col, batch, head, row, col, seqlen_q, seqlen_k):
        row0 = uint64(pointer + batch * by_batch + head * by_head + row * by_row + col * by_col)
        row1 = uint64(row0 + uint64(8 * by_row))
        limit0 = int32(seqlen_k - col) if row < seqlen_q else int32(0)
        limit1 = int32(seqlen_k - col) if row + 8 < seqlen_q else int32(0)
        if whole:
            return gather(row0, row1, limit0, limit1, col, COUNT)
        elif pairs:
            return gather(row0, row1, limit0, limit1, COUNT)
        else:
            return gather(row0, row1, by_col, limit0, limit1, COUNT)

    @inline
    def to_float(tile, col):
        if whole:
            return unpack_whole(tile, col)
        else:
            return unpack(tile)
    return tile, to_float


def _make_fetch(tile: Any, TRANSPOSED: bool) -> Any:
    """`tile` for a fragment of queries by keys, or TRANSPOSED of keys by queries."""
    @inline
    def fetch(pointer, by_batch, by_head, by_row, by_col, batch, head, row, col, seqlen_q, seqlen_k):
        if TRANSPOSED:
            return tile(pointer, by_batch, by_head, by_col, by_row, batch, head, col, row, seqlen_k, seqlen_q)
        else:
            return tile(pointer, by_batch, by_head, by_row, by_col, batch, head, row, col, seqlen_q, seqlen_k)
    return fetch


def _squeezed_tile(dtype: str, COUNT: int, PIECES: int, squeeze: Any) -> Any:
    """`tile` of _score_tile in PIECES pieces. Each is packed by `squeeze`, pairs_of or bits_of, before the next one needs registers."""
    load, _ = _score_tile(dtype, COUNT // PIECES)

    @inline
    def tile(pointer, by_batch, by_head, by_row, by_col, batch, head, row, col, seqlen_q, seqlen_k):
        first = squeeze(load(pointer, by_batch, by_head, by_row, by_col, batch, head, row, col, seqlen_q, seqlen_k))
        if PIECES == 1:
            return first
        else:
            other = load(pointer, by_batch, by_head, by_row, by_col, batch, head, row, int32(col + COUNT), seqlen_q, seqlen_k)
            return join(first, squeeze(other))
    assert PIECES in (1, 2) and COUNT <= 32 * PIECES
    return tile
