"""What a launch needs besides its call: loaded kernels, temporary memory, counters and tensor maps.

A family's launch.py gets all of that from a Launcher. There are three: `OnDevice` launches, `Listing` only notes which
kernels a call would launch, for `explain` and `precompile`; it needs no device and no driver. recording.Recorder notes
launches that will be repeated.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

from ...arrays.device_array import DeviceArray
from ...arrays.streams import Stream
from ...arrays.view import View
from ..spec import AnyCall, Arguments
from . import compile as compiler
from . import device as devices
from . import tensormap, workspace
from .compile import Source
from .device import Device

PROGRAMS = 1024         # programs remembered of each kernel
_marks = itertools.count(1)


class LoadedKernel(Protocol):
    """A kernel that can be launched."""

    def launch(self, grid: int, values: list[Any], stream: int) -> None:
        """Enqueue `grid` thread blocks with the values of the kernel's fields, in order."""


class Launcher(Protocol):
    """Where a family's kernels are launched, and what they need there. `captured`: the stream is being captured into a
    graph."""

    @property
    def device(self) -> Device:
        """The device of the launches."""

    def load(self, source: Source) -> LoadedKernel:
        """The kernel, compiled and loaded on first use."""

    def temporary(self, size: int, stream: int) -> AbstractContextManager[int]:
        """Address of `size` bytes, possibly none, for work enqueued on `stream` inside the `with`."""

    def lasting(self, size: int, stream: int) -> Any:
        """A device array of `size` bytes, a multiple of 4, that lives as long as the object; None where nothing outlives a call."""

    def clear(self, memory: int, size: int, stream: int) -> None:
        """Enqueue writing `size` zero bytes."""

    def capturing(self, stream: int) -> bool:
        """Whether the stream is being captured into a graph."""

    def tensor_maps(self, boxes: tuple[tuple[View, tensormap.Box], ...], captured: bool,
                    forms: tuple[int, ...] | None = None) -> list[int]:
        """Addresses of the TMA descriptors of views, for boxes of so many rows. `forms`: the boxes' tensormap.form, if
        known."""

    def row_map(self, address: int, count: int, apart: int, rows: int, captured: bool) -> int:
        """Address of the TMA descriptor of two rows of `count` float32, `apart` bytes from each other, for boxes of
        `rows` numbers."""

    def counter(self, captured: bool) -> int:
        """Address of two int32 zeros for one launch, which must leave them zero."""

    def arrivals(self, captured: bool) -> int:
        """Address of workspace.MOST_ARRIVALS int32 zeros for one launch, which must leave them zero."""

    def mark(self) -> int:
        """A positive int32 that no call before had, but for 2**31 calls ago."""


class OnDevice:
    """The Launcher of a real device. The device's context must be current when its methods are called, but for
    `load`."""

    capturing = staticmethod(devices.capturing)
    clear = staticmethod(workspace.clear)
    tensor_maps = staticmethod(tensormap.tensor_maps)

    def __init__(self, d: Device) -> None:
        self.device = d

    def load(self, source: Source) -> LoadedKernel:
        return compiler.load(source, self.device.ordinal)

    def temporary(self, size: int, stream: int) -> AbstractContextManager[int]:
        return workspace.temporary(size, self.device.ordinal, stream)

    def lasting(self, size: int, stream: int) -> Any:
        return DeviceArray((size // 4,), "int32", Stream(stream, self.device.ordinal))

    def row_map(self, address: int, count: int, apart: int, rows: int, captured: bool) -> int:
        return tensormap.row_map(address, count, apart, rows, self.device.ordinal, captured)

    def counter(self, captured: bool) -> int:
        return self._memory.counters.take(captured)

    def arrivals(self, captured: bool) -> int:
        return self._memory.arrivals.take(captured)

    def mark(self) -> int:
        return next(_marks) & 0x7FFFFFFF

    @cached_property
    def _memory(self) -> workspace.SmallMemory:
        return workspace.small_memory(self.device.ordinal)


@cache
def on_device(ordinal: int) -> OnDevice:
    """The launcher of CUDA device `ordinal`."""
    return OnDevice(devices.device(ordinal))


class Listing:
    """A Launcher that launches nothing: `sources` has every kernel that was loaded, in order. Addresses are 0."""

    def __init__(self, d: Device) -> None:
        self.device = d
        self.sources: list[Source] = []

    def load(self, source: Source) -> LoadedKernel:
        self.sources.append(source)
        return _Unlaunched()

    def temporary(self, size: int, stream: int) -> AbstractContextManager[int]:
        return nullcontext(0)

    def lasting(self, size: int, stream: int) -> Any:
        return None

    def clear(self, memory: int, size: int, stream: int) -> None:
        pass

    def capturing(self, stream: int) -> bool:
        return False

    def tensor_maps(self, boxes: tuple[tuple[View, tensormap.Box], ...], captured: bool,
                    forms: tuple[int, ...] | None = None) -> list[int]:
        return [0] * len(boxes)

    def row_map(self, address: int, count: int, apart: int, rows: int, captured: bool) -> int:
        return 0

    def counter(self, captured: bool) -> int:
        return 0

    def arrivals(self, captured: bool) -> int:
        return 0

    def mark(self) -> int:
        return 0


class _Unlaunched:
    def launch(self, grid: int, values: list[Any], stream: int) -> None:
        pass


class Program(NamedTuple):
    """A kernel as its launch needs it: how it is compiled, and what it is called with."""

    source: Source
    arguments: Arguments

    def launch(self, launcher: Launcher, grid: int, call: AnyCall, own: tuple[Any, ...], stream: int) -> None:
        """Enqueue it for a call. `own`: values of the kernel's own fields, which come first."""
        launcher.load(self.source).launch(grid, self.arguments.values(call, own), stream)


def program(key: str, make: Callable[[], tuple[Any, int]], arguments: Arguments, threads: int,
            blocks_per_sm: int = 1, early: bool = False, cluster: int = 1) -> Program:
    """The Program of a Source with these fields, see there."""
    return Program(Source(key, make, arguments.fields, threads, blocks_per_sm, early, cluster), arguments)
