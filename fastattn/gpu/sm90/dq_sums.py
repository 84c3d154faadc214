"""dQ of the Hopper backward: (store_dq, send_dq) of a warp's part of a block of queries.

Sums in memory: each warp stores its piece to shared memory, and TMA adds it to the sums. Where a head's keys are one tile there is nothing
to add: rows of dQ go from the registers to memory.
"""
from __future__ import annotations

from typing import Any

from numba import int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx import tma
from ..ptx.sync import warp
from ..spec import Spec
from ..tile.fragments import scale_rows
from ..tile.gradients import PIECE, make_piece_of, make_store, store_piece
from ..tile.smem import WARPGROUP_ROWS
from .config import BackwardSm90Config


def make_dq_sums(DIM: int, BLOCK_M: int, DQ: int) -> tuple[Any, Any]:
    """Sums of rows of DIM columns and blocks of BLOCK_M queries. DQ: offset of the warps' pieces."""
    piece_of = make_piece_of(DIM, BLOCK_M)

    @inline
    def store_dq(a, base, acc_dq, w, thread, lane, row, batch):
        """A warp's sums to its piece of shared memory, once TMA has read what was there."""
        slot = int32(base + DQ + (w * 4 + (thread >> 5)) * PIECE)
        tma.wait_read()
        warp()
        store_piece(acc_dq, int32(slot + lane * 16))

    @inline
    def send_dq(a, base, w, thread, row):
        """TMA adds the warp's piece to dQ's sums in memory. `row` is the first row there of its query block: 32 bits are enough, because
        memory has no room for 2**31 rows. Negative: there is no piece yet. All lanes must have fenced and passed a barrier before."""
        offset, size = piece_of(w, thread)
        block = uint64(int64(row) * (4 * DIM)) + uint64(offset)
        tma.reduce_add_f32_if(int32(1) if ((thread & 31) == 0) & (row >= 0) else int32(0), uint64(a.accum + block),
                              int32(base + DQ + (w * 4 + (thread >> 5)) * PIECE), size)
        tma.commit()
    return store_dq, send_dq


def make_dq_rows(spec: Spec, config: BackwardSm90Config) -> tuple[Any, Any]:
    """Of heads whose keys are one tile."""
    store = make_store(spec, config.dim)

    @inline
    def store_dq(a, base, acc_dq, w, thread, lane, row, batch):
        """A warp's 16 rows of dQ. `row` counts padded lines from the batch entry's first head on (consumer.make_order)."""
        head = divide(row, a.rows)
        first = int32(row - head * a.rows + w * WARPGROUP_ROWS + (thread >> 5) * 16 + (lane >> 2))
        acc_dq = scale_rows(acc_dq, a.grad_scale, a.grad_scale)
        store(acc_dq, int64(a.dq) + batch * a.dq_batch + head * a.dq_head, a.dq_row, a.head_dim, lane, first, a.seqlen_q, a.seqlen_q)

    @inline
    def send_dq(a, base, w, thread, row):
        pass
    return store_dq, send_dq
