"""The last kernel of a backward with float32 sums: round them to the gradient's dtype.

dq: sums are in pieces of 16 rows by 64 columns (tile/gradients.py); 64 rows have DIM / 64 panels of four pieces. A warp loads a piece as
the fragment that was stored, and stores rows of dq. dbias: sums have dbias's own shape, contiguous.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from numba import cuda, int32, int64, uint64

from ...buffers import View
from ..dsl.inline import divide
from ..ptx.memory import load_f32
from ..ptx.mma import load_sums
from ..ptx.scalar import store
from ..runtime.compile import Source
from ..runtime.compile import load as load_kernel
from ..runtime.device import Device
from ..runtime.workspace import clear, temporary
from ..spec import Arguments, BackwardCall, Spec, whole_chunks
from ..tile.fragments import lane_row, make_pack, scale_rows, store_rows, store_whole_rows, thread_col
from ..tile.gradients import PIECE
from .preprocess import Rows, make_row_at, num_lines

THREADS = 256
OWN = "accum:l rows:i pieces:q grad_scale:f cu_seqlens_q:l q_step:q"


def make_round(spec: Spec, DIM: int, VECTOR: int, WHOLE: bool) -> Any:
    """The kernel. VECTOR: a lane's four sums are contiguous (mma.add_sums). WHOLE: rows of dq have DIM columns and are 16-byte aligned."""
    PANELS, PACKED, LANE_BYTES = DIM // 64, spec.packed, 16 if VECTOR else 4
    to_half, row_at = make_pack(spec.dtype), make_row_at(spec)

    def kernel(a):
        lane = int32(cuda.threadIdx.x & 31)
        piece = int64(cuda.blockIdx.x) * (THREADS // 32) + int64(cuda.threadIdx.x >> 5)
        if piece < a.pieces:
            block = int64(piece // (4 * PANELS))        # of 64 rows, over all lines
            number = int32(piece - block * (4 * PANELS))
            line = int32(block // int64(divide(a.rows, int32(64))))
            p = int32(block * 64 - int64(line) * a.rows) + (number & 3) * 16
            batch = int32(0) if PACKED else divide(line, a.num_heads)
            head = line if PACKED else int32(line - batch * a.num_heads)
            acc = load_sums(uint64(a.accum + uint64(piece * PIECE) + uint64(lane * LANE_BYTES)), VECTOR)    # in flight during row_at
            first, count, _ = row_at(a, int32(p))
            if count > 0:
                packed = to_half(scale_rows(acc, a.grad_scale, a.grad_scale))
                row, col = lane_row(lane), thread_col(lane)
                dim = int32((number >> 2) * 64 + col)
                address = uint64(int64(a.dq) + batch * a.dq_batch + head * a.dq_head + int64(first + row) * a.dq_row + 2 * dim)
                next_row = uint64(address + uint64(8 * a.dq_row))
                keep0, keep1 = int32(1) if row < count else int32(0), int32(1) if row + 8 < count else int32(0)
                if WHOLE:
                    store_whole_rows(packed, address, next_row, keep0, keep1, lane)
                else:
                    store_rows(packed, address, next_row, keep0, keep1, int32(a.head_dim - dim))
    return kernel


@lru_cache(maxsize=256)
def _round(spec: Spec, dim: int, vector: int, whole: bool) -> tuple[Source, Arguments]:
    arguments = Arguments(spec, OWN, ("dq",))
    key = f"round_dq {spec.text} dim {dim}" + " vector" * vector + " whole" * whole
    return Source(key, lambda: (make_round(spec, dim, vector, whole), 0), arguments.fields, THREADS), arguments


def round_dq(call: BackwardCall, spec: Spec, rows: Rows, dim: int, d: Device, stream: int, vector: bool = True) -> None:
    """Enqueue writing grads.dq from the sums in `rows.accum`."""
    cu, dq = call.operands.cu_seqlens_q, call.grads.dq
    pieces = num_lines(call) * rows.count * dim // 1024
    if pieces:
        source, arguments = _round(Spec(spec.dtype, 16, 16, packed=spec.packed, lse=False), dim, int(vector),
                                   whole_chunks(dq) and dq.shape[-1] == dim)
        own = (rows.accum, rows.count, pieces, call.problem.score.softmax_scale, *((cu.ptr, cu.strides[0]) if cu else (0, 0)))
        load_kernel(source, d.ordinal).launch(-(-pieces // (THREADS // 32)), arguments.values(call, own), stream)


# ---------------------------------------------------------------- dbias
def make_round_dbias(dtype: str) -> Any:
    """The kernel: a block writes one row (batch, head, row) of dbias."""
    put = store(dtype, "float32")

    def kernel(a):
        line = int32(cuda.blockIdx.x)
        rest = divide(line, a.bias_rows)
        row = int32(line - rest * a.bias_rows)
        batch = divide(rest, a.heads)
        head = int32(rest - batch * a.heads)
        source = int64(a.sums) + int64(line) * int64(a.bias_cols) * 4
        to = int64(a.dbias) + batch * a.dbias_batch + head * a.dbias_head + row * a.dbias_row
        for col in range(int32(cuda.threadIdx.x), a.bias_cols, THREADS):
            put(uint64(to + col * a.dbias_col), load_f32(uint64(source + 4 * int64(col))))
    return kernel


@cache
def _round_dbias(dtype: str) -> Source:
    fields = "sums:l heads:i bias_rows:i bias_cols:i dbias:l dbias_batch:q dbias_head:q dbias_row:q dbias_col:q"
    return Source(f"round_dbias {dtype}", lambda: (make_round_dbias(dtype), 0),
                  tuple((name, letter) for name, _, letter in (field.partition(":") for field in fields.split())), THREADS)


@contextmanager
def dbias_sums(x: View | None, d: Device, stream: int) -> Iterator[tuple[int, int, int, int]]:
    """(address, batch, head and row strides in bytes) of zeroed float32 sums of dbias's shape; strides of axes of length 1 are 0.

    At the end of the `with`, the rounding of the sums to x is enqueued. Without x, or if x is empty, all four are 0.
    """
    if x is None or 0 in x.shape:
        yield 0, 0, 0, 0
        return
    batch, heads, rows, cols = x.shape
    size = 4 * batch * heads * rows * cols
    with temporary(size, d.ordinal, stream) as memory:
        clear(memory, size, stream)
        yield memory, 4 * heads * rows * cols * (batch > 1), 4 * rows * cols * (heads > 1), 4 * cols
        values = [memory, heads, rows, cols, x.ptr, *x.strides]
        load_kernel(_round_dbias(x.dtype), d.ordinal).launch(batch * heads * rows, values, stream)
