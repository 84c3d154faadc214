"""NaN in all memory that the next call may be given, so that elements left
unwritten or read before they were written become NaN.

Every byte of the free memory of torch's allocator, CuPy's pool, the driver's default pool (DeviceArray) and the engine's own pool (its
temporary memory) becomes 0xFF, which is NaN in every float and an impossible number in every table.
"""
from __future__ import annotations

import sys
from functools import cache
from typing import Any

from fastattn.arrays import streams
from fastattn.gpu.runtime import workspace

ROOM = 64 << 20            # bytes of poison that a pool has at least; what the cases need fits
BYTE = 0xFF


def poison(ordinal: int = 0) -> None:
    """Poison every pool of a device. Waits for the device first: nothing that still runs loses its memory."""
    driver = streams.driver()
    with streams.on_device(ordinal):
        _synchronize()
        for pool in (_default_pool(ordinal), workspace.small_memory(ordinal).pool):
            streams.check(driver.cuMemPoolTrimTo(pool, 0), "cuMemPoolTrimTo")       # no block of it survives beside the poisoned one
            memory = streams.check(driver.cuMemAllocFromPoolAsync(ROOM, pool, streams.LEGACY), "cuMemAllocFromPoolAsync")
            streams.check(driver.cuMemsetD8Async(memory, BYTE, ROOM, streams.LEGACY), "cuMemsetD8Async")
            streams.check(driver.cuMemFreeAsync(memory, streams.LEGACY), "cuMemFreeAsync")
        for name, fill in (("torch", _poison_torch), ("cupy", _poison_cupy)):
            if name in sys.modules:         # a test that uses a library has imported it
                fill(sys.modules[name])
        _synchronize()


def _synchronize() -> None:
    streams.check(streams.driver().cuCtxSynchronize(), "cuCtxSynchronize")


@cache
def _default_pool(ordinal: int) -> Any:
    """The driver's default pool, made to keep its memory when the program synchronises: what goes back to the driver loses the poison."""
    driver = streams.driver()
    pool = streams.check(driver.cuDeviceGetDefaultMemPool(ordinal), "cuDeviceGetDefaultMemPool")
    kept = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    streams.check(driver.cuMemPoolSetAttribute(pool, kept, driver.cuuint64_t(1 << 62)), "cuMemPoolSetAttribute")
    return pool


def _poison_torch(torch: Any) -> None:
    """Every free block of the caching allocator, in place. Blocks of a graph's own pool are left alone: its replays use them."""
    if not torch.cuda.is_available():
        return
    room = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (ROOM, *[1 << 19] * 16)]      # of large and of small blocks
    del room
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] != torch.cuda.current_device() or tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                streams.check(streams.driver().cuMemsetD8(address, BYTE, block["size"]), "cuMemsetD8")
            address += block["size"]


def _poison_cupy(cupy: Any) -> None:
    cupy.get_default_memory_pool().free_all_blocks()
    memory = cupy.cuda.alloc(ROOM)
    memory.memset(BYTE, ROOM)
