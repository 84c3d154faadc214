"""Tensor maps, by which the bulk copy engine finds tiles (CUDA driver API, cuTensorMapEncodeTiled), kept on the device.

Axes are (head_dim, row, head, batch); a box is 64 elements (128 bytes, swizzled) by `rows`. What lies outside the tensor is read
as 0 and not written. Maps live in a slab of device memory; encoding and uploading costs some 20 us, so they are kept by
(stream, pointer, shape, strides, rows): a map is uploaded in stream order and used on that stream alone.
"""
from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from typing import Any

from cuda.bindings import driver

from ..buffers import View
from .device import capturing, check

_SLOTS = 8192                  # per device, 128 bytes each; a slot is reused when 8192 others were used after it
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


class _Slab:
    """Slots of one device: addresses of maps by key, the least recently used slot first. Maps used in a capture stay for good."""

    def __init__(self) -> None:
        self.maps: OrderedDict[Any, int] = OrderedDict()
        self.memory = int(check(driver.cuMemAlloc(_SLOTS * 128), "cuMemAlloc"))
        self.host = check(driver.cuMemAllocHost(_SLOTS * 128), "cuMemAllocHost")
        self.free = list(range(_SLOTS - 1, -1, -1))
        self.upload = int(check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate"))
        self.lock = threading.Lock()


_slabs: dict[int, _Slab] = {}
_slabs_lock = threading.Lock()


def _slab(ordinal: int) -> _Slab:
    with _slabs_lock:
        if ordinal not in _slabs:
            _slabs[ordinal] = _Slab()
        return _slabs[ordinal]


def tensor_map(x: View, rows: int, stream: int) -> int:
    """Device address of the map of a view that `fits`, for boxes of `rows` rows; ordered before later work on `stream`."""
    key = (stream, x.ptr, x.shape, x.strides, x.dtype, rows)
    slab = _slabs.get(x.device[1]) or _slab(x.device[1])
    with slab.lock:
        address = slab.maps.get(key)
        if address is not None:
            slab.maps.move_to_end(key)
            return address
        capture = capturing(stream)
        if not slab.free:
            _, oldest = slab.maps.popitem(last=False)
            slab.free.append((oldest - slab.memory) // 128)
        slot = slab.free.pop()
        address = slab.memory + 128 * slot
        host = int(slab.host) + 128 * slot
        ctypes.memmove(host, _encode(x, rows), 128)
        if capture:
            _upload_now(slab, address, host)
        else:
            check(driver.cuMemcpyHtoDAsync(address, host, 128, stream), "cuMemcpyHtoDAsync")
            slab.maps[key] = address
        return address


def _upload_now(slab: _Slab, address: int, host: int) -> None:
    """For a graph that is being captured: its replays find the map there, so the copy is no part of the graph."""
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check(driver.cuThreadExchangeStreamCaptureMode(mode), "cuThreadExchangeStreamCaptureMode")
    try:
        check(driver.cuMemcpyHtoDAsync(address, host, 128, slab.upload), "cuMemcpyHtoDAsync")
        check(driver.cuStreamSynchronize(slab.upload), "cuStreamSynchronize")
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def _encode(x: View, rows: int) -> int:
    """Address of an encoded map."""
    shape, strides = (x.shape, x.strides) if len(x.shape) == 4 else ((1, *x.shape), (x.strides[0] * x.shape[0], *x.strides))
    batch, length, heads, dim = shape
    by_batch, by_row, by_head, _ = (s if n > 1 else 16 for s, n in zip(strides, shape, strict=True))
    kind = getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_DTYPES[x.dtype]}")
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    encoded = check(driver.cuTensorMapEncodeTiled(
        kind, 4, x.ptr, [u64(n) for n in (dim, length, heads, batch)], [u64(s) for s in (by_row, by_head, by_batch)],
        [u32(n) for n in (PANEL, rows, 1, 1)], [u32(1)] * 4, driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B, driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE), f"cuTensorMapEncodeTiled of {x.shape}, strides {x.strides}")
    _kept.map = encoded        # its memory must outlive the caller's copy
    return int(encoded.getPtr())


_kept = threading.local()
