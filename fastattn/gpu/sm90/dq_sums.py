"""Sums of dQ in memory: each consumer warp of the Hopper backward stores its piece to shared memory, and TMA adds it to the sums."""
from __future__ import annotations

from typing import Any

from numba import int32, int64, uint64

from ..dsl.inline import inline
from ..ptx import tma
from ..ptx.sync import warp
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.gradients import PIECE, store_piece


def make_dq_sums(spec: Spec, DIM: int, BLOCK_M: int, DQ: int) -> tuple[Any, Any, Any]:
    """(store_dq, row_before, send_dq) for rows of DIM columns and blocks of BLOCK_M queries. DQ: offset of the warps' pieces."""
    first_row = make_first_row(spec)

    @inline
    def store_dq(base, acc_dq, w, thread, lane):
        """A warp's sums to its piece of shared memory, once TMA has read what was there."""
        slot = int32(base + DQ + (w * 4 + (thread >> 5)) * PIECE)
        tma.wait_read()
        warp()
        store_piece(acc_dq, int32(slot + lane * 16))

    @inline
    def row_before(a, batch, q_start, head, m, m_min, m_max):
        """The first row, in a.accum, of the query block that comes before m of `head`."""
        again = m == m_min
        m, head = m_max if again else m, int32(head - 1) if again else head
        return int32(first_row(a, batch, head, q_start) + (m - 1) * BLOCK_M)

    @inline
    def send_dq(a, base, w, thread, row):
        """TMA adds the warp's piece to dQ's sums in memory. `row` is the first row there of its query block: 32 bits, for 2**31 rows fit no
        memory. Negative: there is no piece yet. All lanes must have fenced and met before."""
        own = int32(w * 4 + (thread >> 5))
        # a block of 64 rows: panels of 64 columns, of four pieces each
        block = uint64(int64(row) * (4 * DIM)) + uint64(own * PIECE)
        tma.reduce_add_f32_if(int32(1) if ((thread & 31) == 0) & (row >= 0) else int32(0), uint64(a.accum + block),
                              int32(base + DQ + own * PIECE), int32(PIECE))
        tma.commit()
    return store_dq, row_before, send_dq
