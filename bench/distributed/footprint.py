"""How much memory of its device a rank has had: arrays, results, buffers and the kernels' temporary memory."""
from __future__ import annotations

from typing import Any

from fastattn.arrays.streams import check, driver, on_device


class Footprint:
    """From when it is made. Host memory is not counted."""

    def __init__(self, stream: Any) -> None:
        self._pools = list[Any]()
        if stream is None:
            return
        from fastattn.distributed.device import free_blocks, pool
        from fastattn.gpu.runtime.workspace import small_memory

        self._device, d = stream.device, driver()
        with on_device(self._device):
            free_blocks(self._device).clear()
            default = check(d.cuDeviceGetDefaultMemPool(check(d.cuDeviceGet(self._device), "cuDeviceGet")), "cuDeviceGetDefaultMemPool")
            self._pools = [pool(self._device), default, small_memory(self._device).pool]
            check(d.cuCtxSynchronize(), "cuCtxSynchronize")
            for one in self._pools:
                check(d.cuMemPoolSetAttribute(one, self._most, d.cuuint64_t(0)), "cuMemPoolSetAttribute")

    @property
    def _most(self) -> Any:
        return driver().CUmemPool_attribute.CU_MEMPOOL_ATTR_USED_MEM_HIGH

    @property
    def gib(self) -> float:
        """The most that each pool has had in use."""
        if not self._pools:
            return 0.0
        with on_device(self._device):
            return sum(int(check(driver().cuMemPoolGetAttribute(one, self._most), "cuMemPoolGetAttribute")) for one in self._pools) / 2**30
