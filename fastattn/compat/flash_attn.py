"""The functions of the flash_attn package (FlashAttention 2) for any array, and a backward for each.

Shapes, dense and packed:

    q (batch, seqlen_q, nheads, headdim)    k, v (batch, seqlen_k, nheads_k, headdim)    kv (batch, seqlen_k, 2, nheads_k, headdim)
    q (total_q, nheads, headdim)            k, v (total_k, nheads_k, headdim)            kv (total_k, 2, nheads_k, headdim)
    qkv (batch, seqlen, 3, nheads, headdim) or (total, 3, nheads, headdim)
    softmax_lse (batch, nheads, seqlen_q) or (nheads, total_q), float32; S_dmask (batch, nheads, seqlen_q, seqlen_k), q's dtype

Arguments of all:

dropout_p, seed, offset    fastattn's Philox; without a seed a fresh one is drawn, and the backwards need the forward's
softmax_scale              default 1 / sqrt(headdim)
causal, window_size        bottom-right aligned; window_size=(left, right) counts keys from the diagonal, inclusive, -1 = no limit
softcap                    0.0 = off
alibi_slopes               (nheads,) or (batch, nheads)
deterministic              the backward's; the forward gives the same bits in every run in any case
return_attn_probs          -> (out, softmax_lse, S_dmask); S_dmask is the encoded softmax with dropout, None without, as in the original
bias                       additive, broadcasts to (batch, nheads, seqlen_q, seqlen_k), packed to the maxima and indexed inside
                           each sequence; not in the original, its gradient with need_dbias=True in the backwards

Beyond the original: float32 and float64, the CPU, head sizes that are no multiple of 8, ALiBi and softcap with dropout, v of another
head size. A row that may see nothing has out 0 and lse -inf (the original: +inf), and gradients 0.

Errors: ValueError and TypeError that name the argument. Source: Dao-AILab/flash-attention, flash_attn_interface.py, version 2.8.
"""
from __future__ import annotations

from typing import Any, TypedDict, Unpack

from .arrays import namespace, shape_of
from .probabilities import encode
from .translate import Call, Lengths, backward, dropout, forward, pair, window

_NAMES = {"lse": "softmax_lse", "window": "window_size"}
_OPEN = (-1, -1)


# ---------------------------------------------------------------- dense
def flash_attn_func(q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                    window_size: tuple[int, int] = _OPEN, softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
                    return_attn_probs: bool = False, *, bias: Any = None, seed: int | None = None, offset: int = 0) -> Any:
    """out (batch, seqlen_q, nheads, headdim), or (out, softmax_lse, S_dmask). Shapes and arguments: this module's docstring."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward("flash_attn_func", q, k, v, None, return_attn_probs, *options)


def flash_attn_kvpacked_func(q: Any, kv: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                             window_size: tuple[int, int] = _OPEN, softcap: float = 0.0, alibi_slopes: Any = None,
                             deterministic: bool = False, return_attn_probs: bool = False, *, bias: Any = None, seed: int | None = None,
                             offset: int = 0) -> Any:
    """flash_attn_func with k and v in one array, kv[:, :, 0] and kv[:, :, 1]; nothing is copied."""
    call = "flash_attn_kvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward(call, q, *_unpack(call, "kv", kv, 2, 5), None, return_attn_probs, *options)


def flash_attn_qkvpacked_func(qkv: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                              window_size: tuple[int, int] = _OPEN, softcap: float = 0.0, alibi_slopes: Any = None,
                              deterministic: bool = False, return_attn_probs: bool = False, *, bias: Any = None, seed: int | None = None,
                              offset: int = 0) -> Any:
    """flash_attn_func with q, k and v in one array, qkv[:, :, 0] and so on; nothing is copied."""
    call = "flash_attn_qkvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward(call, *_unpack(call, "qkv", qkv, 3, 5), None, return_attn_probs, *options)


# ---------------------------------------------------------------- varlen
def flash_attn_varlen_func(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
                           dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                           window_size: tuple[int, int] = _OPEN, softcap: float = 0.0, alibi_slopes: Any = None,
                           deterministic: bool = False, return_attn_probs: bool = False, block_table: None = None, *, bias: Any = None,
                           seed: int | None = None, offset: int = 0) -> Any:
    """out (total_q, nheads, headdim), or (out, softmax_lse, S_dmask), of sequences packed along the first axis; cu_seqlens
    (batch + 1,) int32 or int64. block_table, paged keys, must be None: gather the pages first."""
    if block_table is not None:
        raise Call("flash_attn_varlen_func").value("block_table", "is given", "None, because keys in pages are not read in place",
                                                   "gather the pages of each sequence into k and v")
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward("flash_attn_varlen_func", q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), return_attn_probs,
                    *options)


def flash_attn_varlen_kvpacked_func(q: Any, kv: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
                                    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                                    window_size: tuple[int, int] = _OPEN, softcap: float = 0.0, alibi_slopes: Any = None,
                                    deterministic: bool = False, return_attn_probs: bool = False, *, bias: Any = None,
                                    seed: int | None = None, offset: int = 0) -> Any:
    """flash_attn_varlen_func with k and v in one array, kv[:, 0] and kv[:, 1]; nothing is copied."""
    call = "flash_attn_varlen_kvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward(call, q, *_unpack(call, "kv", kv, 2, 4), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
                    return_attn_probs, *options)


def flash_attn_varlen_qkvpacked_func(qkv: Any, cu_seqlens: Any, max_seqlen: int, dropout_p: float = 0.0,
                                     softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = _OPEN,
                                     softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
                                     return_attn_probs: bool = False, *, bias: Any = None, seed: int | None = None, offset: int = 0) -> Any:
    """flash_attn_varlen_func with q, k and v in one array, qkv[:, 0] and so on; nothing is copied."""
    call = "flash_attn_varlen_qkvpacked_func"
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    return _forward(call, *_unpack(call, "qkv", qkv, 3, 4), (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), return_attn_probs,
                    *options)


# ---------------------------------------------------------------- backward
class BackwardOptions(TypedDict, total=False):
    """The keywords of every backward, with the forward's meaning and defaults; need_dbias asks for bias's gradient too."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Any
    deterministic: bool
    bias: Any
    need_dbias: bool
    seed: int | None
    offset: int


def flash_attn_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any,
                        **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """(dq, dk, dv) of flash_attn_func for dout; with need_dbias=True dbias, of bias's shape, comes last. out and softmax_lse are what the
    forward gave with return_attn_probs=True and the same arguments; each gradient has its argument's shape and dtype."""
    return _backward("flash_attn_backward", dout, q, k, v, out, softmax_lse, None, **options)


def flash_attn_kvpacked_backward(dout: Any, q: Any, kv: Any, out: Any, softmax_lse: Any,
                                 **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """(dq, dkv) of flash_attn_kvpacked_func, dkv stacked by a copy; see flash_attn_backward."""
    call = "flash_attn_kvpacked_backward"
    k, v = _unpack(call, "kv", kv, 2, 5)
    dq, *rest = _backward(call, dout, q, k, v, out, softmax_lse, None, **options)
    return dq, *_pack(call, kv, rest, 2)


def flash_attn_qkvpacked_backward(dout: Any, qkv: Any, out: Any, softmax_lse: Any, **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """(dqkv,) of flash_attn_qkvpacked_func, stacked by a copy; see flash_attn_backward."""
    call = "flash_attn_qkvpacked_backward"
    q, k, v = _unpack(call, "qkv", qkv, 3, 5)
    return _pack(call, qkv, _backward(call, dout, q, k, v, out, softmax_lse, None, **options), 3)


def flash_attn_varlen_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, cu_seqlens_q: Any, cu_seqlens_k: Any,
                               max_seqlen_q: int, max_seqlen_k: int, **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """(dq, dk, dv) of flash_attn_varlen_func; see flash_attn_backward. Rows of no sequence have gradient 0."""
    packed = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _backward("flash_attn_varlen_backward", dout, q, k, v, out, softmax_lse, packed, **options)


def flash_attn_varlen_kvpacked_backward(dout: Any, q: Any, kv: Any, out: Any, softmax_lse: Any, cu_seqlens_q: Any, cu_seqlens_k: Any,
                                        max_seqlen_q: int, max_seqlen_k: int, **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """(dq, dkv) of flash_attn_varlen_kvpacked_func, dkv stacked by a copy; see flash_attn_backward."""
    call, packed = "flash_attn_varlen_kvpacked_backward", (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    k, v = _unpack(call, "kv", kv, 2, 4)
    dq, *rest = _backward(call, dout, q, k, v, out, softmax_lse, packed, **options)
    return dq, *_pack(call, kv, rest, 2)


def flash_attn_varlen_qkvpacked_backward(dout: Any, qkv: Any, out: Any, softmax_lse: Any, cu_seqlens: Any, max_seqlen: int,
                                         **options: Unpack[BackwardOptions]) -> tuple[Any, ...]:
    """(dqkv,) of flash_attn_varlen_qkvpacked_func, stacked by a copy; see flash_attn_backward."""
    call, packed = "flash_attn_varlen_qkvpacked_backward", (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    q, k, v = _unpack(call, "qkv", qkv, 3, 4)
    return _pack(call, qkv, _backward(call, dout, q, k, v, out, softmax_lse, packed, **options), 3)


# ---------------------------------------------------------------- what they share
def _unpack(call: str, argument: str, packed: Any, parts: int, rank: int) -> tuple[Any, ...]:
    """q, k and v, or k and v, as views of the array that holds them along its third axis from the end."""
    shape = shape_of(packed, call, argument)
    if len(shape) != rank or shape[-3] != parts:
        raise Call(call).value(argument, f"has shape {shape}", f"{rank} axes (..., {parts}, nheads, headdim)")
    return tuple(packed[..., part, :, :] for part in range(parts))


def _pack(call: str, like: Any, grads: Any, parts: int) -> tuple[Any, ...]:
    """The first `parts` gradients stacked as _unpack found their arguments, then the others."""
    return namespace(like, call, "dout").stack(list(grads[:parts]), -3), *grads[parts:]


def _options(call: Call, dropout_p: float, softmax_scale: float | None, causal: bool, window_size: Any, softcap: float, alibi_slopes: Any,
             bias: Any, seed: int | None, offset: int) -> dict[str, Any]:
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
              dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
              window_size: tuple[int, int] = _OPEN, softcap: float = 0.0,
              alibi_slopes: Any = None, deterministic: bool = False, bias: Any = None, need_dbias: bool = False, seed: int | None = None,
              offset: int = 0) -> tuple[Any, ...]:
    call = Call(name, _NAMES)
    options = _options(call, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, seed, offset)
    packed = None if lengths is None else Lengths.read(call, *lengths)
    grads = backward(call, dout, q, k, v, out, softmax_lse, packed, need_dbias=need_dbias, deterministic=deterministic, **options)
    return grads[:4] if need_dbias else grads[:3]
