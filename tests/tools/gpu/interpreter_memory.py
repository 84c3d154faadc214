"""The memory of interpreter.py, which says what a GPU would not: accesses outside the arrays or not aligned."""
from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np

from fastattn.arrays.view import View
from fastattn.gpu.precompile import HERE

Array = np.ndarray[Any, Any]
BASE, ROOM, GAP = 1 << 40, 1 << 28, 4096        # addresses begin at BASE; arrays are GAP bytes apart


class Memory:
    """Global memory. `valid` has a flag for each byte that may be touched; all others, and what was never written, are NaN."""

    def __init__(self) -> None:
        self.bytes, self.valid, self.end = np.empty(ROOM, np.uint8), np.zeros(ROOM, bool), GAP

    def take(self, size: int, offset: int = 0) -> int:
        """Address of `size` new bytes, `offset` bytes behind a multiple of 256."""
        at = -(-self.end // 256) * 256 + offset
        self.end = at + size + GAP
        assert self.end <= ROOM, "the memory is full"
        self.valid[at:at + size], self.bytes[at - GAP:at + size + GAP] = True, 0xFF
        return BASE + at

    def place(self, x: Array, view: View) -> View:
        """A copy of an array of which `view` is the canonical View. What is between its elements may not be touched."""
        low, high = view.bytes_range()
        at = self.take(high - low, low % 256)
        self.valid[at - BASE:at - BASE + high - low] = False
        elements = self.valid[at - BASE + view.ptr - low:]
        np.lib.stride_tricks.as_strided(elements, (*view.shape, view.itemsize), (*view.strides, 1))[...] = True
        self.bytes[at - BASE:at - BASE + high - low] = np.frombuffer(ctypes.string_at(low, high - low), np.uint8)
        return replace(view, ptr=at + view.ptr - low, device=HERE)

    def read(self, view: View, dtype: Any) -> Array:
        """The elements of a View."""
        raw, kind = self.bytes[view.ptr - BASE:], np.dtype(dtype)
        elements = raw[:raw.size // 8 * 8].view(f"u{kind.itemsize}")
        return np.lib.stride_tricks.as_strided(elements, view.shape, view.strides).copy().view(kind)

    def words(self, address: Array, size: int) -> Array:
        """Indices of the elements of `size` bytes at these addresses."""
        offset = address.astype(np.int64) - BASE
        assert not (offset % size).any(), f"misaligned access of {size} bytes"
        inside = (offset >= 0) & (offset + size <= ROOM)
        assert inside.all(), "access outside the arrays"
        flags = self.valid.view(f"u{size}")[offset // size]         # a byte each
        assert (flags == int.from_bytes(bytes([True] * size), "little")).all(), "access outside the arrays"
        return offset // size


class Shared:
    """Shared memory of all blocks."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = -(-size // 16) * 16 + 16
        self.bytes = np.full(blocks * self.size, 0xFF, np.uint8)
        self.limit = size

    def words(self, address: Array, size: int, blocks: Array) -> Array:
        at = address.astype(np.int64)
        assert not (at % size).any(), f"misaligned access of {size} bytes to shared memory"
        assert ((at >= 0) & (at + size <= self.limit)).all(), f"shared memory has {self.limit} bytes"
        return (blocks * self.size + at) // size
