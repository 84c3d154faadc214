"""Readers of arrays that speak a protocol, NumPy's own, DLPack or the CUDA Array Interface, and the errors that all
readers share.

What another library says of an array is checked before it is believed: a wrong shape, stride or address would make an
engine read memory that is not the array's. Sources: the CUDA Array Interface version 3 (Numba manual); for DLPack see
dlpack.py.
"""
from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import message
from . import dlpack, streams, words
from .dlpack import EXPORT_ERRORS
from .streams import Home, Stream
from .view import CPU, EIGHT_BIT, FLOATS, ITEMSIZE, LENGTHS, NAMES, NO_NUMPY, Library, Output, Shape, View, contiguous, numpy_dtype

# ---------------------------------------------------------------- errors of every reader
_OF_Q = "q's dtype"
_TAKES = (dict.fromkeys(("k", "v", "dout", "out"), (_OF_Q,)) | dict.fromkeys(("alibi_slopes", "sinks"), ("float32", "float64", _OF_Q))
          | dict.fromkeys(("lse", "dlse", "lses"), ("float32", "float64 for float64 input"))
          | {"mask": ("bool",), "bias": ("float32", _OF_Q)})


def _takes(argument: str) -> tuple[str, ...]:
    """The dtypes of an argument, by its name, in words; for cumulative and used lengths those of integers."""
    return LENGTHS if argument.startswith(("cu_", "seqused", "cache_", "block_table")) else _TAKES.get(argument.partition("[")[0], FLOATS)


def wrong_dtype(name: str, call: str, argument: str, x: Any) -> TypeError:
    """The error for a dtype that no argument takes, with the cast that x's library has."""
    takes = _takes(argument)
    hint = words.like(argument, x, "q") if takes[0] == _OF_Q else words.cast(argument, x, takes[0])
    if hint and name.startswith(("object", "complex", "str", "bytes", "void")):
        hint += " if it holds real numbers"
    if hint and argument == "bias":
        hint += f", and a mask of what may be attended goes in mask=, as {words.cast(argument, x, 'bool').removesuffix(' works')}"
    if name.startswith("float8") and argument in ("q", "k", "v"):
        hint = f"of 8-bit floats {' and '.join(EIGHT_BIT)} are taken{hint and f'; {hint}'}"
    return TypeError(message(call, argument, f"has dtype {name}", " or ".join(takes), hint))


def dtype_name(dtype: np.dtype[Any], call: str, argument: str, x: Any) -> str:
    """The name of the dtype that an array x has; TypeError for one that no argument takes."""
    name = NAMES.get(dtype)
    if name is None and dtype.name in NO_NUMPY and dtype == numpy_dtype(dtype.name):
        return dtype.name
    if name is None:
        raise wrong_dtype(dtype.name, call, argument, x)
    return name


def cannot(x: Any, why: object, call: str, argument: str) -> TypeError:
    """The error for an array whose memory its library does not give.

    An ImportError or MemoryError is raised as it is.
    """
    if isinstance(why, (ImportError, MemoryError)):
        raise why
    return TypeError(message(call, argument, f"({type(x).__name__}) cannot be exported: {why}", "an array that speaks DLPack"))


def requires_grad(call: str, argument: str) -> TypeError:
    hint = f"fastattn.torch.{call} has gradients, and {argument}.detach() drops them" if call in words.DIFFERENTIABLE else \
        f"pass {argument}.detach()"
    return TypeError(message(call, argument, "requires grad, which fastattn would drop from the graph", "a tensor without grad", hint))


# ---------------------------------------------------------------- NumPy
def slow_numpy(x: np.ndarray[Any, Any], call: str, argument: str) -> tuple[np.ndarray[Any, Any], str]:
    """An ndarray off the fast path, and its dtype's name. A first bfloat16 array is read; a subclass is read as a plain
    array over the same memory; anything else gets the error that fits.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(message(call, argument, "is a masked array", "a plain array",
                                f"pass {argument}.data, and what may be attended in mask="))
    x = np.asarray(x)                                       # a subclass may override what is read below
    dtype = x.dtype
    if not dtype.isnative:
        hint = f"{argument}.astype({argument}.dtype.newbyteorder('=')) works"
        raise TypeError(message(call, argument, f"has dtype {dtype.name} in the other byte order ({dtype.str})",
                                f"{' or '.join(_takes(argument))} in this machine's byte order", hint))
    name = dtype_name(dtype, call, argument, x)
    if not x.flags.aligned:
        raise ValueError(message(call, argument, f"is misaligned (strides {x.strides})",
                                 f"addresses and strides that are multiples of {dtype.itemsize} bytes",
                                 f"np.require({argument}, requirements='A') makes an aligned copy"))
    return x, name


# ---------------------------------------------------------------- DLPack
def _from_dlpack(x: Any, call: str, argument: str, stream: Stream | None) -> View:
    """The View of a DLPack producer.

    The producer makes our stream wait for its own work. `owner` keeps the capsule alive.
    """
    if words.in_graph(x):
        raise requires_grad(call, argument)
    try:
        number, index = map(int, x.__dlpack_device__())
    except EXPORT_ERRORS as error:
        raise cannot(x, error, call, argument) from error
    kind = dlpack.DEVICES.get(number)
    if kind is None:
        raise TypeError(message(call, argument, f"is on DLPack device {(number, index)}", "a CPU or CUDA array"))
    ours = kind == "cuda" and stream is not None and stream.device == index
    keywords = {"stream": stream.handle} if stream is not None and ours else {}         # our handles are DLPack's numbers
    try:
        with streams.on_device(index) if ours else contextlib.nullcontext():            # torch exports only from the current device
            try:
                capsule = x.__dlpack__(max_version=(1, 0), **keywords)
            except TypeError:                               # a producer older than DLPack 1.0
                capsule = x.__dlpack__(**keywords)
        d = dlpack.described(capsule)
    except EXPORT_ERRORS as error:
        raise cannot(x, error, call, argument) from error
    if d.dtype not in ITEMSIZE:
        raise wrong_dtype(d.dtype, call, argument, x)
    device = (kind, index) if kind == "cuda" else CPU
    if dlpack.DEVICES.get(d.device[0]) != kind or (kind == "cuda" and d.device[1] != index):
        has = f"is on DLPack device {d.device} by its capsule and {(number, index)} by __dlpack_device__"
        raise ValueError(message(call, argument, has, "one device"))
    size = ITEMSIZE[d.dtype]
    strides = None if d.strides is None else tuple([s * size for s in d.strides])
    readonly = d.readonly or words.root(x) in ("jax", "jaxlib")     # immutable, whether or not the capsule says so
    return _possible(View(d.ptr, d.shape, strides or (), d.dtype, device, (x, capsule), readonly), strides is None, call, argument)


def _possible(x: View, packed: bool, call: str, argument: str) -> View:
    """x, or ValueError where no memory can have the shape, strides and address that another library gave.

    `packed`: the library gave no strides, so x gets those of a contiguous array.
    """
    size, where = x.itemsize, "an array in memory"
    if any(n < 0 for n in x.shape):
        raise ValueError(message(call, argument, f"has shape {x.shape}", "lengths of 0 or more"))
    if packed:
        x.strides = contiguous(x.shape, size)
    if len(x.strides) != len(x.shape):
        raise ValueError(message(call, argument, f"has strides {x.strides} for shape {x.shape}", "one for each axis"))
    low, high = x.bytes_range()
    span = size * math.prod([max(n, 1) for n in x.shape])
    if high >= 2**64 or max(high - low, span, *map(abs, x.strides), 0) >= 2**63:
        raise ValueError(message(call, argument, f"has shape {x.shape} and strides {x.strides} in bytes, beyond any memory", where))
    if 0 in x.shape:
        return x
    if x.ptr == 0 or low < 0:
        raise ValueError(message(call, argument, f"has elements, shape {x.shape}, at address {low}", where))
    if x.ptr % size or any(s % size for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        raise ValueError(message(call, argument, f"is misaligned (address {x.ptr:#x}, strides {x.strides})",
                                 f"addresses and strides that are multiples of {size} bytes", "a copy of it is aligned"))
    return x


def _dlpack_home(x: Any, call: str) -> Home | None:
    """The legacy default stream: a producer orders itself before whatever stream it is given, and names none of its
    own.
    """
    try:
        number, index = map(int, x.__dlpack_device__())
    except EXPORT_ERRORS:
        return None                                         # the reader raises the error
    return Home(index, streams.LEGACY) if dlpack.DEVICES.get(number) == "cuda" else None


# ---------------------------------------------------------------- the CUDA Array Interface
class _Wrong(Exception):
    """An entry of a __cuda_array_interface__ is wrong. Arguments: the entry, what it is, what was expected."""


class _Interface(NamedTuple):
    """The entries of a __cuda_array_interface__, each of its type."""

    ptr: int
    readonly: bool
    shape: Shape
    strides: Shape | None
    typestr: str
    masked: bool
    stream: int | None


def _interface(x: Any) -> _Interface:
    """x's __cuda_array_interface__; _Wrong where an entry is missing or of another type."""
    said = x.__cuda_array_interface__
    if not isinstance(said, dict):
        raise _Wrong("", f"is {words.kind(said)}", "a dictionary")
    for name in ("shape", "typestr", "data", "version"):
        if name not in said:
            raise _Wrong(name, "is missing", "shape, typestr, data and version")

    def integer(name: str, n: Any, low: int = -2**63, high: int = 2**63 - 1) -> int:
        try:
            plain = operator.index(n)
        except TypeError:
            raise _Wrong(name, f"is {words.shown(said[name])}", "integers" if name in ("shape", "strides") else "an integer") from None
        if isinstance(n, bool) or not low <= plain <= high:
            raise _Wrong(name, f"is {words.shown(said[name])}", f"at least {low}" if plain < low else f"at most {high}")
        return plain

    def integers(name: str) -> Shape:
        if not isinstance(said[name], (tuple, list)):
            raise _Wrong(name, f"is {words.shown(said[name])}", "a tuple of integers")
        return tuple([integer(name, n) for n in said[name]])
    integer("version", said["version"], 0, 3)
    data = said["data"]
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise _Wrong("data", f"is {words.shown(data)}", "a pair (pointer, read-only)")
    typestr, stream = said["typestr"], said.get("stream")
    if not isinstance(typestr, str):
        raise _Wrong("typestr", f"is {words.shown(typestr)}", "a string")
    return _Interface(0 if data[0] is None else integer("data", data[0], 0, 2**64 - 1), bool(data[1]), integers("shape"),
                      None if said.get("strides") is None else integers("strides"), typestr, said.get("mask") is not None,
                      None if stream is None else integer("stream", stream, 0, 2**64 - 1))


def _from_interface(x: Any, call: str, argument: str, stream: Stream | None) -> View:
    """The View of a CUDA array without DLPack. The interface does not name the device, so the driver is asked."""
    try:
        said = _interface(x)
        dtype = np.dtype(said.typestr)
    except _Wrong as wrong:
        entry, has, expected = wrong.args
        has = f"has a __cuda_array_interface__ whose {entry} {has}" if entry else f"has a __cuda_array_interface__ that {has}"
        raise TypeError(message(call, argument, has, expected)) from None
    except EXPORT_ERRORS as error:
        raise cannot(x, error, call, argument) from error
    if dtype.kind == "V" and dtype.itemsize == 2:
        has = f"has type string {said.typestr!r} in __cuda_array_interface__, which has no code for bfloat16"
        raise TypeError(message(call, argument, has, " or ".join(_takes(argument)),
                                "an array that speaks DLPack (torch, CuPy, JAX) can say that it is bfloat16"))
    if said.masked:
        raise TypeError(message(call, argument, "has a mask", "a plain array", "what may be attended goes in mask="))
    name = NAMES.get(dtype)
    if name is None:
        raise wrong_dtype(dtype.str, call, argument, x)
    found = View(said.ptr, said.shape, said.strides or (), name, ("cuda", 0), x, said.readonly)
    found = _possible(found, said.strides is None, call, argument)
    number = streams.device_of(said.ptr) if said.ptr else 0 if stream is None else stream.device
    found.device = "cuda", number
    if said.stream is not None and stream is not None and stream.device == number:
        streams.wait(stream, streams.normal(said.stream))
    return found


def _interface_home(x: Any, call: str) -> Home:
    try:
        said = _interface(x)
    except EXPORT_ERRORS:
        return Home(0, streams.LEGACY)                      # the reader raises the error
    return Home(streams.device_of(said.ptr) if said.ptr else 0, streams.normal(said.stream or 0))


# ---------------------------------------------------------------- results for arrays of any library
def hand_over(producer: Any, array: Any) -> Any:
    """`array` as an array of the producer's namespace: shared by DLPack, or by asarray where NumPy cannot export
    (bfloat16).

    A DeviceArray that the namespace cannot import stays one, because asarray would copy it to the host.
    """
    namespace = producer.__array_namespace__()
    try:
        return namespace.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError):
        if not isinstance(array, np.ndarray):
            return array
        return namespace.asarray(array)


def importer(producer: Any, view: View) -> Callable[[Any], Any] | None:
    """What makes a filled host array, which has this View, one of the producer's library; None where no way is known."""
    if hasattr(producer, "__array_namespace__"):
        return lambda filled: hand_over(producer, filled)
    if words.root(producer) == "tensorflow":                # it has DLPack and no array namespace
        return lambda filled: sys.modules["tensorflow"].experimental.dlpack.from_dlpack(view.__dlpack__())
    return None


def empty_device_array(producer: Any, shape: Shape, dtype: str, stream: Stream) -> Output:
    """A DeviceArray. `finish` hands it over to the producer's array namespace, where there is one."""
    from .device_array import DeviceArray

    array = DeviceArray(shape, dtype, stream)
    if not hasattr(producer, "__array_namespace__"):
        return Output(array.view(), array)
    return Output(array.view(), array, lambda filled: hand_over(producer, filled))


DLPACK = Library(_from_dlpack, _dlpack_home, empty_device_array)
INTERFACE = Library(_from_interface, _interface_home, empty_device_array)
