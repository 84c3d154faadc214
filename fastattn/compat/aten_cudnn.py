"""The cuDNN operators of aten.py: _cudnn_attention_forward, _scaled_dot_product_cudnn_attention and their backwards."""
from __future__ import annotations

from typing import Any

from .arrays import shape_of
from .aten_flash import ScaledDotProductResult
from .aten_operator import CUM_SEQ, cut, operator_forward
from .translate import Call, Lengths, backward


def cudnn_attention_forward(query: Any, key: Any, value: Any, attn_bias: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int | None,
                            max_k: int | None, compute_log_sumexp: bool, dropout_p: float = 0.0, is_causal: bool = False,
                            return_debug_mask: bool = False, *, scale: float | None = None, seed: int | None = None,
                            offset: int = 0) -> ScaledDotProductResult:
    """ATen's _cudnn_attention_forward.

    Parameters
    ----------
    query : array
        (batch, heads, max_q, head_dim), or ragged (total_q, heads, head_dim) with cum_seq.
    key, value : array
        (batch, heads_k, max_k, head_dim), (batch, heads_k, max_k, head_dim_v); ragged (total_k, heads_k, ...).
    attn_bias : array or None
        Additive: (max_q, max_k), (heads, max_q, max_k) or (batch, heads, max_q, max_k). Any axis may be 1; it is
        expanded without a copy. With ragged arrays it is indexed inside each sequence; the original has no bias
        there.
    cum_seq_q, cum_seq_k : array or None
        (sequences + 1,) int32 or int64 for ragged arrays, else None.
    max_q, max_k : int or None
        The longest sequences. For dense arrays the lengths, or None.
    compute_log_sumexp : bool
        Return logsumexp; the backward needs it.
    dropout_p : float
        Probability of dropping a pair.
    is_causal : bool
        Causal mask, top-left aligned in each sequence.
    return_debug_mask : bool
        Return the encoded softmax too. The original accepts the argument and lacks the mask.
    scale : float, optional
        Factor of the scores. Default 1 / sqrt(head_dim).
    seed, offset : int, optional
        Dropout's seed and offset. Without a seed one is drawn. Not in the original.

    Returns
    -------
    ScaledDotProductResult
        logsumexp is None unless compute_log_sumexp.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Notes
    -----
    Source: _cudnn_attention_forward, see aten.py.
    """
    call = Call("cudnn_attention_forward", CUM_SEQ)
    packed = cut(call, query, key, 2, cum_seq_q, cum_seq_k, max_q, max_k)
    return _forward(call, query, key, value, packed, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale, seed,
                    offset)


def scaled_dot_product_cudnn_attention(query: Any, key: Any, value: Any, attn_bias: Any, compute_log_sumexp: bool, dropout_p: float = 0.0,
                                       is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
                                       seed: int | None = None, offset: int = 0) -> ScaledDotProductResult:
    """ATen's _scaled_dot_product_cudnn_attention: cudnn_attention_forward of dense arrays, with the same parameters."""
    call = Call("scaled_dot_product_cudnn_attention", CUM_SEQ)
    return _forward(call, query, key, value, None, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale, seed,
                    offset)


def cudnn_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, philox_seed: int,
                             philox_offset: int, attn_bias: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int | None, max_k: int | None,
                             dropout_p: float, is_causal: bool, *, scale: float | None = None, need_dbias: bool = False,
                             deterministic: bool = False) -> tuple[Any, ...]:
    """ATen's _cudnn_attention_backward.

    Parameters
    ----------
    grad_out : array
        Gradient of out, of its shape.
    out, logsumexp, philox_seed, philox_offset
        Results of cudnn_attention_forward with compute_log_sumexp=True.
    need_dbias : bool
        Compute attn_bias's gradient too. Not in the original.
    deterministic : bool
        The same bits in every run. Not in the original.

    All other parameters are those of cudnn_attention_forward.

    Returns
    -------
    tuple of array
        (dq, dk, dv), with dbias, of attn_bias's shape, as a fourth if need_dbias.
    """
    call = Call("cudnn_attention_backward", CUM_SEQ)
    packed = cut(call, query, key, 2, cum_seq_q, cum_seq_k, max_q, max_k)
    grads = backward(call, grad_out, query, key, value, out, logsumexp, packed, layout="bhsd", dropout_p=dropout_p,
                     causal="top_left" if call.flag("causal", is_causal) else False, softmax_scale=scale, bias=attn_bias, seed=philox_seed,
                     offset=philox_offset, need_dbias=need_dbias, deterministic=deterministic)
    return grads[:4] if need_dbias else grads[:3]


scaled_dot_product_cudnn_attention_backward = cudnn_attention_backward      # both have the same arguments in the original too


def _forward(call: Call, query: Any, key: Any, value: Any, packed: Lengths | None, attn_bias: Any, compute_log_sumexp: bool,
             dropout_p: float, is_causal: bool, return_debug_mask: bool, scale: float | None, seed: int | None,
             offset: int) -> ScaledDotProductResult:
    out, lse, drawn, offset, debug_mask = operator_forward(
        call, query, key, value, packed, layout="bhsd", compute_lse=compute_log_sumexp, debug_mask=return_debug_mask, dropout_p=dropout_p,
        causal="top_left" if call.flag("causal", is_causal) else False, softmax_scale=scale, bias=attn_bias, seed=seed, offset=offset)
    if packed is None:
        packed = Lengths(None, None, *(shape_of(x, call.name, "query")[2] for x in (query, key)))
    return ScaledDotProductResult(out, lse, *packed[:4], drawn, offset, debug_mask)
