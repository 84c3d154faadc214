"""The new keys and values of a call go into its caches, and q is rotated: one pass over memory.

    q (rows, heads, head_dim)           rotated, to memory of its own       with a rotary embedding alone
    k (rows, key heads, head_dim)       rotated, to its row of the cache    behind the keys that the request has
    v (rows, key heads, head_dim_v)     to its row of the cache

A thread has one vector of 16 bytes of one row and head; where an address, a stride or a head size is no multiple of 16 bytes, one element.
Rows of the cache are found on the device. A row past the end of the cache, and one whose table entry names no page, is not written.

A rotation is float32: x * cos + partner * sin, both products rounded, and the sum rounded once to the dtype that is written. An 8-bit cache
of 16-bit keys gets x / scale, saturated. Other numbers are copied bit by bit.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint64

from ...arrays.view import ITEMSIZE
from ..dsl.inline import divide, inline
from ..ptx.arith import turn
from ..ptx.memory import copy_bytes, load_b32
from ..ptx.scalar import load_chunk, load_if, store
from ..tile.requests import make_request_at, make_request_of_row
from .config import APPEND_THREADS as THREADS
from .transform import make_access, scale_chunk


def make_angles(dtype: str, VECTOR: int, PAIRS: bool, WHOLE: bool) -> Any:
    """angles(row, by_dim, first): the cosines (or sines) of a vector's columns. row: address of the position's. `first`: index of the
    vector's first one. PAIRS: neighbours have the same one. WHOLE: they are contiguous float32, aligned."""
    one_if, four = load_if(dtype, "float32"), load_chunk("float32")

    @inline
    def one(row, by_dim, n):
        return one_if(uint64(row + uint64(n * by_dim)), int32(1))

    @inline
    def two(row, by_dim, n):
        return one(row, by_dim, n), one(row, by_dim, int32(n + 1))

    @inline
    def quad(row, by_dim, n):
        if WHOLE:
            return four(uint64(row + uint64(4 * n)), int32(1))
        else:
            x, y = two(row, by_dim, n), two(row, by_dim, int32(n + 2))
            return x[0], x[1], y[0], y[1]

    @inline
    def angles(row, by_dim, first):
        if VECTOR == 1:
            return (one(row, by_dim, first),)
        elif VECTOR == 4 and PAIRS:
            x = two(row, by_dim, first)
            return x[0], x[0], x[1], x[1]
        elif VECTOR == 4:
            return quad(row, by_dim, first)
        elif PAIRS:
            x = quad(row, by_dim, first)
            return x[0], x[0], x[1], x[1], x[2], x[2], x[3], x[3]
        else:
            x, y = quad(row, by_dim, first), quad(row, by_dim, int32(first + 4))
            return x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3]
    return angles


def make_partner(VECTOR: int) -> tuple[Any, Any]:
    """(swap, alternate) of pairs of neighbours: x with the two of each pair exchanged, and with every first one negated."""
    @inline
    def swap(x):
        if VECTOR == 4:
            return x[1], x[0], x[3], x[2]
        else:
            return x[1], x[0], x[3], x[2], x[5], x[4], x[7], x[6]

    @inline
    def alternate(x):
        if VECTOR == 4:
            return -x[0], x[1], -x[2], x[3]
        else:
            return -x[0], x[1], -x[2], x[3], -x[4], x[5], -x[6], x[7]
    return swap, alternate


def make_rotate(dtype: str, VECTOR: int, PAIRS: bool, angle_dtype: str, WHOLE_ANGLES: bool) -> Any:
    """rotate(a, row, by_dim, column, position): the vector at `column` of the row at an address, rotated, as float32."""
    load, _ = make_access(dtype, VECTOR > 1)
    angles, (swap, alternate) = make_angles(angle_dtype, VECTOR, PAIRS, WHOLE_ANGLES), make_partner(VECTOR)

    @inline
    def table(a, position):
        """Addresses of the position's cosines and sines. Positions behind the last have the last one's."""
        at = int32(min(position, a.last_position))
        return uint64(a.cos + uint64(at * a.cos_row)), uint64(a.sin + uint64(at * a.sin_row))

    @inline
    def halves(a, row, by_dim, column, position):
        first = column < a.half
        other = int32(column + a.half) if first else int32(column - a.half)
        n = column if first else other
        sign = float32(-1) if first else float32(1)
        cos, sin = table(a, position)
        x, y = load(uint64(row + uint64(column * by_dim)), int32(1)), load(uint64(row + uint64(other * by_dim)), int32(1))
        return turn(x, y, angles(cos, a.cos_dim, n), scale_chunk(angles(sin, a.sin_dim, n), sign))

    @inline
    def pairs(a, row, by_dim, column, position):
        cos, sin = table(a, position)
        n = int32(column >> 1)
        x, c, s = load(uint64(row + uint64(column * by_dim)), int32(1)), angles(cos, a.cos_dim, n), angles(sin, a.sin_dim, n)
        if VECTOR == 1:
            sign = float32(1) if (column & 1) != 0 else float32(-1)
            return turn(x, load(uint64(row + uint64((column ^ 1) * by_dim)), int32(1)), c, scale_chunk(s, sign))
        else:
            return turn(x, swap(x), c, alternate(s))
    return pairs if PAIRS else halves


def make_put(dtype: str, target: str, VECTOR: int) -> Any:
    """put(to, by_dim, x, scale): the vector, rounded once to `target`; of an 8-bit one x / scale, which saturates."""
    if target == dtype:
        _, put_all = make_access(dtype, VECTOR > 1)

        @inline
        def put(to, by_dim, x, scale):
            put_all(to, x)
        return put
    put_one = store(target, "float32")

    @inline
    def put_four(to, by_dim, x, y, z, w, scale):
        put_one(to, x / scale)
        put_one(uint64(to + uint64(by_dim)), y / scale)
        put_one(uint64(to + uint64(2 * by_dim)), z / scale)
        put_one(uint64(to + uint64(3 * by_dim)), w / scale)

    @inline
    def put_bytes(to, by_dim, x, scale):
        if VECTOR == 1:
            put_one(to, x[0] / scale)
        else:
            put_four(to, by_dim, x[0], x[1], x[2], x[3], scale)
            put_four(uint64(to + uint64(4 * by_dim)), by_dim, x[4], x[5], x[6], x[7], scale)
    return put_bytes


def make_append(dtype: str, target: str, WHOLE: bool, rotary: tuple[bool, str, bool] | None, PACKED: bool, PAGED: bool) -> Any:
    """The kernel: k and v of `dtype` into caches of `target`. rotary: (neighbours are pairs, the tables' dtype, whether they are contiguous
    and aligned float32). a.slots: heads of a row that have something to do, from a.first_slot on of those of q, k and v."""
    SIZE = ITEMSIZE[dtype]
    VECTOR, ROTARY, QUANTISED = (16 // SIZE if WHOLE else 1), rotary is not None, target != dtype
    request_at, request_of_row = make_request_at(PACKED), make_request_of_row(PACKED)
    copy, put_q, put_new = copy_bytes(VECTOR * SIZE), make_put(dtype, dtype, VECTOR), make_put(dtype, target, VECTOR)
    load_scale = load_if("float32", "float32")
    load, _ = make_access("float32" if SIZE == 1 else dtype, WHOLE)         # 8-bit numbers are copied
    rotate = make_rotate(dtype, VECTOR, *(rotary or (False, "float32", False)))

    @inline
    def scale_of(pointer, by_batch, by_head, b, head, number):
        scale = float32(number)
        if pointer != 0:
            scale = load_scale(uint64(pointer + uint64(b * by_batch + head * by_head)), int32(1))
        return scale

    @inline
    def page_of(a, b, position):
        """(page, its row, whether it is there) of a request's key."""
        if PAGED:
            entry = divide(position, a.page_size)
            page = load_b32(uint64(a.table + uint64(b * a.table_row + entry * a.table_entry)))
            return page, int32(position - entry * a.page_size), (page >= 0) & (page <= a.last_page)
        else:
            return b, position, True

    @inline
    def rotated(a, b, i, head, column, position):
        """A vector of q."""
        row = uint64(a.q + uint64(b * a.q_batch + i * a.q_row + head * a.q_head))
        line = int64(b) * a.seqlen_q + i if not PACKED else int64(i)
        to = uint64(a.q_to + uint64(((line * a.heads + head) * a.head_dim + column) * SIZE))
        if column < 2 * a.half:
            put_q(to, int64(SIZE), rotate(a, row, a.q_dim, column, position), float32(1))
        else:
            copy(to, uint64(row + uint64(column * a.q_dim)))

    @inline
    def new_key(a, b, i, head, column, position, page, slot):
        row = uint64(a.k + uint64(b * a.k_batch + i * a.k_row + head * a.k_head))
        to = uint64(a.k_cache + uint64(page * a.k_cache_page + slot * a.k_cache_row + head * a.k_cache_head + column * a.k_cache_dim))
        scale = float32(1)
        if QUANTISED:
            scale = scale_of(a.k_scale, a.k_scale_batch, a.k_scale_head, b, head, a.k_number)
        turned = False
        if ROTARY:
            if column < 2 * a.half:
                turned = True
                put_new(to, a.k_cache_dim, rotate(a, row, a.k_dim, column, position), scale)
        if not turned:
            plain(uint64(row + uint64(column * a.k_dim)), to, a.k_cache_dim, scale)

    @inline
    def plain(source, to, by_dim, scale):
        if QUANTISED:
            put_new(to, by_dim, load(source, int32(1)), scale)
        else:
            copy(to, source)

    @inline
    def new_value(a, b, i, head, column, page, slot):
        source = uint64(a.v + uint64(b * a.v_batch + i * a.v_row + head * a.v_head + column * a.v_dim))
        to = uint64(a.v_cache + uint64(page * a.v_cache_page + slot * a.v_cache_row + head * a.v_cache_head + column * a.v_cache_dim))
        scale = float32(1)
        if QUANTISED:
            scale = scale_of(a.v_scale, a.v_scale_batch, a.v_scale_head, b, head, a.v_number)
        plain(source, to, a.v_cache_dim, scale)

    @inline
    def append(a, b, i, slot, column, position):
        """A vector of k or v."""
        head = int32(slot - a.heads)
        is_key = head < a.heads_k
        if not is_key:
            head = int32(head - a.heads_k)
        dim = a.head_dim if is_key else a.head_dim_v
        if position < a.room and column < dim:
            page, row, there = page_of(a, b, position)
            if there:
                if is_key:
                    new_key(a, b, i, head, column, position, page, row)
                else:
                    new_value(a, b, i, head, column, page, row)

    def kernel(a):
        first = int64(cuda.blockIdx.x) * THREADS
        before = int64(first // int64(a.per_row))
        unit = int32(first - before * a.per_row + cuda.threadIdx.x)
        ahead = divide(unit, a.per_row)
        row, unit = int32(before + ahead), int32(unit - ahead * a.per_row)
        if row < a.rows:
            slot = divide(unit, a.chunks)
            column, slot = int32((unit - slot * a.chunks) * VECTOR), int32(slot + a.first_slot)
            b = request_of_row(a, row)
            i = row if PACKED else int32(row - b * a.seqlen_q)
            if b < a.batch:
                request = request_at(a, b)
                position = int32(min(request.before + i - request.q_start, a.room))
                if i >= request.q_start:        # else the lengths are wrong
                    if slot >= a.heads:
                        append(a, b, i, slot, column, position)
                    elif ROTARY:
                        if column < a.head_dim:
                            rotated(a, b, i, slot, column, position)
    return kernel
