"""The epilogue of the Hopper forward: a consumer warpgroup stores the 64 output rows of its finished tile and their lse."""
from __future__ import annotations

from typing import Any

from numba import int32, uint64

from ...arrays.view import EIGHT_BIT
from ..dsl.inline import inline
from ..ptx import tma
from ..ptx.matrix import store_matrix_rows, store_panels
from ..ptx.memory import store_f32
from ..ptx.sync import barrier, fence_async, opaque
from ..spec import Spec
from ..tile.fragments import make_pack, scale_seen_rows
from ..tile.smem import PANEL, ROW_BYTES, WARPGROUP, WARPGROUP_ROWS, Smem, panels
from ..tile.softmax import NEG_INF
from ..tile.stores import store_bytes, store_floats, store_rows, store_whole_rows
from .config import ForwardSm90Config, slice_dim
from .records import TILE, Records

OUT_PANEL = WARPGROUP_ROWS * ROW_BYTES      # bytes: 64 rows of 64 columns
MAX_CONSUMERS = 3


def out_bytes(config: ForwardSm90Config, columns: int) -> int:
    """Shared memory for the output of all warpgroups, of `columns` columns each."""
    if config.whole_rows:
        return config.block_m * 2 * columns
    return config.consumers * min(config.out_panels, panels(columns)) * OUT_PANEL


def make_epilogue(spec: Spec, config: ForwardSm90Config, smem: Smem, OUT: int, finish: Any, records: Records,
                  BY_BATCH: bool = False) -> Any:
    """epilogue(a, base, acc_o, max0, max1, sum0, sum1, i, w, thread, lane, col) of the i-th tile, whose record it releases.

    OUT is the offset in shared memory of config.out_panels panels for each warpgroup. BY_BATCH: finish takes batch * num_heads + head
    instead of the head.
    """
    BLOCK_M, SLICES, COLUMNS = config.block_m, config.slices, slice_dim(spec.head_dim_v, config.slices)
    ROWS_APART, COLUMNS_APART = (WARPGROUP_ROWS, 0) if SLICES == 1 else (0, COLUMNS)        # of neighbouring warpgroups
    PANELS_V = panels(COLUMNS)
    PACKED, LSE, SINKS = spec.packed, spec.lse, spec.sinks is not None
    OUT_PANELS, HINTS, FLOATS = min(config.out_panels, PANELS_V), config.hints, (spec.out_dtype or spec.dtype) == "float32"
    BYTES = spec.dtype in EIGHT_BIT
    WHOLE, ROW = config.whole_rows, 2 * COLUMNS         # bytes of a row in shared memory
    TWO_ROUNDS, DIRECT = OUT_PANELS < PANELS_V and not WHOLE, OUT_PANELS == 0
    OUT_BARRIER = smem.named(MAX_CONSUMERS)         # one for each consumer warpgroup
    assert WHOLE or DIRECT or PANELS_V <= 2 * OUT_PANELS
    to_half: Any = None if BYTES else make_pack(spec.dtype)

    def make_round(FIRST):
        PANELS_HERE = min(OUT_PANELS, PANELS_V - FIRST)

        @inline
        def store_round(a, base, packed, w, thread, lane, row, head, map_batch):
            """Panels from FIRST on, as many as shared memory has room for: registers to shared memory, then one TMA store per panel."""
            slot = int32(base + OUT + w * OUT_PANELS * OUT_PANEL)
            own_row = int32(((thread >> 5) & 3) * 16 + (lane & 15))
            if thread == 0:
                tma.wait_read()         # TMA has read the panels stored before
            barrier(int32(OUT_BARRIER + w), int32(WARPGROUP))
            store_panels(packed, int32(slot + own_row * ROW_BYTES), int32(((lane & 7) << 4) ^ ((lane >> 4) << 4)), OUT_PANEL, PANELS_HERE,
                         FIRST)
            fence_async()
            barrier(int32(OUT_BARRIER + w), int32(WARPGROUP))
            if thread == 0:
                for p in range(PANELS_HERE):
                    panel, column = int32(slot + p * OUT_PANEL), int32((FIRST + p) * PANEL + w * COLUMNS_APART)
                    if HINTS:
                        tma.store_hinted(a.map_out, panel, column, row, head, map_batch, tma.evict_first())
                    else:
                        tma.store(a.map_out, panel, column, row, head, map_batch)
                tma.commit()
        return store_round

    store_first, store_second = make_round(0), make_round(OUT_PANELS if TWO_ROUNDS else 0)

    @inline
    def store_whole(a, base, packed, w, thread, lane, row, head, map_batch):
        """store_round of whole rows, in one TMA store."""
        slot = int32(base + OUT + w * (WARPGROUP_ROWS * ROW))
        own_row = int32(((thread >> 5) & 3) * 16 + (lane & 15))
        if thread == 0:
            tma.wait_read()
        barrier(int32(OUT_BARRIER + w), int32(WARPGROUP))
        store_matrix_rows(packed, int32(slot + own_row * ROW + (lane >> 4) * 16))
        fence_async()
        barrier(int32(OUT_BARRIER + w), int32(WARPGROUP))
        if thread == 0:
            tma.store(a.map_out, slot, int32(0), row, head, map_batch)
            tma.commit()

    @inline
    def store_float_rows(a, acc_o, m_block, head, batch, q_start, seqlen_q, w, row, col):
        """float32 output rows of a warpgroup, from the registers."""
        map_batch, col = int32(0) if PACKED else batch, int32(col + w * COLUMNS_APART)
        address = uint64(a.out + map_batch * a.out_batch + (q_start + row) * a.out_row + head * a.out_head + col * a.out_dim)
        rows0, rows1 = int32(1) if row < seqlen_q else int32(0), int32(1) if row + 8 < seqlen_q else int32(0)
        store_floats(acc_o, address, uint64(address + uint64(8 * a.out_row)), a.out_dim, rows0, rows1, int32(a.head_dim_v - col), 1)

    @inline
    def store_byte_rows(a, acc_o, m_block, head, batch, q_start, seqlen_q, row, col):
        """8-bit output rows of a warpgroup, from the registers. All columns are there."""
        map_batch = int32(0) if PACKED else batch
        address = uint64(a.out + map_batch * a.out_batch + (q_start + row) * a.out_row + head * a.out_head + col)
        rows0, rows1 = int32(1) if row < seqlen_q else int32(0), int32(1) if row + 8 < seqlen_q else int32(0)
        store_bytes(acc_o, address, uint64(address + uint64(8 * a.out_row)), rows0, rows1)

    @inline
    def store(a, base, acc_o, m_block, head, batch, q_start, seqlen_q, w, thread, lane, row, col):
        """Output rows of a warpgroup: through shared memory and TMA. From the registers if there is no room for that, or if the tile is the
        last of a packed sequence, because TMA would also write the next sequence's rows."""
        packed = to_half(acc_o)
        row0 = int32(m_block * BLOCK_M + w * ROWS_APART)
        map_batch = int32(0) if PACKED else batch
        if DIRECT or (PACKED and row0 + WARPGROUP_ROWS > seqlen_q):
            col = int32(col + w * COLUMNS_APART)
            address = uint64(a.out + map_batch * a.out_batch + (q_start + row) * a.out_row + head * a.out_head + 2 * col)
            rows0, rows1 = int32(1) if row < seqlen_q else int32(0), int32(1) if row + 8 < seqlen_q else int32(0)
            if a.head_dim_v == COLUMNS if SLICES == 1 else a.head_dim_v - w * COLUMNS_APART >= COLUMNS:
                store_whole_rows(packed, address, uint64(address + uint64(8 * a.out_row)), rows0, rows1, lane)
            else:
                store_rows(packed, address, uint64(address + uint64(8 * a.out_row)), rows0, rows1, int32(a.head_dim_v - col))
        elif WHOLE:
            store_whole(a, base, packed, w, thread, lane, int32(q_start + row0), head, map_batch)
        else:
            store_first(a, base, packed, w, thread, lane, int32(q_start + row0), head, map_batch)
            if TWO_ROUNDS:
                store_second(a, base, packed, w, thread, lane, int32(q_start + row0), head, map_batch)

    @inline
    def store_lse(a, head, batch, q_start, seqlen_q, w, lane, row, lse0, lse1):
        if LSE:
            if (lane & 3) == 0 and (SLICES == 1 or w == 0):
                if PACKED:
                    at = uint64(a.lse + uint64(4) * uint64(head * a.total_q + q_start + row))
                else:
                    at = uint64(a.lse + uint64(4) * (uint64(batch * a.num_heads + head) * uint64(a.seqlen_q) + uint64(row)))
                if row < seqlen_q:
                    store_f32(at, lse0)
                if row + 8 < seqlen_q:
                    store_f32(at + uint64(32), lse1)

    @inline
    def epilogue(a, base, acc_o, max0, max1, sum0, sum1, i, w, thread, lane, col):
        """O / sum and lse of the i-th tile, whose record is read again."""
        m_block, head, batch = records.get(base, i, TILE.M_BLOCK), records.get(base, i, TILE.HEAD), records.get(base, i, TILE.BATCH)
        q_start, seqlen_q = records.get(base, i, TILE.Q_START), records.get(base, i, TILE.SEQLEN_Q)
        thread = opaque(thread)     # opaque: what follows from it is computed here, not kept in registers through the loop
        row = int32(m_block * BLOCK_M + w * ROWS_APART + ((thread >> 5) & 3) * 16 + (lane >> 2))
        of = int32(batch * a.num_heads + head) if BY_BATCH else head
        scale0, scale1, lse0, lse1 = finish(a, of, max0, max1, sum0, sum1)
        if PACKED and SINKS:
            if records.get(base, i, TILE.KIND) == 2:
                lse0, lse1 = NEG_INF, NEG_INF
        acc_o = scale_seen_rows(acc_o, scale0, scale1)
        if FLOATS:
            store_float_rows(a, acc_o, m_block, head, batch, q_start, seqlen_q, w, row, col)
        elif BYTES:
            store_byte_rows(a, acc_o, m_block, head, batch, q_start, seqlen_q, row, col)
        else:
            store(a, base, acc_o, m_block, head, batch, q_start, seqlen_q, w, thread, lane, row, col)
        store_lse(a, head, batch, q_start, seqlen_q, w, lane, row, lse0, lse1)
        records.release(base, i, lane)

    return epilogue
