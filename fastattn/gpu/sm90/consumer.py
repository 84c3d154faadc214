"""Consumers of the backward kernels: where one is, the blocks of queries of its tile, which thread this is.

The threads' numbers are computed again where they are used, because a main loop has no registers for them.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import int32

from ..dsl.inline import inline
from ..ptx import cluster
from ..ptx.sync import opaque, thread_index, uniform
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.smem import WARPGROUP
from .config import BackwardSm90Config


class Walk(NamedTuple):
    """Where a consumer of `backward` is: j counts query blocks, the slot of Q, the query head and block, the row in memory where the dQ
    that waits in shared memory belongs (negative: none), and what rows of the head share (prepare)."""

    j: Any
    stage: Any
    phase: Any
    head: Any
    m: Any
    waiting: Any
    shared: Any


class Tile(NamedTuple):
    """A tile of keys of `backward`. `first` is the first of the warpgroup's."""

    first: Any
    batch: Any
    q_start: Any
    seqlen_q: Any
    seqlen_k: Any


class Queries(NamedTuple):
    """Blocks of query rows [m_min, m_max) that attend the tile's keys; [full_min, full_max) need no mask for this warpgroup's."""

    m_min: Any
    m_max: Any
    full_min: Any
    full_max: Any


@inline
def own_warpgroup():
    """0 for the first warpgroup of consumers."""
    return int32(uniform(int32(thread_index() >> 7)) - 1)


@inline
def own_thread():
    """The thread in its warpgroup."""
    return int32(thread_index() & (WARPGROUP - 1))


@inline
def own_lane():
    """The lane in its warp."""
    return int32(thread_index() & 31)


def make_fresh(slices: int) -> Any:
    """fresh(base): base, from which descriptors are computed again. With slices all warpgroups have the same rows, so that ptxas
    would compute the descriptors once and keep them in registers."""
    @inline
    def fresh(base):
        if slices > 1:
            return opaque(base)
        else:
            return base
    return fresh


def _make_pair_order(BLOCK_M: int) -> tuple[Any, Any, Any, Any]:
    @inline
    def first_block(m_min, m_max):
        return int32(1 - cluster.rank())

    @inline
    def next_block(m):
        return int32(m + 2 * cluster.rank() - 1)

    @inline
    def is_block(m, m_min, m_max):
        return (m >= m_min) & (m < m_max)

    @inline
    def row_before(a, batch, q_start, head, m, m_min, m_max):
        own = cluster.rank()
        again = m == 1 - own
        m, head = own if again else int32(1 - own), int32(head - 1) if again else head
        return int32(head * a.rows + m * BLOCK_M)
    return first_block, next_block, is_block, row_before


def make_order(spec: Spec, config: BackwardSm90Config) -> tuple[Any, Any, Any, Any]:
    """The order of query blocks [m_min, m_max) in each of a key head's query heads.

    first_block(m_min, m_max), next_block(m), is_block(m, m_min, m_max): a head's blocks, one after the other.
    row_before(a, batch, q_start, head, m, m_min, m_max): first row, in a.accum, of the block that comes before m of `head`. With
    config.one_tile, there is no a.accum, and lines are counted from the batch entry's first. With config.pair the block of queries whose dQ
    a thread block stores, that of its rank, comes last.
    """
    DOWN, BLOCK_M, ONE_TILE, first_row = config.down, config.block_m, config.one_tile, make_first_row(spec)
    if config.pair and not DOWN:
        return _make_pair_order(BLOCK_M)

    @inline
    def first_block(m_min, m_max):
        return int32(m_max - 1) if DOWN else m_min

    @inline
    def next_block(m):
        return int32(m - 1) if DOWN else int32(m + 1)

    @inline
    def is_block(m, m_min, m_max):
        return m >= m_min if DOWN else m < m_max

    @inline
    def line_of(a, batch, head, q_start):
        if ONE_TILE:
            return int32(head * a.rows)
        else:
            return first_row(a, batch, head, q_start)

    @inline
    def row_before(a, batch, q_start, head, m, m_min, m_max):
        if DOWN:
            again = m == m_max - 1
            m, head = m_min if again else int32(m + 1), int32(head - 1) if again else head
            return int32(line_of(a, batch, head, q_start) + m * BLOCK_M)
        else:
            again = m == m_min
            m, head = m_max if again else m, int32(head - 1) if again else head
            return int32(line_of(a, batch, head, q_start) + (m - 1) * BLOCK_M)
    return first_block, next_block, is_block, row_before
