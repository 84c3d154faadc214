"""Attention in float64 by its formula, forward and backward, and how far from it a right result may be. No code of the package.

The allowance is worked out element by element beside each value. It starts from the error of a score: eps times the sum of |q_i k_i| and
of the terms that are added, nothing where every product and sum is exact. Weights of keys whose scores may change places are not
determined, and their values' spread is allowed. Rounding of P and dS to the input's dtype, of sums, and of the result comes on top.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.tools.compare import EPS, NOTHING
from tests.tools.problems import NUMPY

from . import functions
from .spec import Spec
from .values import LARGEST

if TYPE_CHECKING:
    from .inputs import Inputs

Array = np.ndarray[Any, Any]
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}    # what a result may lose


class Value(NamedTuple):
    """What is right, how far off a right result may be, and the size of the terms that it is the sum of."""

    exact: Array
    allowed: Array
    size: Array


# ---------------------------------------------------------------- which rows and pairs
def rows(s: Spec, n: int) -> tuple[Any, Any, Any, Any]:
    """Of sequence n in q-like arrays and of its used keys in k-like ones; then of all its keys' rows, used or not."""
    if s.lengths_q is None:
        return n, n, n, n
    q0, k0 = sum(s.lengths_q[:n]), sum(s.lengths_k[:n])
    rows_q = slice(q0, q0 + s.lengths_q[n])
    return rows_q, slice(k0, k0 + s.used[n]), rows_q, slice(k0, k0 + s.lengths_k[n])


def lengths(s: Spec, n: int) -> tuple[int, int]:
    return (s.seqlen_q, s.seqlen_k) if s.lengths_q is None else (s.lengths_q[n], s.used[n])


def distance(s: Spec, n: int) -> Array:
    """(rows, keys): how far a key is behind the mask's diagonal."""
    seqlen_q, seqlen_k = lengths(s, n)
    shift = 0 if s.causal == "top_left" else seqlen_k - seqlen_q
    if s.diagonal is not None:
        shift = s.diagonal if isinstance(s.diagonal, int) else s.diagonal[n]
    return np.arange(seqlen_q)[:, None] + shift - np.arange(seqlen_k)


def visible(x: Inputs, n: int) -> Array:
    """(num_heads, rows, keys) of sequence n: the pairs that attend."""
    s, mask = x.spec, x.mask
    behind = distance(s, n)
    left, right = (None, None) if s.window is None else s.window
    right = 0 if s.causal else right
    attended: Array = np.ones((s.num_heads, *behind.shape), bool)
    if left is not None:
        attended &= behind <= left
    if right is not None:
        attended &= -behind <= right
    if mask is not None:
        attended &= np.broadcast_to(mask, s.full)[n, :, :behind.shape[0], :behind.shape[1]]
    if s.mask_mod is not None or s.block_mask is not None:
        attended &= functions.seen(s, n, x.held, *behind.shape)
    return attended


# ---------------------------------------------------------------- one sequence
@dataclass
class Sequence:
    """Of one sequence, heads first, key heads repeated, hidden places 0: q (num_heads, rows, head_dim), pairs (num_heads, rows, keys)."""

    q: Array
    k: Array
    v: Array
    attended: Array
    alibi: Array | None
    bias: Array | None
    sinks: Array | None                         # (num_heads, 1)
    keep: Array | None
    attends: Array                                 # (num_heads, rows, 1)
    change: Callable[[Array, Array, float], functions.Changed] | None       # score_mod


def sequence(x: Inputs, n: int, real: type) -> Sequence:
    s = x.spec
    rows_q, rows_k, _, _ = rows(s, n)
    seqlen_q, seqlen_k = lengths(s, n)
    attended = visible(x, n)
    group = s.num_heads // s.num_heads_k
    by_key, attends = np.asarray(attended.any(axis=1))[:, :, None], np.asarray(attended.any(axis=2))[:, :, None]
    q = np.where(attends, x.q[rows_q].swapaxes(0, 1).astype(real), 0)
    k, v = (np.where(by_key, np.repeat(a[rows_k].swapaxes(0, 1).astype(real), group, axis=0), 0) for a in (x.k, x.v))

    def of_pairs(a: Array | None) -> Array | None:
        return None if a is None else np.broadcast_to(a, s.full)[n, :, :seqlen_q, :seqlen_k]
    bias = of_pairs(x.bias)
    bias = None if bias is None else np.where(attended, bias.astype(real), 0)
    alibi = None
    if x.slopes is not None:
        slopes = np.broadcast_to(x.slopes, (s.sequences, s.num_heads))[n].astype(real)
        alibi = slopes[:, None, None] * np.abs(distance(s, n)).astype(real)
    keep = of_pairs(x.keep)
    return Sequence(q, k, v, attended, alibi, bias, None if x.sinks is None else x.sinks.astype(real)[:, None],
                    None if keep is None else keep.astype(real), attends,
                    None if s.score_mod is None else partial(functions.changed, s, n, x.held))


class Scores(NamedTuple):
    """Of all pairs; `error` is how far an engine's may be off, `tied` where it must equal the row's largest exactly.

    `slope` is that of the softcap; `mod` is what score_mod did.
    """

    x: Array
    slope: Array
    error: Array
    slope_error: Array
    tied: Array
    mod: functions.Changed | None


Common = list[tuple[Sequence, Scores]]          # of each sequence


def _lowest_bit(x: Array) -> Array:
    """The largest power of two that divides each number; inf for 0."""
    fraction, exponent = np.frexp(x)
    whole = np.abs(fraction * 2.0**53).astype(np.int64)
    return np.where(x == 0, np.inf, np.ldexp((whole & -whole).astype(np.float64), exponent - 53))


def steps(n: int) -> float:
    """Roundings of a sum of n terms, in units of eps: any order, tensor cores that cut off included."""
    return 4 + n / 8


def lost(a: Array, b: Array, smallest: float) -> Array:
    """Of a @ b^T by underflow: operands and products below the arithmetic's smallest normal number may count as 0."""
    return smallest * (np.abs(a).sum(axis=2)[:, :, None] + np.abs(b).sum(axis=2)[:, None, :] + a.shape[2])


def sized(s: Spec, x: Array) -> Array:
    """The size of operands for the rounding of their products' sums. Tensor cores cut sums off below the largest exponent that is stored,
    and a denormal number's is that of the smallest normal one.
    """
    least = {"float16": 2.0**-14, "bfloat16": 2.0**-126}.get(s.dtype, 0.0) if s.library != "numpy" else 0.0
    return np.where(x == 0, 0, np.maximum(np.abs(x), least))


def scores(s: Spec, scale: float, a: Sequence, eps: float, real: str) -> Scores:
    dot, size = a.q @ a.k.swapaxes(1, 2), sized(s, a.q) @ sized(s, a.k).swapaxes(1, 2)
    x = dot * scale
    error = abs(scale) * (steps(s.head_dim) * eps * size + lost(a.q, a.k, SMALLEST[real])) + 2 * eps * np.abs(x)
    unit = _lowest_bit(a.q).min(axis=2, initial=np.inf)[:, :, None] * _lowest_bit(a.k).min(axis=2, initial=np.inf)[:, None, :]
    exact = (size * eps <= unit) & (x.astype(real) == x) & (unit * min(abs(scale), 1) > SMALLEST[real])
    exact |= size == 0
    error = np.where(exact, 0, error)
    slope, slope_error = np.ones(()), np.zeros(())
    product = x
    if s.softcap is not None:
        y, e = x / s.softcap, error / s.softcap + 2 * eps * np.abs(x / s.softcap)
        tanh = np.tanh(y)
        slope, far = 1 / np.cosh(y) ** 2, 1 / np.cosh(np.maximum(np.abs(y) - e, 0)) ** 2
        # naively 1 - tanh**2 is off by eps, until tanh is 1 beyond doubt
        slope_error = np.minimum(0.8 * e, far) + 4 * eps * np.where(np.abs(y) > 11 if real == "float32" else np.abs(y) > 21, slope, 1)
        spread = np.maximum(np.abs(np.tanh(y + e) - tanh), np.abs(np.tanh(y - e) - tanh))
        x, error = s.softcap * tanh, s.softcap * spread
        error = error + 4 * eps * np.abs(x) + 2 * eps * min(s.softcap, 64.0)
        exact = exact & (np.abs(y) > 1e4)
    terms = eps * np.abs(x)
    if a.alibi is not None:
        x, terms = x - a.alibi, terms + eps * a.alibi
        exact = exact & (a.alibi == 0)
    if a.bias is not None:
        x, terms = x + a.bias, terms + eps * np.where(np.isfinite(a.bias), np.abs(a.bias), 0)
        exact = exact & (x.astype(real) == x)
    mod = None
    if a.change is not None:
        mod = a.change(x, error + terms, eps)
        x, terms, exact = mod.x, np.zeros(()), np.zeros_like(exact)
        error = mod.error
    x = np.where(a.attended, x, -np.inf)
    highest = x.max(axis=2, initial=-np.inf)[:, :, None]
    # the weight follows from the distance to the row's largest; both are rounded
    error = error + 4 * (terms + eps * np.where(np.isfinite(highest), np.abs(highest), 0)) + 8 * eps
    first = x.argmax(axis=2)[:, :, None] if x.shape[2] else np.zeros((*x.shape[:2], 0), np.int64)
    tied = exact & (x == highest) & np.isfinite(x) & (product == np.take_along_axis(product, first, 2))
    if a.bias is not None:
        tied &= a.bias == np.take_along_axis(a.bias, first, 2)
    # all that may compete with the largest must be exact too
    rival = a.attended & (x + error >= highest - error) & ~tied
    tied &= ~(rival & ~exact).any(axis=2)[:, :, None]
    return Scores(x, slope, np.where(tied, 8 * eps, error), slope_error, tied, mod)


def _largest(x: Array, sinks: Array | None) -> Array:
    """(num_heads, rows): the largest score of a row, its sink included; 0 where there is none."""
    highest = x.max(axis=2, initial=-np.inf)
    if sinks is not None:
        highest = np.maximum(highest, sinks)
    return np.asarray(np.where(np.isfinite(highest), highest, 0))


def logsumexp(x: Array, sinks: Array | None) -> Array:
    """(num_heads, rows)"""
    zero = _largest(x, sinks)
    total = np.exp(x - zero[:, :, None]).sum(axis=2)
    if sinks is not None:
        total = total + np.exp(sinks - zero)
    return np.asarray(zero + np.log(total))


def _weights(x: Array, lse: Array) -> Array:
    """exp(x - lse), at most 1; 0 in rows that attend nothing."""
    level = np.where(lse == -np.inf, np.inf, lse)[:, :, None]
    return np.where(x == -np.inf, 0, np.exp(np.minimum(x - level, 0)))


# ---------------------------------------------------------------- whole problems, element by element
class Rounding(NamedTuple):
    eps: float                                  # of the arithmetic
    operand: float                              # of P and dS where they are multiplied
    result: float
    least: float                                # absolute, of such an operand
    nothing: float                              # a probability that may count as 0
    real: str


def rounding(dtype: str, result: str | None = None) -> Rounding:
    """`result`: its dtype, None for the operands'."""
    real = "float64" if dtype == "float64" else "float32"
    low = dtype in ("float16", "bfloat16")
    # this file's own arithmetic is float64 too
    return Rounding(EPS[real] * (2 if real == "float64" else 1), EPS[dtype] if low else 0.0, EPS[result or dtype],
                    2.0**-24 if dtype == "float16" else 0.0, NOTHING[real], real)


@np.errstate(all="ignore")
def scored(x: Inputs) -> Common:
    """What the forward and the backward have in common."""
    s, r = x.spec, rounding(x.spec.dtype, x.spec.result)
    sequences = [sequence(x, n, np.float64) for n in range(s.sequences)]
    return [(a, scores(s, x.scale, a, r.eps, r.real)) for a in sequences]


@np.errstate(all="ignore")
def forward(x: Inputs, common: Common | None = None) -> dict[str, Value]:
    """out (as q, head_dim_v) and lse. common: `scored(x)`, if it is there already."""
    s, r = x.spec, rounding(x.spec.dtype, x.spec.result)
    shape = (*x.q.shape[:-1], s.head_dim_v)
    out = Value(*(np.zeros(shape) for _ in range(3)))
    lse = Value(np.full(x.lse_shape, -np.inf), np.zeros(x.lse_shape), np.zeros(x.lse_shape))
    for n, (a, f) in enumerate(scored(x) if common is None else common):
        at, at_lse = rows(s, n)[0], (np.s_[n] if not s.packed else np.s_[:, rows(s, n)[0]])
        sink_error = np.zeros(()) if a.sinks is None else 4 * r.eps * np.abs(a.sinks)
        # all from the row's largest: beside a huge one, log(n) would be lost
        zero = _largest(f.x, a.sinks)
        S, sinks = f.x - zero[:, :, None], None if a.sinks is None else a.sinks - zero
        error = np.where(f.tied & np.isfinite(S), 8 * r.eps * (1 + np.abs(S)), f.error)
        if s.call == "parts":                   # which are weighed by their lse alone
            error = error + 12 * r.eps * np.abs(zero)[:, :, None]
        level = logsumexp(S, sinks)
        low, high = (logsumexp(S + sign * error, None if sinks is None else sinks + sign * sink_error) for sign in (-1, 1))
        P, most, least = _weights(S, level), _weights(S + error, low), _weights(S - error, high)
        total = most.sum(axis=2)
        if sinks is not None:
            total = total + np.exp(np.minimum(sinks + sink_error - np.where(low == -np.inf, np.inf, low), 0))
        least = np.maximum(least, 1 - (total[:, :, None] - most))
        change = np.where(P > 0, np.maximum(most - P, P - least), most) + r.nothing * a.attended
        change = np.maximum(change, 0)
        keep: Array | float = 1.0 if a.keep is None else a.keep
        kept, sizes = P * keep, np.abs(a.v)
        exact, size = kept @ a.v, kept @ sizes
        off = (change * keep) @ sizes + np.abs(exact) * change.sum(axis=2)[:, :, None]
        off = off + (steps(a.k.shape[1]) * r.eps + r.operand) * size + r.least * ((keep * a.attended) @ sizes)
        off = off + r.result * np.abs(exact) + SMALLEST[s.dtype] * (1 + a.k.shape[1])
        for array, value in zip(out, (exact, off, size), strict=True):
            array[at] = value.swapaxes(0, 1)
        finite = np.isfinite(level)
        off = np.maximum(high - level, level - low) + r.eps * (4 * (np.abs(level) + np.abs(zero)) + steps(a.k.shape[1]))
        lse.exact[at_lse] = zero + level
        lse.allowed[at_lse], lse.size[at_lse] = np.where(finite, off, 0), np.where(finite, 1 + np.abs(zero + level), 0)
    return {"out": out, "lse": lse}


@np.errstate(all="ignore")
def backward(x: Inputs, out: Array, lse: Array, common: Common | None = None) -> dict[str, Value]:
    """dq, dk, dv, dbias and dsinks for out and lse as the call gave them; P = exp(S - lse), at most 1. common: as in `forward`.

    The reference takes an lse that is its own up to rounding as if it had not been rounded, so there scores count from the row's largest.
    """
    s, r = x.spec, rounding(x.spec.dtype, x.spec.result)
    dq, dk, dv = (Value(*(np.zeros(a.shape) for _ in range(3))) for a in (x.q, x.k, x.v))
    dbias = None if x.bias is None else Value(*(np.zeros(s.full) for _ in range(3)))
    dsinks = Value(*(np.zeros(s.num_heads) for _ in range(3)))
    dcaptured = [Value(*(np.zeros(y.shape) for _ in range(3))) for y in functions.arrays_of("score_mod", x.held)]
    real = np.float64
    for n, (a, f) in enumerate(scored(x) if common is None else common):
        rows_q, rows_k, _, _ = rows(s, n)
        at_lse = np.s_[n] if not s.packed else np.s_[:, rows_q]
        alive = a.attends & (lse[at_lse] != -np.inf)[:, :, None] if a.sinks is None else a.attends
        level = lse[at_lse].astype(real)
        dout, o = (np.where(a.attends, y[rows_q].swapaxes(0, 1).astype(real), 0) for y in (x.dout, out))
        overflowed = ~np.isfinite(o).all(axis=2)[:, :, None]        # rows whose delta is infinite or NaN
        o = np.where(overflowed, 0, o)
        dlse = np.zeros(level.shape) if x.dlse is None else x.dlse[at_lse].astype(real)
        sinks = a.sinks
        if s.engine == "reference":
            zero = _largest(f.x, sinks)
            f, sinks = f._replace(x=f.x - zero[:, :, None]), None if sinks is None else sinks - zero
            level = logsumexp(f.x, sinks)
        # lse's rounding, until it is that of a key: then a tie's distance to it is one exact subtraction
        off_lse = 4 * r.eps * np.where(np.isfinite(level), np.abs(level), 0)[:, :, None]
        tied = 8 * r.eps * (1 + np.abs(f.x - level[:, :, None])) + np.where(off_lse < 4, off_lse, 0)
        error = np.where(f.tied, tied, f.error + off_lse)
        if s.engine == "reference" and s.call == "parts":       # beside a huge level, the whole's lse is also that of a part
            error = error + 12 * r.eps * np.abs(np.where(np.isfinite(zero), zero, 0))[:, :, None]
        P = np.where(alive, _weights(f.x, level), 0)
        off_P = np.where(alive, np.maximum(_weights(f.x + error, level) - P, P - _weights(f.x - error, level)), 0)
        off_P = off_P + np.where(f.x > -np.inf, r.nothing, 0)
        keep: Array | float = 1.0 if a.keep is None else a.keep
        delta, delta_size = (dout * o).sum(axis=2), np.abs(dout * o).sum(axis=2)
        dP, dP_size = dout @ a.v.swapaxes(1, 2) * keep, np.abs(dout) @ np.abs(a.v).swapaxes(1, 2) * keep
        fall = (dlse - delta)[:, :, None]
        off_fall = r.eps * (steps(s.head_dim_v) * delta_size + np.abs(dlse) + np.abs(delta))[:, :, None]
        g = np.where(a.attended, dP + fall, 0)
        dS = P * g
        off = off_P * np.abs(g) + (P + off_P) * (steps(s.head_dim_v) * r.eps * dP_size + off_fall + 4 * r.eps * (np.abs(dP) + np.abs(fall)))
        off = off + (r.operand + 4 * r.eps) * np.abs(dS) + r.least * a.attended
        size = P * (np.abs(dP) + np.abs(fall))
        no_gradient = overflowed & a.attended
        if f.mod is not None:
            dS, off, size = _through(f.mod, dcaptured, dS, off, size, no_gradient)
        if dbias is not None:
            for array, value in zip(dbias, (dS, np.where(no_gradient, np.inf, off), size), strict=True):
                array[n, :, :value.shape[1], :value.shape[2]] = value
        if sinks is not None:
            level_s = np.where(level == -np.inf, np.inf, level)
            weight = np.exp(np.minimum(sinks - level_s, 0))
            wide = r.eps * (4 * np.abs(sinks) + 4 * np.where(np.isfinite(level), np.abs(level), 0) + 8)
            most, least = (np.exp(np.minimum(sinks - level_s + sign * wide, 0)) for sign in (1, -1))
            off_w = np.maximum(most - weight, weight - least)
            off_sinks = off_w * np.abs(fall[:, :, 0]) + (weight + off_w) * off_fall[:, :, 0]
            for array, value in zip(dsinks, (weight * fall[:, :, 0], np.where(overflowed[:, :, 0], np.inf, off_sinks),
                                             weight * np.abs(fall[:, :, 0])), strict=True):
                array[...] += value.sum(axis=1)
        off = off * f.slope + np.abs(dS) * f.slope_error + off * f.slope_error
        size, dS = size * f.slope, dS * f.slope
        # dS as an operand of tensor cores: in float16 it is infinite there, and inf * 0 NaN
        beyond = no_gradient | (np.abs(dS) + 4 * off > (LARGEST["float16"] if _half_operands(s) and s.dtype == "float16" else np.inf))
        scale, many_k, many_q = abs(x.scale), steps(a.k.shape[1]) * r.eps, steps(a.q.shape[1]) * r.eps
        k_size, q_size = np.abs(a.k), np.abs(a.q)
        flip = (0, 2, 1)
        # a large scale, which comes last, shows what underflow lost
        off_dq = (off + many_k * np.abs(dS)) @ k_size + lost(dS, a.k.transpose(flip), SMALLEST[r.real]) * a.attends
        off_dq = np.where(beyond.any(axis=2)[:, :, None], np.inf, scale * off_dq)
        _add(dq, rows_q, x.scale * (dS @ a.k), off_dq, scale * (size @ k_size), 1)
        off_t, dS_t = off.transpose(flip), dS.transpose(flip)
        group = s.num_heads // s.num_heads_k
        by_key = a.attended.any(axis=1)[:, :, None]
        off_dk = (off_t + many_q * np.abs(dS_t)) @ q_size + lost(dS_t, a.q.transpose(flip), SMALLEST[r.real]) * by_key
        off_dk = np.where(beyond.any(axis=1)[:, :, None], np.inf, scale * off_dk)
        _add(dk, rows_k, x.scale * (dS_t @ a.q), off_dk, scale * (size.transpose(flip) @ q_size), group)
        kept, off_kept = P * keep, (off_P + r.operand * P + r.least * a.attended + many_q * P) * keep
        d_size = np.abs(dout)
        _add(dv, rows_k, kept.transpose(flip) @ dout, off_kept.transpose(flip) @ d_size, kept.transpose(flip) @ d_size, group)
    found = {"dq": dq, "dk": dk, "dv": dv}
    if dbias is not None and x.bias is not None:
        axes = tuple(range(4 - x.bias.ndim)) + tuple(4 - x.bias.ndim + i for i, n in enumerate(x.bias.shape) if n == 1)
        exact, off, size = (y.sum(axis=axes, keepdims=True).reshape(x.bias.shape) for y in dbias)
        count = int(np.prod(s.full)) // max(exact.size, 1)
        off = off + steps(count) * r.eps * size + EPS[s.bias_dtype] * np.abs(exact) + SMALLEST[s.bias_dtype]
        found["dbias"] = Value(exact, off, size)
    for number, value in enumerate(dcaptured):
        dtype = x.held[f"score_mod{number}"].dtype.name
        off = value.allowed + steps(int(np.prod(s.full)) // value.size.size) * r.eps * value.size
        found[f"dcaptured{number}"] = value._replace(allowed=off + EPS[dtype] * np.abs(value.exact) + SMALLEST[dtype])
    if x.sinks is not None:
        rows_count = int(np.prod(x.lse_shape)) // max(s.num_heads, 1)
        found["dsinks"] = dsinks._replace(allowed=dsinks.allowed + steps(rows_count) * r.eps * dsinks.size + 2.0**-120)
    for name in ("dq", "dk", "dv"):
        value = found[name]
        least = SMALLEST[s.dtype] * (1 + max(s.seqlen_q, s.seqlen_k, *s.lengths_k, *(s.lengths_q or ())))
        found[name] = value._replace(allowed=value.allowed + r.result * np.abs(value.exact) + least)
    return found


def _half_operands(s: Spec) -> bool:
    """Whether dS is a number of 16 bits. On a CPU and on plain threads it is a float32."""
    return s.library != "numpy" and s.engine != "simt"


def _through(mod: functions.Changed, dcaptured: list[Value], dS: Array, off: Array, size: Array, no_gradient: Array
             ) -> tuple[Array, Array, Array]:
    """dS, how far it may be off and its size, before score_mod. Adds to the gradients of the function's arrays, which pairs whose dS is
    `no_gradient` take with them."""
    def error(slope: Any, slope_error: Any) -> Array:
        return np.where(no_gradient, np.inf, off * np.abs(slope) + (np.abs(dS) + off) * slope_error)
    for to, (index, slope, slope_error) in zip(dcaptured, mod.parts, strict=True):
        for array, value in zip(to, (dS * slope, error(slope, slope_error), size * np.abs(slope)), strict=True):
            if index:
                np.add.at(array, tuple(np.broadcast_to(y, value.shape) for y in index), value)
            else:
                array += value.sum()
    return dS * mod.slope, error(mod.slope, mod.slope_error), size * np.abs(mod.slope)


def _add(to: Value, at: Any, exact: Array, off: Array, size: Array, group: int) -> None:
    for array, value in zip(to, (exact, off, size), strict=True):
        array[at] = value.reshape(array.shape[-2], group, *value.shape[1:]).sum(axis=1).swapaxes(0, 1)


@np.errstate(all="ignore")
def merged(outs: list[Array], lses: list[Array], dtype: str, result: str) -> dict[str, Value]:
    """merge_states of canonical outs (..., rows, num_heads, head_dim_v) and lses (..., num_heads, rows); infinite lses are empty."""
    r = rounding(dtype, result)
    levels = np.stack([np.where(np.isinf(y), -np.inf, y.astype(np.float64)) for y in lses])
    highest = levels.max(axis=0)
    zero = np.where(highest == -np.inf, 0, highest)
    weights = np.exp(levels - zero)
    total = weights.sum(axis=0)
    lse = zero + np.log(total)
    weights = weights / np.where(total == 0, 1, total)
    off = weights * 4 * r.eps * (2 + np.where(weights > 0, np.abs(levels - zero), 0)) + np.where(levels > -np.inf, r.nothing, 0)
    parts = np.stack([np.where(np.isinf(y).swapaxes(-1, -2)[..., None], 0, o.astype(np.float64)) for o, y in zip(outs, lses, strict=True)])
    weights, off = weights.swapaxes(-1, -2)[..., None], off.swapaxes(-1, -2)[..., None]
    exact, size = (weights * parts).sum(axis=0), (weights * np.abs(parts)).sum(axis=0)
    allowed = (off * np.abs(parts)).sum(axis=0) + steps(len(outs)) * r.eps * size + r.result * np.abs(exact) + SMALLEST[dtype]
    finite = np.where(np.isfinite(lse), np.abs(lse), 0)
    return {"out": Value(exact, allowed, size), "lse": Value(lse, r.eps * (4 * finite + 8), finite)}


# ---------------------------------------------------------------- the naive rival
@np.errstate(all="ignore")
def naive(x: Inputs, out: Array | None = None, lse: Array | None = None) -> dict[str, Array]:
    """The same in float32 with P and dS rounded to the input's dtype; gradients where out and lse are given."""
    s, real = x.spec, np.float32
    low = NUMPY[s.dtype] if s.dtype in ("float16", "bfloat16") else np.dtype(real)

    def rounded(y: Array) -> Array:
        return y.astype(low).astype(real)
    found = {"out": np.zeros((*x.q.shape[:-1], s.head_dim_v), real), "lse": np.full(x.lse_shape, -np.inf, real)}
    if out is not None:
        found |= {name: np.zeros(a.shape, real) for name, a in (("dq", x.q), ("dk", x.k), ("dv", x.v))}
        found |= {"dbias": np.zeros(s.full, real), "dsinks": np.zeros(s.num_heads, real)}
    for n in range(s.sequences):
        a = sequence(x, n, real)
        rows_q, rows_k, _, _ = rows(s, n)
        at_lse = np.s_[n] if not s.packed else np.s_[:, rows_q]
        S, slope = a.q @ a.k.swapaxes(1, 2) * real(x.scale), np.ones((), real)
        if s.softcap is not None:
            tanh = np.tanh(S / real(s.softcap))
            S, slope = tanh * real(s.softcap), 1 - tanh * tanh
        S = S if a.alibi is None else S - a.alibi
        S = S if a.bias is None else S + a.bias
        S = np.where(a.attended, S, real(-np.inf))
        keep: Any = real(1) if a.keep is None else a.keep
        if out is None or lse is None:
            zero = _largest(S, a.sinks)
            S = S - zero[:, :, None]
            level = logsumexp(S, None if a.sinks is None else a.sinks - zero)
            found["lse"][at_lse] = zero + level
            found["out"][rows_q] = (rounded(_weights(S, level) * keep) @ a.v).swapaxes(0, 1)
            continue
        level = lse[at_lse].astype(real)
        dout, o = (np.where(a.attends, y[rows_q].swapaxes(0, 1).astype(real), 0) for y in (x.dout, out))
        overflowed = ~np.isfinite(o).all(axis=2)[:, :, None]        # rows whose delta is infinite or NaN
        o = np.where(overflowed, 0, o)
        dlse = real(0) if x.dlse is None else x.dlse[at_lse].astype(real)
        P = _weights(S, level)
        fall = (dlse - (dout * o).sum(axis=2))[:, :, None]
        dS = np.where(a.attended, P * (dout @ a.v.swapaxes(1, 2) * keep + fall), 0)
        found["dbias"][n, :, :dS.shape[1], :dS.shape[2]] = dS
        if a.sinks is not None:
            found["dsinks"] += (np.exp(a.sinks - np.where(level == -np.inf, np.inf, level)) * fall[:, :, 0]).sum(axis=1)
        dS = rounded(dS * slope) * real(x.scale)
        group = s.num_heads // s.num_heads_k
        for name, at, y, shared in (("dq", rows_q, dS @ a.k, 1), ("dk", rows_k, dS.swapaxes(1, 2) @ a.q, group),
                                    ("dv", rows_k, rounded(P * keep).swapaxes(1, 2) @ dout, group)):
            found[name][at] = y.reshape(found[name].shape[-2], shared, *y.shape[1:]).sum(axis=1).swapaxes(0, 1)
    if out is not None and x.bias is not None:
        axes = tuple(range(4 - x.bias.ndim)) + tuple(4 - x.bias.ndim + i for i, m in enumerate(x.bias.shape) if m == 1)
        found["dbias"] = found["dbias"].sum(axis=axes, keepdims=True).reshape(x.bias.shape)
    return found
