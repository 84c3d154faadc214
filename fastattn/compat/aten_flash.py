"""The flash operators of aten.py: _flash_attention_forward, _scaled_dot_product_flash_attention and their backwards."""
from __future__ import annotations

from typing import Any, NamedTuple

from .arrays import shape_of
from .aten_operator import CUM_SEQ, NAMES, cut, operator_forward
from .translate import Call, backward, window


class FlashResult(NamedTuple):
    out: Any
    logsumexp: Any
    philox_seed: int
    philox_offset: int
    debug_attn_mask: Any = None


class ScaledDotProductResult(NamedTuple):
    """What _scaled_dot_product_{flash,cudnn}_attention return; the cum_seq are None for dense arrays."""

    out: Any
    logsumexp: Any
    cum_seq_q: Any
    cum_seq_k: Any
    max_q: int | None
    max_k: int | None
    philox_seed: int
    philox_offset: int
    debug_attn_mask: Any = None


def flash_attention_forward(query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int | None, max_k: int | None,
                            dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
                            window_size_left: int | None = None, window_size_right: int | None = None, seqused_k: Any = None,
                            alibi_slopes: Any = None, attn_bias: Any = None, seed: int | None = None, offset: int = 0) -> FlashResult:
    """query (batch, max_q, heads, head_dim), key and value (batch, max_k, heads_k, head_dim); or, with cum_seq (sequences + 1,), packed
    (total, heads, head_dim) -> FlashResult, out of query's layout.

    Causal and the window (counts of keys, inclusive, None or -1 = no limit) are bottom-right aligned. seqused_k (sequences,),
    alibi_slopes (heads,) or (batch, heads); attn_bias, not in the original, broadcasts to (batch, heads, max_q, max_k).
    Errors: ValueError and TypeError that name the argument. Source: _flash_attention_forward, see aten.py.
    """
    call = Call("flash_attention_forward", CUM_SEQ)
    causal = call.flag("causal", is_causal)
    packed = cut(call, query, key, 1, cum_seq_q, cum_seq_k, max_q, max_k, seqused_k)
    return FlashResult(*operator_forward(call, query, key, value, packed, layout="bshd", compute_lse=True, debug_mask=return_debug_mask,
                                         dropout_p=dropout_p, causal=causal, softmax_scale=scale, alibi_slopes=alibi_slopes,
                                         window=window(call, "window_size_left, window_size_right", window_size_left, window_size_right),
                                         bias=attn_bias, seed=seed, offset=offset))


def flash_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, cum_seq_q: Any, cum_seq_k: Any,
                             max_q: int | None, max_k: int | None, dropout_p: float, is_causal: bool, philox_seed: int,
                             philox_offset: int, *, scale: float | None = None, window_size_left: int | None = None,
                             window_size_right: int | None = None, seqused_k: Any = None, alibi_slopes: Any = None,
                             attn_bias: Any = None, need_dbias: bool = False, deterministic: bool = False) -> tuple[Any, ...]:
    """(dq, dk, dv) of flash_attention_forward for grad_out (of out's shape), and dbias as a fourth with need_dbias=True; out, logsumexp,
    philox_seed and philox_offset are the forward's, the other arguments the same. seqused_k, ALiBi and bias are not in the original."""
    call = Call("flash_attention_backward", CUM_SEQ)
    causal = call.flag("causal", is_causal)
    packed = cut(call, query, key, 1, cum_seq_q, cum_seq_k, max_q, max_k, seqused_k)
    grads = backward(call, grad_out, query, key, value, out, logsumexp, packed, dropout_p=dropout_p, causal=causal,
                     softmax_scale=scale, window=window(call, "window_size_left, window_size_right", window_size_left, window_size_right),
                     alibi_slopes=alibi_slopes, bias=attn_bias, seed=philox_seed, offset=philox_offset, need_dbias=need_dbias,
                     deterministic=deterministic)
    return grads[:4] if need_dbias else grads[:3]


def scaled_dot_product_flash_attention(query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False,
                                       return_debug_mask: bool = False, *, scale: float | None = None, seed: int | None = None,
                                       offset: int = 0) -> ScaledDotProductResult:
    """flash_attention_forward for (batch, heads, seqlen, head_dim), causal bottom-right as there; cum_seq are None, max_q and max_k the
    lengths."""
    call = Call("scaled_dot_product_flash_attention", NAMES)
    causal = call.flag("causal", is_causal)
    out, lse, drawn, offset, debug_mask = operator_forward(call, query, key, value, None, layout="bhsd", compute_lse=True,
                                                           debug_mask=return_debug_mask, dropout_p=dropout_p, causal=causal,
                                                           softmax_scale=scale, seed=seed, offset=offset)
    max_q, max_k = (shape_of(x, call.name, "query")[2] for x in (query, key))
    return ScaledDotProductResult(out, lse, None, None, max_q, max_k, drawn, offset, debug_mask)


def scaled_dot_product_flash_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, cum_seq_q: None,
                                                cum_seq_k: None, max_q: int | None, max_k: int | None, dropout_p: float, is_causal: bool,
                                                philox_seed: int, philox_offset: int, *, scale: float | None = None,
                                                deterministic: bool = False) -> tuple[Any, Any, Any]:
    """(dq, dk, dv) of scaled_dot_product_flash_attention, whose results these arguments are; cum_seq_q and cum_seq_k must be None."""
    call = Call("scaled_dot_product_flash_attention_backward", CUM_SEQ)
    causal = call.flag("causal", is_causal)
    if cut(call, query, key, 2, cum_seq_q, cum_seq_k, max_q, max_k) is not None:
        raise call.value("cum_seq_q", "is given", "None, because these arrays are dense", "flash_attention_backward takes packed ones")
    grads = backward(call, grad_out, query, key, value, out, logsumexp, None, layout="bhsd", dropout_p=dropout_p, causal=causal,
                     softmax_scale=scale, seed=philox_seed, offset=philox_offset, deterministic=deterministic)
    return grads.dq, grads.dk, grads.dv
