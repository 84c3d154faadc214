"""CUDA devices: what a device is, which context is current, private streams."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from cuda.bindings import driver

from ...arrays.streams import check
from .arch import arch_of_number


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU: ordinal, name of its Arch ("sm_90a"), number of multiprocessors, bytes of shared memory a thread block
    may use, name of the product, and the address of its primary context."""

    ordinal: int
    arch: str
    num_sms: int
    shared_memory: int
    name: str
    context: int


@cache
def device(ordinal: int) -> Device:
    """The CUDA device `ordinal`; its primary context is kept."""
    check(driver.cuInit(0), "cuInit")
    handle = check(driver.cuDeviceGet(ordinal), f"cuDeviceGet({ordinal})")
    kinds = driver.CUdevice_attribute

    def attribute(name: str) -> int:
        return int(check(driver.cuDeviceGetAttribute(getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), handle), name))
    context = check(driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain")
    name = check(driver.cuDeviceGetName(100, handle), "cuDeviceGetName").split(b"\0")[0].decode()
    arch = arch_of_number(10 * attribute("COMPUTE_CAPABILITY_MAJOR") + attribute("COMPUTE_CAPABILITY_MINOR"))
    return Device(ordinal, arch.name, attribute("MULTIPROCESSOR_COUNT"), attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"), name, int(context))


def is_current(d: Device) -> bool:
    """Whether the device's primary context is current."""
    code, context = driver.cuCtxGetCurrent()
    if code:
        check((code,), "cuCtxGetCurrent")
    return int(context) == d.context


class current:      # a context manager, and a class because a generator costs a microsecond
    """Make a device's primary context current inside the `with`."""

    __slots__ = ("_device", "_pushed")

    def __init__(self, d: Device) -> None:
        self._device, self._pushed = d, False

    def __enter__(self) -> None:
        if not is_current(self._device):
            check(driver.cuCtxPushCurrent(self._device.context), "cuCtxPushCurrent")
            self._pushed = True

    def __exit__(self, *_: object) -> None:
        if self._pushed:
            driver.cuCtxPopCurrent()


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Allow allocations and copies on private streams inside, even while this thread captures a graph."""
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check(driver.cuThreadExchangeStreamCaptureMode(mode), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def private_stream() -> int:
    """A private non-blocking stream."""
    return int(check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate"))


def read_back(address: int, size: int, stream: int) -> Any:
    """Bytes of device memory, as an array. Waits for the stream's work."""
    made = np.zeros(max(size, 1), np.uint8)
    if size:
        check(driver.cuMemcpyDtoHAsync(made.ctypes.data, address, size, stream), "cuMemcpyDtoHAsync")
    check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize")
    return made


def capturing(stream: int) -> bool:
    """Whether the stream is being captured into a graph."""
    return int(check(driver.cuStreamIsCapturing(stream), "cuStreamIsCapturing")) != 0
