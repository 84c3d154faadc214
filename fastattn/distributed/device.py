"""CUDA memory of a call, and what orders transfers: events, and one stream for communication on each device.

Buffers come from a pool of their own, in the order of the call's stream. Memory that a transfer uses is kept until the call's stream has
waited for the transfer, so it is not used again before.
"""
from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..arrays.dlpack import address
from ..arrays.streams import Stream, check, driver, on_device
from ..arrays.view import ITEMSIZE, Device, Shape, View, contiguous, size_of
from ..engine import load


class Event:
    """All that is on a stream now."""

    def __init__(self, stream: Stream) -> None:
        self._driver, self._device = driver(), stream.device
        d, self._event = self._driver, None
        with on_device(stream.device):
            self._event = check(d.cuEventCreate(d.CUevent_flags.CU_EVENT_DISABLE_TIMING), "cuEventCreate")
            check(d.cuEventRecord(self._event, stream.handle), "cuEventRecord")

    def wait(self, stream: Stream) -> None:
        """What is put on `stream` from now on runs after it."""
        with on_device(stream.device):
            check(self._driver.cuStreamWaitEvent(stream.handle, self._event, 0), "cuStreamWaitEvent")

    @property
    def happened(self) -> bool:
        d = self._driver
        with on_device(self._device):
            return bool(d.cuEventQuery(self._event)[0] != d.CUresult.CUDA_ERROR_NOT_READY)

    def __del__(self) -> None:
        if self._event is not None:
            with contextlib.suppress(Exception), on_device(self._device):
                self._driver.cuEventDestroy(self._event)


@cache
def transfer_stream(device: int) -> Stream:
    """The stream of all transfers of a device, of the highest priority: their blocks go first when a kernel's blocks end."""
    d = driver()
    with on_device(device):
        _, highest = d.cuCtxGetStreamPriorityRange()[1:]
        made = check(d.cuStreamCreateWithPriority(d.CUstream_flags.CU_STREAM_NON_BLOCKING, highest), "cuStreamCreateWithPriority")
    return Stream(int(made), device, made)


@cache
def upload_stream(device: int) -> Stream:
    """The stream on which row numbers and lengths are made."""
    d = driver()
    with on_device(device):
        made = check(d.cuStreamCreate(d.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate")
    return Stream(int(made), device, made)


def copy_from(to: View, x: View, ready: Event, stream: Stream) -> Event:
    """Copy another rank's contiguous View, of this device or another, once it is filled. The call's stream waits for the copy; who gives x
    can wait for the Event.
    """
    transfers, d = transfer_stream(stream.device), driver()
    Event(stream).wait(transfers)       # until then `to` may be in use
    ready.wait(transfers)
    with on_device(stream.device):
        check(d.cuMemcpyAsync(to.ptr, x.ptr, size_of(x), transfers.handle), "cuMemcpyAsync")
    done = Event(transfers)
    done.wait(stream)
    return done


@cache
def pool(device: int) -> Any:
    """The device's pool of buffers. It keeps what is free, up to a quarter of the device's memory, because to map it again takes
    milliseconds.
    """
    d = driver()
    properties = d.CUmemPoolProps()
    properties.allocType = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    made = check(d.cuMemPoolCreate(properties), "cuMemPoolCreate")
    kept = d.cuuint64_t(check(d.cuDeviceTotalMem(check(d.cuDeviceGet(device), "cuDeviceGet")), "cuDeviceTotalMem") // 4)
    check(d.cuMemPoolSetAttribute(made, d.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, kept), "cuMemPoolSetAttribute")
    return made


class Buffer:
    """Memory for work on a stream. The last reference returns it to the pool, in the stream's order."""

    __slots__ = ("ptr", "stream")

    def __init__(self, size: int, stream: Stream) -> None:
        self.ptr, self.stream = 0, stream
        with on_device(stream.device):
            memory = driver().cuMemAllocFromPoolAsync(max(size, 1), pool(stream.device), stream.handle)
            self.ptr = int(check(memory, f"cuMemAllocFromPoolAsync of {size} bytes"))

    def __del__(self) -> None:
        if self.ptr:
            # Python or the driver may be going away, and the memory with them
            with contextlib.suppress(Exception), on_device(self.stream.device):
                driver().cuMemFreeAsync(self.ptr, self.stream.handle)


@dataclass(frozen=True, slots=True)
class Cuda:
    """The memory of the device of the call's stream."""

    stream: Stream

    @property
    def device(self) -> Device:
        return "cuda", self.stream.device

    @property
    def handle(self) -> int:
        return self.stream.handle

    def empty(self, shape: Shape, dtype: str) -> View:
        buffer = Buffer(math.prod(shape) * ITEMSIZE[dtype], self.stream)
        return View(buffer.ptr, shape, contiguous(shape, ITEMSIZE[dtype]), dtype, self.device, buffer)

    def zero(self, to: View) -> None:
        if 0 not in to.shape:
            with on_device(self.stream.device):
                check(driver().cuMemsetD8Async(to.ptr, 0, size_of(to), self.handle), "cuMemsetD8Async")

    def copy(self, to: View, x: View) -> None:
        load("gpu", "distributed").accumulate(to, x, False, self.handle)

    def add(self, to: View, x: View) -> None:
        load("gpu", "distributed").accumulate(to, x, True, self.handle)

    def numbers(self, numbers: Any) -> View:
        """On a stream of its own, which the host waits for: the numbers are there for every later call, on any stream."""
        own = upload_stream(self.stream.device)
        found = Cuda(own).upload(np.ascontiguousarray(numbers, np.int32).tobytes())
        with on_device(own.device):
            check(driver().cuStreamSynchronize(own.handle), "cuStreamSynchronize")
        return found

    def move(self, to: View, x: View, count: int, to_rows: View | None = None, x_rows: View | None = None, add: bool = False) -> None:
        numbers = [0 if rows is None else rows.ptr for rows in (x_rows, to_rows)]
        load("gpu", "distributed").accumulate_rows(to, x, count, *numbers, add, self.handle)

    def merge(self, out: View, lse: View, part: View, part_lse: View) -> None:
        load("gpu", "distributed").merge_states([out, part], [lse, part_lse], out, lse, self.handle)

    def upload(self, words: bytes) -> View:
        array, found = np.frombuffer(words, np.int32).copy(), self.empty((len(words) // 4,), "int32")
        with on_device(self.stream.device):
            # the driver has copied pageable memory when it returns
            check(driver().cuMemcpyHtoDAsync(found.ptr, address(array), array.nbytes, self.handle), "cuMemcpyHtoDAsync")
        return found

    def download(self, x: View) -> bytes:
        array = np.empty(size_of(x), np.uint8)
        with on_device(self.stream.device):
            check(driver().cuStreamSynchronize(self.handle), "cuStreamSynchronize")
            check(driver().cuMemcpyDtoH(address(array), x.ptr, array.nbytes), "cuMemcpyDtoH")
        return array.tobytes()
