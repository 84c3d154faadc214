"""The online softmax on fragments: the lines that every tensor-core kernel shares (Milakov and Gimelshein 2018; FlashAttention-2).

A thread holds two rows: row_max in score units, row_sum of its own columns. Exponents are base 2: log2_scale times a score, less the same
of the row's maximum, in one instruction that rounds once. The maximum's product is rounded before, so P is in units of that: for scores
of thousands and more its rounding is seen, for those of 1e10 it is hundreds. Such rows have their maximum subtracted first.
"""
from __future__ import annotations

import math
from typing import Any

from numba import float32, int32

from ..dsl.inline import inline
from ..ptx.arith import exp2, log2, product
from ..ptx.memory import load_scalar
from ..ptx.sync import any_beyond
from ..spec import FAR_EXPONENT, LOG2E, Spec
from .fragments import exp2_minus, minus_rows, quad_max, quad_sum, row_max, row_sum

NEG_INF = float32(-math.inf)
LN2, _LOG2E, FAR = float32(math.log(2)), float32(LOG2E), float32(FAR_EXPONENT)


LAG_LIMIT = float32(2**13)      # of a thread's sum of a row in one step, hence of each probability: float16 holds 2**15
LAZY_LIMIT = float32(8)      # a maximum may lag by a factor of 2**8: float16 holds probabilities up to 2**15 (FlashAttention-4)


@inline
def finite(x):
    return float32(0) if x == NEG_INF else x


def make_log2_scale(spec: Spec) -> Any:
    """log2_scale(a): what makes exponents of 2 of what kernels take for scores: products, or with `scaled` the scores themselves."""
    SCALED = spec.scaled

    @inline
    def log2_scale(a):
        if SCALED:
            return _LOG2E
        else:
            return a.log2_scale
    return log2_scale


def make_decay(spec: Spec) -> Any:
    """decay(a, old, new): what sums and outputs under the maximum `old` count for under `new`; 0 where `old` saw nothing."""
    log2_scale = make_log2_scale(spec)

    @inline
    def decay(a, old, new):
        return exp2((old - finite(new)) * log2_scale(a))
    return decay


def make_finish_row(spec: Spec) -> Any:
    """factor, lse = finish_row(a, head, maximum, total): of the output row (0: a row that saw nothing); `total` is the sum of the row."""
    SCALED, SINKS, DROPOUT = spec.scaled, spec.sinks is not None, spec.dropout
    load_sink, log2_scale = load_scalar(spec.sinks or "float32"), make_log2_scale(spec)

    @inline
    def natural(a, maximum):
        """The maximum in units of lse: that of P, but for far rows, whose P has none of its rounding."""
        exponent, score = product(maximum, log2_scale(a)), maximum if SCALED else product(maximum, a.softmax_scale)
        return score if abs(exponent) > FAR else exponent * LN2

    @inline
    def finish_row(a, head, maximum, total):
        top, factor = natural(a, maximum), float32(1)
        if SINKS:
            sink = load_sink(a.sinks + head * a.sinks_head)
            new = max(top, sink)
            factor = exp2((top - finite(new)) * _LOG2E)
            total = total * factor + exp2((sink - finite(new)) * _LOG2E)
            top = new
        lse = top + log2(total) * LN2 if total != float32(0) else NEG_INF
        if DROPOUT:
            factor = factor * a.keep_scale
        return (factor / total if total != float32(0) else float32(0)), lse
    return finish_row


@inline
def far_maximum(maximum, exponent):
    """A row's maximum where its exponent is far, else 0: what is subtracted from the row's scores before they are scaled."""
    return maximum if abs(exponent) > FAR else float32(0)


def make_softmax(spec: Spec) -> tuple[Any, Any, Any]:
    """(update, optimistic, finish). A maximum moves only when it has to, so that alpha is 1 in most steps.

    acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1): scores become probabilities,
    alpha is what older sums and outputs must be multiplied by.
    acc_s, part0, part1, lags = optimistic(a, acc_s, max0, max1): the same under the old maxima, which saves a quarter of the instructions;
    part is what sums grow by. Where `lags`, some score is too far above them, or a row is far: update must be given the scores once more.
    scale0, scale1, lse0, lse1 = finish(a, head, max0, max1, sum0, sum1): factors of the output rows (0: a row that saw nothing).
    """
    log2_scale, finish_row = make_log2_scale(spec), make_finish_row(spec)

    @inline
    def update(a, acc_s, max0, max1, sum0, sum1):
        scale = log2_scale(a)
        new = row_max(acc_s, max0, max1)
        new0, new1 = quad_max(new[0]), quad_max(new[1])
        if (new0 - max0) * scale <= LAZY_LIMIT:
            new0 = max0
        if (new1 - max1) * scale <= LAZY_LIMIT:
            new1 = max1
        # a row that saw nothing yet: exp2(-inf - 0) = 0
        ms0, ms1 = product(finite(new0), scale), product(finite(new1), scale)
        alpha0, alpha1 = exp2(product(max0, scale) - ms0), exp2(product(max1, scale) - ms1)
        if any_beyond(ms0, ms1, FAR) != 0:      # far rows: the difference first
            shift0, shift1 = far_maximum(new0, ms0), far_maximum(new1, ms1)
            acc_s = minus_rows(acc_s, shift0, shift1)
            if shift0 != float32(0):
                ms0, alpha0 = float32(0), exp2((max0 - shift0) * scale)
            if shift1 != float32(0):
                ms1, alpha1 = float32(0), exp2((max1 - shift1) * scale)
        acc_s = exp2_minus(acc_s, scale, ms0, ms1)
        part = row_sum(acc_s)
        return acc_s, new0, new1, sum0 * alpha0 + part[0], sum1 * alpha1 + part[1], alpha0, alpha1

    @inline
    def optimistic(a, acc_s, max0, max1):
        scale = log2_scale(a)
        ms0, ms1 = product(max0, scale), product(max1, scale)
        acc_s = exp2_minus(acc_s, scale, ms0, ms1)
        part = row_sum(acc_s)
        lags = max(part[0], part[1]) > LAG_LIMIT or max(abs(ms0), abs(ms1)) > FAR       # -inf is far, too
        return acc_s, part[0], part[1], int32(1) if lags else int32(0)

    @inline
    def finish(a, head, max0, max1, sum0, sum1):
        scale0, lse0 = finish_row(a, head, max0, quad_sum(sum0))
        scale1, lse1 = finish_row(a, head, max1, quad_sum(sum1))
        return scale0, scale1, lse0, lse1

    return update, optimistic, finish
