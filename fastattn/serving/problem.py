"""Every check of the arguments of `attention_with_kvcache`, then its Problem. Nothing below checks again.

Values of lengths and tables are checked in host memory; on a device the host does not read them.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..arrays import words
from ..arrays.dlpack import address
from ..arrays.view import EIGHT_BIT, LENGTHS, View, overlap
from ..caches import key_row
from ..eight_bit import OF_Q
from ..lengths import cumulative, read_lengths
from ..options import Check, EightBitOptions, Options
from ..problem import (
    DTYPES,
    MAX_HEAD_DIM,
    Cache,
    CacheOperands,
    Operands,
    Problem,
    Rotary,
    Score,
    check_array,
    check_heads,
    mask_of,
    per_head,
    scale_and_cap,
    with_scales,
)

Array = np.ndarray[Any, Any]
HALF = ("float16", "bfloat16")


class Given(NamedTuple):
    """The arguments of a call that say where: canonical Views of q, k, v and the caches, and Views of the small arrays."""

    q: View
    k_cache: View
    v_cache: View
    k: View | None
    v: View | None
    cache_seqlens: View
    block_table: View | None
    cache_batch_idx: View | None
    cu_seqlens_q: View | None
    rotary_cos: View | None
    rotary_sin: View | None
    alibi_slopes: View | None
    sinks: View | None
    q_scale: View | None = None
    k_scale: View | None = None
    v_scale: View | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None


class How(NamedTuple):
    """The arguments of a call's own that are numbers."""

    interleaved: bool = False           # rotary_interleaved
    num_splits: int | None = None
    shared_prefix: int | None = None


class Rows(NamedTuple):
    """The requests of a call. Values are None where lengths are on a device."""

    batch: int
    seqlen_q: int                       # the longest
    cu: View | None
    lengths: Array | None               # query rows of each request


# ---------------------------------------------------------------- arrays
def _arrays(check: Check, g: Given) -> None:
    """Ranks, dtypes, devices and sizes of q and of the caches."""
    for name, x, rank, axes in (("q", g.q, 3 if g.packed else 4, "(total_q, num_heads, head_dim)" if g.packed else
                                 "(batch, seqlen_q, num_heads, head_dim)"),
                                ("k_cache", g.k_cache, 4, "(rows, seqlen_cache, num_heads_k, head_dim)"),
                                ("v_cache", g.v_cache, 4, "(rows, seqlen_cache, num_heads_k, head_dim_v)")):
        if len(x.shape) != rank:
            packs = name == "q" and len(x.shape) == 3
            raise check.value(name, f"has {len(x.shape)} axes, shape {x.shape}", f"{rank} axes {axes}",
                              "cu_seqlens_q packs queries" if packs else "")
    if g.k_cache.shape[:-1] != g.v_cache.shape[:-1]:
        raise check.value("v_cache", f"has shape {g.v_cache.shape}",
                          f"k_cache's shape but for the last axis, {g.k_cache.shape[:-1]} + (head_dim_v,)")
    if g.k_cache.shape[-1] != g.q.shape[-1]:
        raise check.value("k_cache", f"has head_dim {g.k_cache.shape[-1]}", f"q's head_dim, {g.q.shape[-1]}")
    for name, n in (("head_dim", g.q.shape[-1]), ("head_dim_v", g.v_cache.shape[-1])):
        check.integer(name, n, 1, MAX_HEAD_DIM)
    check_heads(check, "k_cache", g.q.shape[-2], g.k_cache.shape[-2])
    _dtypes(check, g)
    for name in g._fields[1:]:
        x = getattr(g, name)
        if x is not None and x.device != g.q.device:
            raise check.value(name, f"is on device {x.device}", f"q's device, {g.q.device}")


def _dtypes(check: Check, g: Given) -> None:
    """q and the caches have one dtype, or the caches are 8-bit and q has 16 bits or 8."""
    check.dtype("q", g.q, (*DTYPES, OF_Q))
    if g.q.dtype in EIGHT_BIT:
        check.dtype("k_cache", g.k_cache, EIGHT_BIT, "quantize_fp8 makes 8-bit keys and values")
    elif g.k_cache.dtype != g.q.dtype and not (g.k_cache.dtype in EIGHT_BIT and g.q.dtype in HALF):
        hint = words.like("k_cache", g.k_cache.source, "q")
        raise check.type("k_cache", f"has dtype {g.k_cache.dtype}", f"q's dtype, {g.q.dtype}",
                         "8-bit caches go with 16-bit and 8-bit q" if g.k_cache.dtype in EIGHT_BIT else hint)
    if g.v_cache.dtype != g.k_cache.dtype:
        raise check.type("v_cache", f"has dtype {g.v_cache.dtype}", f"k_cache's dtype, {g.k_cache.dtype}")


def _rows(check: Check, g: Given, max_seqlen_q: int | None) -> Rows:
    if g.cu_seqlens_q is None:
        if max_seqlen_q is not None:
            raise check.value("max_seqlen_q", f"is {max_seqlen_q}", "nothing, because cu_seqlens_q is None", "q's shape has the length")
        batch, seqlen_q = g.q.shape[:2]
        return Rows(batch, seqlen_q, None, np.full(batch, seqlen_q, np.int64))
    cu, batch, longest = cumulative(check, "cu_seqlens_q", g.cu_seqlens_q, g.q.shape[0], max_seqlen_q, "max_seqlen_q")
    return Rows(batch, longest, cu, np.diff(cu.numpy()) if cu.device[0] == "cpu" else None)


def _new(check: Check, g: Given) -> bool:
    """Whether the call brings keys and values; they are checked, and that the caches can be written."""
    if g.k is None and g.v is None:
        return False
    for name, other, x in (("k", "v", g.k), ("v", "k", g.v)):
        if x is None:
            raise check.value(name, "is None", f"{'keys' if name == 'k' else 'values'} of q's rows, because {other} is given")
    for name, x, cached in (("k", g.k, g.k_cache), ("v", g.v, g.v_cache)):
        assert x is not None
        wide = (HALF if g.q.dtype in EIGHT_BIT else (g.q.dtype,)) if cached.dtype in EIGHT_BIT else ()       # quantised when it is written
        check_array(check.call, name, x, (*g.q.shape[:-2], *cached.shape[-2:]), x.dtype if x.dtype in wide else cached.dtype, g.q.device)
        check_array(check.call, f"{name}_cache", cached, cached.shape, cached.dtype, g.q.device, output=True)
        for cache_name, cache in (("k_cache", g.k_cache), ("v_cache", g.v_cache)):
            if overlap(x, cache):
                raise check.value(name, f"shares memory with {cache_name}, which the call writes", "memory of its own")
    return True


# ---------------------------------------------------------------- lengths and tables
def _lengths(check: Check, g: Given, rows: Rows, new: bool, capacity: int) -> tuple[View, Array | None]:
    """The keys of each request after the call, a private copy; each fits into the cache."""
    before, counts = read_lengths(check, "cache_seqlens", g.cache_seqlens)
    check.shape("cache_seqlens", before, (rows.batch,), "(batch,)")
    if counts is None or rows.lengths is None:
        return before, None
    more = rows.lengths if new else np.zeros(rows.batch, np.int64)
    wrong = (counts < 0) | (counts > capacity - more)
    if wrong.any():
        b = int(np.argmax(wrong))
        has = f"has {counts[b]} for request {b}"
        if counts[b] >= 0 and more[b]:
            has += f", which appends {more[b]}"
        most = f"because its part of the cache has {capacity} rows"
        if more[b] > capacity:
            raise check.value("cache_seqlens", has, f"room for them, {most[8:]}")
        raise check.value("cache_seqlens", has, f"a count from 0 to {capacity - more[b]}, {most}")
    return _private(counts + more)


def _private(x: Array) -> tuple[View, Array]:
    x = np.ascontiguousarray(x, np.int64)
    return View(address(x), x.shape, x.strides, "int64", owner=x), x


def _table(check: Check, g: Given, batch: int, new: bool, after: Array | None) -> View:
    """The block table (batch, pages of a request), a private copy. A contiguous cache has a page for each request."""
    pages, page_size = g.k_cache.shape[:2]
    if g.block_table is not None:
        if g.cache_batch_idx is not None:
            raise check.value("cache_batch_idx", "is given beside block_table", "one of the two",
                              "a block table names each request's pages")
        return _block_table(check, g.block_table, batch, pages, page_size, after)
    if g.cache_batch_idx is None:
        if pages != batch:
            raise check.value("k_cache", f"has {pages} rows of keys for {batch} requests", "one for each request",
                              "cache_batch_idx names each request's, and block_table its pages")
        return _private(np.arange(batch)[:, None])[0]
    check.dtype("cache_batch_idx", g.cache_batch_idx, LENGTHS)
    check.shape("cache_batch_idx", g.cache_batch_idx, (batch,), "(batch,)")
    index, values = read_lengths(check, "cache_batch_idx", g.cache_batch_idx)
    if values is None:
        return index
    wrong = (values < 0) | (values >= pages)
    if wrong.any():
        b = int(np.argmax(wrong))
        raise check.value("cache_batch_idx", f"has {values[b]} for request {b}", f"a row of k_cache, from 0 to {pages - 1}")
    if new:
        first = {int(row): b for b, row in reversed(list(enumerate(values)))}
        for b, row in enumerate(values):
            if first[int(row)] != b:
                raise check.value("cache_batch_idx", f"has {row} for requests {first[int(row)]} and {b}",
                                  "another row for each, because k and v are appended")
    return _private(values[:, None])[0]


def _block_table(check: Check, table: View, batch: int, pages: int, page_size: int, after: Array | None) -> View:
    check.dtype("block_table", table, LENGTHS)
    if len(table.shape) != 2 or table.shape[0] != batch:
        raise check.value("block_table", f"has shape {table.shape}", f"(batch, pages of a request), batch = {batch}")
    own, values = read_lengths(check, "block_table", table)
    if values is None or after is None:
        return own
    needed = np.arange(table.shape[1]) < -(-after // max(page_size, 1))[:, None]
    wrong = needed & ((values < 0) | (values >= pages))
    if wrong.any():
        b, n = (int(x) for x in np.argwhere(wrong)[0])
        raise check.value("block_table", f"has {values[b, n]} for request {b}, entry {n}",
                          f"a page of k_cache, from 0 to {pages - 1}, because the request has {after[b]} keys")
    return own


def _written_once(check: Check, table: View, page_size: int, rows: Rows, after: Array | None) -> None:
    """Two requests may read one page, but no two may append to one row."""
    if after is None or rows.lengths is None or table.device[0] != "cpu":
        return
    requests = np.repeat(np.arange(rows.batch), rows.lengths)
    ends = np.cumsum(rows.lengths)
    keys = np.arange(len(requests)) + (after - ends)[requests]
    pages, slots = key_row(table.numpy(), requests, page_size, keys)
    _, first, which = np.unique(pages * max(page_size, 1) + slots, return_index=True, return_inverse=True)
    again = first[which] != np.arange(len(requests))
    if again.any():
        n = int(np.argmax(again))
        raise check.value("block_table", f"sends key {keys[n]} of request {requests[n]} to page {pages[n]}, row {slots[n]}, and so key "
                          f"{keys[first[which[n]]]} of request {requests[first[which[n]]]}", "another row of the cache for each new key",
                          "a page that requests share holds keys that are there already")


def _shared(check: Check, g: Given, shared: int | None, table: View, after: Array | None) -> None:
    """All requests have the pages of the first one, as far as both have keys and the shared prefix reaches."""
    if shared is None:
        return
    if g.block_table is None:
        if shared:
            raise check.value("shared_prefix", f"is {shared} without block_table", "None or 0",
                              "a table names the pages that requests share")
        return
    if after is None or not len(after):
        return
    values, size = table.numpy(), max(g.k_cache.shape[1], 1)
    whole = np.arange(values.shape[1]) < np.minimum(-(-after // size), min(shared, int(after[0])) // size)[:, None]
    other = whole & (values != values[0])
    if other.any():
        b, n = (int(x) for x in np.argwhere(other)[0])
        raise check.value("shared_prefix", f"is {shared}, and block_table has page {values[b, n]} for request {b}, entry {n}",
                          f"the first request's there, {values[0, n]}", f"{n * size} keys are shared up to it")


# ---------------------------------------------------------------- rotary embedding
def _rotary(check: Check, g: Given, new: bool, interleaved: bool, after: Array | None) -> Rotary | None:
    cos, sin = g.rotary_cos, g.rotary_sin
    if cos is None and sin is None:
        if interleaved:
            raise check.value("rotary_interleaved", "is True", "rotary_cos and rotary_sin beside it")
        return None
    for name, other, x in (("rotary_cos", "rotary_sin", cos), ("rotary_sin", "rotary_cos", sin)):
        if x is None:
            raise check.value(name, "is None", f"an array of {other}'s shape, because {other} is given")
    assert cos is not None and sin is not None
    if not new:
        raise check.value("rotary_cos", "is given, and k is None", "k and v, which are rotated as q is",
                          "keys in the cache are rotated already, and q alone can be rotated before the call")
    for name, given in (("q", g.q), ("k", g.k)):
        if given is not None and given.dtype in EIGHT_BIT:
            raise check.type(name, f"is {given.dtype}, and rotary_cos is given", "16 bits, because a rotation is rounded once",
                             "k is quantised when it is written, with k_scale")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        check.dtype(name, x, tuple(dict.fromkeys((g.q.dtype, "float32"))))
        if len(x.shape) != 2 or not 1 <= 2 * x.shape[1] <= g.q.shape[-1]:
            raise check.value(name, f"has shape {x.shape}", f"(positions, rotary_dim / 2), rotary_dim at most head_dim = {g.q.shape[-1]}")
    check.shape("rotary_sin", sin, cos.shape, "rotary_cos's shape")
    if after is not None and after.max(initial=0) > cos.shape[0]:
        b = int(np.argmax(after > cos.shape[0]))
        raise check.value("rotary_cos", f"has {cos.shape[0]} positions", f"at least {after[b]}, the keys of request {b} after the call")
    return Rotary(2 * cos.shape[1], interleaved)


# ---------------------------------------------------------------- all of it
OF_VALUES = ("cache_seqlens", "block_table", "cache_batch_idx", "cu_seqlens_q")


def check_values(call: str, g: Given, max_seqlen_q: int | None, shared_prefix: int | None = None) -> None:
    """What `problem_with_cache` checks of lengths and tables in host memory. Of a call on a device: those of `g` are copies in host memory.

    Raises ValueError with the request's number.
    """
    check, new = Check(call), g.k is not None
    rows, page_size = _rows(check, g, max_seqlen_q), g.k_cache.shape[1]
    width = 1 if g.block_table is None else g.block_table.shape[1]
    _, after = _lengths(check, g, rows, new, width * page_size)
    table = _table(check, g, rows.batch, new, after)
    if new and g.block_table is not None:
        _written_once(check, table, page_size, rows, after)
    _shared(check, g, shared_prefix, table, after)
    _rotary(check, g, new, False, after)


def problem_with_cache(call: str, g: Given, options: Options, how: How) -> tuple[Problem, Operands]:
    """Validate one call. Returns its Problem and its operands, with private copies of lengths and tables.

    Raises ValueError or TypeError that name `call`, the argument and, for a value of one request, its number.
    """
    check = Check(call)
    if options.causal == "top_left":
        raise check.value("causal", "is 'top_left'", "True or False",
                          "the diagonal is bottom-right: the last query row stands on the last key")
    _arrays(check, g)
    rows = _rows(check, g, options.max_seqlen_q)
    new = _new(check, g)
    pages, page_size = g.k_cache.shape[:2]
    width = 1
    if g.block_table is not None:
        width = g.block_table.shape[1] if len(g.block_table.shape) == 2 else 0      # _block_table reports the rest
    used, after = _lengths(check, g, rows, new, width * page_size)
    table = _table(check, g, rows.batch, new, after)
    if new and g.block_table is not None:
        _written_once(check, table, page_size, rows, after)
    _shared(check, g, how.shared_prefix, table, after)
    rotary = _rotary(check, g, new, how.interleaved, after)
    scale, cap = scale_and_cap(check, options, g.q.shape[-1], g.q.compute_dtype)
    operands = CacheOperands(table, g.k, g.v, g.rotary_cos, g.rotary_sin)
    o = Operands(g.q, g.k_cache, g.v_cache, None, None, g.alibi_slopes, g.sinks, rows.cu, None, used, None, g.q_scale, g.k_scale, g.v_scale,
                 cache=operands)
    o, scale, eight_bit = with_scales(check, o, options, scale, rows.batch)
    o = per_head(check, o, rows.batch, g.q.shape[-2])
    numbers = options.eight_bit or EightBitOptions(())
    cache = Cache(pages, page_size, g.k_cache.dtype, new, rotary, how.num_splits, numbers.k_scale, numbers.v_scale,
                  how.shared_prefix)
    score = Score(scale, cap, alibi=o.alibi_slopes is not None, sinks=o.sinks is not None)
    seqlen_k = width * page_size if after is None else int(after.max(initial=0))
    problem = Problem(call, g.q.dtype, rows.batch, g.q.shape[-2], g.k_cache.shape[-2], rows.seqlen_q, seqlen_k, g.q.shape[-1],
                      g.v_cache.shape[-1], score, mask_of(check, options), total_q=g.q.shape[0] if g.packed else None, seqused_k=True,
                      eight_bit=eight_bit, cache=cache)
    return problem, o
