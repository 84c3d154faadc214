"""Shared memory of a kernel: a bump allocator over byte offsets, used while the kernel is made; panels that the copy engine fills, and
stages that are used in turn."""
from __future__ import annotations

from typing import Any

from numba import cuda, int32

from ..dsl.inline import inline
from ..ptx import mbarrier, tma
from ..ptx.memory import store_shared_zero16
from ..ptx.sync import fence_async, opaque

ALIGN = 1024         # 128-byte swizzle repeats every 8 rows


class Smem:
    """`take(bytes)` gives an offset from the kernel's aligned base; `size` is what to ask for at launch."""

    def __init__(self) -> None:
        self._end = 0

    def take(self, size: int, align: int = ALIGN) -> int:
        start = -(-self._end // align) * align
        self._end = start + size
        return start

    def barriers(self, count: int) -> int:
        """`count` mbarriers, 8 bytes each."""
        return self.take(8 * count, 8)

    @property
    def size(self) -> int:
        """With room to align the base, which the driver aligns to 16 only (to 1024 in practice)."""
        return self._end + ALIGN


def panels(dim: int) -> int:
    """128-byte wide panels of a row of `dim` 16-bit elements."""
    return -(-dim // 64)


def make_copy_rows(policy: Any = None) -> Any:
    """copy_rows(base, map_, full, to, panel_bytes, count, row, head, batch): asks the copy engine for `count` panels (a constant) of the
    box of rows at `row`, which the barrier `full` waits for. `policy` says how long they stay in the L2 cache: tma.evict_first, _last."""
    @inline
    def copy_rows(base, map_, full, to, panel_bytes, count, row, head, batch):
        for p in range(count):
            if policy is None:
                tma.load(base + to + p * panel_bytes, map_, base + full, int32(p * 64), row, head, batch)
            else:
                tma.load_hinted(base + to + p * panel_bytes, map_, base + full, int32(p * 64), row, head, batch, policy())
    return copy_rows


copy_rows = make_copy_rows()


def make_clear(ROWS: int, PANELS: int, THREADS: int) -> Any:
    """clear(place, rows, thread): zeros in the rows from `rows` on of PANELS panels of ROWS rows, by THREADS threads. What the copy engine
    read past a sequence's end belongs to others and may hold anything, and 0 * NaN is not 0. Products see it after a fence_async."""
    @inline
    def clear(place, rows, thread):
        at, end = int32(place + rows * 128 + thread * 16), int32(place + ROWS * 128)
        while at < end:
            for p in range(PANELS):
                store_shared_zero16(at + p * ROWS * 128)
            at = opaque(int32(at + THREADS * 16))       # opaque: not unrolled, which takes registers
    return clear


@inline
def init_clean(base, barriers, head):
    """Two barriers for the heads from `head` on, in turn, because a producer with two stages may have cleaned for two before anybody
    waited for the first: head h waits for number h % 2, phase h / 2 % 2."""
    for odd in range(2):
        mbarrier.init(base + barriers + 8 * odd, int32(1))
        if ((head + ((head ^ odd) & 1)) >> 1) & 1 != 0:     # the first head of this barrier begins with phase 1
            mbarrier.arrive(base + barriers + 8 * odd)


@inline
def cleaned(barrier, lane):
    """A warp has cleared a tile: says so to who waits for `barrier`, of one arrival."""
    fence_async()
    cuda.syncwarp()
    if lane == 0:
        mbarrier.arrive(barrier)


def make_next_stage(STAGES: int) -> Any:
    """stage, phase = next_stage(stage, phase): of STAGES, in turn; the phase, a barrier's parity, changes with every round."""
    @inline
    def next_stage(stage, phase):
        stage = int32(stage + 1)
        return (int32(0), int32(phase ^ 1)) if stage == STAGES else (stage, phase)
    return next_stage
