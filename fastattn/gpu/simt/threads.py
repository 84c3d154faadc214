"""Building blocks of kernels on plain threads: tiles of numbers in shared memory, and matrix products of them in registers.

The threads of a block form a grid, WIDE wide. Thread (x, y) owns lines y, y + HIGH, ... of a product of two tiles: `acc[i, j]` is line
y + i * HIGH, column x + j * WIDE. Where a product is as wide as head_dim, `acc[i, c]` is the same line and column `column(c, x)`.

Numbers are float32, or float64 for float64 arrays. Elements are converted when they are copied to shared memory. There a row of head_dim
is padded by 16 bytes, so that threads in neighbouring rows use different banks.
"""
from __future__ import annotations

import math
from typing import Any

from numba import cuda, int32, int64, uint64

from ..dsl.inline import inline
from ..ptx.memory import load_shared_b32
from ..ptx.scalar import load_if, load_shared, store, store_shared
from ..spec import Spec
from ..tile.scalar import compute_of
from .config import WIDE, Tile


@inline
def row_address(pointer, by_batch, by_head, by_row, batch, head, row):
    """Address of the first element of a row; strides in bytes."""
    return int64(pointer) + batch * by_batch + head * by_head + row * by_row


def make_load(spec: Spec, tile: Tile, LINES: int, WIDTH: int, STRIDE: int, HIDDEN: bool) -> Any:
    """load(to, pointer, by_line, by_dim, lines, dim0, dims, alive, thread): copy LINES rows of WIDTH elements to shared memory.

    By all threads. Rows from `lines` on and columns from `dims` on become 0. HIDDEN: so do rows whose word at shared address `alive`
    is 0.
    """
    compute, REAL, SIZE = compute_of(spec)
    load_element, put = load_if(spec.dtype, compute), store_shared(compute)
    THREADS, LOADS, COUNT = tile.threads, tile.loads, LINES * WIDTH
    EVEN = COUNT % (LOADS * THREADS) == 0

    @inline
    def load(to, pointer, by_line, by_dim, lines, dim0, dims, alive, thread):
        x = cuda.local.array(LOADS, REAL)
        for first in range(0, COUNT, LOADS * THREADS):
            for i in range(LOADS):
                n = int32(first + i * THREADS + thread)
                line, d = int32(n // WIDTH), int32(n % WIDTH)
                inside = (line < lines) & (dim0 + d < dims)         # not `and`: a branch would separate the loads
                if HIDDEN:
                    inside = inside & (load_shared_b32(int32(alive + min(line, LINES - 1) * 4)) != 0)
                x[i] = load_element(uint64(pointer + line * by_line + (dim0 + d) * by_dim), int32(inside))
            for i in range(LOADS):
                n = int32(first + i * THREADS + thread)
                if EVEN or n < COUNT:
                    put(int32(to + (n // WIDTH * STRIDE + n % WIDTH) * SIZE), x[i])
    return load


def make_product(spec: Spec, tile: Tile, SLICE: int) -> Any:
    """multiply(acc, a, b, x, y, dims): acc += A B^T over the remaining `dims` columns of head_dim, at most SLICE.

    A (lines) and B (columns) are at shared addresses a and b. Their rows are SLICE elements and 16 bytes apart.
    """
    compute, REAL, SIZE = compute_of(spec)
    VECTOR, HIGH, ROWS, COLS = 16 // SIZE, tile.high, tile.rows, tile.cols
    PITCH, get_vector = SLICE + VECTOR, load_shared(compute, VECTOR)

    @inline
    def multiply(acc, a_at, b_at, x, y, dims):
        a, b = cuda.local.array((ROWS, VECTOR), REAL), cuda.local.array((COLS, VECTOR), REAL)
        for d in range(0, min(SLICE, dims), VECTOR):
            for i in range(ROWS):
                part = get_vector(int32(a_at + ((y + i * HIGH) * PITCH + d) * SIZE))
                for e in range(VECTOR):
                    a[i, e] = part[e]
            for j in range(COLS):
                part = get_vector(int32(b_at + ((x + j * WIDE) * PITCH + d) * SIZE))
                for e in range(VECTOR):
                    b[j, e] = part[e]
            for i in range(ROWS):
                for j in range(COLS):
                    some = a[i, 0] * b[j, 0]        # a sum of sums: a single chain over head_dim has three times the rounding error
                    for e in range(1, VECTOR):
                        some += a[i, e] * b[j, e]
                    acc[i, j] += some
    return multiply


def make_sums(spec: Spec, tile: Tile) -> tuple[Any, Any]:
    """clear(acc), and move(acc, part): part is added to acc, and cleared.

    A product over several slices of head_dim is the sum of the slices' sums: of one chain over 256 columns scores have 1.6 times the
    rounding error. A backward whose lse is of another family's scores feels it: its P contains the errors of both.
    """
    REAL, ROWS, COLS = compute_of(spec)[1], tile.rows, tile.cols

    @inline
    def clear(acc):
        for i in range(ROWS):
            for j in range(COLS):
                acc[i, j] = REAL(0)

    @inline
    def move(acc, part):
        for i in range(ROWS):
            for j in range(COLS):
                acc[i, j] += part[i, j]
                part[i, j] = REAL(0)
    return clear, move


def neighbours(dim: int, vector: int) -> int:
    """Neighbouring columns of a thread in a product `dim` wide."""
    return math.gcd(dim // WIDE, vector)


def make_outer_product(spec: Spec, tile: Tile, DIM: int) -> Any:
    """multiply(acc, p, v, x, y, n0, left): acc += P V over the remaining `left` columns of P, at most a slice of V.

    P is a tile of probabilities at shared address p. V has rows of DIM elements at shared address v, for columns n0 and on of P.
    """
    compute, REAL, SIZE = compute_of(spec)
    VECTOR, HIGH, ROWS, OUTS, PITCH = 16 // SIZE, tile.high, tile.rows, DIM // WIDE, tile.pitch_p
    NEIGHBOURS, COUNT = neighbours(DIM, VECTOR), tile.keys(DIM, VECTOR)
    get_vector, get_neighbours = load_shared(compute, VECTOR), load_shared(compute, NEIGHBOURS)

    @inline
    def multiply(acc, p_at, v_at, x, y, n0, left):
        p, v = cuda.local.array((ROWS, VECTOR), REAL), cuda.local.array(OUTS, REAL)
        for n in range(0, min(COUNT, left), VECTOR):
            for i in range(ROWS):
                part = get_vector(int32(p_at + ((y + i * HIGH) * PITCH + n0 + n) * SIZE))
                for e in range(VECTOR):
                    p[i, e] = part[e]
            for e in range(VECTOR):
                for c in range(0, OUTS, NEIGHBOURS):
                    part = get_neighbours(int32(v_at + ((n + e) * DIM + c * WIDE + x * NEIGHBOURS) * SIZE))
                    for f in range(NEIGHBOURS):
                        v[c + f] = part[f]
                for i in range(ROWS):
                    for c in range(OUTS):
                        acc[i, c] += p[i, e] * v[c]
    return multiply


def make_column(spec: Spec, DIM: int) -> Any:
    """column(c, x): the column of a thread's acc[:, c] in a product DIM wide."""
    NEIGHBOURS = neighbours(DIM, 16 // compute_of(spec)[2])

    @inline
    def column(c, x):
        return int32(c // NEIGHBOURS * NEIGHBOURS * WIDE + x * NEIGHBOURS + c % NEIGHBOURS)
    return column


def make_store(spec: Spec, tile: Tile, DIM: int) -> Any:
    """put(acc, factor, pointer, by_line, by_dim, lines, real, dims, x, y): store acc * factor to an array at `pointer`.

    Only the first `lines` lines and `dims` columns exist. Lines from `real` on become 0.
    """
    compute, REAL, _ = compute_of(spec)
    HIGH, ROWS, OUTS, column = tile.high, tile.rows, DIM // WIDE, make_column(spec, DIM)
    store_element = store(spec.out_dtype or spec.dtype, compute)

    @inline
    def put(acc, factor, pointer, by_line, by_dim, lines, real, dims, x, y):
        for i in range(ROWS):
            line = int32(y + i * HIGH)
            if line < lines:
                for c in range(OUTS):
                    col = column(c, x)
                    if col < dims:
                        store_element(uint64(pointer + line * by_line + col * by_dim), acc[i, c] * factor if line < real else REAL(0))
    return put
