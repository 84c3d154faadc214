"""Words of a tile parked in shared memory: the loop of a kernel needs the registers for its MMAs."""
from __future__ import annotations

from numba import int32

from ..dsl.inline import inline
from ..ptx.memory import load_shared_b32, store_shared_b32
from .smem import Smem


def parked(smem: Smem, count: int, align: int = 4) -> range:
    """Offsets of `count` new 32-bit words. One thread stores them (`park`) at the start; each is loaded (`word`) where it is needed."""
    start = smem.take(4 * count, align)
    return range(start, start + 4 * count, 4)


@inline
def park(base, offset, value):
    """Store a word about the tile."""
    store_shared_b32(int32(base + offset), int32(value))


@inline
def word(base, offset):
    """Load a word about the tile. Again at each use, not kept in a register."""
    return load_shared_b32(int32(base + offset))
