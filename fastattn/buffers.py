"""Where arrays are: the `View` of a NumPy, DLPack or CUDA array, and outputs allocated in the caller's own library.

Nothing here copies an input. Sources: the DLPack C header (dmlc/dlpack, versions 0.x and 1.x), the CUDA Array Interface
version 3 (Numba manual), NumPy's array interface.
"""
from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .errors import message

Device = tuple[str, int]
CPU: Device = ("cpu", 0)
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "bool": 1, "int32": 4, "int64": 8}
_NAMES: dict[np.dtype[Any], str] = {np.dtype(name): name for name in ITEMSIZE if name != "bfloat16"}
_DTYPES: dict[str, np.dtype[Any]] = {name: dtype for dtype, name in _NAMES.items()}
_EXPECTED = "float32, float64, float16, bfloat16, bool, int32 or int64 in this machine's byte order"


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


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Memory of an array: address, shape, strides in bytes, dtype name, device; `owner` keeps it alive."""

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
        if 0 in self.shape:
            return self.ptr, self.ptr
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        return self.ptr + sum(r for r in reach if r < 0), self.ptr + sum(r for r in reach if r > 0) + self.itemsize

    def numpy(self) -> np.ndarray[Any, Any]:
        """A zero-copy ndarray of a CPU view; it keeps the owner alive."""
        dtype = numpy_dtype(self.dtype)
        if self.device[0] != "cpu":
            raise ValueError(f"a view on {self.device} has no NumPy array")
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        return np.asarray(_Interface(self)).view(dtype)


class _Interface:
    """What NumPy reads a View through. Raw bytes of the item's size, because NumPy has no type string for bfloat16."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.__array_interface__ = {"version": 3, "data": (view.ptr, view.readonly), "shape": view.shape,
                                    "strides": view.strides, "typestr": f"|V{view.itemsize}"}


def overlap(a: View, b: View) -> bool:
    """Whether two views share an element; True also where finding out would take too long."""
    (a_low, a_high), (b_low, b_high) = a.bytes_range(), b.bytes_range()
    if a_low >= b_high or b_low >= a_high:
        return False
    if a.device[0] != "cpu":
        return True
    work: Any = 10_000                                      # NumPy's stubs know -1 and 0 only
    try:
        return np.shares_memory(a.numpy(), b.numpy(), max_work=work)
    except np.exceptions.TooHardError:
        return True


# ---------------------------------------------------------------- any array -> View
def view(x: Any, call: str, argument: str) -> View:
    """The View of an ndarray, of a CPU or CUDA DLPack producer (torch, JAX, CuPy) or of a `__cuda_array_interface__`.

    Raises TypeError, naming `call` and `argument`, for anything else and for dtypes that no argument takes.
    """
    if type(x) is np.ndarray or isinstance(x, np.ndarray):
        name = _NAMES.get(x.dtype)
        flags = x.flags
        if name is None or not flags.aligned or type(x) is not np.ndarray:
            name = _slow_numpy(x, call, argument)
        return View(x.__array_interface__["data"][0], x.shape, x.strides, name, CPU, x, not flags.writeable)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _from_dlpack(x, call, argument)
    if hasattr(x, "__cuda_array_interface__"):
        return _from_cuda_array_interface(x, call, argument)
    raise TypeError(message(call, argument, f"is a {type(x).__name__}", "a NumPy array or an array that speaks DLPack",
                            f"np.asarray({argument}) makes one of numbers"))


def small(x: Any, dtype: str | None, call: str, argument: str) -> View:
    """Like `view`, but lists and tuples of numbers are accepted too: of `dtype` (a float one), or integers if None."""
    if not isinstance(x, (list, tuple)):
        return view(x, call, argument)
    try:
        a = np.asarray(x)
    except (ValueError, OverflowError):
        raise TypeError(message(call, argument, f"is a {type(x).__name__} of unequal parts", "numbers")) from None
    if a.dtype.kind in "iuf" and dtype is not None:
        a = a.astype(numpy_dtype(dtype))
    return view(a, call, argument)


def _slow_numpy(x: np.ndarray[Any, Any], call: str, argument: str) -> str:
    """The dtype name of an ndarray off the fast path: bfloat16 seen first, subclasses; else the error that fits."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(message(call, argument, "is a masked array", "a plain array",
                                f"pass {argument}.data, and what may be attended in mask="))
    dtype = x.dtype
    if dtype.name == "bfloat16" and dtype == numpy_dtype("bfloat16"):
        name: str | None = "bfloat16"
    else:
        name = _NAMES.get(dtype)
    if name is None:
        if not dtype.isnative:
            hint = f"{argument}.astype({argument}.dtype.newbyteorder('=')) works"
            raise TypeError(message(call, argument, f"has dtype {dtype.name} in the other byte order ({dtype.str})", _EXPECTED, hint))
        hint = f"{argument}.astype(np.float32) works if it holds real numbers"
        raise TypeError(message(call, argument, f"has dtype {dtype.name}", _EXPECTED, hint))
    if not x.flags.aligned:
        raise ValueError(message(call, argument, f"is misaligned (strides {x.strides})",
                                 f"addresses and strides that are multiples of {dtype.itemsize} bytes",
                                 f"np.require({argument}, requirements='A') makes an aligned copy"))
    return name


# ---------------------------------------------------------------- DLPack
class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64)]


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("manager_ctx", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _DLTensor)]


_DL_DTYPES = {(2, 32): "float32", (2, 64): "float64", (2, 16): "float16", (4, 16): "bfloat16", (6, 8): "bool",
              (0, 32): "int32", (0, 64): "int64"}
_DL_KINDS = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 5: "complex", 6: "bool"}
_DL_DEVICES = {1: "cpu", 3: "cpu", 2: "cuda", 13: "cuda"}    # 3 is pinned host memory, 13 CUDA managed memory
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype, _capsule_is.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _from_dlpack(x: Any, call: str, argument: str) -> View:
    """The View of a DLPack producer. The capsule is never marked as used: it lives in `owner`, and its own destructor
    gives the memory back. NumPy's reader would not do, it knows no bfloat16."""
    if getattr(x, "requires_grad", False) is True:
        raise TypeError(message(call, argument, "requires grad, which fastattn would drop from the graph", "a tensor without grad",
                                f"pass {argument}.detach(), and call the backward function with the gradient"))
    kind = _DL_DEVICES.get(int(x.__dlpack_device__()[0]))
    if kind is None:
        raise TypeError(message(call, argument, f"is on DLPack device {tuple(map(int, x.__dlpack_device__()))}", "a CPU or CUDA array"))
    # -1: the producer does not synchronise; ordering on streams is the GPU engine's work
    keywords: dict[str, Any] = {} if kind == "cpu" else {"stream": -1}
    try:
        try:
            capsule = x.__dlpack__(max_version=(1, 0), **keywords)
        except TypeError:                                   # a producer older than DLPack 1.0
            capsule = x.__dlpack__(**keywords)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        has = f"({type(x).__name__}) cannot be exported: {error}"
        raise TypeError(message(call, argument, has, "an array that speaks DLPack")) from error
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _DLManagedTensorVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise TypeError(message(call, argument, f"speaks DLPack {managed.major}.{managed.minor}", "DLPack 1.x or older"))
        tensor, readonly = managed.tensor, bool(managed.flags & 1)
    else:
        # the old protocol has no read-only flag, and JAX's arrays are immutable: inputs yes, outputs no
        tensor, readonly = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor")), True
    name = _DL_DTYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if name is None:
        kind_name = _DL_KINDS.get(tensor.code, f"code {tensor.code}, bits ")
        raise TypeError(message(call, argument, f"has dtype {kind_name}{tensor.bits}", _EXPECTED))
    shape = tuple(tensor.shape[:tensor.ndim])
    strides = _contiguous(shape, 1) if not tensor.strides else tuple(tensor.strides[:tensor.ndim])
    size = ITEMSIZE[name]
    return View((tensor.data or 0) + tensor.byte_offset, shape, tuple([s * size for s in strides]), name,
                (kind, tensor.device_id if kind == "cuda" else 0), (x, capsule), readonly)


def _from_cuda_array_interface(x: Any, call: str, argument: str) -> View:
    """The View of a CUDA array without DLPack. The interface does not name the device: 0 unless `x.device.id` says."""
    interface = x.__cuda_array_interface__
    dtype = np.dtype(interface["typestr"])
    name = _NAMES.get(dtype)
    if name is None or interface.get("mask") is not None:
        raise TypeError(message(call, argument, f"has dtype {dtype.str}" if name is None else "has a mask", _EXPECTED))
    shape = tuple(interface["shape"])
    strides = interface.get("strides") or _contiguous(shape, dtype.itemsize)
    number = getattr(getattr(x, "device", None), "id", 0)
    return View(interface["data"][0] or 0, shape, tuple(strides), name, ("cuda", int(number)), x, bool(interface["data"][1]))


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[i + 1:]) for i in range(len(shape)))


# ---------------------------------------------------------------- outputs in the caller's own library
class Output:
    """A new array: an engine fills `view`, then `finish()` gives it in the caller's kind."""

    __slots__ = ("_array", "_convert", "view")

    def __init__(self, view: View, array: Any, convert: Callable[[Any], Any] | None = None) -> None:
        self.view, self._array, self._convert = view, array, convert

    def finish(self) -> Any:
        return self._array if self._convert is None else self._convert(self._array)


def allocate(producer: Any, shape: tuple[int, ...], dtype: str) -> Output:
    """An uninitialised contiguous CPU array of the kind of `producer`: ndarray, torch tensor, or what the producer's array
    namespace makes of an ndarray once it is filled (its arrays may be immutable, JAX's are). ndarray where none is known."""
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


def _hand_over(producer: Any, array: np.ndarray[Any, Any]) -> Any:
    """`array` as an array of the producer's namespace: shared by DLPack, or by asarray where NumPy cannot export (bfloat16)."""
    namespace = producer.__array_namespace__()
    try:
        return namespace.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError):
        return namespace.asarray(array)
