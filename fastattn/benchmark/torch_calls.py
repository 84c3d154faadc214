"""Attention of libraries on torch tensors, as functions (q, k, v, bias) -> out on (batch, seqlen, num_heads, head_dim),
and what is timed of them: a forward, or the gradients alone.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

Tensor = Any
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BACKENDS = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH", "sdpa": None}


def sdpa(backend: str, *, causal: bool = False, dropout_p: float = 0.0, grouped: bool = False) -> Attend:
    """torch's scaled_dot_product_attention with one of BACKENDS; "sdpa" lets torch choose. Its causal diagonal is top-left.

    grouped: k and v have fewer heads than q.
    """
    attention, chosen = importlib.import_module("torch.nn.attention"), BACKENDS[backend]
    function = importlib.import_module("torch.nn.functional").scaled_dot_product_attention
    context = (lambda: attention.sdpa_kernel([getattr(attention.SDPBackend, chosen)])) if chosen else nullcontext
    extra: dict[str, Any] = {"is_causal": causal, "dropout_p": dropout_p} | ({"enable_gqa": True} if grouped else {})

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor = None) -> Tensor:
        with context():
            return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, **extra).transpose(1, 2)
    return attend


def flash_attention_4(packed: bool = False, **extra: Any) -> Attend:
    """FlashAttention-4 (flash_attn.cute), dense or packed, with its own keywords. The first call of each variant compiles it."""
    module = importlib.import_module("flash_attn.cute")
    return first_result(module.flash_attn_varlen_func if packed else module.flash_attn_func, **extra)


def flash_attention_2(**extra: Any) -> Attend:
    """flash_attn_func of the package flash_attn, with its own keywords. Its causal diagonal is bottom-right."""
    return first_result(importlib.import_module("flash_attn").flash_attn_func, **extra)


def xformers(causal: bool = False) -> Attend:
    """xformers' memory_efficient_attention, its causal diagonal bottom-right. GQA is its five-axis form, a view."""
    ops = importlib.import_module("xformers.ops")
    bias = importlib.import_module("xformers.ops.fmha.attn_bias").LowerTriangularFromBottomRightMask() if causal else None

    def attend(q: Tensor, k: Tensor, v: Tensor, unused: Tensor = None) -> Tensor:
        heads, heads_k = q.shape[2], k.shape[2]
        if heads == heads_k:
            return ops.memory_efficient_attention(q, k, v, attn_bias=bias)
        group = heads // heads_k
        q5 = q.unflatten(2, (heads_k, group))
        k5, v5 = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))
        return ops.memory_efficient_attention(q5, k5, v5, attn_bias=bias).flatten(2, 3)
    return attend


def first_result(function: Callable[..., Any], **extra: Any) -> Attend:
    """A function of (q, k, v) that may return a tuple, out first."""
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor = None) -> Tensor:
        result = function(q, k, v, **extra)
        return result[0] if isinstance(result, tuple) else result
    return attend


# ---------------------------------------------------------------- what is timed
def forward_alone(attend: Attend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor = None) -> Callable[[], Tensor]:
    """A forward without autograd."""
    torch = importlib.import_module("torch")

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v, bias)
    return forward


def gradients_alone(attend: Attend, inputs: Sequence[Tensor], bias: Tensor, dout: Tensor, need_dbias: bool = False) -> Callable[[], Any]:
    """The gradients of q, k, v and, if wanted, bias, as a tuple: the graph is built once and kept."""
    torch = importlib.import_module("torch")
    leaves = [t.detach().requires_grad_() for t in (*inputs, *((bias,) if need_dbias else ()))]
    q, k, v, *_ = leaves
    with torch.enable_grad():
        out = attend(q, k, v, leaves[3] if need_dbias else bias)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
