"""ATen's multi-head attention for any array: _native_multi_head_attention, _transform_bias_rescale_qkv, and their backwards.

    x (B, T, D) -> x @ qkv_weight.T -> transform_bias_rescale_qkv -> attention -> out @ proj_weight.T + proj_bias

The projections are done by the caller's BLAS: `@` of NumPy, CuPy or torch, or the function passed as `matmul=` (say,
nvmath.linalg.advanced.matmul). Between them run fastattn's kernels: no scores, padding or masks are written to
memory. Ragged input is packed, (total, D), with cu_seqlens.

What differs from the original:

- A query that attends nothing has weights 0 and out proj_bias. There it has NaN.
- Masks must be boolean. They work with ragged input too.
- All head sizes and dtypes of fastattn.attention work.
- There is a backward.

Source: PyTorch 2.13, aten/src/ATen/native/transformers/cuda/attention.cu and attention.cpp.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..arrays.convert import small, view
from ..arrays.view import View
from ..lengths import cumulative
from ..options import Check
from ..problem import DTYPES, check_array
from .arrays import count, is_boolean, namespace, zeros
from .probabilities import encode
from .transform import padded, transform_bias_rescale_qkv, transform_bias_rescale_qkv_backward
from .translate import Call, Lengths, backward, forward

__all__ = ["ATTENTION_MASK", "FULL_MASK", "KEY_PADDING_MASK", "MultiHeadGrads", "Saved", "multi_head_attention",
           "multi_head_attention_backward", "transform_bias_rescale_qkv", "transform_bias_rescale_qkv_backward"]

ATTENTION_MASK, KEY_PADDING_MASK, FULL_MASK = 0, 1, 2       # mask_type: (T, T), (B, T), (B, num_head, T, T)
_NAMES = {"q": "query", "k": "key", "v": "value", "cu_seqlens_q": "cu_seqlens", "cu_seqlens_k": "cu_seqlens", "max_seqlen_q": "max_seqlen",
          "max_seqlen_k": "max_seqlen"}
_FORWARD, _BACKWARD = Call("multi_head_attention", _NAMES), Call("multi_head_attention_backward", _NAMES)
MatMul = Callable[[Any, Any], Any]


class Saved(NamedTuple):
    """What the backward needs of the forward.

    q (scaled), k, v and out are (B, T, num_head, head_dim), lse (B, num_head, T); packed (total, num_head, head_dim)
    and (num_head, total).
    """

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any


class MultiHeadGrads(NamedTuple):
    """Gradients in the shape and dtype of their arguments.

    If one array was passed as query, key and value, dquery is its whole gradient, and dkey and dvalue are None. If
    key and value were one array, dkey is its gradient and dvalue is None.
    """

    dquery: Any
    dkey: Any
    dvalue: Any
    dqkv_weight: Any
    dqkv_bias: Any
    dproj_weight: Any
    dproj_bias: Any


def multi_head_attention(query: Any, key: Any, value: Any, embed_dim: int, num_head: int, qkv_weight: Any, qkv_bias: Any,
                         proj_weight: Any, proj_bias: Any, mask: Any = None, need_weights: bool = True, average_attn_weights: bool = True,
                         mask_type: int | None = None, *, cu_seqlens: Any = None, max_seqlen: int | None = None,
                         matmul: MatMul | None = None, return_saved: bool = False) -> tuple[Any, ...]:
    """ATen's _native_multi_head_attention.

    Parameters
    ----------
    query, key, value : array
        (B, T, D) of one shape, D = embed_dim; or ragged (total, D) with cu_seqlens. One array for all three takes one
        projection; one array for key and value, two.
    embed_dim, num_head : int
        D, and a divisor of it.
    qkv_weight, qkv_bias : array
        (3 * D, D) and (3 * D,).
    proj_weight, proj_bias : array
        (D, D) and (D,).
    mask : array, optional
        Boolean, True = may NOT attend. Ragged: T is max_seqlen.
    need_weights, average_attn_weights : bool
        Return the weights, and their mean over the heads. They take O(T * T) memory and have no gradient.
    mask_type : int, optional
        0: mask is (T, T). 1: (B, T), padding keys. 2 or None: (B, num_head, T, T), whose first two axes may be 1.
    cu_seqlens : array, optional
        (sequences + 1,) for ragged input; B is then the number of sequences. The original takes nested tensors.
    max_seqlen : int, optional
        The longest sequence. None reads it from cu_seqlens, which must then be in host memory.
    matmul : callable, optional
        matmul(a, b): the product of (M, K) and (K, N) matrices. None is a @ b, for NumPy's 16-bit dtypes computed in
        float32 and rounded once. Not in the original.
    return_saved : bool
        Return what the backward needs. Not in the original.

    Returns
    -------
    tuple
        (out, weights), or (out, weights, saved). out is of query's shape; rows of no sequence are proj_bias. weights
        is (B, T, T), or (B, num_head, T, T) with average_attn_weights=False, or None unless need_weights. Ragged:
        their T is max_seqlen rounded up to a multiple of 8, zeros outside a sequence.

    Raises
    ------
    ValueError, TypeError, UnsupportedError
        Arguments that do not go together, or that no engine supports.

    Notes
    -----
    Source: native_multi_head_attention_cuda, see this module's docstring.
    """
    call = _FORWARD
    weights_ = {"qkv_weight": qkv_weight, "qkv_bias": qkv_bias, "proj_weight": proj_weight, "proj_bias": proj_bias}
    p = _plan(call, query, key, value, embed_dim, num_head, weights_, mask, mask_type, cu_seqlens, max_seqlen)
    D = p.width
    if query is key and key is value:
        qkv = _product(query, qkv_weight, None, matmul)
    else:
        parts = [_product(query, qkv_weight[:D], None, matmul)]
        if key is value:
            parts.append(_product(key, qkv_weight[D:], None, matmul))
        else:
            parts += [_product(key, qkv_weight[D:2 * D], None, matmul), _product(value, qkv_weight[2 * D:], None, matmul)]
        qkv = namespace(query, call.name, "query").concatenate(parts, -1)
    heads = transform_bias_rescale_qkv(qkv[None] if p.packed else qkv, qkv_bias, num_head)
    q, k, v = ((x[0].swapaxes(0, 1) if p.packed else x.swapaxes(1, 2)) for x in heads)       # views (B, T, num_head, head_dim)
    out, lse = forward(call, q, k, v, p.packed, return_lse=return_saved, **p.options)
    projected = _product(out.reshape(query.shape), proj_weight, proj_bias, matmul)
    weights = None
    if need_weights:
        weights = _weights(call, q, k, p, average_attn_weights)
    return (projected, weights, Saved(q, k, v, out, lse)) if return_saved else (projected, weights)


def multi_head_attention_backward(grad_out: Any, saved: Saved, query: Any, key: Any, value: Any, embed_dim: int, num_head: int,
                                  qkv_weight: Any, proj_weight: Any, mask: Any = None, mask_type: int | None = None, *,
                                  cu_seqlens: Any = None, max_seqlen: int | None = None, matmul: MatMul | None = None,
                                  deterministic: bool = False) -> MultiHeadGrads:
    """Gradients of multi_head_attention's out. ATen has no function for this.

    Parameters
    ----------
    grad_out : array
        Gradient of out, of its shape.
    saved : Saved
        The forward's, with return_saved=True.
    deterministic : bool
        The same bits in every run; see fastattn.attention_backward.

    All other parameters are those of the forward.

    Returns
    -------
    MultiHeadGrads
        Sums over rows are float32 (float64 for float64).

    Raises
    ------
    ValueError, TypeError, UnsupportedError
        As the forward.
    """
    call = _BACKWARD
    weights = {"qkv_weight": qkv_weight, "proj_weight": proj_weight}
    p = _plan(call, query, key, value, embed_dim, num_head, weights, mask, mask_type, cu_seqlens, max_seqlen)
    check_array(call.name, "grad_out", view(grad_out, call.name, "grad_out"), p.like.shape, p.like.dtype, p.like.device)
    if not isinstance(saved, Saved):
        raise TypeError(f"{call.name}(): saved is a {type(saved).__name__}; expected what the forward gave with return_saved=True.")
    q, k, v, out, lse = saved
    dproj_weight = _transposed_product(grad_out, out.reshape(query.shape), matmul)
    dout = _product(grad_out, proj_weight.T, None, matmul).reshape(out.shape)
    grads = backward(call, dout, q, k, v, out, lse, p.packed, deterministic=deterministic, **p.options)
    dheads = ((x.swapaxes(0, 1)[None] if p.packed else x.swapaxes(1, 2)) for x in grads[:3])
    dqkv, dqkv_bias = transform_bias_rescale_qkv_backward(*dheads)
    dqkv, D = dqkv.reshape(*query.shape[:-1], 3 * p.width), p.width
    if query is key and key is value:
        inputs = [(query, slice(0, 3 * D))]
    elif key is value:
        inputs = [(query, slice(0, D)), (key, slice(D, 3 * D))]
    else:
        inputs = [(query, slice(0, D)), (key, slice(D, 2 * D)), (value, slice(2 * D, 3 * D))]
    dinputs = [_product(dqkv[..., part], qkv_weight[part].T, None, matmul) for _, part in inputs]
    dweights = [_transposed_product(dqkv[..., part], x, matmul) for x, part in inputs]
    dweight = dweights[0] if len(dweights) == 1 else namespace(query, call.name, "query").concatenate(dweights, 0)
    dquery, dkey, dvalue = (*dinputs, None, None)[:3]
    return MultiHeadGrads(dquery, dkey, dvalue, dweight, dqkv_bias, dproj_weight, _row_sum(grad_out))


# ---------------------------------------------------------------- arguments
class _Plan(NamedTuple):
    """D, the lengths of packed input, attention's options, and query's View."""

    width: int
    packed: Lengths | None
    options: dict[str, Any]
    like: View


def _plan(call: Call, query: Any, key: Any, value: Any, embed_dim: int, num_head: int, weights: dict[str, Any], mask: Any,
          mask_type: int | None, cu_seqlens: Any, max_seqlen: int | None) -> _Plan:
    check = Check(call.name)
    namespace(query, call.name, "query")
    x = view(query, call.name, "query")
    check.dtype("query", x, DTYPES)
    rank, axes = (3, "(B, T, D)") if cu_seqlens is None else (2, "(total, D) with cu_seqlens")
    if len(x.shape) != rank:
        raise check.value("query", f"has shape {x.shape}", f"{rank} axes, {axes}")
    D = check.integer("embed_dim", embed_dim, 1, 2**31 - 1)
    if x.shape[-1] != D:
        raise check.value("query", f"has shape {x.shape}", f"embed_dim = {D} in the last axis")
    heads = check.integer("num_head", num_head, 1, 2**31 - 1)
    if D % heads:
        raise check.value("num_head", f"is {heads}", f"a divisor of embed_dim = {D}")
    shapes = {"qkv_weight": (3 * D, D), "qkv_bias": (3 * D,), "proj_weight": (D, D), "proj_bias": (D,)}
    for name, array in {"key": key, "value": value, **weights}.items():
        check_array(call.name, name, view(array, call.name, name), shapes.get(name, x.shape), x.dtype, x.device)
    batch, T, packed = x.shape[0], x.shape[1], None
    if cu_seqlens is not None:
        batch, T = _longest(check, cu_seqlens, max_seqlen, x)
        packed = Lengths(cu_seqlens, cu_seqlens, T, T)
    elif max_seqlen is not None:
        raise check.value("max_seqlen", f"is {max_seqlen}", "None, because query is dense", "cu_seqlens makes it ragged")
    return _Plan(D, packed, {"softmax_scale": 1.0, "mask": _may_attend(check, mask, mask_type, batch, heads, T)}, x)


def _longest(check: Check, cu_seqlens: Any, max_seqlen: int | None, like: View) -> tuple[int, int]:
    """(number of sequences, the longest)."""
    cu = small(cu_seqlens, None, check.call, "cu_seqlens") if like.device[0] == "cpu" else view(cu_seqlens, check.call, "cu_seqlens")
    if cu.device[0] != "cpu" and max_seqlen is None:
        raise check.value("max_seqlen", "is None", "the longest sequence, because cu_seqlens is on a device")
    return cumulative(check, "cu_seqlens", cu, like.shape[0], max_seqlen, "max_seqlen")[1:]


def _may_attend(check: Check, mask: Any, mask_type: int | None, batch: int, heads: int, T: int) -> Any:
    """fastattn's mask, True = may attend, with axes that broadcast to (B, num_head, T, T)."""
    if mask is None:
        if mask_type is not None:
            raise check.value("mask_type", f"is {mask_type}", "None, because there is no mask")
        return None
    shapes = {ATTENTION_MASK: (T, T), KEY_PADDING_MASK: (batch, T), FULL_MASK: (batch, heads, T, T)}
    kind = FULL_MASK if mask_type is None else check.integer("mask_type", mask_type, 0, 2)
    have, want = view(mask, check.call, "mask").shape, shapes[kind]
    ones = kind == FULL_MASK and len(have) == 4 and have[2:] == want[2:] and have[0] in (1, batch) and have[1] in (1, heads)
    if have != want and not ones:
        meaning = {ATTENTION_MASK: "(T, T)", KEY_PADDING_MASK: "(B, T)", FULL_MASK: "(B, num_head, T, T)"}[kind]
        hint = "mask_type says which of (T, T), (B, T) and (B, num_head, T, T) it is" if mask_type is None else ""
        raise check.value("mask", f"has shape {have}", f"{meaning} = {want} for mask_type {kind}", hint)
    if not is_boolean(mask):
        raise check.type("mask", f"has dtype {mask.dtype}", "bool, True where a query may not attend")
    allowed = ~mask
    return allowed.reshape(batch, 1, 1, T) if kind == KEY_PADDING_MASK else allowed


def _weights(call: Call, q: Any, k: Any, p: _Plan, average: bool) -> Any:
    """The probabilities, or their mean over the heads. Packed ones are padded with zeros to a multiple of 8."""
    packed = p.packed
    weights = encode(call, q, k, packed, "bshd" if packed is None else "thd", **p.options)
    xp = namespace(weights, call.name, "query")
    if average:
        weights = xp.asarray(weights.sum(axis=1, dtype=_wide(xp, weights)) / weights.shape[1], dtype=weights.dtype)
    if packed is not None:
        for axis in (-1, -2):
            missing = list(weights.shape)
            missing[axis] = padded(missing[axis]) - missing[axis]
            if missing[axis]:
                weights = xp.concatenate([weights, zeros(weights, tuple(missing), call.name, "query")], axis)
    return weights


# ---------------------------------------------------------------- matrices, by the caller's BLAS
def _wide(xp: Any, x: Any) -> Any:
    return xp.float64 if x.dtype == xp.float64 else xp.float32


def _flat(x: Any) -> Any:
    """x as a matrix of its rows."""
    return x if len(x.shape) == 2 else x.reshape(count(tuple(x.shape[:-1])), x.shape[-1])


def _product(x: Any, weight: Any, bias: Any, matmul: MatMul | None) -> Any:
    """x (..., K) @ weight (N, K).T + bias -> (..., N)."""
    flat, xp = _flat(x), namespace(x, "multi_head_attention", "query")
    if matmul is not None:
        y = matmul(flat, weight.T)
        y = y if bias is None else y + bias
    elif xp.__name__ == "torch":
        y = xp.nn.functional.linear(flat, weight, bias)
    elif xp.__name__ == "numpy":
        wide = _wide(xp, x)
        y = flat.astype(wide, copy=False) @ weight.astype(wide, copy=False).T
        if bias is not None:
            y += bias
        y = y.astype(x.dtype, copy=False)
    else:
        y = flat @ weight.T
        y = y if bias is None else y + bias
    return y if flat is x else y.reshape(*x.shape[:-1], weight.shape[0])


def _transposed_product(x: Any, y: Any, matmul: MatMul | None) -> Any:
    """x.T @ y over all rows of x (..., N) and y (..., K) -> (N, K)."""
    return _product(_flat(x).T, _flat(y).T, None, matmul)


def _row_sum(x: Any) -> Any:
    """The sum over all axes but the last, rounded once."""
    xp = namespace(x, "multi_head_attention_backward", "grad_out")
    return xp.asarray(_flat(x).sum(axis=0, dtype=_wide(xp, x)), dtype=x.dtype)
