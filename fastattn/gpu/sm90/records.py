"""Tile records of the persistent Hopper kernels: what the producer knows of its next tiles, in shared memory for the consumers.

A record is eight words: m_block, head, batch, q_start, seqlen_q, seqlen_k, kind, k_start. Its kind is 0 where there is no tile, 2 for rows
of no sequence. The producer is up to two tiles ahead; FULL[r] and EMPTY[r] are the barriers of a record.
"""
from __future__ import annotations

from typing import Any

from numba import int32

from ..dsl.inline import inline
from ..ptx import mbarrier
from ..ptx.memory import load_shared_b32, store_shared_b32
from ..ptx.sync import uniform
from ..spec import Spec
from ..tile.schedule import make_tile_at, make_unowned
from ..tile.smem import Smem

RECORDS = 4


def make_records(spec: Spec, BLOCK_M: int, smem: Smem) -> tuple[Any, ...]:
    """(put_tile, word, get, FULL, EMPTY), with the places of all records taken from `smem`."""
    FULL, EMPTY, TILE = smem.barriers(RECORDS), smem.barriers(RECORDS), smem.take(RECORDS * 32, 16)
    tile_at, unowned = make_tile_at(spec, BLOCK_M), make_unowned(spec)

    @inline
    def put_words(record, m_block, head, batch, q_start, seqlen_q, seqlen_k, k_start):
        store_shared_b32(record, m_block)
        store_shared_b32(record + 4, head)
        store_shared_b32(record + 8, batch)
        store_shared_b32(record + 12, q_start)
        store_shared_b32(record + 16, seqlen_q)
        store_shared_b32(record + 20, seqlen_k)
        store_shared_b32(record + 28, k_start)

    @inline
    def put_tile(a, base, i, t, tiles):
        """The i-th tile's record; its last word is 0 where there is none, 2 for rows of no sequence."""
        slot = int32(i & (RECORDS - 1))
        record = int32(base + TILE + 32 * slot)
        mbarrier.wait(base + EMPTY + 8 * slot, int32(((i >> 2) & 1) ^ 1))
        if t < tiles:
            m_block, head, batch, q_start, seqlen_q, k_start, seqlen_k = tile_at(a, t)
            put_words(record, m_block, head, batch, q_start, seqlen_q, seqlen_k, k_start)
            store_shared_b32(record + 24, unowned(a, t))
        else:
            put_words(record, int32(0), int32(0), int32(0), int32(0), int32(0), int32(0), int32(0))
            store_shared_b32(record + 24, int32(0))
        mbarrier.arrive(base + FULL + 8 * slot)

    @inline
    def word(base, i, field):
        """A word of the i-th tile's record, for one thread."""
        return load_shared_b32(base + TILE + 32 * (i & (RECORDS - 1)) + 4 * field)

    @inline
    def get(base, i, field):
        """A word of the i-th tile's record, read again where it is needed rather than kept in a register."""
        return uniform(word(base, i, field))

    return put_tile, word, get, FULL, EMPTY
