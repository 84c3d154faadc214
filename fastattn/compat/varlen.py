"""torch.nn.attention.varlen.varlen_attn for any array, and its backward as a function.

Shapes, N sequences packed along the first axis:

    query (T_q, H, D)    key (T_k, H_k, D)    value (T_k, H_k, D_v)    cu_seq_q, cu_seq_k (N + 1,) int32 or int64
    out   (T_q, H, D_v)  lse (H, T_q), float32 (float64 for float64 input)

Beyond the original: every dtype, D from 1 to 256 on every engine, a D_v of its own, ALiBi, an additive bias with its
gradient, seqused_k in the backward too, and all of it on the CPU.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from .arrays import shape_of
from .translate import TORCH, Call, Lengths, backward, forward, pair, window

_NAMES = {**TORCH, "cu_seqlens_q": "cu_seq_q", "cu_seqlens_k": "cu_seq_k", "max_seqlen_q": "max_q", "max_seqlen_k": "max_k",
          "window": "window_size"}
_FORWARD, _BACKWARD = Call("varlen_attn", _NAMES), Call("varlen_attn_backward", _NAMES)


class AuxRequest(NamedTuple):
    """What varlen_attn returns besides out: lse if `lse` is True."""

    lse: bool = False


def varlen_attn(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int | None, max_k: int | None,
                is_causal: bool = False, return_aux: AuxRequest | None = None, *, scale: float | None = None,
                window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Any = None, attn_bias: Any = None,
                alibi_slopes: Any = None) -> Any:
    """Attention inside each of the packed sequences, as torch.nn.attention.varlen.varlen_attn.

    Parameters
    ----------
    query, key, value : array
        (T_q, H, D), (T_k, H_k, D), (T_k, H_k, D_v), the sequences one after the other.
    cu_seq_q, cu_seq_k : array
        (N + 1,) int32 or int64: where each of the N sequences begins.
    max_q, max_k : int or None
        The longest sequences. None: found in cu_seq in host memory; on a device the totals are taken.
    is_causal : bool
        The same as 0 keys after the diagonal. The diagonal is bottom-right aligned in each sequence.
    return_aux : AuxRequest, optional
        AuxRequest(lse=True) returns lse too.
    scale : float, optional
        Factor of the scores. Default 1 / sqrt(D).
    window_size : tuple of int
        (left, right): keys before and after the diagonal, inclusive, -1 = no limit.
    enable_gqa : bool
        Let groups of query heads share a key head.
    seqused_k : array, optional
        (N,): how many keys of each sequence are used.
    attn_bias : array, optional
        Additive, broadcasts to (N, H, max_q, max_k), indexed inside each sequence. Not in the original.
    alibi_slopes : array, optional
        (H,) or (N, H). Not in the original.

    Returns
    -------
    array, or tuple of array
        out (T_q, H, D_v), or (out, lse). Rows that attend nothing: out 0, lse -inf.

    Raises
    ------
    ValueError
        Shapes, head counts and lengths that do not go together.
    TypeError
        Unsupported dtypes.

    Notes
    -----
    Two arguments of the original are missing. block_table (paged keys): gather the pages first. num_splits: it changes
    no result, and fastattn chooses it.

    Source: torch.nn.attention.varlen, PyTorch 2.10 and 2.13.
    """
    packed, options = _translate(_FORWARD, query, key, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window_size, enable_gqa,
                                 seqused_k, attn_bias, alibi_slopes)
    want_lse = return_aux is not None and bool(return_aux.lse)
    out, lse = forward(_FORWARD, query, key, value, packed, return_lse=want_lse, **options)
    return (out, lse) if want_lse else out


def varlen_attn_backward(grad_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, cu_seq_q: Any, cu_seq_k: Any,
                         max_q: int | None, max_k: int | None, is_causal: bool = False, *, scale: float | None = None,
                         window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Any = None, attn_bias: Any = None,
                         alibi_slopes: Any = None, grad_lse: Any = None, need_dbias: bool = False,
                         deterministic: bool = False) -> tuple[Any, ...]:
    """Gradients of varlen_attn, as torch's operator _varlen_attn_backward.

    Parameters
    ----------
    grad_out : array
        Gradient of out, (T_q, H, D_v).
    out, lse : array
        Results of varlen_attn with return_aux=AuxRequest(lse=True) and the same arguments.
    grad_lse : array, optional
        Gradient of lse, (H, T_q), if lse was used too. The original ignores it.
    need_dbias : bool
        Compute attn_bias's gradient too. Not in the original.
    deterministic : bool
        The same bits in every run. Not in the original.

    All other parameters are those of varlen_attn.

    Returns
    -------
    tuple of array
        (dq, dk, dv), with dbias as a fourth if need_dbias, each of its argument's shape and dtype. Rows of no
        sequence and keys past seqused_k have gradient 0.

    Raises
    ------
    ValueError, TypeError
        As varlen_attn.
    """
    packed, options = _translate(_BACKWARD, query, key, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window_size, enable_gqa,
                                 seqused_k, attn_bias, alibi_slopes)
    grads = backward(_BACKWARD, grad_out, query, key, value, out, lse, packed, dlse=grad_lse, need_dbias=need_dbias,
                     deterministic=deterministic, **options)
    return grads[:4] if need_dbias else grads[:3]


def _translate(call: Call, query: Any, key: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int | None, max_k: int | None, is_causal: bool,
               scale: float | None, window_size: Any, enable_gqa: bool, seqused_k: Any, attn_bias: Any,
               alibi_slopes: Any) -> tuple[Lengths, dict[str, Any]]:
    for name, cu in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if cu is None:
            raise call.value(name, "is None", "cumulative lengths (N + 1,)", "scaled_dot_product_attention takes dense arrays")
    shape_q, shape_k = shape_of(query, call.name, "query"), shape_of(key, call.name, "key")
    if not call.flag("enable_gqa", enable_gqa) and len(shape_q) == len(shape_k) == 3 and shape_q[1] != shape_k[1]:
        raise call.value("key", f"has {shape_k[1]} heads", f"query's {shape_q[1]}",
                         "enable_gqa=True lets groups of query heads share a key head")
    options = {"causal": call.flag("causal", is_causal), "window": window(call, "window_size", *pair(call, "window_size", window_size)),
               "softmax_scale": scale, "bias": attn_bias, "alibi_slopes": alibi_slopes}
    return Lengths.read(call, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k), options
