"""Calls with score_mod, mask_mod or block_mask: eager, with gradients of all float tensors that score_mod reads.

The functions are traced once, before the forward; the backward uses the same programs, whatever the functions hold by then. Code that
torch compiles calls it through flex_outside.py.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn

from ..errors import message
from ..flex.trace import Traced, traced
from ..problem import Grads
from .autograd import INPUTS, level, modes


def attend(call: str, tensors: dict[str, Any], functions: dict[str, Any], options: dict[str, Any], deterministic: bool,
           return_lse: bool) -> Any:
    """The call `attention` or `attention_varlen`. `tensors` are q, k, v, then those that are keywords, then lengths; `functions` the
    keywords score_mod, mask_mod, captured and block_mask.
    """
    if level() is not None or modes() or forward_ad._current_level >= 0:
        raise TypeError(message(call, "score_mod", "is inside torch.func, a dispatch mode or forward_ad", "an eager call",
                                "loss.backward() and torch.autograd.grad work; torch.compile runs the call outside of its graph"))
    functions = dict(functions)
    score = functions["score_mod"]
    if score is not None:
        score = functions["score_mod"] = traced(call, "score_mod", score, functions.pop("captured"))
    if functions["mask_mod"] is not None:
        functions["mask_mod"] = traced(call, "mask_mod", functions["mask_mod"], (), True)
    tensors = _cast(tensors)
    arrays: tuple[Any, ...] = () if score is None else score.arrays
    given = (*[tensors[name] for name in _DIFFERENTIABLE], *arrays)
    forward = getattr(fastattn, call)
    if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (*given, tensors["alibi_slopes"]))):
        q, k, v, *lengths = [tensors[name] for name in (*_DIFFERENTIABLE[:3], *_LENGTHS) if name in tensors]
        return forward(q, k, v, *lengths, **_keywords(tensors), **functions, **options, return_lse=return_lse)
    if tensors["alibi_slopes"] is not None and getattr(tensors["alibi_slopes"], "requires_grad", False):
        raise TypeError(message(call, "alibi_slopes", "requires grad", "slopes without grad, because they have no gradient here",
                                "score_mod=lambda s, b, h, q, k, m: s - m[h] * abs(q - k) with captured=(slopes,) has one"))
    out, lse = _Flexible.apply((call, tensors, functions, options, deterministic), *given)
    return (out, lse) if return_lse else out


_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k")


def _keywords(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in tensors.items() if name not in (*_DIFFERENTIABLE[:3], *_LENGTHS)}


def _cast(tensors: dict[str, Any]) -> dict[str, Any]:
    """q, k and v in the dtype of torch.autocast, as `operators.cast` has it; torch records the cast."""
    kind = tensors["q"].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype, floats = torch.get_autocast_dtype(kind), (torch.float16, torch.bfloat16, torch.float32)
    cast = {name: tensors[name].to(dtype) for name in "qkv" if tensors[name].dtype in floats}
    bias = tensors["bias"]
    return tensors | cast | ({"bias": bias.to(dtype)} if bias is not None and bias.dtype in floats[:2] else {})


class _Flexible(torch.autograd.Function):  # type: ignore[misc]
    """(the call, q, k, v, bias, sinks, the arrays of score_mod) -> (out, lse)."""

    @staticmethod
    def forward(ctx: Any, about: tuple[Any, ...], *given: Any) -> Any:
        call, tensors, functions, options, _ = about
        q, k, v = given[:3]
        out, lse = getattr(fastattn, call)(q, k, v, *[tensors[n] for n in _LENGTHS if n in tensors], **_keywords(tensors), **functions,
                                           **options, return_lse=True)
        ctx.about = about
        ctx.kept = [None if isinstance(x, Tensor) else x for x in given]        # arrays of other libraries have no gradient
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in given], out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        call, tensors, functions, options, deterministic = ctx.about
        *saved, out, lse = ctx.saved_tensors
        given = [kept if x is None else x for x, kept in zip(saved, ctx.kept, strict=True)]
        q, k, v, bias, sinks, *arrays = given
        if isinstance(functions["score_mod"], Traced):
            functions = functions | {"score_mod": functions["score_mod"]._replace(arrays=tuple(arrays))}
        needs = ctx.needs_input_grad[1:]
        captured, need_dbias = any(needs[INPUTS:]), bool(needs[3])
        keywords = _keywords(tensors) | {"bias": bias, "sinks": sinks}
        grads: Grads[Any] = getattr(fastattn, f"{call}_backward")(
            torch.zeros_like(out) if dout is None else dout, q, k, v, out, lse, *[tensors[n] for n in _LENGTHS if n in tensors], dlse=dlse,
            **keywords, **functions, **options, need_dbias=need_dbias, need_dcaptured=captured, deterministic=deterministic)
        found = [*grads[:3], grads.dbias, grads.dsinks, *(grads.dcaptured or [None] * len(arrays))]
        return None, *[g if need else None for g, need in zip(found, needs, strict=True)]
