"""Sums that have the same bits in whatever order they are made: of integers.

Two passes over the same numbers. The first finds the exponent of the largest, which gives all a common unit. The second adds each as whole
units and as a rest in smaller ones, 64 bits both. An element's record has RECORD bytes: units, rest, and flags of what is no number.

    top     32-bit word, zero at first: the exponent of the largest as float64 has it, e + OFFSET where all are below 2**e
    bits    units of 2**(e - bits): so few that the sum of all fits 62 bits (launch.py)
"""
from __future__ import annotations

import math
from typing import Any

from numba import cuda, float32, float64, int32, int64, uint64

from ...arrays.view import ITEMSIZE
from ..dsl.inline import inline
from ..ptx.memory import load_b32
from ..ptx.scalar import store
from ..ptx.traced import add_to_b64, exponent_bits, load_b64, or_b32, rounded
from .config import RECORD, ROUND_THREADS

OFFSET, LEAST, NO_NUMBER = 1022, 122, 2047      # of exponents; from LEAST on, a unit is a number
NAN, INF, MINUS_INF = 1, 2, 4
whole_near = rounded("rni", "float64")


@inline
def exponent_of(x):
    """e + OFFSET with abs(x) < 2**e; 0 of 0 and of what is no number."""
    found = exponent_bits(x)
    found = int32(0) if found == NO_NUMBER else found
    return found


@inline
def low_bits(bits):
    """Bits of a rest's unit below a whole one."""
    return int32(min(bits, 31))


@inline
def add_fixed(record, x, top, bits):
    """Add x to an element's record, `top` and `bits` as above."""
    if x - x == 0:
        y = math.ldexp(x, int32(bits - (max(top, int32(LEAST)) - OFFSET)))
        whole = whole_near(y)
        add_to_b64(record, uint64(int64(whole)))
        add_to_b64(uint64(record + uint64(8)), uint64(int64(whole_near(math.ldexp(y - whole, low_bits(bits))))))
    else:
        infinity = int32(INF) if x > 0 else int32(MINUS_INF)
        flag = infinity if x == x else int32(NAN)
        or_b32(uint64(record + uint64(16)), flag)


def make_round_fixed(dtype: str) -> Any:
    """The kernel: `count` records at `sums` to contiguous elements at `to`."""
    REAL = float64 if dtype == "float64" else float32
    put, THREADS, SIZE = store(dtype, "float64" if dtype == "float64" else "float32"), ROUND_THREADS, ITEMSIZE[dtype]

    def kernel(a):
        n = int64(cuda.blockIdx.x) * THREADS + int64(cuda.threadIdx.x)
        if n < a.count:
            record = uint64(int64(a.sums) + n * RECORD)
            flags, e = load_b32(uint64(record + uint64(16))), int32(max(load_b32(a.top), int32(LEAST)) - OFFSET)
            units, rest = float64(int64(load_b64(record))), float64(int64(load_b64(uint64(record + uint64(8)))))
            x = math.ldexp(units + math.ldexp(rest, int32(-low_bits(a.bits))), int32(e - a.bits))
            if flags != 0:
                x = math.inf if flags == INF else -math.inf if flags == MINUS_INF else math.nan
            put(uint64(int64(a.to) + n * SIZE), REAL(x))
    return kernel


__all__ = ["add_fixed", "exponent_of", "make_round_fixed"]
