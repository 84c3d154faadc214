"""The public functions. Nothing is computed here: each one reads its options and hands its arrays to dispatch.py.

Signatures and documentation are the content of this file. `help(fastattn.attention)` documents every keyword; the other
three attention functions share its keywords and describe what differs.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Never, Unpack, overload

import numpy as np

from .arrays.convert import Caller
from .dispatch import backward, backward_again, forward, forward_again, read
from .engine import load
from .options import Check, read_eight_bit, read_options
from .problem import Grads, check_array
from .signature import strict, uncompiled, unknown_arguments
from .types import (
    A,
    Array,
    B,
    Causal,
    D,
    DenseOptions,
    EngineName,
    Integer,
    Layout,
    Lengths,
    Number,
    PackedOptions,
    PerHead,
    S,
    Scale,
    Window,
)


# ---------------------------------------------------------------- dense arrays
@overload
def attention(q: A, k: Array, v: Array, *, return_lse: Literal[False] = ..., **options: Unpack[DenseOptions]) -> A: ...
@overload                                                   # NumPy's types know shape and dtype, and lse has others than out
def attention(q: np.ndarray[S, D], k: Array, v: Array, *, return_lse: Literal[True],
              **options: Unpack[DenseOptions]) -> tuple[np.ndarray[S, D], np.ndarray[Any, Any]]: ...
@overload
def attention(q: A, k: Array, v: Array, *, return_lse: Literal[True], **options: Unpack[DenseOptions]) -> tuple[A, A]: ...
@overload
def attention(q: A, k: Array, v: Array, *, return_lse: bool, **options: Unpack[DenseOptions]) -> A | tuple[A, Any]: ...
@strict
def attention(q: Array, k: Array, v: Array, *more: Never, causal: Causal = False, window: Window | None = None,
              softmax_scale: Number | None = None, softcap: Number | None = None, alibi_slopes: PerHead | None = None,
              bias: Array | None = None, mask: Array | None = None, sinks: PerHead | None = None, dropout_p: Number = 0.0,
              seed: Integer | None = None, offset: Integer = 0, layout: Layout = "bshd", out: Array | None = None,
              return_lse: bool = False, q_scale: Scale | None = None, k_scale: Scale | None = None, v_scale: Scale | None = None,
              out_dtype: Any = None, out_scale: Scale | None = None, stream: Any = None, engine: EngineName | None = None,
              **unknown: Never) -> Any:
    """Exact attention, softmax(scores) @ v, on arrays where they are.

    The score of query row i and key j is ``softcap(softmax_scale * q_i . k_j) + alibi + bias``. Masks then select which
    keys a row attends. Below, d is the key on the diagonal of row i: ``i + seqlen_k - seqlen_q``.

    Parameters
    ----------
    q : array (batch, seqlen_q, num_heads, head_dim)
        float16, bfloat16, float32, float64 or float8_e4m3fn; head_dim from 1 to 576. A NumPy array, a CPU or CUDA tensor of torch, or
        any array that speaks DLPack or the CUDA Array Interface, with any strides. Shapes here are those of
        ``layout="bshd"``.
    k : array (batch, seqlen_k, num_heads_k, head_dim)
        q's dtype, or float8_e4m3fn or float8_e5m2 as v is; q's device. num_heads_k divides num_heads: query heads share
        key heads in groups of num_heads / num_heads_k.
    v : array (batch, seqlen_k, num_heads_k, head_dim_v)
        As k. head_dim_v from 1 to 576 may differ from head_dim.
    causal : bool or str, default False
        True or "bottom_right": row i attends keys j <= d. "top_left": the same with d = i.
    window : (int or None, int or None), optional
        (left, right), counted in keys: row i attends keys from d - left to d + right, inclusive. None is no limit. With
        ``causal="top_left"`` d is i here and for alibi_slopes.
    softmax_scale : float, optional
        Factor of the dot products. Default 1 / sqrt(head_dim).
    softcap : float, optional
        Positive; scores become ``softcap * tanh(score / softcap)``.
    alibi_slopes : array (num_heads,) or (batch, num_heads), optional
        float32, float64 or q's dtype; a list for host arrays. Adds ``-slope * |d - j|``.
    bias : array that broadcasts to (batch, num_heads, seqlen_q, seqlen_k), optional
        q's dtype or float32. Added to the scores; -inf is allowed.
    mask : array that broadcasts to (batch, num_heads, seqlen_q, seqlen_k), optional
        bool, True where a query attends a key. Two axes are always (seqlen_q, seqlen_k): pass a padding mask (batch,
        seqlen_k) as ``mask[:, None, None, :]``, or it is read as rows of queries where batch == seqlen_q.
    sinks : array (num_heads,), optional
        float32, float64 or q's dtype; a list for host arrays. Logits that join the softmax's denominator only.
    dropout_p : float, default 0.0
        Probability in [0, 1] of dropping a softmax weight; the others are scaled by 1 / (1 - dropout_p). It counts in
        steps of 1 / 65536, so below 7.6e-6, half a step, nothing is dropped.
    seed : int, optional
        64-bit key of the dropout's random numbers. Needed if dropout_p > 0. Use a new one each step.
    offset : int, default 0
        32-bit counter: one seed gives a different mask for each offset.
    layout : {"bshd", "bhsd"}, default "bshd"
        Order of the axes of q, k, v and out. "bhsd" is (batch, num_heads, seqlen, head_dim). lse does not depend on it.
    out : array of the result's shape and dtype, optional
        Written and returned. It may share no memory with an input.
    return_lse : bool, default False
        Return (out, lse).
    q_scale, k_scale, v_scale : float or array (1,), (num_heads_k,) or (batch, num_heads_k), optional
        Of 8-bit operands, which stand for q * q_scale, k * k_scale and v * v_scale; see `quantize_fp8`. float32. Query
        heads use their key head's q_scale.
    out_dtype : str or dtype, optional
        Beside 8-bit k and v: "bfloat16", the default with an 8-bit q, else q's, "float16", "float32" or "float8_e4m3fn".
    out_scale : float or array (1,), optional
        An 8-bit output stands for out * out_scale; it saturates.
    stream : int or stream, optional
        CUDA arrays only: a CUstream handle, or a stream of cuda.core, torch, CuPy, Numba or anything with
        ``__cuda_stream__``. All work of the call goes on it, after what q's library has on its current stream. None:
        the current stream of q's library if it is known (torch, CuPy, or the one in q's ``__cuda_array_interface__``),
        else the legacy default stream.
    engine : str, optional
        None chooses, see `use_engine`. "cpu", "gpu", "reference", "sm90", "sm80", "simt" or the name of a registered
        engine forces one. `engines` lists them; `explain` says which one a call takes, and why.

    Returns
    -------
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        q's dtype or out_dtype, of q's library, in the caller's layout. A row that attends no key is 0.
    lse : array (batch, num_heads, seqlen_q)
        Only with ``return_lse``: the natural log of the softmax's denominator, float32 (float64 for float64 input). A
        row that attends no key has -inf, or its sink.

    Raises
    ------
    ValueError, TypeError
        An argument is wrong. Nothing has been written. The message names the argument, what it is and what would work.
    UnsupportedError
        The call is valid, but no engine takes it; `reasons` quotes each engine.
    ImportError
        The compiled CPU engine or the packages of the GPU engine are missing.

    Notes
    -----
    Options are values: a number may be a NumPy scalar, or a 0-d array or tensor in host memory, read when the call is made. One
    on a device is refused, because the host would wait for it. So is a tensor that requires grad while torch records.

    CUDA: all arrays of a call are on q's device. The host never waits; results are ready on the call's stream. Results
    are of q's library (JAX and others by DLPack), or a DeviceArray, which speaks DLPack, where q's library allocates
    nothing. In a graph capture they come from torch's or CuPy's pools; otherwise pass `out`. A call that raises in an
    engine may have written part of `out`.

    Source: Dao, Fu, Ermon, Rudra, Re, "FlashAttention: Fast and memory-efficient exact attention with IO-awareness",
    NeurIPS 2022. ALiBi: Press, Smith, Lewis, ICLR 2022. Dropout: Philox4x32-10, Salmon et al., SC 2011.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import attention
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 5, 4, 8), np.float32)
    >>> k, v = rng.standard_normal((2, 2, 7, 2, 8), np.float32)
    >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((2, 5, 4, 8), (2, 4, 5))
    """
    if more or unknown:
        raise unknown_arguments(attention, more, unknown)
    call = "attention"
    if type(return_lse) is not bool:
        return_lse = bool(return_lse)
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset)
    scales = None
    if not (q_scale is None and k_scale is None and v_scale is None and out_dtype is None and out_scale is None):       # 0.1 us
        options, scales = read_eight_bit(call, options, (q_scale, k_scale, v_scale, out_scale), out_dtype)
    scores = bias, mask, alibi_slopes, sinks
    if out is None and stream is None and scales is None:
        return forward_again(call, engine, options, layout, return_lse, (q, k, v), scores)
    caller, o = read(call, layout, stream, (q, k, v), scores, None, scales)
    return forward(caller, engine, options, o, out, return_lse)


@strict
def attention_backward(dout: Array, q: A, k: Array, v: Array, out: Array, lse: Array, *more: Never, causal: Causal = False,
                       window: Window | None = None, softmax_scale: Number | None = None, softcap: Number | None = None,
                       alibi_slopes: PerHead | None = None, bias: Array | None = None, mask: Array | None = None,
                       sinks: PerHead | None = None, dropout_p: Number = 0.0, seed: Integer | None = None, offset: Integer = 0,
                       layout: Layout = "bshd", dlse: Array | None = None, need_dbias: bool = False, deterministic: bool = False,
                       stream: Any = None, engine: EngineName | None = None, **unknown: Never) -> Grads[A]:
    """Gradients of `attention`.

    Parameters
    ----------
    dout : array (batch, seqlen_q, num_heads, head_dim_v)
        Gradient of out, of q's dtype.
    q, k, v : array
        The forward's: q (batch, seqlen_q, num_heads, head_dim), k (batch, seqlen_k, num_heads_k, head_dim) and
        v (batch, seqlen_k, num_heads_k, head_dim_v), or with heads before seqlen for ``layout="bhsd"``.
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        The forward's result, of q's dtype.
    lse : array (batch, num_heads, seqlen_q)
        The forward's result with ``return_lse=True``, float32 (float64 for float64 input).
    causal, window, softmax_scale, softcap, alibi_slopes, bias, mask, sinks, dropout_p, seed, offset, layout : optional
        The forward's, with the same values: see `attention`.
    dlse : array (batch, num_heads, seqlen_q), optional
        Gradient of lse, of lse's dtype, if the loss depends on lse.
    need_dbias : bool, default False
        Compute the gradient of bias too.
    deterministic : bool, default False
        The same bits in every run. Slower on the GPU. The CPU engine is always deterministic.
    stream, engine : optional
        As in `attention`.

    Returns
    -------
    Grads
        dq, dk, dv, dbias and dsinks, each with its input's shape, layout and dtype. dbias only with
        ``need_dbias=True``, dsinks only if sinks are given; otherwise None.

    Raises
    ------
    ValueError, TypeError, UnsupportedError, ImportError
        As `attention`.

    Notes
    -----
    delta = rowsum(dout * out), P = exp(S - lse), dS = P * (dP - delta + dlse). out and lse are used as they are given. So a call over
    a part of the keys, with the out and lse of all keys, returns that part's share of dq.

    Source: Dao et al., "FlashAttention", NeurIPS 2022, algorithm 4.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import attention, attention_backward
    >>> q, k, v, dout = np.random.default_rng(0).standard_normal((4, 2, 5, 4, 8), np.float32)
    >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> grads = attention_backward(dout, q, k, v, out, lse, causal=True)
    >>> grads.dq.shape, grads.dbias
    ((2, 5, 4, 8), None)
    """
    if more or unknown:
        raise unknown_arguments(attention_backward, more, unknown)
    call = "attention_backward"
    if type(deterministic) is not bool:
        deterministic = bool(deterministic)
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset)
    scores, given, need_dbias = (bias, mask, alibi_slopes, sinks), (dout, out, lse, dlse), bool(need_dbias)
    if stream is None:
        return backward_again(call, engine, options, layout, deterministic, (q, k, v), given, scores, None, need_dbias)
    caller, o = read(call, layout, stream, (q, k, v), scores)
    return backward(caller, engine, options, o, given, need_dbias, deterministic)


# ---------------------------------------------------------------- packed arrays
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
                     mask: Array | None = None, sinks: PerHead | None = None, dropout_p: Number = 0.0, seed: Integer | None = None,
                     offset: Integer = 0, layout: Literal["thd"] = "thd", out: Array | None = None, return_lse: bool = False,
                     q_scale: Scale | None = None, k_scale: Scale | None = None, v_scale: Scale | None = None, out_dtype: Any = None,
                     out_scale: Scale | None = None, stream: Any = None, engine: EngineName | None = None, **unknown: Never) -> Any:
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
    scales = None
    if not (q_scale is None and k_scale is None and v_scale is None and out_dtype is None and out_scale is None):       # 0.1 us
        options, scales = read_eight_bit(call, options, (q_scale, k_scale, v_scale, out_scale), out_dtype)
    scores, lengths = (bias, mask, alibi_slopes, sinks), (cu_seqlens_q, cu_seqlens_k, seqused_k)
    if out is None and stream is None and scales is None:
        return forward_again(call, engine, options, layout, return_lse, (q, k, v), scores, lengths)
    caller, o = read(call, layout, stream, (q, k, v), scores, lengths, scales)
    return forward(caller, engine, options, o, out, return_lse)


@strict
def attention_varlen_backward(dout: Array, q: A, k: Array, v: Array, out: Array, lse: Array, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths,
                              *more: Never, max_seqlen_q: Integer | None = None, max_seqlen_k: Integer | None = None,
                              seqused_k: Lengths | None = None, causal: Causal = False, window: Window | None = None,
                              softmax_scale: Number | None = None, softcap: Number | None = None,
                              alibi_slopes: PerHead | None = None, bias: Array | None = None, mask: Array | None = None,
                              sinks: PerHead | None = None, dropout_p: Number = 0.0, seed: Integer | None = None,
                              offset: Integer = 0, layout: Literal["thd"] = "thd", dlse: Array | None = None, need_dbias: bool = False,
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
    dlse : array (num_heads, total_q), optional
        Gradient of lse, if the loss depends on lse.
    need_dbias, deterministic : bool, default False
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
    scores, lengths = (bias, mask, alibi_slopes, sinks), (cu_seqlens_q, cu_seqlens_k, seqused_k)
    given, need_dbias = (dout, out, lse, dlse), bool(need_dbias)
    if stream is None:
        return backward_again(call, engine, options, layout, deterministic, (q, k, v), given, scores, lengths, need_dbias)
    caller, o = read(call, layout, stream, (q, k, v), scores, lengths)
    return backward(caller, engine, options, o, given, need_dbias, deterministic)


# ---------------------------------------------------------------- helpers for callers
@uncompiled
def merge_states(outs: Sequence[A], lses: Sequence[B], *, layout: Layout | Literal["thd"] = "bshd", stream: Any = None) -> tuple[A, B]:
    """Attention over all keys from partial results over disjoint keys.

    Parameters
    ----------
    outs : sequence of arrays
        One out for each part, of one shape, dtype and device: (batch, seqlen_q, num_heads, head_dim_v), with
        "bhsd" (batch, num_heads, seqlen_q, head_dim_v), with "thd" (total_q, num_heads, head_dim_v).
    lses : sequence of arrays
        One lse for each part: (batch, num_heads, seqlen_q), with "thd" (num_heads, total_q); float32 (float64 for
        float64 outs).
    layout : {"bshd", "bhsd", "thd"}, default "bshd"
        Order of the axes of outs.
    stream : int or stream, optional
        As in `attention`, CUDA arrays only.

    Returns
    -------
    out, lse : array
        The shapes and dtypes of one part.

    Raises
    ------
    ValueError, TypeError
        The parts do not fit together.

    Notes
    -----
    ``out = sum(exp(lse_n - lse) * out_n)``. A row without keys in a part, lse -inf or +inf (FlashAttention's mark), adds nothing, whatever
    out holds there. Give sinks to one of the parts only.

    Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import attention, merge_states
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 6, 2, 8), np.float32)
    >>> parts = [attention(q, k[:, keys], v[:, keys], return_lse=True) for keys in (np.s_[:4], np.s_[4:])]
    >>> out, lse = merge_states(*zip(*parts))
    >>> np.allclose(out, attention(q, k, v), atol=1e-6)
    True
    """
    call, check = "merge_states", Check("merge_states")
    if layout not in ("bshd", "bhsd", "thd"):
        raise check.value("layout", f"is {layout!r}", "'bshd', 'bhsd' or 'thd'")
    if len(outs) == 0 or len(outs) != len(lses):
        raise check.value("lses", f"has {len(lses)} parts", f"one for each of at least one out, {len(outs)}")
    caller = Caller(call, layout, stream, "outs[0]", outs[0])
    out_views = [caller.first, *[caller.tokens(x, f"outs[{n}]") for n, x in enumerate(outs) if n]]
    lse_views = [caller.view(x, f"lses[{n}]") for n, x in enumerate(lses)]
    first, rank = out_views[0], 3 if layout == "thd" else 4
    if len(first.shape) != rank:
        raise check.value("outs[0]", f"has shape {first.shape}", f"{rank} axes for layout {layout!r}")
    check.dtype("outs[0]", first, ("float32", "float64", "float16", "bfloat16"))
    lse_shape, lse_dtype = (*first.shape[:-3], first.shape[-2], first.shape[-3]), first.compute_dtype
    for n, (out, lse) in enumerate(zip(out_views, lse_views, strict=True)):
        check_array(call, f"outs[{n}]", out, first.shape, first.dtype, first.device)
        check_array(call, f"lses[{n}]", lse, lse_shape, lse_dtype, first.device)
    if caller.stream is None:
        from .merging import merge_states as merge
    else:
        merge = load("gpu", call).merge_states
    merged, merged_lse = caller.output(first.shape, first.dtype, first), caller.allocate(lse_shape, lse_dtype, lse_views[0])
    merge(out_views, lse_views, merged.view, merged_lse.view, caller.handle)
    return merged.finish(), merged_lse.finish()
