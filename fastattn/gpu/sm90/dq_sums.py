"""dQ of the Hopper backward: (store_dq, send_dq) of a warp's part of a block of queries.

Sums in memory: each warp stores its piece to shared memory, and TMA adds it to the sums. Where a head's keys are one tile there is nothing
to add: rows of dQ go from the registers to memory. Where they are two, a thread block adds what the other one has stored in its shared
memory.
"""
from __future__ import annotations

from typing import Any

from numba import int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx import cluster, tma, wgmma
from ..ptx.sync import decrease_registers, fence_async, opaque, warp
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.fragments import scale_rows, zeros
from ..tile.gradients import PIECE, add_piece, make_piece_of, make_store, send_piece, store_piece
from ..tile.smem import WARPGROUP_ROWS
from .config import BLOCK_N, BackwardSm90Config
from .consumer import make_order, own_lane, own_thread

Three = tuple[Any, Any, Any]


def make_dq_sums(DIM: int, BLOCK_M: int, DQ: int, SPLIT: bool = False) -> tuple[Any, Any]:
    """Sums of rows of DIM columns and blocks of BLOCK_M queries. DQ: offset of the warps' pieces. SPLIT: a warp has two,
    in turns."""
    piece_of, wait_read = make_piece_of(DIM, BLOCK_M), tma.wait_read_but_one if SPLIT else tma.wait_read

    @inline
    def store_dq(a, base, acc_dq, w, thread, lane, row, batch):
        """A warp's sums to its piece of shared memory, once TMA has read what was there."""
        slot = int32(base + DQ + (w * 4 + (thread >> 5)) * PIECE)
        wait_read()
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


def make_dq_pair(spec: Spec, config: BackwardSm90Config, RECEIVED: int) -> Three:
    """Of heads whose keys are two tiles: (give_dq, take_dq, clear), of a cluster of two thread blocks. The block of queries whose dQ a
    thread block stores is its last one.

    RECEIVED: offset of a piece of each warp, which the same warp of the other thread block writes.
    """
    (store_rows, _), CAUSAL, COUNT = make_dq_rows(spec, config), config.down, config.dim // 2

    @inline
    def own_piece(base, w, thread):
        return int32(base + RECEIVED + (w * 4 + (thread >> 5)) * PIECE + (thread & 31) * 16)

    @inline
    def give_dq(a, base, acc_dq, w, thread, lane, row, batch):
        """A warp's part of dQ to the other thread block, which has begun."""
        send_piece(acc_dq, cluster.address_in(own_piece(base, w, thread), int32(1 - cluster.rank())))

    @inline
    def take_dq(a, base, acc_dq, w, thread, lane, row, batch):
        """Rows of dQ, with what the other thread block has given."""
        cluster.wait()
        store_rows(a, base, add_piece(acc_dq, own_piece(base, w, thread)), w, thread, lane, row, batch)

    @inline
    def clear(base, warpgroup, thread):
        """Before the thread blocks meet: under a causal mask, the first block of queries gets nothing from the second tile of keys."""
        if CAUSAL:
            if warpgroup > 0:
                store_piece(zeros(COUNT), own_piece(base, int32(warpgroup - 1), thread))
    return give_dq, take_dq, clear


def make_dq_stores(spec: Spec, config: BackwardSm90Config, DQ: int) -> tuple[Any, Any, Any, Any]:
    """(store_dq, send_dq, end_dq, clear_dq): end_dq is store_dq of a tile's last block, clear_dq of a pair alone. DQ: offset of a piece of
    each warp."""
    store_dq, send_dq = make_dq_rows(spec, config) if config.one_tile else make_dq_sums(config.dim, config.block_m, DQ, config.split)
    if config.pair:
        give_dq, take_dq, clear_dq = make_dq_pair(spec, config, DQ)
        return give_dq, send_dq, take_dq, clear_dq
    return store_dq, send_dq, store_dq, None


def make_dq_warpgroup(spec: Spec, config: BackwardSm90Config, barriers: Three, parts: Three) -> tuple[Any, Any]:
    """(take_registers(), add_dq(a, base, m_min, m_max, head_k, batch, q_start, keys)) of the warpgroup without keys, of config.split.

    It multiplies dS of all of the tile's keys, one half of the queries after the other. barriers: k_full, keys_cleared and
    the ring of dS. parts: mma_dq, store_dq and send_dq.
    """
    (k_full, keys_cleared, ds_ring), (mma_dq, store_dq, send_dq) = barriers, parts
    COUNT, BLOCK_M, PACKED = config.dim // 2, config.block_m, spec.packed
    (first_block, next_block, is_block, _), first_row = make_order(spec, config), make_first_row(spec)

    @inline
    def product(base, half, buffer):
        acc = mma_dq(base, half, zeros(COUNT), buffer)
        wgmma.commit()
        return wgmma.wait_all(acc)

    @inline
    def put(a, base, acc, half, row, batch):
        thread = own_thread()
        store_dq(a, base, acc, half, thread, own_lane(), row, batch)
        fence_async()
        warp()
        send_dq(a, base, half, thread, row)

    @inline
    def add_dq(a, base, m_min, m_max, head_k, batch, q_start, keys):
        k_full.wait(base, int32(0))
        if PACKED:
            if keys < BLOCK_N:
                keys_cleared.wait(base, int32(0))
        j = int32(0)
        for head in range(int32(head_k * a.group), int32(head_k * a.group + a.group)):
            head_row, m = first_row(a, batch, head, q_start), first_block(m_min, m_max)
            while is_block(m, m_min, m_max):
                base = opaque(base)     # opaque: descriptors are not kept in registers
                buffer, row = int32(j & 1), int32(head_row + m * BLOCK_M)
                ds_ring.wait_full_nth(base, j)
                wgmma.fence()
                put(a, base, product(base, int32(0), buffer), int32(0), row, batch)
                wgmma.fence()
                acc = product(opaque(base), int32(1), buffer)
                ds_ring.release(base, buffer, own_lane())
                put(a, base, acc, int32(1), row, batch)
                j, m = int32(j + 1), next_block(m)
        tma.wait_read()         # shared memory ends with the block
    return decrease_registers(config.dq_registers), add_dq
