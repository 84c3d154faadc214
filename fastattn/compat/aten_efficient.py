"""The memory-efficient operators of aten.py.

They are _efficient_attention_forward, _scaled_dot_product_efficient_attention and their backwards.
"""
from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from .arrays import shape_of
from .aten_operator import NAMES, cut, operator_forward
from .translate import Call, backward

_NAMES = {**NAMES, "bias": "bias", "seqused_k": "seqlen_k"}


class CustomMaskType(IntEnum):
    """No structural mask, causal with the diagonal from the top-left corner, or causal into the bottom-right one."""

    NoCustomMask = 0
    CausalFromTopLeft = 1
    CausalFromBottomRight = 2


_CAUSAL: dict[int, bool | str] = {0: False, 1: "top_left", 2: "bottom_right"}


class EfficientResult(NamedTuple):
    """What efficient_attention_forward returns; fields as in aten.py."""
    out: Any
    logsumexp: Any
    philox_seed: int
    philox_offset: int
    max_seqlen_batch_q: int | None
    max_seqlen_batch_k: int | None


class ScaledDotProductEfficientResult(NamedTuple):
    """What scaled_dot_product_efficient_attention returns; fields as in aten.py."""
    out: Any
    logsumexp: Any
    philox_seed: int
    philox_offset: int


def efficient_attention_forward(query: Any, key: Any, value: Any, bias: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int | None,
                                max_seqlen_k: int | None, dropout_p: float, custom_mask_type: int, compute_log_sumexp: bool = False, *,
                                scale: float | None = None, seqlen_k: Any = None, window_size: int | None = None,
                                seed: int | None = None, offset: int = 0) -> EfficientResult:
    """ATen's _efficient_attention_forward.

    Parameters
    ----------
    query : array
        (batch, seqlen_q, heads, head_dim); packed (1, total_q, heads, head_dim) or (total_q, heads, head_dim).
    key, value : array
        (batch, seqlen_k, heads_k, head_dim), (batch, seqlen_k, heads_k, head_dim_v); packed as query.
    bias : array or None
        Additive: (seqlen_q, seqlen_k), (batch * heads, seqlen_q, seqlen_k) or (batch, heads, seqlen_q, seqlen_k). An
        axis of 1 broadcasts.
    cu_seqlens_q, cu_seqlens_k : array or None
        (sequences + 1,) int32 or int64 for packed arrays, else None.
    max_seqlen_q, max_seqlen_k : int or None
        The longest sequences. For dense arrays the lengths, or None.
    dropout_p : float
        Probability of dropping a pair.
    custom_mask_type : int
        A CustomMaskType.
    compute_log_sumexp : bool
        Return logsumexp; the backward needs it.
    scale : float, optional
        Factor of the scores. Default 1 / sqrt(head_dim).
    seqlen_k : array, optional
        (sequences,): how many keys of each packed sequence are used.
    window_size : int, optional
        With a causal mask type: how many keys, up to its diagonal, a row attends. None, 0 or less: all.
    seed, offset : int, optional
        Dropout's seed and offset. Without a seed one is drawn. Not in the original.

    Returns
    -------
    EfficientResult
        logsumexp is (batch, heads, seqlen_q), packed (heads, total_q), or None unless compute_log_sumexp.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Notes
    -----
    Source: _efficient_attention_forward, see aten.py.
    """
    call = Call("efficient_attention_forward", _NAMES)
    packed = cut(call, query, key, 1, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_k)
    q, k, v = (_flat(call, name, x, packed) for name, x in (("query", query), ("key", key), ("value", value)))
    out, lse, drawn, offset, _ = operator_forward(call, q, k, v, packed, layout="bshd", compute_lse=compute_log_sumexp, debug_mask=False,
                                                  dropout_p=dropout_p, softmax_scale=scale, bias=_bias(call, bias, q, packed),
                                                  seed=seed, offset=offset, **_masks(call, custom_mask_type, window_size))
    if packed is None:
        max_seqlen_q, max_seqlen_k = (shape_of(x, call.name, "query")[1] for x in (query, key))
    return EfficientResult(_like(out, query, q), lse, drawn, offset, max_seqlen_q, max_seqlen_k)


def efficient_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, bias: Any, out: Any, cu_seqlens_q: Any, cu_seqlens_k: Any,
                                 max_seqlen_q: int | None, max_seqlen_k: int | None, logsumexp: Any, dropout_p: float, philox_seed: int,
                                 philox_offset: int, custom_mask_type: int, bias_requires_grad: bool, *, scale: float | None = None,
                                 seqlen_k: Any = None, window_size: int | None = None,
                                 deterministic: bool = False) -> tuple[Any, Any, Any, Any]:
    """ATen's _efficient_attention_backward.

    Parameters
    ----------
    grad_out : array
        Gradient of out, of its shape.
    out, logsumexp, philox_seed, philox_offset
        Results of efficient_attention_forward with compute_log_sumexp=True.
    bias_requires_grad : bool
        Compute bias's gradient too.
    deterministic : bool
        The same bits in every run. Not in the original.

    All other parameters are those of efficient_attention_forward. Two of the original's are missing: num_splits_key
    tunes its kernel, and shared_storage_dqdkdv chooses the memory layout of the gradients. Here gradients are new
    arrays.

    Returns
    -------
    tuple of array
        (dq, dk, dv, dbias). dbias has bias's shape, or is None unless bias_requires_grad.
    """
    call = Call("efficient_attention_backward", _NAMES)
    packed = cut(call, query, key, 1, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_k)
    dout, q, k, v, result = (_flat(call, name, x, packed) for name, x in (("grad_out", grad_out), ("query", query), ("key", key),
                                                                         ("value", value), ("out", out)))
    grads = backward(call, dout, q, k, v, result, logsumexp, packed, dropout_p=dropout_p, softmax_scale=scale, seed=philox_seed,
                     offset=philox_offset, bias=_bias(call, bias, q, packed), need_dbias=bias_requires_grad, deterministic=deterministic,
                     **_masks(call, custom_mask_type, window_size))
    return _like(grads.dq, query, q), _like(grads.dk, key, k), _like(grads.dv, value, v), _shaped(grads.dbias, bias)


def scaled_dot_product_efficient_attention(query: Any, key: Any, value: Any, attn_bias: Any, compute_log_sumexp: bool,
                                           dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
                                           seed: int | None = None, offset: int = 0) -> ScaledDotProductEfficientResult:
    """ATen's _scaled_dot_product_efficient_attention.

    Parameters
    ----------
    query : array
        (batch, heads, seqlen_q, head_dim).
    key, value : array
        (batch, heads_k, seqlen_k, head_dim), (batch, heads_k, seqlen_k, head_dim_v).
    attn_bias : array or None
        Additive, broadcasts to (batch, heads, seqlen_q, seqlen_k).
    compute_log_sumexp : bool
        Return logsumexp; the backward needs it.
    dropout_p : float
        Probability of dropping a pair. A batch above 65535 works with dropout too, which the original refuses.
    is_causal : bool
        Causal mask, top-left aligned.
    scale : float, optional
        Factor of the scores. Default 1 / sqrt(head_dim).
    seed, offset : int, optional
        Dropout's seed and offset. Without a seed one is drawn. Not in the original.

    Returns
    -------
    ScaledDotProductEfficientResult
        logsumexp is (batch, heads, seqlen_q), or None unless compute_log_sumexp.
    """
    call = Call("scaled_dot_product_efficient_attention", NAMES)
    results = operator_forward(call, query, key, value, None, layout="bhsd", compute_lse=compute_log_sumexp, debug_mask=False,
                               bias=attn_bias, dropout_p=dropout_p, causal=_from_top_left(call, is_causal), softmax_scale=scale, seed=seed,
                               offset=offset)
    return ScaledDotProductEfficientResult(*results[:4])


def scaled_dot_product_efficient_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, attn_bias: Any, out: Any,
                                                    logsumexp: Any, philox_seed: int, philox_offset: int, dropout_p: float,
                                                    grad_input_mask: Sequence[bool], is_causal: bool = False, *,
                                                    scale: float | None = None,
                                                    deterministic: bool = False) -> tuple[Any, Any, Any, Any]:
    """ATen's _scaled_dot_product_efficient_attention_backward -> (dq, dk, dv, dbias).

    grad_input_mask is four bools, for query, key, value and attn_bias: a gradient is None where it is False.
    `deterministic` is not in the original.
    """
    call = Call("scaled_dot_product_efficient_attention_backward", NAMES)
    if len(grad_input_mask) != 4:
        raise call.value("grad_input_mask", f"is {grad_input_mask!r}", "four bools, for query, key, value and attn_bias")
    grads = backward(call, grad_out, query, key, value, out, logsumexp, None, layout="bhsd", dropout_p=dropout_p,
                     causal=_from_top_left(call, is_causal), softmax_scale=scale, bias=attn_bias, seed=philox_seed, offset=philox_offset,
                     need_dbias=bool(grad_input_mask[3]), deterministic=deterministic)
    dq, dk, dv, dbias = (grad if wanted else None for grad, wanted in zip(grads[:4], grad_input_mask, strict=True))
    return dq, dk, dv, dbias


def _masks(call: Call, custom_mask_type: Any, window_size: Any) -> dict[str, Any]:
    custom_mask_type = call.plain("custom_mask_type", custom_mask_type, "0, 1 or 2")
    window_size = call.plain("window_size", window_size, "a count of keys")
    if custom_mask_type not in _CAUSAL:
        raise call.value("custom_mask_type", f"is {custom_mask_type!r}", "0 (none), 1 (causal from top-left) or 2 (from bottom-right)")
    if window_size is None or window_size <= 0:
        return {"causal": _CAUSAL[custom_mask_type]}
    if custom_mask_type == CustomMaskType.NoCustomMask:
        raise call.value("window_size", f"is {window_size} with custom_mask_type 0", "type 1 or 2, from whose diagonal it counts")
    return {"causal": _CAUSAL[custom_mask_type], "window": (window_size - 1, None)}


def _from_top_left(call: Call, is_causal: Any) -> bool | str:
    return "top_left" if call.flag("causal", is_causal) else False


def _flat(call: Call, name: str, x: Any, packed: Any) -> Any:
    """Drop the leading axis of 1 that the original's packed arrays have: (1, total, heads, dim)."""
    shape = shape_of(x, call.name, name)
    return x.reshape(shape[1:]) if packed is not None and len(shape) == 4 and shape[0] == 1 else x


def _like(result: Any, x: Any, flat: Any) -> Any:
    """Put back the leading axis of 1 that _flat dropped from x."""
    return result if flat is x else result.reshape((1, *result.shape))


def _shaped(grad: Any, bias: Any) -> Any:
    return grad if grad is None or tuple(grad.shape) == tuple(bias.shape) else grad.reshape(tuple(bias.shape))


def _bias(call: Call, bias: Any, query: Any, packed: Any) -> Any:
    """A bias of three axes is (batch * heads, ...) here. Other shapes broadcast by the usual rules."""
    if bias is None:
        return None
    shape, shape_q = shape_of(bias, call.name, "bias"), shape_of(query, call.name, "query")
    batch, heads = (shape_q[0] if packed is None else len(packed.cu_seqlens_q) - 1), shape_q[-2]
    return bias.reshape((batch, heads, *shape[1:])) if len(shape) == 3 and shape[0] == batch * heads else bias
