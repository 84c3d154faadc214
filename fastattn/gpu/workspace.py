"""Small device memory that kernels need besides their operands: tile counters, and temporary tables.

Nothing here waits for the caller's work: counters are zero whenever no kernel uses them, because the last block to finish leaves them
so, and temporary memory is allocated and freed in stream order.
"""
from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cuda.bindings import driver

from ..streams import check
from .device import private_stream, relaxed

_COUNTERS = 1 << 16        # per device, 8 bytes each; the upper half is for launches that are captured into graphs
_ARRIVALS = 1024           # per device, of MOST_ARRIVALS words each; the upper half again for graphs
MOST_ARRIVALS = 2048
_KEPT = 1 << 30            # bytes of temporary memory kept when a program synchronises: mapping half of it again can take a millisecond


def _zeros(size: int) -> int:
    """Address of `size` bytes of zeros that are kept; once per device and process, before the first launch."""
    memory, stream = int(check(driver.cuMemAlloc(size), "cuMemAlloc")), private_stream()
    check(driver.cuMemsetD8Async(memory, 0, size, stream), "cuMemsetD8Async")
    check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize")
    return memory


class _Device:
    """Counters are used in turn: two launches share one only if 32768 launches apart and running at the same time."""

    def __init__(self, ordinal: int) -> None:
        self.memory = _zeros(8 * _COUNTERS)
        self.next, self.next_captured = itertools.cycle(range(_COUNTERS // 2)), itertools.cycle(range(_COUNTERS // 2, _COUNTERS))
        properties = driver.CUmemPoolProps()
        properties.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = ordinal
        self.pool = check(driver.cuMemPoolCreate(properties), "cuMemPoolCreate")
        threshold, kept = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, driver.cuuint64_t(_KEPT)
        check(driver.cuMemPoolSetAttribute(self.pool, threshold, kept), "cuMemPoolSetAttribute")


_devices: dict[int, _Device] = {}
_lock = threading.Lock()


def _device(ordinal: int) -> _Device:
    found = _devices.get(ordinal)
    if found is None:
        with _lock, relaxed():
            found = _devices.get(ordinal) or _devices.setdefault(ordinal, _Device(ordinal))
    return found


def counter(ordinal: int, captured: bool) -> int:
    """Address of two int32 zeros for one launch, which must leave them zero. A captured launch keeps its own."""
    d = _device(ordinal)
    return d.memory + 8 * next(d.next_captured if captured else d.next)


class _Arrivals:
    """Words by which the blocks of a launch count who is done, all 0 between launches, taken in turn as the tile counters are."""

    def __init__(self, ordinal: int) -> None:
        self.memory = _zeros(4 * MOST_ARRIVALS * _ARRIVALS)
        self.next, self.next_captured = itertools.cycle(range(_ARRIVALS // 2)), itertools.cycle(range(_ARRIVALS // 2, _ARRIVALS))


_arrivals: dict[int, _Arrivals] = {}


def arrivals(ordinal: int, captured: bool) -> int:
    """Address of MOST_ARRIVALS int32 zeros for one launch, which must leave them zero."""
    found = _arrivals.get(ordinal)
    if found is None:
        with _lock, relaxed():
            found = _arrivals.get(ordinal) or _arrivals.setdefault(ordinal, _Arrivals(ordinal))
    return found.memory + 4 * MOST_ARRIVALS * next(found.next_captured if captured else found.next)


@contextmanager
def temporary(size: int, ordinal: int, stream: int) -> Iterator[int]:
    """Address of `size` bytes for the work enqueued on `stream` inside the block."""
    d = _device(ordinal)
    memory = check(driver.cuMemAllocFromPoolAsync(size, d.pool, stream), "cuMemAllocFromPoolAsync")
    try:
        yield int(memory)
    finally:
        check(driver.cuMemFreeAsync(memory, stream), "cuMemFreeAsync")


def trim(ordinal: int) -> None:
    """Gives the driver back what is kept and not in use."""
    check(driver.cuMemPoolTrimTo(_device(ordinal).pool, 0), "cuMemPoolTrimTo")


def clear(memory: int, size: int, stream: int) -> None:
    """Enqueue writing `size` zero bytes."""
    check(driver.cuMemsetD8Async(memory, 0, size, stream), "cuMemsetD8Async")
