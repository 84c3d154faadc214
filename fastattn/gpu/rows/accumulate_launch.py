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
ACCUMULATE = "x:l x0:q x1:q x2:q x3:q out:l out0:q out1:q out2:q out3:q size1:i size2:i columns:i count:i x_rows:l out_rows:l"
AXES, MOST = 4, 1 << 30             # elements of a launch: indices are int32
_RAW = {1: "float8_e4m3fn", 2: "float16", 4: "float32", 8: "float64"}       # what a dtype without arithmetic is copied as; bool is 0 or 1


class Axis(NamedTuple):
    """An axis of both arrays: its size, and strides in bytes."""

    size: int
    out: int
    x: int


class Kind(NamedTuple):
    """What a kernel is compiled for. `gather` and `scatter`: rows of x and out are numbered."""

    dtype: str
    target: str
    add: bool
    whole: bool
    gather: bool = False
    scatter: bool = False


@cache
def accumulate_source(kind: Kind) -> Source:
    flags = [name for name in ("add", "whole", "gather", "scatter") if getattr(kind, name)]
    key = " ".join(["accumulate", kind.dtype, kind.target, *flags])
    return Source(key, lambda: (make_accumulate(*kind), 0), fields_of(ACCUMULATE), ACCUMULATE_THREADS)


class Rows(NamedTuple):
    """Addresses of int32 row numbers; 0: each row is its own."""

    x: int = 0
    out: int = 0


NO_ROWS = Rows()


def axes_of(shape: tuple[int, ...], out: tuple[int, ...], x: tuple[int, ...]) -> list[Axis]:
    """The axes by out's strides, the largest first; neighbours that are contiguous in both arrays are one axis."""
    axes = sorted([Axis(*three) for three in zip(shape, out, x, strict=True) if three[0] != 1], key=lambda axis: -abs(axis.out))
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
    axes = axes_of(out.shape, out.strides, x.strides) or [Axis(1, out.itemsize, x.itemsize)]
    step, kind = _kind(out, x, axes, add)
    _launch(out.ptr, x.ptr, axes, step, accumulate_source(kind), launcher, stream)


def accumulate_rows(out: View, x: View, count: int, rows: Rows, add: bool, launcher: Launcher, stream: int) -> None:
    """Enqueue out[out rows] = x[x rows], or +=, for `count` rows of the first axis."""
    if count == 0 or 0 in out.shape[1:]:
        return
    axes = axes_of(out.shape[1:], out.strides[1:], x.strides[1:]) or [Axis(1, out.itemsize, x.itemsize)]
    assert len(axes) < AXES
    axes = [Axis(count, out.strides[0], x.strides[0]), *[Axis(1, 0, 0)] * (AXES - 1 - len(axes)), *axes]
    step, kind = _kind(out, x, axes, add)
    kind = kind._replace(gather=rows.x != 0, scatter=rows.out != 0)
    _launch(out.ptr, x.ptr, axes, step, accumulate_source(kind), launcher, stream, rows)


def _kind(out: View, x: View, axes: list[Axis], add: bool) -> tuple[int, Kind]:
    """(elements of a vector, the kernel)."""
    dtype, target = [view.dtype if view.dtype.startswith(("float", "bfloat")) else _RAW[view.itemsize] for view in (x, out)]
    size, step = out.itemsize, 1
    vectors = dtype == target or (dtype == "float32" and target in ("float16", "bfloat16") and not add)
    if vectors and axes[-1].out == size and axes[-1].x == x.itemsize and _aligned(out, x, axes, size):
        step = 16 // size
    return step, Kind(dtype, target, add, step > 1)


def _aligned(out: View, x: View, axes: list[Axis], size: int) -> bool:
    """Whether all of it is vectors of 16 bytes."""
    return (size > 1 and out.ptr % 16 == x.ptr % 16 == 0 and axes[-1].size * size % 16 == 0
            and all(axis.out % 16 == axis.x % 16 == 0 for axis in axes[:-1]))


def _launch(out: int, x: int, axes: list[Axis], step: int, source: Source, launcher: Launcher, stream: int, rows: Rows = NO_ROWS) -> None:
    """Launches for all elements; the first axis is divided where there are too many elements or axes."""
    first, rest = axes[0], math.prod([axis.size for axis in axes[1:]])
    if len(axes) > 1 and (len(axes) > AXES or first.size * rest > MOST):
        each = 1 if len(axes) > AXES else max(MOST // rest, 1)
        for begin in range(0, first.size, each):
            part = Axis(min(each, first.size - begin), first.out, first.x)
            inner = axes[1:] if len(axes) > AXES else [part, *axes[1:]]
            to = out if rows.out else out + begin * first.out
            _launch(to, x if rows.x else x + begin * first.x, inner, step, source, launcher, stream,
                    Rows(rows.x and rows.x + 4 * begin, rows.out and rows.out + 4 * begin))
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
              padded[1].size, padded[2].size, columns, count, *rows]
    launcher.load(source).launch(-(-count // (ACCUMULATE_THREADS * ACCUMULATE_STEPS)), values, stream)
