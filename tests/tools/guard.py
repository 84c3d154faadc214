"""Memory between pages that nobody may touch: whoever reads or writes past its end, or before its start, ends the process (SIGSEGV).

Results do not show such a read if what it brings is masked afterwards, and a sanitizer needs a build of its own.
"""
from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
GUARD = 1 << 20                                 # bytes of a guard: an index that is wrong may lead far away. They cost addresses only
_NO_ACCESS = 0                                  # PROT_NONE
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(size: int, ends: bool = True, fill: int = 0xFF) -> Array:
    """`size` bytes that hold `fill`, and end where a guard begins; or, without `ends`, begin where one ends.

    The other side is up to a page away from its guard, and what lies between holds `fill`.
    """
    inside = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    # unmapped with its last view
    whole = np.frombuffer(mmap.mmap(-1, inside + 2 * GUARD, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    for start in (0, GUARD + inside):
        if _libc.mprotect(ctypes.c_void_p(whole.ctypes.data + start), ctypes.c_size_t(GUARD), _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    room = whole[GUARD:GUARD + inside]
    room[:] = fill
    return room[inside - size:] if ends else room[:size]


def guarded_copy(x: Array, ends: bool = True) -> Array:
    """x in such memory, with its strides. Gaps between its elements hold 0xFF, which is NaN in every float dtype."""
    low, high = np.lib.array_utils.byte_bounds(x)
    memory = guarded(high - low if x.size else 0, ends)
    copy = np.ndarray(x.shape, x.dtype, memory.data, x.__array_interface__["data"][0] - low if x.size else 0, x.strides)
    if 0 not in x.strides:
        copy[...] = x
    else:                                       # elements that share memory, once
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)
        copy[once] = x[once]
    return copy


def guarded_arrays(given: dict[str, Any], ends: bool = True) -> dict[str, Any]:
    """Named arguments, arrays among them in such memory."""
    return {name: guarded_copy(x, ends) if isinstance(x, np.ndarray) else x for name, x in given.items()}
