"""The keys and values of 8-bit caches as arrays of 16 bits, which the tensor-core forwards multiply: one pass over those that are used.

    k_cache, v_cache (pages, page_size, key heads, dim), 8 bits   ->   k_to, v_to (requests, room, key heads, dim), 16 bits, contiguous

A block has KEYS keys of a request. Which pages they are in, and how many there are, is found on the device: a block behind the last key
ends at once, and what is behind it is not written. Numbers are multiplied by the scales of their request and key head in float32 and
rounded once; without a scale that is exact. A page that does not exist is the last one, as in tile/pages.py.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import cuda, float32, int32, int64, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import shared_address
from ..ptx.scalar import load_chunk, load_if
from ..tile.requests import PLACE, make_places, make_request_at
from .config import WIDEN_KEYS as KEYS
from .config import WIDEN_THREADS as THREADS
from .transform import scale_chunk, store_chunk

NUMBERS = 16                # of a vector: 16 bytes of a cache


class Side(NamedTuple):
    """K or V: where a cache and its pages, rows and heads are, in bytes; its columns, and where it goes."""

    cache: Any
    by_page: Any
    by_row: Any
    by_head: Any
    dim: Any
    to: Any


def make_widen(dtype: str, target: str, get: Any) -> Any:
    """widen(a, base, side, scale_of, b, first, count, thread): keys `first` to first + count of request b, whose places `get` has."""
    load, put = load_chunk(dtype), store_chunk(target)

    @inline
    def widen(a, base, side, scale_of, b, first, count, thread):
        per_head = divide(side.dim, int32(NUMBERS))
        for n in range(thread, count * a.heads_k * per_head, THREADS):
            unit = divide(int32(n), per_head)
            i, column = divide(unit, a.heads_k), int32((n - unit * per_head) * NUMBERS)
            head = int32(unit - i * a.heads_k)
            page, row = get(base, i)
            at = uint64(side.cache + uint64(page * side.by_page + row * side.by_row + head * side.by_head + column))
            x = scale_chunk(load(at, int32(1)), scale_of(a, b, head))
            line = (int64(b) * a.room + first + i) * a.heads_k + head
            to = uint64(side.to + uint64(2 * (line * side.dim + column)))
            put(to, x[:8])
            put(uint64(to + uint64(16)), x[8:])
    return widen


def make_widen_keys(dtype_k: str, dtype_v: str, target: str, PACKED: bool, PAGED: bool) -> tuple[Any, int]:
    """(kernel from caches of 8-bit dtypes to a 16-bit `target`, bytes of shared memory). a.pieces: blocks of KEYS keys of a room."""
    request_at, load_scale, (find, get) = make_request_at(PACKED), load_if("float32", "float32"), make_places(KEYS, THREADS, PAGED)
    widen_k, widen_v = make_widen(dtype_k, target, get), make_widen(dtype_v, target, get)

    @inline
    def scale_at(pointer, by_batch, by_head, b, head):
        if pointer != 0:
            return load_scale(uint64(pointer + uint64(b * by_batch + head * by_head)), int32(1))
        else:
            return float32(1)

    @inline
    def scale_k(a, b, head):
        """K has the scale of the scores."""
        return (scale_at(a.q_scale, a.q_scale_batch, a.q_scale_head, b, head)
                * scale_at(a.k_scale, a.k_scale_batch, a.k_scale_head, b, head))

    @inline
    def scale_v(a, b, head):
        return a.v_number * scale_at(a.v_scale, a.v_scale_batch, a.v_scale_head, b, head)

    def kernel(a):
        block, thread = int32(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        b = divide(block, a.pieces)
        first = int32((block - b * a.pieces) * KEYS)
        keys = request_at(a, b).keys
        if first < keys:
            base, count = int32(shared_address(cuda.shared.array(0, uint8))), int32(min(int32(keys - first), KEYS))
            find(a, base, b, first, count, thread)
            cuda.syncthreads()
            side_k = Side(a.k_cache, a.k_cache_page, a.k_cache_row, a.k_cache_head, a.head_dim, a.k_to)
            widen_k(a, base, side_k, scale_k, b, first, count, thread)
            side_v = Side(a.v_cache, a.v_cache_page, a.v_cache_row, a.v_cache_head, a.head_dim_v, a.v_to)
            widen_v(a, base, side_v, scale_v, b, first, count, thread)
    return kernel, PLACE * KEYS
