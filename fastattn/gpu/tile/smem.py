"""Shared memory of a kernel: a bump allocator over byte offsets, used while the kernel is made, and tiles in panels that TMA fills.

A tile of 16-bit elements is stored as panels: 64 columns, one row after the other, 128 bytes each. TMA swizzles a panel's rows in groups of
eight, as wgmma and ldmatrix expect them.
"""
from __future__ import annotations

from typing import Any

from numba import int32

from ..dsl.inline import inline
from ..ptx import tma
from ..ptx.memory import store_shared_zero16
from ..ptx.sync import opaque

ROW_BYTES = 128          # of a row of a panel: 64 columns of 16 bits, the width of TMA's swizzle
PANEL = 64               # columns of a panel
WARPGROUP = 128          # threads that issue a wgmma together
WARPGROUP_ROWS = 64      # rows of a tile that a consumer warpgroup owns: what a wgmma multiplies
ALIGN = 8 * ROW_BYTES    # the 128-byte swizzle repeats every 8 rows
TMA_ALIGN = 128          # of what TMA writes without a swizzle
NAMED_BARRIERS = 16      # of a thread block; 0 is that of cuda.syncthreads


class Smem:
    """`take(bytes)` gives an offset from the kernel's aligned base; `size` is the dynamic shared memory of a launch, in bytes.

    `named(count)` gives the numbers of the block's named barriers (bar.sync), which take no memory: a block has 16.
    """

    def __init__(self) -> None:
        self._end, self._named = 0, 1

    def take(self, size: int, align: int = ALIGN) -> int:
        start = -(-self._end // align) * align
        self._end = start + size
        return start

    def barriers(self, count: int) -> int:
        """Offset of `count` mbarriers, 8 bytes each."""
        return self.take(8 * count, 8)

    def named(self, count: int) -> int:
        """The first of `count` named barriers with consecutive numbers."""
        first, self._named = self._named, self._named + count
        assert self._named <= NAMED_BARRIERS, "a thread block has 16 named barriers"
        return first

    @property
    def size(self) -> int:
        """With room to align the base: the driver aligns it to 16 bytes only (to 1024 in practice)."""
        return self._end + ALIGN


def panels(dim: int) -> int:
    """Panels of a row of `dim` 16-bit elements."""
    return -(-dim // PANEL)


def make_copy_rows(policy: Any = None, FIRST: int = 0) -> Any:
    """copy_rows(base, map_, full, to, panel_bytes, count, row, head, batch): issue TMA loads of `count` panels (a constant) of the box of
    rows at `row`, from panel FIRST of the rows on. Their bytes arrive at the mbarrier at offset `full`. `policy` says how long they stay in
    the L2 cache: tma.evict_first, tma.evict_last, or None for the default."""
    @inline
    def copy_rows(base, map_, full, to, panel_bytes, count, row, head, batch):
        for p in range(count):
            if policy is None:
                tma.load(base + to + p * panel_bytes, map_, base + full, int32((FIRST + p) * PANEL), row, head, batch)
            else:
                tma.load_hinted(base + to + p * panel_bytes, map_, base + full, int32((FIRST + p) * PANEL), row, head, batch, policy())
    return copy_rows


copy_rows = make_copy_rows()


def make_clear(ROWS: int, PANELS: int, THREADS: int) -> Any:
    """clear(address, rows, thread): THREADS threads write zeros to the rows from `rows` on of a tile of PANELS panels of ROWS rows.

    What TMA has read past a sequence's end belongs to another sequence and may hold anything, and 0 * NaN is not 0. An MMA reads the zeros
    only after a fence_async.
    """
    @inline
    def clear(address, rows, thread):
        at, end = int32(address + rows * ROW_BYTES + thread * 16), int32(address + ROWS * ROW_BYTES)
        while at < end:
            for p in range(PANELS):
                store_shared_zero16(at + p * ROWS * ROW_BYTES)
            at = opaque(int32(at + THREADS * 16))       # opaque: not unrolled, which would take registers
    return clear
