"""Small device memory that kernels need besides their operands: tile counters, and temporary memory.

Nothing here waits for the caller's work. Counters are zero whenever no kernel uses them, because the last block to
finish resets them. Temporary memory is allocated and freed in stream order.
"""
from __future__ import annotations

import itertools
import threading
from typing import Any

from cuda.bindings import driver

from ...arrays.streams import check
from .device import private_stream, relaxed

_COUNTERS, _ARRIVALS = 1 << 16, 1 << 10        # slots per device
MOST_ARRIVALS = 2048       # groups of blocks in a launch; each group counts its finished blocks
_KEPT = 1 << 30            # bytes of temporary memory kept across synchronisations: mapping half of it again can take a millisecond


class _Zeros:
    """`count` slots of `size` bytes, all 0 whenever no kernel uses them, handed out round robin.

    Launches captured into graphs get the upper half. Two launches share a slot only if they run at the same time and
    count / 2 launches lie between them.
    """

    def __init__(self, size: int, count: int) -> None:
        self.memory, stream = int(check(driver.cuMemAlloc(size * count), "cuMemAlloc")), private_stream()
        check(driver.cuMemsetD8Async(self.memory, 0, size * count, stream), "cuMemsetD8Async")
        check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize")       # once per device and process, before the first launch
        self.size, self.next, self.next_captured = size, itertools.cycle(range(count // 2)), itertools.cycle(range(count // 2, count))

    def take(self, captured: bool) -> int:
        """Address of a slot."""
        return self.memory + self.size * next(self.next_captured if captured else self.next)


class SmallMemory:
    """What a device keeps for kernels.

    `counters`: two int32 zeros a slot. `arrivals`: MOST_ARRIVALS int32 zeros a slot. A launch that takes a slot must
    leave it zero. `pool`: the memory pool of `temporary`.
    """

    def __init__(self, ordinal: int) -> None:
        self.counters, self.arrivals = _Zeros(8, _COUNTERS), _Zeros(4 * MOST_ARRIVALS, _ARRIVALS)
        properties = driver.CUmemPoolProps()
        properties.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = ordinal
        self.pool = check(driver.cuMemPoolCreate(properties), "cuMemPoolCreate")
        threshold, kept = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, driver.cuuint64_t(_KEPT)
        check(driver.cuMemPoolSetAttribute(self.pool, threshold, kept), "cuMemPoolSetAttribute")


_devices: dict[int, SmallMemory] = {}
_lock = threading.Lock()


def small_memory(ordinal: int) -> SmallMemory:
    """The SmallMemory of CUDA device `ordinal`, whose context must be current the first time."""
    found = _devices.get(ordinal)
    if found is None:
        with _lock, relaxed():
            found = _devices.get(ordinal) or _devices.setdefault(ordinal, SmallMemory(ordinal))
    return found


class temporary:     # a context manager, and a class because a generator costs a microsecond
    """Address of `size` bytes, possibly none, for the work enqueued on `stream` inside the block."""

    __slots__ = ("_memory", "_ordinal", "_size", "_stream")

    def __init__(self, size: int, ordinal: int, stream: int) -> None:
        self._size, self._ordinal, self._stream = size, ordinal, stream

    def __enter__(self) -> int:
        self._memory = allocate(self._size, self._ordinal, self._stream)
        return int(self._memory)

    def __exit__(self, *_: object) -> None:
        free(self._memory, self._stream)


def allocate(size: int, ordinal: int, stream: int) -> Any:
    """Address of `size` bytes, possibly none, for work enqueued on `stream` until `free`."""
    return check(driver.cuMemAllocFromPoolAsync(max(size, 1), small_memory(ordinal).pool, stream), "cuMemAllocFromPoolAsync")


def free(memory: Any, stream: int) -> None:
    """Free what `allocate` gave, after the work now enqueued on `stream`."""
    check(driver.cuMemFreeAsync(memory, stream), "cuMemFreeAsync")


def trim(ordinal: int) -> None:
    """Return unused temporary memory to the driver."""
    check(driver.cuMemPoolTrimTo(small_memory(ordinal).pool, 0), "cuMemPoolTrimTo")


def clear(memory: int, size: int, stream: int) -> None:
    """Enqueue writing `size` zero bytes."""
    check(driver.cuMemsetD8Async(memory, 0, size, stream), "cuMemsetD8Async")
