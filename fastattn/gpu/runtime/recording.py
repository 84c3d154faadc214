"""A call's launches, recorded once and repeated at other addresses.

A family's launch.py says what a call launches. `Recorder` is a Launcher that only notes it: each value is a number that
stays, an `Address`, which is counted from an array of the call, or a `Word`, which is new in each call. A `Recording`
launches the same for any call that differs in addresses only, of the same alignment.

Whatever is not the same in each call is packed into one block of words. The driver takes a pointer to each argument of a
kernel. So arguments that stay are packed once, and the others are words of the block.
"""
from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from ...arrays.view import View
from . import tensormap, workspace
from .compile import Kernel, Source
from .device import capturing, current, is_current
from .launcher import LoadedKernel, OnDevice

ALIGNMENT = 256         # of each piece of temporary memory
WORD = 8                # bytes; a 32-bit argument is the lower half of its word


class Address(int):
    """An address of the recorded call, as a number. In a repeated call it is `offset` bytes after address number `base`."""

    base: int
    offset: int

    def __new__(cls, value: int, base: int, offset: int = 0) -> Address:
        made = super().__new__(cls, value)
        made.base, made.offset = base, offset
        return made

    def __add__(self, n: int) -> Address:
        return Address(int(self) + n, self.base, self.offset + n)

    __radd__ = __add__

    def __sub__(self, n: int) -> int:
        """The address n bytes before, or the distance from another address in the same memory."""
        if not isinstance(n, Address):
            return self + -n
        assert n.base == self.base, "the distance of two arrays differs from call to call"
        return self.offset - n.offset


class Word(int):
    """A value that is looked up again in each call: number `number` of the Recorder's `maps`, or else of its `finds`."""

    is_map: bool
    number: int

    def __new__(cls, is_map: bool, number: int) -> Word:
        made = super().__new__(cls, 0)
        made.is_map, made.number = is_map, number
        return made


def addressed(views: Sequence[View | None]) -> list[View | None]:
    """The views with Addresses, numbered without the absent ones. They do not keep the caller's memory."""
    numbers = iter(range(len(views)))
    return [x and View(Address(x.ptr, next(numbers)), x.shape, x.strides, x.dtype, x.device) for x in views]


class Launched(NamedTuple):
    """A launch, with the values of the kernel's fields. Without a kernel: `grid` zero bytes, written at the only value."""

    kernel: Kernel | None
    grid: int
    values: list[Any]


# ---------------------------------------------------------------- recording
class Recorder:
    """A Launcher that notes what a call launches. `arrays`: how many arrays the call has, and so the number of its temporary
    memory."""

    def __init__(self, launcher: OnDevice, arrays: int) -> None:
        self.launcher, self.device, self.arrays = launcher, launcher.device, arrays
        self.size = 0                                       # bytes of temporary memory
        self.launched: list[Launched] = []
        self.maps: list[tensormap.Wanted] = []
        self.finds: list[Callable[[bool], int]] = []        # of whether the stream is being captured

    def load(self, source: Source) -> LoadedKernel:
        return _Noted(self.launched, source, self.launcher.load(source))

    def temporary(self, size: int, stream: int) -> AbstractContextManager[int]:
        """All temporary memory of a call is one allocation. Where arrays are empty, so may be a piece of it: that has an address, too."""
        offset, self.size = self.size, self.size + max(-(-size // ALIGNMENT), 1) * ALIGNMENT
        return nullcontext(Address(ALIGNMENT + offset, self.arrays, offset))

    def lasting(self, size: int, stream: int) -> Any:
        return None

    def clear(self, memory: int, size: int, stream: int) -> None:
        self.launched.append(Launched(None, size, [memory]))

    def capturing(self, stream: int) -> bool:
        return False                                        # what depends on it is found in each call

    def tensor_maps(self, boxes: tuple[tuple[View, tensormap.Box], ...], captured: bool,
                    forms: tuple[int, ...] | None = None) -> list[int]:
        return [self._map(tensormap.wanted(x, rows)) for x, rows in boxes]

    def row_map(self, address: int, count: int, apart: int, rows: int, captured: bool) -> int:
        return self._map(tensormap.wanted_rows(address, count, apart, rows))

    def counter(self, captured: bool) -> int:
        return self._found(self.launcher.counter)

    def arrivals(self, captured: bool) -> int:
        return self._found(self.launcher.arrivals)

    def mark(self) -> int:
        return self._found(lambda captured: self.launcher.mark())

    def _map(self, wanted: tensormap.Wanted) -> Word:
        self.maps.append(wanted)
        return Word(True, len(self.maps) - 1)

    def _found(self, find: Callable[[bool], int]) -> Word:
        self.finds.append(find)
        return Word(False, len(self.finds) - 1)


class _Noted:
    """A kernel whose launches are noted."""

    def __init__(self, launched: list[Launched], source: Source, kernel: Any) -> None:
        self._launched, self._source, self._kernel = launched, source, kernel

    def launch(self, grid: int, values: list[Any], stream: int) -> None:
        for (name, letter), x in zip(self._source.fields, values, strict=True):
            if isinstance(x, Address) if letter != "l" else x != 0 and not isinstance(x, (Address, Word)):
                raise RuntimeError(f"{self._source.key}: {name}, of type {letter!r}, is {x!r}: an address that every call would get")
        if grid:
            self._launched.append(Launched(self._kernel, grid, list(values)))


# ---------------------------------------------------------------- repeating
class _Block:
    """The words of one call in flight, and the arguments of its launches, which point to them."""

    def __init__(self, launched: Sequence[Launched], number: dict[Any, int]) -> None:
        self.words = ctypes.create_string_buffer(WORD * max(len(number), 1))
        self.steps: list[tuple[Kernel | None, Any, int]] = []       # kernel, config, arguments; or None, bytes, number of the word
        self.stream = 0                                             # of the configs
        self._kept: list[Any] = []                                  # what arguments point to
        for kernel, size, values in launched:
            if kernel is None:
                self.steps.append((None, size, number[_word(values[0])]))
                continue
            constants = kernel.packed([0 if isinstance(x, (Address, Word)) else x for x in values])
            places = [ctypes.addressof(constants) + offset for offset in kernel.offsets]
            for n, x in enumerate(values):
                if isinstance(x, (Address, Word)):
                    places[n] = ctypes.addressof(self.words) + WORD * number[_word(x)]
            pointers = (ctypes.c_void_p * len(places))(*places)
            self._kept += [constants, pointers]
            self.steps.append((kernel, kernel.config(size), ctypes.addressof(pointers)))

    def on(self, stream: int) -> None:
        """Change the stream of the launches."""
        self.stream = stream
        for kernel, config, _ in self.steps:
            if kernel is not None:
                config.hStream = stream


def _word(x: Address | Word) -> tuple[str, int, int]:
    """Which word a value is: equal addresses share one."""
    return ("place", x.base, x.offset) if isinstance(x, Address) else ("map" if x.is_map else "find", x.number, 0)


class Recording:
    """What a Recorder noted: `recording(addresses, stream)` launches it.

    `addresses` are those of the call's arrays, as `addressed` numbered them. The words of a call are these, the address of its
    temporary memory if it has any, what is counted from one of them, and what is new in each call.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._device, self._size, self._launched = recorder.device, recorder.size, recorder.launched
        self._maps, self._finds = tuple(recorder.maps), tuple(recorder.finds)
        bases = [("place", n, 0) for n in range(recorder.arrays + (self._size > 0))]
        places = [_word(x) for launched in self._launched for x in launched.values if isinstance(x, Address)]
        inside = [place for place in dict.fromkeys(places) if place not in bases]
        self._inside = tuple([(base, offset) for _, base, offset in inside])
        words = [*bases, *inside, *[("map", n, 0) for n in range(len(self._maps))], *[("find", n, 0) for n in range(len(self._finds))]]
        self._number = {word: n for n, word in enumerate(words)}
        self._pack = struct.Struct(f"={len(words)}Q").pack_into
        self._free: list[_Block] = []                       # that no call uses: one for each call that ran at the same time

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        if not is_current(self._device):                    # it nearly always is
            with current(self._device):
                self(addresses, stream)
            return
        words, size, ordinal = addresses, self._size, self._device.ordinal
        memory: Any = workspace.allocate(size, ordinal, stream) if size else None
        try:
            if size:
                words = [*words, int(memory)]
            if self._inside:
                words = [*words, *[words[base] + offset for base, offset in self._inside]]
            if self._maps or self._finds:
                captured = capturing(stream)
                words = [*words, *tensormap.find(self._maps, words, ordinal, captured), *[find(captured) for find in self._finds]]
            try:
                block = self._free.pop()
            except IndexError:
                block = _Block(self._launched, self._number)
            self._pack(block.words, 0, *words)
            if block.stream != stream:
                block.on(stream)
            for kernel, what, place in block.steps:
                if kernel is None:
                    workspace.clear(words[place], what, stream)
                else:
                    kernel.enqueue(what, place)
            self._free.append(block)
        finally:
            if size:
                workspace.free(memory, stream)
