"""The public functions on packed arrays: api.py, and where the sequences are."""
from __future__ import annotations

from typing import Any, Literal, Never, Unpack, overload

import numpy as np

from .dispatch import backward, backward_again, forward, forward_again, read
from .flex.operands import functions_of
from .options import NO_SCALES, read_eight_bit, read_options, read_position
from .problem import Grads
from .signature import strict, unknown_arguments
from .types import (
    A,
    Array,
    BlockMask,
    Captured,
    Causal,
    D,
    EngineName,
    Integer,
    Lengths,
    MaskMod,
    Number,
    PackedOptions,
    PerHead,
    Place,
    S,
    Scale,
    ScoreMod,
    Window,
)


@overload
def attention_varlen(q: A, k: Array, v: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, return_lse: Literal[False] = ...,
                     **options: Unpack[PackedOptions]) -> A: ...
@overload
def attention_varlen(q: np.ndarray[S, D], k: Array, v: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
                     return_lse: Literal[True],
                     **options: Unpack[PackedOptions]) -> tuple[np.ndarray[S, D], np.ndarray[Any, Any]]: ...
@overload
def attention_varlen(q: A, k: Array, v: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, return_lse: Literal[True],
                     **options: Unpack[PackedOptions]) -> tuple[A, A]: ...
@overload
def attention_varlen(q: A, k: Array, v: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, return_lse: bool,
                     **options: Unpack[PackedOptions]) -> A | tuple[A, Any]: ...
@strict
def attention_varlen(q: Array, k: Array, v: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *more: Never,
                     max_seqlen_q: Integer | None = None, max_seqlen_k: Integer | None = None, seqused_k: Lengths | None = None,
                     causal: Causal = False, window: Window | None = None, softmax_scale: Number | None = None,
                     softcap: Number | None = None, alibi_slopes: PerHead | None = None, bias: Array | None = None,
                     mask: Array | None = None, sinks: PerHead | None = None, score_mod: ScoreMod | None = None,
                     mask_mod: MaskMod | None = None, captured: Captured = (), block_mask: BlockMask | None = None,
                     dropout_p: Number = 0.0, seed: Integer | None = None,
                     offset: Integer = 0, diagonal: Integer | Lengths | None = None, dropout_at: Place | None = None,
                     dropout_heads: Integer | None = None, layout: Literal["thd"] = "thd", out: Array | None = None,
                     return_lse: bool = False, q_scale: Scale | None = None, k_scale: Scale | None = None, v_scale: Scale | None = None,
                     out_dtype: Any = None, out_scale: Scale | None = None, stream: Any = None, engine: EngineName | None = None,
                     **unknown: Never) -> Any:
    """`attention` of sequences of different lengths, packed along one axis.

    Sequence n has rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] of q, and likewise of k and v. Its queries attend its
    keys only.

    Parameters
    ----------
    q : array (total_q, num_heads, head_dim)
        Dtypes are those of `attention`; head_dim from 1 to 576.
    k : array (total_k, num_heads_k, head_dim)
        num_heads_k divides num_heads.
    v : array (total_k, num_heads_k, head_dim_v)
    cu_seqlens_q, cu_seqlens_k : array (sequences + 1,)
        int32 or int64, cumulative lengths in rows: 0 first, never decreasing, the last at most total_q or total_k. A
        list for host arrays.
    max_seqlen_q, max_seqlen_k : int, optional
        At least the longest sequence. Lengths on a device are not read by the host, so there the defaults are total_q
        and total_k, and a smaller value saves work.
    seqused_k : array (sequences,), optional
        int32 or int64: only the first seqused_k[n] keys of sequence n exist.
    alibi_slopes : array (num_heads,) or (sequences, num_heads), optional
    bias, mask : array that broadcasts to (sequences, num_heads, max_seqlen_q, max_seqlen_k), optional
        Indexed inside each sequence.
    causal, window, softmax_scale, softcap, sinks, dropout_p, seed, offset : optional
        As in `attention`, inside each sequence.
    score_mod, mask_mod, captured, block_mask : optional
        As in `attention`: b is the number of the sequence, q_idx and kv_idx count inside it.
    diagonal : int or array (sequences,), optional
        As in `attention`, for all sequences or each one; int32 or int64, a list for host arrays.
    dropout_at, dropout_heads : optional
        As in `attention`: batch entry n is sequence n, and row and column are added in each.
    layout : {"thd"}
        The one layout of packed arrays.
    out, return_lse, q_scale, k_scale, v_scale, out_dtype, out_scale, stream, engine : optional
        As in `attention`; the batch of scales is that of sequences.

    Returns
    -------
    out : array (total_q, num_heads, head_dim_v)
        Rows of no sequence are 0.
    lse : array (num_heads, total_q)
        Only with ``return_lse``. Rows of no sequence are -inf.

    Raises
    ------
    ValueError, TypeError, UnsupportedError, ImportError
        As `attention`. Lengths on a device are not checked.

    Notes
    -----
    Source: Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning", ICLR 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import attention_varlen
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 7, 4, 8), np.float32)
    >>> attention_varlen(q, k, v, [0, 3, 7], [0, 3, 7], causal=True).shape          # two sequences, of 3 and 4 rows
    (7, 4, 8)
    """
    if more or unknown:
        raise unknown_arguments(attention_varlen, more, unknown)
    call = "attention_varlen"
    if type(return_lse) is not bool:
        return_lse = bool(return_lse)
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q, max_seqlen_k)
    diagonals = scales = None
    if not (diagonal is None and dropout_at is None and dropout_heads is None):                                         # 0.1 us
        options, diagonals = read_position(call, options, diagonal, dropout_at, dropout_heads, packed=True)
    if not (q_scale is None and k_scale is None and v_scale is None and out_dtype is None and out_scale is None):       # 0.1 us
        options, scales = read_eight_bit(call, options, (q_scale, k_scale, v_scale, out_scale), out_dtype)
    scores, lengths = (bias, mask, alibi_slopes, sinks), (cu_seqlens_q, cu_seqlens_k, seqused_k, diagonals)
    flex = functions_of(score_mod, mask_mod, captured, block_mask)
    if out is None and stream is None and scales is None and flex is None:
        return forward_again(call, engine, options, layout, return_lse, (q, k, v), scores, lengths)
    caller, o = read(call, layout, stream, (q, k, v), scores, lengths, scales, flex)
    return forward(caller, engine, options, o, out, return_lse)


@strict
def attention_varlen_backward(dout: Array, q: A, k: Array, v: Array, out: Array, lse: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths,
                              *more: Never, max_seqlen_q: Integer | None = None, max_seqlen_k: Integer | None = None,
                              seqused_k: Lengths | None = None, causal: Causal = False, window: Window | None = None,
                              softmax_scale: Number | None = None, softcap: Number | None = None,
                              alibi_slopes: PerHead | None = None, bias: Array | None = None, mask: Array | None = None,
                              sinks: PerHead | None = None, score_mod: ScoreMod | None = None, mask_mod: MaskMod | None = None,
                              captured: Captured = (), block_mask: BlockMask | None = None, dropout_p: Number = 0.0,
                              seed: Integer | None = None,
                              offset: Integer = 0, diagonal: Integer | Lengths | None = None, dropout_at: Place | None = None,
                              dropout_heads: Integer | None = None, out_dtype: Any = None, layout: Literal["thd"] = "thd",
                              dlse: Array | None = None, need_dbias: bool = False, need_dcaptured: bool = False,
                              deterministic: bool = False, stream: Any = None, engine: EngineName | None = None,
                              **unknown: Never) -> Grads[A]:
    """Gradients of `attention_varlen`.

    Parameters
    ----------
    dout, out : array (total_q, num_heads, head_dim_v)
        Gradient of the forward's result, and that result.
    q, k, v : array
        The forward's: (total_q, num_heads, head_dim), (total_k, num_heads_k, head_dim) and (total_k, num_heads_k,
        head_dim_v).
    lse : array (num_heads, total_q)
        The forward's result with ``return_lse=True``.
    cu_seqlens_q, cu_seqlens_k : array (sequences + 1,)
        The forward's.
    max_seqlen_q, max_seqlen_k, seqused_k : optional
        The forward's.
    causal, window, softmax_scale, softcap, alibi_slopes, bias, mask, sinks, dropout_p, seed, offset, layout : optional
        The forward's, with the same values.
    diagonal, dropout_at, dropout_heads : optional
        The forward's, with the same values.
    out_dtype : str or dtype, optional
        As in `attention_backward`.
    dlse : array (num_heads, total_q), optional
        Gradient of lse, if the loss depends on lse.
    score_mod, mask_mod, captured, block_mask : optional
        The forward's.
    need_dbias, need_dcaptured, deterministic : bool, default False
        As in `attention_backward`.
    stream, engine : optional
        As in `attention`.

    Returns
    -------
    Grads
        As `attention_backward`. Rows of no sequence and keys past seqused_k have gradient 0.

    Raises
    ------
    ValueError, TypeError, UnsupportedError, ImportError
        As `attention_varlen`.

    Notes
    -----
    Source: as `attention_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import attention_varlen, attention_varlen_backward
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 7, 4, 8), np.float32)
    >>> out, lse = attention_varlen(q, k, v, [0, 3, 7], [0, 3, 7], return_lse=True)
    >>> attention_varlen_backward(dout, q, k, v, out, lse, [0, 3, 7], [0, 3, 7]).dk.shape
    (7, 4, 8)
    """
    if more or unknown:
        raise unknown_arguments(attention_varlen_backward, more, unknown)
    call = "attention_varlen_backward"
    if type(deterministic) is not bool:
        deterministic = bool(deterministic)
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q, max_seqlen_k)
    diagonals = None
    if not (diagonal is None and dropout_at is None and dropout_heads is None and out_dtype is None):
        options, diagonals = read_position(call, options, diagonal, dropout_at, dropout_heads, packed=True)
        options, _ = read_eight_bit(call, options, NO_SCALES, out_dtype)
    scores, lengths = (bias, mask, alibi_slopes, sinks), (cu_seqlens_q, cu_seqlens_k, seqused_k, diagonals)
    given, need_dbias = (dout, out, lse, dlse), bool(need_dbias)
    flex = functions_of(score_mod, mask_mod, captured, block_mask)
    if stream is None and flex is None and not need_dcaptured:
        return backward_again(call, engine, options, layout, deterministic, (q, k, v), given, scores, lengths, need_dbias)
    caller, o = read(call, layout, stream, (q, k, v), scores, lengths, flex=flex)
    return backward(caller, engine, options, o, given, need_dbias, deterministic, need_dcaptured=bool(need_dcaptured))
