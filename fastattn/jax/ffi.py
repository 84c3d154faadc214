"""XLA's foreign function interface, spoken from Python: the C structures that a handler is given, as ctypes.

XLA calls a handler with one pointer, to a call frame: operands, results and attributes as arrays of pointers, and a
table of functions to call back. It holds nothing of Python's, so no C++ is needed to read it.

Every structure begins with its size. A newer XLA may append fields, never move them within one major version; `fits`
compares the sizes with those here before anything else is read, so another layout is refused, not misread.

Source: xla/ffi/api/c_api.h of OpenXLA (installed with jaxlib, below include/), version 0.3. The facts were read there;
the definitions are our own, and hold only the fields that are read.
"""
from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

from ..arrays.view import Device, View, contiguous

MAJOR, MINOR = 0, 3                     # the version whose layout this file follows; older minors have the same fields, fewer
METADATA = 1                            # XLA_FFI_Extension_Type: XLA asks about the handler, nothing is to be computed
EXECUTE = 3                             # XLA_FFI_ExecutionStage
STRING = 4                              # XLA_FFI_AttrType
INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, CANCELLED = 3, 8, 12, 13, 1      # XLA_FFI_Error_Code
DTYPES = {1: "bool", 4: "int32", 5: "int64", 8: "uint32", 9: "uint64", 10: "float16", 11: "float32", 12: "float64", 16: "bfloat16"}
_WIDTH = {"bool": 1, "int32": 4, "int64": 8, "uint32": 4, "uint64": 8, "float16": 2, "float32": 4, "float64": 8, "bfloat16": 2}
_INTEGERS = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "uint32": ctypes.c_uint32, "uint64": ctypes.c_uint64}


class Extension(Structure):
    pass


Extension._fields_ = [("size", c_size_t), ("kind", c_int), ("next", POINTER(Extension))]
_HEAD: list[tuple[str, Any]] = [("size", c_size_t), ("extension", POINTER(Extension))]


class Version(Structure):
    _fields_ = [*_HEAD, ("major", c_int), ("minor", c_int)]


class Metadata(Structure):
    """What XLA asks of a handler: the version that it was written for, and its traits (0: not to be recorded in a CUDA graph)."""

    _fields_ = [("size", c_size_t), ("version", Version), ("traits", c_uint32)]


class MetadataExtension(Structure):
    _fields_ = [("base", Extension), ("metadata", POINTER(Metadata))]


class Buffer(Structure):
    _fields_ = [*_HEAD, ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))]


class Buffers(Structure):
    """XLA_FFI_Args and XLA_FFI_Rets: the only kind of either is a buffer."""

    _fields_ = [*_HEAD, ("count", c_int64), ("kinds", POINTER(c_int)), ("items", POINTER(POINTER(Buffer)))]


class Text(Structure):
    _fields_ = [("ptr", c_void_p), ("length", c_size_t)]


class Attributes(Structure):
    _fields_ = [*_HEAD, ("count", c_int64), ("kinds", POINTER(c_int)), ("names", POINTER(POINTER(Text))), ("items", POINTER(c_void_p))]


class ErrorCreate(Structure):
    _fields_ = [*_HEAD, ("message", c_char_p), ("code", c_int)]


class ErrorMessage(Structure):
    _fields_ = [*_HEAD, ("error", c_void_p), ("message", c_char_p)]


class ErrorDestroy(Structure):
    _fields_ = [*_HEAD, ("error", c_void_p)]


class StreamGet(Structure):
    _fields_ = [*_HEAD, ("context", c_void_p), ("stream", c_void_p)]


class Api(Structure):
    """The functions that XLA offers, up to the last one that is used here."""

    _fields_ = [*_HEAD, ("version", Version), ("internal", c_void_p), ("error_create", CFUNCTYPE(c_void_p, POINTER(ErrorCreate))),
                ("error_message", CFUNCTYPE(None, POINTER(ErrorMessage))), ("error_destroy", CFUNCTYPE(None, POINTER(ErrorDestroy))),
                ("register", c_void_p), ("stream_get", CFUNCTYPE(c_void_p, POINTER(StreamGet)))]


class Frame(Structure):
    """XLA_FFI_CallFrame."""

    _fields_ = [*_HEAD, ("api", POINTER(Api)), ("context", c_void_p), ("stage", c_int), ("operands", Buffers), ("results", Buffers),
                ("attributes", Attributes)]


Handler = CFUNCTYPE(c_void_p, POINTER(Frame))       # returns XLA's error, or NULL; ctypes takes the GIL in whatever thread calls


# ---------------------------------------------------------------- is it the layout that is described here?
def fits(frame: Frame) -> str | None:
    """None, or how the structures that XLA passes differ from those of this file."""
    api = frame.api.contents
    version = api.version
    if version.major != MAJOR:
        return f"XLA's foreign function interface has version {version.major}.{version.minor}; expected {MAJOR}.x"
    for what, size, least in (("call frame", frame.size, ctypes.sizeof(Frame)), ("table of functions", api.size, ctypes.sizeof(Api))):
        if size < least:
            return f"XLA's {what} has {size} bytes; expected at least {least}"
    if metadata(frame) is not None:                 # a frame without a call
        return None
    parts = (("version", version, Version), ("operands", frame.operands, Buffers), ("results", frame.results, Buffers),
             ("attributes", frame.attributes, Attributes))
    for what, part, kind in parts:                  # these lie inside another structure, so they cannot grow unseen
        if part.size != ctypes.sizeof(kind):
            return f"XLA's {what} have {part.size} bytes; expected {ctypes.sizeof(kind)}"
    return None


def metadata(frame: Frame) -> Metadata | None:
    """What to fill in, where XLA asks about the handler instead of calling it."""
    extension: Any = frame.extension
    while extension:
        if extension.contents.kind == METADATA:
            asked: Metadata = ctypes.cast(extension, POINTER(MetadataExtension)).contents.metadata.contents
            return asked
        extension = extension.contents.next
    return None


# ---------------------------------------------------------------- reading a frame
def views(buffers: Buffers, device: Device) -> list[View]:
    """A View of each buffer. XLA's buffers are contiguous, because no other layout was asked for."""
    found = []
    for i in range(buffers.count):
        x = buffers.items[i].contents
        dtype = DTYPES.get(x.dtype)
        if x.size < ctypes.sizeof(Buffer) or dtype is None:
            raise RuntimeError(f"XLA's buffer {i} has {x.size} bytes and dtype {x.dtype}; expected at least {ctypes.sizeof(Buffer)} and "
                               f"one of {DTYPES}")
        shape = tuple(x.dims[:x.rank])
        found.append(View(x.data or 0, shape, contiguous(shape, _WIDTH[dtype]), dtype, device))
    return found


def integer(x: View) -> int:
    """The number in a View of one integer in host memory."""
    return int(_INTEGERS[x.dtype].from_address(x.ptr).value)


def attribute(frame: Frame, name: str) -> bytes:
    """A string attribute."""
    given = frame.attributes
    for i in range(given.count):
        found = given.names[i].contents
        if given.kinds[i] == STRING and ctypes.string_at(found.ptr, found.length) == name.encode():
            text = ctypes.cast(given.items[i], POINTER(Text)).contents
            return ctypes.string_at(text.ptr, text.length)
    raise RuntimeError(f"XLA's call has no string attribute {name!r}")


def stream(frame: Frame) -> int:
    """The CUstream on which the call's work belongs; 0 is the NULL stream."""
    asked = StreamGet(ctypes.sizeof(StreamGet), None, frame.context, None)
    api = frame.api.contents
    wrong = api.stream_get(ctypes.byref(asked))
    if not wrong:
        return asked.stream or 0
    text = ErrorMessage(ctypes.sizeof(ErrorMessage), None, wrong, None)
    api.error_message(ctypes.byref(text))
    reason = (text.message or b"no reason").decode(errors="replace")
    api.error_destroy(ctypes.byref(ErrorDestroy(ctypes.sizeof(ErrorDestroy), None, wrong)))
    raise RuntimeError(f"XLA gives no stream: {reason}")


def error(frame: Frame, code: int, text: str) -> Any:
    """An error of XLA's, which XLA owns once a handler returns it."""
    asked = ErrorCreate(ctypes.sizeof(ErrorCreate), None, text.replace("\0", " ").encode(), code)
    return frame.api.contents.error_create(ctypes.byref(asked))
