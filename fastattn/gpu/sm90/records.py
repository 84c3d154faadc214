"""Tile records of the persistent Hopper kernels: what the producer knows of its next tiles, in shared memory for the consumers.

The records are a ring that the producer fills with ordinary stores, up to two tiles ahead of the consumers.
"""
from __future__ import annotations

from enum import IntEnum
from types import ModuleType
from typing import Any

from numba import int32

from ..dsl.inline import inline
from ..ptx.memory import load_shared_b32, store_shared_b32
from ..ptx.sync import uniform
from ..spec import Spec
from ..tile.ring import make_ring
from ..tile.schedule import make_tile_at, make_unowned
from ..tile.smem import WARPGROUP_ROWS, Smem

RECORDS = 4


class TILE(IntEnum):
    """The words of a record. KIND: 0 if there is no tile, 2 if it has rows of no sequence, else 1."""

    M_BLOCK = 0
    HEAD = 1
    BATCH = 2
    Q_START = 3
    SEQLEN_Q = 4
    SEQLEN_K = 5
    KIND = 6
    K_START = 7
    N_MIN = 8       # from here on of a call with a mask: its key blocks, and those of each warpgroup's rows, up to [END + w]
    N_MAX = 9
    END = 10



class Records(ModuleType):
    """The records, by the number `i` of the thread block's tile.

    init(base)                      one thread, before mbarrier.fence_init
    put(a, base, i, t, tiles)       the producer writes tile t, of `tiles`, as the i-th
    blocks(a, base, i)              (n_min, n_max) of the tile, for one thread; a call with a mask has them in the record
    word(base, i, TILE.HEAD)        a word of the record, for one thread
    wait(base, i)                   consumers, before they read
    get(base, i, TILE.HEAD)         a word of the record, for a warp; read again where it is needed, not kept in a register
    release(base, i, lane)          consumers, once per warp (lane 0): the record may be overwritten
    """

    init: Any
    put: Any
    word: Any
    blocks: Any
    wait: Any
    get: Any
    release: Any


def make_records(spec: Spec, BLOCK_M: int, smem: Smem, CONSUMERS: int, tile_blocks: Any) -> Records:
    """Records of tiles of BLOCK_M rows, read by so many consumer warps; shared memory is taken from `smem`. tile_blocks: see bounds.py."""
    ring = make_ring(smem, RECORDS, CONSUMERS)
    MASK, WARPGROUPS = spec.mask, BLOCK_M // WARPGROUP_ROWS
    RECORD_BYTES = 4 * (TILE.END + WARPGROUPS) if MASK else 4 * TILE.N_MIN
    SLOTS = smem.take(RECORDS * RECORD_BYTES, 16)
    tile_at, unowned = make_tile_at(spec, BLOCK_M), make_unowned(spec)
    records = Records("records")

    @inline
    def put_words(record, m_block, head, batch, q_start, seqlen_q, seqlen_k, k_start):
        store_shared_b32(record + 4 * TILE.M_BLOCK, m_block)
        store_shared_b32(record + 4 * TILE.HEAD, head)
        store_shared_b32(record + 4 * TILE.BATCH, batch)
        store_shared_b32(record + 4 * TILE.Q_START, q_start)
        store_shared_b32(record + 4 * TILE.SEQLEN_Q, seqlen_q)
        store_shared_b32(record + 4 * TILE.SEQLEN_K, seqlen_k)
        store_shared_b32(record + 4 * TILE.K_START, k_start)

    @inline
    def put(a, base, i, t, tiles):
        slot = int32(i & (RECORDS - 1))
        record = int32(base + SLOTS + RECORD_BYTES * slot)
        ring.wait_empty_nth(base, i)
        if t < tiles:
            m_block, head, batch, q_start, seqlen_q, k_start, seqlen_k = tile_at(a, t)
            put_words(record, m_block, head, batch, q_start, seqlen_q, seqlen_k, k_start)
            store_shared_b32(record + 4 * TILE.KIND, unowned(a, t))
            if MASK:
                n_min, n_max, ends = tile_blocks(a, batch, head, m_block, seqlen_q, seqlen_k)
                store_shared_b32(record + 4 * TILE.N_MIN, n_min)
                store_shared_b32(record + 4 * TILE.N_MAX, n_max)
                store_shared_b32(record + 4 * TILE.END, ends[0])
                if WARPGROUPS > 1:
                    store_shared_b32(record + 4 * TILE.END + 4, ends[1])
                if WARPGROUPS > 2:
                    store_shared_b32(record + 4 * TILE.END + 8, ends[2])
        else:
            put_words(record, int32(0), int32(0), int32(0), int32(0), int32(0), int32(0), int32(0))
            store_shared_b32(record + 4 * TILE.KIND, int32(0))
        ring.arrive_full(base, slot)

    @inline
    def word(base, i, field):
        return load_shared_b32(base + SLOTS + RECORD_BYTES * (i & (RECORDS - 1)) + 4 * field)

    @inline
    def get(base, i, field):
        return uniform(word(base, i, field))

    @inline
    def blocks(a, base, i):
        if MASK:
            return word(base, i, TILE.N_MIN), word(base, i, TILE.N_MAX)
        else:
            n_min, n_max, _ = tile_blocks(a, word(base, i, TILE.BATCH), word(base, i, TILE.HEAD), word(base, i, TILE.M_BLOCK),
                                          word(base, i, TILE.SEQLEN_Q), word(base, i, TILE.SEQLEN_K))
            return n_min, n_max

    @inline
    def wait(base, i):
        ring.wait_full_nth(base, i)

    @inline
    def release(base, i, lane):
        slot, _ = ring.use(i)
        ring.release(base, slot, lane)
    records.init, records.put, records.word, records.blocks = ring.init, put, word, blocks
    records.wait, records.get, records.release = wait, get, release
    return records
