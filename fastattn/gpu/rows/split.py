"""Rows of float32 to rows of their three bfloat16 parts (ptx/parts.py), which tensor cores multiply: one pass over memory.

    x (batch, rows, heads, dim), any strides   ->   (batch, rows, heads, 3 * width) contiguous: all high parts, all middle, all low ones

width is dim rounded up to whole panels of 64 columns; columns past dim are 0. So to a kernel that copies panels to shared memory a row is
one of three times as many panels.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I64, unpack
from ..dsl.inline import divide, inline
from ..ptx.memory import emit_store16_if
from ..ptx.parts import PARTS, emit_parts
from ..ptx.scalar import load_chunk, load_if
from .config import SPLIT_COLUMNS as COLUMNS
from .config import SPLIT_THREADS as THREADS


@intrinsic
def store_parts(typingctx: Any, address: Any, part_bytes: Any, x: Any, keep: Any) -> Any:
    """Store the parts of eight neighbours, 16 bytes each, `part_bytes` apart, if `keep` is not 0."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        numbers = unpack(builder, args[2], x.count)
        pairs = [emit_parts(builder, numbers[k], numbers[k + 1], any_value=True) for k in range(0, x.count, 2)]
        for part in range(PARTS):
            at = builder.add(args[0], builder.mul(builder.sext(args[1], I64), I64(part)))
            emit_store16_if(builder, args[3], at, [words[part] for words in pairs])
        return context.get_dummy_value()
    return signature(types.none, types.uint64, types.int32, x, types.int32), generate


def make_split(PANELS: int, WHOLE: bool) -> Any:
    """The kernel: a thread has COLUMNS columns of a line, a row of one head. WHOLE: rows are aligned pieces of 16 bytes."""
    CHUNKS = PANELS * 64 // COLUMNS
    LINES, PART_BYTES = THREADS // CHUNKS, PANELS * 128
    load_vector, load_element = load_chunk("float32"), load_if("float32", "float32")

    @inline
    def load(a, source, dim, there):
        """Eight columns from `dim` on; 0 past a.dim."""
        if WHOLE:
            left = load_vector(uint64(source + 4 * dim), int32(there & (dim < a.dim)))
            right = load_vector(uint64(source + 4 * dim + 16), int32(there & (dim + 4 < a.dim)))
            return left[0], left[1], left[2], left[3], right[0], right[1], right[2], right[3]
        else:
            at = int64(source + dim * a.x_dim)
            return (load_element(uint64(at), int32(there & (dim < a.dim))),
                    load_element(uint64(at + a.x_dim), int32(there & (dim + 1 < a.dim))),
                    load_element(uint64(at + 2 * a.x_dim), int32(there & (dim + 2 < a.dim))),
                    load_element(uint64(at + 3 * a.x_dim), int32(there & (dim + 3 < a.dim))),
                    load_element(uint64(at + 4 * a.x_dim), int32(there & (dim + 4 < a.dim))),
                    load_element(uint64(at + 5 * a.x_dim), int32(there & (dim + 5 < a.dim))),
                    load_element(uint64(at + 6 * a.x_dim), int32(there & (dim + 6 < a.dim))),
                    load_element(uint64(at + 7 * a.x_dim), int32(there & (dim + 7 < a.dim))))

    def kernel(a):
        thread = int32(cuda.threadIdx.x)
        line, chunk = int32(int32(cuda.blockIdx.x) * LINES + thread // CHUNKS), int32(thread % CHUNKS)
        there = line < a.lines
        line = int32(min(line, a.lines - 1))
        rest = divide(line, a.heads)
        batch = divide(rest, a.rows)
        source = int64(a.x) + batch * a.x_batch + int32(rest - batch * a.rows) * a.x_row + int32(line - rest * a.heads) * a.x_head
        to = uint64(int64(a.to) + int64(line) * (PARTS * PART_BYTES) + 2 * COLUMNS * chunk)
        store_parts(to, int32(PART_BYTES), load(a, source, int32(chunk * COLUMNS), there), int32(there))
    return kernel
