"""Arrays of a call between its steps: Views cut into parts, buffers, and the few operations on them, in host memory and in CUDA memory.

Buffers have the sequence as their first axis, (rows, batch, heads, dim) or packed (rows, heads, dim): then the rows of a chunk are
contiguous and travel as one message.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..arrays.dlpack import address
from ..arrays.view import CPU, Device, Shape, View, contiguous, numpy_dtype
from ..merging import merge_views


def cut(x: View, axis: int, span: slice) -> View:
    """x[..., start:stop, ...] along one axis."""
    shape, stride = list(x.shape), x.strides[axis]
    shape[axis] = span.stop - span.start
    return View(x.ptr + span.start * stride, tuple(shape), x.strides, x.dtype, x.device, x.owner, x.readonly)


def is_contiguous(x: View) -> bool:
    return 0 in x.shape or all(n == 1 or s == c for n, s, c in zip(x.shape, x.strides, contiguous(x.shape, x.itemsize), strict=True))


def rows_together(to: View, x: View, places: Sequence[tuple[slice, slice]]) -> Iterator[tuple[View, View]]:
    """The Views of (rows of `to`, rows of x): two chunks of one length, as a zigzag has them, are one View with an axis more."""
    if len(places) == 2 and len({rows.stop - rows.start for pair in places for rows in pair}) == 1:
        yield tuple([_both(view, *[pair[n] for pair in places]) for n, view in enumerate((to, x))])  # type: ignore[misc]
        return
    for to_rows, x_rows in places:
        yield cut(to, 0, to_rows), cut(x, 0, x_rows)


def _both(x: View, first: slice, second: slice) -> View:
    stride = x.strides[0]
    return View(x.ptr + first.start * stride, (2, first.stop - first.start, *x.shape[1:]),
                ((second.start - first.start) * stride, *x.strides), x.dtype, x.device, x.owner, x.readonly)


class Memory(Protocol):
    """Where a call's buffers are, and what is done with them, all in the order of the call's stream."""

    @property
    def device(self) -> Device: ...

    @property
    def handle(self) -> int | None:
        """The call's stream; None in host memory."""

    def empty(self, shape: Shape, dtype: str) -> View:
        """A contiguous buffer."""

    def zero(self, to: View) -> None:
        """Zeros into a contiguous View."""

    def copy(self, to: View, x: View) -> None:
        """x into `to`, of the same shape, rounded to its dtype."""

    def add(self, to: View, x: View) -> None:
        """to += x, in the arithmetic of `to`."""

    def merge(self, out: View, lse: View, part: View, part_lse: View) -> None:
        """Merge a partial result into (out, lse), as merge_states does. `part_lse` is contiguous."""

    def numbers(self, numbers: Any) -> View:
        """Lengths or row numbers, an integer array in host memory, as an operand."""

    def move(self, to: View, x: View, count: int, to_rows: View | None = None, x_rows: View | None = None, add: bool = False) -> None:
        """to[to_rows] = x[x_rows], or +=, for `count` rows. No row of `to` is named twice."""

    def upload(self, words: bytes) -> View:
        """Bytes of the host as a buffer of int32."""

    def download(self, x: View) -> bytes:
        """The bytes of a contiguous View. The host waits."""


@dataclass(frozen=True, slots=True)
class Host:
    """Host memory: NumPy."""

    device: Device = CPU
    handle: int | None = None

    def empty(self, shape: Shape, dtype: str) -> View:
        array = np.empty(shape, numpy_dtype(dtype))
        return View(address(array), shape, array.strides, dtype, CPU, array)

    def zero(self, to: View) -> None:
        to.numpy()[...] = 0

    def copy(self, to: View, x: View) -> None:
        to.numpy()[...] = x.numpy()

    def add(self, to: View, x: View) -> None:
        target = to.numpy()
        target += x.numpy().astype(target.dtype, copy=False)

    def merge(self, out: View, lse: View, part: View, part_lse: View) -> None:
        merge_views([out, part], [lse, part_lse], out, lse)

    def numbers(self, numbers: Any) -> View:
        array = np.ascontiguousarray(numbers, np.int64)
        return View(address(array), array.shape, array.strides, "int64", CPU, array)

    def move(self, to: View, x: View, count: int, to_rows: View | None = None, x_rows: View | None = None, add: bool = False) -> None:
        target, source = to.numpy(), x.numpy()
        where: Any = slice(0, count) if to_rows is None else to_rows.numpy()
        source = source[:count] if x_rows is None else source[x_rows.numpy()]
        target[where] = target[where] + source.astype(target.dtype, copy=False) if add else source

    def upload(self, words: bytes) -> View:
        array = np.frombuffer(words, np.int32).copy()
        return View(address(array), array.shape, array.strides, "int32", CPU, array)

    def download(self, x: View) -> bytes:
        return x.numpy().tobytes()


def memory_of(stream: Any) -> Memory:
    """The memory of a call with this stream (arrays.convert.Caller)."""
    if stream is None:
        return Host()
    from .device import Cuda

    return Cuda(stream)
