"""A fake CUDA: a driver whose devices are numbers and whose memory is the host's, and arrays at invented addresses."""
from __future__ import annotations

import contextlib
import gc
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fastattn.arrays import device_array, dlpack, streams
from fastattn.arrays.view import ITEMSIZE, contiguous


class Driver:
    """The functions of cuda.bindings.driver that fastattn uses: devices are numbers,
    memory is the host's, and stream calls go into a log."""

    CUevent_flags = types.SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUpointer_attribute = types.SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.contexts = [0]                                 # devices of the thread's context stack
        self.capturing: set[int] = set()
        self.memory: dict[int, Any] = {}
        self.devices: dict[int, int] = {}                   # of pointers
        self.fails = ""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name == self.fails:
                return types.SimpleNamespace(name="CUDA_ERROR_INVALID_HANDLE"), None
            self.log.append((name.removeprefix("cu"), *arguments))
            return 0, 77
        return call

    def cuGetErrorString(self, code: Any) -> tuple[int, bytes]:
        return 0, b"invalid resource handle"

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, 1000 + self.contexts[-1] if self.contexts else 0

    def cuCtxGetDevice(self) -> tuple[int, int]:
        return (0, self.contexts[-1]) if self.contexts else (201, 0)

    def cuDeviceGet(self, n: int) -> tuple[int, int]:
        return 0, n

    def cuDevicePrimaryCtxRetain(self, n: int) -> tuple[int, int]:
        return 0, 1000 + n

    def cuCtxPushCurrent(self, context: int) -> tuple[int]:
        self.contexts.append(context - 1000)
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, int]:
        return 0, self.contexts.pop()

    def cuStreamIsCapturing(self, stream: int) -> tuple[int, int]:
        return 0, int(stream in self.capturing)

    def cuPointerGetAttribute(self, attribute: int, pointer: int) -> tuple[Any, int]:
        if pointer not in self.devices:
            return types.SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE"), 0
        return 0, self.devices[pointer]

    def cuMemAllocAsync(self, size: int, stream: int) -> tuple[int, int]:
        array = np.zeros(size, np.uint8)
        self.memory[array.ctypes.data] = array
        self.log.append(("alloc", self.contexts[-1], size, stream))
        return 0, array.ctypes.data

    def cuMemFreeAsync(self, pointer: int, stream: int) -> tuple[int]:
        del self.memory[pointer]
        self.log.append(("free", self.contexts[-1], stream))
        return (0,)


@contextlib.contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Inside the context the package uses a new Driver."""
    fake = Driver()
    streams._primary_context.cache_clear()
    device_array._parked.clear()
    monkeypatch.setattr(streams, "driver", lambda: fake)
    monkeypatch.setattr(streams, "ordinal_of", lambda pointer: fake.devices[pointer])
    yield fake
    gc.collect()
    streams._primary_context.cache_clear()


class Cuda:
    """An array known only by its __cuda_array_interface__; `ptr` is an invented address."""

    def __init__(self, driver: Driver, shape: tuple[int, ...], ptr: int = 0x1000, stream: int | None = None, device: int = 0,
                 typestr: str = "<f4", strides: tuple[int, ...] | None = None) -> None:
        driver.devices[ptr] = device
        self.__cuda_array_interface__ = {"shape": shape, "typestr": typestr, "data": (ptr, False), "version": 3, "strides": strides,
                                         "stream": stream}


class Speaker:
    """A DLPack producer of CUDA memory at an invented address; records the stream it is given."""

    def __init__(self, shape: tuple[int, ...], ptr: int = 0x1000, dtype: str = "float32", device: int = 0, old: bool = False) -> None:
        self.shape, self.ptr, self.dtype, self.device, self.old, self.streams = shape, ptr, dtype, device, old, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: Any = "none", max_version: Any = None) -> Any:
        self.streams.append(stream)
        strides = contiguous(self.shape, ITEMSIZE[self.dtype])
        return dlpack.capsule(self, self.ptr, self.shape, strides, self.dtype, self.device, None if self.old else max_version)


def waits(driver: Driver) -> list[tuple[int, int]]:
    """(waiting stream, producer) of each wait in the log, whose four calls are checked."""
    names = [entry[0] for entry in driver.log]
    waits = []
    for i, name in enumerate(names):
        if name == "EventCreate":
            assert names[i:i + 4] == ["EventCreate", "EventRecord", "StreamWaitEvent", "EventDestroy"]
            waits.append((driver.log[i + 2][1], driver.log[i + 1][2]))
    return waits


class Recorder:
    """An engine for CUDA memory that records its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def supports(self, problem: Any) -> str | None:
        return None

    def forward(self, problem: Any, operands: Any, out: Any, lse: Any, stream: int) -> None:
        self.calls.append((problem, operands, out, lse, stream))

    def backward(self, problem: Any, operands: Any, dout: Any, out: Any, lse: Any, dlse: Any, grads: Any, stream: int,
                 deterministic: bool) -> None:
        self.calls.append((problem, grads, stream, deterministic))
