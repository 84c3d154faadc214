"""`View`: where an array is. Also the two nouns around it: `Output`, a result, and `Library`, how one kind of array is
read and made.

Sources: the CUDA Array Interface version 3 (Numba manual), NumPy's array interface.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import dlpack
from .streams import Home, Stream

Device = tuple[str, int]
Shape = tuple[int, ...]
CPU: Device = ("cpu", 0)
HOST = -1           # where repeat.py has a stream's handle: work in host memory, on no stream
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}      # the largest finite 8-bit numbers
EIGHT_BIT = tuple(LARGEST)
NO_NUMPY = ("bfloat16", *EIGHT_BIT)         # dtypes of ml_dtypes, which NumPy has no type strings for
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "bool": 1, "int32": 4, "int64": 8} | dict.fromkeys(EIGHT_BIT, 1)
NAMES: dict[np.dtype[Any], str] = {np.dtype(name): name for name in ITEMSIZE if name not in NO_NUMPY}
_DTYPES: dict[str, np.dtype[Any]] = {name: dtype for dtype, name in NAMES.items()}
FLOATS, LENGTHS = ("float32", "float64", "float16", "bfloat16"), ("int32", "int64")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a dtype name. Those of NO_NUMPY are ml_dtypes', which is imported on first use."""
    if name not in _DTYPES:
        import ml_dtypes

        _DTYPES[name] = np.dtype(getattr(ml_dtypes, name))
        NAMES[_DTYPES[name]] = name
    return _DTYPES[name]


def contiguous(shape: Shape, itemsize: int) -> Shape:
    """Strides in bytes of a C-contiguous array."""
    return tuple(itemsize * math.prod(shape[i + 1:]) for i in range(len(shape)))


@dataclass(slots=True, eq=False)
class View:
    """Memory of an array: address, shape, strides in bytes, dtype name, device. `owner` keeps the memory alive: the
    caller's array, or a tuple that begins with it.

    Treat as immutable. It is not declared frozen because a frozen dataclass takes 0.7 us to make, five times as long,
    and a call makes five.
    """

    ptr: int
    shape: Shape
    strides: Shape
    dtype: str
    device: Device = CPU
    owner: object = field(default=None, repr=False)
    readonly: bool = False

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def compute_dtype(self) -> str:
        """The dtype of the softmax's arithmetic on such operands, and of lse: float32, float64 for float64."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def source(self) -> Any:
        """The caller's array."""
        return self.owner[0] if type(self.owner) is tuple else self.owner

    def permute(self, axes: Shape) -> View:
        """The same memory with axis i of the result being axis axes[i] of this view."""
        shape, strides = self.shape, self.strides
        return View(self.ptr, tuple([shape[a] for a in axes]), tuple([strides[a] for a in axes]), self.dtype, self.device,
                    self.owner, self.readonly)

    def bshd(self) -> View:
        """(batch, num_heads, seqlen, dim) as (batch, seqlen, num_heads, dim).

        A view without four axes is left for problem.py to report.
        """
        if len(self.shape) != 4:
            return self
        (batch, heads, seqlen, dim), (a, b, c, d) = self.shape, self.strides
        return View(self.ptr, (batch, seqlen, heads, dim), (a, c, b, d), self.dtype, self.device, self.owner, self.readonly)

    def broadcast_to(self, shape: Shape) -> View:
        """The same memory with `shape`: broadcast axes get stride 0. ValueError where NumPy's rules forbid it."""
        extra = len(shape) - len(self.shape)
        if extra < 0 or any(n not in (1, m) for n, m in zip(self.shape, shape[extra:], strict=True)):
            raise ValueError(f"shape {self.shape} does not broadcast to {shape}")
        strides = tuple(s if n == m else 0 for n, m, s in zip(self.shape, shape[extra:], self.strides, strict=True))
        return View(self.ptr, shape, (0,) * extra + strides, self.dtype, self.device, self.owner, self.readonly)

    def bytes_range(self) -> tuple[int, int]:
        """[lowest, highest) address of any element; empty for a view without elements."""
        low = high = self.ptr
        if 0 in self.shape:
            return low, high
        for n, s in zip(self.shape, self.strides, strict=True):
            if s > 0:
                high += (n - 1) * s
            else:
                low += (n - 1) * s
        return low, high + ITEMSIZE[self.dtype]

    def numpy(self) -> np.ndarray[Any, Any]:
        """A zero-copy ndarray of a CPU view; it keeps the owner alive."""
        dtype = numpy_dtype(self.dtype)
        if self.device[0] != "cpu":
            raise ValueError(f"a view on {self.device} has no NumPy array")
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        return np.asarray(_Interface(self)).view(dtype)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU if self.device[0] == "cpu" else dlpack.CUDA, self.device[1]

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None, dl_device: tuple[int, int] | None = None,
                   copy: bool | None = None) -> Any:
        """A capsule of the same memory, for engines of other packages.

        `stream` is ignored: an engine works on the stream it was given.
        """
        kind, index = self.__dlpack_device__()
        if copy or (dl_device is not None and tuple(map(int, dl_device)) != (kind, index)):
            raise BufferError("a View is exported as it is: without a copy, on its own device")
        return dlpack.capsule(self, self.ptr, self.shape, self.strides, self.dtype, index, max_version, kind)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.device[0] == "cpu" or self.dtype in NO_NUMPY:
            raise AttributeError(f"host memory and {' and '.join(NO_NUMPY)} have no __cuda_array_interface__; __dlpack__ is there")
        typestr = "|b1" if self.dtype == "bool" else f"<{self.dtype[0]}{self.itemsize}"
        return {"version": 3, "shape": self.shape, "strides": self.strides, "typestr": typestr, "data": (self.ptr, self.readonly),
                "stream": None}


class _Interface:
    """What NumPy reads a View through: raw bytes of the item's size, because NumPy has no type string for NO_NUMPY.

    The array of a CUDA view is for address arithmetic only; its memory is not the host's.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.__array_interface__ = {"version": 3, "data": (view.ptr, view.readonly), "shape": view.shape,
                                    "strides": view.strides, "typestr": f"|V{view.itemsize}"}


def size_of(x: View) -> int:
    """Bytes of a contiguous View."""
    return x.itemsize * math.prod(x.shape)


def overlap(a: View, b: View) -> bool:
    """Whether two views share an element; also True where an exact answer would take too long. No element is read."""
    (a_low, a_high), (b_low, b_high) = a.bytes_range(), b.bytes_range()
    if a_low >= b_high or b_low >= a_high:
        return False
    work: Any = 10_000                                      # NumPy's stubs know -1 and 0 only
    try:
        return np.shares_memory(np.asarray(_Interface(a)), np.asarray(_Interface(b)), max_work=work)
    except np.exceptions.TooHardError:
        return True


class Output:
    """A new or given array for a result: an engine fills `view`, then `finish()` returns the array in the caller's kind
    and layout.

    `view` is canonical, (batch, seqlen, num_heads, dim). `shape` is that of the caller's array.
    """

    __slots__ = ("_array", "_convert", "shape", "view")

    def __init__(self, view: View, array: Any, convert: Callable[[Any], Any] | None = None) -> None:
        self.view, self.shape, self._array, self._convert = view, view.shape, array, convert

    def bshd(self) -> Output:
        """This output with its view permuted from (batch, num_heads, seqlen, dim); `shape` stays the caller's."""
        self.view = self.view.bshd()
        return self

    def finish(self) -> Any:
        return self._array if self._convert is None else self._convert(self._array)


class Quick(NamedTuple):
    """How arrays of one type are read and made on a repeated call, without checks (repeat.py)."""

    form: Callable[[Any], Any]                  # hashable: all that decides a View but the address; None: take the full path
    address: Callable[[Any], int]
    stream: Callable[[Any], int]                # the library's current stream on the array's device, or HOST; 0: take the full path
    maker: Callable[[Any, Shape, str], Callable[[], Any]]   # what makes such arrays on the device of the first argument
    same: Callable[[Sequence[Any]], Callable[..., bool]] | None = None      # whether other arrays have the forms of these, if that is fast


class Library(NamedTuple):
    """How one kind of array is read and made; libraries.py has those that are known by name."""

    view: Callable[[Any, str, str, Stream | None], View]    # of array, call, argument, the call's stream
    home: Callable[[Any, str], Home | None]                 # device and current stream of a call's first array; None: host memory
    empty: Callable[[Any, Shape, str, Stream], Output]      # a new array in CUDA memory
    quick: Quick | None = None
    written: Callable[[Any], Any] | None = None     # tells the library that the array's memory was written to; returns the array
