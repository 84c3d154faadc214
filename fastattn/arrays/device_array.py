"""`DeviceArray`: CUDA memory of our own, for callers whose library allocates none, and what JAX's results are made
from.
"""
from __future__ import annotations

import contextlib
import math
from typing import Any

from ..errors import UnsupportedError
from . import dlpack, streams
from .streams import LEGACY, Stream
from .view import ITEMSIZE, Shape, View, contiguous

# Freed during stream capture, when cuMemFreeAsync would be recorded in the graph. Really freed by the next allocation.
_parked: list[tuple[int, Stream]] = []


def _free(ptr: int, stream: Stream) -> None:
    with streams.on_device(stream.device):
        if streams.capturing(stream.handle):
            _parked.append((ptr, stream))
        else:
            streams.driver().cuMemFreeAsync(ptr, stream.handle)


class _Memory:
    """Stream-ordered memory from the device's default pool.

    The last reference returns it to the pool, in stream order.
    """

    __slots__ = ("ptr", "stream")

    def __init__(self, size: int, stream: Stream) -> None:
        self.ptr, self.stream = 0, stream
        for _ in range(len(_parked)):
            _free(*_parked.pop(0))
        with streams.on_device(stream.device):
            if streams.capturing(stream.handle):
                raise UnsupportedError(f"stream {stream.handle:#x} is being captured into a CUDA graph, where results need memory that is "
                                       "there before; pass out=, or arrays of torch or CuPy, which have pools for graphs.")
            d = streams.driver()
            self.ptr = int(streams.check(d.cuMemAllocAsync(max(size, 1), stream.handle), f"cuMemAllocAsync of {size} bytes"))

    def __del__(self) -> None:
        if self.ptr:
            with contextlib.suppress(Exception):            # Python or the driver may be going away, and the memory with them
                _free(self.ptr, self.stream)


class DeviceArray:
    """A contiguous array in CUDA memory, made on `stream`; `torch.from_dlpack(x)`, `cupy.from_dlpack(x)` and the like
    take it.

    It speaks DLPack, every dtype, and the CUDA Array Interface, bfloat16 excepted; both order a consumer after its
    stream. Nothing is computed with it, and no element is read on the host.
    """

    def __init__(self, shape: Shape, dtype: str, stream: Stream) -> None:
        self.shape, self.dtype, self.stream = shape, dtype, stream
        self.strides = contiguous(shape, ITEMSIZE[dtype])   # in bytes, as NumPy's
        self._memory = _Memory(self.nbytes, stream)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEMSIZE[self.dtype]

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype!r}, device={self.stream.device})"

    def view(self) -> View:
        return View(self._memory.ptr, self.shape, self.strides, self.dtype, ("cuda", self.stream.device), self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.view().__cuda_array_interface__, "strides": None, "stream": self.stream.handle}

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.stream.device

    def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None,
                   dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> Any:
        """A capsule; `stream`, the consumer's (None: the legacy default, -1: it orders itself), waits for the array's
        own.
        """
        if copy or (dl_device is not None and tuple(map(int, dl_device)) != self.__dlpack_device__()):
            raise BufferError(f"{self!r} is exported as it is: without a copy, on its own device")
        if stream == 0:
            raise ValueError("stream 0 is ambiguous in DLPack: 1 is the legacy default stream, 2 the per-thread one")
        if stream != -1:
            consumer = Stream(LEGACY if stream is None else stream, self.stream.device)
            streams.wait(consumer, self.stream.handle)
        return dlpack.capsule(self, self._memory.ptr, self.shape, self.strides, self.dtype, self.stream.device, max_version)
