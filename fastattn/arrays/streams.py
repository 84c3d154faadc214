"""CUDA streams: which one a call uses, and how it waits for another. The host never waits.

A handle is the number that DLPack and the CUDA Array Interface share with the driver: 1 is the legacy default stream, 2
the per-thread default stream, anything else a CUstream. The NULL stream, 0, is 1 or 2 depending on how a library was
compiled. Here it becomes 1, which is its meaning in torch, CuPy, Numba and JAX.
"""
from __future__ import annotations

import ctypes
import importlib
import operator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

from ..errors import message

LEGACY, PER_THREAD = 1, 2
_EXPECTED = "a CUstream handle as an int, or a stream of cuda.core, torch, CuPy, Numba or anything with __cuda_stream__"


@dataclass(slots=True)
class Stream:
    """The stream of one call, and the number of its device. `owner` keeps a caller's stream object alive."""

    handle: int
    device: int
    owner: object = field(default=None, repr=False, compare=False)
    ordered_by: object = field(default=None, repr=False, compare=False)     # the library whose current stream this is, or waits for

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class Home(NamedTuple):
    """The device of q's CUDA memory, and the current stream of q's library. `ordered_by` names the library if all its
    arrays use that stream.
    """

    device: int
    stream: int
    ordered_by: object = None


class CudaError(RuntimeError):
    """A call of the CUDA driver failed."""


# ---------------------------------------------------------------- the driver
@cache
def driver() -> Any:
    """cuda.bindings.driver, initialised. ImportError or CudaError where it or the NVIDIA driver is missing."""
    try:
        module = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise ImportError(f"CUDA arrays need the package cuda-bindings ({error}): pip install 'fastattn[gpu]'.") from error
    try:
        result = module.cuInit(0)
    except RuntimeError as error:                           # no libcuda: cuda.bindings' own error is one
        raise CudaError(f"CUDA arrays need the NVIDIA driver, which cannot be loaded: {error}") from error
    if result[0]:
        raise CudaError(f"CUDA arrays need the NVIDIA driver, whose cuInit says {result[0].name}.")
    return module


def check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a cuda.bindings call, or CudaError with the driver's name and description of what went wrong."""
    code = result[0]
    if code:
        _, text = driver().cuGetErrorString(code)
        raise CudaError(f"{what} failed with {code.name}: {(text or b'no description').decode()}.")
    return result[1] if len(result) > 1 else None


@cache
def _primary_context(device: int) -> int:
    """The context that libraries built on the CUDA runtime use. Retained once, never released."""
    handle = check(driver().cuDeviceGet(device), f"cuDeviceGet({device})")
    return int(check(driver().cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain"))


class on_device:      # a context manager, and a class because a generator costs a microsecond
    """Inside, a context of `device` is current: the thread's own if it is on that device, else the primary one."""

    __slots__ = ("_device", "_pushed")

    def __init__(self, device: int) -> None:
        self._device, self._pushed = device, False

    def __enter__(self) -> None:
        d = driver()
        # asked only with a current context: without one cuCtxGetDevice fails, and debuggers report the failure
        if int(check(d.cuCtxGetCurrent(), "cuCtxGetCurrent")) and int(check(d.cuCtxGetDevice(), "cuCtxGetDevice")) == self._device:
            return
        check(d.cuCtxPushCurrent(_primary_context(self._device)), "cuCtxPushCurrent")
        self._pushed = True

    def __exit__(self, *_: object) -> None:
        if self._pushed:
            driver().cuCtxPopCurrent()


def device_of(pointer: int) -> int:
    """The number of the device that memory is on. CudaError for memory that CUDA does not know."""
    d = driver()
    attribute = d.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    found = int(check(d.cuPointerGetAttribute(attribute, pointer), f"cuPointerGetAttribute({pointer:#x})"))
    return found or ordinal_of(pointer)     # some cuda-bindings say 0 for every device: NVIDIA/cuda-python issue 2928


def ordinal_of(pointer: int) -> int:
    """What the driver itself says, without cuda-bindings, about memory that it knows."""
    found = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(ctypes.byref(found), _DEVICE_ORDINAL, ctypes.c_uint64(pointer))
    return found.value


_DEVICE_ORDINAL = 9         # of CUpointer_attribute


# ---------------------------------------------------------------- which stream
def normal(handle: int) -> int:
    """A library's handle as a number of this file: NULL becomes the legacy default stream."""
    return handle or LEGACY


def resolve(stream: Any, home: Home | None, call: str) -> Stream | None:
    """The stream of a call: the caller's `stream`, else the current one of q's library. None for host memory (home
    None).

    The caller's stream waits for the library's current one, which computes q's values and owns the memory of results.
    TypeError or ValueError for a `stream` that is no stream.
    """
    if home is None:
        if stream is not None:
            raise ValueError(message(call, "stream", f"is {stream!r}", "None, because q is in host memory"))
        return None
    if stream is None:
        return _current(home)
    found = Stream(_handle(stream, call), home.device, stream, home.ordered_by)
    if home.ordered_by is not None:
        wait(found, home.stream)
    return found


@lru_cache(1024)
def _current(home: Home) -> Stream:
    return Stream(home.stream, home.device, None, home.ordered_by)


def _handle(stream: Any, call: str) -> int:
    if not isinstance(stream, bool):
        protocol = getattr(stream, "__cuda_stream__", None)
        if protocol is not None:
            version, handle = protocol() if callable(protocol) else protocol
            if version != 0:
                raise TypeError(message(call, "stream", f"speaks __cuda_stream__ version {version}", "version 0"))
            return normal(int(handle))
        for name in ("cuda_stream", "ptr", "handle"):       # torch; CuPy; Numba, whose handle was a ctypes pointer once
            if hasattr(stream, name):
                handle = getattr(stream, name)
                return normal(int(getattr(handle, "value", handle) or 0))
        try:
            number = int(stream) if type(stream).__name__ in ("CUstream", "cudaStream_t") else operator.index(stream)
        except TypeError:
            pass
        else:
            if number < 0:
                raise ValueError(message(call, "stream", f"is {number}", "a CUstream handle, 0 or 1 for the legacy default stream"))
            return normal(number)
    raise TypeError(message(call, "stream", f"is {stream!r}", _EXPECTED))


# ---------------------------------------------------------------- order between streams
def capturing(handle: int) -> bool:
    """Whether work on a stream is recorded into a CUDA graph rather than run. The stream's device must be current."""
    code, status = driver().cuStreamIsCapturing(handle)
    return not code and int(status) != 0      # an error is harmless: this is the legacy stream while another is captured


def wait(stream: Stream, producer: int) -> None:
    """Work put on `stream` from now on starts after all work now on `producer`, another stream of the same device.

    A captured stream cannot wait for work outside the graph, and a replay would not either. So the arrays that a
    captured call reads must be ready, as everywhere in CUDA.
    """
    if producer == stream.handle:
        return
    d = driver()
    with on_device(stream.device):
        if capturing(stream.handle) and not capturing(producer):
            return
        event = check(d.cuEventCreate(d.CUevent_flags.CU_EVENT_DISABLE_TIMING), "cuEventCreate")
        try:
            check(d.cuEventRecord(event, producer), f"waiting for stream {producer:#x}: cuEventRecord")
            check(d.cuStreamWaitEvent(stream.handle, event, 0), f"making stream {stream.handle:#x} wait: cuStreamWaitEvent")
        finally:
            d.cuEventDestroy(event)
