"""A hand-made XLA: call frames over NumPy arrays, and a table of functions that notes errors and hands out a stream."""
from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fastattn.jax import ffi, handler
from fastattn.jax.record import Record

CODES = {name: code for code, name in ffi.DTYPES.items()}


class Xla:
    """`error` is (code, text) of the last error that a handler made; `stream` is what it is given, None for an error of XLA's own."""

    def __init__(self, stream: int | None = None) -> None:
        self.error: tuple[int, str] | None = None
        self.destroyed: list[int] = []
        self.stream = stream
        kinds = dict(ffi.Api._fields_)
        self.api = ffi.Api(size=ctypes.sizeof(ffi.Api), version=ffi.Version(ctypes.sizeof(ffi.Version), None, ffi.MAJOR, ffi.MINOR),
                           error_create=kinds["error_create"](self._create), error_message=kinds["error_message"](self._message),
                           error_destroy=kinds["error_destroy"](lambda asked: self.destroyed.append(asked.contents.error)),
                           stream_get=kinds["stream_get"](self._stream))

    def _create(self, asked: Any) -> int:
        assert asked.contents.size == ctypes.sizeof(ffi.ErrorCreate)
        self.error = asked.contents.code, asked.contents.message.decode()
        return 0xE1

    def _message(self, asked: Any) -> None:
        assert asked.contents.error == 0xE2
        asked.contents.message = b"there is none"

    def _stream(self, asked: Any) -> int | None:
        assert asked.contents.context == 0xC0
        if self.stream is None:
            return 0xE2
        asked.contents.stream = self.stream
        return None

    def call(self, record: Record | str, operands: list[Any], results: list[Any], cuda: bool = False, stage: int = ffi.EXECUTE) -> Any:
        """What the handler returns for a call on arrays, or on (address, shape, dtype) in memory that is not the host's."""
        return self.send(self.frame(record, operands, results, stage), cuda)

    def send(self, frame: Any, cuda: bool = False) -> Any:
        self.error = None
        return (handler.on_cuda if cuda else handler.on_cpu)(ctypes.byref(frame))

    def frame(self, record: Record | str, operands: list[Any], results: list[Any], stage: int = ffi.EXECUTE) -> Any:
        text = (record if isinstance(record, str) else record.text()).encode()
        name, value = _text(b"record"), _text(text)
        attributes = ffi.Attributes(ctypes.sizeof(ffi.Attributes), None, 1, (ctypes.c_int * 1)(ffi.STRING),
                                    (ctypes.POINTER(ffi.Text) * 1)(ctypes.pointer(name)),
                                    (ctypes.c_void_p * 1)(ctypes.addressof(value)))
        frame = ffi.Frame(ctypes.sizeof(ffi.Frame), None, ctypes.pointer(self.api), 0xC0, stage, _buffers(operands), _buffers(results),
                          attributes)
        frame.alive = text, name, value, operands, results
        return frame


def _text(text: bytes) -> Any:
    return ffi.Text(ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p), len(text))


def _buffers(arrays: list[Any]) -> Any:
    items = []
    for x in arrays:
        ptr, shape, dtype = (x.ctypes.data, x.shape, x.dtype.name) if isinstance(x, np.ndarray) else x
        items.append(ffi.Buffer(ctypes.sizeof(ffi.Buffer), None, CODES[dtype], ptr, len(shape), (ctypes.c_int64 * len(shape))(*shape)))
    pointers = (ctypes.POINTER(ffi.Buffer) * len(items))(*[ctypes.pointer(item) for item in items])
    return ffi.Buffers(ctypes.sizeof(ffi.Buffers), None, len(items), (ctypes.c_int * len(items))(*[1] * len(items)), pointers)
