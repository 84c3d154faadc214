"""Tensor maps, by which the bulk copy engine finds tiles (CUDA driver API, cuTensorMapEncodeTiled), kept on the device.

Axes are (head_dim, row, head, batch); a box is 64 elements (128 bytes, swizzled) by `rows`. Or they are (row, line) of float32 numbers, lse
and delta, whose boxes are `rows` of one line. What lies outside the tensor is read as 0 and not written. Maps live in device memory of our
own and are kept by (pointer, shape, strides, rows). A new one is copied there on a private stream that the host waits for, some 20 us
once: no order with the caller's streams is needed then, and a graph that is being captured does not contain the copy.
"""
from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from cuda.bindings import driver

from ...arrays.streams import check
from ...arrays.view import View
from .device import private_stream, relaxed

_CHUNK = 4096                  # maps that are allocated at a time, 128 bytes each
_MOST = 32768                  # of a device in one generation, more than the maps of all launches that can be pending
_DTYPES = {"float16": "FLOAT16", "bfloat16": "BFLOAT16"}
PANEL = 64                     # elements of a 128-byte row


def fits(x: View) -> str | None:
    """None, or why the copy engine cannot read this (batch, row, head, dim) or (row, head, dim) view in place."""
    if x.strides[-1] != x.itemsize and x.shape[-1] > 1:
        return "its last axis is not contiguous"
    if x.ptr % 16:
        return "its address is not a multiple of 16 bytes"
    if any(s % 16 or s <= 0 for s, n in zip(x.strides[:-1], x.shape[:-1], strict=True) if n > 1):
        return "its strides are not positive multiples of 16 bytes"
    if 0 in x.shape:
        return "it is empty"
    return None


class _Maps:
    """Of one device: addresses by key. What a captured graph uses is never given up. The others are of two generations: one found in the
    older moves to the newer, and when that is full the older one's memory is used again. Finding one is a look-up, without a lock.
    """

    def __init__(self) -> None:
        self.newer: dict[Any, int] = {}
        self.older: dict[Any, int] = {}
        self.captured: dict[Any, int] = {}
        self.free: list[int] = []
        self.stream, self.lock = private_stream(), threading.Lock()
        self.staging = int(check(driver.cuMemAllocHost(128), "cuMemAllocHost"))

    def add(self, key: Any, encode: Callable[[], int], captured: bool) -> int:
        """Device address of the map that `encode` makes on the host, from now on with the captured or the newer ones."""
        with self.lock:
            kept = self.captured if captured else self.newer
            address = kept.get(key)     # another thread's meanwhile
            if address is None and not captured:
                address = self.older.pop(key, None)
            if address is None:
                with relaxed():
                    address = self.place(encode())
            kept[key] = address
            if len(self.newer) >= _MOST:
                self.free += self.older.values()
                self.newer, self.older = {}, self.newer
            return address

    def place(self, encoded: int) -> int:
        """Device address of a copy of the map at host address `encoded`."""
        if not self.free:
            chunk = int(check(driver.cuMemAlloc(_CHUNK * 128), "cuMemAlloc"))
            self.free += range(chunk, chunk + _CHUNK * 128, 128)
        address = self.free.pop()
        ctypes.memmove(self.staging, encoded, 128)
        check(driver.cuMemcpyHtoDAsync(address, self.staging, 128, self.stream), "cuMemcpyHtoDAsync")
        check(driver.cuStreamSynchronize(self.stream), "cuStreamSynchronize")
        return address


_devices: dict[int, _Maps] = {}
_devices_lock = threading.Lock()


def _maps(ordinal: int) -> _Maps:
    found = _devices.get(ordinal)
    if found is None:
        with _devices_lock, relaxed():
            found = _devices.get(ordinal) or _devices.setdefault(ordinal, _Maps())
    return found


_numbers = itertools.count()


@lru_cache(_MOST)
def _number(*form: Any) -> int:
    return next(_numbers)


def form(x: View, rows: int) -> int:
    """A number for all of a box that is not its address: a key that is quick to look up."""
    return _number(x.shape, x.strides, x.dtype, rows)


def tensor_maps(boxes: tuple[tuple[View, int], ...], captured: bool, forms: tuple[int, ...] | None = None) -> list[int]:
    """Device addresses of the maps of views that `fit`, all on one device, for boxes of so many rows; `captured`: for work that is being
    captured into a graph. `forms` are those of the boxes, where the caller has them."""
    maps, forms = _maps(boxes[0][0].device[1]), forms or tuple([form(x, rows) for x, rows in boxes])
    kept = maps.captured if captured else maps.newer
    found = [kept.get((box[0].ptr, number), 0) for box, number in zip(boxes, forms, strict=True)]
    if not all(found):
        found = [maps.add((x.ptr, number), partial(_encode, x, rows), captured) for (x, rows), number in zip(boxes, forms, strict=True)]
    return found


def row_map(address: int, count: int, apart: int, rows: int, ordinal: int, captured: bool) -> int:
    """Device address of the map of two lines of `count` float32, which start `apart` bytes from each other, for boxes of so many rows."""
    maps, key = _maps(ordinal), (address, _number("lines", count, apart, rows))
    kept = maps.captured if captured else maps.newer
    return kept.get(key) or maps.add(key, partial(_encode_rows, address, count, apart, rows), captured)


def _encode(x: View, rows: int) -> int:
    """Address of an encoded map."""
    shape, strides = (x.shape, x.strides) if len(x.shape) == 4 else ((1, *x.shape), (x.strides[0] * x.shape[0], *x.strides))
    batch, length, heads, dim = shape
    by_batch, by_row, by_head, _ = (s if n > 1 else 16 for s, n in zip(strides, shape, strict=True))
    return _encoded(_DTYPES[x.dtype], x.ptr, (dim, length, heads, batch), (by_row, by_head, by_batch), (PANEL, rows, 1, 1), "128B")


def _encode_rows(address: int, count: int, apart: int, rows: int) -> int:
    return _encoded("FLOAT32", address, (count, 2), (apart,), (rows, 1), "NONE")


def _encoded(kind: str, address: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: str) -> int:
    """Address of an encoded map; the fastest axis comes first, and its stride is not named."""
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    encoded = check(driver.cuTensorMapEncodeTiled(
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"), len(shape), address, [u64(n) for n in shape],
        [u64(n) for n in strides], [u32(n) for n in box], [u32(1)] * len(shape), driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE), f"cuTensorMapEncodeTiled of {shape}, strides {strides}")
    _kept.map = encoded        # its memory must outlive the caller's copy
    return int(encoded.getPtr())


_kept = threading.local()
