"""The public functions on dense arrays; those on packed ones are in api_packed.py. Nothing is computed here: each one reads its
options and hands its arrays to dispatch.py.

Signatures and documentation are the content of both files. `help(fastattn.attention)` documents every keyword; the other
three attention functions share its keywords and describe what differs.
"""
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
    DenseOptions,
    EngineName,
    Integer,
    Layout,
    MaskMod,
    Number,
    PerHead,
    Place,
    S,
    Scale,
    ScoreMod,
    Window,
)


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
              bias: Array | None = None, mask: Array | None = None, sinks: PerHead | None = None,
              score_mod: ScoreMod | None = None, mask_mod: MaskMod | None = None, captured: Captured = (),
              block_mask: BlockMask | None = None, dropout_p: Number = 0.0,
              seed: Integer | None = None, offset: Integer = 0, layout: Layout = "bshd", out: Array | None = None,
              diagonal: Integer | None = None, dropout_at: Place | None = None, dropout_heads: Integer | None = None,
              return_lse: bool = False, q_scale: Scale | None = None, k_scale: Scale | None = None, v_scale: Scale | None = None,
              out_dtype: Any = None, out_scale: Scale | None = None, stream: Any = None, engine: EngineName | None = None,
              **unknown: Never) -> Any:
    """Exact attention, softmax(scores) @ v, on arrays where they are.

    The score of query row i and key j is ``softcap(softmax_scale * q_i . k_j) + alibi + bias``. Masks then select which
    keys a row attends. Below, d is the key on the diagonal of row i: ``i + seqlen_k - seqlen_q``, or ``i + diagonal``.

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
    score_mod : callable, optional
        ``score_mod(score, b, h, q_idx, kv_idx, *captured)`` gives the score to use instead, from the score so far and its place: batch
        entry, query head, row and key. It is called once with stand-ins, not for each pair, so it computes with numbers, conditions and
        elements of arrays, in Python's, NumPy's or torch's words: ``numpy.where`` instead of ``if``.
    mask_mod : callable, optional
        ``mask_mod(b, h, q_idx, kv_idx)`` gives a condition, True where a row attends a key. It applies beside all other masks.
    captured : sequence of arrays, optional
        More arguments of score_mod: float, int32, int64 or bool arrays on q's device, or numbers. Both functions may also close over
        arrays. An index below 0 or past the end takes the first or the last element.
    block_mask : BlockMask, optional
        What `block_mask` returns: a mask_mod or an array of blocks, or both, for many calls.
    dropout_p : float, default 0.0
        Probability in [0, 1] of dropping a softmax weight; the others are scaled by 1 / (1 - dropout_p). It counts in
        steps of 1 / 65536, so below 7.6e-6, half a step, nothing is dropped.
    seed : int, optional
        64-bit key of the dropout's random numbers. Needed if dropout_p > 0. Use a new one each step.
    offset : int, default 0
        32-bit counter: one seed gives a different mask for each offset.
    diagonal : int, optional
        The key on which row 0 stands, counted from this call's first key; it may lie before or beyond the keys. For a
        call that has some of a problem's rows or keys. Not beside ``causal="top_left"``, which is diagonal 0.
    dropout_at : (int, int, int, int), optional
        Where this call begins in a larger problem, (batch, head, row, column): it drops what a call on the whole would
        drop there. row and column are multiples of 16. Only with dropout.
    dropout_heads : int, optional
        num_heads of that larger problem, by default this call's.
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
        "float32" beside float16 and bfloat16: out is not rounded to q's dtype. Beside 8-bit k and v: "bfloat16", the
        default with an 8-bit q, else q's, "float16", "float32" or "float8_e4m3fn".
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

    score_mod is applied to ``softcap(softmax_scale * q_i . k_j) + alibi + bias``, before the masks. Integers are 32 bits and wrap, floats
    are float32 (float64 for float64 input). A number that the functions hold may differ from call to call.

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
    >>> chunk = attention(q[:, :3], k, v, causal=True, diagonal=2)         # rows 0 to 2 of the same call
    >>> np.allclose(chunk, out[:, :3], atol=1e-6)
    True
    """
    if more or unknown:
        raise unknown_arguments(attention, more, unknown)
    call = "attention"
    if type(return_lse) is not bool:
        return_lse = bool(return_lse)
    options = read_options(call, causal, window, softmax_scale, softcap, dropout_p, seed, offset)
    if not (diagonal is None and dropout_at is None and dropout_heads is None):                                         # 0.1 us
        options, _ = read_position(call, options, diagonal, dropout_at, dropout_heads)
    scales = None
    if not (q_scale is None and k_scale is None and v_scale is None and out_dtype is None and out_scale is None):       # 0.1 us
        options, scales = read_eight_bit(call, options, (q_scale, k_scale, v_scale, out_scale), out_dtype)
    scores = bias, mask, alibi_slopes, sinks
    flex = functions_of(score_mod, mask_mod, captured, block_mask)
    if out is None and stream is None and scales is None and flex is None:
        return forward_again(call, engine, options, layout, return_lse, (q, k, v), scores)
    caller, o = read(call, layout, stream, (q, k, v), scores, None, scales, flex)
    return forward(caller, engine, options, o, out, return_lse)


@strict
def attention_backward(dout: Array, q: A, k: Array, v: Array, out: Array, lse: Array, *more: Never, causal: Causal = False,
                       window: Window | None = None, softmax_scale: Number | None = None, softcap: Number | None = None,
                       alibi_slopes: PerHead | None = None, bias: Array | None = None, mask: Array | None = None,
                       sinks: PerHead | None = None, score_mod: ScoreMod | None = None, mask_mod: MaskMod | None = None,
                       captured: Captured = (), block_mask: BlockMask | None = None, dropout_p: Number = 0.0,
                       seed: Integer | None = None, offset: Integer = 0,
                       diagonal: Integer | None = None, dropout_at: Place | None = None, dropout_heads: Integer | None = None,
                       out_dtype: Any = None, layout: Layout = "bshd", dlse: Array | None = None, need_dbias: bool = False,
                       need_dcaptured: bool = False, deterministic: bool = False, stream: Any = None, engine: EngineName | None = None,
                       **unknown: Never) -> Grads[A]:
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
    score_mod, mask_mod, captured, block_mask : optional
        The forward's.
    diagonal, dropout_at, dropout_heads : optional
        The forward's, with the same values.
    out_dtype : str or dtype, optional
        "float32" beside float16 and bfloat16: dq, dk and dv are not rounded to q's dtype, and out and dout may have
        either dtype.
    dlse : array (batch, num_heads, seqlen_q), optional
        Gradient of lse, of lse's dtype, if the loss depends on lse.
    need_dbias : bool, default False
        Compute the gradient of bias too.
    need_dcaptured : bool, default False
        Compute the gradients of the float arrays that score_mod reads: `Grads.dcaptured`.
    deterministic : bool, default False
        The same bits in every run. Slower on the GPU. The CPU engine is always deterministic.
    stream, engine : optional
        As in `attention`.

    Returns
    -------
    Grads
        dq, dk, dv, dbias and dsinks, each with its input's shape, layout and dtype; dq, dk and dv with out_dtype. dbias only with
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
    if not (diagonal is None and dropout_at is None and dropout_heads is None and out_dtype is None):
        options, _ = read_position(call, options, diagonal, dropout_at, dropout_heads)
        options, _ = read_eight_bit(call, options, NO_SCALES, out_dtype)
    scores, given, need_dbias = (bias, mask, alibi_slopes, sinks), (dout, out, lse, dlse), bool(need_dbias)
    flex = functions_of(score_mod, mask_mod, captured, block_mask)
    if stream is None and flex is None and not need_dcaptured:
        return backward_again(call, engine, options, layout, deterministic, (q, k, v), given, scores, None, need_dbias)
    caller, o = read(call, layout, stream, (q, k, v), scores, flex=flex)
    return backward(caller, engine, options, o, given, need_dbias, deterministic, need_dcaptured=bool(need_dcaptured))
