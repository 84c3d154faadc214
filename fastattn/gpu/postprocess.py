"""What a backward with float32 sums of dq does last: rounds them to dq's dtype.

A sum was made of pieces of 16 rows by 64 columns (gradients.py): a block of 64 rows has DIM / 64 panels of four pieces. A warp takes a
piece, in registers the fragment that was stored, and writes rows of dq.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import cuda, int32, int64, uint64

from .compile import Source
from .compile import load as load_kernel
from .device import Device
from .fragments import make_pack, scale_rows, store_rows, store_whole_rows
from .gradients import PIECE, load_piece
from .inline import divide
from .preprocess import Rows, make_row_at, num_lines
from .spec import Arguments, BackwardCall, Spec

THREADS = 256
OWN = "accum:l rows:i pieces:q grad_scale:f cu_seqlens_q:l q_step:q"


def make_round(spec: Spec, DIM: int) -> Any:
    """The kernel."""
    PANELS, PACKED = DIM // 64, spec.packed
    to_half, row_at = make_pack(spec.dtype), make_row_at(spec)

    def kernel(a):
        lane = int32(cuda.threadIdx.x & 31)
        piece = int64(cuda.blockIdx.x) * (THREADS // 32) + int64(cuda.threadIdx.x >> 5)
        if piece < a.pieces:
            block = int64(piece // (4 * PANELS))        # of 64 rows, over all lines
            part = int32(piece - block * (4 * PANELS))
            line = int32(block // int64(divide(a.rows, int32(64))))
            p = int32(block * 64 - int64(line) * a.rows) + (part & 3) * 16
            batch = int32(0) if PACKED else divide(line, a.num_heads)
            head = line if PACKED else int32(line - batch * a.num_heads)
            first, count, _ = row_at(a, int32(p))
            if count > 0:
                acc = load_piece(uint64(a.accum + uint64(piece * PIECE) + uint64(lane * 16)))
                packed = to_half(scale_rows(acc, a.grad_scale, a.grad_scale))
                row, col = int32(lane >> 2), int32((lane & 3) * 2)
                dim = int32((part >> 2) * 64 + col)
                address = uint64(int64(a.dq) + batch * a.dq_batch + head * a.dq_head + int64(first + row) * a.dq_row + 2 * dim)
                next_row = uint64(address + uint64(8 * a.dq_row))
                keep0, keep1 = int32(1) if row < count else int32(0), int32(1) if row + 8 < count else int32(0)
                if a.head_dim == DIM:
                    store_whole_rows(packed, address, next_row, keep0, keep1, lane)
                else:
                    store_rows(packed, address, next_row, keep0, keep1, int32(a.head_dim - dim))
    return kernel


@lru_cache(maxsize=256)
def _round(spec: Spec, dim: int) -> tuple[Source, Arguments]:
    arguments = Arguments(spec, OWN, ("dq",))
    return Source(f"round_dq {spec.text} dim {dim}", lambda: make_round(spec, dim), arguments.fields, THREADS, 0), arguments


def round_dq(call: BackwardCall, spec: Spec, rows: Rows, dim: int, d: Device, stream: int) -> None:
    """Enqueue writing grads.dq from the sums in `rows.accum`."""
    cu = call.operands.cu_seqlens_q
    source, arguments = _round(Spec(spec.dtype, 16, 16, packed=spec.packed, lse=False), dim)
    pieces = num_lines(call) * rows.count * dim // 1024
    own = (rows.accum, rows.count, pieces, call.problem.score.softmax_scale, *((cu.ptr, cu.strides[0]) if cu else (0, 0)))
    load_kernel(source, d.ordinal).launch(-(-pieces // (THREADS // 32)), arguments.values(call, own), stream)
