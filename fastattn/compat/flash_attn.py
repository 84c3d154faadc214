"""The functions of the flash_attn package (FlashAttention 2) for any array, and a backward for each.

Shapes, dense and packed:

    q (batch, seqlen_q, nheads, headdim)    k, v (batch, seqlen_k, nheads_k, headdim)    kv (batch, seqlen_k, 2, nheads_k, headdim)
    q (total_q, nheads, headdim)            k, v (total_k, nheads_k, headdim)            kv (total_k, 2, nheads_k, headdim)
    qkv (batch, seqlen, 3, nheads, headdim) or (total, 3, nheads, headdim)
    softmax_lse (batch, nheads, seqlen_q) or (nheads, total_q), float32; S_dmask (batch, nheads, seqlen_q, seqlen_k), q's dtype

Beyond the original: float32 and float64, the CPU, head sizes that are no multiple of 8, ALiBi and softcap with
dropout, a bias, and v with a head size of its own. A row that attends nothing has out 0, lse -inf and gradients 0
(the original's lse is +inf).

Source: Dao-AILab/flash-attention, flash_attn_interface.py, version 2.8.
"""
from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np

from ..serving.api import attention_with_kvcache
from ..types import A, Array, Integer, Number, PerHead
from .arrays import namespace, shape_of
from .kvcache import flash_attn_with_kvcache as flash_attn_with_kvcache
from .probabilities import encode
from .translate import Call, Lengths, backward, dropout, forward, pair, window

_NAMES = {"lse": "softmax_lse", "window": "window_size"}
_OPEN = (-1, -1)


class ForwardOptions(TypedDict, total=False):
    """Keywords that all forward functions share. See `flash_attn_func`."""

    softmax_scale: Number | None
    causal: bool
    window_size: tuple[int, int]
    softcap: Number
    alibi_slopes: PerHead | None
    deterministic: bool
    bias: Array | None
    seed: Integer | None
    offset: Integer


# ---------------------------------------------------------------- dense
@overload
def flash_attn_func(q: A, k: Array, v: Array, dropout_p: Number = ..., *, return_attn_probs: Literal[False] = ...,
                    **options: Unpack[ForwardOptions]) -> A: ...
@overload
def flash_attn_func(q: A, k: Array, v: Array, dropout_p: Number = ..., *, return_attn_probs: Literal[True],
                    **options: Unpack[ForwardOptions]) -> tuple[A, Any, Any]: ...
@overload                                                   # options by position
def flash_attn_func(q: Array, k: Array, v: Array, dropout_p: Number = ..., softmax_scale: Number | None = ..., causal: bool = ...,
                    window_size: tuple[int, int] = ..., softcap: Number = ..., alibi_slopes: PerHead | None = ...,
                    deterministic: bool = ..., return_attn_probs: bool = ..., *, bias: Array | None = ..., seed: Integer | None = ...,
                    offset: Integer = ...) -> Any: ...
def flash_attn_func(q: Array, k: Array, v: Array, dropout_p: Number = 0.0, softmax_scale: Number | None = None, causal: bool = False,
                    window_size: tuple[int, int] = _OPEN, softcap: Number = 0.0, alibi_slopes: PerHead | None = None,
                    deterministic: bool = False, return_attn_probs: bool = False, *, bias: Array | None = None, seed: Integer | None = None,
                    offset: Integer = 0) -> Any:
    """flash_attn.flash_attn_func.

    Parameters
    ----------
    q : array
        (batch, seqlen_q, nheads, headdim).
    k, v : array
        (batch, seqlen_k, nheads_k, headdim). nheads is a multiple of nheads_k. v's headdim may differ.
    dropout_p : float
        Probability of dropping a pair.
    softmax_scale : float, optional
        Factor of the scores. Default 1 / sqrt(headdim).
    causal : bool
        Causal mask, bottom-right aligned.
    window_size : tuple of int
        (left, right): keys before and after the diagonal, inclusive, -1 = no limit. Bottom-right aligned.
    softcap : float
        Scores become softcap * tanh(score / softcap). 0.0 = off.
    alibi_slopes : array, optional
        (nheads,) or (batch, nheads).
    deterministic : bool
        Of the backward. The forward gives the same bits in every run in any case.
    return_attn_probs : bool
        Return softmax_lse and S_dmask too.
    bias : array, optional
        Additive, broadcasts to (batch, nheads, seqlen_q, seqlen_k). Not in the original.
    seed, offset : int, optional
        Dropout's seed and offset; the original uses torch's generator. Without a seed one is drawn. Pass one if a
        backward follows.

    Returns
    -------
    array, or tuple
        out (batch, seqlen_q, nheads, headdim), or (out, softmax_lse, S_dmask). S_dmask is the encoded softmax with
        dropout and None without, as in the original.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward("flash_attn_func", q, k, v, None, return_attn_probs, *options)


def flash_attn_kvpacked_func(q: Any, kv: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                             window_size: tuple[int, int] = _OPEN, softcap: float = 0.0, alibi_slopes: Any = None,
                             deterministic: bool = False, return_attn_probs: bool = False, *, bias: Any = None, seed: int | None = None,
                             offset: int = 0) -> Any:
    """flash_attn.flash_attn_kvpacked_func: flash_attn_func with k and v in one array, read in place.

    Parameters
    ----------
    q : array
        (batch, seqlen_q, nheads, headdim).
    kv : array
        (batch, seqlen_k, 2, nheads_k, headdim): k is kv[:, :, 0], v is kv[:, :, 1].

    All other parameters and the results are those of flash_attn_func.
    """
    call = "flash_attn_kvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward(call, q, *_unpack(call, "kv", kv, 2, 5), None, return_attn_probs, *options)


def flash_attn_qkvpacked_func(qkv: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                              window_size: tuple[int, int] = _OPEN, softcap: float = 0.0, alibi_slopes: Any = None,
                              deterministic: bool = False, return_attn_probs: bool = False, *, bias: Any = None, seed: int | None = None,
                              offset: int = 0) -> Any:
    """flash_attn.flash_attn_qkvpacked_func: flash_attn_func with q, k and v in one array, read in place.

    Parameters
    ----------
    qkv : array
        (batch, seqlen, 3, nheads, headdim): q is qkv[:, :, 0], k is qkv[:, :, 1], v is qkv[:, :, 2].

    All other parameters and the results are those of flash_attn_func.
    """
    call = "flash_attn_qkvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward(call, *_unpack(call, "qkv", qkv, 3, 5), None, return_attn_probs, *options)


# ---------------------------------------------------------------- varlen
@overload
def flash_attn_varlen_func(q: A, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int, max_seqlen_k: int,
                           dropout_p: Number = ..., *, return_attn_probs: Literal[False] = ..., block_table: Array | None = ...,
                           **options: Unpack[ForwardOptions]) -> A: ...
@overload
def flash_attn_varlen_func(q: A, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int, max_seqlen_k: int,
                           dropout_p: Number = ..., *, return_attn_probs: Literal[True], block_table: Array | None = ...,
                           **options: Unpack[ForwardOptions]) -> tuple[A, Any, Any]: ...
@overload                                                   # options by position
def flash_attn_varlen_func(q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int, max_seqlen_k: int,
                           dropout_p: Number = ..., softmax_scale: Number | None = ..., causal: bool = ...,
                           window_size: tuple[int, int] = ..., softcap: Number = ..., alibi_slopes: PerHead | None = ...,
                           deterministic: bool = ..., return_attn_probs: bool = ..., block_table: Array | None = ..., *,
                           bias: Array | None = ..., seed: Integer | None = ..., offset: Integer = ...) -> Any: ...
def flash_attn_varlen_func(q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, max_seqlen_q: int, max_seqlen_k: int,
                           dropout_p: Number = 0.0, softmax_scale: Number | None = None, causal: bool = False,
                           window_size: tuple[int, int] = _OPEN, softcap: Number = 0.0, alibi_slopes: PerHead | None = None,
                           deterministic: bool = False, return_attn_probs: bool = False, block_table: Array | None = None, *,
                           bias: Array | None = None, seed: Integer | None = None, offset: Integer = 0) -> Any:
    """flash_attn.flash_attn_varlen_func: attention inside each of the packed sequences.

    Parameters
    ----------
    q : array
        (total_q, nheads, headdim), the sequences one after the other.
    k, v : array
        (total_k, nheads_k, headdim).
    cu_seqlens_q, cu_seqlens_k : array
        (batch + 1,) int32 or int64: where each sequence begins.
    max_seqlen_q, max_seqlen_k : int
        The longest sequences.
    block_table : array (batch, most pages of a sequence), optional
        k and v are in pages then, (pages, page_size, nheads_k, headdim), and cu_seqlens_k says how many keys each
        sequence has. Without dropout, bias and return_attn_probs, and without a backward.
    bias : array, optional
        Additive, broadcasts to (batch, nheads, max_seqlen_q, max_seqlen_k), indexed inside each sequence. Not in the
        original.

    All other parameters are those of flash_attn_func.

    Returns
    -------
    array, or tuple
        out (total_q, nheads, headdim), or (out, softmax_lse, S_dmask) with softmax_lse (nheads, total_q).

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """
    if block_table is not None:
        call = Call("flash_attn_varlen_func", _NAMES | {"k_cache": "k", "v_cache": "v", "cache_seqlens": "cu_seqlens_k"})
        for name, x in (("dropout_p", dropout_p or None), ("bias", bias), ("return_attn_probs", return_attn_probs or None)):
            if x is not None:
                raise call.value(name, "is given beside block_table", "one of the two", "pages are read without it")
        return _in_pages(call, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, block_table,
                         _options(call, 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, None, None, 0))
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward("flash_attn_varlen_func", q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), return_attn_probs,
                    *options)


def flash_attn_varlen_kvpacked_func(q: Any, kv: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
                                    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                                    window_size: tuple[int, int] = _OPEN, softcap: float = 0.0, alibi_slopes: Any = None,
                                    deterministic: bool = False, return_attn_probs: bool = False, *, bias: Any = None,
                                    seed: int | None = None, offset: int = 0) -> Any:
    """flash_attn.flash_attn_varlen_kvpacked_func: flash_attn_varlen_func with k and v in one array, read in place.

    Parameters
    ----------
    kv : array
        (total_k, 2, nheads_k, headdim): k is kv[:, 0], v is kv[:, 1].

    All other parameters and the results are those of flash_attn_varlen_func.
    """
    call = "flash_attn_varlen_kvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward(call, q, *_unpack(call, "kv", kv, 2, 4), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
                    return_attn_probs, *options)


def flash_attn_varlen_qkvpacked_func(qkv: Any, cu_seqlens: Any, max_seqlen: int, dropout_p: float = 0.0,
                                     softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = _OPEN,
                                     softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
                                     return_attn_probs: bool = False, *, bias: Any = None, seed: int | None = None, offset: int = 0) -> Any:
    """flash_attn.flash_attn_varlen_qkvpacked_func: flash_attn_varlen_func with q, k and v in one array, read in place.

    Parameters
    ----------
    qkv : array
        (total, 3, nheads, headdim): q is qkv[:, 0], k is qkv[:, 1], v is qkv[:, 2].
    cu_seqlens : array
        (batch + 1,) int32 or int64: where each sequence begins.
    max_seqlen : int
        The longest sequence.

    All other parameters and the results are those of flash_attn_varlen_func.
    """
    call = "flash_attn_varlen_qkvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward(call, *_unpack(call, "qkv", qkv, 3, 4), (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), return_attn_probs,
                    *options)


# ---------------------------------------------------------------- backward
class BackwardOptions(ForwardOptions, total=False):
    """Keywords of every backward: meaning and defaults as in the forward. need_dbias requests bias's gradient too."""

    dropout_p: Number
    need_dbias: bool


def flash_attn_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any,
                        **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """Gradients of flash_attn_func. flash_attn has no function for this; there it is autograd.

    Parameters
    ----------
    dout : array
        Gradient of out, of its shape.
    q, k, v : array
        Those of the forward.
    out, softmax_lse : array
        Results of the forward with return_attn_probs=True.
    **options
        The forward's keywords. With dropout_p, seed and offset are needed.
    need_dbias : bool
        Compute bias's gradient too.
    deterministic : bool
        The same bits in every run.

    Returns
    -------
    tuple of array
        (dq, dk, dv), with dbias last if need_dbias, each of its argument's shape and dtype.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """
    return _backward("flash_attn_backward", dout, q, k, v, out, softmax_lse, None, **options)


def flash_attn_kvpacked_backward(dout: Any, q: Any, kv: Any, out: Any, softmax_lse: Any,
                                 **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """Gradients of flash_attn_kvpacked_func -> (dq, dkv). dkv is stacked by a copy. See flash_attn_backward."""
    call = "flash_attn_kvpacked_backward"
    k, v = _unpack(call, "kv", kv, 2, 5)
    dq, *rest = _backward(call, dout, q, k, v, out, softmax_lse, None, **options)
    return dq, *_pack(call, kv, rest, 2)


def flash_attn_qkvpacked_backward(dout: Any, qkv: Any, out: Any, softmax_lse: Any, **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """Gradients of flash_attn_qkvpacked_func -> (dqkv,), stacked by a copy. See flash_attn_backward."""
    call = "flash_attn_qkvpacked_backward"
    q, k, v = _unpack(call, "qkv", qkv, 3, 5)
    return _pack(call, qkv, _backward(call, dout, q, k, v, out, softmax_lse, None, **options), 3)


def flash_attn_varlen_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, cu_seqlens_q: Any, cu_seqlens_k: Any,
                               max_seqlen_q: int, max_seqlen_k: int, **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """Gradients of flash_attn_varlen_func -> (dq, dk, dv). Rows of no sequence have gradient 0. See flash_attn_backward."""
    packed = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _backward("flash_attn_varlen_backward", dout, q, k, v, out, softmax_lse, packed, **options)


def flash_attn_varlen_kvpacked_backward(dout: Any, q: Any, kv: Any, out: Any, softmax_lse: Any, cu_seqlens_q: Any, cu_seqlens_k: Any,
                                        max_seqlen_q: int, max_seqlen_k: int, **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """Gradients of flash_attn_varlen_kvpacked_func -> (dq, dkv). dkv is stacked by a copy. See flash_attn_backward."""
    call, packed = "flash_attn_varlen_kvpacked_backward", (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    k, v = _unpack(call, "kv", kv, 2, 4)
    dq, *rest = _backward(call, dout, q, k, v, out, softmax_lse, packed, **options)
    return dq, *_pack(call, kv, rest, 2)


def flash_attn_varlen_qkvpacked_backward(dout: Any, qkv: Any, out: Any, softmax_lse: Any, cu_seqlens: Any, max_seqlen: int,
                                         **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """Gradients of flash_attn_varlen_qkvpacked_func -> (dqkv,), stacked by a copy. See flash_attn_backward."""
    call, packed = "flash_attn_varlen_qkvpacked_backward", (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    q, k, v = _unpack(call, "qkv", qkv, 3, 4)
    return _pack(call, qkv, _backward(call, dout, q, k, v, out, softmax_lse, packed, **options), 3)


# ---------------------------------------------------------------- what they share
def _unpack(call: str, argument: str, packed: Any, parts: int, rank: int) -> tuple[Any, ...]:
    """q, k and v, or k and v, as views of the array that stacks them on its third axis from the end."""
    shape = shape_of(packed, call, argument)
    if len(shape) != rank or shape[-3] != parts:
        raise Call(call).value(argument, f"has shape {shape}", f"{rank} axes (..., {parts}, nheads, headdim)")
    return tuple(packed[..., part, :, :] for part in range(parts))


def _pack(call: str, like: Any, grads: Any, parts: int) -> tuple[Any, ...]:
    """The first `parts` gradients stacked as _unpack's argument was, then the others."""
    return namespace(like, call, "dout").stack(list(grads[:parts]), -3), *grads[parts:]


def _in_pages(call: Call, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, block_table: Any,
              options: dict[str, Any]) -> Any:
    """Packed queries over keys in pages."""
    cu = np.asarray(cu_seqlens_k) if isinstance(cu_seqlens_k, (list, tuple)) else cu_seqlens_k
    used = {name: options[name] for name in ("softmax_scale", "causal", "softcap", "window", "alibi_slopes")}
    return call.run(attention_with_kvcache, q, k, v, cache_seqlens=cu[1:] - cu[:-1], block_table=block_table, cu_seqlens_q=cu_seqlens_q,
                    max_seqlen_q=call.length("max_seqlen_q", max_seqlen_q), **used)


def _options(call: Call, dropout_p: Number, softmax_scale: Number | None, causal: bool, window_size: Any, softcap: Number,
             alibi_slopes: Any, bias: Any, seed: Integer | None, offset: Integer) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": call.flag("causal", causal),
            "softcap": call.plain("softcap", softcap, "a number, 0 for no cap") or None,
            "window": window(call, "window_size", *pair(call, "window_size", window_size)), "alibi_slopes": alibi_slopes, "bias": bias,
            "seed": seed, "offset": offset}


def _forward(name: str, q: Any, k: Any, v: Any, lengths: tuple[Any, ...] | None, return_attn_probs: bool, *arguments: Any) -> Any:
    call = Call(name, _NAMES)
    options = _options(call, *arguments)
    options |= dropout(call, q, options["dropout_p"], options["seed"], options["offset"])
    packed = None if lengths is None else Lengths.read(call, *lengths)
    out, lse = forward(call, q, k, v, packed, return_lse=return_attn_probs, **options)
    if not return_attn_probs:
        return out
    return out, lse, encode(call, q, k, packed, "bshd", **options) if options["dropout_p"] else None


def _backward(name: str, dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, lengths: tuple[Any, ...] | None, *,
              dropout_p: Number = 0.0, softmax_scale: Number | None = None, causal: bool = False,
              window_size: tuple[int, int] = _OPEN, softcap: Number = 0.0,
              alibi_slopes: Any = None, deterministic: bool = False, bias: Any = None, need_dbias: bool = False,
              seed: Integer | None = None, offset: Integer = 0) -> tuple[Any, ...]:
    call = Call(name, _NAMES)
    options = _options(call, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    packed = None if lengths is None else Lengths.read(call, *lengths)
    grads = backward(call, dout, q, k, v, out, softmax_lse, packed, need_dbias=need_dbias, deterministic=deterministic, **options)
    return grads[:4] if need_dbias else grads[:3]
