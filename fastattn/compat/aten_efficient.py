"""The memory-efficient operators of aten.py: _efficient_attention_forward, _scaled_dot_product_efficient_attention and their backwards."""
from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from .arrays import shape_of
from .aten_operator import NAMES, cut, operator_forward
from .translate import Call, backward

_NAMES = {**NAMES, "bias": "bias", "seqused_k": "seqlen_k"}


class CustomMaskType(IntEnum):
    """No structural mask, or causal with the diagonal from the top-left or into the bottom-right corner."""

    NoCustomMask = 0
    CausalFromTopLeft = 1
    CausalFromBottomRight = 2


_CAUSAL: dict[int, bool | str] = {0: False, 1: "top_left", 2: "bottom_right"}


class EfficientResult(NamedTuple):
    out: Any
    logsumexp: Any
    philox_seed: int
    philox_offset: int
    max_seqlen_batch_q: int | None
    max_seqlen_batch_k: int | None


class ScaledDotProductEfficientResult(NamedTuple):
    out: Any
    logsumexp: Any
    philox_seed: int
    philox_offset: int


def efficient_attention_forward(query: Any, key: Any, value: Any, bias: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int | None,
                                max_seqlen_k: int | None, dropout_p: float, custom_mask_type: int, compute_log_sumexp: bool = False, *,
                                scale: float | None = None, seqlen_k: Any = None, window_size: int | None = None,
                                seed: int | None = None, offset: int = 0) -> EfficientResult:
    """query (batch, seqlen_q, heads, head_dim), key (batch, seqlen_k, heads_k, head_dim), value (batch, seqlen_k, heads_k, head_dim_v);
    with cu_seqlens (sequences + 1,) packed: (1, total, heads, head_dim) or (total, heads, head_dim) -> EfficientResult.

    bias is added: (seqlen_q, seqlen_k), (batch * heads, seqlen_q, seqlen_k) or (batch, heads, seqlen_q, seqlen_k), where an axis of 1
    broadcasts. custom_mask_type is a CustomMaskType; window_size, with a causal one, is how many keys up to its diagonal a row sees
    (None, 0 or less: all). seqlen_k (sequences,): that many keys of each sequence count. logsumexp is None unless asked for, (batch, heads,
    seqlen_q) or packed (heads, total_q). Source: _efficient_attention_forward, see aten.py.
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
    """(dq, dk, dv, dbias) of efficient_attention_forward; dbias has bias's shape, None unless bias_requires_grad. out, logsumexp,
    philox_seed and philox_offset are the forward's (compute_log_sumexp=True), the other arguments the same.

    Not here: num_splits_key (it tunes the original's kernel; fastattn chooses) and shared_storage_dqdkdv (the gradients are new arrays).
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
    """query (batch, heads, seqlen_q, head_dim) and so on; causal is top-left aligned, attn_bias broadcasts to (batch, heads, seqlen_q,
    seqlen_k). A batch above 65535 works with dropout too. logsumexp (batch, heads, seqlen_q) or None."""
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
    """(dq, dk, dv, dbias) of scaled_dot_product_efficient_attention; None where grad_input_mask (four bools, in this order) says that
    it is not wanted."""
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
    """Packed arrays in the original's (1, total, heads, dim) lose the 1."""
    shape = shape_of(x, call.name, name)
    return x.reshape(shape[1:]) if packed is not None and len(shape) == 4 and shape[0] == 1 else x


def _like(result: Any, x: Any, flat: Any) -> Any:
    """The 1 again, where _flat took it from x."""
    return result if flat is x else result.reshape((1, *result.shape))


def _shaped(grad: Any, bias: Any) -> Any:
    return grad if grad is None or tuple(grad.shape) == tuple(bias.shape) else grad.reshape(tuple(bias.shape))


def _bias(call: Call, bias: Any, query: Any, packed: Any) -> Any:
    """A bias of three axes is (batch * heads, ...) here; other shapes broadcast by the usual rules."""
    if bias is None:
        return None
    shape, shape_q = shape_of(bias, call.name, "bias"), shape_of(query, call.name, "query")
    batch, heads = (shape_q[0] if packed is None else len(packed.cu_seqlens_q) - 1), shape_q[-2]
    return bias.reshape((batch, heads, *shape[1:])) if len(shape) == 3 and shape[0] == batch * heads else bias
