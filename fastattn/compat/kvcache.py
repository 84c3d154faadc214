"""flash_attn_with_kvcache: FlashAttention-2's and -3's arguments, as calls of `fastattn.attention_with_kvcache`.

What that function has not is brought into its form, in this order, and nothing else is computed here:

    qv              q and k get qv's and v's columns: q.k + qv.v is one dot product
    seqused_q       the rows that count are packed, and the results are put back
    cache_leftpad   the contiguous cache becomes pages of one key, and a block table leaves the first rows out
"""
from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays.convert import Caller
from ..arrays.view import EIGHT_BIT, View
from ..problem import MAX_HEAD_DIM
from ..serving.api import attention_with_kvcache
from .arrays import namespace, positions, shape_of, zeros
from .translate import Call, pair, window

_OPEN = (-1, -1)


@dataclass(frozen=True)
class _Arrays:
    """What a call of attention_with_kvcache gets. A step gives a changed copy."""

    q: Any
    k_cache: Any
    v_cache: Any
    k: Any
    v: Any
    cache_seqlens: Any
    block_table: Any
    cache_batch_idx: Any
    cu_seqlens_q: Any
    max_seqlen_q: int | None

    @property
    def batch(self) -> int:
        return int(shape_of(self.q, _NAME, "q")[0]) if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1


_NAME = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, rotary_cos: Any = None,
                            rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
                            block_table: Any = None, softmax_scale: float | None = None, causal: bool = False,
                            window_size: tuple[int, int] = _OPEN, softcap: float = 0.0, rotary_interleaved: bool = True,
                            alibi_slopes: Any = None, num_splits: int = 0, return_softmax_lse: bool = False, *, qv: Any = None,
                            page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, max_seqlen_q: int | None = None,
                            seqused_q: Any = None, rotary_seqlens: None = None, q_descale: Any = None, k_descale: Any = None,
                            v_descale: Any = None, attention_chunk: int = 0, scheduler_metadata: Any = None, pack_gqa: bool | None = None,
                            sm_margin: int = 0) -> Any:
    """flash_attn.flash_attn_with_kvcache, with FlashAttention-3's arguments by keyword: `fastattn.attention_with_kvcache`.

    Parameters
    ----------
    q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_batch_idx, block_table, cu_seqlens_q, max_seqlen_q : array, optional
        As in `fastattn.attention_with_kvcache`. k and v have as many rows as q. Pages are of any size. page_table is
        FlashAttention-3's name of block_table.
    cache_seqlens : int or array (batch,)
        Keys in the cache before the call. None: the whole contiguous cache, if k is None.
    cache_leftpad : array (batch,), optional
        The first row of each request's keys in a contiguous cache. cache_seqlens counts from the cache's first row.
        Not with rotary_cos, because FlashAttention-2 counts positions from the first key and FlashAttention-3 from
        the cache's first row.
    softmax_scale : float, optional
        Default 1 / sqrt(headdim), with qv 1 / sqrt(headdim + headdim_v).
    causal, window_size, softcap, alibi_slopes
        As in flash_attn_func.
    rotary_interleaved : bool
        Columns 2 c and 2 c + 1 are a pair. Without causal and window the original rotates all rows of q for one
        position; more than one row is refused then.
    num_splits : int
        0: chosen. 1: the same bits in any batch.
    return_softmax_lse : bool
        Return (out, softmax_lse).
    qv : array of out's shape, optional
        Queries of the values: scores are q k^T + qv v^T. headdim + headdim_v is at most 576, and the caches are not
        8-bit. Caches that are neighbouring columns of one array, as a latent cache's are, are read in place. Others
        are copied into one, which costs more than the attention.
    cu_seqlens_k_new : array, optional
        Equal to cu_seqlens_q.
    seqused_q : array (batch,), optional
        Query rows of each request, of the seqlen_q of a q that is not packed; of k and v as well. Other rows have out 0
        and lse -inf, and append nothing. The original has it in flash_attn_varlen_func.
    q_descale, k_descale, v_descale : array (batch, nheads_k), optional
        Scales of 8-bit arrays.
    rotary_seqlens, attention_chunk
        Refused if given.
    scheduler_metadata, pack_gqa, sm_margin
        Tune the original's kernels. They change no result, here either.

    Returns
    -------
    array, or tuple
        out of q's shape with v's headdim, or (out, softmax_lse).

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """
    table = "page_table" if page_table is not None else "block_table"
    scales = {"q_scale": q_descale, "k_scale": k_descale, "v_scale": v_descale}
    call = Call(_NAME, {"lse": "softmax_lse", "window": "window_size", "block_table": table,
                        **{name: name.replace("scale", "descale") for name in scales}})
    for name, x, hint in (("rotary_seqlens", rotary_seqlens, "a row is rotated for its position in the cache"),
                          ("attention_chunk", attention_chunk or None, "")):
        if x is not None:
            raise call.value(name, "is given", "0" if name == "attention_chunk" else "None", hint)
    if page_table is not None and block_table is not None:
        raise call.value("page_table", "is given beside block_table", "one of the two, which mean the same")
    if cu_seqlens_k_new is not None and (cu_seqlens_q is None or not np.array_equal(cu_seqlens_k_new, cu_seqlens_q)):
        raise call.value("cu_seqlens_k_new", "is not cu_seqlens_q", "the same lengths, because k has as many rows as q")
    causal, sides = call.flag("causal", causal), window(call, "window_size", *pair(call, "window_size", window_size))
    rows = shape_of(q, call.name, "q")
    given = _Arrays(q, k_cache, v_cache, k, v, cache_seqlens, block_table if page_table is None else page_table, cache_batch_idx,
                    cu_seqlens_q, max_seqlen_q)
    if rotary_cos is not None and not causal and sides is None and (cu_seqlens_q is not None or rows[1:2] != (1,)):
        raise call.value("rotary_cos", f"is given for {rows[1] if cu_seqlens_q is None else 'packed'} rows without causal and window_size",
                         "causal=True, or one row", "the original rotates all rows for one position then")
    given = _with_lengths(call, given)
    caller = Caller(_NAME, "bshd", None, "q", q)
    joined = qv is not None and _Joined(call, caller, given, qv, rotary_cos is not None)
    given = joined.arrays if joined else given
    packed = seqused_q is not None and _Packed(call, caller, given, seqused_q)
    given = packed.arrays if packed else given
    if cache_leftpad is not None:
        given = _left_out(call, caller, given, cache_leftpad, rotary_cos is not None)
    splits = call.plain("num_splits", num_splits, "an integer, 0 to choose")
    results = call.run(attention_with_kvcache, **vars(given), rotary_cos=rotary_cos, rotary_sin=rotary_sin,
                       rotary_interleaved=rotary_cos is not None and call.flag("rotary_interleaved", rotary_interleaved), causal=causal,
                       window=sides, softcap=call.plain("softcap", softcap, "a number, 0 for no cap") or None, alibi_slopes=alibi_slopes,
                       softmax_scale=softmax_scale, num_splits=splits or None,
                       return_lse=call.flag("return_softmax_lse", return_softmax_lse), **scales)
    if joined and k is not None:
        joined.write_keys(k_cache)
    return packed.unpacked(results) if packed else results


def _with_lengths(call: Call, given: _Arrays) -> _Arrays:
    """cache_seqlens as one number a request."""
    lengths = given.cache_seqlens
    if lengths is None:
        if given.k is not None or given.block_table is not None:
            raise call.value("cache_seqlens", "is None", "the keys of each request", "None means the whole contiguous cache, without k")
        lengths = shape_of(given.k_cache, call.name, "k_cache")[1]
    if not isinstance(lengths, (list, tuple)) and tuple(getattr(lengths, "shape", ())) == ():
        lengths = [call.length("cache_seqlens", lengths)] * given.batch
    return replace(given, cache_seqlens=lengths)


def _counts(call: Call, caller: Caller, argument: str, x: Any, batch: int) -> tuple[Any, Any]:
    """(batch,) integers: as values in host memory, where None stands for those on a device, and as an array with operations."""
    seen = caller.small(x, argument)
    if seen.shape != (batch,) or seen.dtype not in ("int32", "int64"):
        raise call.value(argument, f"has shape {seen.shape}, dtype {seen.dtype}", f"({batch},), int32 or int64, a count for each request")
    if seen.device[0] == "cpu":
        values = seen.numpy().astype(np.int64)
        return values, values
    return None, x


def _first(wrong: Any) -> int | None:
    return int(np.argmax(wrong)) if wrong.any() else None


# ---------------------------------------------------------------- qv
class _Joined:
    """q, k and the cache of keys with qv's and v's columns."""

    def __init__(self, call: Call, caller: Caller, given: _Arrays, qv: Any, rotary: bool) -> None:
        keys, values, rows = caller.view(given.k_cache, "k_cache"), caller.view(given.v_cache, "v_cache"), shape_of(given.q, _NAME, "q")
        self.dim = keys.shape[-1]
        if shape_of(qv, _NAME, "qv") != (*rows[:-1], values.shape[-1]):
            raise call.value("qv", f"has shape {shape_of(qv, _NAME, 'qv')}", f"out's shape, {(*rows[:-1], values.shape[-1])}")
        if keys.dtype in EIGHT_BIT:
            raise call.value("qv", f"is given, and k_cache has dtype {keys.dtype}", "caches of 16 bits or more",
                             "k_descale and v_descale would scale one dot product")
        if keys.shape[:-1] == values.shape[:-1] and self.dim + values.shape[-1] > MAX_HEAD_DIM:
            raise call.value("qv", f"is given, and headdim + headdim_v is {self.dim + values.shape[-1]}", f"at most {MAX_HEAD_DIM}")
        self.xp = namespace(given.q, _NAME, "q")
        values_first = _follows(keys, values) and not rotary        # a rotation is of the first columns
        self.cache: Any = _one_view(keys, values) if _follows(values, keys) else _one_view(values, keys) if values_first else None
        self.in_place = self.cache is not None
        if not self.in_place:
            values_first, self.cache = False, self._beside(given.k_cache, given.v_cache)
        self.values_first = values_first
        k = None if given.k is None or given.v is None else self._ordered(given.k, given.v)
        self.arrays = replace(given, q=self._ordered(given.q, qv), k_cache=self.cache, k=k)

    def _ordered(self, key: Any, value: Any) -> Any:
        return self._beside(value, key) if self.values_first else self._beside(key, value)

    def _beside(self, a: Any, b: Any) -> Any:
        return self.xp.concatenate([a, b], -1)

    def write_keys(self, k_cache: Any) -> None:
        """What was appended to a copy goes into the caller's cache."""
        if not self.in_place:
            k_cache[...] = self.cache[..., :self.dim]


def _follows(second: View, first: View) -> bool:
    """Whether the columns of `second` follow those of `first` in each row of one array."""
    return (first.shape[:-1] == second.shape[:-1] and first.strides == second.strides and first.dtype == second.dtype
            and first.strides[-1] == first.itemsize and second.ptr == first.ptr + first.shape[-1] * first.itemsize)


def _one_view(first: View, second: View) -> Any:
    """The array of `first` with the columns of `second` behind its own. None where the library makes no such view of the two."""
    x, shape = first.source, (*first.shape[:-1], first.shape[-1] + second.shape[-1])
    library = type(x).__module__.partition(".")[0]
    if library == "torch" and x.untyped_storage().data_ptr() == second.source.untyped_storage().data_ptr():
        return x.as_strided(shape, x.stride())
    if library == "cupy" or isinstance(x, np.ndarray):
        return sys.modules["cupy" if library == "cupy" else "numpy"].lib.stride_tricks.as_strided(x, shape, x.strides)
    return None


# ---------------------------------------------------------------- seqused_q
class _Packed:
    """The rows of a batch that count, packed in order; behind them the others, which belong to no request."""

    def __init__(self, call: Call, caller: Caller, given: _Arrays, seqused_q: Any) -> None:
        if given.cu_seqlens_q is not None:
            raise call.value("seqused_q", "is given beside cu_seqlens_q", "one of the two", "cu_seqlens_q alone says where rows are")
        self.shape = shape_of(given.q, _NAME, "q")
        if len(self.shape) != 4:
            raise call.value("q", f"has shape {self.shape}", "(batch, seqlen_q, nheads, headdim), because seqused_q is given")
        batch, rows = self.shape[:2]
        values, used = _counts(call, caller, "seqused_q", seqused_q, batch)
        wrong = None if values is None else _first((values < 0) | (values > rows))
        if wrong is not None:
            raise call.value("seqused_q", f"has {values[wrong]} for request {wrong}", f"a count from 0 to {rows}, q's seqlen_q")
        number = positions(used, batch * rows, _NAME, "seqused_q")
        unused = number % max(rows, 1) >= used[number // max(rows, 1)]
        self.xp = namespace(used, _NAME, "seqused_q")
        self.order = self.xp.argsort(number + unused * (batch * rows))
        cu = self.xp.concatenate([zeros(used, (1,), _NAME, "seqused_q"), used]).cumsum(0)
        packed = {name: None if x is None else self._rows(x) for name, x in (("q", given.q), ("k", given.k), ("v", given.v))}
        self.arrays = replace(given, **packed, cu_seqlens_q=cu, max_seqlen_q=rows)

    def _rows(self, x: Any) -> Any:
        return x.reshape(-1, *x.shape[2:])[self.order]

    def unpacked(self, results: Any) -> Any:
        out, lse = results if isinstance(results, tuple) else (results, None)
        back = self.xp.argsort(self.order)
        out = out[back].reshape(*self.shape[:3], out.shape[-1])
        if lse is None:
            return out
        return out, lse[:, back].reshape(self.shape[2], *self.shape[:2]).swapaxes(0, 1)


# ---------------------------------------------------------------- cache_leftpad
def _left_out(call: Call, caller: Caller, given: _Arrays, leftpad: Any, rotary: bool) -> _Arrays:
    """Caches in pages of one key, and a table of each request's from its first one."""
    if given.block_table is not None:
        raise call.value("cache_leftpad", f"is given beside {call.names['block_table']}", "one of the two",
                         "a block table begins with the page of a request's first keys")
    if rotary:
        raise call.value("cache_leftpad", "is given beside rotary_cos", "one of the two",
                         "rotate q and k before the call; the original's versions 2 and 3 count positions differently")
    pages, size = shape_of(given.k_cache, _NAME, "k_cache")[:2]
    batch = given.batch
    pad_values, pad = _counts(call, caller, "cache_leftpad", leftpad, batch)
    seqlen_values, seqlens = _counts(call, caller, "cache_seqlens", given.cache_seqlens, batch)
    index: Any = None
    if given.cache_batch_idx is not None:
        _, index = _counts(call, caller, "cache_batch_idx", given.cache_batch_idx, batch)
    elif pages != batch:
        raise call.value("k_cache", f"has {pages} rows of keys for {batch} requests", "one for each request",
                         "cache_batch_idx names each request's")
    if (pad_values is None) != (seqlen_values is None):
        raise call.value("cache_leftpad", "is not where cache_seqlens is", "both in host memory, or both on q's device")
    if pad_values is not None:
        _check_room(call, caller, given, pad, seqlens, size)
    key = positions(pad, size, _NAME, "cache_leftpad")[None, :]
    row = positions(pad, batch, _NAME, "cache_leftpad") if index is None else index
    table = namespace(pad, _NAME, "cache_leftpad").where(key < size - pad[:, None], (row * size + pad)[:, None] + key, -1)
    caches = {}
    for name, x in (("k_cache", given.k_cache), ("v_cache", given.v_cache)):
        seen = caller.view(x, name)
        if given.k is not None and pages > 1 and seen.strides[0] != size * seen.strides[1]:
            raise call.value(name, f"has strides {seen.strides} (bytes)", "no gap between its requests, because k is appended",
                             "cache_leftpad needs all rows at one distance")
        caches[name] = x.reshape(pages * size, 1, *x.shape[2:])
    return replace(given, **caches, cache_seqlens=seqlens - pad, block_table=table, cache_batch_idx=None)


def _check_room(call: Call, caller: Caller, given: _Arrays, pad: Any, seqlens: Any, size: int) -> None:
    """Values in host memory fit into the cache. The same checks of attention_with_kvcache would speak of pages."""
    new: Any = 0
    if given.k is not None:
        cu = given.cu_seqlens_q
        new = shape_of(given.q, _NAME, "q")[1] if cu is None else np.diff(caller.small(cu, "cu_seqlens_q").numpy())
    b = _first((pad < 0) | (pad > seqlens))
    if b is not None:
        raise call.value("cache_leftpad", f"has {pad[b]} for request {b}", f"a row from 0 to its cache_seqlens, {seqlens[b]}")
    b = _first(seqlens + new > size)
    if b is not None:
        raise call.value("cache_seqlens", f"has {seqlens[b]} for request {b}",
                         f"at most {size - int(np.broadcast_to(new, seqlens.shape)[b])}, because its part of the cache has {size} rows")
