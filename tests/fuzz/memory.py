"""The same numbers elsewhere in memory: any order of the axes, gaps, negative strides, stride 0, an offset; all bytes between are 0xFF.

The memory ends, or begins, at a page that nobody may touch: a read past it ends the process.
"""
from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from tests.tools.guard import guarded

Array = np.ndarray[Any, Any]
KINDS = ("plain", "strange", "gaps", "transposed", "reversed")
POISON = 0xFF                                   # NaN in every float dtype


def place(random: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], kind: str) -> tuple[Array, Array]:
    """(memory, view): bytes that hold 0xFF and an array of `shape` in them, uninitialised: NaN."""
    rank = len(shape)
    order, steps, signs = list(range(rank)), [1] * rank, [1] * rank
    if kind in ("strange", "transposed"):
        order = random.permutation(rank).tolist()
    if kind in ("strange", "gaps"):
        steps = random.choice([1, 1, 2, 3], rank).tolist()
    if kind in ("strange", "reversed"):
        signs = random.choice([1, -1], rank).tolist()
    before, after = (0, 0) if kind == "plain" else random.integers(0, 9, 2).tolist()
    reach, strides = 1, [0] * rank
    for axis in reversed(order):
        extra = int(random.integers(0, 4)) if kind in ("strange", "gaps") else 0
        strides[axis] = reach * steps[axis]
        reach = strides[axis] * max(shape[axis], 1) + extra
    memory = guarded((before + reach + after) * dtype.itemsize, ends=zlib.crc32(repr(shape).encode()) % 4 != 0, fill=POISON)
    start = before + sum((n - 1) * s for n, s, sign in zip(shape, strides, signs, strict=True) if sign < 0 and n > 0)
    base = memory.view(f"u{dtype.itemsize}")
    if rank == 0:
        return memory, base[start:start + 1].reshape(()).view(dtype)
    view = np.lib.stride_tricks.as_strided(base[start:], shape, [s * sign * dtype.itemsize for s, sign in zip(strides, signs, strict=True)])
    return memory, view.view(dtype)


def untouched(memory: Array, view: Array) -> bool:
    """Whether all bytes but the view's still hold what `place` wrote."""
    values, raw = view.copy(), view.view(f"u{view.itemsize}")
    raw[...] = np.iinfo(raw.dtype).max
    clean = bool((memory == POISON).all())
    view[...] = values
    return clean


def laid(random: np.random.Generator, x: Array, kind: str, repeats: tuple[int, ...] = (), readonly: bool = False) -> Array:
    """x in new memory. Along the axes of `repeats`, whose entries are equal, the stride is 0."""
    once = x[tuple(slice(0, 1) if axis in repeats else slice(None) for axis in range(x.ndim))]
    _, view = place(random, once.shape, x.dtype, kind)
    view[...] = once
    if repeats and view.ndim:
        strides = [0 if axis in repeats else s for axis, s in enumerate(view.strides)]
        view = np.lib.stride_tricks.as_strided(view, x.shape, strides) if view.size else x.copy()
    if readonly:
        view.flags.writeable = False
    return view
