"""The cuDNN-style operators of aten.py: _cudnn_attention_forward, _scaled_dot_product_cudnn_attention and their backwards."""
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
    """query (batch, heads, max_q, head_dim), key (batch, heads_k, max_k, head_dim), value (batch, heads_k, max_k, head_dim_v); or ragged,
    with cum_seq (sequences + 1,): (total, heads, head_dim) and so on -> ScaledDotProductResult, logsumexp None unless asked for.

    attn_bias has 2, 3 or 4 axes, (max_q, max_k), (heads or 1, ...) or (batch or 1, heads or 1, ...), expanded without a copy; any axis
    may be 1. Causal is top-left aligned, in each sequence. Ragged input with a bias, and the debug mask, which the original lacks, work.
    Errors: ValueError and TypeError that name the argument. Source: _cudnn_attention_forward, see aten.py.
    """
    call = Call("cudnn_attention_forward", CUM_SEQ)
    packed = cut(call, query, key, 2, cum_seq_q, cum_seq_k, max_q, max_k)
    return _forward(call, query, key, value, packed, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale, seed,
                    offset)


def scaled_dot_product_cudnn_attention(query: Any, key: Any, value: Any, attn_bias: Any, compute_log_sumexp: bool, dropout_p: float = 0.0,
                                       is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
                                       seed: int | None = None, offset: int = 0) -> ScaledDotProductResult:
    """cudnn_attention_forward of dense arrays."""
    call = Call("scaled_dot_product_cudnn_attention", CUM_SEQ)
    return _forward(call, query, key, value, None, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale, seed,
                    offset)


def cudnn_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, philox_seed: int,
                             philox_offset: int, attn_bias: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int | None, max_k: int | None,
                             dropout_p: float, is_causal: bool, *, scale: float | None = None, need_dbias: bool = False,
                             deterministic: bool = False) -> tuple[Any, ...]:
    """(dq, dk, dv) of cudnn_attention_forward, and dbias, of attn_bias's shape, as a fourth with need_dbias=True (the original has none);
    out, logsumexp, philox_seed and philox_offset are the forward's, the other arguments the same."""
    call = Call("cudnn_attention_backward", CUM_SEQ)
    packed = cut(call, query, key, 2, cum_seq_q, cum_seq_k, max_q, max_k)
    grads = backward(call, grad_out, query, key, value, out, logsumexp, packed, layout="bhsd", dropout_p=dropout_p,
                     causal="top_left" if call.flag("causal", is_causal) else False, softmax_scale=scale, bias=attn_bias, seed=philox_seed,
                     offset=philox_offset, need_dbias=need_dbias, deterministic=deterministic)
    return grads[:4] if need_dbias else grads[:3]


scaled_dot_product_cudnn_attention_backward = cudnn_attention_backward      # the original's two have the same arguments as well


def _forward(call: Call, query: Any, key: Any, value: Any, packed: Lengths | None, attn_bias: Any, compute_log_sumexp: bool,
             dropout_p: float, is_causal: bool, return_debug_mask: bool, scale: float | None, seed: int | None,
             offset: int) -> ScaledDotProductResult:
    out, lse, drawn, offset, debug_mask = operator_forward(
        call, query, key, value, packed, layout="bhsd", compute_lse=compute_log_sumexp, debug_mask=return_debug_mask, dropout_p=dropout_p,
        causal="top_left" if call.flag("causal", is_causal) else False, softmax_scale=scale, bias=attn_bias, seed=seed, offset=offset)
    if packed is None:
        packed = Lengths(None, None, *(shape_of(x, call.name, "query")[2] for x in (query, key)))
    return ScaledDotProductResult(out, lse, *packed[:4], drawn, offset, debug_mask)
