"""CUDA memory of a call, and what orders transfers: events, and one stream for communication on each device.

Buffers come from a pool of their own, in the order of the call's stream, and are used again by the next calls on it. Memory that a transfer
uses is kept until the call's stream has waited for the transfer, so it is not used again before.
"""
from __future__ import annotations

import contextlib
import math
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..arrays.dlpack import address
from ..arrays.streams import CudaError, Stream, capturing, check, driver, on_device
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
    return _new_stream(device)


@cache
def release_stream(device: int) -> Stream:
    """The stream on which memory goes back to the pool."""
    return _new_stream(device)


def _new_stream(device: int) -> Stream:
    d = driver()
    with on_device(device):
        made = check(d.cuStreamCreate(d.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate")
    return Stream(int(made), device, made)


def relax() -> None:
    """Let this thread ask for events while another thread captures a graph, in any mode."""
    d = driver()
    check(d.cuThreadExchangeStreamCaptureMode(d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED), "cuThreadExchangeStreamCaptureMode")


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


# ---------------------------------------------------------------- buffers
KEPT = 8                # the share of a device's memory, one part in so many, that free buffers may have; as much again stays with the pool
CLASSES = 16            # sizes between a power of two and the next: a buffer is at most one part in so many too large


@cache
def pool(device: int) -> Any:
    """The device's pool of buffers. It keeps some of what is free, because to map it again takes milliseconds."""
    d = driver()
    properties = d.CUmemPoolProps()
    properties.allocType = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    made = check(d.cuMemPoolCreate(properties), "cuMemPoolCreate")
    kept = d.cuuint64_t(most_kept(device))
    check(d.cuMemPoolSetAttribute(made, d.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, kept), "cuMemPoolSetAttribute")
    return made


def most_kept(device: int) -> int:
    d = driver()
    return int(check(d.cuDeviceTotalMem(check(d.cuDeviceGet(device), "cuDeviceGet")), "cuDeviceTotalMem")) // KEPT


def rounded(size: int) -> int:
    """The size of the class: few different ones, so that a buffer of another length can often be used again."""
    unit = max(512, 1 << max(size.bit_length() - CLASSES.bit_length(), 0))
    return -(-max(size, 1) // unit) * unit


class Block:
    """Memory of the pool, for work on a stream. `free`: an event behind the last work of who had it."""

    __slots__ = ("free", "ptr", "size", "stream")

    def __init__(self, size: int, stream: Stream) -> None:
        self.size, self.stream = size, stream
        memory = driver().cuMemAllocFromPoolAsync(size, pool(stream.device), stream.handle)
        self.ptr: int = int(check(memory, f"cuMemAllocFromPoolAsync of {size} bytes"))
        self.free: Any = None

    def release(self) -> None:
        d = driver()
        if self.free is None:
            d.cuMemFreeAsync(self.ptr, self.stream.handle)
            return
        own = release_stream(self.stream.device)            # the block's may be gone by now
        d.cuStreamWaitEvent(own.handle, self.free, 0)
        d.cuMemFreeAsync(self.ptr, own.handle)
        d.cuEventDestroy(self.free)


class Free:
    """Blocks of a device that no buffer has, by stream and size. The pool, too, would keep them; but calls whose buffers have other sizes,
    as a backward's beside a forward's, make it map memory anew, which takes the host a millisecond.
    """

    def __init__(self, device: int) -> None:
        self.most, self.bytes = most_kept(device), 0
        self._blocks, self._lock = dict[tuple[int, int], list[Block]](), threading.RLock()     # by stream and size, last used last
        self._of_graphs = list[Block]()

    def take(self, size: int, stream: Stream) -> Block | None:
        """A block whose last work is done before what is put on the stream now."""
        with self._lock:
            key = stream.handle, size
            found = self._blocks.get(key)
            if found is None:
                return None
            block = found.pop()
            self.bytes -= block.size
            if not found:
                del self._blocks[key]
        check(driver().cuStreamWaitEvent(stream.handle, block.free, 0), "cuStreamWaitEvent")    # another stream may have its handle by now
        return block

    def give(self, block: Block) -> None:
        """Take back a block from its buffer. While its stream is captured, the graph may use it in each replay: nobody gets it again."""
        d = driver()
        if capturing(block.stream.handle):
            self._of_graphs.append(block)
            return
        if block.size > self.most:
            block.release()
            return
        if block.free is None:
            block.free = check(d.cuEventCreate(d.CUevent_flags.CU_EVENT_DISABLE_TIMING), "cuEventCreate")
        check(d.cuEventRecord(block.free, block.stream.handle), "cuEventRecord")
        with self._lock:
            key = block.stream.handle, block.size
            self._blocks[key] = [*self._blocks.pop(key, ()), block]
            self.bytes += block.size
            self._shrink(self.most)

    def clear(self) -> None:
        """Give all of it back to the pool."""
        with self._lock:
            self._shrink(0)

    def _shrink(self, most: int) -> None:
        while self.bytes > most:
            oldest = next(iter(self._blocks))
            for unused in self._blocks.pop(oldest):
                self.bytes -= unused.size
                unused.release()


@cache
def free_blocks(device: int) -> Free:
    return Free(device)


class Buffer:
    """Memory for work on a stream. The last reference gives it back, in the stream's order."""

    __slots__ = ("_block", "_captured", "ptr")

    def __init__(self, size: int, stream: Stream) -> None:
        self._block: Block | None = None
        size = rounded(size)
        with on_device(stream.device):
            self._captured = capturing(stream.handle)       # memory of a graph is the graph's own
            self._block = None if self._captured else free_blocks(stream.device).take(size, stream)
            if self._block is None:
                try:
                    self._block = Block(size, stream)
                except CudaError:           # what is kept may be what is missing
                    free_blocks(stream.device).clear()
                    self._block = Block(size, stream)
        self.ptr = self._block.ptr

    def __del__(self) -> None:
        block = self._block
        if block is not None:
            try:
                with on_device(block.stream.device):
                    if self._captured:
                        block.release()
                    else:
                        free_blocks(block.stream.device).give(block)
            except Exception:       # Python or the driver is going away, and the memory with them
                pass


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
