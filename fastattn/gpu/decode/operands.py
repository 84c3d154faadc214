"""K and V of the split-key kernel on their way from global memory: to registers, a step ahead, or by way of shared memory, several steps.

Registers hold one step of K and V of a warp beside its O. Warps with the same keys and different rows would each load the same. Instead
they can share a ring of slots for steps in shared memory. Each copies a part of a step (cp.async), K and V as a group each:

    K 0 | V 0 | K 1 | V 1 | ...

The warps meet when a step has landed, and have read the one before then, whose slot is free. So SLOTS - 1 steps are on their way, and all
but the newest 2 SLOTS - 4 groups have landed.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import int32

from ..dsl.inline import divide, inline
from ..ptx import direct, direct_columns
from ..ptx.cp_async import commit, wait_group
from ..ptx.sync import barrier, opaque
from ..spec import Spec
from .config import WARP, DecodeConfig, chunks_of, ring_bytes


class Walk(NamedTuple):
    """What a lane loads.

    Parameters
    ----------
    k_base, v_base
        Addresses of its first chunk of key 0, or of the first row of page 0.
    last
        The last key of the split.
    g, c
        The lane's first row of 8, its first chunk of 4.
    key_warp, row_warp
        Which of the warps with different keys it is in, and which of those with the same.
    table
        What pages_of takes.
    """

    k_base: Any
    v_base: Any
    last: Any
    g: Any
    c: Any
    key_warp: Any
    row_warp: Any
    table: Any


class Operands(NamedTuple):
    """Device functions of steps whose keys begin with `key`. ring: shared address of the warps' ring, and the lane's part of it.

    start(a, ring, walk, key)
        Start the first steps, as soon as may be. Nothing for registers.
    k, v = first(a, ring, walk, key)
        Those of the first step, which exists.
    k_of(walk, k), v_of(walk, v)
        The words of a step.
    k = next_k(a, ring, walk, key, k), v = next_v(a, ring, walk, key, v)
        Behind it: those of the next step. Starts a later one.
    finish(key_warp)
        Behind the last step, by all its warps: the ring is free.
    """

    start: Any
    first: Any
    k_of: Any
    next_k: Any
    v_of: Any
    next_v: Any
    finish: Any


def make_operands(spec: Spec, config: DecodeConfig, pages_of: Any, pages_of_place: Any) -> Operands:
    """Both give direct.Pages, 0 without: of (a, walk.table, by_page) in `start`, and behind it."""
    return _in_shared_memory(spec, config, pages_of, pages_of_place) if config.stages else _in_registers(spec, config, pages_of_place)


def _in_registers(spec: Spec, config: DecodeConfig, pages_of: Any) -> Operands:
    CHUNK, CHUNKS, CHUNKS_V, WHOLE, WHOLE_V = chunks_of(spec, config)
    KEYS, STEP, COLUMNS = config.keys, config.keys * config.key_warps, config.columns
    load_rows, load_columns = (direct_columns if COLUMNS else direct).make_loads(config.row_warps == 1)
    first_key = direct_columns.make_first_key(KEYS)

    @inline
    def first_of_k(walk, key):
        if COLUMNS:
            return int32(key + first_key(walk.g))
        else:
            return int32(key + walk.g)

    @inline
    def first_of_v(walk, key):
        if COLUMNS:
            return int32(key + first_key(int32(2 * walk.c)))
        else:
            return int32(key + 2 * walk.c)

    @inline
    def load_k(a, walk, key):
        return load_rows(walk.k_base, a.k_row, first_of_k(walk, key), walk.last, KEYS, CHUNKS,
                         int32(divide(a.head_dim, CHUNK) - walk.c), WHOLE, pages_of(a, walk.table, a.k_batch))

    @inline
    def load_v(a, walk, key):
        return load_columns(walk.v_base, a.v_row, first_of_v(walk, key), walk.last, KEYS, CHUNKS_V,
                            int32(divide(a.head_dim_v, CHUNK) - walk.g), WHOLE_V, pages_of(a, walk.table, a.v_batch))

    @inline
    def start(a, ring, walk, key):
        pass

    @inline
    def first(a, ring, walk, key):
        return load_k(a, walk, key), load_v(a, walk, key)

    @inline
    def words_of(walk, words):
        return words

    @inline
    def next_k(a, ring, walk, key, k):
        return load_k(a, walk, int32(key + STEP))

    @inline
    def next_v(a, ring, walk, key, v):
        return load_v(a, walk, int32(key + STEP))

    @inline
    def finish(key_warp):
        pass
    return Operands(start, first, words_of, next_k, words_of, next_v, finish)


def _make_copies(spec: Spec, config: DecodeConfig, pages_of: Any) -> tuple[Any, Any]:
    """(copy_k, copy_v): start the copies of a step, if it exists, as a group each. (a, walk, key, address of the slot)"""
    CHUNK, CHUNKS, CHUNKS_V, WHOLE, WHOLE_V = chunks_of(spec, config)
    KEYS, WHOLE_PAGES, (K_BYTES, _) = config.keys, config.whole_pages, ring_bytes(spec, config)
    (copy_rows, _), (copy_columns, _), TOGETHER = *direct.make_copies(), config.row_warps

    @inline
    def of_step(a, walk, base, by_page, by_row, key):
        """(address of what counts as row 0, the step's first row, the last row, pages): where a step is in one page, from that on."""
        if WHOLE_PAGES:
            return direct.row_in_page(base, by_row, key, pages_of(a, walk.table, by_page)), int32(0), int32(walk.last - key), int32(0)
        else:
            return base, key, walk.last, pages_of(a, walk.table, by_page)

    @inline
    def copy_k(a, walk, key, to):
        if key <= walk.last:
            base, row, last, pages = of_step(a, walk, walk.k_base, a.k_batch, a.k_row, key)
            copy_rows(to, base, a.k_row, int32(row + walk.g), last, KEYS, CHUNKS, int32(divide(a.head_dim, CHUNK) - walk.c), WHOLE, pages,
                      walk.row_warp, TOGETHER)
        commit()

    @inline
    def copy_v(a, walk, key, to):
        if key <= walk.last:
            base, row, last, pages = of_step(a, walk, walk.v_base, a.v_batch, a.v_row, key)
            copy_columns(int32(to + K_BYTES), base, a.v_row, int32(row + 2 * walk.c), last, KEYS, CHUNKS_V,
                         int32(divide(a.head_dim_v, CHUNK) - walk.g), WHOLE_V, pages, walk.row_warp, TOGETHER)
        commit()
    return copy_k, copy_v


def _in_shared_memory(spec: Spec, config: DecodeConfig, pages_of: Any, pages_of_place: Any) -> Operands:
    CHUNKS, CHUNKS_V = chunks_of(spec, config)[1:3]
    KEYS, STEP, (K_BYTES, SLOT) = config.keys, config.keys * config.key_warps, ring_bytes(spec, config)
    SLOTS, THREADS = config.stages * config.row_warps, WARP * config.row_warps
    END, AHEAD, landed = SLOT * SLOTS, SLOTS - 1, wait_group(2 * SLOTS - 4)
    (_, take_rows), (_, take_columns) = direct.make_copies()
    first_k, first_v = _make_copies(spec, config, pages_of)
    copy_k, copy_v = _make_copies(spec, config, pages_of_place)

    @inline
    def start(a, ring, walk, key):
        n = int32(0)
        while n < AHEAD:
            first_k(a, walk, int32(key + n * STEP), int32(ring + n * SLOT))
            first_v(a, walk, int32(key + n * STEP), int32(ring + n * SLOT))
            n = opaque(int32(n + 1))        # not unrolled

    @inline
    def meet(key_warp):
        barrier(int32(key_warp + 1), int32(THREADS))

    @inline
    def first(a, ring, walk, key):
        return ring, ring

    @inline
    def behind(ring, slot):
        """The slot after this one."""
        slot = int32(slot + SLOT)
        if slot == ring + END:
            slot = ring
        return slot

    @inline
    def before(ring, slot):
        """The slot before this one, which is free."""
        slot = int32(slot - SLOT)
        if slot < ring:
            slot = int32(slot + END)
        return slot

    @inline
    def k_of(walk, k):
        landed()
        meet(walk.key_warp)
        return take_rows(k, KEYS, CHUNKS)

    @inline
    def next_k(a, ring, walk, key, k):
        copy_k(a, walk, int32(key + AHEAD * STEP), before(ring, k))
        return behind(ring, k)

    @inline
    def v_of(walk, v):
        return take_columns(int32(v + K_BYTES), KEYS, CHUNKS_V)

    @inline
    def next_v(a, ring, walk, key, v):
        copy_v(a, walk, int32(key + AHEAD * STEP), before(ring, v))
        return behind(ring, v)

    @inline
    def finish(key_warp):
        meet(key_warp)
    return Operands(start, first, k_of, next_k, v_of, next_v, finish)
