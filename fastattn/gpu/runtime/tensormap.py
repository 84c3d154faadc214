"""Tensor maps: descriptors by which TMA, the bulk copy engine, addresses tiles (CUDA driver API,
cuTensorMapEncodeTiled).

Axes are (head_dim, row, head, batch), and a box is 64 elements (128 bytes, swizzled) by `rows`; of 8-bit elements it is
32, 64 or 128, swizzled over their width, and a box of WholeRows is not swizzled. Or they are (row, 2)
float32 of lse and delta, and a box is `rows` of one of the two. TMA reads what lies outside the tensor as 0 and does
not write it.

Maps are kept in device memory by pointer, shape, strides and rows. A new one is copied there on a private stream that
the host waits for: some 20 us, once. So no order with the caller's streams is needed, and a graph that is being
captured does not contain the copy.
"""
from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from cuda.bindings import driver

from ...arrays.streams import check
from ...arrays.view import EIGHT_BIT, View
from .device import private_stream, relaxed

_MAP_BYTES = 128
_CHUNK = 4096                  # maps that are allocated at a time
_MOST = 32768                  # maps of a device in one generation: more than those of all launches that can be pending
_DTYPES = {"float16": "FLOAT16", "bfloat16": "BFLOAT16"} | dict.fromkeys(EIGHT_BIT, "UINT8")
PANEL = 64                     # elements of a 128-byte row
PROMOTION = 256                # bytes to which L2 completes what TMA misses; see _promotion


class WholeRows(NamedTuple):
    """A box of `rows` rows of `columns` elements each, all columns that there are, one row after the other and not swizzled."""

    rows: int
    columns: int


Box = int | WholeRows           # rows of PANEL elements, or whole rows


def fits(x: View) -> str | None:
    """None, or why TMA cannot address this (batch, row, head, dim) or (row, head, dim) view."""
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
    """The maps of one device: addresses by key.

    Maps of captured graphs are kept for ever. The others are in two generations: a map found in the older one moves to
    the newer one, and when that is full, the older one's memory is reused. Finding a map in the newer one takes a
    dictionary look-up and no lock.
    """

    def __init__(self) -> None:
        self.newer: dict[Any, int] = {}
        self.older: dict[Any, int] = {}
        self.captured: dict[Any, int] = {}
        self.free: list[int] = []
        self.stream, self.lock = private_stream(), threading.Lock()
        self.staging = int(check(driver.cuMemAllocHost(_MAP_BYTES), "cuMemAllocHost"))

    def add(self, key: Any, encode: Callable[[], int], captured: bool) -> int:
        """Device address of the map that `encode` makes on the host. It is kept with the captured maps or in the newer
        generation."""
        with self.lock:
            kept = self.captured if captured else self.newer
            address = kept.get(key)     # another thread may have added it meanwhile
            if address is None and not captured:
                address = self.older.pop(key, None)
            if address is None:
                with relaxed():
                    address = self.copy(encode())
            kept[key] = address
            if len(self.newer) >= _MOST:
                self.free += self.older.values()
                self.newer, self.older = {}, self.newer
            return address

    def copy(self, encoded: int) -> int:
        """Device address of a copy of the map at host address `encoded`."""
        if not self.free:
            chunk = int(check(driver.cuMemAlloc(_CHUNK * _MAP_BYTES), "cuMemAlloc"))
            self.free += range(chunk, chunk + _CHUNK * _MAP_BYTES, _MAP_BYTES)
        address = self.free.pop()
        ctypes.memmove(self.staging, encoded, _MAP_BYTES)
        check(driver.cuMemcpyHtoDAsync(address, self.staging, _MAP_BYTES, self.stream), "cuMemcpyHtoDAsync")
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


def form(x: View, rows: Box) -> int:
    """Interned number of a view's shape, strides, dtype and box, but not its address: a cheap dictionary key."""
    return _number(x.shape, x.strides, x.dtype, rows)


class Wanted(NamedTuple):
    """A map as a key and how it is made, but for its address: `offset` bytes after address number `base` of a call."""

    base: int
    offset: int
    number: int
    encode: Callable[[int], int]        # of the address


def wanted(x: View, rows: Box) -> Wanted:
    """The map of a view at a recording.Address."""
    at: Any = x.ptr
    return Wanted(at.base, at.offset, form(x, rows), partial(_encode, x.shape, x.strides, x.dtype, rows))


def wanted_rows(address: Any, count: int, apart: int, rows: int) -> Wanted:
    """The map of `row_map` at a recording.Address."""
    return Wanted(address.base, address.offset, _number("rows", count, apart, rows), partial(_encode_rows, count, apart, rows))


def find(maps: Sequence[Wanted], addresses: Sequence[int], ordinal: int, captured: bool) -> list[int]:
    """Device addresses of maps, of a call with these addresses. `captured`: they are for work that is being captured into
    a graph."""
    all_maps = _devices.get(ordinal) or _maps(ordinal)
    kept, found = all_maps.captured if captured else all_maps.newer, []
    for base, offset, number, encode in maps:
        address = addresses[base] + offset
        found.append(kept.get((address, number)) or all_maps.add((address, number), partial(encode, address), captured))
    return found


def tensor_maps(boxes: tuple[tuple[View, Box], ...], captured: bool, forms: tuple[int, ...] | None = None) -> list[int]:
    """Device addresses of the maps of some views, all on one device.

    Parameters
    ----------
    boxes
        Views that `fits` accepts, and the box of each.
    captured
        The maps are for work that is being captured into a graph.
    forms
        `form` of each box, if the caller has them.
    """
    maps, forms = _maps(boxes[0][0].device[1]), forms or tuple([form(x, rows) for x, rows in boxes])
    kept = maps.captured if captured else maps.newer
    found = [kept.get((box[0].ptr, number), 0) for box, number in zip(boxes, forms, strict=True)]
    if not all(found):
        found = [maps.add((x.ptr, number), partial(_encode, x.shape, x.strides, x.dtype, rows, x.ptr), captured)
                 for (x, rows), number in zip(boxes, forms, strict=True)]
    return found


def row_map(address: int, count: int, apart: int, rows: int, ordinal: int, captured: bool) -> int:
    """Device address of the map of two rows of `count` float32, which start `apart` bytes from each other, for boxes of
    `rows` numbers."""
    maps, key = _maps(ordinal), (address, _number("rows", count, apart, rows))
    kept = maps.captured if captured else maps.newer
    return kept.get(key) or maps.add(key, partial(_encode_rows, count, apart, rows, address), captured)


def _encode(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, rows: Box, address: int) -> int:
    """Host address of the encoded map of a view."""
    if len(shape) == 3:
        shape, strides = (1, *shape), (strides[0] * shape[0], *strides)
    batch, length, heads, dim = shape
    by_batch, by_row, by_head, _ = (s if n > 1 else 16 for s, n in zip(strides, shape, strict=True))
    columns = min(dim, 2 * PANEL) if dtype in EIGHT_BIT else PANEL
    swizzle = f"{columns}B" if dtype in EIGHT_BIT else "128B"
    promotion = PROMOTION if dtype in EIGHT_BIT else _promotion(2 * dim, by_head)
    if isinstance(rows, WholeRows):
        (rows, columns), swizzle = rows, "NONE"
    return _encoded(_DTYPES[dtype], address, (dim, length, heads, batch), (by_row, by_head, by_batch), (columns, rows, 1, 1), swizzle,
                    promotion)


def _promotion(row_bytes: int, by_head: int) -> int:
    """PROMOTION, or 128 for heads of 65 to 127 and of 256 numbers side by side.

    With 256 bytes DiT's 256 keys of head_dim 72 took 182 us, with 128 155; head_dim 256, 512 keys, causal 98.0 and 92.9. At head_dim 64
    there is no difference, at 128 256 bytes are up to 1 % faster.
    """
    return 128 if by_head == row_bytes and (128 < row_bytes < 256 or row_bytes == 512) else PROMOTION


def _encode_rows(count: int, apart: int, rows: int, address: int) -> int:
    return _encoded("FLOAT32", address, (count, 2), (apart,), (rows, 1), "NONE", PROMOTION)


def _encoded(kind: str, address: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: str,
             promotion: int) -> int:
    """Host address of an encoded map. The fastest axis comes first; its stride is not given."""
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    encoded = check(driver.cuTensorMapEncodeTiled(
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}"), len(shape), address, [u64(n) for n in shape],
        [u64(n) for n in strides], [u32(n) for n in box], [u32(1)] * len(shape), driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
        getattr(driver.CUtensorMapL2promotion, f"CU_TENSOR_MAP_L2_PROMOTION_L2_{promotion}B"),
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE), f"cuTensorMapEncodeTiled of {shape}, strides {strides}")
    _kept.map = encoded        # must live until the caller has copied it
    return int(encoded.getPtr())


_kept = threading.local()
