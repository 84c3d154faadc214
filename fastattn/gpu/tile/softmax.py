"""The online softmax on fragments, shared by all tensor-core kernels (Milakov and Gimelshein 2018; FlashAttention-2).

A thread has two rows. Their maxima are in units of scores and common to the quad, their sums are over the thread's own columns.

P = exp2(score * log2_scale - maximum * log2_scale) is one FMA and one ex2. The FMA rounds once, but maximum * log2_scale is rounded
before it. That error grows with the scores: it matters from some thousands on, and at 1e10 it is hundreds. Rows with such exponents are
"far" rows: their maximum is subtracted from the scores first.
"""
from __future__ import annotations

import math
from typing import Any

from numba import float32, int32, int64, uint64

from ..dsl.inline import inline
from ..ptx.arith import exp2, log2, product
from ..ptx.memory import load_scalar, store_f32
from ..ptx.sync import any_beyond
from ..spec import FAR_EXPONENT, LOG2E, Spec
from .fragments import exp2_minus, minus_rows, quad_max, quad_sum, row_max, row_sum

NEG_INF = float32(-math.inf)
LN2, _LOG2E, FAR = float32(math.log(2)), float32(LOG2E), float32(FAR_EXPONENT)

# Both limits keep probabilities below 2**15, which float16 holds.
LAZY_LIMIT = float32(8)         # an old maximum is kept while the new one exceeds it by at most 2**8 (FlashAttention-4)
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


def make_decay(spec: Spec) -> Any:
    """decay(a, old, new): the factor of sums and outputs when the maximum changes from `old` to `new`; 0 for an `old` of -inf."""
    log2_scale = make_log2_scale(spec)

    @inline
    def decay(a, old, new):
        return exp2((old - finite(new)) * log2_scale(a))
    return decay


def make_finish_row(spec: Spec) -> Any:
    """factor, lse = finish_row(a, head, maximum, total): the factor of the output row, 0 for a row that attends no key, and its lse.
    `total` is the sum of the row's probabilities."""
    SCALED, SINKS, DROPOUT = spec.scaled, spec.sinks is not None, spec.dropout
    load_sink, log2_scale = load_scalar(spec.sinks or "float32"), make_log2_scale(spec)

    @inline
    def natural(a, maximum):
        """The maximum in units of lse. It is rounded as in P; for far rows P does not contain that rounding."""
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
    """What to subtract from a row's scores first: for a far row its maximum, else 0. exponent: maximum * log2_scale."""
    return maximum if abs(exponent) > FAR else float32(0)


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


def make_softmax(spec: Spec) -> tuple[Any, Any, Any]:
    """(update, optimistic, finish). A maximum changes only when it has to, so that alpha is 1 in most steps.

    acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1)
        Scores become probabilities. alpha: the factor of O; the sums are already rescaled.
    acc_s, part0, part1, lags = optimistic(a, acc_s, max0, max1)
        The same under the old maxima, with a quarter fewer instructions. part: to be added to the sums. lags: 1 if a score is too far
        above its maximum, or a row is far. Then the caller recomputes the scores and calls update.
    scale0, scale1, lse0, lse1 = finish(a, head, max0, max1, sum0, sum1)
        Factors of the output rows, 0 for a row that attends no key, and lse.
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
        ms0, ms1 = product(finite(new0), scale), product(finite(new1), scale)
        alpha0, alpha1 = exp2(product(max0, scale) - ms0), exp2(product(max1, scale) - ms1)
        if any_beyond(ms0, ms1, FAR) != 0:      # far rows: subtract the maximum first
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
        lags = max(part[0], part[1]) > LAG_LIMIT or max(abs(ms0), abs(ms1)) > FAR       # a maximum of -inf is far, too
        return acc_s, part[0], part[1], int32(1) if lags else int32(0)

    @inline
    def finish(a, head, max0, max1, sum0, sum1):
        scale0, lse0 = finish_row(a, head, max0, quad_sum(sum0))
        scale1, lse1 = finish_row(a, head, max1, quad_sum(sum1))
        return scale0, scale1, lse0, lse1

    return update, optimistic, finish
