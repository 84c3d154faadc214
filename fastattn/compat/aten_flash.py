"""The flash operators of aten.py: _flash_attention_forward, _scaled_dot_product_flash_attention and their backwards."""
from __future__ import annotations

from typing import Any, NamedTuple

from .arrays import shape_of
from .aten_operator import CUM_SEQ, NAMES, cut, operator_forward
from .translate import Call, backward, window


class FlashResult(NamedTuple):
    """What flash_attention_forward returns; fields as in aten.py. debug_attn_mask is None unless requested."""
    out: Any
    logsumexp: Any
    philox_seed: int
    philox_offset: int
    debug_attn_mask: Any = None


class ScaledDotProductResult(NamedTuple):
    """What the scaled_dot_product and cudnn forwards return. cum_seq_q and cum_seq_k are None for dense arrays."""

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
    """ATen's _flash_attention_forward.

    Parameters
    ----------
    query : array
        (batch, max_q, heads, head_dim), or packed (total_q, heads, head_dim) with cum_seq.
    key, value : array
        (batch, max_k, heads_k, head_dim), or packed (total_k, heads_k, head_dim).
    cum_seq_q, cum_seq_k : array or None
        (sequences + 1,) int32 or int64: where each packed sequence begins. None for dense arrays.
    max_q, max_k : int or None
        The longest sequences. For dense arrays the lengths, or None.
    dropout_p : float
        Probability of dropping a pair.
    is_causal : bool
        Causal mask, bottom-right aligned.
    return_debug_mask : bool
        Return the encoded softmax too; see aten.py.
    scale : float, optional
        Factor of the scores. Default 1 / sqrt(head_dim).
    window_size_left, window_size_right : int, optional
        Keys before and after the diagonal, inclusive. None or -1: no limit. Bottom-right aligned.
    seqused_k : array, optional
        (sequences,): how many keys of each packed sequence are used.
    alibi_slopes : array, optional
        (heads,) or (batch, heads).
    attn_bias : array, optional
        Additive, broadcasts to (batch, heads, max_q, max_k). Not in the original.
    seed, offset : int, optional
        Dropout's seed and offset. Without a seed one is drawn. Not in the original.

    Returns
    -------
    FlashResult
        out in query's layout, logsumexp, philox_seed, philox_offset, debug_attn_mask.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.

    Notes
    -----
    Source: _flash_attention_forward, see aten.py.
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
    """ATen's _flash_attention_backward.

    Parameters
    ----------
    grad_out : array
        Gradient of out, of its shape.
    out, logsumexp, philox_seed, philox_offset
        Results of flash_attention_forward.
    need_dbias : bool
        Compute attn_bias's gradient too.
    deterministic : bool
        The same bits in every run.

    All other parameters are those of flash_attention_forward. seqused_k, alibi_slopes, attn_bias, need_dbias and
    deterministic are not in the original.

    Returns
    -------
    tuple of array
        (dq, dk, dv), with dbias as a fourth if need_dbias.
    """
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
    """ATen's _scaled_dot_product_flash_attention: flash_attention_forward for heads-first arrays.

    Parameters
    ----------
    query : array
        (batch, heads, seqlen_q, head_dim).
    key, value : array
        (batch, heads_k, seqlen_k, head_dim).
    dropout_p, is_causal, return_debug_mask, scale, seed, offset
        As in flash_attention_forward. Causal is bottom-right aligned.

    Returns
    -------
    ScaledDotProductResult
        cum_seq_q and cum_seq_k are None, max_q and max_k the lengths.
    """
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
    """ATen's _scaled_dot_product_flash_attention_backward -> (dq, dk, dv).

    The arguments are the forward's, its results, and grad_out of out's shape. cum_seq_q and cum_seq_k must be None;
    `deterministic` is not in the original.
    """
    call = Call("scaled_dot_product_flash_attention_backward", CUM_SEQ)
    causal = call.flag("causal", is_causal)
    if cut(call, query, key, 2, cum_seq_q, cum_seq_k, max_q, max_k) is not None:
        raise call.value("cum_seq_q", "is given", "None, because these arrays are dense", "flash_attention_backward takes packed ones")
    grads = backward(call, grad_out, query, key, value, out, logsumexp, None, layout="bhsd", dropout_p=dropout_p, causal=causal,
                     softmax_scale=scale, seed=philox_seed, offset=philox_offset, deterministic=deterministic)
    return grads.dq, grads.dk, grads.dv
