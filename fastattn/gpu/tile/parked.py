"""Words of a tile parked in shared memory, because the loop of a kernel has no registers for them."""
from __future__ import annotations

from .smem import Smem


def parked(smem: Smem, count: int, align: int = 4) -> range:
    """Offsets of `count` new 32-bit words. One thread stores them at the start; each is loaded where it is needed."""
    start = smem.take(4 * count, align)
    return range(start, start + 4 * count, 4)
