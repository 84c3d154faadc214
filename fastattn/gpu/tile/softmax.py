"""The online softmax on fragments, shared by all tensor-core kernels (Milakov and Gimelshein 2018; FlashAttention-2).

A thread has two rows. Their maxima are in units of scores and common to the quad, their sums are over the thread's own columns.

P = exp2(score * log2_scale - top) is one FMA and one ex2, where top = maximum * log2_scale. The FMA rounds once, but top is rounded before
it. P, sums, and outputs of a row contain that rounding as a common factor of at most 2**16, which cancels when O is divided by the sum.
A row with a larger top is "far": its scores and its maximum are multiplied by a power of two instead of log2_scale. These products are
exact. That the power is not log2_scale does not matter: spec.far_limits says why.
"""
from __future__ import annotations

import math
from typing import Any

from numba import float32, int32, int64, uint64

from ..dsl.inline import inline
from ..ptx.arith import exp2, fma, log2, product
from ..ptx.memory import load_scalar, store_f32
from ..spec import FAR_EXPONENT, FAR_TOPS, LOG2E, Spec, far_limits
from .fragments import exp2_minus, quad_max, quad_sum, row_max, row_sum

NEG_INF = float32(-math.inf)
LN2, _LOG2E, ROUGH, HUGE = float32(math.log(2)), float32(LOG2E), float32(FAR_EXPONENT), float32(2.0**126)

# Both limits keep probabilities below 2**15, which float16 holds. A maximum that is kept while scores exceed it is below 2**27 in units of
# log2, because from there on different scores are at least 8 apart. So the rounding of such a top adds a factor of at most 2**4.
LAZY_LIMIT = float32(8)         # an old maximum is kept while the new one exceeds it by less than 2**8 (FlashAttention-4)
LAG_LIMIT = float32(2**13)      # largest sum of a thread's columns of a row in an optimistic step, so of each probability, too


@inline
def finite(x):
    """x, or 0 for -inf: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN."""
    return float32(0) if x == NEG_INF else x


def make_log2_scale(spec: Spec) -> Any:
    """log2_scale(a): factor from acc_s to exponents of 2. acc_s are dot products, or if the Spec is `scaled` scores."""
    SCALED = spec.scaled

    @inline
    def log2_scale(a):
        if SCALED:
            return _LOG2E
        else:
            return a.log2_scale
    return log2_scale


def make_far(spec: Spec) -> tuple[Any, Any]:
    """(is_far, row_scale). A maximum of -inf is far, too.

    is_far(a, maximum): whether the row is far
    row_scale(a, maximum): the factor of its scores
    """
    SCALED, log2_scale, BEYOND = spec.scaled, make_log2_scale(spec), float32(far_limits(spec.dtype, 1.0, spec.p_dtype)[0])

    @inline
    def is_far(a, maximum):
        return abs(maximum) > (BEYOND if SCALED else a.far_beyond)

    @inline
    def far_scale(a, maximum):
        if SCALED:      # 2, or where that might leave float32 1/2
            return float32(0.5) if abs(maximum) > HUGE else float32(2)
        else:
            return a.far_scale

    @inline
    def row_scale(a, maximum):
        return far_scale(a, maximum) if is_far(a, maximum) else log2_scale(a)
    return is_far, row_scale


def make_rise(spec: Spec) -> Any:
    """scale, top, alpha = rise(a, old, new): a row's maximum rises from `old` to `new`.

    P = exp2(score * scale - top). alpha: the factor of the row's sum and output so far, 0 for an `old` of -inf.
    """
    _, row_scale = make_far(spec)

    @inline
    def rise(a, old, new):
        maximum = finite(new)
        scale = row_scale(a, maximum)
        top = product(maximum, scale)
        return scale, top, exp2(product(old, scale) - top)
    return rise


def make_decay(spec: Spec) -> Any:
    """decay(a, old, new): the factor of sums and outputs when the maximum changes from `old` to `new`; 0 for an `old` of -inf."""
    rise = make_rise(spec)

    @inline
    def decay(a, old, new):
        return rise(a, old, new)[2]
    return decay


def make_finish_row(spec: Spec) -> Any:
    """factor, lse = finish_row(a, head, maximum, total): the factor of the output row, 0 for a row that attends no key, and its lse.
    `total` is the sum of the row's probabilities."""
    SCALED, SINKS, DROPOUT = spec.scaled, spec.sinks is not None, spec.dropout
    load_sink, log2_scale, (is_far, _) = load_scalar(spec.sinks or "float32"), make_log2_scale(spec), make_far(spec)

    @inline
    def natural(a, maximum):
        """(The maximum in units of lse, what has to be added to log2(total) as well).

        From some thousands on the maximum is multiplied by softmax_scale alone, which is rounded once. Then the rounding that P contains
        has to be taken out of the sum. It is 0 for far rows."""
        scale = log2_scale(a)
        top, score = product(maximum, scale), maximum if SCALED else product(maximum, a.softmax_scale)
        rough = abs(top) > ROUGH
        return (score if rough else top * LN2), (fma(-maximum, scale, top) if rough and not is_far(a, maximum) else float32(0))

    @inline
    def finish_row(a, head, maximum, total):
        (top, rounding), factor = natural(a, maximum), float32(1)
        if SINKS:
            sink = load_sink(a.sinks + head * a.sinks_head)
            new = max(top, sink)
            factor = exp2((top - finite(new)) * _LOG2E + rounding)
            total = total * factor + exp2((sink - finite(new)) * _LOG2E)
            top, rounding = new, float32(0)
        lse = top + (log2(total) + rounding) * LN2 if total != float32(0) else NEG_INF
        if DROPOUT:
            factor = factor * a.keep_scale
        return (factor / total if total != float32(0) else float32(0)), lse
    return finish_row


def make_store_lse(spec: Spec) -> Any:
    """store_lse(a, head, batch, q_start, seqlen_q, lane, row, lse0, lse1): lse of the thread's rows `row` and row + 8 of a sequence.

    The first lane of each quad stores. Without lse in the Spec nothing is done.
    """
    PACKED, LSE = spec.packed, spec.lse

    @inline
    def store_lse(a, head, batch, q_start, seqlen_q, lane, row, lse0, lse1):
        if LSE:
            if (lane & 3) == 0:
                if PACKED:
                    at = uint64(a.lse + uint64(4) * uint64(int64(head) * int64(a.total_q) + int64(q_start + row)))
                else:
                    plane = int64(batch) * int64(a.num_heads) + int64(head)
                    at = uint64(a.lse + uint64(4) * uint64(plane * int64(a.seqlen_q) + int64(row)))
                if row < seqlen_q:
                    store_f32(at, lse0)
                if row + 8 < seqlen_q:
                    store_f32(at + uint64(32), lse1)
    return store_lse


def make_softmax(spec: Spec, across: Any = None) -> tuple[Any, Any, Any]:
    """(update, optimistic, finish). A maximum changes only when it has to, so that alpha is 1 in most steps.

    across: the maximum over the threads that share a row, quad_max but in transposed fragments

    acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1)
        Scores become probabilities. alpha: the factor of O; the sums are already rescaled.
    acc_s, part0, part1, lags = optimistic(a, acc_s, max0, max1)
        The same under the old maxima, with a quarter fewer instructions. part: to be added to the sums. lags: 1 if a score is too far
        above its maximum, or a row is far. Then the caller recomputes the scores and calls update.
    scale0, scale1, lse0, lse1 = finish(a, head, max0, max1, sum0, sum1)
        Factors of the output rows, 0 for a row that attends no key, and lse.
    """
    log2_scale, rise, finish_row, largest = make_log2_scale(spec), make_rise(spec), make_finish_row(spec), across or quad_max
    # scores may exceed the old maxima of an optimistic step: half the limit, so that no near maximum has far scores
    TOP_LIMIT = float32(FAR_TOPS[spec.dtype] / 2)

    @inline
    def update(a, acc_s, max0, max1, sum0, sum1):
        scale = log2_scale(a)
        new = row_max(acc_s, max0, max1)
        new0, new1 = largest(new[0]), largest(new[1])
        if (new0 - max0) * scale < LAZY_LIMIT:
            new0 = max0
        if (new1 - max1) * scale < LAZY_LIMIT:
            new1 = max1
        scale0, top0, alpha0 = rise(a, max0, new0)
        scale1, top1, alpha1 = rise(a, max1, new1)
        acc_s = exp2_minus(acc_s, scale0, scale1, top0, top1)
        part = row_sum(acc_s)
        return acc_s, new0, new1, sum0 * alpha0 + part[0], sum1 * alpha1 + part[1], alpha0, alpha1

    @inline
    def optimistic(a, acc_s, max0, max1):
        scale = log2_scale(a)
        top0, top1 = product(max0, scale), product(max1, scale)
        acc_s = exp2_minus(acc_s, scale, scale, top0, top1)
        part = row_sum(acc_s)
        lags = max(part[0], part[1]) > LAG_LIMIT or max(abs(top0), abs(top1)) > TOP_LIMIT       # also if a top is -inf
        return acc_s, part[0], part[1], int32(1) if lags else int32(0)

    @inline
    def finish(a, head, max0, max1, sum0, sum1):
        scale0, lse0 = finish_row(a, head, max0, quad_sum(sum0))
        scale1, lse1 = finish_row(a, head, max1, quad_sum(sum1))
        return scale0, scale1, lse0, lse1

    return update, optimistic, finish
