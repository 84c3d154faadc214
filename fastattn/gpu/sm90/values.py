"""A second producer of the Hopper forward over pages: it loads V, where a block is in so many boxes that one thread would be late.

A TMA load takes its thread some 60 cycles. Of pages of 16 keys a block of K and V at head_dim 128 has 32 loads, which take as long as the
block's MMAs. The second producer follows the records that the first one writes, as consumers do, and releases none: consumers end a tile
when its V is there, so a record is not overwritten while it is read here.
"""
from __future__ import annotations

from typing import Any

from numba import int32

from ..dsl.inline import divide, inline
from ..ptx.sync import opaque
from .records import TILE, Records

SECOND = 32                 # its thread of the producers' warpgroup: the first one of another warp


def make_load_values(records: Records, load_v: Any, keys_at: Any, key_row: Any, BLOCK_N: int) -> Any:
    """load_values(a, base): V of every key block of every tile, in the first producer's order."""
    @inline
    def load_values(a, base):
        it, i = int32(0), int32(0)
        records.wait(base, i)
        while records.word(base, i, TILE.KIND) != 0:
            n_min, n_max = records.blocks(a, base, i)
            head_k = divide(records.word(base, i, TILE.HEAD), a.group)
            keys = keys_at(a, records.word(base, i, TILE.BATCH), records.word(base, i, TILE.SEQLEN_K))
            row, end = key_row(a, int32(0), n_max), key_row(a, int32(0), n_min)
            while row > end:
                row = opaque(int32(row - BLOCK_N))
                load_v(a, base, it, row, head_k, keys)
                it = int32(it + 1)
            i = int32(i + 1)
            records.wait(base, i)
    return load_values
