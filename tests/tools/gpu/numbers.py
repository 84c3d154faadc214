"""Numbers of the interpreter: rounding, 16-bit and 8-bit floats as bits, comparisons of PTX."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]


def bfloat16_bits(x: Array) -> Array:
    """float32 rounded to nearest even."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def bits_of(x: Array, kind: str) -> Array:
    """float32 as the bits of a 16-bit dtype."""
    return bfloat16_bits(x) if kind.startswith("bf16") else x.astype(np.float16).view(np.uint16)


def floats_of(bits: Array, kind: str) -> Array:
    if kind.startswith("bf16"):
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def cut_off(x: Array) -> Array:
    """float64 to float32, towards zero."""
    near = x.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def clipped(x: Array) -> Array:
    """Between 0 and 1; NaN becomes 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def compare(how: str, x: Any, y: Any) -> Any:
    if how in _COMPARE:
        found = _COMPARE[how](x, y)
        return found & ~np.isnan(x) & ~np.isnan(y) if how == "ne" and np.asarray(x).dtype.kind == "f" else found
    unordered = np.isnan(x) | np.isnan(y)
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    return unordered | _COMPARE[how[:-1]](x, y)


def halves_of_bytes(x: Array) -> Array:
    """Two float8_e4m3fn as two float16."""
    low, high = ((x >> np.uint16(8 * n) & np.uint16(0xFF)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16).view(np.uint16)
                 for n in range(2))
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def halves_times(x: Array, y: Array) -> Array:
    """The products of two pairs of float16."""
    with np.errstate(all="ignore"):
        out = np.ascontiguousarray(x).view(np.float16) * np.ascontiguousarray(y).view(np.float16)
    return out.view(np.uint32)
