"""From dot products to scores in the split-key kernel, whose rows belong to different query heads (tile/scores.py: to one).

A thread's two rows have a slope, a row of the bias and a row of the mask each. Where these lie is computed once; a step loads the elements
of its keys. What a Spec does not have costs nothing.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from numba import float32, int32, uint32, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32_if, load_scalar, load_shared_b32, store_shared_b32
from ..ptx.scalar import load_shared, store_shared
from ..spec import Spec
from ..tile.bits import keep_words
from ..tile.fragments import add, elementwise, make_gather, make_gather_pairs, make_unpack
from ..tile.mask import alibi_from
from ..tile.scores import make_score
from ..tile.traced import make_rows_hide, make_rows_modify
from .config import LEAST_WIDTH


class Row(NamedTuple):
    """What the scores of a query row need.

    Parameters
    ----------
    bias, mask
        Addresses of the row's elements and words.
    lo, hi
        The keys [lo, hi) of the split that it attends.
    slope
        Of ALiBi.
    diagonal
        The key from which ALiBi counts.
    batch, head, query
        Of a score_mod or a mask_mod.
    """

    bias: Any
    mask: Any
    lo: Any
    hi: Any
    slope: Any
    diagonal: Any
    batch: Any
    head: Any
    query: Any



@inline
def put_address(address, value):
    """Store a 64-bit address to shared memory."""
    store_shared_b32(address, int32(value))
    store_shared_b32(int32(address + 4), int32(value >> uint64(32)))


@inline
def get_address(address):
    return uint64(uint32(load_shared_b32(address))) | (uint64(uint32(load_shared_b32(int32(address + 4)))) << uint64(32))


def make_parked(spec: Spec) -> tuple[Any, Any, Any]:
    """(park, addresses, numbers), where registers do not hold a Row through the loop: it is in shared memory, ROW_BYTES. Half of it is
    loaded before S = Q K^T, the other half behind it.

    park(address, row)
    row = addresses(address): with its bias and mask alone
    row = numbers(address): with all else alone
    """
    ALIBI, BIAS, MASK = spec.alibi is not None, spec.bias is not None, spec.mask
    put_float, get_float = store_shared("float32"), load_shared("float32", 1)

    @inline
    def park(address, row):
        if BIAS:
            put_address(address, row.bias)
        if MASK:
            put_address(int32(address + 8), row.mask)
        store_shared_b32(int32(address + 16), row.lo)
        store_shared_b32(int32(address + 20), row.hi)
        if ALIBI:
            put_float(int32(address + 24), row.slope)
            store_shared_b32(int32(address + 28), row.diagonal)

    @inline
    def addresses(address):
        bias, mask = uint64(0), uint64(0)
        if BIAS:
            bias = get_address(address)
        if MASK:
            mask = get_address(int32(address + 8))
        return Row(bias, mask, int32(0), int32(0), float32(0), int32(0), int32(0), int32(0), int32(0))

    @inline
    def numbers(address):
        slope, diagonal = float32(0), int32(0)
        if ALIBI:
            slope, diagonal = get_float(int32(address + 24))[0], load_shared_b32(int32(address + 28))
        lo, hi = load_shared_b32(int32(address + 16)), load_shared_b32(int32(address + 20))
        return Row(uint64(0), uint64(0), lo, hi, slope, diagonal, int32(0), int32(0), int32(0))
    return park, addresses, numbers


def make_row_scores(spec: Spec, KEYS: int) -> tuple[Any, Any, Any]:
    """(row_of, fetch, score) for steps of KEYS keys.

    row = row_of(a, batch, head, i, seqlen_q, seqlen_k, lo, hi): the Row of query i of a head
    early = fetch(a, row0, row1, column, seqlen_k): elements of the bias and words of the mask, loaded while the MMAs of S run
    acc_s = score(a, acc_s, early, row0, row1, column)

    row0, row1: of the thread's rows. column: the thread's first key.
    """
    COUNT, WIDTH, ALIBI, BIAS, MASK = KEYS // 2, max(KEYS, LEAST_WIDTH), spec.alibi is not None, spec.bias is not None, spec.mask
    PAIRS, ALL_KEPT = spec.bias_pairs, (1 << (COUNT // 2)) - 1          # bits of a word
    MODIFIED, HIDDEN = spec.score_mod is not None, spec.mask_mod is not None
    modify: Any = make_rows_modify(spec.score_mod) if spec.score_mod else None
    hide: Any = make_rows_hide(spec.mask_mod) if spec.mask_mod else None
    plain = replace(spec, alibi=None, bias=None, bias_pairs=False, bias_whole=False, mask=False, score_mod=None, mask_mod=None)
    _, _, scaled = make_score(plain, COUNT)                             # the scale and the softcap, which need no row
    load_slope, gather = load_scalar(spec.alibi or "float32"), make_gather_pairs() if PAIRS else make_gather(spec.bias or "float32")
    unpack = make_unpack(spec.bias or "float32", PAIRS)

    def less_distance(s, row, col, slope0, slope1, diagonal0, diagonal1):
        slope, diagonal = (slope0, diagonal0) if row == 0 else (slope1, diagonal1)
        return s - slope * float32(int32(abs(int32(diagonal - col))))
    less_alibi = elementwise(less_distance)

    @inline
    def row_of(a, batch, head, i, seqlen_q, seqlen_k, lo, hi):
        slope, diagonal, bias, mask = float32(0), int32(0), uint64(0), uint64(0)
        if ALIBI:
            slope = load_slope(uint64(a.alibi + batch * a.alibi_batch + head * a.alibi_head))
            diagonal = int32(i + alibi_from(a, seqlen_q, seqlen_k))
        if BIAS:
            bias = uint64(a.bias + batch * a.bias_batch + head * a.bias_head + i * a.bias_row)
        if MASK:
            mask = uint64(a.mask + batch * a.mask_batch + head * a.mask_head + i * a.mask_row)
        return Row(bias, mask, lo, hi, slope, diagonal, batch, head, i)

    @inline
    def bias_of(a, row0, row1, column, seqlen_k):
        if BIAS:
            left, at = int32(seqlen_k - column), uint64(column * a.bias_col)
            if PAIRS:
                return gather(uint64(row0.bias + at), uint64(row1.bias + at), left, left, COUNT)
            else:
                return gather(uint64(row0.bias + at), uint64(row1.bias + at), a.bias_col, left, left, COUNT)
        else:
            return int32(0)

    @inline
    def words_of(a, row0, row1, column, seqlen_k):
        if MASK:
            block = divide(column, int32(WIDTH))
            at, inside = uint64(block * a.mask_col + 2 * (column & 6)), int32(block * WIDTH < seqlen_k)
            first, second = load_b32_if(uint64(row0.mask + at), inside), load_b32_if(uint64(row1.mask + at), inside)
            if KEYS < WIDTH:
                shift = (column & 8) >> 2
                first, second = int32((first >> shift) & ALL_KEPT), int32((second >> shift) & ALL_KEPT)
            return first, second
        else:
            return int32(0), int32(0)

    @inline
    def fetch(a, row0, row1, column, seqlen_k):
        return bias_of(a, row0, row1, column, seqlen_k), words_of(a, row0, row1, column, seqlen_k)

    @inline
    def score(a, acc_s, early, row0, row1, column):
        acc_s = scaled(a, acc_s, int32(0), float32(0), int32(0), column, int32(0))
        if ALIBI:
            acc_s = less_alibi(acc_s, int32(0), column, (row0.slope, row1.slope, row0.diagonal, row1.diagonal))
        if BIAS:
            acc_s = add(acc_s, unpack(early[0]))
        if MODIFIED:
            acc_s = modify(acc_s, a, row0.batch, row0.head, row1.head, row0.query, row1.query, column)
        if MASK:
            acc_s = keep_words(acc_s, early[1])         # so few registers that a branch around it takes as long
        if HIDDEN:
            acc_s = hide(acc_s, a, row0.batch, row0.head, row1.head, row0.query, row1.query, column)
        return acc_s
    return row_of, fetch, score
