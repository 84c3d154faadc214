"""The executable specification: forward and backward of every Problem in float64 NumPy, one readable loop over
sequences.

Rules that every engine shares and that this file defines:

- The score of a masked pair is replaced by -inf, not added to, so its value does not matter, even if it is NaN.
- Keys past seqused_k and rows outside the sequences are never read. A key that no row of any query head that shares the key
  head attends affects no result, even if it is NaN. (Here that holds for each query head by itself. Engines load a key once
  for all of them, and multiply it by 0 where it is masked.)
- A row that attends no key has out = 0, lse = -inf and gradients 0; with a sink its lse is the sink.
- Every element of an output is written. Rows of a packed output that belong to no sequence (cu_seqlens ends before the
  total) get out = 0, lse = -inf, gradients 0. Keys past seqused_k get gradients 0.
- The backward uses out and lse as they are given. Over a part of the keys, with the out and lse of all keys, it returns
  that part's share of the gradients. delta = sum(dout * out), P = exp(S - lse), dS = P * (dP - delta + dlse).
- If the given lse differs from the call's own by its rounding only, P is the softmax itself, because at scores of 1e10
  that rounding is in the hundreds.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .arrays.view import View, numpy_dtype
from .caches import append, key_row
from .eight_bit import saturated
from .flex import pairs
from .masks import row_bounds
from .philox import keep_mask
from .problem import CacheOperands, Grads, Operands, Problem

Array = np.ndarray[Any, Any]
name = "reference"


@dataclass(frozen=True, slots=True)
class Precision:
    """The arithmetic. The specification uses float64.

    The tests' naive rival computes in float32 and rounds P and dS to `operand`, the dtype in which a plain
    implementation passes them to its second matmul. As an engine does, it computes P of the backward from the rounded
    lse (`from_lse`).
    """

    compute: str = "float64"
    operand: str | None = None
    from_lse: bool = False

    def array(self, view: View) -> Array:
        return view.numpy().astype(self.compute)

    def rounded(self, x: Array) -> Array:
        return x if self.operand is None else x.astype(numpy_dtype(self.operand)).astype(self.compute)


FLOAT64 = Precision()


class Sequence(NamedTuple):
    """Sequence number b, the indices of its rows in q-like, k-like and lse-like arrays, its lengths, and the key on which its row 0
    stands.
    """

    b: int
    rows_q: Any
    rows_k: Any
    rows_lse: Any
    seqlen_q: int
    seqlen_k: int
    diagonal: int


def supports(problem: Problem) -> str | None:
    return None


def sequences(problem: Problem, o: Operands) -> Iterator[Sequence]:
    """The sequences of a Problem: batch entries, or slices of the packed arrays, shortened to seqused_k."""
    if o.cache is not None:
        yield from _requests(problem, o, o.cache)
        return
    if o.cu_seqlens_q is None or o.cu_seqlens_k is None:
        for b in range(problem.batch):
            diagonal = problem.mask.diagonal(0, problem.seqlen_q, problem.seqlen_k)
            yield Sequence(b, np.s_[b, :], np.s_[b, :], np.s_[b, :, :], problem.seqlen_q, problem.seqlen_k, diagonal)
        return
    cu_q, cu_k = o.cu_seqlens_q.numpy().tolist(), o.cu_seqlens_k.numpy().tolist()
    used = np.diff(cu_k).tolist() if o.seqused_k is None else o.seqused_k.numpy().tolist()
    for b in range(problem.batch):
        rows_q, seqlen_q = np.s_[cu_q[b]:cu_q[b + 1]], cu_q[b + 1] - cu_q[b]
        diagonal = problem.mask.diagonal(0, seqlen_q, used[b]) if o.diagonals is None else int(o.diagonals.numpy()[b])
        yield Sequence(b, rows_q, np.s_[cu_k[b]:cu_k[b] + used[b]], np.s_[:, rows_q], seqlen_q, used[b], diagonal)


def _requests(problem: Problem, o: Operands, cache: CacheOperands) -> Iterator[Sequence]:
    """The requests of a Problem with caches, whose keys are gathered."""
    assert problem.cache is not None and o.seqused_k is not None
    table, used = cache.block_table.numpy(), o.seqused_k.numpy().tolist()
    cu_q = None if o.cu_seqlens_q is None else o.cu_seqlens_q.numpy().tolist()
    for b in range(problem.batch):
        rows_k = key_row(table, b, problem.cache.page_size, np.arange(used[b]))
        if cu_q is None:
            yield Sequence(b, np.s_[b, :], rows_k, np.s_[b, :, :], problem.seqlen_q, used[b], used[b] - problem.seqlen_q)
        else:
            rows_q = np.s_[cu_q[b]:cu_q[b + 1]]
            yield Sequence(b, rows_q, rows_k, np.s_[:, rows_q], cu_q[b + 1] - cu_q[b], used[b], used[b] - (cu_q[b + 1] - cu_q[b]))


def _visible(problem: Problem, o: Operands, s: Sequence) -> Array:
    """(num_heads, seqlen_q, seqlen_k) bool: True where a row attends a key."""
    visible = np.zeros((problem.num_heads, s.seqlen_q, s.seqlen_k), bool)
    for row in range(s.seqlen_q):
        lo, hi = row_bounds(row, s.seqlen_q, s.seqlen_k, problem.mask.left, problem.mask.right, first=s.diagonal)
        visible[:, row, lo:hi] = True
    if o.mask is not None:
        visible &= o.mask.numpy()[s.b, :, :s.seqlen_q, :s.seqlen_k]
    if o.flex is not None:
        visible &= pairs.seen(o.flex, s.b, *visible.shape)
    return visible


def _scores(problem: Problem, o: Operands, s: Sequence, q: Array, k: Array, p: Precision) -> tuple[Array, Array | float]:
    """S (num_heads, seqlen_q, seqlen_k) before score_mod and masks, and the softcap's derivative d(capped) / d(scale * q.k)."""
    score, slope = problem.score, np.ones((), p.compute)
    S = q @ k.swapaxes(1, 2) * slope.dtype.type(score.softmax_scale)
    if score.softcap is not None:
        cap = slope.dtype.type(score.softcap)
        tanh = np.tanh(S / cap)
        S, slope = tanh * cap, 1 - tanh * tanh
    if o.alibi_slopes is not None:
        i, j = np.arange(s.seqlen_q)[:, None], np.arange(s.seqlen_k)
        distance = np.abs(i + s.diagonal - j).astype(p.compute)
        S = S - p.array(o.alibi_slopes)[s.b][:, None, None] * distance
    if o.bias is not None:
        S = S + o.bias.numpy()[s.b, :, :s.seqlen_q, :s.seqlen_k].astype(p.compute)
    return S, slope


def _modified(o: Operands, s: Sequence, S: Array, visible: Array) -> Array:
    """The scores after score_mod, -inf where masked."""
    if o.flex is not None and o.flex.flex.score_mod is not None:
        S = pairs.modified(o.flex, s.b, S)
    return np.where(visible, S, -np.inf)


def _by_head(x: Array, rows: Any, repeat: int = 1) -> Array:
    """Rows of one sequence, (rows, heads, dim) -> (heads * repeat, rows, dim)."""
    return np.repeat(x[rows].swapaxes(0, 1), repeat, axis=0)


def _scaled(problem: Problem, s: Sequence, x: Array, scale: View | None, p: Precision) -> Array:
    """x (num_heads, rows, dim) times the scales of its key heads, if it is 8-bit."""
    return x if scale is None else x * np.repeat(p.array(scale)[s.b], problem.group)[:, None, None]


def _keep(problem: Problem, s: Sequence, p: Precision) -> Array:
    """Dropout's factor of the probabilities, 0 or keep_scale, (num_heads, seqlen_q, seqlen_k)."""
    if problem.dropout is None:
        return np.ones((), p.compute)
    keep = keep_mask(problem.dropout, [s.b], problem.num_heads, s.seqlen_q, s.seqlen_k)[0]
    return np.where(keep, problem.dropout.keep_scale, 0.0).astype(p.compute)


def _normaliser(S: Array, sinks: Array | None) -> tuple[Array, Array]:
    """row_max and row_sum (num_heads, seqlen_q): the softmax is exp(S - row_max) / row_sum. Sinks (num_heads, 1) are
    included.

    Both are 0 in a row whose scores are all -inf.
    """
    row_max = S.max(axis=2, initial=-np.inf)
    if sinks is not None:
        row_max = np.maximum(row_max, sinks)
    row_max = np.where(row_max == -np.inf, 0, row_max).astype(S.dtype)
    row_sum = np.exp(S - row_max[:, :, None]).sum(axis=2)
    if sinks is not None:
        row_sum = row_sum + np.exp(sinks - row_max)
    return row_max, row_sum


def _share(own: Array, lse: Array, rounding: float, terms: int) -> Array:
    """exp(own - lse): the share of this call's keys in the softmax whose `lse` is given. 1 where the two differ by
    rounding only.

    A given lse above the call's own is rounding if the gap is below lse's relative `rounding`; beyond that it includes
    more keys. A given lse below it cannot include more keys, so it is another kernel's, whose scores are sums of
    `terms` rounded products.
    """
    gap, unit = own - lse, rounding * np.abs(lse)
    return np.asarray(np.exp(np.where((gap > -unit) & (gap < terms * unit), 0, gap)))


@np.errstate(all="ignore")
def forward(problem: Problem, o: Operands, out: View, lse: View | None, precision: Precision = FLOAT64) -> None:
    """Write out, and lse (natural log) if it is not None. Shapes as in Problem.out_shape and Problem.lse_shape."""
    p = precision
    if problem.cache is not None:
        o = append(problem, o)
    q, k, v = p.array(o.q), p.array(o.k), p.array(o.v)
    sinks = None if o.sinks is None else p.array(o.sinks)[:, None]
    out_array = out.numpy()
    lse_array = np.empty(problem.lse_shape, p.compute) if lse is None else lse.numpy()
    out_array[...], lse_array[...] = 0, -np.inf
    e = problem.eight_bit
    for s in sequences(problem, o):
        q_s, k_s, v_s = _by_head(q, s.rows_q), _by_head(k, s.rows_k, problem.group), _by_head(v, s.rows_k, problem.group)
        if e is not None:
            q_s, k_s, v_s = (_scaled(problem, s, x, scale, p) for x, scale in (
                (q_s, o.q_scale), (k_s, o.k_scale), (v_s * e.factor, o.v_scale)))
        visible = _visible(problem, o, s)
        S = _modified(o, s, _scores(problem, o, s, q_s, k_s, p)[0], visible)
        row_max, row_sum = _normaliser(S, sinks)
        P = np.exp(S - row_max[:, :, None])
        P = np.where(row_sum[:, :, None] == 0, 0, P / row_sum[:, :, None]) * _keep(problem, s, p)
        v_s = np.where(np.logical_or.reduce(visible, axis=1)[:, :, None], v_s, 0)
        out_s = p.rounded(P) @ v_s
        lse_array[s.rows_lse] = row_max + np.log(row_sum)
        if o.out_scale is not None:
            out_s = out_s / o.out_scale.numpy()
        out_array[s.rows_q] = saturated(out_s, problem.out_dtype).swapaxes(0, 1)


@np.errstate(all="ignore")
def backward(problem: Problem, o: Operands, dout: View, out: View, lse: View, dlse: View | None, grads: Grads[View],
             precision: Precision = FLOAT64) -> None:
    """Write the gradients of sum(dout * out) + sum(dlse * lse).

    grads.dbias has four axes, of length 1 where bias broadcasts.
    """
    p = precision
    q, k, v, out_array, dout_array, lse_array = (p.array(x) for x in (o.q, o.k, o.v, out, dout, lse))
    dlse_array = np.zeros(problem.lse_shape, p.compute) if dlse is None else p.array(dlse)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dbias = None if grads.dbias is None or o.bias is None else np.zeros(o.bias.shape, p.compute)
    dsinks, dcaptured = np.zeros(problem.num_heads, p.compute), dict[int, Array]()
    sinks = None if o.sinks is None else p.array(o.sinks)[:, None]
    rounding = float(np.finfo(lse.dtype).eps)
    for s in sequences(problem, o):
        visible = _visible(problem, o, s)
        attends, attended = (np.logical_or.reduce(visible, axis=axis)[:, :, None] for axis in (2, 1))
        q_s, out_s, dout_s = (np.where(attends, _by_head(x, s.rows_q), 0) for x in (q, out_array, dout_array))
        k_s, v_s = (np.where(attended, _by_head(x, s.rows_k, problem.group), 0) for x in (k, v))
        lse_s, dlse_s = lse_array[s.rows_lse], dlse_array[s.rows_lse]
        plain, slope = _scores(problem, o, s, q_s, k_s, p)
        S = _modified(o, s, plain, visible)
        keep = _keep(problem, s, p)
        alive = visible & (lse_s != -np.inf)[:, :, None]    # a row whose scores are all -inf is an empty row too
        row_max, row_sum = _normaliser(S, sinks)
        if p.from_lse:
            top, factor = lse_s, np.ones_like(lse_s)
        else:
            top, factor = row_max, _share(row_max + np.log(row_sum), lse_s, rounding, problem.head_dim) / np.where(row_sum == 0, 1, row_sum)
        P = np.where(alive, np.exp(S - top[:, :, None]) * factor[:, :, None], 0)
        delta = (dout_s * out_s).sum(axis=2)
        dP = dout_s @ v_s.swapaxes(1, 2) * keep
        dS = np.where(alive, P * (dP + (dlse_s - delta)[:, :, None]), 0)
        if o.flex is not None and o.flex.flex.score_mod is not None:
            dS, parts = pairs.gradients(o.flex, s.b, plain, dS, grads.dcaptured)
            for n, part in parts:
                dcaptured[n] = dcaptured.get(n, 0) + part
        if dbias is not None:
            dbias[s.b, :, :s.seqlen_q, :s.seqlen_k] += dS
        if sinks is not None:
            dsinks += np.where(lse_s == -np.inf, 0, np.exp(sinks - top) * factor * (dlse_s - delta)).sum(axis=1)
        dS = p.rounded(dS * slope) * dS.dtype.type(problem.score.softmax_scale)
        dq[s.rows_q] = (dS @ k_s).swapaxes(0, 1)
        dk[s.rows_k] = _sum_group(problem, dS.swapaxes(1, 2) @ q_s)
        dv[s.rows_k] = _sum_group(problem, p.rounded(P * keep).swapaxes(1, 2) @ dout_s)
    grads.dq.numpy()[...], grads.dk.numpy()[...], grads.dv.numpy()[...] = dq, dk, dv
    if dbias is not None:
        axes = tuple(axis for axis in range(4) if grads.dbias.shape[axis] == 1)
        grads.dbias.numpy()[...] = dbias.sum(axis=axes, keepdims=True)
    if grads.dsinks is not None:
        grads.dsinks.numpy()[...] = dsinks
    for n, view in enumerate(grads.dcaptured or ()):
        if view is not None:
            view.numpy()[...] = dcaptured.get(n, 0)


def _sum_group(problem: Problem, x: Array) -> Array:
    """(num_heads, rows, dim) -> (rows, num_heads_k, dim): the query heads of a group share one key head."""
    total: Array = x.reshape(problem.num_heads_k, problem.group, *x.shape[1:]).sum(axis=1)
    return total.swapaxes(0, 1)
