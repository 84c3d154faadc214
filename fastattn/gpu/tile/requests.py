"""The requests of a call over key and value caches, from lengths that only the device knows.

Wrong lengths are clamped: a request has at least 0 keys before the call, and `room` at most after it.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import int32, uint32, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32, load_shared_b32, store_shared_b32
from .schedule import length_at


class Request(NamedTuple):
    """A request's query rows, q_start and on of the packed arrays, and its keys before and after the call."""

    q_start: Any
    rows: Any
    before: Any
    keys: Any


def make_request_at(PACKED: bool, FULL: bool = False) -> Any:
    """request_at(a, b) -> Request. Packed, request a.batch has the rows that belong to none, and no keys. FULL: all have a.room keys."""
    @inline
    def rows_of(a, b):
        if PACKED:
            start = length_at(a.cu_seqlens_q, b, a.q_step, a.total_q)
            end = int32(a.total_q)
            if b < a.batch:
                end = length_at(a.cu_seqlens_q, int32(b + 1), a.q_step, a.total_q)
            return start, int32(max(end - start, 0))
        else:
            return int32(0), int32(a.seqlen_q)

    @inline
    def keys_of(a, b, rows):
        if FULL:
            return int32(a.room), int32(a.room)
        before = int32(min(max(load_b32(uint64(a.lengths + uint64(b * a.lengths_step))), 0), a.room))
        return before, int32(min(int32(before) + rows * a.appends, a.room))

    @inline
    def request_at(a, b):
        start, rows = rows_of(a, b)
        before, keys = int32(0), int32(0)
        if not PACKED or b < a.batch:
            before, keys = keys_of(a, b, rows)
        return Request(start, rows, before, keys)
    return request_at


def make_request_of_row(PACKED: bool) -> Any:
    """request_of_row(a, row): the request that a row of q belongs to; packed a.batch, if it belongs to none."""
    @inline
    def request_of_row(a, row):
        if PACKED:
            low, high = int32(0), int32(a.batch)        # the first request that ends behind the row
            while low < high:
                middle = int32((low + high) >> 1)
                if length_at(a.cu_seqlens_q, int32(middle + 1), a.q_step, a.total_q) <= row:
                    low = int32(middle + 1)
                else:
                    high = middle
            return low
        else:
            return divide(row, a.seqlen_q)
    return request_of_row


def make_place_of(PAGED: bool) -> Any:
    """place_of(a, b, key): (page, its row) of a request's key, which it has. A page that does not exist is the last one, as in pages.py;
    without pages request b has row b of the cache."""
    @inline
    def place_of(a, b, key):
        if PAGED:
            entry = divide(key, a.page_size)
            page = load_b32(uint64(a.table + uint64(b * a.table_row + entry * a.table_entry)))
            return int32(min(uint32(page), uint32(a.last_page))), int32(key - entry * a.page_size)
        else:
            return b, key
    return place_of


PLACE = 8                   # bytes in shared memory of a key's page, and its row there


def make_places(KEYS: int, THREADS: int, PAGED: bool) -> tuple[Any, Any]:
    """(find, get) of the places of a thread block's KEYS keys, looked up once.

    find(a, base, b, first, count, thread): write those of request b from key `first` on, `count` of them at most, to shared memory.
    page, row = get(base, i): of the i-th one, behind a cuda.syncthreads.
    """
    place_of = make_place_of(PAGED)

    @inline
    def find(a, base, b, first, count, thread):
        for i in range(thread, min(count, KEYS), THREADS):
            page, row = place_of(a, b, int32(first + i))
            store_shared_b32(int32(base + PLACE * i), page)
            store_shared_b32(int32(base + PLACE * i + 4), row)

    @inline
    def get(base, i):
        return load_shared_b32(int32(base + PLACE * i)), load_shared_b32(int32(base + PLACE * i + 4))
    return find, get
