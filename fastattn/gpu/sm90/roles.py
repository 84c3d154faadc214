"""The roles of a thread block of the Hopper forward: which warpgroup loads, which ones compute, how registers move between them; and which
producers prefetch keys for all."""
from __future__ import annotations

from typing import Any

from numba import int32

from ..dsl.inline import inline
from ..ptx import tma
from ..ptx.sync import decrease_registers, increase_registers
from ..tile.smem import PANEL
from .config import ForwardSm90Config


def make_roles(config: ForwardSm90Config) -> tuple[int, int, Any, Any]:
    """(number of the producer's warpgroup, number of the first consumer's, give_registers(), take_registers()).

    A lone producer is one warp behind the consumers: setmaxnreg is for whole warpgroups, and there all warps have registers enough.
    """
    if not config.lone_producer:
        return 0, 1, decrease_registers(config.producer_registers), increase_registers(config.consumer_registers)

    @inline
    def keep_registers():
        pass
    return config.consumers, 0, keep_registers, keep_registers


def make_prefetch_keys(config: ForwardSm90Config, PANELS: int, PANELS_V: int) -> Any:
    """prefetch_keys(a, row, end, m_block, head, head_k, keys): K and V of the block that is config.ahead blocks on, into the L2 cache.

    One of LEADERS tiles does it, of a key head's first query head: tiles in flight go through the same keys at about the same time, so that
    the others find them there.
    """
    AHEAD, LEADERS = config.ahead * config.block_n, 8

    @inline
    def prefetch_keys(a, row, end, m_block, head, head_k, keys):
        if AHEAD > 0:
            if (row - AHEAD >= end) & (m_block & (LEADERS - 1) == 0) & (head == head_k * a.group):
                for p in range(PANELS):
                    tma.prefetch(a.map_k, int32(p * PANEL), int32(row - AHEAD), head_k, keys)
                for p in range(PANELS_V):
                    tma.prefetch(a.map_v, int32(p * PANEL), int32(row - AHEAD), head_k, keys)
    return prefetch_keys
