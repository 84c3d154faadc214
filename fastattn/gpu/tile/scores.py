"""From dot products to scores: softmax_scale, softcap, ALiBi, bias and the boolean mask, each compiled only if the Spec has it.

Scores are in units of natural log, so that a bias of the most negative finite number stays finite. softmax.py changes to exponents of 2.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from numba import float32, int32, uint64

from ..dsl.inline import inline
from ..flex.derived import is_rated
from ..ptx.arith import exp2, reciprocal
from ..ptx.memory import load_scalar
from ..ptx.sync import any_lane
from ..spec import LOG2E, WIDE_CAP, Spec
from .bits import keep_words
from .fragments import (
    add,
    elementwise,
    join,
    make_gather,
    make_gather_pairs,
    make_gather_whole,
    make_pack,
    make_unpack,
    make_unpack_whole,
    pairs_of,
    scale_add,
)
from .traced import make_fragment_mod, make_rated_mod
from .words import make_word_tile

_LOG2E = float32(LOG2E)

# A capped score is softcap * tanh(x), x = softmax_scale * dot product / softcap. With u = 2 x log2(e), exp2(u) = exp(2 x):
#     1 - tanh(x) = 2 / (exp(2 x) + 1)        exact where tanh is near 1; near 0, tanh is off by half a unit in the last place of 1
#     tanh(x) / x = 1 + u**2 p(u**2)          for |x| < 0.55, to 4e-8
# Up to a softcap of 64 (WIDE_CAP) the error of the first line does not matter. Above it, the second line is used where it holds, for nine
# more instructions. A kernel that has only one of the two (Spec.cap) overlaps these exponentials with MMAs; around a branch it does not.
_NEAR = float32(0.55 * 2 * LOG2E)
_P0, _P1, _P2, _P3 = (float32(c) for c in (-4.003730044e-2, 1.921838033e-3, -9.129619866e-5, 3.425789373e-6))


@inline
def cap_scale(a):
    """Factor from a dot product to u: 2 * score / softcap in units of log2, the exponent in tanh."""
    return float32(2) * _LOG2E * (a.softmax_scale / a.softcap)


def capped(s, row, col, scale, cap):
    """cap * tanh(x) of a dot product, for a cap of 64 at most."""
    return cap - float32(2) * cap * reciprocal(exp2(s * scale) + float32(1))


def capped_wide(s, row, col, scale, cap, softmax_scale):
    """`capped` for any cap."""
    u, x = s * scale, s * softmax_scale
    v = u * u
    near = x + x * (v * (_P0 + v * (_P1 + v * (_P2 + v * _P3))))
    far = float32(0.5) * cap - cap * reciprocal(exp2(u) + float32(1))       # computed as two halves: 2 * cap could overflow
    return near if abs(u) < _NEAR else far + far


@inline
def is_wide(a):
    return a.softcap > float32(WIDE_CAP)


def make_score(spec: Spec, COUNT: int, TRANSPOSED: bool = False, CAPPED: bool = False, SQUEEZE: int = 0,
               READ_BIAS: Any = None) -> tuple[Any, Any, Any]:
    """`make_own_score` with the Spec's score_mod: softcap, ALiBi and bias come before it, the boolean mask after it."""
    own = make_own_score(spec, COUNT, TRANSPOSED, CAPPED, SQUEEZE, READ_BIAS)
    if spec.score_mod is None:
        return own
    raw = not (spec.softcap or spec.alibi or spec.bias)
    before, after = replace(spec, mask=False), replace(spec, scaled=False, softcap=False, alibi=None, bias=None)
    (prepare_own, fetch, _), (_, _, score_own) = own, make_own_score(before, COUNT, TRANSPOSED, CAPPED, SQUEEZE, READ_BIAS)
    (_, _, mask_own), (prepare_mod, modify) = make_own_score(after, COUNT, TRANSPOSED), make_fragment_mod(spec, raw, TRANSPOSED)

    @inline
    def prepare(a, batch, head):
        return prepare_own(a, batch, head), prepare_mod(a, batch, head), batch, head

    @inline
    def score(a, acc_s, early, shared, row, col, corner):
        own_shared, tile, batch, head = shared
        if not raw:
            acc_s = score_own(a, acc_s, early, own_shared, row, col, corner)
        acc_s = modify(acc_s, a, tile, batch, head, row, col)
        return mask_own(a, acc_s, early, own_shared, row, col, corner)
    return prepare, fetch, score


def make_rated_score(spec: Spec, COUNT: int) -> tuple[Any, Any, Any]:
    """`make_score` TRANSPOSED, for a score_mod whose derivative is not 1: acc_s, rate = score(...), which make_slopes converts back."""
    assert spec.score_mod is not None and not spec.softcap
    raw = not (spec.alibi or spec.bias)
    before, after = replace(spec, mask=False, score_mod=None), replace(spec, scaled=False, alibi=None, bias=None, score_mod=None)
    (prepare_own, fetch, _), (_, _, score_own) = (make_own_score(s, COUNT, True) for s in (spec, before))
    (_, _, mask_own), (prepare_mod, modify) = make_own_score(after, COUNT, True), make_rated_mod(spec, raw)

    @inline
    def prepare(a, batch, head):
        return prepare_own(a, batch, head), prepare_mod(a, batch, head), batch, head

    @inline
    def score(a, acc_s, early, shared, row, col, corner):
        own_shared, tile, batch, head = shared
        if not raw:
            acc_s = score_own(a, acc_s, early, own_shared, row, col, corner)
        acc_s, rate = modify(acc_s, a, tile, batch, head, row, col)
        return mask_own(a, acc_s, early, own_shared, row, col, corner), rate
    return prepare, fetch, score


def make_own_score(spec: Spec, COUNT: int, TRANSPOSED: bool = False, CAPPED: bool = False, SQUEEZE: int = 0,
                   READ_BIAS: Any = None) -> tuple[Any, Any, Any]:
    """(prepare, fetch, score) for fragments of COUNT registers.

    shared = prepare(a, batch, head): what all rows of a head share (the ALiBi slope). Kernels only pass it on.
    early = fetch(a, batch, head, row, col, seqlen_q, seqlen_k): elements of the bias and words of the mask, loaded while the MMAs of S run
    acc_s = score(a, acc_s, early, shared, row, col, corner): corner: the key of row 0 on the diagonal, mask.alibi_from

    `row` and `col` are the thread's first query and key. TRANSPOSED: rows of the fragment are keys, its columns queries. TRANSPOSED or
    CAPPED, for the backward: with a softcap, acc_s is the capped scores from `cap_of`, not the dot products. SQUEEZE: elements of a 16-bit
    bias are packed as they arrive, in so many pieces of the fragment, to save registers. READ_BIAS: the bias is in shared memory, and this
    reads it (bias.make_bias_tile). Then fetch loads none, and early[0] is the address that the caller puts there.
    """
    PACKED, ALL_KEPT = spec.packed, -1 if COUNT == 64 else (1 << (COUNT // 2)) - 1     # bits of a word
    SCALED, SOFTCAP, ALIBI, BIAS, MASK = spec.scaled, spec.softcap, spec.alibi is not None, spec.bias is not None, spec.mask
    CAPPED = SOFTCAP and (TRANSPOSED or CAPPED)
    PAIRS = spec.bias_pairs and not TRANSPOSED
    bias_tile, bias_float = _score_tile(spec.bias or "float32", COUNT, PAIRS, spec.bias_whole and PAIRS and COUNT % 16 == 0)
    if SQUEEZE and not PAIRS and spec.bias in ("float16", "bfloat16"):
        bias_tile, bias_float = _squeezed_tile(spec.bias, COUNT, SQUEEZE), _score_tile(spec.bias, COUNT, pairs=True)[1]
    if READ_BIAS is not None:
        @inline
        def bias_float(at, col):
            return READ_BIAS(at)
    load_slope = load_scalar(spec.alibi or "float32")
    fetch_bias, fetch_mask = _make_fetch(bias_tile, TRANSPOSED), _make_fetch(make_word_tile(2 * COUNT), TRANSPOSED)

    def scaled(s, row, col, scale):
        return s * scale

    def less_distance(s, row, col, slope):
        return s - slope * float32(int32(abs(int32(row - col))))
    scale_elements, cap_elements, less_alibi = elementwise(scaled), make_cap(spec), elementwise(less_distance)

    @inline
    def prepare(a, batch, head):
        if ALIBI:
            return load_slope(uint64(a.alibi + batch * a.alibi_batch + head * a.alibi_head))
        else:
            return float32(0)

    @inline
    def bias_of(a, batch, head, row, col, seqlen_q, seqlen_k):
        if BIAS and READ_BIAS is None:
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
        return bias_of(a, batch, head, row, col, seqlen_q, seqlen_k), mask_of(a, batch, head, row, col, seqlen_q, seqlen_k)

    @inline
    def score(a, acc_s, early, shared, row, col, corner):
        if SOFTCAP:
            if not CAPPED:
                acc_s = cap_elements(a, acc_s)
        elif BIAS and not ALIBI:
            acc_s = scale_add(acc_s, a.softmax_scale, bias_float(early[0], col))
        elif SCALED:
            acc_s = scale_elements(acc_s, row, col, (a.softmax_scale,))
        if ALIBI:
            if TRANSPOSED:
                acc_s = less_alibi(acc_s, col, int32(row + corner), (shared,))    # |row - col| is the same
            else:
                acc_s = less_alibi(acc_s, int32(row + corner), col, (shared,))
        if BIAS and (SOFTCAP or ALIBI):
            acc_s = add(acc_s, bias_float(early[0], col))
        if MASK:
            if any_lane(int32((early[1][0] & early[1][1]) != ALL_KEPT)) != 0:      # most blocks of most masks are kept whole
                acc_s = keep_words(acc_s, early[1])
        return acc_s

    return prepare, fetch, score


def make_cap(spec: Spec) -> Any:
    """acc_s = cap(a, acc_s): dot products to capped scores. float32 always takes the form for any cap, which is as exact near 0."""
    narrow, wide = elementwise(capped), elementwise(capped_wide)

    @inline
    def cap_narrow(a, acc_s):
        return narrow(acc_s, int32(0), int32(0), (cap_scale(a), a.softcap))

    @inline
    def cap_wide(a, acc_s):
        return wide(acc_s, int32(0), int32(0), (cap_scale(a), a.softcap, a.softmax_scale))
    if spec.parts > 1 or spec.cap is not None:
        return cap_narrow if spec.cap == "narrow" else cap_wide

    @inline
    def cap(a, acc_s):
        if is_wide(a):
            acc_s = wide(acc_s, int32(0), int32(0), (cap_scale(a), a.softcap, a.softmax_scale))
        else:
            acc_s = narrow(acc_s, int32(0), int32(0), (cap_scale(a), a.softcap))
        return acc_s
    return cap


def make_cap_of(spec: Spec) -> Any:
    """acc_s, slope = cap_of(a, acc_s): dot products to capped scores, and the derivative of tanh, 1 - tanh**2, in 16 bits (not of float32).

    make_slopes converts the derivative back.
    """
    to_half, UNIT = make_pack("float16"), float32(2**-64)

    def fall(s, row, col, scale):       # 1 - tanh
        return float32(2) * reciprocal(exp2(s * scale) + float32(1))

    def slope_of(r, row, col):
        return r * (float32(2) - r)

    def slope_at(s, row, col, cap, inverse):        # of a capped score. In units of 2**64, where the inverse of cap is not denormal
        r = (cap - abs(s * UNIT)) * inverse
        return r * (float32(2) - r)

    def risen(r, row, col, cap):
        return cap - cap * r
    falls, slopes, rises, slopes_at, wide = (elementwise(f) for f in (fall, slope_of, risen, slope_at, capped_wide))

    @inline
    def cap_of(a, acc_s):
        nowhere, scale = int32(0), cap_scale(a)
        if is_wide(a):
            cap = a.softcap * UNIT
            acc_s = wide(acc_s, nowhere, nowhere, (scale, a.softcap, a.softmax_scale))
            slope = to_half(slopes_at(acc_s, nowhere, nowhere, (cap, reciprocal(cap))))
        else:
            acc_s = falls(acc_s, nowhere, nowhere, (scale,))
            slope = to_half(slopes(acc_s, nowhere, nowhere, ()))
            acc_s = rises(acc_s, nowhere, nowhere, (a.softcap,))
        return acc_s, slope

    @inline
    def cap_of_float(a, acc_s):
        nowhere, cap = int32(0), a.softcap * UNIT
        acc_s = wide(acc_s, nowhere, nowhere, (cap_scale(a), a.softcap, a.softmax_scale))
        return acc_s, slopes_at(acc_s, nowhere, nowhere, (cap, reciprocal(cap)))
    return cap_of_float if spec.parts > 1 else cap_of


def make_slopes(spec: Spec) -> Any:
    """acc = slopes(slope): the derivative that cap_of kept, as a float32 fragment."""
    @inline
    def as_it_is(slope):
        return slope
    return as_it_is if spec.parts > 1 else make_unpack(spec.dtype if is_rated(spec) else "float16", True)


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


def _squeezed_tile(dtype: str, COUNT: int, PIECES: int) -> Any:
    """`tile` of _score_tile in PIECES pieces. Each is packed before the next one needs registers."""
    load, _ = _score_tile(dtype, COUNT // PIECES)

    @inline
    def tile(pointer, by_batch, by_head, by_row, by_col, batch, head, row, col, seqlen_q, seqlen_k):
        first = pairs_of(load(pointer, by_batch, by_head, by_row, by_col, batch, head, row, col, seqlen_q, seqlen_k))
        if PIECES == 1:
            return first
        else:
            other = load(pointer, by_batch, by_head, by_row, by_col, batch, head, row, int32(col + COUNT), seqlen_q, seqlen_k)
            return join(first, pairs_of(other))
    assert PIECES in (1, 2) and COUNT <= 32 * PIECES
    return tile
