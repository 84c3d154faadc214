"""quantize_fp8 on the GPU: the largest magnitude of each piece of x, then the scales, then x / scale in 8 bits. No atomics: any run
gives the same bits.

A block has ROWS rows of one head of one batch entry. What shares a scale is one of a.batches x a.heads parts of x: `by_batch` and `by_head`
say whether a batch entry, and a head, has a scale of its own.
"""
from __future__ import annotations

import math
from typing import Any

from numba import cuda, float32, float64, int32, int64, uint64

from ...arrays.view import LARGEST
from ..dsl.inline import divide, inline
from ..ptx.scalar import load_if, store
from .config import QUANTIZE_ROWS as ROWS
from .config import QUANTIZE_THREADS as THREADS

SMALLEST_F32, LARGEST_F32 = 2.0**-149, (2 - 2.0**-23) * 2.0**127        # a scale is positive and finite


def _compute(dtype: str) -> tuple[str, Any]:
    return ("float64", float64) if dtype == "float64" else ("float32", float32)


@inline
def piece(a):
    """(batch, head, first row, number of elements) of this block's piece."""
    block = int32(cuda.blockIdx.x)
    plane = divide(block, a.pieces)
    batch = divide(plane, a.heads)
    first = int32(int32(block - plane * a.pieces) * ROWS)
    return batch, int32(plane - batch * a.heads), first, int32(min(a.rows - first, ROWS) * a.dim)


@inline
def place(a, batch, head, first, n):
    """(row, column) of element n of a piece."""
    row = divide(n, a.dim)
    return int32(first + row), int32(n - row * a.dim)


def make_largest(COMPUTE: str) -> Any:
    """largest(sums, thread, mine): the largest of all threads' numbers, for every thread."""
    @inline
    def largest(sums, thread, mine):
        sums[thread] = mine
        cuda.syncthreads()
        step = THREADS // 2
        while step > 0:
            if thread < step:
                sums[thread] = max(sums[thread], sums[thread + step])
            cuda.syncthreads()
            step = step // 2
        return sums[0]
    return largest


def make_magnitude(dtype: str) -> Any:
    """The kernel that writes the largest finite magnitude of each piece, in the dtype of the arithmetic."""
    compute, REAL = _compute(dtype)
    SIZE, INF, load, put, largest = 8 if compute == "float64" else 4, REAL(math.inf), load_if(dtype, compute), store(compute, compute), \
        make_largest(compute)

    def kernel(a):
        thread, sums = int32(cuda.threadIdx.x), cuda.shared.array(THREADS, REAL)
        batch, head, first, count = piece(a)
        source, top = int64(a.x) + batch * a.x_batch + head * a.x_head, REAL(0)
        for n in range(thread, count, THREADS):
            row, column = place(a, batch, head, first, int32(n))
            x = abs(load(uint64(source + row * a.x_row + column * a.x_dim), int32(1)))
            if x < INF and x > top:         # no NaN is
                top = x
        top = largest(sums, thread, top)
        if thread == 0:
            put(uint64(int64(a.tops) + int64(cuda.blockIdx.x) * SIZE), top)
    return kernel


def make_scale(dtype: str, target: str) -> Any:
    """The kernel that writes the scales, one a block, from the pieces' magnitudes."""
    compute, REAL = _compute(dtype)
    SIZE, TOP, LOW, HIGH = 8 if compute == "float64" else 4, REAL(LARGEST[target]), REAL(SMALLEST_F32), REAL(LARGEST_F32)
    load, put, largest = load_if(compute, compute), store("float32", compute), make_largest(compute)

    def kernel(a):
        thread, sums, block = int32(cuda.threadIdx.x), cuda.shared.array(THREADS, REAL), int32(cuda.blockIdx.x)
        own_heads = a.heads if a.by_head != 0 else 1
        batch = divide(block, own_heads)
        head = int32(block - batch * own_heads)
        batches, heads = 1 if a.by_batch != 0 else a.batches, 1 if a.by_head != 0 else a.heads
        top = REAL(0)
        for n in range(thread, batches * heads * a.pieces, THREADS):
            plane = divide(int32(n), a.pieces)
            b = divide(plane, int32(heads))
            at = ((batch + b) * a.heads + head + int32(plane - b * heads)) * int64(a.pieces) + int32(n - plane * a.pieces)
            top = max(top, load(uint64(int64(a.tops) + at * SIZE), int32(1)))
        top = largest(sums, thread, top)
        if thread == 0:
            scale = min(max(top / TOP, LOW), HIGH) if top > REAL(0) else REAL(1)
            put(uint64(int64(a.scale) + int64(block) * 4), scale)
    return kernel


def make_quantize(dtype: str, target: str) -> Any:
    """The kernel that writes x / scale."""
    compute, _ = _compute(dtype)
    load, load_scale, put = load_if(dtype, compute), load_if("float32", compute), store(target, compute)

    def kernel(a):
        thread = int32(cuda.threadIdx.x)
        batch, head, first, count = piece(a)
        source, to = int64(a.x) + batch * a.x_batch + head * a.x_head, int64(a.out) + batch * a.out_batch + head * a.out_head
        own_heads = a.heads if a.by_head != 0 else 1
        at = (batch if a.by_batch != 0 else 0) * own_heads + (head if a.by_head != 0 else 0)
        scale = load_scale(uint64(int64(a.scale) + int64(at) * 4), int32(1))
        for n in range(thread, count, THREADS):
            row, column = place(a, batch, head, first, int32(n))
            x = load(uint64(source + row * a.x_row + column * a.x_dim), int32(1))
            put(uint64(to + row * a.out_row + column * a.out_dim), x / scale)
    return kernel
