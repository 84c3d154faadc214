"""The CUDA devices: what a device is, which is current, streams of our own."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from cuda.bindings import driver

from ...arrays.streams import check


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU: its ordinal, architecture ("sm_90a"), multiprocessors and shared memory a block may ask for."""

    ordinal: int
    arch: str
    num_sms: int
    shared_memory: int
    name: str
    context: int


ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_120")


def arch_name(major: int, minor: int) -> str:
    """The target kernels are compiled for: sm_90a has wgmma; the others run code of their own architecture."""
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


@cache
def device(ordinal: int) -> Device:
    check(driver.cuInit(0), "cuInit")
    handle = check(driver.cuDeviceGet(ordinal), f"cuDeviceGet({ordinal})")
    kinds = driver.CUdevice_attribute

    def attribute(name: str) -> int:
        return int(check(driver.cuDeviceGetAttribute(getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), handle), name))
    context = check(driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain")
    name = check(driver.cuDeviceGetName(100, handle), "cuDeviceGetName").split(b"\0")[0].decode()
    return Device(ordinal, arch_name(attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")),
                  attribute("MULTIPROCESSOR_COUNT"), attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"), name, int(context))


class current:      # a context manager, and a class because a generator takes a microsecond
    """Makes a device's primary context current where it is not."""

    __slots__ = ("_context", "_pushed")

    def __init__(self, d: Device) -> None:
        self._context, self._pushed = d.context, False

    def __enter__(self) -> None:
        if int(check(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")) != self._context:
            check(driver.cuCtxPushCurrent(self._context), "cuCtxPushCurrent")
            self._pushed = True

    def __exit__(self, *_: object) -> None:
        if self._pushed:
            driver.cuCtxPopCurrent()


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Allocations and copies on streams of our own are allowed inside, also while the caller captures a graph on this thread."""
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check(driver.cuThreadExchangeStreamCaptureMode(mode), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def private_stream() -> int:
    """A stream for work of our own that waits for nobody."""
    return int(check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate"))


def capturing(stream: int) -> bool:
    """Whether the stream is being captured into a graph."""
    return int(check(driver.cuStreamIsCapturing(stream), "cuStreamIsCapturing")) != 0
