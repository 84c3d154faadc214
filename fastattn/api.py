"""The public functions: arguments -> Views -> Problem -> engine -> outputs in the caller's own library and layout.

Common keywords of the four attention functions (shapes for layout="bshd"; "bhsd" swaps heads and sequence):

causal         False; True or "bottom_right": key j <= d; "top_left": the same with the other diagonal. d, the key on which row i stands, is
               i + seqlen_k - seqlen_q, with "top_left" i
window         (left, right) keys around the diagonal d, inclusive, None = no limit
softmax_scale  default 1 / sqrt(head_dim)
softcap        scores become softcap * tanh(score / softcap)
alibi_slopes   (num_heads,) or (batch, num_heads): adds -slope * |d - j|
bias           additive, broadcasts to (batch, num_heads, seqlen_q, seqlen_k); q's dtype or float32; -inf allowed
mask           bool, same shapes, True = may attend. Two axes are always (seqlen_q, seqlen_k): a mask of padding keys (batch, seqlen_k) is
               given as mask[:, None, None, :], or it counts as rows of queries where batch == seqlen_q
sinks          (num_heads,) logits that join the softmax's denominator only
dropout_p, seed, offset   Philox dropout of the probabilities, see philox.py; the backward takes the same three. dropout_p counts in
               steps of 1 / 65536: below 7.6e-6, half a step, nothing is dropped
stream         CUDA arrays only: all work of the call is put on it, behind what q's library has on its current stream; an int,
               or a stream of cuda.core, torch, CuPy, Numba, or anything with __cuda_stream__. None: the current stream of
               q's library where it can be known (torch, CuPy; the one that q's __cuda_array_interface__ names), else the legacy
               default stream. The host never waits, so results are ready on that stream, not yet when a call returns.
engine         None chooses (registry.py says how); "cpu", "gpu", "reference", "sm90", "sm80", "simt" or a registered engine's name forces
               one; `engines()` lists them and `explain` says which one a call takes, and why

CUDA: all arrays of a call are on q's device, lengths and slopes too, and results come in q's library (JAX and others by
DLPack; a DeviceArray, which speaks DLPack, where q has no library). Lengths on the device are not read, so they are not
checked, and max_seqlen_q and max_seqlen_k are the totals unless given. In a CUDA graph capture results come from torch's or
CuPy's pools, or are given as `out`.

Options (causal to offset, max_seqlen_q, max_seqlen_k) are values: a number may come as a NumPy scalar or a 0-d array or tensor in host
memory, and is what that holds when the call is made. On a device it is refused, because the host would wait, and so is a tensor that
requires grad while torch records.

Errors: ValueError and TypeError for wrong arguments, UnsupportedError where no engine has the combination, ImportError
where the compiled CPU engine or the packages of the GPU engine are missing.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Never

import numpy as np

from . import repeat
from .buffers import Grads, Output, View, allocate, overlap, resolve, small, view, written
from .engine import load
from .errors import message
from .memo import Recent
from .problem import Check, Operands, Options, Problem, check_array, make_dropout, problem_of, read_options
from .registry import choose
from .signature import strict, unknown_arguments
from .streams import Stream

Layout = Literal["bshd", "bhsd"]
Packed = Literal["thd"]
_problems: Recent[Any, Problem] = Recent()


# ---------------------------------------------------------------- the four functions
@strict
def attention(q: Any, k: Any, v: Any, *more: Never, causal: bool | str = False, window: tuple[int | None, int | None] | None = None,
              softmax_scale: float | None = None, softcap: float | None = None, alibi_slopes: Any = None, bias: Any = None,
              mask: Any = None, sinks: Any = None, dropout_p: float = 0.0, seed: int | None = None, offset: int = 0,
              layout: Layout = "bshd", out: Any = None, return_lse: bool = False, stream: Any = None,
              engine: str | None = None, **unknown: Never) -> Any:
    """softmax(scores) @ v: q (batch, seqlen_q, num_heads, head_dim), k (batch, seqlen_k, num_heads_k, head_dim) and
    v (batch, seqlen_k, num_heads_k, head_dim_v) -> out (batch, seqlen_q, num_heads, head_dim_v), or (out, lse).

    lse is the natural log of the softmax's denominator, (batch, num_heads, seqlen_q), float32 (float64 for float64
    input). `out` may be given and is returned; a call that raises may have written parts of it. Other keywords and errors:
    see this module's docstring.
    """
    if more or unknown:
        raise unknown_arguments(attention, more, unknown)
    call, key = "attention", None
    if type(return_lse) is not bool:
        return_lse = bool(return_lse)
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset)
    if bias is None and mask is None and alibi_slopes is None and sinks is None and out is None and stream is None:
        key, known = repeat.look(q, k, v, (options, layout, return_lse, engine))
        if known is not None:
            result = known.again(q, k, v, call, engine)
            if result is not None:
                return result
    on, o = _operands(call, layout, stream, q, k, v, bias, mask, alibi_slopes, sinks)
    return _forward(call, layout, engine, options, on, o, q, out, return_lse, key)


@strict
def attention_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *more: Never, causal: bool | str = False,
                       window: tuple[int | None, int | None] | None = None, softmax_scale: float | None = None,
                       softcap: float | None = None, alibi_slopes: Any = None, bias: Any = None, mask: Any = None,
                       sinks: Any = None, dropout_p: float = 0.0, seed: int | None = None, offset: int = 0,
                       layout: Layout = "bshd", dlse: Any = None, need_dbias: bool = False, deterministic: bool = False,
                       stream: Any = None, engine: str | None = None, **unknown: Never) -> Grads:
    """Grads(dq, dk, dv, dbias, dsinks) of `attention` for dout, and dlse where lse was used too; out and lse as it gave them.

    Each gradient has its input's shape, layout and dtype. dbias (bias's own shape) only when need_dbias, dsinks only when
    sinks were given. `deterministic` asks for the same bits in every run, at a price on the GPU; the CPU engine gives them always.
    """
    if more or unknown:
        raise unknown_arguments(attention_backward, more, unknown)
    call = "attention_backward"
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset)
    on, o = _operands(call, layout, stream, q, k, v, bias, mask, alibi_slopes, sinks)
    return _backward(call, layout, engine, options, on, o, (dout, q, k, v, out, lse, dlse, bias, sinks), need_dbias, deterministic)


@strict
def attention_varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *more: Never, max_seqlen_q: int | None = None,
                     max_seqlen_k: int | None = None, seqused_k: Any = None, causal: bool | str = False,
                     window: tuple[int | None, int | None] | None = None, softmax_scale: float | None = None,
                     softcap: float | None = None, alibi_slopes: Any = None, bias: Any = None, mask: Any = None,
                     sinks: Any = None, dropout_p: float = 0.0, seed: int | None = None, offset: int = 0,
                     layout: Packed = "thd", out: Any = None, return_lse: bool = False, stream: Any = None,
                     engine: str | None = None, **unknown: Never) -> Any:
    """`attention` of sequences packed along one axis: q (total_q, num_heads, head_dim), k and v (total_k, num_heads_k, ...)
    -> out (total_q, num_heads, head_dim_v), or (out, lse) with lse (num_heads, total_q).

    Sequence n has rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] of q and the same of k; int32 or int64, (sequences + 1,).
    seqused_k (sequences,): only that many of its keys exist. bias and mask broadcast to (sequences, num_heads,
    max_seqlen_q, max_seqlen_k) and are indexed inside each sequence. Rows of no sequence: out 0, lse -inf.
    """
    if more or unknown:
        raise unknown_arguments(attention_varlen, more, unknown)
    call = "attention_varlen"
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q, max_seqlen_k)
    on, o = _operands(call, layout, stream, q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, True)
    return _forward(call, layout, engine, options, on, o, q, out, return_lse)


@strict
def attention_varlen_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *more: Never,
                              max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, seqused_k: Any = None,
                              causal: bool | str = False, window: tuple[int | None, int | None] | None = None,
                              softmax_scale: float | None = None, softcap: float | None = None, alibi_slopes: Any = None,
                              bias: Any = None, mask: Any = None, sinks: Any = None, dropout_p: float = 0.0,
                              seed: int | None = None, offset: int = 0, layout: Packed = "thd", dlse: Any = None,
                              need_dbias: bool = False, deterministic: bool = False, stream: Any = None,
                              engine: str | None = None, **unknown: Never) -> Grads:
    """Grads of `attention_varlen`; see attention_backward. Rows of no sequence and keys past seqused_k have gradient 0."""
    if more or unknown:
        raise unknown_arguments(attention_varlen_backward, more, unknown)
    call = "attention_varlen_backward"
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q, max_seqlen_k)
    on, o = _operands(call, layout, stream, q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, True)
    return _backward(call, layout, engine, options, on, o, (dout, q, k, v, out, lse, dlse, bias, sinks), need_dbias, deterministic)


# ---------------------------------------------------------------- the flow they share
def _operands(call: str, layout: str, stream: Any, q: Any, k: Any, v: Any, bias: Any, mask: Any, alibi_slopes: Any, sinks: Any,
              cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, seqused_k: Any = None,
              packed: bool = False) -> tuple[Stream | None, Operands]:
    """The call's stream (None: host memory) and canonical Views of every array argument."""
    if layout not in (("thd",) if packed else ("bshd", "bhsd")):
        other = "attention" if packed else "attention_varlen takes packed arrays, layout 'thd'"
        raise ValueError(message(call, "layout", f"is {layout!r}", "'thd'" if packed else "'bshd' or 'bhsd'",
                                 f"{other} takes 'bshd' and 'bhsd'" if packed else other))
    on = resolve(stream, q, call)
    q_view, k_view, v_view = view(q, call, "q", on), view(k, call, "k", on), view(v, call, "v", on)
    if layout == "bhsd":
        q_view, k_view, v_view = _canonical(q_view, layout), _canonical(k_view, layout), _canonical(v_view, layout)
    if bias is None and mask is None and alibi_slopes is None and sinks is None and not packed:
        return on, Operands(q_view, k_view, v_view)
    floats = "float64" if q_view.dtype == "float64" else "float32"
    lengths: tuple[View | None, ...] = (None, None, None)
    if packed:
        lengths = (small(cu_seqlens_q, None, call, "cu_seqlens_q", on), small(cu_seqlens_k, None, call, "cu_seqlens_k", on),
                   None if seqused_k is None else small(seqused_k, None, call, "seqused_k", on))
    return on, Operands(q_view, k_view, v_view, None if bias is None else view(bias, call, "bias", on),
                        None if mask is None else view(mask, call, "mask", on),
                        None if alibi_slopes is None else small(alibi_slopes, floats, call, "alibi_slopes", on),
                        None if sinks is None else small(sinks, floats, call, "sinks", on), *lengths)


def _canonical(x: View, layout: str) -> View:
    """(batch, heads, seqlen, dim) <-> (batch, seqlen, heads, dim); a wrong rank is left for make_problem to report."""
    if layout != "bhsd" or len(x.shape) != 4:
        return x
    (batch, heads, seqlen, dim), (a, b, c, d) = x.shape, x.strides
    return View(x.ptr, (batch, seqlen, heads, dim), (a, c, b, d), x.dtype, x.device, x.owner, x.readonly)


def _problem(call: str, layout: str, o: Operands, options: Options) -> tuple[Problem, Operands]:
    """problem_of, remembered where nothing but shapes, dtypes, devices and options decides: 1 us for 6, and an engine may know a Problem
    again by its identity."""
    key: Any = None
    if o.plain and not (o.packed and o.q.device[0] == "cpu"):
        q, k, v = o.q, o.k, o.v
        key = (call, options, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
        if o.packed:
            key += tuple([(x.shape, x.dtype, x.device) for x in (o.cu_seqlens_q, o.cu_seqlens_k, o.seqused_k) if x is not None])
        found = _problems.get(key)
        if found is not None:
            return found, o
    try:
        problem, o = problem_of(call, o, options)
    except (TypeError, ValueError) as error:
        if layout == "bhsd":
            error.add_note("Shapes in this message are in the order (batch, seqlen, num_heads, head_dim).")
        raise
    if key is not None:
        _problems[key] = problem
    return problem, o


def _forward(call: str, layout: str, engine: str | None, options: Options, on: Stream | None, o: Operands, q: Any, out: Any,
             return_lse: bool, key: Any = None) -> Any:
    problem, ready = _problem(call, layout, o, options)
    shape = _swapped(problem.out_shape, layout)
    given = None if out is None else _given_out(call, out, shape, problem, o, on)
    chosen = choose(call, engine, o.q.device)
    output = allocate(q, shape, problem.dtype, on) if given is None else given
    lse = allocate(q, problem.lse_shape, problem.lse_dtype, on) if return_lse else None
    place, lse_place = _canonical(output.view, layout), None if lse is None else lse.view
    chosen.forward(problem, ready, place, lse_place, None if on is None else on.handle)
    if key is not None and on is not None:
        repeat.remember(key, chosen, problem, ready, place, shape, lse_place, q)
    return output.finish() if lse is None else (output.finish(), lse.finish())


def _given_out(call: str, out: Any, shape: tuple[int, ...], problem: Problem, o: Operands, on: Stream | None) -> Output:
    """A caller's `out`: the right array, writable, and sharing no element with an input that is still being read."""
    place = view(out, call, "out", on)
    check_array(call, "out", place, shape, problem.dtype, o.q.device, output=True)
    for name in ("q", "k", "v", "bias", "mask", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
        x = getattr(o, name)
        if x is not None and overlap(place, x):
            raise ValueError(message(call, "out", f"shares memory with {name}", "memory of its own", "out=None allocates it"))
    return Output(place, out, written(out))


def _backward(call: str, layout: str, engine: str | None, options: Options, on: Stream | None, o: Operands, arrays: tuple[Any, ...],
              need_dbias: bool, deterministic: bool) -> Grads:
    dout, q, k, v, out, lse, dlse, bias, sinks = arrays
    problem, ready = _problem(call, layout, o, options)
    if need_dbias and bias is None:
        raise ValueError(message(call, "need_dbias", "is True", "a bias, whose gradient it asks for", "pass bias= or need_dbias=False"))
    shape, device = _swapped(problem.out_shape, layout), o.q.device
    views = []
    for name, x, x_shape, dtype in (("dout", dout, shape, problem.dtype), ("out", out, shape, problem.dtype),
                                    ("lse", lse, problem.lse_shape, problem.lse_dtype)):
        views.append(view(x, call, name, on))
        check_array(call, name, views[-1], x_shape, dtype, device)
    dlse_view = None if dlse is None else view(dlse, call, "dlse", on)
    if dlse_view is not None:
        check_array(call, "dlse", dlse_view, problem.lse_shape, problem.lse_dtype, device)
    chosen = choose(call, engine, device)
    dq, dk, dv = [allocate(x, _swapped(x_view.shape, layout), x_view.dtype, on) for x, x_view in ((q, o.q), (k, o.k), (v, o.v))]
    dbias = allocate(bias, o.bias.shape, o.bias.dtype, on) if need_dbias and o.bias is not None else None
    dsinks = None
    if o.sinks is not None:
        dsinks = allocate(q if isinstance(sinks, (list, tuple)) else sinks, o.sinks.shape, o.sinks.dtype, on)
    places = Grads(_canonical(dq.view, layout), _canonical(dk.view, layout), _canonical(dv.view, layout),
                   None if dbias is None else _four_axes(dbias.view), None if dsinks is None else dsinks.view)
    chosen.backward(problem, ready, _canonical(views[0], layout), _canonical(views[1], layout), views[2], dlse_view, places,
                    None if on is None else on.handle, bool(deterministic))
    return Grads(dq.finish(), dk.finish(), dv.finish(), None if dbias is None else dbias.finish(),
                 None if dsinks is None else dsinks.finish())


def _swapped(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Canonical shape <-> the caller's."""
    return (shape[0], shape[2], shape[1], shape[3]) if layout == "bhsd" else shape


def _four_axes(x: View) -> View:
    return x.broadcast_to((1,) * (4 - len(x.shape)) + x.shape)


# ---------------------------------------------------------------- helpers for callers
def dropout_mask(batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, *, dropout_p: float, seed: int | None,
                 offset: int = 0) -> np.ndarray[Any, Any]:
    """The exact mask a call used or would use: (batch, num_heads, seqlen_q, seqlen_k) bool, True = kept.

    Packed calls: entry n is sequence n, its first seqlen rows and columns.
    """
    from .philox import keep_mask

    check = Check("dropout_mask")
    shape = [check.integer(name, n, 0, 2**31 - 1) for name, n in (("batch", batch), ("num_heads", num_heads), ("seqlen_q", seqlen_q),
                                                                 ("seqlen_k", seqlen_k))]
    options = read_options(check.call, False, None, None, None, dropout_p, seed, offset)
    dropout = make_dropout(check, options.dropout_p, options.seed, options.offset)
    if dropout is None:
        return np.ones(shape, bool)
    return keep_mask(dropout, range(shape[0]), shape[1], shape[2], shape[3])


def merge_states(outs: Sequence[Any], lses: Sequence[Any], *, layout: Literal["bshd", "bhsd", "thd"] = "bshd",
                 stream: Any = None) -> tuple[Any, Any]:
    """(out, lse) of attention over all keys from partial results over disjoint keys, one out and lse each, on one device.

    out = sum(exp(lse_n - lse) * out_n); a part that saw nothing (lse -inf, or +inf, which is how FlashAttention marks it) adds nothing,
    whatever its out holds. Give sinks to one of the parts only. `stream`: as for attention, CUDA arrays only.
    Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    call, check = "merge_states", Check("merge_states")
    if layout not in ("bshd", "bhsd", "thd"):
        raise check.value("layout", f"is {layout!r}", "'bshd', 'bhsd' or 'thd'")
    if len(outs) == 0 or len(outs) != len(lses):
        raise check.value("lses", f"has {len(lses)} parts", f"one for each of at least one out, {len(outs)}")
    on = resolve(stream, outs[0], call)
    out_views = [_canonical(view(x, call, f"outs[{n}]", on), layout) for n, x in enumerate(outs)]
    lse_views = [view(x, call, f"lses[{n}]", on) for n, x in enumerate(lses)]
    first, rank = out_views[0], 3 if layout == "thd" else 4
    if len(first.shape) != rank:
        raise check.value("outs[0]", f"has shape {first.shape}", f"{rank} axes for layout {layout!r}")
    check.dtype("outs[0]", first, ("float32", "float64", "float16", "bfloat16"))
    compute, lse_shape = "float64" if first.dtype == "float64" else "float32", (*first.shape[:-3], first.shape[-2], first.shape[-3])
    for n, (out, lse) in enumerate(zip(out_views, lse_views, strict=True)):
        check_array(call, f"outs[{n}]", out, first.shape, first.dtype, first.device)
        check_array(call, f"lses[{n}]", lse, lse_shape, compute, first.device)
    if on is not None:
        merge = load("gpu", call).merge_states
        result, lse_result = allocate(outs[0], _swapped(first.shape, layout), first.dtype, on), allocate(lses[0], lse_shape, compute, on)
        merge(out_views, lse_views, _canonical(result.view, layout), lse_result.view, on.handle)
        return result.finish(), lse_result.finish()
    result = allocate(outs[0], _swapped(first.shape, layout), first.dtype)
    lse_result = allocate(lses[0], lse_shape, compute)
    _merge(out_views, lse_views, _canonical(result.view, layout), lse_result.view)
    return result.finish(), lse_result.finish()


@np.errstate(all="ignore")
def _merge(outs: list[View], lses: list[View], out: View, lse: View) -> None:
    parts = [np.where(x.numpy() == np.inf, -np.inf, x.numpy()) for x in lses]
    peak = np.maximum.reduce(parts)
    peak = np.where(peak == -np.inf, 0, peak)
    weights = [np.exp(part - peak) for part in parts]
    total = sum(weights)
    divisor, merged = np.where(total == 0, 1, total), np.zeros(out.shape, lse.dtype)
    for x, weight in zip(outs, weights, strict=True):       # of sum 1: what is finite stays finite
        share = (weight / divisor).swapaxes(-1, -2)[..., None]
        merged += np.where(share == 0, 0, share * x.numpy().astype(lse.dtype))
    out.numpy()[...] = merged
    lse.numpy()[...] = peak + np.log(total)
