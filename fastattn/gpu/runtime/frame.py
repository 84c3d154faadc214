"""What machine code says of its registers, and whether it keeps anything in local memory: spilled registers, arrays that are not in
registers."""
from __future__ import annotations

import struct
from collections.abc import Iterator

_SECTION = struct.Struct("<IIQQQQ")     # of an ELF64 section header: name, type, flags, address, offset, size
_SIZED, _FRAME_SIZE, _REGISTERS = 4, 0x11, 0x2F     # of .nv.info: an entry with a payload; a function's number and its frame's bytes


def frame_bytes(code: bytes) -> int:
    """Bytes of the largest stack frame of a cubin's functions."""
    return max(_entries(code, _FRAME_SIZE), default=0)


def register_count(code: bytes) -> int:
    """Registers of a thread of a cubin's kernel, as it is launched."""
    return max(_entries(code, _REGISTERS), default=0)


def _entries(code: bytes, wanted: int) -> Iterator[int]:
    """What .nv.info says under one attribute, of each function."""
    (sections,), (size, count, names) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<HHH", code, 58)
    headers = [_SECTION.unpack_from(code, sections + n * size) for n in range(count)]
    strings = headers[names][4]
    for name, _, _, _, at, length in headers:
        if code.startswith(b".nv.info\0", strings + name):
            end = at + length
            while at < end:
                form, attribute, payload = struct.unpack_from("<BBH", code, at)
                at += 4
                if form == _SIZED:
                    if attribute == wanted:
                        yield struct.unpack_from("<II", code, at)[1]
                    at += payload
