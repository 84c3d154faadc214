"""Whether machine code keeps anything in local memory: spilled registers, arrays that are not in registers."""
from __future__ import annotations

import struct

_SECTION = struct.Struct("<IIQQQQ")     # of an ELF64 section header: name, type, flags, address, offset, size
_SIZED, _FRAME_SIZE = 4, 0x11           # of .nv.info: an entry with a payload; a function's number and its frame's bytes


def frame_bytes(code: bytes) -> int:
    """Bytes of the largest stack frame of a cubin's functions."""
    (sections,), (size, count, names) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<HHH", code, 58)
    headers = [_SECTION.unpack_from(code, sections + n * size) for n in range(count)]
    strings, frames = headers[names][4], [0]
    for name, _, _, _, at, length in headers:
        if code.startswith(b".nv.info\0", strings + name):
            end = at + length
            while at < end:
                form, attribute, payload = struct.unpack_from("<BBH", code, at)
                at += 4
                if form == _SIZED:
                    if attribute == _FRAME_SIZE:
                        frames.append(struct.unpack_from("<II", code, at)[1])
                    at += payload
    return max(frames)
