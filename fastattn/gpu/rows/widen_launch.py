"""8-bit caches as 16-bit arrays in temporary memory, for forwards on tensor cores of many query rows. Without Numba.

The used keys are read once, in 8 bits, and written in 16 bits (widen_keys.py): some percent of the time of such a forward. What does not
fit WIDEN_BYTES at once is widened, and attended, in parts: some requests, or some key heads, after the other.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from ...arrays.view import CPU, EIGHT_BIT, View, contiguous
from ...problem import CacheOperands
from ..runtime.compile import Source, fields_of, late
from ..runtime.launcher import Launcher
from ..spec import Call, Launch, whole_chunks
from .append_launch import is_paged, requests
from .config import WIDEN_BYTES, WIDEN_KEYS, WIDEN_THREADS

make_widen_keys = late("rows.widen_keys", "make_widen_keys")
WIDEN = ("lengths:l lengths_step:q cu_seqlens_q:l q_step:q batch:i seqlen_q:i total_q:i room:i appends:i table:l table_row:q table_entry:q "
         "last_page:i page_size:i k_cache:l k_cache_page:q k_cache_row:q k_cache_head:q v_cache:l v_cache_page:q v_cache_row:q "
         "v_cache_head:q q_scale:l q_scale_batch:q q_scale_head:q k_scale:l k_scale_batch:q k_scale_head:q v_scale:l v_scale_batch:q "
         "v_scale_head:q v_number:f k_to:l v_to:l pieces:i heads_k:i head_dim:i head_dim_v:i")
HALVES = ("float16", "bfloat16")
ALIGNED = 256               # an address as good as any of the temporary memory


class Part(NamedTuple):
    """Some requests and some key heads of a call: [first, end) of each."""

    requests: tuple[int, int]
    heads: tuple[int, int]


@cache
def widen_source(dtype_k: str, dtype_v: str, target: str, packed: bool, paged: bool) -> Source:
    key = f"widen_keys {dtype_k} {dtype_v} {target}" + " packed" * packed + " paged" * paged
    return Source(key, lambda: make_widen_keys(dtype_k, dtype_v, target, packed, paged), fields_of(WIDEN), WIDEN_THREADS)


def refuses(call: Call) -> str | None:
    """None, or why the caches of this call are not widened."""
    p, o, e = call.problem, call.operands, call.problem.eight_bit
    if e is None or o.k.dtype not in EIGHT_BIT or p.dtype not in HALVES:
        return f"q is {p.dtype} and the caches are {o.k.dtype}: only 8-bit caches are widened, to 16 bits"
    if e.out_dtype != p.dtype:
        return f"the output is {e.out_dtype}, and the products are of {p.dtype}"
    scaled = e.factor != 1.0 or o.q_scale is not None or o.k_scale is not None or o.v_scale is not None
    if p.dtype == "float16" and scaled:
        return "numbers of 8 bits times their scales may leave float16"
    if p.mask.left is not None:
        return "a window sees few of the keys"
    if not (whole_chunks(o.k) and whole_chunks(o.v)):
        return "rows of the caches are not whole, aligned pieces of 16 bytes"
    return _refuses_parts(call)


def _refuses_parts(call: Call) -> str | None:
    o, parts = call.operands, parts_of(call)
    if parts is None:
        return f"keys of {call.problem.batch} packed requests take more than {WIDEN_BYTES} bytes for one head"
    others = [name for name in ("bias", "mask", "diagonals", "flex") if getattr(o, name) is not None]
    if len(parts) > 1 and others:
        return f"it has to be split into parts of {WIDEN_BYTES} bytes, and has {' and '.join(others)}"
    return None


def parts_of(call: Call) -> list[Part] | None:
    """What is widened at a time; None where that is too much. Packed requests stay together: rows of others would be written as rows of
    none."""
    p = call.problem
    line = 2 * p.seqlen_k * (p.head_dim + p.head_dim_v)
    heads, some = p.num_heads_k, p.batch
    if not p.packed:
        some = max(min(p.batch, WIDEN_BYTES // max(line * heads, 1)), 1)
    if some * heads * line > WIDEN_BYTES:
        heads = max(WIDEN_BYTES // (some * line), 1)
        if p.packed and some * heads * line > WIDEN_BYTES:
            return None
    return [Part((b, min(b + some, p.batch)), (h, min(h + heads, p.num_heads_k)))
            for b in range(0, p.batch, some) for h in range(0, p.num_heads_k, heads)]


def _some(x: View | None, axis: int, bounds: tuple[int, int]) -> View | None:
    """Places [first, end) of an axis."""
    if x is None:
        return None
    shape = (*x.shape[:axis], bounds[1] - bounds[0], *x.shape[axis + 1:])
    return replace(x, ptr=x.ptr + bounds[0] * x.strides[axis], shape=shape)


def of_part(call: Call, part: Part) -> Call:
    """The call of some requests and heads."""
    p, o = call.problem, call.operands
    whole = Part((0, p.batch), (0, p.num_heads_k))
    if part == whole:
        return call
    extra, by_request = o.cache, 0 if p.packed else 1
    assert extra is not None
    query_heads = part.heads[0] * p.group, part.heads[1] * p.group

    def rows(x: View) -> Any:
        x = x if p.packed else _some(x, 0, part.requests)  # type: ignore[assignment]
        return _some(x, 1 + by_request, query_heads)

    def keys(x: View) -> Any:
        x = x if is_paged(call) else _some(x, 0, part.requests)  # type: ignore[assignment]
        return _some(x, 2, part.heads)

    def scale(x: View | None) -> View | None:
        return _some(_some(x, 0, part.requests), 1, part.heads)
    table: Any = _some(extra.block_table, 0, part.requests)
    lse = None if call.lse is None else _some(call.lse if p.packed else _some(call.lse, 0, part.requests), by_request, query_heads)
    operands = replace(
        o, q=rows(o.q), k=keys(o.k), v=keys(o.v), alibi_slopes=_some(_some(o.alibi_slopes, 0, part.requests), 1, query_heads),
        sinks=_some(o.sinks, 0, query_heads), seqused_k=_some(o.seqused_k, 0, part.requests), q_scale=scale(o.q_scale),
        k_scale=scale(o.k_scale), v_scale=scale(o.v_scale), cache=replace(extra, block_table=table))
    problem = replace(p, batch=part.requests[1] - part.requests[0], num_heads=query_heads[1] - query_heads[0],
                      num_heads_k=part.heads[1] - part.heads[0])
    return Call(problem, operands, rows(call.out), lse)


def widened(call: Call, address: int) -> tuple[Call, int]:
    """(the call over 16-bit caches at an address, contiguous, a row for each request; their bytes)."""
    p, o = call.problem, call.operands
    assert p.cache is not None

    def array(at: int, dim: int) -> View:
        shape = p.batch, p.seqlen_k, p.num_heads_k, dim
        return View(at, shape, contiguous(shape, 2), p.dtype, o.k.device)
    k = array(address, p.head_dim)
    v = array(address + 2 * math.prod(k.shape), p.head_dim_v)
    own = View(0, (p.batch, 1), (4, 4), "int32", CPU)       # the host's table: request b has row b
    problem = replace(p, eight_bit=None, cache=replace(p.cache, dtype=p.dtype, pages=p.batch, page_size=p.seqlen_k))
    operands = replace(o, k=k, v=v, q_scale=None, k_scale=None, v_scale=None, cache=CacheOperands(own))
    return Call(problem, operands, call.out, call.lse), 2 * (math.prod(k.shape) + math.prod(v.shape))


def prepare(call: Call, attend: Callable[[Call], Launch], launcher: Launcher) -> Launch:
    """What widens the caches of this call, or of one that differs in addresses only, and attends to them. attend: prepares the forward of a
    call over 16-bit caches."""
    parts = parts_of(call)
    assert parts is not None
    p, o = call.problem, call.operands
    kernel = launcher.load(widen_source(o.k.dtype, o.v.dtype, p.dtype, p.packed, is_paged(call)))
    size, forwards = widened(of_part(call, parts[0]), 0)[1], dict[tuple[int, int], Launch]()
    for part in parts:
        some = of_part(call, part)
        sizes = some.problem.batch, some.problem.num_heads_k
        if sizes not in forwards:
            forwards[sizes] = attend(widened(some, ALIGNED)[0])

    def launch(call: Call, stream: int) -> None:
        with launcher.temporary(size, stream) as memory:
            for part in parts:
                some = of_part(call, part)
                wide, _ = widened(some, memory)
                kernel.launch(*_widening(some, wide), stream)
                forwards[some.problem.batch, some.problem.num_heads_k](wide, stream)
    return launch


def _widening(call: Call, wide: Call) -> tuple[int, list[Any]]:
    """(blocks, values) of the kernel."""
    p, o, e = call.problem, call.operands, call.problem.eight_bit
    assert e is not None and o.cache is not None
    table, (pages, size), pieces = o.cache.block_table, o.k.shape[:2], -(-p.seqlen_k // WIDEN_KEYS)
    values = [*requests(call)]
    if is_paged(call):
        values += [table.ptr, table.strides[0], table.strides[1] if len(table.shape) == 2 else 0, pages - 1, size]
    else:
        values += [0, 0, 0, pages - 1, size]
    for x in (o.k, o.v):
        values += [x.ptr, *x.strides[:3]]
    for scale in (o.q_scale, o.k_scale, o.v_scale):
        values += [0, 0, 0] if scale is None else [scale.ptr, *scale.strides]
    values += [e.factor, wide.operands.k.ptr, wide.operands.v.ptr, pieces, p.num_heads_k, p.head_dim, p.head_dim_v]
    return p.batch * pieces, values
