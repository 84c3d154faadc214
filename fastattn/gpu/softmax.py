"""The online softmax on fragments: the lines that every tensor-core kernel shares (Milakov and Gimelshein 2018; FlashAttention-2).

A thread holds two rows: row_max in score units, row_sum of its own columns. Exponents are base 2.
"""
from __future__ import annotations

import math
from typing import Any

from numba import float32, int32

from .fragments import exp2_minus, quad_max, quad_sum, row_max, row_sum
from .inline import inline
from .ptx.arith import exp2, log2
from .ptx.memory import load_scalar
from .spec import LOG2E, Spec

NEG_INF = float32(-math.inf)
LN2, _LOG2E = float32(math.log(2)), float32(LOG2E)


LAG_LIMIT = float32(2**13)      # of a thread's sum of a row in one step, hence of each probability: float16 holds 2**15
LAZY_LIMIT = float32(8)      # a maximum may lag by a factor of 2**8: float16 holds probabilities up to 2**15 (FlashAttention-4)


def make_softmax(spec: Spec) -> tuple[Any, Any, Any]:
    """(update, optimistic, finish). A maximum moves only when it has to, so that alpha is 1 in most steps.

    acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1): scores become probabilities,
    alpha is what older sums and outputs must be multiplied by.
    acc_s, part0, part1, lags = optimistic(a, acc_s, max0, max1): the same under the old maxima, which saves a quarter of the instructions;
    part is what sums grow by. Where `lags`, some score is too far above them, and update must be given the scores once more.
    scale0, scale1, lse0, lse1 = finish(a, head, max0, max1, sum0, sum1): factors of the output rows (0: a row that saw nothing).
    """
    SCALED, SINKS, DROPOUT = spec.scaled, spec.sinks is not None, spec.dropout
    load_sink = load_scalar(spec.sinks or "float32")

    @inline
    def finite(x):
        return float32(0) if x == NEG_INF else x

    @inline
    def update(a, acc_s, max0, max1, sum0, sum1):
        scale = float32(1) if SCALED else a.softmax_scale
        new = row_max(acc_s, max0, max1)
        new0, new1 = quad_max(new[0]), quad_max(new[1])
        if (new0 - max0) * scale <= LAZY_LIMIT:
            new0 = max0
        if (new1 - max1) * scale <= LAZY_LIMIT:
            new1 = max1
        ms0, ms1 = finite(new0) * scale, finite(new1) * scale       # a row that saw nothing yet: exp2(-inf - 0) = 0
        alpha0, alpha1 = exp2(max0 * scale - ms0), exp2(max1 * scale - ms1)
        acc_s = exp2_minus(acc_s, scale, ms0, ms1)
        part = row_sum(acc_s)
        return acc_s, new0, new1, sum0 * alpha0 + part[0], sum1 * alpha1 + part[1], alpha0, alpha1

    @inline
    def optimistic(a, acc_s, max0, max1):
        scale = float32(1) if SCALED else a.softmax_scale
        acc_s = exp2_minus(acc_s, scale, max0 * scale, max1 * scale)
        part = row_sum(acc_s)
        lags = max(part[0], part[1]) > LAG_LIMIT or min(max0, max1) == NEG_INF
        return acc_s, part[0], part[1], int32(1) if lags else int32(0)

    @inline
    def finish_row(a, head, maximum, total):
        scale = float32(1) if SCALED else a.softmax_scale
        total = quad_sum(total)
        top = maximum * scale
        factor = float32(1)
        if SINKS:
            sink = load_sink(a.sinks + head * a.sinks_head) * _LOG2E
            new = max(top, sink)
            factor = exp2(top - finite(new))
            total = total * factor + exp2(sink - finite(new))
            top = new
        lse = (top + log2(total)) * LN2 if total != float32(0) else NEG_INF
        if DROPOUT:
            factor = factor * a.keep_scale
        return (factor / total if total != float32(0) else float32(0)), lse

    @inline
    def finish(a, head, max0, max1, sum0, sum1):
        scale0, lse0 = finish_row(a, head, max0, sum0)
        scale1, lse1 = finish_row(a, head, max1, sum1)
        return scale0, scale1, lse0, lse1

    return update, optimistic, finish
