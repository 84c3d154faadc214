"""`attention_with_kvcache`: its signature, its documentation, and the flow of a call."""
from __future__ import annotations

import os
from typing import Any, Literal, Never, Unpack, overload

import numpy as np

from .. import repeat
from ..arrays.convert import Caller
from ..arrays.readers import written
from ..dispatch import given_out
from ..engine import load
from ..options import SCALES, Check, Options, read_eight_bit, read_options
from ..registry import choose
from ..signature import strict, unknown_arguments
from ..types import A, Array, D, EngineName, Integer, Layout, Lengths, Number, PerHead, S, Scale, ServingOptions, Window
from .problem import OF_VALUES, Given, How, check_values, problem_with_cache


@overload
def attention_with_kvcache(q: A, k_cache: Array, v_cache: Array, k: Array | None = ..., v: Array | None = ..., *, cache_seqlens: Lengths,
                           return_lse: Literal[False] = ..., **options: Unpack[ServingOptions]) -> A: ...
@overload
def attention_with_kvcache(q: np.ndarray[S, D], k_cache: Array, v_cache: Array, k: Array | None = ..., v: Array | None = ..., *,
                           cache_seqlens: Lengths, return_lse: Literal[True],
                           **options: Unpack[ServingOptions]) -> tuple[np.ndarray[S, D], np.ndarray[Any, Any]]: ...
@overload
def attention_with_kvcache(q: A, k_cache: Array, v_cache: Array, k: Array | None = ..., v: Array | None = ..., *, cache_seqlens: Lengths,
                           return_lse: Literal[True], **options: Unpack[ServingOptions]) -> tuple[A, A]: ...
@overload
def attention_with_kvcache(q: A, k_cache: Array, v_cache: Array, k: Array | None = ..., v: Array | None = ..., *, cache_seqlens: Lengths,
                           return_lse: bool, **options: Unpack[ServingOptions]) -> A | tuple[A, Any]: ...
@strict
def attention_with_kvcache(q: Array, k_cache: Array, v_cache: Array, k: Array | None = None, v: Array | None = None, *more: Never,
                           cache_seqlens: Lengths, block_table: Array | None = None, cache_batch_idx: Lengths | None = None,
                           cu_seqlens_q: Lengths | None = None, max_seqlen_q: Integer | None = None, rotary_cos: Array | None = None,
                           rotary_sin: Array | None = None, rotary_interleaved: bool = False, causal: bool = True,
                           window: Window | None = None, softcap: Number | None = None, alibi_slopes: PerHead | None = None,
                           sinks: PerHead | None = None, softmax_scale: Number | None = None, q_scale: Scale | None = None,
                           k_scale: Scale | None = None, v_scale: Scale | None = None, num_splits: Integer | None = None,
                           shared_prefix: Integer | None = None, layout: Layout = "bshd", out: Array | None = None,
                           return_lse: bool = False, stream: Any = None, engine: EngineName | None = None, **unknown: Never) -> Any:
    """Attention over key and value caches: decoding, prefill in chunks and speculative decoding in one call.

    Each request has `cache_seqlens` keys in the caches. The call's own k and v, if it brings any, are written behind
    them, in place, and then q attends to all of them.

    Parameters
    ----------
    q : array (batch, seqlen_q, num_heads, head_dim)
        The queries of `batch` requests; with `cu_seqlens_q` (total_q, num_heads, head_dim). float16, bfloat16, float32
        or float64; float8_e4m3fn with 8-bit caches. Shapes of q, k, v and out here are those of ``layout="bshd"``.
    k_cache : array (batch, seqlen_cache, num_heads_k, head_dim)
        q's dtype and device, any strides; or float8_e4m3fn or float8_e5m2 beside 16-bit and 8-bit q. With
        `cache_batch_idx` its first axis is of any length. With `block_table` it is in pages, (pages, page_size,
        num_heads_k, head_dim), of any page_size.
    v_cache : array
        As k_cache, with head_dim_v, which may differ. It may be a view of k_cache's first columns (a latent cache).
    k, v : array (batch, seqlen_q, num_heads_k, head_dim or head_dim_v), optional
        New keys and values, as many rows as q and of the caches' dtype. k is rotated, if `rotary_cos` is given, before
        it is written. For 8-bit caches they may have 16 bits: they are divided by k_scale and v_scale, and rounded once,
        saturating.
    cache_seqlens : array (batch,)
        int32 or int64, a list for host arrays: the keys of each request in the cache before this call.
    block_table : array (batch, most pages of a request), optional
        int32 or int64: the pages of each request, in order. Entries past its last key's are not read. Requests may
        share pages.
    cache_batch_idx : array (batch,), optional
        int32 or int64: the row of a contiguous cache that belongs to each request. No row twice if k is given.
    cu_seqlens_q : array (batch + 1,), optional
        Packs the queries of requests along one axis, as in `attention_varlen`; k and v are packed alike. The only
        layout then is that of packed arrays.
    max_seqlen_q : int, optional
        With cu_seqlens_q: at least the most queries of a request.
    rotary_cos, rotary_sin : array (positions, rotary_dim / 2), optional
        q's dtype or float32. The first rotary_dim columns of q and k are rotated by the row's position, that is, its
        number in the cache: query row i of a request stands at cache_seqlens + i. Needs k.
    rotary_interleaved : bool, default False
        Columns 2 c and 2 c + 1 are a pair. False: c and c + rotary_dim / 2 are.
    causal : bool, default True
        Row i attends no key behind its own. The last row stands on the request's last key.
    window : (int or None, int or None), optional
        As in `attention`.
    softcap, alibi_slopes, sinks, softmax_scale : optional
        As in `attention`.
    q_scale, k_scale, v_scale : float or array (1,), (num_heads_k,) or (batch, num_heads_k), optional
        float32: what 8-bit operands are multiplied by; query heads have their key head's q_scale. None is 1. See
        `quantize_fp8`.
    num_splits : int, optional
        Into at most how many parts the keys of a request are divided, which are then merged. None: the engine chooses,
        by the sizes of the whole call. With 1 a request's result has the same bits in any batch, packed or not, with
        any width of the block table and any length of the cache.
    shared_prefix : int, optional
        With block_table: so many keys, from the first on, are in the same pages for all requests, as those of a system
        prompt are; counted in whole pages. An engine may then read them once for all requests (cascade attention).
        Results stay what they are. None: on host arrays requests that share pages are found in block_table, on CUDA
        arrays nothing is assumed. 0: nothing is shared.
    layout : {"bshd", "bhsd"}, default "bshd"
        Order of the axes of q, k, v and out. Caches are always (..., seqlen, heads, dim).
    out, return_lse, stream, engine : optional
        As in `attention`.

    Returns
    -------
    out : array (batch, seqlen_q, num_heads, head_dim_v)
        q's dtype, bfloat16 for 8-bit q; packed (total_q, num_heads, head_dim_v), where rows of no request are 0.
    lse : array (batch, num_heads, seqlen_q)
        Only with ``return_lse``, packed (num_heads, total_q): as in `attention`.

    Raises
    ------
    ValueError, TypeError, UnsupportedError, ImportError
        As `attention`. Values of lengths and tables that do not fit are refused in host memory, with the request's
        number. Nothing has been written then, to the caches either.

    Notes
    -----
    There is no gradient. A rotation is computed in float32 (float64 for float64) and rounded once, to the dtype of q and of
    the cache. On CUDA arrays lengths and tables stay on the device, and the host neither reads them nor waits. Wrong ones
    lead to no access outside the caches: a count below 0 is 0, new keys past the cache's end are not written, nor are those
    whose entry of block_table names no page; when it is read, such an entry is the last page. With the environment variable
    ``FASTATTN_CHECK=1`` the host waits for them and checks them. If v_cache shares memory with k_cache, v is written last.

    Pages of `shared_prefix` are read where the first request has them, as far as it has keys. On CUDA arrays a request
    whose row of block_table names others, which breaks the promise, attends to the first request's. With num_splits=1
    the bits are those of any batch with the same shared_prefix.

    Source: Kwon et al., "Efficient memory management for large language model serving with PagedAttention", SOSP 2023.
    Rotary embedding: Su et al., "RoFormer", 2021. Splits: Dao et al., "Flash-Decoding", 2023. Shared
    prefixes: Ye et al., "Cascade Inference", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import attention_with_kvcache
    >>> k_pages, v_pages = np.zeros((2, 8, 16, 2, 64), np.float32)     # 8 pages of 16 keys
    >>> block_table = np.array([[5, 2], [0, 7]], np.int32)
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 1, 2, 64), np.float32)
    >>> out = attention_with_kvcache(q, k_pages, v_pages, k, v, cache_seqlens=[16, 3], block_table=block_table)
    >>> out.shape, bool((k_pages[2, 0] == k[0, 0]).all())
    ((2, 1, 2, 64), True)
    """
    if more or unknown:
        raise unknown_arguments(attention_with_kvcache, more, unknown)
    call, check = "attention_with_kvcache", Check("attention_with_kvcache")
    options = read_options(call, causal, window, softmax_scale, softcap, 0.0, None, 0, max_seqlen_q)
    options, scales = read_eight_bit(call, options, (q_scale, k_scale, v_scale, None), None)
    splits = None if num_splits is None else check.integer("num_splits", num_splits, 1, 2**31 - 1, "None lets the engine choose")
    shared = None if shared_prefix is None else check.integer("shared_prefix", shared_prefix, 0, 2**31 - 1, "0 shares nothing")
    packed = cu_seqlens_q is not None
    if layout not in (("bshd", "thd") if packed else ("bshd", "bhsd")):
        raise check.value("layout", f"is {layout!r}", "nothing, because cu_seqlens_q packs q" if packed else "'bshd' or 'bhsd'")
    key = None
    if stream is None and out is None and not isinstance(q, np.ndarray) and os.environ.get("FASTATTN_CHECK") != "1":
        # in the order of Operands, then of CacheOperands; values in device memory alone are not read, and so may differ
        key, results = _again(engine, (q, k_cache, v_cache, alibi_slopes, sinks, cu_seqlens_q, cache_seqlens, *(scales or ())[:3],
                                       block_table if cache_batch_idx is None else cache_batch_idx, k, v, rotary_cos, rotary_sin),
                              (options, layout, bool(return_lse), bool(rotary_interleaved), splits, shared, engine,
                               cache_batch_idx is None, scales is None))
        if results is not None:
            _tell((k_cache, v_cache) if k is not None else ())
            return tuple(results) if return_lse else results[0]
    caller = Caller(call, layout, stream, "q", q)
    compute = caller.first.compute_dtype
    given = Given(caller.first, caller.view(k_cache, "k_cache"), caller.view(v_cache, "v_cache"),
                  None if k is None else caller.tokens(k, "k"), None if v is None else caller.tokens(v, "v"),
                  caller.small(cache_seqlens, "cache_seqlens"),
                  *[None if x is None else caller.small(x, name) for name, x in (
                      ("block_table", block_table), ("cache_batch_idx", cache_batch_idx), ("cu_seqlens_q", cu_seqlens_q))],
                  *[None if x is None else caller.view(x, name) for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin))],
                  *[None if x is None else caller.small(x, name, compute) for name, x in (
                      ("alibi_slopes", alibi_slopes), ("sinks", sinks))],
                  *[None if x is None else caller.small(x, name, "float32") for name, x in zip(SCALES[:3], scales or (), strict=False)])
    how = How(bool(rotary_interleaved), splits, shared)
    return _run(caller, given, options, how, out, bool(return_lse), engine, key)


def _again(engine: EngineName | None, arrays: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, list[Any] | None]:
    """repeat.replay of the arrays that are there."""
    there = tuple([x for x in arrays if x is not None])
    return repeat.replay("attention_with_kvcache", engine, there, (*options, tuple([x is None for x in arrays])))


def _tell(caches: tuple[Any, ...]) -> None:
    """Tell the caches' library that the call wrote to them."""
    for cache in caches:
        tell = written(cache)
        if tell is not None:
            tell(cache)


def _check_on_device(caller: Caller, given: Given, options: Options, how: How) -> None:
    """The debug mode: lengths and tables are copied to the host, which waits for them, and are checked as those in host memory."""
    to_host = load("gpu", caller.call).to_host
    copies = {name: to_host(caller.call, x, caller.handle) for name in OF_VALUES if (x := getattr(given, name)) is not None}
    check_values(caller.call, given._replace(**copies), options.max_seqlen_q, how.shared_prefix)


def _run(caller: Caller, given: Given, options: Options, how: How, out: Any, return_lse: bool, engine: str | None, key: Any) -> Any:
    try:
        problem, o = problem_with_cache(caller.call, given, options, how)
    except (TypeError, ValueError) as error:
        if caller.bhsd:
            error.add_note("Shapes of q, k and v in this message are in the order (batch, seqlen, num_heads, head_dim).")
        raise
    if caller.handle is not None and os.environ.get("FASTATTN_CHECK") == "1":
        _check_on_device(caller, given, options, how)
    into = None if out is None else given_out(caller, out, problem, o)
    chosen = choose(caller.call, engine, o.q.device)
    output = caller.output(problem.out_shape, problem.out_dtype, o.q) if into is None else into
    lse = caller.allocate(problem.lse_shape, problem.lse_dtype, o.q) if return_lse else None
    chosen.forward(problem, o, output.view, None if lse is None else lse.view, caller.handle)
    if key is not None and caller.handle is not None:
        where, results = (problem, o, output.view, None if lse is None else lse.view), (output,) if lse is None else (output, lse)
        repeat.remember(key, chosen, getattr(chosen, "prepare", None), where, results)
    if given.k is not None:
        _tell((given.k_cache.source, given.v_cache.source))
    return output.finish() if lse is None else (output.finish(), lse.finish())
