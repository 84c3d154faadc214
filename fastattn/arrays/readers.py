"""Who reads an array: the library of its type, or a protocol."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import message
from . import dlpack, words
from .dlpack import EXPORT_ERRORS
from .view import Library

by_type: dict[type, Library] = {}       # of the array types that came in so far and are known by name


def library_of(x: Any, call: str, argument: str) -> Library:
    """Who reads x: a library known by name, else DLPack, else the CUDA Array Interface, else TypeError."""
    found = by_type.get(type(x))
    if found is not None:
        return found
    from .libraries import find  # not before an array comes in that is not NumPy's
    from .protocols import DLPACK, INTERFACE

    known = find(x)
    if known is not None:
        by_type[type(x)] = known
        return known
    stand_in = words.transformed(x)
    if stand_in is not None:
        raise TypeError(message(call, argument, stand_in[0], "an array", stand_in[1]))
    if _has(x, "__dlpack__") and _has(x, "__dlpack_device__"):
        return DLPACK
    if _has(x, "__cuda_array_interface__"):
        return INTERFACE
    raise TypeError(message(call, argument, f"is {words.kind(x)}", "a NumPy array or an array that speaks DLPack", words.held(argument, x)))


def _has(x: Any, name: str) -> bool:
    """Whether x has an attribute; True where asking raises, so that its reader reports the error."""
    try:
        return hasattr(x, name)
    except EXPORT_ERRORS:
        return True


def written(x: Any) -> Callable[[Any], Any] | None:
    """How x's library is told that x's memory was written to, once x was read; None where it need not be."""
    known = by_type.get(type(x))
    return None if known is None else known.written


def is_array(x: Any) -> bool:
    """Whether x has a shape or speaks a protocol by which arrays are read. NumPy's scalars are numbers."""
    return not isinstance(x, np.generic) and any(_has(x, name) for name in ("shape", "__dlpack__", "__cuda_array_interface__"))


def shape_of(x: Any) -> tuple[int, ...] | None:
    """The shape that an array states; None where only its reader would find it, or find that it is wrong."""
    try:
        return tuple(x.shape if hasattr(x, "shape") else x.__cuda_array_interface__["shape"])
    except (AttributeError, KeyError, TypeError, *EXPORT_ERRORS):
        return None


def in_device_memory(x: Any) -> bool:
    """Whether a number in x is on a device, where reading it would make the host wait."""
    if isinstance(x, np.ndarray):
        return False
    try:
        if hasattr(x, "__dlpack_device__"):
            return dlpack.DEVICES.get(int(x.__dlpack_device__()[0])) != "cpu"
        return hasattr(x, "__cuda_array_interface__")
    except EXPORT_ERRORS:
        return False
