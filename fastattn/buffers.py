"""Where arrays are: the `View` of a NumPy, DLPack or CUDA array, and outputs allocated in the caller's own library.

Nothing here copies an input. libraries.py knows the array libraries by name, dlpack.py the capsules, streams.py the streams.
Sources: the CUDA Array Interface version 3 (Numba manual), NumPy's array interface.
"""
from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import dlpack, streams, words
from .errors import message
from .streams import Home, Stream

Device = tuple[str, int]
CPU: Device = ("cpu", 0)
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "bool": 1, "int32": 4, "int64": 8}
_NAMES: dict[np.dtype[Any], str] = {np.dtype(name): name for name in ITEMSIZE if name != "bfloat16"}
_DTYPES: dict[str, np.dtype[Any]] = {name: dtype for dtype, name in _NAMES.items()}
FLOATS, LENGTHS = ("float32", "float64", "float16", "bfloat16"), ("int32", "int64")


class Grads(NamedTuple):
    """Gradients, each with its input's shape, layout and dtype; between api and engine the same tuple holds Views."""

    dq: Any
    dk: Any
    dv: Any
    dbias: Any = None
    dsinks: Any = None


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a dtype name; bfloat16 is ml_dtypes', imported on first use."""
    if name not in _DTYPES:
        import ml_dtypes

        _DTYPES[name] = np.dtype(ml_dtypes.bfloat16)
        _NAMES[_DTYPES[name]] = name
    return _DTYPES[name]


@dataclass(slots=True, eq=False)
class View:
    """Memory of an array: address, shape, strides in bytes, dtype name, device; `owner` keeps it alive.

    Never changed once made. Not declared frozen, because that makes it five times as slow to make (0.7 us), and a call makes five.
    """

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: Device = CPU
    owner: object = field(default=None, repr=False)
    readonly: bool = False

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    def permute(self, axes: tuple[int, ...]) -> View:
        """The same memory with axis i of the result being axis axes[i] of this view."""
        shape, strides = self.shape, self.strides
        return View(self.ptr, tuple([shape[a] for a in axes]), tuple([strides[a] for a in axes]), self.dtype, self.device,
                    self.owner, self.readonly)

    def broadcast_to(self, shape: tuple[int, ...]) -> View:
        """The same memory seen with `shape`: broadcast axes get stride 0. ValueError where NumPy's rules forbid it."""
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
        """A capsule of the same memory, for engines of other packages. `stream` waits for nothing: they work on their call's."""
        kind, index = self.__dlpack_device__()
        if copy or (dl_device is not None and tuple(map(int, dl_device)) != (kind, index)):
            raise BufferError("a View is exported as it is: without a copy, on its own device")
        return dlpack.capsule(self, self.ptr, self.shape, self.strides, self.dtype, index, max_version, kind)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.device[0] == "cpu" or self.dtype == "bfloat16":
            raise AttributeError("host memory and bfloat16 have no __cuda_array_interface__; __dlpack__ is there")
        typestr = "|b1" if self.dtype == "bool" else f"<{self.dtype[0]}{self.itemsize}"
        return {"version": 3, "shape": self.shape, "strides": self.strides, "typestr": typestr, "data": (self.ptr, self.readonly),
                "stream": None}


class _Interface:
    """What NumPy reads a View through. Raw bytes of the item's size, because NumPy has no type string for bfloat16.
    Only address arithmetic may be done with the array of a CUDA view."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.__array_interface__ = {"version": 3, "data": (view.ptr, view.readonly), "shape": view.shape,
                                    "strides": view.strides, "typestr": f"|V{view.itemsize}"}


def overlap(a: View, b: View) -> bool:
    """Whether two views share an element; True also where finding out would take too long. Nothing is read."""
    (a_low, a_high), (b_low, b_high) = a.bytes_range(), b.bytes_range()
    if a_low >= b_high or b_low >= a_high:
        return False
    work: Any = 10_000                                      # NumPy's stubs know -1 and 0 only
    try:
        return np.shares_memory(np.asarray(_Interface(a)), np.asarray(_Interface(b)), max_work=work)
    except np.exceptions.TooHardError:
        return True


# ---------------------------------------------------------------- any array -> View
class Quick(NamedTuple):
    """How arrays of one type in CUDA memory are read and made where nothing has to be checked any more (repeat.py)."""

    form: Callable[[Any], Any]                              # all that a View says but the address, to be compared; None: host memory
    address: Callable[[Any], int]
    stream: Callable[[Any], int]                            # its library's current one on its device; 0: none, or not to be used
    empty: Callable[[Any, tuple[int, ...], str], tuple[Any, int]]   # beside an array; with its address


class Library(NamedTuple):
    """How one kind of array is read and made; libraries.py has those that are known by name."""

    view: Callable[[Any, str, str, Stream | None], View]
    home: Callable[[Any, str], Home | None]                 # of an array in a call, whose first it is; None: host memory
    empty: Callable[[Any, tuple[int, ...], str, Stream], Output]    # in CUDA memory
    quick: Quick | None = None
    written: Callable[[Any], Any] | None = None             # tells the library that an array's memory was written to; gives the array


def view(x: Any, call: str, argument: str, stream: Stream | None = None) -> View:
    """The View of an ndarray, of a CPU or CUDA DLPack producer (torch, JAX, CuPy) or of a `__cuda_array_interface__`.

    `stream`, the call's, then waits for the work that makes x, where that is on another. Raises TypeError, naming `call` and
    `argument`, for anything else and for dtypes that no argument takes.
    """
    known = _libraries.get(type(x))
    if known is not None:
        return known.view(x, call, argument, stream)
    if isinstance(x, np.ndarray):
        name = _NAMES.get(x.dtype)
        flags = x.flags
        if name is None or not flags.aligned or type(x) is not np.ndarray:
            x, name = _slow_numpy(x, call, argument)
        return View(x.__array_interface__["data"][0], x.shape, x.strides, name, CPU, x, not flags.writeable)
    return _library(x, call, argument).view(x, call, argument, stream)


def resolve(stream: Any, q: Any, call: str) -> Stream | None:
    """The stream that a call with this q runs on; None in host memory. Errors: see streams.resolve."""
    home = None if isinstance(q, np.ndarray) else _library(q, call, "q").home(q, call)
    return streams.resolve(stream, home, call)


_libraries: dict[type, Library] = {}                        # by the type of the array, as they come


def quick(x: Any) -> Quick | None:
    """How arrays of x's type are read without checks, once one was read with them."""
    known = _libraries.get(type(x))
    return None if known is None else known.quick


def _library(x: Any, call: str, argument: str) -> Library:
    """Who reads x: a library known by name, else DLPack, else the CUDA Array Interface, else TypeError."""
    found = _libraries.get(type(x))
    if found is not None:
        return found
    from . import libraries

    known = libraries.find(x)
    if known is not None:
        _libraries[type(x)] = known
        return known
    stand_in = words.transformed(x)
    if stand_in is not None:
        raise TypeError(message(call, argument, stand_in[0], "an array", stand_in[1]))
    if _has(x, "__dlpack__") and _has(x, "__dlpack_device__"):
        return DLPACK
    if _has(x, "__cuda_array_interface__"):
        return INTERFACE
    hint = f"{argument}.compute() gives one" if words.root(x) == "dask" else f"np.asarray({argument}) makes one of numbers"
    raise TypeError(message(call, argument, f"is {words.kind(x)}", "a NumPy array or an array that speaks DLPack", hint))


def _has(x: Any, name: str) -> bool:
    """Whether x has an attribute; also where asking raises, which its reader will tell."""
    try:
        return hasattr(x, name)
    except _EXPORT_ERRORS:
        return True


def in_device_memory(x: Any) -> bool:
    """Whether a number in x is on a device, where reading it would stop the host."""
    if isinstance(x, np.ndarray):
        return False
    try:
        if hasattr(x, "__dlpack_device__"):
            return dlpack.DEVICES.get(int(x.__dlpack_device__()[0])) != "cpu"
        return hasattr(x, "__cuda_array_interface__")
    except _EXPORT_ERRORS:
        return False


def written(x: Any) -> Callable[[Any], Any] | None:
    """How x's library is told that its memory was written to, once x was read; None where it need not be."""
    known = _libraries.get(type(x))
    return None if known is None else known.written


def small(x: Any, dtype: str | None, call: str, argument: str, stream: Stream | None = None) -> View:
    """Like `view`, but lists and tuples of numbers are accepted too: of `dtype` (a float one), or integers if None.
    Not beside CUDA arrays: a copy to the device in every call would wait for the host, and break graphs."""
    if not isinstance(x, (list, tuple)):
        return view(x, call, argument, stream)
    if stream is not None:
        raise TypeError(message(call, argument, f"is a {type(x).__name__}", f"an array on q's device, ('cuda', {stream.device})",
                                f"make it once, as torch.tensor({argument}, device='cuda') or cupy.asarray({argument}) do"))
    try:
        a = np.asarray(x)
    except Exception:                                       # what it holds may raise anything
        raise TypeError(message(call, argument, f"is {words.kind(x)} of unequal parts", "numbers")) from None
    if a.dtype.kind in "iuf" and dtype is not None:
        a = a.astype(numpy_dtype(dtype))
    elif a.dtype.kind not in "iuf" or a.dtype.kind == "u":
        has = f"is {words.kind(x)} of numbers beyond int64" if a.dtype.kind == "u" else f"is {words.shown(x)}"
        raise TypeError(message(call, argument, has, "numbers"))
    return view(a, call, argument)


def _slow_numpy(x: np.ndarray[Any, Any], call: str, argument: str) -> tuple[np.ndarray[Any, Any], str]:
    """An ndarray off the fast path, and its dtype's name: bfloat16 seen first, subclasses as the plain array that they are over the same
    memory; else the error that fits."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(message(call, argument, "is a masked array", "a plain array",
                                f"pass {argument}.data, and what may be attended in mask="))
    x = np.asarray(x)                                       # a subclass may say anything of itself
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


# ---------------------------------------------------------------- DLPack and the CUDA Array Interface
def _takes(argument: str) -> tuple[str, ...]:
    """The dtypes of an argument, by its name: cumulative and used lengths, mask, all others."""
    return LENGTHS if argument.startswith(("cu_", "seqused")) else ("bool",) if argument == "mask" else FLOATS


def wrong_dtype(name: str, call: str, argument: str, x: Any) -> TypeError:
    """The error for a dtype that no argument takes, with the cast that x's library has."""
    takes = _takes(argument)
    hint = words.cast(argument, x, takes[0])
    if hint and name.startswith(("object", "complex", "str", "bytes", "void")):
        hint += " if it holds real numbers"
    if hint and argument == "bias":
        hint += f", and a mask of what may be attended goes in mask=, as {words.cast(argument, x, 'bool').removesuffix(' works')}"
    return TypeError(message(call, argument, f"has dtype {name}", " or ".join(takes), hint))


def dtype_name(dtype: np.dtype[Any], call: str, argument: str, x: Any) -> str:
    """The name of the dtype that an array x has; TypeError for one that no argument takes."""
    name = _NAMES.get(dtype)
    if name is None and dtype.name == "bfloat16" and dtype == numpy_dtype("bfloat16"):
        return "bfloat16"
    if name is None:
        raise wrong_dtype(dtype.name, call, argument, x)
    return name


def cannot(x: Any, why: object, call: str, argument: str) -> TypeError:
    """The error for an array whose memory its library does not give. What is missing, memory or a package, is told as it is."""
    if isinstance(why, (ImportError, MemoryError)):
        raise why
    return TypeError(message(call, argument, f"({type(x).__name__}) cannot be exported: {why}", "an array that speaks DLPack"))


def requires_grad(call: str, argument: str) -> TypeError:
    return TypeError(message(call, argument, "requires grad, which fastattn would drop from the graph", "a tensor without grad",
                             f"pass {argument}.detach(), and call the backward function with the gradient"))


_EXPORT_ERRORS = (Exception,)                               # whatever another library's code raises


def _from_dlpack(x: Any, call: str, argument: str, stream: Stream | None) -> View:
    """The View of a DLPack producer, which makes our stream wait for its own work. The capsule lives in `owner`."""
    if words.in_graph(x):
        raise requires_grad(call, argument)
    try:
        number, index = map(int, x.__dlpack_device__())
    except _EXPORT_ERRORS as error:
        raise cannot(x, error, call, argument) from error
    kind = dlpack.DEVICES.get(number)
    if kind is None:
        raise TypeError(message(call, argument, f"is on DLPack device {(number, index)}", "a CPU or CUDA array"))
    ours = kind == "cuda" and stream is not None and stream.device == index
    keywords = {"stream": stream.handle} if stream is not None and ours else {}         # our numbers are DLPack's
    try:
        with streams.on_device(index) if ours else contextlib.nullcontext():            # torch exports from no other
            try:
                capsule = x.__dlpack__(max_version=(1, 0), **keywords)
            except TypeError:                               # a producer older than DLPack 1.0
                capsule = x.__dlpack__(**keywords)
        d = dlpack.described(capsule)
    except _EXPORT_ERRORS as error:
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
    """x, or ValueError where no memory can be what another library says of it; `packed` gives it the strides of a contiguous array."""
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
    """The producer waits on whatever stream it is given, so without the caller's word it is the legacy default one."""
    try:
        number, index = map(int, x.__dlpack_device__())
    except _EXPORT_ERRORS:
        return None                                         # the reader says what is wrong
    return Home(index, streams.LEGACY) if dlpack.DEVICES.get(number) == "cuda" else None


class _Wrong(Exception):
    """What is wrong with a __cuda_array_interface__: the entry, what it is, what was expected."""


def _interface(x: Any) -> tuple[int, bool, tuple[int, ...], tuple[int, ...] | None, str, bool, int | None]:
    """(pointer, read-only, shape, strides, type string, whether there is a mask, stream) of a __cuda_array_interface__, each of its type;
    _Wrong where one is not."""
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

    def integers(name: str) -> tuple[int, ...]:
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
    return (0 if data[0] is None else integer("data", data[0], 0, 2**64 - 1), bool(data[1]), integers("shape"),
            None if said.get("strides") is None else integers("strides"), typestr, said.get("mask") is not None,
            None if stream is None else integer("stream", stream, 0, 2**64 - 1))


def _from_interface(x: Any, call: str, argument: str, stream: Stream | None) -> View:
    """The View of a CUDA array without DLPack. The interface does not name the device, so the driver is asked."""
    try:
        ptr, readonly, shape, strides, typestr, masked, producer = _interface(x)
        dtype = np.dtype(typestr)
    except _Wrong as wrong:
        entry, has, expected = wrong.args
        has = f"has a __cuda_array_interface__ whose {entry} {has}" if entry else f"has a __cuda_array_interface__ that {has}"
        raise TypeError(message(call, argument, has, expected)) from None
    except _EXPORT_ERRORS as error:
        raise cannot(x, error, call, argument) from error
    if dtype.kind == "V" and dtype.itemsize == 2:
        raise TypeError(message(call, argument, f"has type string {typestr!r} in __cuda_array_interface__, which has no code for bfloat16",
                                " or ".join(_takes(argument)),
                                "an array that speaks DLPack (torch, CuPy, JAX) can say that it is bfloat16"))
    if masked:
        raise TypeError(message(call, argument, "has a mask", "a plain array", "what may be attended goes in mask="))
    name = _NAMES.get(dtype)
    if name is None:
        raise wrong_dtype(dtype.str, call, argument, x)
    place = _possible(View(ptr, shape, strides or (), name, ("cuda", 0), x, readonly), strides is None, call, argument)
    number = streams.device_of(ptr) if ptr else 0 if stream is None else stream.device
    place.device = "cuda", number
    if producer is not None and stream is not None and stream.device == number:
        streams.wait(stream, streams.normal(producer))
    return place


def _interface_home(x: Any, call: str) -> Home:
    try:
        ptr, *_, producer = _interface(x)
    except _EXPORT_ERRORS:
        return Home(0, streams.LEGACY)                      # the reader says what is wrong
    return Home(streams.device_of(ptr) if ptr else 0, streams.normal(producer or 0))


def contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a C-contiguous array."""
    return tuple(itemsize * math.prod(shape[i + 1:]) for i in range(len(shape)))


# ---------------------------------------------------------------- outputs in the caller's own library
class Output:
    """A new array: an engine fills `view`, then `finish()` gives it in the caller's kind."""

    __slots__ = ("_array", "_convert", "view")

    def __init__(self, view: View, array: Any, convert: Callable[[Any], Any] | None = None) -> None:
        self.view, self._array, self._convert = view, array, convert

    def finish(self) -> Any:
        return self._array if self._convert is None else self._convert(self._array)


def allocate(producer: Any, shape: tuple[int, ...], dtype: str, stream: Stream | None = None) -> Output:
    """An uninitialised contiguous array of the kind of `producer`, in CUDA memory of the stream's device, or the host's if None.

    Host: ndarray, torch tensor, or what the producer's array namespace makes of an ndarray once it is filled (its arrays may
    be immutable, JAX's are); ndarray where none is known. CUDA: see libraries.py; a DeviceArray where none is known.
    """
    if stream is not None:
        return _library(producer, "allocate", "producer").empty(producer, shape, dtype, stream)
    if not isinstance(producer, np.ndarray):
        torch: Any = sys.modules.get("torch")               # a torch tensor came in, so its library is loaded
        if torch is not None and isinstance(producer, torch.Tensor):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            return Output(view(tensor, "allocate", "out"), tensor)
    array = np.empty(shape, numpy_dtype(dtype))
    place = View(array.__array_interface__["data"][0], shape, array.strides, dtype, CPU, array)
    if isinstance(producer, np.ndarray) or not hasattr(producer, "__array_namespace__"):
        return Output(place, array)
    return Output(place, array, lambda filled: _hand_over(producer, filled))


def _hand_over(producer: Any, array: Any) -> Any:
    """`array` as an array of the producer's namespace: shared by DLPack, or by asarray where NumPy cannot export (bfloat16).
    A DeviceArray stays one where the namespace cannot import it: asarray would copy it to the host."""
    namespace = producer.__array_namespace__()
    try:
        return namespace.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError):
        if not isinstance(array, np.ndarray):
            return array
        return namespace.asarray(array)


def empty_device_array(producer: Any, shape: tuple[int, ...], dtype: str, stream: Stream) -> Output:
    """A DeviceArray, handed over through the producer's array namespace, where it has one, once work that fills it is enqueued."""
    from .device_array import DeviceArray

    array = DeviceArray(shape, dtype, stream)
    if not hasattr(producer, "__array_namespace__"):
        return Output(array.view(), array)
    return Output(array.view(), array, lambda filled: _hand_over(producer, filled))


DLPACK = Library(_from_dlpack, _dlpack_home, empty_device_array)
INTERFACE = Library(_from_interface, _interface_home, empty_device_array)
