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

from ...arrays.streams import check
from .device import private_stream, relaxed

_COUNTERS, _ARRIVALS = 1 << 16, 1 << 10        # places per device
MOST_ARRIVALS = 2048       # groups of blocks in a launch, each of which counts the blocks that are done
_KEPT = 1 << 30            # bytes of temporary memory kept when a program synchronises: mapping half of it again can take a millisecond


class _Zeros:
    """`count` places of `size` bytes, all 0 whenever no kernel uses them, taken in turn, the upper half by launches that are captured into
    graphs: two launches share one only if count / 2 launches apart and running at the same time."""

    def __init__(self, size: int, count: int) -> None:
        self.memory, stream = int(check(driver.cuMemAlloc(size * count), "cuMemAlloc")), private_stream()
        check(driver.cuMemsetD8Async(self.memory, 0, size * count, stream), "cuMemsetD8Async")
        check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize")       # once per device and process, before the first launch
        self.size, self.next, self.next_captured = size, itertools.cycle(range(count // 2)), itertools.cycle(range(count // 2, count))

    def take(self, captured: bool) -> int:
        return self.memory + self.size * next(self.next_captured if captured else self.next)


class _Device:
    def __init__(self, ordinal: int) -> None:
        self.counters, self.arrivals = _Zeros(8, _COUNTERS), _Zeros(4 * MOST_ARRIVALS, _ARRIVALS)
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
    return _device(ordinal).counters.take(captured)


def arrivals(ordinal: int, captured: bool) -> int:
    """Address of MOST_ARRIVALS int32 zeros for one launch, which must leave them zero."""
    return _device(ordinal).arrivals.take(captured)


@contextmanager
def temporary(size: int, ordinal: int, stream: int) -> Iterator[int]:
    """Address of `size` bytes, possibly none, for the work enqueued on `stream` inside the block."""
    d = _device(ordinal)
    memory = check(driver.cuMemAllocFromPoolAsync(max(size, 1), d.pool, stream), "cuMemAllocFromPoolAsync")
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
