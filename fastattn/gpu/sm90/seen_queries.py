"""The Hopper backward under a mask_mod: a tile of keys goes through the blocks of queries that the bitmap by keys shows.

The producer looks for the next block and writes its head and number beside Q; consumers read them when Q has arrived, and again when dQ of
that block is stored. Blocks go from first to last. Dense calls only: the tails of packed sequences count on every head's last block.
"""
from __future__ import annotations

from types import ModuleType
from typing import Any

from numba import int32, uint64

from ..dsl.inline import divide, inline
from ..flex.bitmap import first_seen, line_of
from ..ptx.arith import shift_left
from ..ptx.memory import load_b32, load_shared_b32, store_shared_b32
from ..ptx.sync import uniform
from ..ptx.traced import count_bits
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.smem import Smem
from .config import BLOCK_N, BackwardSm90Config


class SeenQueries(ModuleType):
    """
    following(a, batch, head, k_row, m, m_max)      the next block of a head from m on, times 2, plus 1 where it is full; 2 * m_max: none
    count(a, batch, head_k, n_block, m_min, m_max)  how many blocks there are, of all heads of the key head
    tell(base, stage, head, found)                  the producer, when the slot of Q is empty
    told(base, stage) -> (head, m, full)            consumers, when Q has arrived
    row(a, base, stage, batch)                      first row, in a.accum, of that block
    """

    following: Any
    count: Any
    tell: Any
    told: Any
    row: Any


def make_seen_queries(spec: Spec, config: BackwardSm90Config, smem: Smem) -> SeenQueries:
    """Shared memory for the blocks' numbers is taken from `smem`, where there is a mask_mod."""
    seen = SeenQueries("seen_queries")
    if spec.mask_mod is None:
        return seen
    assert not config.down and not config.apart and not spec.packed
    WORDS, BLOCK_M, first_row = smem.take(8 * config.q_stages, 16), config.block_m, make_first_row(spec)

    @inline
    def following(a, batch, head, k_row, m, m_max):
        found = first_seen(line_of(a, batch, head, divide(k_row, int32(BLOCK_N))), m, m_max)
        found = int32(2 * m_max) if found < 0 else found
        return found

    @inline
    def count_line(line, m_min, m_max):
        """Tiles [m_min, m_max) of a line that are not empty."""
        total = int32(0)
        for word in range(m_min >> 5, (m_max + 31) >> 5):
            first, end = int32(max(m_min - word * 32, 0)), int32(min(m_max - word * 32, 32))
            inside = int32(shift_left(int32(-1), first) & ~shift_left(int32(-1), end))       # shl by 32 gives 0
            total = int32(total + count_bits(int32(load_b32(uint64(line + uint64(8 * word))) & inside)))
        return total

    @inline
    def count(a, batch, head_k, n_block, m_min, m_max):
        total = int32(0)
        for head in range(int32(head_k * a.group), int32(head_k * a.group + a.group)):
            total = int32(total + count_line(line_of(a, batch, int32(head), n_block), m_min, m_max))
        return uniform(total)

    @inline
    def tell(base, stage, head, found):
        store_shared_b32(int32(base + WORDS + 8 * stage), head)
        store_shared_b32(int32(base + WORDS + 8 * stage + 4), found)

    @inline
    def told(base, stage):
        head = uniform(load_shared_b32(int32(base + WORDS + 8 * stage)))
        found = uniform(load_shared_b32(int32(base + WORDS + 8 * stage + 4)))
        return head, int32(found >> 1), int32(found & 1)

    @inline
    def row(a, base, stage, batch):
        head, m, _ = told(base, stage)
        return int32(first_row(a, batch, head, int32(0)) + m * BLOCK_M)
    seen.following, seen.count, seen.tell, seen.told, seen.row = following, count, tell, told, row
    return seen
