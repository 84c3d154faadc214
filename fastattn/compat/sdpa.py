"""torch.nn.functional.scaled_dot_product_attention for any array, and its backward as a function.

Shapes. N... is any number of leading batch axes, none too; they broadcast as torch's do. H is the number of heads.

    query (N..., H, L, E)    key (N..., H or H_k, S, E)    value (N..., H or H_v, S, E_v)    attn_mask to (N..., H, L, S)
    out   (N..., H, L, E_v)  lse (N..., H, L)

(H, L, E) is one batch entry, (L, E) one head. E and E_v are from 1 to 256 on every engine, independent, and need not be
multiples of 8.

The rules are those of torch 2.13:

- is_causal is aligned top-left, also where L != S.
- In a boolean mask True may attend. A float mask, of query's dtype or float32, is added to the scores.
- A row that attends nothing gives 0, not NaN.
- Fewer key heads than query heads need enable_gqa. A single head broadcasts without it.

query, key, value and attn_mask are read in place. There are two exceptions, where the array's own reshape copies:
leading axes that cannot be merged in place, and arrays of which some leading axes are broadcast and others are not.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

from ..types import A, Array, Integer, Number
from .arrays import Shape, broadcast_shape, count, fit, fold, is_boolean, lead, shape_of
from .translate import TORCH, Call, backward, dropout, forward

G = TypeVar("G")
_NAMES = {**TORCH, "bias": "attn_mask", "mask": "attn_mask"}
_FORWARD = Call("scaled_dot_product_attention", _NAMES)
_BACKWARD = Call("scaled_dot_product_attention_backward", _NAMES)


class SdpaGrads(NamedTuple, Generic[G]):
    """Gradients in the shape and dtype of their arguments. dmask is None unless the mask is a float one."""

    dq: G
    dk: G
    dv: G
    dmask: Any = None


@overload
def scaled_dot_product_attention(query: A, key: Array, value: Array, attn_mask: Array | None = ..., dropout_p: Number = ...,
                                 is_causal: bool = ..., scale: Number | None = ..., enable_gqa: bool = ..., *, seed: Integer | None = ...,
                                 offset: Integer = ..., return_lse: Literal[False] = ...) -> A: ...
@overload
def scaled_dot_product_attention(query: A, key: Array, value: Array, attn_mask: Array | None = ..., dropout_p: Number = ...,
                                 is_causal: bool = ..., scale: Number | None = ..., enable_gqa: bool = ..., *, seed: Integer | None = ...,
                                 offset: Integer = ..., return_lse: Literal[True]) -> tuple[A, Any]: ...
@overload
def scaled_dot_product_attention(query: A, key: Array, value: Array, attn_mask: Array | None = ..., dropout_p: Number = ...,
                                 is_causal: bool = ..., scale: Number | None = ..., enable_gqa: bool = ..., *, seed: Integer | None = ...,
                                 offset: Integer = ..., return_lse: bool) -> A | tuple[A, Any]: ...
def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None, dropout_p: Number = 0.0,
                                 is_causal: bool = False, scale: Number | None = None, enable_gqa: bool = False, *,
                                 seed: Integer | None = None, offset: Integer = 0, return_lse: bool = False) -> Any:
    """softmax(scale * query @ key.T + attn_mask) @ value, as torch.nn.functional.scaled_dot_product_attention.

    Parameters
    ----------
    query : array
        (N..., H, L, E). N... is any number of batch axes, which broadcast.
    key, value : array
        (N..., H_k, S, E), (N..., H_v, S, E_v).
    attn_mask : array, optional
        Boolean, True = may attend; or float, added to the scores. Broadcasts to (N..., H, L, S).
    dropout_p : float
        Probability of dropping a pair.
    is_causal : bool
        Causal mask, top-left aligned. Not together with attn_mask.
    scale : float, optional
        Factor of the scores. Default 1 / sqrt(E).
    enable_gqa : bool
        Let groups of query heads share a key head.
    seed, offset : int, optional
        Dropout's seed and offset. Without a seed one is drawn: from torch's CPU generator for torch tensors, else
        from the operating system. Pass one if a backward follows. Not in the original.
    return_lse : bool
        Return lse too, which the backward needs. Not in the original.

    Returns
    -------
    array, or tuple of array
        out (N..., H, L, E_v), or (out, lse) with lse (N..., H, L).

    Raises
    ------
    ValueError
        Shapes that do not go together; attn_mask together with is_causal.
    TypeError
        Unsupported dtypes.

    Notes
    -----
    Source: torch.nn.functional.scaled_dot_product_attention, PyTorch 2.13.
    """
    call = _FORWARD
    is_causal = call.flag("causal", is_causal)
    p = _plan(call, query, key, value, attn_mask, is_causal, call.flag("enable_gqa", enable_gqa))
    q, k, v = (p.fit(call, name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    options = p.options(call, attn_mask, is_causal, scale, dropout(call, query, dropout_p, seed, offset))
    out, lse = forward(call, q, k, v, None, layout="bhsd", return_lse=return_lse, **options)
    out = out if tuple(out.shape) == p.out else out.reshape(p.out)
    if not return_lse:
        return out
    return out, lse if tuple(lse.shape) == p.out[:-1] else lse.reshape(p.out[:-1])


def scaled_dot_product_attention_backward(grad_out: Array, query: A, key: Array, value: Array, out: Array, lse: Array,
                                          attn_mask: Array | None = None, dropout_p: Number = 0.0, is_causal: bool = False,
                                          scale: Number | None = None, enable_gqa: bool = False, *, seed: Integer | None = None,
                                          offset: Integer = 0, need_dmask: bool = True, deterministic: bool = False) -> SdpaGrads[A]:
    """Gradients of scaled_dot_product_attention. torch has no function for this; there it is autograd.

    Parameters
    ----------
    grad_out : array
        Gradient of out, (N..., H, L, E_v).
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, seed, offset
        Those of the forward. With dropout seed and offset are needed.
    out, lse : array
        Results of `scaled_dot_product_attention(..., return_lse=True)`.
    need_dmask : bool
        Compute the gradient of a float mask. False saves its time.
    deterministic : bool
        The same bits in every run; see fastattn.attention_backward.

    Returns
    -------
    SdpaGrads
        (dq, dk, dv, dmask), each of its argument's shape, summed over what was broadcast.

    Raises
    ------
    ValueError, TypeError
        As the forward.
    """
    call = _BACKWARD
    is_causal = call.flag("causal", is_causal)
    p = _plan(call, query, key, value, attn_mask, is_causal, call.flag("enable_gqa", enable_gqa))
    q, k, v = (p.fit(call, name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    grad_out, out, lse = p.result(call, "grad_out", grad_out), p.result(call, "out", out), p.result(call, "lse", lse)
    options = p.options(call, attn_mask, is_causal, scale, {"dropout_p": dropout_p, "seed": seed, "offset": offset})
    need = need_dmask and options.get("bias") is not None
    grads = backward(call, grad_out, q, k, v, out, lse, None, layout="bhsd", need_dbias=need, deterministic=deterministic, **options)
    dq, dk, dv = (p.fold(call, name, x) for name, x in (("query", grads.dq), ("key", grads.dk), ("value", grads.dv)))
    return SdpaGrads(dq, dk, dv, p.fold(call, "attn_mask", grads.dbias) if need else None)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How each argument becomes (batch, heads, sequence, dim).

    `shapes` maps an argument to four shapes: its own, with ones where it broadcasts, broadcast, and on four axes.
    """

    batch_size: int
    heads: int
    out: Shape
    shapes: dict[str, tuple[Shape, Shape, Shape, Shape]]

    def fit(self, call: Call, name: str, x: Any) -> Any:
        return fit(x, *self.shapes[name][1:], call.name, name)

    def fold(self, call: Call, name: str, grad: Any) -> Any:
        return fold(grad, *self.shapes[name][:3], call.name, name)

    def result(self, call: Call, name: str, x: Any) -> Any:
        """grad_out, out or lse, which must have the forward's shape, on four axes (lse: three)."""
        shape, axes = (self.out[:-1], 1) if name == "lse" else (self.out, 2)
        if shape_of(x, call.name, name) != shape:
            raise call.value(name, f"has shape {tuple(x.shape)}", f"the forward's, {shape}")
        flat = (self.batch_size, self.heads, *shape[len(shape) - axes:])
        return fit(x, flat, flat, flat, call.name, name)

    def options(self, call: Call, attn_mask: Any, is_causal: bool, scale: Number | None, dropped: dict[str, Any]) -> dict[str, Any]:
        """fastattn's keywords. The mask's dtype decides whether it is `mask` or `bias`."""
        options: dict[str, Any] = {"causal": "top_left" if is_causal else False, "softmax_scale": scale, **dropped}
        if attn_mask is not None:
            options["mask" if is_boolean(attn_mask) else "bias"] = self.fit(call, "attn_mask", attn_mask)
        return options


def _plan(call: Call, query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, enable_gqa: bool) -> _Plan:
    q, k, v = (shape_of(x, call.name, name) for name, x in (("query", query), ("key", key), ("value", value)))
    mask = None if attn_mask is None else shape_of(attn_mask, call.name, "attn_mask")
    return _plan_of_shapes(call.name, q, k, v, mask, is_causal, enable_gqa)


@functools.lru_cache(maxsize=1000)
def _plan_of_shapes(call_name: str, q: Shape, k: Shape, v: Shape, mask: Shape | None, is_causal: bool, enable_gqa: bool) -> _Plan:
    """Memoised for each combination of shapes: making it takes 30 us, as long as a small problem."""
    call, own = Call(call_name, _NAMES), {"query": q, "key": k, "value": v}
    least, rank = 3 if enable_gqa else 2, max(max(map(len, own.values())), 3)
    for name, shape in own.items():
        if len(shape) < least:
            raise call.value(name, f"has shape {shape}", "(..., heads, sequence, head_dim), because enable_gqa is True" if enable_gqa
                             else "(..., sequence, head_dim), two axes or more")
    if own["key"][-2] != own["value"][-2]:
        raise call.value("value", f"has {own['value'][-2]} rows, shape {own['value']}", f"as many as key, {own['key'][-2]}")
    batch = broadcast_shape(*(lead(shape, rank)[:-3] for shape in own.values()))
    heads, shared = _heads(call, own, rank, enable_gqa)
    if batch is None or heads is None:
        hint = "" if enable_gqa or batch is None else "enable_gqa=True lets groups of query heads share a key head"
        raise call.value("key", f"has shape {own['key']} and value {own['value']}",
                         f"leading axes that broadcast with query's, {own['query']}", hint)
    shapes = {}
    for name, shape in own.items():
        have, want = lead(shape, rank)[-3], heads if name == "query" else shared
        before = (*lead(shape, rank)[:-2], 1, *shape[-2:])
        full = (*batch, have, want // max(have, 1), *shape[-2:])
        shapes[name] = (shape, before, full, (count(batch), want, *shape[-2:]))
    out = (*batch, heads, own["query"][-2], own["value"][-1])[rank - max(map(len, own.values())):]
    if mask is not None:
        shapes["attn_mask"] = _mask_shapes(call, mask, batch, out, is_causal)
    return _Plan(count(batch), heads, out, shapes)


def _heads(call: Call, own: dict[str, Shape], rank: int, enable_gqa: bool) -> tuple[int | None, int]:
    """(heads of out, heads of key and value as passed to fastattn). The first is None if the head counts do not go together.

    The second is the least common multiple of key's and value's heads, so usually nothing is repeated.
    """
    heads_q, heads_k, heads_v = (lead(shape, rank)[-3] for shape in own.values())
    if not enable_gqa:
        both = broadcast_shape((heads_q,), (heads_k,), (heads_v,))
        return None if both is None else both[0], math.lcm(heads_k, heads_v)
    for name, n in (("key", heads_k), ("value", heads_v)):
        if n == 0 or heads_q % n:
            raise call.value(name, f"has {n} heads, shape {own[name]}", f"a divisor of query's {heads_q} heads")
    return heads_q, math.lcm(heads_k, heads_v)


def _mask_shapes(call: Call, shape: Shape, batch: Shape, out: Shape, is_causal: bool) -> tuple[Shape, Shape, Shape, Shape]:
    """The shapes of a mask, as in _Plan.shapes. A single batch axis is left to fastattn's broadcasting; several are merged."""
    if is_causal:
        raise call.value("attn_mask", "is given beside is_causal=True", "one of the two", "attn_mask & tril(ones(L, S)) is both")
    if len(shape) > len(out):
        raise call.value("attn_mask", f"has shape {shape}", f"at most the {len(out)} axes of (..., L, S), to which it broadcasts")
    if len(shape) <= 3:
        return shape, shape, shape, shape
    leading = lead(shape[:-3], len(batch))
    whole = leading if set(leading) == {1} else batch
    if any(m not in (1, n) for m, n in zip(leading, batch, strict=True)):
        raise call.value("attn_mask", f"has shape {shape}", f"a shape that broadcasts to (..., L, S) with leading axes {batch}")
    return shape, (*leading, *shape[-3:]), (*whole, *shape[-3:]), (count(whole), *shape[-3:])
