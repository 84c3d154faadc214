"""dk and dv from float32 parts, one of each query head of a group, always added in the same order.

A thread adds 16 bytes of results. The parts of dk and dv are contiguous, (part, key, head, columns), and have room for whole vectors.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx.scalar import load_chunk
from .config import GROUP_COLUMNS as COLUMNS
from .config import GROUP_THREADS as THREADS
from .transform import add_chunk, make_access


def make_sum_groups(dtype: str, WHOLE: bool) -> Any:
    """The kernel. WHOLE: rows of dk and dv consist of aligned 16 bytes; else they are stored number by number."""
    load = load_chunk("float32")
    _, put = make_access(dtype, WHOLE)

    @inline
    def put_all(to, low, high, column, by_column, dim):
        if WHOLE:
            if column < dim:
                put(uint64(to), (low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]))
        else:
            for n in range(4):
                if column + n < dim:
                    put(uint64(to + n * by_column), (low[n],))
                if column + 4 + n < dim:
                    put(uint64(to + (4 + n) * by_column), (high[n],))

    @inline
    def add_parts(a, number, source, columns, out, by_row, by_head, by_column, dim):
        """Add up vector `number` of a gradient."""
        chunks = int32(divide(columns, int32(COLUMNS)))
        line = divide(number, chunks)
        column = int32((number - line * chunks) * COLUMNS)
        key = divide(line, a.num_heads_k)
        head = int32(line - key * a.num_heads_k)
        if key < a.seqlen_k:
            at, step = int64(source) + 4 * (int64(line) * columns + column), int64(a.seqlen_k) * a.num_heads_k * columns * 4
            low, high = load(uint64(at), int32(1)), load(uint64(at + 16), int32(1))
            part = int32(1)
            while part < a.parts:
                at += step
                low, high = add_chunk(low, load(uint64(at), int32(1))), add_chunk(high, load(uint64(at + 16), int32(1)))
                part = int32(part + 1)
            put_all(int64(out) + key * by_row + head * by_head + column * by_column, low, high, column, by_column, dim)

    def kernel(a):
        block = int32(cuda.blockIdx.x)
        if block < a.blocks_k:
            number = int32(block * THREADS + cuda.threadIdx.x)
            add_parts(a, number, a.part_k, a.columns, a.dk, a.dk_row, a.dk_head, a.dk_dim, a.head_dim)
        else:
            number = int32((block - a.blocks_k) * THREADS + cuda.threadIdx.x)
            add_parts(a, number, a.part_v, a.columns, a.dv, a.dv_row, a.dv_head, a.dv_dim, a.head_dim_v)
    return kernel
