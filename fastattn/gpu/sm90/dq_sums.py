"""Sums of dQ in memory: each consumer warp of the Hopper backward stores its piece to shared memory, and TMA adds it to the sums."""
from __future__ import annotations

from typing import Any

from numba import int32, int64, uint64

from ..dsl.inline import inline
from ..ptx import tma
from ..ptx.sync import warp
from ..tile.gradients import PIECE, make_piece_of, store_piece


def make_dq_sums(DIM: int, BLOCK_M: int, DQ: int) -> tuple[Any, Any]:
    """(store_dq, send_dq) for rows of DIM columns and blocks of BLOCK_M queries. DQ: offset of the warps' pieces."""
    piece_of = make_piece_of(DIM, BLOCK_M)

    @inline
    def store_dq(base, acc_dq, w, thread, lane):
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
