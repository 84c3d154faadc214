"""The online softmax in front of an 8-bit P, as softmax.py's: P is multiplied by 2**OFFSET, and scores by the scale of their tile.

A maximum is kept while the new one exceeds it by less than LAG: P stays below 448. The rounding of maximum * scale is a common factor of a
row's P, which cancels in O / sum; beyond 2**24 it would leave the room that LAG has. In units of log2 scores are below that, because
dot products of 8-bit numbers are below 2**26, unless their scales exceed a half.
"""
from __future__ import annotations

import math
from typing import Any

from numba import float32

from ..dsl.inline import inline
from ..ptx.arith import exp2, log2
from .fragments import exp2_minus, quad_max, quad_sum, row_max, row_sum
from .softmax import LN2, NEG_INF, finite

TOP, ROUNDING = 448.0, 0.5          # the largest e4m3; room for the rounding of maximum * scale, in units of log2


def lag_of(offset: int) -> float:
    """How far scores may exceed a maximum that is kept, in units of log2."""
    return math.log2(TOP) - offset - ROUNDING


def make_softmax_8bit(OFFSET: int) -> tuple[Any, Any, Any]:
    """(raised, probabilities, finish_row).

    new0, new1, alpha0, alpha1 = raised(scale, acc_s, max0, max1, lag)
        The rows' maxima with these scores, and the factors of their sums and outputs so far. lag: LAG, or 0 to keep no lower maximum.
    acc_s, part0, part1 = probabilities(scale, acc_s, max0, max1)
        Scores become P; part: their sums over the thread's columns.
    factor, lse = finish_row(scale, out_scale, maximum, total)
        Factor of the output row, 0 for a row that attends no key, and lse.
    """
    SHIFT = float32(OFFSET)

    @inline
    def raised(scale, acc_s, max0, max1, lag):
        new = row_max(acc_s, max0, max1)
        new0, new1 = quad_max(new[0]), quad_max(new[1])
        if (new0 - max0) * scale <= lag:
            new0 = max0
        if (new1 - max1) * scale <= lag:
            new1 = max1
        return new0, new1, exp2(max0 * scale - finite(new0) * scale), exp2(max1 * scale - finite(new1) * scale)

    @inline
    def probabilities(scale, acc_s, max0, max1):
        acc_s = exp2_minus(acc_s, scale, scale, finite(max0) * scale - SHIFT, finite(max1) * scale - SHIFT)
        part = row_sum(acc_s)
        return acc_s, part[0], part[1]

    @inline
    def finish_row(scale, out_scale, maximum, total):
        total = quad_sum(total)
        lse = (maximum * scale - SHIFT + log2(total)) * LN2 if total != float32(0) else NEG_INF
        return (out_scale / total if total != float32(0) else float32(0)), lse
    return raised, probabilities, finish_row
