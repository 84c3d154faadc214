"""Launches of the kernel that appends keys and values and rotates q. Without Numba: a kernel in the cache is launched without it."""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from ...arrays.view import ITEMSIZE, View, contiguous, overlap
from ..runtime.compile import Source, fields_of, late
from ..runtime.launcher import PROGRAMS, Launcher
from ..runtime.packed import MOST_BLOCKS
from ..spec import Call, whole_chunks
from .config import APPEND_THREADS

make_append = late("rows.append", "make_append")
# of tile/requests.py
REQUESTS = "lengths:l lengths_step:q cu_seqlens_q:l q_step:q batch:i seqlen_q:i total_q:i room:i appends:i "
_PAGES = "table:l table_row:q table_entry:q last_page:i page_size:i "
_CACHES = " ".join(f"{x}_cache:l {x}_cache_page:q {x}_cache_row:q {x}_cache_head:q {x}_cache_dim:q" for x in "kv")
_NEW = " ".join(f"{x}:l {x}_batch:q {x}_row:q {x}_head:q {x}_dim:q" for x in "qkv")
_SCALES = " ".join(f"{x}_scale:l {x}_scale_batch:q {x}_scale_head:q {x}_number:f" for x in "kv")
_ANGLES = "cos:l cos_row:q cos_dim:q sin:l sin_row:q sin_dim:q half:i last_position:i "
_UNITS = "per_row:i chunks:i rows:i first_slot:i heads:i heads_k:i head_dim:i head_dim_v:i"
APPEND = REQUESTS + _PAGES + _ANGLES + f"{_NEW} q_to:l {_CACHES} {_SCALES} {_UNITS}"
Rotary = tuple[bool, str, bool]


@lru_cache(maxsize=PROGRAMS)
def append_source(dtype: str, target: str, whole: bool, rotary: Rotary | None, packed: bool, paged: bool) -> Source:
    """rotary: whether neighbours are pairs, the dtype of cosines and sines, whether these are contiguous and aligned float32."""
    turned = "" if rotary is None else f" rotary {'pairs' if rotary[0] else 'halves'} {rotary[1]}" + " angles" * rotary[2]
    key = f"append {dtype} {target}{turned}" + " elements" * (not whole) + " packed" * packed + " paged" * paged
    return Source(key, lambda: (make_append(dtype, target, whole, rotary, packed, paged), 0), fields_of(APPEND), APPEND_THREADS)


class Part(NamedTuple):
    """A launch: so many slots (heads) of each row, from one on."""

    grid: int
    units: tuple[int, ...]


def is_paged(call: Call) -> bool:
    """Whether the call has a table on the device. The host made that of a contiguous cache: request b has row b."""
    assert call.operands.cache is not None
    return call.operands.cache.block_table.device == call.operands.k.device


def requests(call: Call) -> list[Any]:
    """Values of REQUESTS."""
    p, o = call.problem, call.operands
    assert o.seqused_k is not None and p.cache is not None
    cu = (0, 0) if o.cu_seqlens_q is None else (o.cu_seqlens_q.ptr, o.cu_seqlens_q.strides[0])
    return [o.seqused_k.ptr, o.seqused_k.strides[0], *cu, p.batch, p.seqlen_q, p.total_q or 0, p.seqlen_k, int(p.cache.append)]


def _rotary(call: Call, whole: bool) -> Rotary | None:
    """The kernel's `rotary`. None where nothing is rotated."""
    p, c = call.problem, call.operands.cache
    assert p.cache is not None and c is not None
    if p.cache.rotary is None or c.rotary_cos is None or c.rotary_sin is None:
        return None
    aligned = whole and all(x.dtype == "float32" and x.strides[1] == 4 and x.ptr % 16 == 0 and x.strides[0] % 16 == 0
                            for x in (c.rotary_cos, c.rotary_sin))
    return p.cache.rotary.interleaved, c.rotary_cos.dtype, aligned


def _whole(call: Call) -> bool:
    """Whether a thread may have 16 bytes: of q, k, v, the caches, and of each half of the columns that are rotated."""
    p, o, c = call.problem, call.operands, call.operands.cache
    assert p.cache is not None and c is not None and c.k is not None and c.v is not None
    vector, rotary = 16 // c.k.itemsize, p.cache.rotary
    caches = o.k.dtype == c.k.dtype
    views = [c.k, c.v, *([o.k, o.v] if caches else []), *([o.q] if rotary is not None else [])]
    fits = rotary is None or (rotary.dim if rotary.interleaved else rotary.dim // 2) % vector == 0
    return fits and all(whole_chunks(x) for x in views)


def refuses_append(call: Call) -> str | None:
    """None, or why the kernel does not append what the call brings."""
    p, c = call.problem, call.operands.cache
    assert p.cache is not None and c is not None
    if not p.cache.append:
        return None
    assert c.k is not None
    if "float64" in (c.k.dtype, p.dtype):
        return "no kernel appends float64"
    rows = p.total_q if p.total_q is not None else p.batch * p.seqlen_q
    slots, dim = p.num_heads + 2 * p.num_heads_k, max(p.head_dim, p.head_dim_v)
    if slots * dim > MOST_BLOCKS // 2 or rows > MOST_BLOCKS or rows * slots * dim // APPEND_THREADS > MOST_BLOCKS:
        return f"it has {rows} rows of {slots} heads, too many to append"
    return None


def prepare(call: Call, launcher: Launcher) -> Callable[[Call, int, int], None]:
    """What enqueues the append of this call, or of one that differs in addresses only: (call, address of the rotated q, stream)."""
    p, o, c = call.problem, call.operands, call.operands.cache
    assert p.cache is not None and c is not None and c.k is not None
    whole, paged = _whole(call), is_paged(call)
    rotary = _rotary(call, whole)
    kernel = launcher.load(append_source(c.k.dtype, o.k.dtype, whole, rotary, p.packed, paged))
    vector = 16 // c.k.itemsize if whole else 1
    heads = p.num_heads if rotary is not None else 0
    parts = _parts(call, vector, heads)

    def launch(call: Call, q_to: int, stream: int) -> None:
        values = [*requests(call), *_pages(call, paged), *_angles(call), *_new(call), q_to, *_written(call), *_scales(call)]
        for part in parts:
            kernel.launch(part.grid, [*values, *part.units], stream)
    return launch


def _parts(call: Call, vector: int, heads: int) -> list[Part]:
    """One launch; if the caches share memory, v is written last, by another."""
    p, o = call.problem, call.operands
    rows = p.total_q if p.total_q is not None else p.batch * p.seqlen_q
    chunks = -(-max(p.head_dim, p.head_dim_v) // vector)

    def part(first: int, slots: int) -> Part:
        per_row = slots * chunks
        return Part(-(-rows * per_row // APPEND_THREADS), (per_row, chunks, rows, first, heads, p.num_heads_k, p.head_dim, p.head_dim_v))
    if overlap(o.k, o.v):
        return [part(0, heads + p.num_heads_k), part(heads + p.num_heads_k, p.num_heads_k)]
    return [part(0, heads + 2 * p.num_heads_k)]


def _pages(call: Call, paged: bool) -> tuple[int, ...]:
    """Values of the table: of cache_batch_idx, which has one axis, an entry for each request."""
    assert call.operands.cache is not None
    table, (pages, size) = call.operands.cache.block_table, call.operands.k.shape[:2]
    if not paged:
        return 0, 0, 0, pages - 1, size
    return table.ptr, table.strides[0], table.strides[1] if len(table.shape) == 2 else 0, pages - 1, size


def _angles(call: Call) -> tuple[int, ...]:
    c, cache = call.operands.cache, call.problem.cache
    assert c is not None and cache is not None
    if cache.rotary is None or c.rotary_cos is None or c.rotary_sin is None:
        return 0, 0, 0, 0, 0, 0, 0, 0
    return (c.rotary_cos.ptr, *c.rotary_cos.strides, c.rotary_sin.ptr, *c.rotary_sin.strides, cache.rotary.dim // 2,
            c.rotary_cos.shape[0] - 1)


def _new(call: Call) -> list[int]:
    """Pointers and strides of q, k and v; packed ones have no batch."""
    o, c = call.operands, call.operands.cache
    assert c is not None and c.k is not None and c.v is not None
    values = list[int]()
    for x in (o.q, c.k, c.v):
        values += [x.ptr, *((0,) * (4 - len(x.strides))), *x.strides]
    return values


def _written(call: Call) -> list[int]:
    o = call.operands
    return [o.k.ptr, *o.k.strides, o.v.ptr, *o.v.strides]


def _scales(call: Call) -> list[Any]:
    o, cache = call.operands, call.problem.cache
    assert cache is not None
    values = list[Any]()
    for x, number in ((o.k_scale, cache.k_scale), (o.v_scale, cache.v_scale)):
        values += [0, 0, 0, number] if x is None else [x.ptr, *x.strides, number]
    return values


def workspace_of(q: View, address: int, dtype: str) -> tuple[View, int]:
    """A contiguous View of q's shape in a dtype at an address, and its bytes."""
    size = ITEMSIZE[dtype]
    return View(address, q.shape, contiguous(q.shape, size), dtype, q.device), math.prod(q.shape) * size
