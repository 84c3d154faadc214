"""Launches of `accumulate`. Without Numba: a kernel that is in the cache is launched without it."""
from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from ...arrays.view import View
from ..runtime.compile import Source, fields_of, late
from ..runtime.launcher import Launcher
from .config import ACCUMULATE_STEPS, ACCUMULATE_THREADS

make_accumulate = late("rows.accumulate", "make_accumulate")
ACCUMULATE = "x:l x0:q x1:q x2:q x3:q out:l out0:q out1:q out2:q out3:q size1:i size2:i columns:i count:i"
AXES, MOST = 4, 1 << 30             # elements of a launch: indices are int32
_RAW = {1: "float8_e4m3fn", 2: "float16", 4: "float32", 8: "float64"}       # what a dtype without arithmetic is copied as; bool is 0 or 1


class Axis(NamedTuple):
    """An axis of both arrays: its size, and strides in bytes."""

    size: int
    out: int
    x: int


@cache
def accumulate_source(dtype: str, target: str, add: bool, whole: bool) -> Source:
    key = f"accumulate {dtype} {target}" + " add" * add + " whole" * whole
    return Source(key, lambda: (make_accumulate(dtype, target, add, whole), 0), fields_of(ACCUMULATE), ACCUMULATE_THREADS)


def axes_of(out: View, x: View) -> list[Axis]:
    """The axes by out's strides, the largest first; neighbours that are contiguous in both arrays are one axis."""
    axes = sorted([Axis(*three) for three in zip(out.shape, out.strides, x.strides, strict=True) if three[0] != 1],
                  key=lambda axis: -abs(axis.out))
    found = list[Axis]()
    for axis in axes:
        last = found[-1] if found else None
        if last is not None and last.out == axis.size * axis.out and last.x == axis.size * axis.x:
            found[-1] = Axis(last.size * axis.size, axis.out, axis.x)
        else:
            found.append(axis)
    return found


def accumulate(out: View, x: View, add: bool, launcher: Launcher, stream: int) -> None:
    """Enqueue out = x, or out += x, of one shape. Arrays without arithmetic, bool and integers, only as a copy of the same dtype."""
    if 0 in out.shape:
        return
    dtype, target = [view.dtype if view.dtype.startswith(("float", "bfloat")) else _RAW[view.itemsize] for view in (x, out)]
    axes, size = axes_of(out, x), out.itemsize
    axes = axes or [Axis(1, size, x.itemsize)]
    step = 1
    if dtype == target and axes[-1].out == size == axes[-1].x and _aligned(out, x, axes, size):
        step = 16 // size
    _launch(out.ptr, x.ptr, axes, step, accumulate_source(dtype, target, add, step > 1), launcher, stream)


def _aligned(out: View, x: View, axes: list[Axis], size: int) -> bool:
    """Whether all of it is vectors of 16 bytes."""
    return (size > 1 and out.ptr % 16 == x.ptr % 16 == 0 and axes[-1].size * size % 16 == 0
            and all(axis.out % 16 == axis.x % 16 == 0 for axis in axes[:-1]))


def _launch(out: int, x: int, axes: list[Axis], step: int, source: Source, launcher: Launcher, stream: int) -> None:
    """Launches for all elements; the first axis is divided where there are too many elements or axes."""
    first, rest = axes[0], math.prod([axis.size for axis in axes[1:]])
    if len(axes) > 1 and (len(axes) > AXES or first.size * rest > MOST):
        each = 1 if len(axes) > AXES else max(MOST // rest, 1)
        for begin in range(0, first.size, each):
            part = Axis(min(each, first.size - begin), first.out, first.x)
            inner = axes[1:] if part.size == 1 else [part, *axes[1:]]
            _launch(out + begin * first.out, x + begin * first.x, inner, step, source, launcher, stream)
        return
    if first.size * rest > MOST:        # one axis
        half = first.size // 2 // step * step
        for begin, size in ((0, half), (half, first.size - half)):
            _launch(out + begin * first.out, x + begin * first.x, [Axis(size, first.out, first.x)], step, source, launcher, stream)
        return
    padded = [Axis(1, 0, 0)] * (AXES - len(axes)) + axes
    last = padded[-1]
    columns = last.size // step
    count = columns * math.prod([axis.size for axis in padded[:-1]])
    values = [x, *[axis.x for axis in padded[:-1]], last.x * step, out, *[axis.out for axis in padded[:-1]], last.out * step,
              padded[1].size, padded[2].size, columns, count]
    launcher.load(source).launch(-(-count // (ACCUMULATE_THREADS * ACCUMULATE_STEPS)), values, stream)
