"""Arrays copied, rounded and added on the device: out = x, or out += x, element by element of four axes with any strides. On the first axis
GATHER takes row x_rows[i] of x, and SCATTER writes row out_rows[i] of out, where no number may stand twice.

A thread has STEPS vectors of 16 bytes of out, or elements, a block apart from each other, so that a warp's accesses are contiguous.
float32 is rounded to 16 bits in vectors, too: two of x for one of out.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32
from .config import ACCUMULATE_STEPS as STEPS
from .config import ACCUMULATE_THREADS as THREADS
from .transform import add_chunk, join_chunks, make_access


def make_accumulate(dtype: str, target: str, ADD: bool, WHOLE: bool, GATHER: bool = False, SCATTER: bool = False) -> Any:
    """The kernel for x of `dtype` and out of `target`; if WHOLE the same, or float32 and 16 bits without ADD. a.columns: vectors on the
    last axis; a.count: all vectors."""
    compute = "float64" if "float64" in (dtype, target) else "float32"
    one, put = make_access(dtype, WHOLE, compute)
    load_out, put_out = (one, put) if dtype == target else make_access(target, WHOLE, compute)
    PAIR = WHOLE and dtype != target

    @inline
    def load(source, inside):
        if PAIR:
            return join_chunks(one(source, inside), one(uint64(source + uint64(16)), inside))
        else:
            return one(source, inside)

    @inline
    def move(to, source):
        if ADD:
            put_out(to, add_chunk(load_out(to, int32(1)), load(source, int32(1))))
        else:
            put_out(to, load(source, int32(1)))

    def kernel(a):
        first = int32(int32(cuda.blockIdx.x) * (THREADS * STEPS) + int32(cuda.threadIdx.x))
        for n in range(STEPS):
            index = int32(first + n * THREADS)
            if index < a.count:
                line = divide(index, a.columns)
                column = int64(index - line * a.columns)
                plane = divide(line, a.size2)
                row = int64(line - plane * a.size2)
                block = divide(plane, a.size1)
                middle = int64(plane - block * a.size1)
                to_row, from_row = int64(block), int64(block)
                if SCATTER:
                    to_row = int64(load_b32(uint64(int64(a.out_rows) + int64(block) * 4)))
                if GATHER:
                    from_row = int64(load_b32(uint64(int64(a.x_rows) + int64(block) * 4)))
                to = int64(a.out) + to_row * a.out0 + middle * a.out1 + row * a.out2 + column * a.out3
                source = int64(a.x) + from_row * a.x0 + middle * a.x1 + row * a.x2 + column * a.x3
                move(uint64(to), uint64(source))
    return kernel
