"""Elements in another dtype, times scales: 8-bit operands to 16 bits, and an output times the scale of V. One element a thread and step.

    out[b, row, head, i] = round(x[b, row, head, i] * factor * scale0[b, g] * scale1[b, g] / divisor)       g = head / group

A scale whose address is 0 is 1. Rounding saturates, and NaN stays. Packed: rows of all sequences, one after the other, whose b is looked
up in cu_seqlens; rows of no sequence get the scale of some sequence.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, float64, int32, int64, uint64

from ...arrays.view import LARGEST
from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32
from ..ptx.scalar import load_if, store
from .config import QUANTIZE_THREADS as THREADS
from .quantize import piece, place

HALF_MAX = 65504.0


def make_rescale(dtype: str, target: str, PACKED: bool) -> Any:
    """The kernel for x of `dtype` and out of `target`."""
    compute, REAL = ("float64", float64) if dtype == "float64" or target == "float64" else ("float32", float32)
    load, load_scale, put, SATURATES = load_if(dtype, compute), load_if("float32", "float32"), store(target, compute), target == "float16"
    MOST = REAL(LARGEST.get(target, HALF_MAX))

    @inline
    def sequence_of(a, row):
        """The last sequence that begins at or before a row."""
        low, high = int32(0), int32(a.sequences)
        while high - low > 1:
            middle = int32((low + high) >> 1)
            if load_b32(uint64(a.cu_seqlens + int64(middle) * a.cu_step)) <= row:
                low = middle
            else:
                high = middle
        return low

    @inline
    def scale_at(pointer, by_batch, by_head, batch, head):
        if pointer != 0:
            return load_scale(uint64(int64(pointer) + batch * by_batch + head * by_head), int32(1))
        else:
            return float32(1)

    @inline
    def factor_of(a, batch, head):
        head_k = divide(head, a.group)
        return (a.factor * scale_at(a.scale0, a.scale0_batch, a.scale0_head, batch, head_k)
                * scale_at(a.scale1, a.scale1_batch, a.scale1_head, batch, head_k))

    def kernel(a):
        thread = int32(cuda.threadIdx.x)
        batch, head, first, count = piece(a)
        source, to = int64(a.x) + batch * a.x_batch + head * a.x_head, int64(a.out) + batch * a.out_batch + head * a.out_head
        divisor = scale_at(a.divisor, 0, 0, batch, head)
        factor = factor_of(a, batch, head) if not PACKED else float32(1)
        for n in range(thread, count, THREADS):
            row, column = place(a, batch, head, first, int32(n))
            if PACKED:
                factor = factor_of(a, sequence_of(a, row), head)
            x = load(uint64(source + row * a.x_row + column * a.x_dim), int32(1)) * factor / divisor
            if SATURATES:       # a NaN is not greater
                x = MOST if x > MOST else (-MOST if x < -MOST else x)
            put(uint64(to + row * a.out_row + column * a.out_dim), x)
    return kernel
