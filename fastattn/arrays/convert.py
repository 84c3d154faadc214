"""A call's arguments -> canonical Views; its results -> arrays of the caller's kind and layout. Nothing here copies an
input.

`Caller` does both for one call. The functions below it are its steps, for callers that need only one.
"""
from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..errors import message
from . import streams, words
from .dlpack import address
from .readers import by_type, library_of
from .streams import Stream
from .view import CPU, NAMES, Output, Shape, View, numpy_dtype


class Caller:
    """One call of a public function: its name, its stream, the layout of its q, k, v and results.

    Each argument goes in once, with its name, and comes out as a View, whose `source` is the caller's array. Views of
    q, k, v and results are canonical: (batch, seqlen, num_heads, dim), or packed (total, num_heads, dim).
    """

    __slots__ = ("bhsd", "call", "first", "handle", "stream")

    def __init__(self, call: str, layout: str, stream: Any, argument: str, first: Any) -> None:
        """`first`, q, decides where the call runs: its library knows its device and current stream. `self.first` is its
        View.

        `stream` is the caller's argument: None, or a stream of any library.
        """
        self.call, self.bhsd = call, layout == "bhsd"
        library = by_type.get(type(first))
        if library is None and isinstance(first, np.ndarray):
            self.stream = streams.resolve(stream, None, call)
            found = view(first, call, argument)
        else:
            library = library or library_of(first, call, argument)
            self.stream = streams.resolve(stream, library.home(first, call), call)
            found = library.view(first, call, argument, self.stream)
        self.handle = None if self.stream is None else self.stream.handle       # a CUstream; None in host memory
        self.first = found.bshd() if self.bhsd else found

    def tokens(self, x: Any, argument: str) -> View:
        """The canonical View of an array in the caller's layout."""
        found = view(x, self.call, argument, self.stream)
        return found.bshd() if self.bhsd else found

    def view(self, x: Any, argument: str) -> View:
        """The View of an array as it is: one that has no layout, or whose shape is checked in the caller's layout."""
        return view(x, self.call, argument, self.stream)

    def small(self, x: Any, argument: str, dtype: str | None = None) -> View:
        """The View of an array, or in host memory of a list of numbers: see `small`."""
        return small(x, dtype, self.call, argument, self.stream)

    def shape(self, canonical: Shape) -> Shape:
        """A canonical shape in the caller's layout."""
        return (canonical[0], canonical[2], canonical[1], canonical[3]) if self.bhsd else canonical

    def output(self, shape: Shape, dtype: str, like: View) -> Output:
        """A new array in the caller's layout, of the kind of `like`'s source; `shape` is canonical, and so is the
        Output's view.
        """
        if self.bhsd:
            return allocate(like.source, self.shape(shape), dtype, self.stream).bshd()
        return allocate(like.source, shape, dtype, self.stream)

    def allocate(self, shape: Shape, dtype: str, like: View) -> Output:
        """A new array that has no layout: lse, dbias, dsinks."""
        return allocate(like.source, shape, dtype, self.stream)


# ---------------------------------------------------------------- any array -> View
def view(x: Any, call: str, argument: str, stream: Stream | None = None) -> View:
    """The View of an ndarray, of a CPU or CUDA DLPack producer (torch, JAX, CuPy) or of a `__cuda_array_interface__`.

    `stream`, the call's, waits for the work that makes x if that is on another stream. Raises TypeError, naming `call`
    and `argument`, for anything else and for dtypes that no argument takes.
    """
    known = by_type.get(type(x))
    if known is not None:
        return known.view(x, call, argument, stream)
    if isinstance(x, np.ndarray):
        name = NAMES.get(x.dtype)
        flags = x.flags
        if name is None or not flags.aligned or type(x) is not np.ndarray:
            from .protocols import slow_numpy

            x, name = slow_numpy(x, call, argument)
        return View(address(x), x.shape, x.strides, name, CPU, x, not flags.writeable)
    return library_of(x, call, argument).view(x, call, argument, stream)


def small(x: Any, dtype: str | None, call: str, argument: str, stream: Stream | None = None) -> View:
    """Like `view`, but also of a list or tuple of numbers: as `dtype` (a float one), or as integers if None.

    CUDA calls refuse lists: a copy to the device in every call would make the host wait and break graphs.
    """
    if not isinstance(x, (list, tuple)):
        return view(x, call, argument, stream)
    if stream is not None:
        raise TypeError(message(call, argument, f"is a {type(x).__name__}", f"an array on q's device, ('cuda', {stream.device})",
                                f"make it once, as torch.tensor({argument}, device='cuda') or cupy.asarray({argument}) do"))
    try:
        a = np.asarray(x, None if len(x) else np.int64)     # no number at all: NumPy's float64
    except Exception:                                       # its elements may raise anything
        raise TypeError(message(call, argument, f"is {words.kind(x)} of unequal parts", "numbers")) from None
    if a.dtype.kind in "iuf" and dtype is not None:
        a = a.astype(numpy_dtype(dtype))
    elif a.dtype.kind not in "iuf" or a.dtype.kind == "u":
        has = f"is {words.kind(x)} of numbers beyond int64" if a.dtype.kind == "u" else f"is {words.shown(x)}"
        raise TypeError(message(call, argument, has, "numbers"))
    found = view(a, call, argument)
    found.owner = x, a
    return found


def resolve(stream: Any, q: Any, call: str) -> Stream | None:
    """The stream that a call with this q runs on; None in host memory. Errors: see streams.resolve."""
    home = None if isinstance(q, np.ndarray) else library_of(q, call, "q").home(q, call)
    return streams.resolve(stream, home, call)


# ---------------------------------------------------------------- results
def allocate(producer: Any, shape: Shape, dtype: str, stream: Stream | None = None) -> Output:
    """An uninitialised contiguous array of the kind of `producer`, in CUDA memory of the stream's device, or the host's
    if None.

    Host: an ndarray, a torch tensor, or what the producer's library makes of an ndarray once it is filled (its arrays
    may be immutable; JAX's are); an ndarray where no library is known. CUDA: see libraries.py; a DeviceArray
    where none is known.
    """
    if stream is not None:
        return library_of(producer, "allocate", "producer").empty(producer, shape, dtype, stream)
    if not isinstance(producer, np.ndarray):
        torch: Any = sys.modules.get("torch")               # loaded, because a torch tensor came in
        if torch is not None and isinstance(producer, torch.Tensor):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            return Output(view(tensor, "allocate", "out"), tensor)
    array = np.empty(shape, numpy_dtype(dtype))
    found = View(address(array), shape, array.strides, dtype, CPU, array)
    if isinstance(producer, np.ndarray):
        return Output(found, array)
    from .protocols import importer

    return Output(found, array, importer(producer, found))
