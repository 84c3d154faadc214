"""DLPack capsules: reading any, making our own; and the address of an ndarray. NumPy's own reader knows neither
bfloat16, 8-bit floats nor devices.

Sources: the DLPack C header (dmlc/dlpack, versions 0.x and 1.x); NumPy's manual, "The array interface protocol".
"""
from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64)]


class ManagedVersioned(ctypes.Structure):
    """DLManagedTensorVersioned; the older DLManagedTensor begins with its Tensor."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("manager_ctx", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", Tensor)]


DTYPES = {(2, 32): "float32", (2, 64): "float64", (2, 16): "float16", (4, 16): "bfloat16", (6, 8): "bool",
          (0, 32): "int32", (0, 64): "int64", (10, 8): "float8_e4m3fn", (12, 8): "float8_e5m2"}
CODES = {name: code for code, name in DTYPES.items()}
_KINDS = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 5: "complex", 6: "bool"}
_SMALL = ("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
          "float8_e8m0fnu", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")     # codes 7 and on
DEVICES = {1: "cpu", 3: "cpu", 2: "cuda", 13: "cuda"}       # 3 is pinned host memory, 13 CUDA managed memory
CPU, CUDA = 1, 2
MOST_AXES = 64
EXPORT_ERRORS = (Exception,)                                # of an array's own methods: another library's code may raise anything
_READONLY = 1
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype, _capsule_is.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def opened(capsule: Any) -> tuple[Tensor, bool]:
    """The tensor of a capsule and whether it is read-only.

    The capsule is not marked as used: it must outlive the use of the memory, which its own destructor releases.
    BufferError for an unknown version, and for what is no capsule or a used one.
    """
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = ManagedVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise BufferError(f"speaks DLPack {managed.major}.{managed.minor}")
        return managed.tensor, bool(managed.flags & _READONLY)
    if not _capsule_is(capsule, b"dltensor"):
        raise BufferError(f"gave {capsule!r}, which is no DLPack capsule, or one that was used")
    # the old protocol has no read-only flag, and JAX's arrays are immutable: accepted as inputs, not as outputs
    return Tensor.from_address(_capsule_pointer(capsule, b"dltensor")), True


class Described(NamedTuple):
    """A capsule's tensor as plain values; strides in elements, None where the capsule has none."""

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str                                              # of DTYPES, else a name for errors
    device: tuple[int, int]
    readonly: bool


def described(capsule: Any) -> Described:
    """A capsule's tensor as plain values.

    BufferError for what no array can have. The reader checks that it fits in memory.
    """
    t, readonly = opened(capsule)
    if not 0 <= t.ndim <= MOST_AXES:
        raise BufferError(f"says it has {t.ndim} axes")
    if t.ndim and not t.shape:
        raise BufferError(f"has {t.ndim} axes, and a NULL pointer for their lengths")
    strides = tuple(t.strides[:t.ndim]) if t.strides else None
    return Described((t.data or 0) + t.byte_offset, tuple(t.shape[:t.ndim]) if t.ndim else (), strides, _dtype(t.code, t.bits, t.lanes),
                     (t.device_type, t.device_id), readonly)


def _dtype(code: int, bits: int, lanes: int) -> str:
    name = DTYPES.get((code, bits)) if lanes == 1 else None
    if name is None:
        small = 7 <= code < 7 + len(_SMALL)
        name = _SMALL[code - 7] if small else f"{_KINDS.get(code, f'of code {code}, bits ')}{bits}"
        name = name if lanes == 1 else f"{name} in vectors of {lanes}"
    return name


class _Raw:
    """Memory as unsigned integers of the item's size. NumPy wraps it without reading it."""

    def __init__(self, owner: Any, ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "data": (ptr, False), "shape": shape, "strides": strides, "typestr": f"<u{itemsize}"}


def capsule(owner: Any, ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, device: int,
            max_version: tuple[int, int] | None, kind: int = CUDA) -> Any:
    """A capsule of CUDA memory (or of `kind`), strides in bytes, that keeps `owner` alive until its deleter runs.

    NumPy makes the capsule, as of host memory at this address; then the device and the dtype are overwritten. So the
    deleter is NumPy's, in C: it takes the GIL on whatever thread a consumer calls it, and does nothing after Python has
    ended.
    """
    code, bits = CODES[dtype]
    raw = np.asarray(_Raw(owner, ptr, shape, strides, bits // 8))
    versioned = max_version is not None and max_version[0] >= 1 and np.lib.NumpyVersion(np.__version__) >= "2.1.0"
    made: Any = raw.__dlpack__(max_version=(1, 0)) if versioned else raw.__dlpack__()
    tensor, _ = opened(made)
    tensor.device_type, tensor.device_id, tensor.code, tensor.bits = kind, device, code, bits
    if 0 in shape:
        tensor.data = ptr                                   # here NumPy has replaced the address by its own
    return made


# ---------------------------------------------------------------- NumPy's array struct
class _ArrayStruct(ctypes.Structure):
    """PyArrayInterface of NumPy's array interface, version 3."""

    _fields_ = [("two", ctypes.c_int), ("nd", ctypes.c_int), ("typekind", ctypes.c_char), ("itemsize", ctypes.c_int),
                ("flags", ctypes.c_int), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("data", ctypes.c_void_p)]


_DATA = _ArrayStruct.data.offset
_pointer_at = ctypes.c_void_p.from_address


def address(array: np.ndarray[Any, Any]) -> int:
    """The address of an ndarray's memory, in half the time of `array.ctypes.data` or `__array_interface__`."""
    struct = array.__array_struct__
    return _pointer_at(_capsule_pointer(struct, None) + _DATA).value or 0
