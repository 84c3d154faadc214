"""Barriers of the Hopper kernels, by name: rings of stages between a producer and its consumers, and single barriers.

A stage of a ring is a slot in shared memory with two mbarriers. FULL completes when the bytes of the slot's TMA loads have arrived, EMPTY
when every consumer warp has released the slot. Stages are used round robin. `phase` is the parity of the round: 0 in the first, 1 in the
second, 0 again in the third. A wait for FULL takes the round's phase. A wait for EMPTY takes the opposite one, so that the first round
does not wait for anything.

Two ways to know (stage, phase), because the kernels' machine code depends on which one they use:
    stage, phase = ring.next(stage, phase)      carried from step to step; any number of stages
    stage, phase = ring.use(n)                  derived from a count of uses; a power of two of stages

Each kind of barrier is a module, because Numba resolves a module's attributes while it compiles: `k_ring.wait_full(base, stage, phase)` in
a kernel costs nothing. `base` is the kernel's aligned base of shared memory; addresses here are offsets from it.
"""
from __future__ import annotations

from types import ModuleType
from typing import Any

from numba import cuda, int32

from ..dsl.inline import inline
from ..ptx import mbarrier
from ..ptx.sync import fence_async
from .smem import Smem, copy_rows


class Ring(ModuleType):
    """`STAGES` slots in shared memory, filled by one producer and released by consumer warps.

    init(base)                          one thread, before mbarrier.fence_init; init_stage(base, stage) for one stage
    next(stage, phase)                  (stage, phase) of the next use
    use(n)                              (stage, phase) of the n-th use; a power of two of stages
    wait_empty(base, stage, phase)      the producer, before it fills the slot; the opposite of the round's phase
    arrive_expect(base, stage, bytes)   the producer, before the TMA loads of that many bytes
    full(stage)                         offset of the mbarrier that these loads report to
    arrive_full(base, stage)            the producer, if it fills the slot by ordinary stores
    wait_full(base, stage, phase)       consumers, before they read the slot
    wait_empty_nth(base, n), wait_full_nth(base, n)     the same waits, of the n-th use
    release(base, stage, lane)          consumers, once per warp (lane 0): the slot may be overwritten
    arrive_empty(base, stage)           the same, by a thread that is lane 0
    empty(base, stage)                  address of the mbarrier EMPTY
    """

    STAGES: int
    FULL: int
    init: Any
    init_stage: Any
    next: Any
    use: Any
    wait_empty: Any
    arrive_expect: Any
    full: Any
    arrive_full: Any
    wait_full: Any
    wait_empty_nth: Any
    wait_full_nth: Any
    release: Any
    arrive_empty: Any
    empty: Any


def make_ring(smem: Smem, STAGES: int, CONSUMERS: int, PRODUCERS: int = 1) -> Ring:
    """A ring with mbarriers taken from `smem`. CONSUMERS: the warps that release a slot. PRODUCERS: arrivals that fill it."""
    FULL, EMPTY, STAGE_BITS = smem.barriers(STAGES), smem.barriers(STAGES), STAGES.bit_length() - 1
    ring = Ring("ring")
    ring.STAGES, ring.FULL = STAGES, FULL

    @inline
    def init_stage(base, stage):
        mbarrier.init(base + FULL + 8 * stage, int32(PRODUCERS))
        mbarrier.init(base + EMPTY + 8 * stage, int32(CONSUMERS))

    @inline
    def init(base):
        for s in range(STAGES):
            init_stage(base, s)

    @inline
    def next_use(stage, phase):
        stage = int32(stage + 1)
        return (int32(0), int32(phase ^ 1)) if stage == STAGES else (stage, phase)

    @inline
    def use(n):
        return int32(n & (STAGES - 1)), int32((n >> STAGE_BITS) & 1)

    @inline
    def wait_empty(base, stage, phase):
        mbarrier.wait(base + EMPTY + 8 * stage, phase)

    @inline
    def arrive_expect(base, stage, size):
        mbarrier.arrive_expect(base + FULL + 8 * stage, size)

    @inline
    def full(stage):
        return int32(FULL + 8 * stage)

    @inline
    def arrive_full(base, stage):
        mbarrier.arrive(base + FULL + 8 * stage)

    @inline
    def wait_full(base, stage, phase):
        mbarrier.wait(base + FULL + 8 * stage, phase)

    @inline
    def wait_empty_nth(base, n):
        mbarrier.wait(base + EMPTY + 8 * (n & (STAGES - 1)), int32(((n >> STAGE_BITS) & 1) ^ 1))

    @inline
    def wait_full_nth(base, n):
        mbarrier.wait(base + FULL + 8 * (n & (STAGES - 1)), int32((n >> STAGE_BITS) & 1))

    @inline
    def empty(base, stage):
        return base + EMPTY + 8 * stage

    @inline
    def arrive_empty(base, stage):
        mbarrier.arrive(base + EMPTY + 8 * stage)

    @inline
    def release(base, stage, lane):
        if lane == 0:
            arrive_empty(base, stage)
    ring.init, ring.init_stage, ring.next, ring.use = init, init_stage, next_use, use
    ring.wait_empty, ring.arrive_expect, ring.full, ring.arrive_full = wait_empty, arrive_expect, full, arrive_full
    ring.wait_empty_nth, ring.wait_full_nth = wait_empty_nth, wait_full_nth
    ring.wait_full, ring.release, ring.arrive_empty, ring.empty = wait_full, release, arrive_empty, empty
    return ring


def make_fill(ring: Ring, SLOTS: int, PANEL_BYTES: int, PANELS: int, copy: Any = copy_rows) -> Any:
    """fill(base, map_, stage, phase, row, head, batch): the producer waits until a slot of `ring` is empty and issues the TMA loads of a
    tile into it. The slots are at offset SLOTS, each has PANELS panels of PANEL_BYTES. `phase` is that of wait_empty, `copy` one of
    smem.make_copy_rows."""
    BYTES = PANELS * PANEL_BYTES

    @inline
    def fill(base, map_, stage, phase, row, head, batch):
        ring.wait_empty(base, stage, phase)
        ring.arrive_expect(base, stage, int32(BYTES))
        copy(base, map_, ring.full(stage), SLOTS + stage * BYTES, PANEL_BYTES, PANELS, row, head, batch)
    return fill


class Barrier(ModuleType):
    """One mbarrier: of a tile that is loaded once per thread block, or one that all consumers arrive at.

    init(base)                  one thread, before mbarrier.fence_init
    FULL                        offset of the mbarrier, which TMA loads report to
    arrive_expect(base, bytes)  the producer, before the TMA loads of that many bytes
    arrive(base)                one of its arrivals
    publish(base, lane)         a warp, after ordinary stores to shared memory that MMAs will read: one arrival
    wait(base, phase)           until the phase of that parity is complete; 0 for a tile that is loaded once
    """

    FULL: int
    init: Any
    arrive_expect: Any
    arrive: Any
    publish: Any
    wait: Any


@inline
def _publish(barrier, lane):
    fence_async()
    cuda.syncwarp()
    if lane == 0:
        mbarrier.arrive(barrier)


def make_barrier(smem: Smem, ARRIVALS: int = 1) -> Barrier:
    """A barrier of so many arrivals, its mbarrier taken from `smem`."""
    FULL, barrier = smem.barriers(1), Barrier("barrier")

    @inline
    def init(base):
        mbarrier.init(base + FULL, int32(ARRIVALS))

    @inline
    def arrive_expect(base, size):
        mbarrier.arrive_expect(base + FULL, size)

    @inline
    def arrive(base):
        mbarrier.arrive(base + FULL)

    @inline
    def publish(base, lane):
        _publish(base + FULL, lane)

    @inline
    def wait(base, phase):
        mbarrier.wait(base + FULL, phase)
    barrier.FULL, barrier.init, barrier.arrive_expect, barrier.arrive = FULL, init, arrive_expect, arrive
    barrier.publish, barrier.wait = publish, wait
    return barrier


class Tails(ModuleType):
    """A packed sequence's last block of query rows, once for each head: the producer warp clears the rows past the sequence's end after TMA
    has filled the slot, and consumers wait for that instead of for the ring's FULL.

    Two alternating barriers: a producer with two stages can clear the tails of two heads before a consumer has waited for the first. Head h
    uses barrier h % 2, with phase (h // 2) % 2.

    init(base, head)                                one thread; `head` is the first head of the thread block
    publish(base, head, lane)                       the producer warp, when it has cleared the tail of `head`
    wait_full(base, stage, phase, head, is_tail)    as the ring's wait_full; where the block is_tail, until its tail is cleared
    """

    init: Any
    publish: Any
    wait_full: Any


def make_tails(smem: Smem, ring: Ring) -> Tails:
    """The tails of blocks in the slots of `ring`."""
    CLEARED, tails = smem.barriers(2), Tails("tails")
    FULL = ring.FULL

    @inline
    def init(base, head):
        for odd in range(2):
            mbarrier.init(base + CLEARED + 8 * odd, int32(1))
            if ((head + ((head ^ odd) & 1)) >> 1) & 1 != 0:     # the first head of this barrier begins with phase 1
                mbarrier.arrive(base + CLEARED + 8 * odd)

    @inline
    def publish(base, head, lane):
        _publish(base + CLEARED + 8 * (head & 1), lane)

    @inline
    def wait_full(base, stage, phase, head, is_tail):
        barrier = int32(base + (CLEARED + 8 * (head & 1) if is_tail else FULL + 8 * stage))
        parity = int32((head >> 1) & 1 if is_tail else phase)       # a name of its own: see dsl/inline.py
        mbarrier.wait(barrier, parity)
    tails.init, tails.publish, tails.wait_full = init, publish, wait_full
    return tails
