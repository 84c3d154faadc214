"""Consumers of the backward kernels: where one is, the blocks of queries of its tile, which thread this is.

The threads' numbers are computed again where they are used, because a main loop has no registers for them.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from numba import int32

from ..dsl.inline import inline
from ..ptx.sync import thread_index, uniform
from ..tile.smem import WARPGROUP


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
